//! What an interrupted run had downloaded, kept for the next one: a file named by
//! the tarball's digest in `--resume-dir`.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use oscontainer_artifact::manifest::Tarball;
use oscontainer_program::staging::remove_if_there;

/// The beginning of a tarball on disk, locked while this process works on it.
pub struct Partial {
    file: File,
    path: PathBuf,
    /// Bytes that an earlier run left.
    found: u64,
}

impl Partial {
    /// Opens what there is of `tarball` in `dir`, which is made where it is missing.
    ///
    /// # Errors
    /// When another run works on it, or it cannot be opened.
    pub fn open(dir: &Path, tarball: &Tarball) -> Result<Self> {
        let path = path(dir, tarball);
        let opening = || format!("opening {} in --resume-dir", path.display());
        fs::create_dir_all(dir).with_context(opening)?;
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).with_context(opening)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("another fetch downloads {} now", path.display()),
            Err(TryLockError::Error(error)) => return Err(error).with_context(opening),
        }
        let mut found = file.metadata().with_context(opening)?.len();
        if found > tarball.size {
            file.set_len(0).with_context(opening)?;
            found = 0;
        }
        if found > 0 {
            tracing::info!("{found} of {} bytes are here from an earlier run", tarball.size);
        }
        Ok(Self { file, path, found })
    }

    /// How many bytes an earlier run left.
    pub fn found(&self) -> u64 {
        self.found
    }

    /// Removes what there is of `tarball` in `dir`.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove(dir: &Path, tarball: &Tarball) -> Result<()> {
        remove_if_there(&path(dir, tarball))
    }

    /// What was found, then what comes from `download`, which is kept too.
    pub fn then<R: Read>(self, download: R) -> impl Read {
        Kept { left: self.found, file: self.file, path: self.path, download }
    }
}

fn path(dir: &Path, tarball: &Tarball) -> PathBuf {
    dir.join(format!("sha256-{}.partial", tarball.digest.hex()))
}

struct Kept<R> {
    file: File,
    path: PathBuf,
    /// What is still to be read of what was found.
    left: u64,
    download: R,
}

impl<R: Read> Read for Kept<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left > 0 {
            let limit = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
            let count = self.file.read(&mut buffer[..limit])?;
            self.left -= count as u64;
            return Ok(count);
        }
        let count = self.download.read(buffer)?;
        self.file.write_all(&buffer[..count]).map_err(|error| {
            let text = format!("keeping the download in {}: {error}", self.path.display());
            io::Error::new(error.kind(), text)
        })?;
        Ok(count)
    }
}
