//! The artifact's manifest, version 1 (docs/artifact.md): what a tarball is and
//! what it must hash to. The manifest's own sha256 is the artifact's digest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Rejected;
use crate::digest::{Checksum, Digest};
use crate::protocol::{Name, valid_ref};

/// The media type of the manifest.
pub const MEDIA_TYPE: &str = "application/vnd.oscontainer.artifact.v1+json";
/// The media type of the repository's tarball.
pub const TARBALL_MEDIA_TYPE: &str = "application/vnd.oscontainer.repo.v1.tar";
/// The manifest's file name below `NAME/VERSION/`.
pub const FILE: &str = "manifest.json";
/// The tarball's file name below `NAME/VERSION/`.
pub const TARBALL_FILE: &str = "repo.tar";
/// The largest manifest that is read, in bytes: some hundred times a real one.
pub const MAX_SIZE: u64 = 64 << 10;
/// The annotation with the hash of everything that went into the compose.
pub const INPUTHASH: &str = "rpmostree.inputhash";
/// The annotation with the version of the builder that packed the artifact.
pub const BUILDER: &str = "oscontainer.builder";
/// The annotation with the commit's packages: `NAME-[EPOCH:]VERSION-RELEASE.ARCH`, sorted, with a
/// space between them; left out where the manifest would become too large.
pub const PACKAGES: &str = "rpmostree.packages";

/// The manifest. Read with [`Manifest::parse`], written with [`Manifest::to_bytes`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest {
    /// Always 1.
    pub schema_version: u32,
    /// Always [`MEDIA_TYPE`].
    pub media_type: String,
    /// The artifact's name, by the grammar of [`Name`].
    pub name: Name,
    /// The artifact's version, by the grammar of [`Name`].
    pub version: Name,
    /// OCI's name of the machine's architecture, such as `amd64`.
    pub architecture: String,
    /// The OSTree ref that the tarball's repository holds.
    #[serde(rename = "ref")]
    pub ref_name: String,
    /// The commit that the ref names.
    pub commit: Checksum,
    /// The repository's tarball.
    pub tarball: Tarball,
    /// Facts for people and tools; nothing here is trusted for verification.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// A descriptor of the tarball, after OCI's content descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tarball {
    /// Always [`TARBALL_FILE`], beside the manifest.
    pub path: String,
    /// Always [`TARBALL_MEDIA_TYPE`].
    pub media_type: String,
    /// Bytes.
    pub size: u64,
    /// The sha256 of the whole file.
    pub digest: Digest,
}

impl Manifest {
    /// Reads a manifest and checks every field. Any formatting is read, for the
    /// digest pins the bytes; unknown and duplicate fields are rejected.
    ///
    /// # Errors
    /// [`Rejected`] with the field and what was expected.
    pub fn parse(bytes: &[u8]) -> Result<Self, Rejected> {
        if bytes.len() as u64 > MAX_SIZE {
            return Err(Rejected::new(format!("the manifest has {} bytes, the limit is {MAX_SIZE}", bytes.len())));
        }
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|e| Rejected::new(format!("the manifest is not valid: {e}")))?;
        let expect = |ok: bool, what: String| if ok { Ok(()) } else { Err(Rejected::new(what)) };
        expect(manifest.schema_version == 1, format!("schemaVersion {} is not 1", manifest.schema_version))?;
        expect(manifest.media_type == MEDIA_TYPE, format!("mediaType {:?} is not {MEDIA_TYPE}", manifest.media_type))?;
        let tarball = &manifest.tarball;
        expect(tarball.path == TARBALL_FILE, format!("tarball.path {:?} is not {TARBALL_FILE}", tarball.path))?;
        expect(
            tarball.media_type == TARBALL_MEDIA_TYPE,
            format!("tarball.mediaType {:?} is not {TARBALL_MEDIA_TYPE}", tarball.media_type),
        )?;
        expect(valid_ref(&manifest.ref_name), format!("ref {:?} is not a valid OSTree ref", manifest.ref_name))?;
        expect(
            !manifest.architecture.is_empty() && manifest.architecture.bytes().all(|b| b.is_ascii_alphanumeric()),
            format!("architecture {:?} is not an OCI architecture name such as amd64", manifest.architecture),
        )?;
        Ok(manifest)
    }

    /// The canonical bytes: the fields in the order of the specification, two
    /// spaces of indentation, annotations sorted by key, a newline at the end.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a manifest has string keys only");
        bytes.push(b'\n');
        bytes
    }
}

/// OCI's name (that is, Go's) for an RPM or kernel architecture name such as
/// `x86_64`; names that are the same in both pass unchanged.
pub fn oci_architecture(basearch: &str) -> &str {
    match basearch {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "armhfp" | "armv7hl" | "armv7l" => "arm",
        "i386" | "i686" => "386",
        "loongarch64" => "loong64",
        other => other,
    }
}
