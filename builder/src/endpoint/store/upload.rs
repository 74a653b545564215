//! Files on their way in: written, hashed and counted in one go.

use std::thread;

use anyhow::{Context, Result};
use bytes::Bytes;
use oscontainer_artifact::digest::{Digest, Hasher};

use super::backend::{Partial, Sink};
use super::segments::Segment;

/// What was hashed of an upload, and up to which byte.
#[derive(Default)]
pub struct Hashed {
    pub(super) hasher: Hasher,
    /// Up to which byte.
    pub(super) offset: u64,
    pub(super) segments: Vec<Segment>,
}

impl Hashed {
    /// Whether it is the beginning of what the store has.
    pub(super) fn is_of(&self, partial: &Partial) -> bool {
        self.offset <= partial.offset && partial.segments.starts_with(&self.segments)
    }
}

/// A file on its way in: written, hashed and counted in one go.
pub struct Upload {
    pub(super) sink: Option<Box<dyn Sink>>,
    pub(super) hasher: Hasher,
    pub(super) size: u64,
}

impl Upload {
    pub(super) fn new(sink: Option<Box<dyn Sink>>) -> Self {
        Self { sink, hasher: Hasher::new(), size: 0 }
    }

    /// Hashes and counts only: for a file that is there already.
    pub fn discard() -> Self {
        Self::new(None)
    }

    /// Adds `chunks`: one thread hashes them while this one writes, for each of the two may take
    /// as long as the network.
    ///
    /// # Errors
    /// When the store is full or fails.
    pub fn write(&mut self, chunks: &[Bytes]) -> Result<()> {
        let Self { sink, hasher, size } = self;
        thread::scope(|scope| {
            let mut hash = || chunks.iter().for_each(|chunk| hasher.update(chunk));
            match sink {
                Some(sink) => {
                    thread::Builder::new().spawn_scoped(scope, hash).context("starting a thread")?;
                    sink.write(chunks).context("writing the upload")
                }
                None => {
                    hash();
                    Ok(())
                }
            }
        })?;
        *size += chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        Ok(())
    }

    /// Makes the content durable.
    ///
    /// # Errors
    /// When the store is full or fails.
    pub fn finish(mut self) -> Result<Received> {
        self.sync()?;
        Ok(Received { sink: self.sink, digest: self.hasher.digest(), size: self.size })
    }

    fn sync(&mut self) -> Result<()> {
        self.sink.as_mut().map_or(Ok(()), |sink| sink.sync()).context("syncing the upload")
    }
}

/// A file that came in whole. It is removed unless it gets its place.
pub struct Received {
    pub(super) sink: Option<Box<dyn Sink>>,
    /// What was received.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// A partial tarball that is being added to.
pub struct Appending {
    pub(super) upload: Upload,
    /// How many bytes there will be.
    pub length: u64,
}

impl Appending {
    /// How many bytes are here.
    pub fn offset(&self) -> u64 {
        self.upload.size
    }

    /// Adds `chunks`.
    ///
    /// # Errors
    /// When the store is full or fails.
    pub fn write(&mut self, chunks: &[Bytes]) -> Result<()> {
        self.upload.write(chunks)
    }

    /// Makes what is here durable, so that its offset may be told.
    ///
    /// # Errors
    /// When the store is full or fails.
    pub fn sync(&mut self) -> Result<()> {
        self.upload.sync()
    }

    /// What was hashed. Where the store has not yet what was written last, it finds that
    /// out by itself.
    pub fn hashed(self) -> Hashed {
        let Upload { sink, hasher, size } = self.upload;
        Hashed { hasher, offset: size, segments: sink.map(|sink| sink.segments()).unwrap_or_default() }
    }
}
