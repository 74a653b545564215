//! What is stored and when it becomes visible, whatever keeps it: a directory
//! (directory.rs) or an object store (objects.rs). Files are kept by digest; a version is
//! complete, and visible, from the moment its record exists, and a record is only ever
//! created, never replaced.
//!
//!     STORE/artifacts/NAME/VERSION/version.json     the record: the commit point
//!     STORE/artifacts/NAME/VERSION/sha256-HEX…      tarballs and the manifest, by digest
//!     STORE/uploads/NAME/VERSION/…                  uploads that are resumed
//!
//! Everything here is synchronous; [`super::routes`] enters it on blocking threads.

mod backend;
mod directory;
mod lease;
mod location;
mod objects;
mod record;
mod segments;
mod swift;
mod upload;

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher as _};
use std::io::{self, ErrorKind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::manifest::Manifest;
use oscontainer_artifact::protocol::Name;

use backend::Backend;
pub use backend::{Partial, Stored};
pub use location::StoreOptions;
use record::RECORD;
pub use record::{Id, Record, digest_of, file_name, now};
pub use upload::{Appending, Hashed, Received, Upload};

/// What the record of a damaged version becomes.
const DAMAGED: &str = "version.json.damaged";
/// How many locks the artifacts' names share.
const LOCKS: usize = 64;

/// What was under way cannot go on: somebody else was faster. Whoever sends it again starts from what is there now.
#[derive(Debug, thiserror::Error)]
#[error("{0}; send it again")]
pub struct Interrupted(pub &'static str);

impl Interrupted {
    /// The version was deleted meanwhile.
    const DELETED: Self = Self("the version was deleted while the upload was under way");
}

/// What became of a file that a client sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is there now, and durable.
    Created,
    /// The same bytes were there before.
    Same,
    /// A complete version holds this digest under that name instead.
    Conflict(Digest),
    /// The manifest's tarball was not uploaded, or has another size.
    NoTarball,
}

/// What the store has of an upload.
pub enum Found {
    /// Nothing.
    Nothing,
    /// A part of it.
    Partial(Partial),
    /// The tarball, of so many bytes: it waits for its manifest, or the version is complete.
    Whole(u64),
    /// The version is complete with this one instead.
    Conflict(Digest),
}

/// Artifacts, and the rules by which they come and go.
pub struct Store {
    backend: Box<dyn Backend>,
    /// Bytes that it may hold.
    quota: Option<u64>,
    /// Held from looking what is free until it is promised.
    promising: Mutex<()>,
    names: [Mutex<()>; LOCKS],
}

impl Store {
    /// Opens the store that the options name, and puts right what a crash left.
    ///
    /// # Errors
    /// When another process serves it, or it cannot be used.
    pub fn open(options: &StoreOptions, quota: Option<u64>) -> Result<Self> {
        let location = options.location()?;
        let store = Self {
            backend: location.open()?,
            quota,
            promising: Mutex::default(),
            names: std::array::from_fn(|_| Mutex::new(())),
        };
        store.recover().context("checking the store")?;
        Ok(store)
    }

    /// Removes what a crash left, and takes damaged versions out of service.
    fn recover(&self) -> Result<()> {
        let mut complete = Vec::new();
        let mut records = HashMap::new();
        for (id, bytes) in self.backend.records(None)? {
            match Record::parse(&bytes, &id) {
                Ok(record) => {
                    complete.push((id.clone(), record));
                    records.insert(id, bytes);
                }
                Err(error) => self.take_out(&id, &bytes, &format!("{error:#}"))?,
            }
        }
        for (id, damage) in self.backend.recover(&complete)? {
            if let Some(record) = records.get(&id) {
                self.take_out(&id, record, &damage)?;
            }
        }
        Ok(())
    }

    /// Takes a damaged version out of service, so that it can be published again; not one that another
    /// endpoint has published again meanwhile, with another `record`.
    fn take_out(&self, id: &Id, record: &[u8], damage: &str) -> Result<()> {
        if self.backend.read(id, RECORD)?.as_deref() != Some(record) {
            return Ok(());
        }
        tracing::error!("{} {} is damaged and not served; publish it again: {damage}", id.name, id.version);
        self.backend.remove(id, DAMAGED)?;
        self.backend.create(id, DAMAGED, record)?;
        self.backend.remove(id, RECORD)
    }

    /// Lets the next endpoint have it.
    pub fn close(&self) {
        self.backend.close();
    }

    /// Whether the store answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn check(&self) -> Result<()> {
        self.backend.check()
    }

    /// Bytes that are free for uploads, of the disk and of the quota.
    fn free(&self) -> Result<u64> {
        let free = self.disk_free()?;
        match self.quota {
            None => Ok(free),
            Some(quota) => Ok(free.min(quota.saturating_sub(self.backend.used()?))),
        }
    }

    /// Bytes that are free whatever the quota says.
    ///
    /// # Errors
    /// When the store does not say.
    pub fn disk_free(&self) -> Result<u64> {
        Ok(self.backend.free()?.unwrap_or(u64::MAX))
    }

    /// How much of everything there is.
    ///
    /// # Errors
    /// When the store does not say.
    pub fn usage(&self) -> Result<Usage> {
        let artifacts = self.all()?;
        let records = || artifacts.iter().flat_map(|(_, versions)| versions).map(|(_, record)| record);
        let (used, disk) = (self.backend.used()?, self.backend.free()?);
        let left = self.quota.map(|quota| quota.saturating_sub(used));
        let stored = records().map(|record| record.size + record.manifest_size).sum();
        Ok(Usage {
            versions: records().count() as u64,
            stored,
            staged: used.saturating_sub(stored),
            quota: self.quota,
            free: disk.into_iter().chain(left).min(),
        })
    }

    /// The record of a complete version.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn record(&self, id: &Id) -> Result<Option<Record>> {
        self.backend.read(id, RECORD)?.map(|bytes| Record::parse(&bytes, id)).transpose()
    }

    /// Opens the manifest of a version with that digest.
    ///
    /// # Errors
    /// When it cannot be opened; `None` where it is gone.
    pub fn manifest(&self, id: &Id, digest: &Digest) -> Result<Option<Stored>> {
        self.backend.manifest(id, digest)
    }

    /// Opens the tarball of a version with that digest.
    ///
    /// # Errors
    /// When it cannot be opened; `None` where it is gone.
    pub fn tarball(&self, id: &Id, digest: &Digest) -> Result<Option<Stored>> {
        self.backend.tarball(id, digest)
    }

    /// Starts to receive a tarball of `length` bytes, or of nobody knows how many; also how many there is room for.
    /// Nothing where there is no room.
    ///
    /// # Errors
    /// When the store fails.
    pub fn receive(&self, id: &Id, length: Option<u64>) -> Result<Option<(Upload, u64)>> {
        let _promising = self.promising.lock().unwrap_or_else(PoisonError::into_inner);
        let free = self.free()?;
        if length.is_some_and(|length| length > free) {
            return Ok(None);
        }
        let sink = self.backend.receive(id, length.unwrap_or_default())?;
        let mut upload = Upload::new(Some(sink), Hashed::default());
        upload.promised = length.is_some();
        Ok(Some((upload, free)))
    }

    /// Keeps a tarball for the version, to be picked by its manifest.
    ///
    /// # Errors
    /// When the store fails.
    pub fn stage(&self, id: &Id, received: Received) -> Result<Outcome> {
        let _guard = self.lock(&id.name);
        if let Some(record) = self.record(id)? {
            return Ok(same_or_conflict(record.digest, received.digest));
        }
        if self.staged(id, &received.digest)?.is_some() {
            return Ok(Outcome::Same);
        }
        // It was here before, and need not have been kept.
        let sink = received.sink.ok_or(Interrupted::DELETED)?;
        // To one that said no length nothing was promised; what is here of it counts already.
        if let Some(quota) = self.quota.filter(|_| !received.promised)
            && self.backend.used()? > quota
        {
            return Err(io::Error::from(ErrorKind::QuotaExceeded)).context("the store is at its --quota");
        }
        Ok(if sink.place(&received.digest)? { Outcome::Created } else { Outcome::Same })
    }

    /// Stores a manifest and with it completes its version. `bytes` are the
    /// manifest's, as they came.
    ///
    /// # Errors
    /// When the store fails.
    pub fn commit(&self, manifest: &Manifest, bytes: &[u8]) -> Result<Outcome> {
        let id = Id { name: manifest.name.clone(), version: manifest.version.clone() };
        let digest = Digest::of(bytes);
        let _guard = self.lock(&id.name);
        if let Some(record) = self.record(&id)? {
            return Ok(same_or_conflict(record.manifest_digest, digest));
        }
        if self.backend.whole(&id, &manifest.tarball.digest)? != Some(manifest.tarball.size) {
            return Ok(Outcome::NoTarball);
        }
        let file = file_name(&digest);
        if !self.backend.create(&id, &file, bytes)? {
            // Where it says something else it was damaged.
            self.backend.remove(&id, &file)?;
            self.backend.create(&id, &file, bytes)?;
        }
        let newest = self.versions(&id.name)?.first().map_or(0, |(_, record)| record.stored + 1);
        let record = Record {
            manifest_digest: digest,
            manifest_size: bytes.len() as u64,
            digest: manifest.tarball.digest,
            size: manifest.tarball.size,
            commit: manifest.commit,
            ref_name: manifest.ref_name.clone(),
            architecture: manifest.architecture.clone(),
            stored: now().max(newest),
        };
        if !self.backend.create(&id, RECORD, &serde_json::to_vec(&record)?)? {
            // Another endpoint on the same store was faster.
            let stored = self.record(&id)?.ok_or(Interrupted::DELETED)?;
            return Ok(same_or_conflict(stored.manifest_digest, digest));
        }
        self.sweep(&id, &record);
        Ok(Outcome::Created)
    }

    /// Removes a version, complete or not; whether there was one.
    ///
    /// # Errors
    /// When the store fails.
    pub fn delete(&self, id: &Id) -> Result<bool> {
        let _guard = self.lock(&id.name);
        self.backend.delete(id)
    }

    /// Removes a complete version if it still is the one with this record, and nobody has deleted it and published
    /// it anew; whether it was.
    ///
    /// # Errors
    /// When the store fails.
    pub fn delete_this(&self, id: &Id, record: &Record) -> Result<bool> {
        let _guard = self.lock(&id.name);
        Ok(self.record(id)?.as_ref() == Some(record) && self.backend.delete(id)?)
    }

    /// All complete versions of all artifacts, the names sorted, versions newest first. One
    /// whose record cannot be read is left out, with a line in the log.
    ///
    /// # Errors
    /// When the store fails.
    pub fn all(&self) -> Result<Artifacts> {
        self.complete(None)
    }

    /// The complete versions of an artifact, newest first.
    ///
    /// # Errors
    /// When the store fails.
    pub fn versions(&self, name: &Name) -> Result<Vec<(Name, Record)>> {
        Ok(self.complete(Some(name))?.pop().map(|(_, versions)| versions).unwrap_or_default())
    }

    fn complete(&self, name: Option<&Name>) -> Result<Artifacts> {
        let mut artifacts = Artifacts::new();
        let mut records = self.backend.records(name)?;
        records.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        for (id, bytes) in records {
            match Record::parse(&bytes, &id) {
                Ok(record) => match artifacts.last_mut().filter(|(name, _)| *name == id.name) {
                    Some((_, versions)) => versions.push((id.version, record)),
                    None => artifacts.push((id.name, vec![(id.version, record)])),
                },
                Err(error) => tracing::error!("{error:#}: the version is left out"),
            }
        }
        for (_, versions) in &mut artifacts {
            versions.sort_by(|(a, x), (b, y)| y.stored.cmp(&x.stored).then_with(|| b.cmp(a)));
        }
        Ok(artifacts)
    }

    /// What there is of the upload of a tarball with this digest. Whoever asks may rely on it: what waits for its
    /// manifest waits as long as a new one.
    ///
    /// # Errors
    /// When the store fails.
    pub fn find_upload(&self, id: &Id, digest: &Digest) -> Result<Found> {
        let _guard = self.lock(&id.name);
        self.found(id, digest)
    }

    fn found(&self, id: &Id, digest: &Digest) -> Result<Found> {
        if let Some(record) = self.record(id)? {
            return Ok(match same_or_conflict(record.digest, *digest) {
                Outcome::Conflict(stored) => Found::Conflict(stored),
                _ => Found::Whole(record.size),
            });
        }
        if let Some(size) = self.staged(id, digest)? {
            return Ok(Found::Whole(size));
        }
        Ok(self.backend.partial(id, digest)?.map_or(Found::Nothing, Found::Partial))
    }

    /// Begins an upload of `length` bytes, unless there is something of it already; nothing where there is no room.
    ///
    /// # Errors
    /// When the store fails.
    pub fn begin_upload(&self, id: &Id, digest: &Digest, length: u64) -> Result<Found> {
        let _guard = self.lock(&id.name);
        // What was begun counts against the quota as a whole already.
        let found = self.found(id, digest)?;
        if !matches!(found, Found::Nothing) {
            return Ok(found);
        }
        let _promising = self.promising.lock().unwrap_or_else(PoisonError::into_inner);
        if length > self.free()? {
            return Ok(Found::Nothing);
        }
        self.backend.begin(id, digest, length).map(Found::Partial)
    }

    /// Opens an upload to be added to. What is there is hashed, unless `hashed` says it all:
    /// after a restart, or where bytes were written that nobody was told of.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn append(&self, id: &Id, digest: &Digest, partial: Partial, hashed: Option<Hashed>) -> Result<Appending> {
        let mut hashed = hashed.filter(|hashed| hashed.is_of(&partial)).unwrap_or_default();
        let sink = self.backend.append(id, digest, &partial, &mut hashed)?;
        Ok(Appending { upload: Upload::new(Some(sink), hashed), length: partial.length })
    }

    /// Ends an upload that has all its bytes: the tarball waits for its manifest now.
    /// `None` if it has another digest; then nothing of it is left.
    ///
    /// # Errors
    /// When the store fails.
    pub fn finish_upload(&self, id: &Id, digest: &Digest, appending: Appending) -> Result<Option<Outcome>> {
        let received = appending.upload.finish()?;
        let _guard = self.lock(&id.name);
        if received.digest != *digest {
            self.backend.cancel(id, digest)?;
            return Ok(None);
        }
        let outcome = match self.record(id)? {
            Some(record) => same_or_conflict(record.digest, *digest),
            None => {
                let sink = received.sink.context("an upload that is added to has a place")?;
                if self.staged(id, digest)?.is_some() || !sink.place(digest)? {
                    Outcome::Same
                } else {
                    Outcome::Created
                }
            }
        };
        self.backend.cancel(id, digest)?;
        Ok(Some(outcome))
    }

    /// Gives an upload up; whether there was one.
    ///
    /// # Errors
    /// When the store fails.
    pub fn cancel_upload(&self, id: &Id, digest: &Digest) -> Result<bool> {
        let _guard = self.lock(&id.name);
        let Found::Partial(_) = self.found(id, digest)? else { return Ok(false) };
        self.backend.cancel(id, digest)?;
        Ok(true)
    }

    /// The uploads that are not finished.
    ///
    /// # Errors
    /// When the store fails.
    pub fn uploads(&self) -> Result<Vec<(Id, Digest)>> {
        self.backend.uploads()
    }

    /// Gives an upload up that nobody has added to for `age`; whether it was one.
    ///
    /// # Errors
    /// When the store fails.
    pub fn expire_upload(&self, id: &Id, digest: &Digest, age: Duration) -> Result<bool> {
        let _guard = self.lock(&id.name);
        let stale = self.backend.is_stale(id, digest, age)?;
        if stale {
            self.backend.cancel(id, digest)?;
        }
        Ok(stale)
    }

    /// Removes tarballs whose manifest has not come for `age`. What cannot be removed is in the log, and in the way
    /// of nothing else.
    ///
    /// # Errors
    /// When the store cannot be listed.
    pub fn expire_staged(&self, age: Duration) -> Result<()> {
        for id in self.backend.incomplete()? {
            let _guard = self.lock(&id.name);
            if let Err(error) = self.backend.expire(&id, age) {
                tracing::warn!("removing what is left of {} {}: {error:#}", id.name, id.version);
            }
        }
        Ok(())
    }

    /// The size of a tarball that waits for its manifest, if there is one; from now on as long as a new one.
    fn staged(&self, id: &Id, digest: &Digest) -> Result<Option<u64>> {
        let whole = self.backend.whole(id, digest)?;
        if whole.is_some() {
            self.backend.renew(id, digest)?;
        }
        Ok(whole)
    }

    /// Removes what a complete version does not need; the next start tries again.
    fn sweep(&self, id: &Id, record: &Record) {
        if let Err(error) = self.backend.sweep(id, record) {
            tracing::warn!("clearing {} {}: {error:#}", id.name, id.version);
        }
    }

    /// What changes a name's versions is done under its lock; a lock whose holder
    /// panicked guards nothing that could be half done in memory.
    fn lock(&self, name: &Name) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        self.names[(hasher.finish() % LOCKS as u64) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The names of all artifacts with their complete versions, newest first.
pub type Artifacts = Vec<(Name, Vec<(Name, Record)>)>;

/// How much of everything a store has.
#[derive(Debug, Clone)]
pub struct Usage {
    /// Complete versions.
    pub versions: u64,
    /// Bytes of them.
    pub stored: u64,
    /// Bytes of what is not complete, or promised to it.
    pub staged: u64,
    /// Bytes that it may hold.
    pub quota: Option<u64>,
    /// Bytes that are free, where there is an end to them.
    pub free: Option<u64>,
}

/// How the store failed.
pub enum Failure {
    /// There is no space left.
    Full,
    /// It may answer later.
    Passing,
    /// Somebody was faster.
    Interrupted(String),
    /// Otherwise.
    Other,
}

/// How the store failed that gave this error.
pub fn failure(error: &anyhow::Error) -> Failure {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<Interrupted>() {
            return Failure::Interrupted(error.to_string());
        }
        if cause.downcast_ref::<lease::Lost>().is_some() {
            return Failure::Passing;
        }
        if let Some(error) = cause.downcast_ref::<io::Error>()
            && matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
        {
            return Failure::Full;
        }
        if let Some(error) = cause.downcast_ref::<opendal::Error>() {
            return objects::failure(error);
        }
    }
    Failure::Other
}

fn same_or_conflict(stored: Digest, sent: Digest) -> Outcome {
    if stored == sent { Outcome::Same } else { Outcome::Conflict(stored) }
}
