//! Where an image goes: `oci:DIR[:TAG]` or `oci-archive:FILE[:TAG]`, in the
//! spelling of skopeo and podman (containers-transports(5)).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// How the image lies there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A directory in the OCI image layout.
    Layout,
    /// Such a directory as one tar file.
    Archive,
}

/// An image's place and, where it has one, its name there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    transport: Transport,
    path: PathBuf,
    tag: Option<String>,
}

impl Reference {
    /// How the image lies there.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// The directory or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The image's name in there (`org.opencontainers.image.ref.name`).
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }
}

impl FromStr for Reference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected oci:DIR[:TAG] or oci-archive:FILE[:TAG]";
        let (transport, rest) = match text.split_once(':') {
            Some(("oci", rest)) => (Transport::Layout, rest),
            Some(("oci-archive", rest)) => (Transport::Archive, rest),
            Some(("docker", _)) => {
                return Err("images are not pushed from here yet: write `--output oci:DIR`, then \
                            `skopeo copy oci:DIR docker://…`, which keeps the digest"
                    .into());
            }
            _ => return Err(expected.into()),
        };
        // As in containers/image, the path ends at the first colon.
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        if path.is_empty() || path.ends_with('/') && transport == Transport::Archive {
            return Err(expected.into());
        }
        if let Some(tag) = tag.filter(|tag| !valid_tag(tag)) {
            return Err(format!("{tag:?} is not a valid name for an image: {expected}"));
        }
        Ok(Self { transport, path: path.into(), tag: tag.map(str::to_owned) })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.transport {
            Transport::Layout => "oci:",
            Transport::Archive => "oci-archive:",
        })?;
        write!(f, "{}", self.path.display())?;
        self.tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

/// The grammar of `org.opencontainers.image.ref.name` (OCI image specification,
/// annotations.md): components joined by `/`, each of letters and digits with
/// single separators, or `--`, between them.
fn valid_tag(tag: &str) -> bool {
    tag.len() <= 255
        && tag.split('/').all(|component| {
            component
                .replace("--", "-")
                .split(['-', '.', '_', ':', '@', '+'])
                .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_spelled_as_skopeo_does() {
        for (text, transport, path, tag) in [
            ("oci:a", Transport::Layout, "a", None),
            ("oci:/a/b/:1.0", Transport::Layout, "/a/b/", Some("1.0")),
            ("oci-archive:a.tar:quay.io/x/y:1--2", Transport::Archive, "a.tar", Some("quay.io/x/y:1--2")),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.transport(), reference.path(), reference.tag()), (transport, Path::new(path), tag));
            assert_eq!(reference.to_string(), text);
        }
        for bad in ["", "a", "oci:", "oci::tag", "oci:a:", "oci:a:-x", "oci:a:x y", "dir:a", "oci-archive:a/"] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
        assert!("docker://host/a".parse::<Reference>().unwrap_err().contains("skopeo copy"));
    }
}
