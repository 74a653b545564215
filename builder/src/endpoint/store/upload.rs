//! Files on their way in: written, hashed and counted in one go.

use std::panic::resume_unwind;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail};
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
    sink: Option<Box<dyn Sink>>,
    hashing: Hashing,
    size: u64,
    /// Whether there is room for all of it, whatever else comes.
    pub(super) promised: bool,
}

impl Upload {
    /// One whose bytes go to `sink`, after those that were hashed.
    pub(super) fn new(sink: Option<Box<dyn Sink>>, hashed: Hashed) -> Self {
        Self { sink, hashing: Hashing::Idle(hashed.hasher), size: hashed.offset, promised: false }
    }

    /// Hashes and counts only: for a file that is there already.
    pub fn discard() -> Self {
        Self::new(None, Hashed::default())
    }

    /// Adds `chunks`: another thread hashes them, while this one writes and the next ones come in, for each of
    /// these may take as long as the network.
    ///
    /// # Errors
    /// When the store is full or fails.
    pub fn write(&mut self, chunks: &[Bytes]) -> Result<()> {
        self.hashing.update(chunks)?;
        if let Some(sink) = &mut self.sink {
            sink.write(chunks).context("writing the upload")?;
        }
        self.size += chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        Ok(())
    }

    /// Makes the content durable.
    ///
    /// # Errors
    /// When the store is full or fails.
    pub fn finish(mut self) -> Result<Received> {
        self.sync()?;
        Ok(Received { sink: self.sink, digest: self.hashing.end().digest(), size: self.size, promised: self.promised })
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
    pub(super) promised: bool,
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
        let Upload { sink, hashing, size, .. } = self.upload;
        Hashed { hasher: hashing.end(), offset: size, segments: sink.map(|sink| sink.segments()).unwrap_or_default() }
    }
}

/// A hasher, in a thread of its own from the first bytes on.
enum Hashing {
    Idle(Hasher),
    Running { chunks: SyncSender<Vec<Bytes>>, thread: JoinHandle<Hasher> },
}

impl Hashing {
    /// Hands `chunks` over; waits until those before them are hashed, so that no more than these are in memory.
    fn update(&mut self, chunks: &[Bytes]) -> Result<()> {
        if let Self::Idle(hasher) = self {
            let mut hasher = std::mem::take(hasher);
            let (sender, receiver) = sync_channel::<Vec<Bytes>>(0);
            let hash = move || {
                receiver.iter().flatten().for_each(|chunk| hasher.update(&chunk));
                hasher
            };
            let thread = thread::Builder::new().name("hash".into()).spawn(hash).context("starting a thread")?;
            *self = Self::Running { chunks: sender, thread };
        }
        match self {
            Self::Running { chunks: sender, .. } => sender.send(chunks.to_vec()).context("hashing the upload"),
            Self::Idle(_) => bail!("hashing the upload: no thread was started"),
        }
    }

    /// The hasher, when it has seen everything.
    fn end(self) -> Hasher {
        match self {
            Self::Idle(hasher) => hasher,
            Self::Running { chunks, thread } => {
                drop(chunks);
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))
            }
        }
    }
}
