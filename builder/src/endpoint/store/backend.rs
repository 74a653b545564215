//! What every kind of store does: the operations that [`super::Store`] makes its rules of.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use futures_util::Stream;
use futures_util::future::Either;
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::protocol::Name;
use oscontainer_program::files::Content;

use super::record::{Id, Record};
use super::segments::{Segment, Segments};
use super::upload::Hashed;

/// The beginning of a tarball.
#[derive(Debug, Clone, Default)]
pub struct Partial {
    /// How many bytes are here.
    pub offset: u64,
    /// How many there will be.
    pub length: u64,
    /// Where an object store has them: the upload's own id and the segments in their order.
    pub(super) upload: String,
    pub(super) segments: Vec<Segment>,
}

/// A file of a complete version, open for reading.
pub struct Stored {
    /// Bytes.
    pub size: u64,
    /// Where they come from.
    pub source: Source,
}

/// Where a file's bytes come from.
pub enum Source {
    /// A file on disk.
    File(File),
    /// Objects.
    Segments(Segments),
}

impl Content for Source {
    fn stream(self, start: u64, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        match self {
            Self::File(file) => Either::Left(tokio::fs::File::from_std(file).stream(start, length)),
            Self::Segments(segments) => Either::Right(segments.stream(start, length)),
        }
    }
}

/// Where bytes go that come in.
pub trait Sink: Send {
    /// Adds `chunks`.
    fn write(&mut self, chunks: &[Bytes]) -> Result<()>;

    /// Makes durable what was written.
    fn sync(&mut self) -> Result<()>;

    /// Gives the tarball its name by digest, durably: it waits for its manifest now; under the lock of its name. False
    /// if the same is there already; [`super::Interrupted`] where it was deleted while it was written. What was synced
    /// is gone if it does not get its place, unless it is an upload that can be resumed.
    fn place(self: Box<Self>, digest: &Digest) -> Result<bool>;

    /// The segments so far, where there are any.
    fn segments(&self) -> Vec<Segment> {
        Vec::new()
    }
}

/// The uploads in one request that are under way, by what they write, with the lengths that they were promised.
#[derive(Debug, Clone, Default)]
pub struct Promises(Arc<Mutex<HashMap<String, u64>>>);

/// An upload under way; dropped, it is over.
pub struct Promise {
    promises: Promises,
    name: String,
}

impl Promises {
    /// Grants `length` bytes to what is written as `name`.
    pub fn grant(&self, name: String, length: u64) -> Promise {
        self.all().insert(name.clone(), length);
        Promise { promises: self.clone(), name }
    }

    /// All of them.
    pub fn all(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.promises.all().remove(&self.name);
    }
}

/// What keeps the files. A version's changes are made under its name's lock.
pub trait Backend: Send + Sync {
    /// Whether it answers.
    fn check(&self) -> Result<()>;

    /// Lets the next endpoint have it.
    fn close(&self) {}

    /// Removes what a crash left and what complete versions do not need, and says what is
    /// wrong with which complete version.
    fn recover(&self, records: &[(Id, Record)]) -> Result<Vec<(Id, String)>>;

    /// The records of the complete versions, or of those of one name.
    fn records(&self, name: Option<&Name>) -> Result<Vec<(Id, Vec<u8>)>>;

    /// A small file of a version.
    fn read(&self, id: &Id, file: &str) -> Result<Option<Vec<u8>>>;

    /// Creates a small file of a version, durably; false if there is another one already.
    fn create(&self, id: &Id, file: &str, bytes: &[u8]) -> Result<bool>;

    /// Removes a small file of a version, durably, if it is there.
    fn remove(&self, id: &Id, file: &str) -> Result<()>;

    /// Opens a version's manifest.
    fn manifest(&self, id: &Id, digest: &Digest) -> Result<Option<Stored>>;

    /// Opens a version's tarball.
    fn tarball(&self, id: &Id, digest: &Digest) -> Result<Option<Stored>>;

    /// The size of a tarball all of whose bytes are there.
    fn whole(&self, id: &Id, digest: &Digest) -> Result<Option<u64>>;

    /// Lets a tarball that waits for its manifest be as young as a new one.
    fn renew(&self, id: &Id, digest: &Digest) -> Result<()>;

    /// Starts to receive a tarball in one go, of which `length` bytes are promised.
    fn receive(&self, id: &Id, length: u64) -> Result<Box<dyn Sink>>;

    /// What there is of an upload.
    fn partial(&self, id: &Id, digest: &Digest) -> Result<Option<Partial>>;

    /// Begins an upload of `length` bytes.
    fn begin(&self, id: &Id, digest: &Digest, length: u64) -> Result<Partial>;

    /// Opens an upload to be added to at its offset. What of it is not in `hashed` is
    /// read and hashed; the offset may be less than the partial's, never more.
    fn append(&self, id: &Id, digest: &Digest, partial: &Partial, hashed: &mut Hashed) -> Result<Box<dyn Sink>>;

    /// Gives an upload up.
    fn cancel(&self, id: &Id, digest: &Digest) -> Result<()>;

    /// The uploads that are resumed.
    fn uploads(&self) -> Result<Vec<(Id, Digest)>>;

    /// Whether nobody has added to an upload for `age`.
    fn is_stale(&self, id: &Id, digest: &Digest, age: Duration) -> Result<bool>;

    /// The versions of which there is something that has no record.
    fn incomplete(&self) -> Result<Vec<Id>>;

    /// Removes what of a version without a record has waited for its manifest for `age`.
    fn expire(&self, id: &Id, age: Duration) -> Result<()>;

    /// Removes what a complete version does not need.
    fn sweep(&self, id: &Id, record: &Record) -> Result<()>;

    /// Removes all of a version, the record first; whether there was anything.
    fn delete(&self, id: &Id) -> Result<bool>;

    /// Bytes that it holds, with those that uploads under way were promised.
    fn used(&self) -> Result<u64>;

    /// Bytes that are free, where there is an end to them.
    fn free(&self) -> Result<Option<u64>>;
}
