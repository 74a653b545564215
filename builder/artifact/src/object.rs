//! OSTree object formats.
