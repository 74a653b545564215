//! The names and limits of the artifact endpoint's protocol (docs/artifact.md).

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};

use crate::Rejected;
use crate::digest::Digest;

/// Where all artifacts lie below an endpoint's URL.
pub const PREFIX: &str = "/v1/artifacts/";
/// The reserved version that redirects to the newest complete one.
pub const LATEST: &str = "latest";
/// `Content-Digest`'s sibling that names the whole representation (RFC 9530).
pub const REPR_DIGEST: &str = "repr-digest";
/// The digest of a message's content; of a whole file's, it says the same.
pub const CONTENT_DIGEST: &str = "content-digest";

/// Where the uploads of tarballs that are resumed lie.
pub const UPLOADS: &str = "/v1/uploads/";
/// Whether an upload is complete (draft-ietf-httpbis-resumable-upload; the next ones too).
pub const UPLOAD_COMPLETE: &str = "upload-complete";
/// At which byte an upload is.
pub const UPLOAD_OFFSET: &str = "upload-offset";
/// How many bytes an upload will have.
pub const UPLOAD_LENGTH: &str = "upload-length";
/// What a server says of its limits.
pub const UPLOAD_LIMIT: &str = "upload-limit";
/// Which revision of the draft a client speaks, as long as it is one.
pub const UPLOAD_INTEROP_VERSION: &str = "upload-draft-interop-version";
/// The revision that is spoken here.
pub const INTEROP_VERSION: &str = "8";
/// The media type of bytes that are added to an upload.
pub const PARTIAL_MEDIA_TYPE: &str = "application/partial-upload";

/// An artifact's NAME or VERSION: `[A-Za-z0-9][A-Za-z0-9._+-]{0,127}`, not `latest`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = Rejected;

    fn from_str(text: &str) -> Result<Self, Rejected> {
        let bytes = text.as_bytes();
        let first = bytes.first().is_some_and(u8::is_ascii_alphanumeric);
        let rest = bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._+-".contains(b));
        if first && rest && bytes.len() <= 128 && text != LATEST {
            Ok(Self(text.to_owned()))
        } else {
            Err(Rejected::new(format!(
                "{text:?} is not a valid name or version: expected a letter or digit, then at most 127 of \
                 letters, digits, '.', '_', '+' and '-', and not {LATEST:?}"
            )))
        }
    }
}

impl TryFrom<String> for Name {
    type Error = Rejected;

    fn try_from(text: String) -> Result<Self, Rejected> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `name` is an OSTree ref: components of `[A-Za-z0-9_.-]` that do not
/// start with a dot, joined by `/` (libostree, ostree-core.c,
/// `OSTREE_REF_FRAGMENT_REGEXP`); at most 255 bytes here.
pub fn valid_ref(name: &str) -> bool {
    name.len() <= 255
        && name.split('/').all(|part| {
            part.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        })
}

/// The path of a file of an artifact, below the endpoint's URL.
pub fn path(name: &Name, version: &Name, file: &str) -> String {
    format!("{PREFIX}{name}/{version}/{file}")
}

/// The value of `Repr-Digest` for a file: `sha-256=:BASE64:` (RFC 9530).
pub fn digest_header(digest: &Digest) -> String {
    format!("sha-256=:{}:", BASE64_STANDARD.encode(digest.bytes()))
}

/// The SHA-256 in the value of a `Repr-Digest` or `Content-Digest`, a dictionary
/// of algorithms (RFC 9530, 2); `None` where it names other algorithms only.
///
/// # Errors
/// [`Rejected`] where the SHA-256 is malformed.
pub fn parse_digest_header(value: &str) -> Result<Option<Digest>, Rejected> {
    for member in value.split(',').map(str::trim) {
        let Some(rest) = member.strip_prefix("sha-256=") else { continue };
        let bytes = rest
            .strip_prefix(':')
            .and_then(|rest| rest.strip_suffix(':'))
            .and_then(|base64| BASE64_STANDARD.decode(base64).ok())
            .and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        return match bytes {
            Some(bytes) => Ok(Some(bytes.into())),
            None => Err(Rejected::new(format!("{member:?} is not sha-256=:BASE64: of 32 bytes"))),
        };
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_refs_are_strict() {
        for good in ["a", "1.0-2+b", "A_b", &"x".repeat(128)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "latest", "ä", "a\n", &"x".repeat(129)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
        for good in ["demo/x86_64/host", "a", "a.b-c_d"] {
            assert!(valid_ref(good), "{good}");
        }
        for bad in ["", "/", "a/", "/a", "a//b", "..", "a/../b", ".a", "a b", "a:b"] {
            assert!(!valid_ref(bad), "{bad}");
        }
    }

    #[test]
    fn digest_headers_are_read_back() {
        let digest = Digest::of(b"x");
        let header = digest_header(&digest);
        assert_eq!(header, "sha-256=:LXEWQrcmsEQBYnyp+6wy9chTD7GQPMTbAiWHF5IaSIE=:");
        for good in [header.clone(), format!("sha-512=:AAAA:, {header}"), format!("{header}, md5=:AA==:")] {
            assert_eq!(parse_digest_header(&good).unwrap(), Some(digest), "{good}");
        }
        assert_eq!(parse_digest_header("sha-512=:AAAA:").unwrap(), None);
        for bad in ["sha-256=:AAAA:", "sha-256=AAAA", "sha-256=:", "sha-256=:*:"] {
            assert!(parse_digest_header(bad).is_err(), "{bad}");
        }
    }
}
