//! Lockfiles, which pin packages, in rpm-ostree's format (coreos/rpm-ostree,
//! rust/src/lockfile.rs):
//!
//!     {"packages": {NAME: {"evra": "EPOCH:VERSION-RELEASE.ARCH", "digest": "sha256:…"}},
//!      "source-packages": {NAME: "EPOCH:VERSION-RELEASE"}}
//!
//! `evr` instead of `evra` pins a package in all of its architectures.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::{reject, staging, stop};
use ostree::glib::{Checksum, ChecksumType};
use serde::{Deserialize, Serialize};

use super::plan::Planned;

/// The algorithms that repositories' metadata may use, and the hex digits of each
/// (libdnf, libdnf/hy-util.cpp, `hy_chksum_name`).
const ALGORITHMS: [(&str, ChecksumType, usize); 5] = [
    ("md5", ChecksumType::Md5, 32),
    ("sha1", ChecksumType::Sha1, 40),
    ("sha256", ChecksumType::Sha256, 64),
    ("sha384", ChecksumType::Sha384, 96),
    ("sha512", ChecksumType::Sha512, 128),
];

/// What one or several lockfiles say.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Lockfile {
    #[serde(skip_serializing_if = "Option::is_none")]
    packages: Option<BTreeMap<String, Locked>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_packages: Option<BTreeMap<String, String>>,
    /// When and from what it was made: nothing depends on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<serde_json::Value>,
}

/// A pinned package.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Locked {
    /// With its architecture …
    #[serde(skip_serializing_if = "Option::is_none")]
    evra: Option<String>,
    /// … or without.
    #[serde(skip_serializing_if = "Option::is_none")]
    evr: Option<String>,
    /// That of the file, `ALGORITHM:HEX`.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<serde_json::Value>,
}

impl Locked {
    fn is(&self, package: &Available) -> bool {
        let evr = package.evr.as_str();
        match (&self.evra, &self.evr) {
            (Some(evra), _) => without_epoch_0(evra) == format!("{evr}.{}", package.arch),
            (None, Some(locked)) => without_epoch_0(locked) == evr,
            (None, None) => false,
        }
    }

    fn version(&self) -> &str {
        self.evra.as_deref().or(self.evr.as_deref()).unwrap_or_default()
    }
}

fn without_epoch_0(evr: &str) -> &str {
    evr.strip_prefix("0:").unwrap_or(evr)
}

/// A package that a repository has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// Its name.
    pub name: String,
    /// `EPOCH:VERSION-RELEASE`, without an epoch of 0.
    pub evr: String,
    /// Its architecture.
    pub arch: String,
    /// The file name of its source package.
    pub source: String,
    /// The repository's id.
    pub repository: String,
    /// Where its file is in the repository.
    pub location: String,
}

impl Available {
    /// How dnf takes it for this one and no other.
    pub fn nevra(&self) -> String {
        format!("{}-{}.{}", self.name, self.evr, self.arch)
    }
}

/// Packages, as a lockfile sees them.
pub struct Divided<'a> {
    /// Those that are the pinned ones.
    pub pinned: Vec<&'a Available>,
    /// Those that would be in their place.
    pub others: Vec<&'a Available>,
    /// `NAME VERSION` of what is pinned and not there: an error only where it is needed, for one
    /// lockfile may serve several treefiles and architectures.
    pub missing: Vec<String>,
}

impl Lockfile {
    /// Reads lockfiles, JSON or YAML by their names; of a package in several, the last counts.
    ///
    /// # Errors
    /// Rejected when one is no lockfile; else when it cannot be read.
    pub fn read(files: &[PathBuf]) -> Result<Self> {
        let mut all = Self::default();
        for path in files {
            let text = match fs::read_to_string(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => reject!("there is no lockfile {}", path.display()),
                Err(error) if [ErrorKind::IsADirectory, ErrorKind::InvalidData].contains(&error.kind()) => {
                    reject!("{} is no lockfile: {error}", path.display())
                }
                text => text.with_context(|| format!("reading the lockfile {}", path.display()))?,
            };
            let yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
            let parsed: Result<Self, String> = match yaml {
                true => serde_yaml::from_str(&text).map_err(|error| error.to_string()),
                false => serde_json::from_str(&text).map_err(|error| error.to_string()),
            };
            let lockfile = match parsed {
                Ok(lockfile) => lockfile,
                Err(error) => reject!("{} is no lockfile: {error}", path.display()),
            };
            lockfile.check(path)?;
            all.packages.get_or_insert_default().extend(lockfile.packages.into_iter().flatten());
            all.source_packages.get_or_insert_default().extend(lockfile.source_packages.into_iter().flatten());
        }
        Ok(all)
    }

    fn check(&self, path: &Path) -> Result<()> {
        if self.packages.is_none() && self.source_packages.is_none() {
            reject!("{}: neither `packages` nor `source-packages` is in this lockfile", path.display());
        }
        for (name, locked) in self.packages.iter().flatten() {
            if locked.evra.is_some() == locked.evr.is_some() {
                reject!("{}: {name} needs one of evra and evr", path.display());
            }
            if let Some(digest) = locked.digest.as_ref().filter(|digest| algorithm(digest).is_none()) {
                let known = ALGORITHMS.map(|(name, ..)| name).join(", ");
                reject!("{}: {name}: {digest:?} is no digest: one of {known}, a colon and hex digits", path.display());
            }
        }
        Ok(())
    }

    /// Whether it pins anything.
    pub fn is_empty(&self) -> bool {
        self.packages.as_ref().is_none_or(BTreeMap::is_empty) && !self.has_sources()
    }

    fn has_sources(&self) -> bool {
        self.source_packages.as_ref().is_some_and(|packages| !packages.is_empty())
    }

    /// The names to look for in the repositories; none for all, where a pinned source
    /// package may have any.
    pub fn names(&self) -> Vec<&str> {
        if self.has_sources() {
            Vec::new()
        } else {
            self.packages.iter().flatten().map(|(name, _)| name.as_str()).collect()
        }
    }

    /// Tells pinned packages from those that would be in their place.
    pub fn divide<'a>(&self, available: &'a [Available]) -> Divided<'a> {
        let mut missing: BTreeSet<String> =
            self.packages.iter().flatten().map(|(name, locked)| format!("{name} {}", locked.version())).collect();
        let (mut pinned, mut others) = (Vec::new(), Vec::new());
        for package in available {
            let by_name = self.packages.as_ref().and_then(|packages| packages.get(&package.name));
            let source = package.source.strip_suffix(".src.rpm").unwrap_or(&package.source);
            let by_source = self.source_packages.iter().flatten().find_map(|(name, evr)| {
                let version = source.strip_prefix(name.as_str())?.strip_prefix('-')?;
                // The name of a source package has no epoch, and a name can be the beginning of another.
                (version.split('-').count() == 2).then(|| evr.rsplit(':').next() == Some(version))
            });
            let matches = match by_name {
                Some(locked) => {
                    let is = locked.is(package);
                    if is {
                        missing.remove(&format!("{} {}", package.name, locked.version()));
                    }
                    Some(is && by_source.unwrap_or(true))
                }
                None => by_source,
            };
            match matches {
                Some(true) => pinned.push(package),
                Some(false) => others.push(package),
                None => {}
            }
        }
        Divided { pinned, others, missing: missing.into_iter().collect() }
    }

    /// Holds the files of the resolved packages, where they are known, against the pinned digests.
    ///
    /// # Errors
    /// Rejected when one is different or not known.
    pub fn verify(&self, packages: &[Planned], files: Option<&[PathBuf]>) -> Result<()> {
        for (index, package) in packages.iter().enumerate() {
            let locked = self.packages.as_ref().and_then(|packages| packages.get(&package.name));
            let Some(expected) = locked.and_then(|locked| locked.digest.as_ref()) else { continue };
            let Some(file) = files.map(|files| &files[index]) else {
                reject!("the lockfile pins the digest of {}, but files are not where repositories say", package.name);
            };
            let digest = measure(file, expected)?;
            if digest != *expected {
                reject!("{} has {digest}, but the lockfile pins {expected}", file.display());
            }
        }
        Ok(())
    }
}

/// Writes the lockfile that pins `packages`, with digests where their files are known; `time`
/// is when, in RFC 3339's form.
///
/// # Errors
/// Rejected when architectures of a package have different versions, which no lockfile can say;
/// else when a package cannot be read, or `path` not be written.
pub fn write(path: &Path, packages: &[Planned], files: Option<&[PathBuf]>, time: Option<String>) -> Result<()> {
    let mut locked: BTreeMap<String, Locked> = BTreeMap::new();
    for (index, package) in packages.iter().enumerate() {
        let entry = match packages.iter().find(|other| other.name == package.name && other.arch != package.arch) {
            None => {
                let digest = files.map(|files| digest(&files[index])).transpose()?;
                let evra = Some(format!("{}.{}", package.evr, package.arch));
                Locked { evra, digest: digest.map(|digest| digest.to_string()), ..Locked::default() }
            }
            // The format has one entry, and in it one digest, for all architectures.
            Some(other) if other.evr == package.evr => Locked { evr: Some(package.evr.clone()), ..Locked::default() },
            Some(other) => reject!(
                "{} is {}.{} and {}.{}: a lockfile has one version of each package",
                package.name,
                package.evr,
                package.arch,
                other.evr,
                other.arch
            ),
        };
        locked.insert(package.name.clone(), entry);
    }
    let lockfile = Lockfile {
        packages: Some(locked),
        source_packages: None,
        metadata: time.map(|time| serde_json::json!({ "generated": time })),
    };
    let text = serde_json::to_string_pretty(&lockfile)? + "\n";
    staging::write(path, text.as_bytes())
}

/// The algorithm of `ALGORITHM:HEX`; `None` for what is no digest.
fn algorithm(digest: &str) -> Option<ChecksumType> {
    let (name, hex) = digest.split_once(':')?;
    let is_hex = hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let known = ALGORITHMS.iter().find(|(known, _, digits)| name == *known && hex.len() == *digits && is_hex);
    known.map(|(_, algorithm, _)| *algorithm)
}

/// The digest of a file by the algorithm of `expected`.
fn measure(file: &Path, expected: &str) -> Result<String> {
    let algorithm = algorithm(expected).context("a lockfile's digests are checked when it is read")?;
    if algorithm == ChecksumType::Sha256 {
        return Ok(digest(file)?.to_string());
    }
    let measure = || -> Result<String> {
        let mut reader = stop::Reader(File::open(file)?);
        let mut checksum = Checksum::new(algorithm).context("GLib has this algorithm")?;
        let mut block = vec![0; 256 << 10];
        loop {
            match reader.read(&mut block)? {
                0 => break,
                count => checksum.update(&block[..count]),
            }
        }
        let hex = checksum.string().context("GLib gives a digest")?;
        Ok(format!("{}:{hex}", expected.split(':').next().unwrap_or_default()))
    };
    measure().with_context(|| format!("reading {}", file.display()))
}

/// The sha256 of a file.
///
/// # Errors
/// When it cannot be read.
pub fn digest(file: &Path) -> Result<Digest> {
    let opened = File::open(file).map(stop::Reader);
    opened.and_then(Digest::read).with_context(|| format!("reading {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::{Available, Divided, Lockfile};

    fn available(name: &str, evr: &str, arch: &str, source: &str) -> Available {
        let [name, evr, arch, source] = [name, evr, arch, source].map(str::to_owned);
        Available { name, evr, arch, source, repository: "r".to_owned(), location: String::new() }
    }

    #[test]
    fn pins_by_name_and_by_source() {
        let dir = tempfile::tempdir().unwrap();
        let (base, overrides) = (dir.path().join("base.json"), dir.path().join("overrides.yaml"));
        let text = r#"{"packages": {"a": {"evra": "0:1-1.noarch"}, "b": {"evr": "2:1-1", "metadata": {"x": 1}}},
                       "source-packages": {"lib": "1:5-1"}, "metadata": {"generated": "2026-11-21T00:00:00Z"}}"#;
        std::fs::write(&base, text).unwrap();
        std::fs::write(&overrides, "packages:\n  a:\n    evr: 2-1\n").unwrap();
        let all = [
            available("a", "1-1", "noarch", "a-1-1.src.rpm"),
            available("a", "2-1", "x86_64", "a-2-1.src.rpm"),
            available("b", "2:1-1", "x86_64", "b-1-1.src.rpm"),
            available("b", "1-1", "x86_64", "b-1-1.src.rpm"),
            available("c", "1-1", "x86_64", "c-1-1.src.rpm"),
            available("lib-x", "1:4-1", "x86_64", "lib-4-1.src.rpm"),
            available("lib-x", "1:5-1", "x86_64", "lib-5-1.src.rpm"),
            available("lib-more", "7-1", "x86_64", "lib-more-7-1.src.rpm"),
        ];
        let divided = |files: &[std::path::PathBuf]| {
            let lockfile = Lockfile::read(files).unwrap();
            let Divided { pinned, others, .. } = lockfile.divide(&all);
            let names =
                |list: Vec<&Available>| list.iter().map(|package| package.nevra()).collect::<Vec<_>>().join(" ");
            (names(pinned), names(others))
        };
        let expected =
            ("a-1-1.noarch b-2:1-1.x86_64 lib-x-1:5-1.x86_64", "a-2-1.x86_64 b-1-1.x86_64 lib-x-1:4-1.x86_64");
        assert_eq!(divided(std::slice::from_ref(&base)), (expected.0.to_owned(), expected.1.to_owned()));
        assert!(divided(&[base.clone(), overrides.clone()]).0.starts_with("a-2-1.x86_64 b-"));
        std::fs::write(&overrides, "packages:\n  a:\n    evr: 3-1\n").unwrap();
        assert_eq!(Lockfile::read(&[base, overrides]).unwrap().divide(&all).missing, ["a 3-1"]);
    }

    #[test]
    fn what_is_no_lockfile_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock.json");
        for (text, reason) in [
            ("{}", "neither `packages`"),
            ("{\"packages\": {}, \"unknown\": 1}", "unknown field"),
            ("{\"packages\": {\"a\": {}}}", "needs one of"),
            ("{\"packages\": {\"a\": {\"evr\": \"1-1\", \"digest\": \"sha512:1\"}}}", "is no digest"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Lockfile::read(std::slice::from_ref(&path)).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
