//! The archive-mode OSTree repository on disk; to come.
