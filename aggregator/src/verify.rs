//! Verification of a tarball; to come.
