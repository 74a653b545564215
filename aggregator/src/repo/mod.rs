//! The archive-mode OSTree repository on disk: reading its refs and commits,
//! writing its summary, and taking in what was verified.

mod staging;
mod summary;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oscontainer_artifact::digest::{Checksum, Digest};
use oscontainer_artifact::manifest::Manifest;
use oscontainer_artifact::object::{Commit, ObjectName, Type};
use oscontainer_artifact::protocol::valid_ref;
use oscontainer_program::exit::Usage;
use oscontainer_program::reject;
use serde::{Deserialize, Serialize};

pub use staging::Staging;

/// The largest `config`, ref file and copy of a manifest that is read, in bytes.
const MAX_SMALL_FILE: u64 = 128 << 10;

/// The file in which `fetch` leaves which artifact the newest commit came from.
const ORIGIN: &str = "extensions/oscontainer/artifact.json";

/// The artifact that a commit came from.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The digest of the manifest's file, which pins the artifact.
    pub digest: Digest,
    /// What the manifest says.
    pub manifest: Manifest,
}

/// A repository that exists and is in archive mode.
#[derive(Debug)]
pub struct Repository {
    path: PathBuf,
}

impl Repository {
    /// Opens the repository at `path`.
    ///
    /// # Errors
    /// [`Usage`] when there is none, or one in another mode.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let config = match read_small(&path.join("config")) {
            Ok(config) => config,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(Usage(format!("{shown} is not an OSTree repository: it has no file config")).into());
            }
            Err(error) => return Err(error).with_context(|| format!("reading {shown}/config")),
        };
        let has = |key: &str, value: &str| {
            config.lines().filter_map(|line| line.split_once('=')).any(|(k, v)| k.trim() == key && v.trim() == value)
        };
        if !has("mode", "archive-z2") && !has("mode", "archive") {
            return Err(Usage(format!("{shown} is not a repository in archive mode")).into());
        }
        if !has("repo_version", "1") {
            return Err(Usage(format!("{shown} is not a repository of version 1")).into());
        }
        Ok(Self { path: path.to_owned() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All refs below `refs/heads` and the commits that they name.
    ///
    /// # Errors
    /// When a ref cannot be read or is none.
    pub fn refs(&self) -> Result<BTreeMap<String, Checksum>> {
        let mut refs = BTreeMap::new();
        let heads = self.path.join("refs/heads");
        let mut waiting = vec![(heads, String::new())];
        while let Some((directory, prefix)) = waiting.pop() {
            let entries =
                fs::read_dir(&directory).with_context(|| format!("reading the directory {}", directory.display()))?;
            for entry in entries {
                let entry = entry.with_context(|| format!("reading the directory {}", directory.display()))?;
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                if entry.file_type()?.is_dir() {
                    waiting.push((entry.path(), format!("{name}/")));
                } else if valid_ref(&name) {
                    let path = entry.path();
                    let text = read_small(&path).with_context(|| format!("reading {}", path.display()))?;
                    let commit = text.trim_end().parse().with_context(|| format!("reading {}", path.display()))?;
                    refs.insert(name, commit);
                }
            }
        }
        Ok(refs)
    }

    /// Reads a commit; its checksum is verified.
    ///
    /// # Errors
    /// When it is not there or damaged.
    pub fn commit(&self, checksum: &Checksum) -> Result<Commit> {
        Ok(self.commit_and_size(checksum)?.0)
    }

    fn commit_and_size(&self, checksum: &Checksum) -> Result<(Commit, u64)> {
        let name = ObjectName::new(*checksum, Type::Commit);
        let path = self.path.join(name.path());
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let size = file.metadata()?.len();
        let links = crate::verify::check_object(name, file).with_context(|| format!("reading {}", path.display()))?;
        let crate::verify::Links::Commit(commit) = links else { reject!("{name} is not a commit") };
        Ok((commit, size))
    }

    /// The artifact that `fetch` took last, where it left that.
    ///
    /// # Errors
    /// Rejected when it is damaged; else when it cannot be read.
    pub fn origin(&self) -> Result<Option<Origin>> {
        let path = self.path.join(ORIGIN);
        let text = match read_small(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        match serde_json::from_str(&text) {
            Ok(origin) => Ok(Some(origin)),
            Err(e) => reject!("{} is damaged: {e}", path.display()),
        }
    }

    /// Leaves which artifact the newest commit came from.
    fn write_origin(&self, origin: &Origin) -> Result<()> {
        let path = self.path.join(ORIGIN);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        }
        replace(&path, &serde_json::to_vec(origin)?)
    }

    /// The canonical summary of `refs`.
    ///
    /// # Errors
    /// When a commit cannot be read.
    pub fn summary(&self, refs: &BTreeMap<String, Checksum>) -> Result<Vec<u8>> {
        let mut entries = Vec::new();
        for (name, checksum) in refs {
            let (commit, size) = self.commit_and_size(checksum)?;
            entries.push(summary::Entry { name: name.clone(), checksum: *checksum, size, commit });
        }
        Ok(summary::to_bytes(&entries))
    }

    /// Writes `summary` anew, if it changes.
    ///
    /// # Errors
    /// When a ref or commit cannot be read, or the summary not written.
    pub fn write_summary(&self) -> Result<()> {
        let bytes = self.summary(&self.refs()?)?;
        let path = self.path.join("summary");
        if fs::read(&path).is_ok_and(|old| old == bytes) {
            return Ok(());
        }
        if self.path.join("summary.sig").exists() {
            tracing::warn!("{}/summary.sig signs the summary before this one: sign anew", self.path.display());
        }
        replace(&path, &bytes)
    }

    /// Lets `name` point to `commit`.
    fn write_ref(&self, name: &str, commit: &Checksum) -> Result<()> {
        let path = self.path.join("refs/heads").join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        }
        replace(&path, format!("{commit}\n").as_bytes())
    }
}

fn read_small(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_SMALL_FILE).read_to_string(&mut text)?;
    Ok(text)
}

/// Replaces a file in one step, by a temporary one beside it.
///
/// # Errors
/// When it cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let parent = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new().prefix(".oscontainer-").permissions(mode(0o644)).tempfile_in(parent)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(parent)?.sync_all()
    };
    write().with_context(|| format!("writing {}", path.display()))
}

fn mode(bits: u32) -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(bits)
}
