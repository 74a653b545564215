//! A directory for what is not finished yet: nothing is visible until one rename.
//! It is locked while its process lives; what a killed process left is removed by
//! the next one that works in the same place.

use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::{NamedTempFile, TempDir};

/// A locked temporary directory; dropped, it is removed.
pub struct Staging {
    dir: TempDir,
    _lock: File,
}

impl Staging {
    /// Makes a directory `PREFIX…` in `parent` (which is made too, where it is
    /// missing) and removes those of that prefix whose process is gone.
    ///
    /// # Errors
    /// When it cannot be made or locked.
    pub fn new(parent: &Path, prefix: &str) -> Result<Self> {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        remove_stale(parent, prefix)?;
        loop {
            let dir = tempfile::Builder::new()
                .prefix(prefix)
                // The umask decides, as for every other directory that a user makes.
                .permissions(Permissions::from_mode(0o777))
                .tempdir_in(parent)
                .with_context(|| format!("making a temporary directory in {}", parent.display()))?;
            // Between mkdir and lock, another process may have taken it for stale.
            let locked = File::open(dir.path()).ok().filter(|file| file.try_lock().is_ok());
            if let Some(lock) = locked
                && fs::metadata(dir.path())
                    .is_ok_and(|there| lock.metadata().is_ok_and(|ours| there.ino() == ours.ino()))
            {
                return Ok(Self { dir, _lock: lock });
            }
        }
    }

    /// A directory beside `target`, on the same file system.
    ///
    /// # Errors
    /// As [`Staging::new`]; when `target` has no name.
    pub fn beside(target: &Path, purpose: &str) -> Result<Self> {
        let name = target.file_name().with_context(|| format!("{} names no file", target.display()))?;
        Self::new(parent(target), &format!(".{}.{purpose}-", name.to_string_lossy()))
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Renames the directory itself to `target`, which must not exist or be an
    /// empty directory, and syncs its parent.
    ///
    /// # Errors
    /// When the rename fails; the directory is then removed.
    pub fn rename_to(self, target: &Path) -> Result<()> {
        fs::rename(self.dir.path(), target).with_context(|| format!("renaming the finished {}", target.display()))?;
        // It has another name now: there is nothing to remove.
        let _ = self.dir.keep();
        sync_dir(parent(target))
    }
}

/// The directory that `path` lies in.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a file for everyone to read, in the place of what is there: whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> Result<()> {
        let mut file = NamedTempFile::new_in(parent(path))?;
        file.write_all(bytes)?;
        file.as_file().set_permissions(Permissions::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        sync_dir(parent(path))
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// Makes renames in `dir` durable.
///
/// # Errors
/// When it cannot be opened or synced.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| format!("syncing {}", dir.display()))
}

/// Removes a file; one that is not there is fine.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn remove_stale(parent: &Path, prefix: &str) -> Result<()> {
    for entry in fs::read_dir(parent).with_context(|| format!("reading {}", parent.display()))? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(prefix) {
            continue;
        }
        let path: PathBuf = entry.path();
        // Whoever holds the lock is alive.
        if File::open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
            match fs::remove_dir_all(&path) {
                Ok(()) => tracing::info!("removed {}, which a killed run left", path.display()),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => tracing::warn!("{} of a killed run cannot be removed: {error}", path.display()),
            }
        }
    }
    Ok(())
}
