//! Where a verified artifact grows, unseen: beside a new repository, or in the
//! `tmp` of one that exists.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::object::{ObjectName, Type};
use oscontainer_artifact::tarball::{CONFIG, DIRECTORIES};
use oscontainer_program::exit::Usage;
use oscontainer_program::staging;
use rustix::fs::{FlockOperation, flock, syncfs};

use super::{Origin, Repository};
use crate::verify::{Objects, Verified, check_object};

/// A repository in the making. Dropped, it leaves nothing.
pub struct Staging {
    directory: staging::Staging,
    output: PathBuf,
    existing: Option<Existing>,
}

/// The repository that is added to.
struct Existing {
    repository: Repository,
    /// Holds the lock against another `fetch` into it.
    _lock: File,
}

impl Staging {
    /// Prepares for a repository at `output`: a new one (an empty directory
    /// counts as none), or one that exists, which then is locked.
    ///
    /// # Errors
    /// [`Usage`] when `output` is something else; other errors when it cannot be written.
    pub fn for_output(output: &Path) -> Result<Self> {
        let shown = output.display();
        let output = std::path::absolute(output).with_context(|| format!("finding {shown}"))?;
        let (Some(parent), Some(name)) = (output.parent(), output.file_name()) else {
            return Err(Usage(format!("{shown} is no name for a new directory")).into());
        };
        let occupied = match fs::read_dir(&output) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => return Err(error).with_context(|| format!("reading the directory {shown}")),
        };
        let existing = if occupied {
            let repository = Repository::open(&output)?;
            let lock = File::open(&output).with_context(|| format!("opening {shown}"))?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                tracing::info!("waiting for another fetch into {shown}");
                flock(&lock, FlockOperation::LockExclusive).with_context(|| format!("locking {shown}"))?;
            }
            Some(Existing { repository, _lock: lock })
        } else {
            None
        };
        let (parent, prefix) = match &existing {
            Some(_) => (output.join("tmp"), ".fetch-".to_owned()),
            None => (parent.to_owned(), format!(".{}.fetch-", name.to_string_lossy())),
        };
        let directory = staging::Staging::new(&parent, &prefix)?;
        for path in DIRECTORIES {
            fs::create_dir(directory.path().join(path)).context("creating the repository's directories")?;
        }
        for start in 0..=255_u8 {
            fs::create_dir(directory.path().join(format!("objects/{start:02x}")))
                .context("creating the repository's directories")?;
        }
        Ok(Self { directory, output, existing })
    }

    /// What was not in the repository before, and sizes in bytes.
    ///
    /// # Errors
    /// When the temporary directory cannot be read.
    pub fn written(&self) -> Result<BTreeMap<ObjectName, u64>> {
        let mut written = BTreeMap::new();
        for directory in sorted(&self.directory.path().join("objects"))? {
            for file in sorted(&directory)? {
                let relative = file.strip_prefix(self.directory.path()).unwrap_or(&file);
                if let Some(name) = relative.to_str().and_then(ObjectName::from_path) {
                    let metadata = fs::metadata(&file).with_context(|| format!("reading {}", file.display()))?;
                    written.insert(name, metadata.len());
                }
            }
        }
        Ok(written)
    }

    /// Makes what was verified visible, and safe from a power cut: a new
    /// repository by one rename; in one that exists the objects one by one, then
    /// the commit, the ref and the summary. `digest` is the artifact's.
    ///
    /// # Errors
    /// When the disk is full or cannot be written.
    pub fn publish(self, verified: &Verified, digest: Digest) -> Result<()> {
        let disk = File::open(self.directory.path()).context("opening the temporary directory")?;
        let manifest = verified.manifest();
        let origin = Origin { digest, manifest: manifest.clone() };
        let commit = ObjectName::new(manifest.commit, Type::Commit);
        for start in 0..=255_u8 {
            // One that holds objects stays.
            let _ = fs::remove_dir(self.directory.path().join(format!("objects/{start:02x}")));
        }
        if let Some(existing) = &self.existing {
            syncfs(&disk).context("writing the objects to disk")?;
            self.move_objects(|name| name != commit)?;
            syncfs(&disk).context("writing the objects to disk")?;
            self.move_objects(|name| name == commit)?;
            existing.repository.write_ref(&manifest.ref_name, &manifest.commit)?;
            existing.repository.write_origin(&origin)?;
            return existing.repository.write_summary();
        }
        let path = self.directory.path();
        fs::write(path.join("config"), CONFIG).with_context(|| format!("writing {}", path.join("config").display()))?;
        let repository = Repository::open(path)?;
        repository.write_ref(&manifest.ref_name, &manifest.commit)?;
        repository.write_origin(&origin)?;
        repository.write_summary()?;
        syncfs(&disk).context("writing the repository to disk")?;
        self.directory.rename_to(&self.output)
    }

    fn move_objects(&self, wanted: impl Fn(ObjectName) -> bool) -> Result<()> {
        let staged = self.directory.path().join("objects");
        for directory in sorted(&staged)? {
            let target = self.output.join("objects").join(directory.file_name().unwrap_or_default());
            for file in sorted(&directory)? {
                let relative = file.strip_prefix(self.directory.path()).unwrap_or(&file);
                if !relative.to_str().and_then(ObjectName::from_path).is_some_and(&wanted) {
                    continue;
                }
                if !target.is_dir() {
                    fs::create_dir(&target).with_context(|| format!("creating {}", target.display()))?;
                }
                let object = self.output.join(relative);
                fs::rename(&file, &object).with_context(|| format!("writing {}", object.display()))?;
            }
        }
        Ok(())
    }
}

impl Objects for Staging {
    fn create(&self, name: &ObjectName) -> Result<Option<File>> {
        let path = name.path();
        if self.existing.is_some()
            && let Ok(file) = File::open(self.output.join(&path))
        {
            // Detached metadata has no checksum: the new one replaces the old.
            match check_object(*name, file) {
                Ok(_) if name.kind != Type::CommitMeta => return Ok(None),
                Ok(_) => {}
                Err(error) => {
                    let found = self.output.join(&path);
                    tracing::warn!("replacing {}, which is damaged: {error:#}", found.display());
                }
            }
        }
        let file = self.directory.path().join(&path);
        File::create_new(&file).map(Some).with_context(|| format!("creating {}", file.display()))
    }
}

fn sorted(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    let mut paths = read().with_context(|| format!("reading the directory {}", directory.display()))?;
    paths.sort();
    Ok(paths)
}
