//! A locked directory beside the result, in which the result grows until one
//! rename makes it visible. The lock ends with the process, even with `kill -9`, so
//! the next run knows what is left over and removes it.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

/// Ends the name of every staging directory, before some random letters.
const MARK: &str = ".oscontainer-";

/// A staging directory; dropped, it is removed.
pub struct Staging {
    directory: TempDir,
    /// Held, not read: the lock ends when it closes.
    _lock: File,
}

impl Staging {
    /// Makes a staging directory for `name` in `parent`, and removes those that
    /// killed runs for the same name left there.
    ///
    /// # Errors
    /// When `parent` cannot be read or written.
    pub fn create(parent: &Path, name: &OsStr) -> Result<Self> {
        let prefix = format!(".{}{MARK}", name.to_string_lossy());
        sweep(parent, &prefix).with_context(|| format!("removing what killed runs left in {}", parent.display()))?;
        loop {
            let directory = tempfile::Builder::new()
                .prefix(&prefix)
                // The umask decides, as for every other directory that a user makes.
                .permissions(Permissions::from_mode(0o777))
                .tempdir_in(parent)
                .with_context(|| format!("making a temporary directory in {}", parent.display()))?;
            // Another run may sweep it away until it is locked.
            if let Some(lock) = lock(directory.path())? {
                return Ok(Self { directory, _lock: lock });
            }
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Locks a staging directory; `None` if someone else has the lock or it is gone.
fn lock(path: &Path) -> Result<Option<File>> {
    let Ok(directory) = File::open(path) else { return Ok(None) };
    if flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(None);
    }
    let same = fs::metadata(path).is_ok_and(|now| directory.metadata().is_ok_and(|then| now.ino() == then.ino()));
    Ok(same.then_some(directory))
}

fn sweep(parent: &Path, prefix: &str) -> Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(prefix) || !entry.file_type()?.is_dir() {
            continue;
        }
        let path: PathBuf = entry.path();
        if let Some(_lock) = lock(&path)? {
            tracing::debug!("removing {}, left by a run that was killed", path.display());
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}
