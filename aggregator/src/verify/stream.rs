//! The reader below the tar: it counts, hashes and never reads beyond the size
//! that the manifest states.

use std::io::{self, Read};

use anyhow::{Context, Result};
use oscontainer_artifact::digest::{Digest, Hasher};
use oscontainer_program::reject;

/// A reader of a file whose size is known.
pub struct Counted<R, P> {
    inner: R,
    hasher: Hasher,
    size: u64,
    done: u64,
    progress: P,
}

impl<R: Read, P: Fn(u64)> Counted<R, P> {
    /// Reads at most `size` bytes of `inner` and tells `progress` how many came.
    pub fn new(inner: R, size: u64, progress: P) -> Self {
        Self { inner, hasher: Hasher::new(), size, done: 0, progress }
    }

    /// The digest of everything, which must be `size` bytes and no more.
    ///
    /// # Errors
    /// `Rejected` when there is less or more; other errors when reading fails.
    pub fn finish(mut self) -> Result<Digest> {
        if self.done < self.size {
            reject!("the tarball has {} bytes after its end", self.size - self.done);
        }
        let more = self.inner.read(&mut [0; 1]).context("reading the tarball")?;
        if more != 0 {
            reject!("the tarball has more than the {} bytes that the manifest says", self.size);
        }
        Ok(self.hasher.digest())
    }
}

impl<R: Read, P: Fn(u64)> Read for Counted<R, P> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = usize::try_from(self.size - self.done).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.inner.read(&mut buffer[..limit])?;
        self.hasher.update(&buffer[..count]);
        self.done += count as u64;
        (self.progress)(count as u64);
        Ok(count)
    }
}
