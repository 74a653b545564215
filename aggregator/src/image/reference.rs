//! Where an image is: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]` or
//! `docker://HOST/NAME[:TAG][@DIGEST]`, in the spelling of skopeo and podman
//! (containers-transports(5)).

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use oscontainer_artifact::digest::Digest;

/// Where names without a host are.
const DOCKER_HUB: &str = "docker.io";
/// The longest name of a repository, and the longest tag (distribution/reference, "Grammar").
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// An image's place and its name there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A directory in the OCI image layout.
    Layout {
        /// The directory.
        path: PathBuf,
        /// The image's name in there (`org.opencontainers.image.ref.name`), where it has one.
        tag: Option<String>,
    },
    /// Such a directory as one tar file.
    Archive {
        /// The file.
        path: PathBuf,
        /// The image's name in there, where it has one.
        tag: Option<String>,
    },
    /// A repository of a registry; with a tag, a digest or both.
    Registry(oci_client::Reference),
}

impl FromStr for Reference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://HOST/NAME:TAG";
        if let Some(rest) = text.strip_prefix("docker://") {
            let reference = in_registry(rest).map_err(|reason| format!("{reason}: {expected}"))?;
            return Ok(Self::Registry(reference));
        }
        let (archive, rest) = match text.split_once(':') {
            Some(("oci", rest)) => (false, rest),
            Some(("oci-archive", rest)) => (true, rest),
            _ => return Err(expected.into()),
        };
        // As in containers/image, the path ends at the first colon.
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag.to_owned())),
            None => (rest, None),
        };
        if path.is_empty() || path.ends_with('/') && archive {
            return Err(expected.into());
        }
        if let Some(tag) = tag.as_ref().filter(|tag| !valid_tag(tag)) {
            return Err(format!("{tag:?} is not a valid name for an image: {expected}"));
        }
        let path = path.into();
        Ok(if archive { Self::Archive { path, tag } } else { Self::Layout { path, tag } })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, tag) = match self {
            Self::Registry(reference) => return write!(f, "docker://{reference}"),
            Self::Layout { path, tag } => ("oci", path, tag),
            Self::Archive { path, tag } => ("oci-archive", path, tag),
        };
        write!(f, "{transport}:{}", path.display())?;
        tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

/// Reads `[HOST[:PORT]/]NAME[:TAG][@DIGEST]` as docker and podman do: without a host it is Docker Hub's. (The OCI
/// client reads them by an expression that takes longer to compile than all else that a start does.)
fn in_registry(text: &str) -> Result<oci_client::Reference, &'static str> {
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest.parse::<Digest>().map_err(|_| "its digest is no SHA-256")?)),
        None => (text, None),
    };
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match name[last..].split_once(':') {
        Some((end, tag)) => (&name[..last + end.len()], Some(tag.to_owned())),
        None => (name, None),
    };
    let is_host =
        |part: &str| part == "localhost" || part.contains(|c: char| matches!(c, '.' | ':') || c.is_ascii_uppercase());
    let (host, path) = match name.split_once('/').filter(|(first, _)| is_host(first)) {
        Some(("index.docker.io", path)) => (DOCKER_HUB, path),
        Some((host, path)) => (host, path),
        None => (DOCKER_HUB, name),
    };
    let path = if host == DOCKER_HUB && !path.contains('/') { format!("library/{path}") } else { path.to_owned() };
    // Looser than the specification's grammar in what a registry itself refuses; nothing leads to another URL.
    let of = |text: &str, more: &[u8]| text.bytes().all(|b| b.is_ascii_alphanumeric() || more.contains(&b));
    let component = |part: &str| {
        let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        end(part.bytes().next()) && end(part.bytes().last()) && of(part, b"._-") && part == part.to_ascii_lowercase()
    };
    if !of(host, b".-:[]") || path.len() > MAX_NAME || !path.split('/').all(component) {
        return Err("it is no name in a registry");
    }
    let is_tag = |tag: &String| tag.len() <= MAX_TAG && !tag.starts_with(['.', '-']) && of(tag, b"._-");
    if tag.as_ref().is_some_and(|tag| tag.is_empty() || !is_tag(tag)) {
        return Err("its tag is none");
    }
    let (host, digest) = (host.to_owned(), digest.map(|digest| digest.to_string()));
    match (tag, digest) {
        (Some(tag), Some(digest)) => Ok(oci_client::Reference::with_tag_and_digest(host, path, tag, digest)),
        (Some(tag), None) => Ok(oci_client::Reference::with_tag(host, path, tag)),
        (None, Some(digest)) => Ok(oci_client::Reference::with_digest(host, path, digest)),
        // Docker would fill in a tag; a version or a digest is to be named here.
        (None, None) => Err("it has no tag and no digest"),
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
        let layout = |path: &str, tag: Option<&str>| Reference::Layout { path: path.into(), tag: tag.map(Into::into) };
        for (text, expected) in [
            ("oci:a", layout("a", None)),
            ("oci:/a/b/:1.0", layout("/a/b/", Some("1.0"))),
            (
                "oci-archive:a.tar:registry.example/x/y:1--2",
                Reference::Archive { path: "a.tar".into(), tag: Some("registry.example/x/y:1--2".into()) },
            ),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference, expected);
            assert_eq!(reference.to_string(), text);
        }
        let digest = format!("localhost:5000/a/b@sha256:{}", "0".repeat(64));
        for name in ["localhost:5000/a/b:1", &digest, "registry.example/a:b"] {
            let text = format!("docker://{name}");
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), text);
        }
        for (short, whole) in [
            ("alpine:3", "docker.io/library/alpine:3"),
            ("a/b:1", "docker.io/a/b:1"),
            ("index.docker.io/a/b:1", "docker.io/a/b:1"),
            ("localhost/a_b/c.d-e:V1_.-", "localhost/a_b/c.d-e:V1_.-"),
            ("[::1]:5000/a:1", "[::1]:5000/a:1"),
        ] {
            let read = format!("docker://{short}").parse::<Reference>().unwrap().to_string();
            assert_eq!(read, format!("docker://{whole}"));
            // As the OCI client reads it, which takes no IPv6 address.
            if let Ok(other) = short.parse::<oci_client::Reference>() {
                assert_eq!(read, format!("docker://{other}"));
            }
        }
        for bad in [
            "",
            "a",
            "oci:",
            "oci::tag",
            "oci:a:",
            "oci:a:-x",
            "oci:a:x y",
            "dir:a",
            "oci-archive:a/",
            "docker:a",
            "docker://",
            "docker://host:5000/a",
            "docker://host/a:",
            "docker://host/A:1",
            "docker://host.x/a:1@sha256:00",
            "docker://host.x/a/../b:1",
            "docker://host.x/a?b:1",
            "docker://host.x//a:1",
            "docker://host.x/a:1/",
            "docker://ho st/a:1",
            "docker://host.x/a:-1",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
