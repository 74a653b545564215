//! What both programs agree on: digests, the artifact's manifest, the names and
//! routes of its protocol, the canonical tarball and OSTree's object formats.
//! Nothing here does I/O; everything takes and gives bytes or plain values.

pub mod digest;
pub mod manifest;
pub mod object;
pub mod protocol;
pub mod tarball;

/// Input that can never become right by trying again: a bad treefile, a digest
/// that does not match, a hostile archive. The programs exit with code 3.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Rejected(pub String);

impl Rejected {
    /// A rejection with the reason that is shown to the user.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}
