//! A complete version's record, and the names of its files.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use oscontainer_artifact::digest::{Checksum, Digest};
use oscontainer_artifact::protocol::Name;
use oscontainer_program::moment;
use serde::{Deserialize, Serialize};

/// The record's file name in a version's directory.
pub const RECORD: &str = "version.json";

/// One version of one artifact.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Id {
    /// The artifact's name.
    pub name: Name,
    /// Its version.
    pub version: Name,
}

/// What is known of a complete version. Its file's appearance is the one commit
/// point of an upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    /// The manifest's digest: the digest of the artifact.
    pub manifest_digest: Digest,
    /// Bytes of the manifest.
    pub manifest_size: u64,
    /// The tarball's digest.
    pub digest: Digest,
    /// Bytes of the tarball.
    pub size: u64,
    /// The commit in the tarball, as the manifest says.
    pub commit: Checksum,
    /// The ref in the tarball, as the manifest says.
    #[serde(rename = "ref")]
    pub ref_name: String,
    /// OCI's name of the architecture, as the manifest says.
    pub architecture: String,
    /// When the manifest was stored, in nanoseconds since 1970; it grows with each
    /// version of a name, even if the clock is set back.
    pub stored: u64,
}

impl Record {
    /// When the manifest was stored, as RFC 3339 has it, to the second.
    pub fn stored_utc(&self) -> String {
        moment::utc(self.stored / 1_000_000_000).expect("2^64 nanoseconds end in the year 2554")
    }

    pub(super) fn parse(bytes: &[u8], id: &Id) -> Result<Self> {
        serde_json::from_slice(bytes).with_context(|| format!("reading the record of {} {}", id.name, id.version))
    }
}

/// The name of a file by its digest.
pub fn file_name(digest: &Digest) -> String {
    format!("sha256-{}", digest.hex())
}

/// The digest that [`file_name`] wrote.
pub fn digest_of(file_name: &str) -> Option<Digest> {
    format!("sha256:{}", file_name.strip_prefix("sha256-")?).parse().ok()
}

/// Nanoseconds since 1970; they fit until the year 2554.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}
