//! The names and limits of the artifact endpoint's protocol (docs/artifact.md).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Rejected;

/// Where all artifacts lie below an endpoint's URL.
pub const PREFIX: &str = "/v1/artifacts/";
/// The reserved version that redirects to the newest complete one.
pub const LATEST: &str = "latest";
/// `Content-Digest`'s sibling that names the whole representation (RFC 9530).
pub const REPR_DIGEST: &str = "repr-digest";

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
}
