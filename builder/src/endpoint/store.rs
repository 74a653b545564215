//! Artifacts in a directory, safe at every moment of a crash. Files are kept by
//! digest; a version is complete, and visible, from the moment its record exists,
//! and a record is only ever created, never replaced.
//!
//!     STORE/.lock                                   held by the one process that serves it
//!     STORE/.tmp/…                                  uploads under way; emptied at the start
//!     STORE/artifacts/NAME/VERSION/sha256-HEX       tarballs and the manifest, by digest
//!     STORE/artifacts/NAME/VERSION/version.json     the record: the commit point
//!
//! Everything here is synchronous; [`super::routes`] enters it on blocking threads.
//! The paths are object keys as well: another kind of store (S3, Swift) needs a
//! conditional create for the record and nothing else.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File, TryLockError};
use std::hash::{Hash, Hasher as _};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use oscontainer_artifact::digest::{Checksum, Digest, Hasher};
use oscontainer_artifact::manifest::Manifest;
use oscontainer_artifact::protocol::Name;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

/// The record's file name in a version's directory.
const RECORD: &str = "version.json";
/// How many locks the artifacts' names share.
const LOCKS: usize = 64;

/// One version of one artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id {
    /// The artifact's name.
    pub name: Name,
    /// Its version.
    pub version: Name,
}

/// What is known of a complete version. Its file's appearance is the one commit
/// point of an upload.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    /// The manifest's digest: the digest of the artifact.
    pub manifest_digest: Digest,
    /// Bytes of the manifest.
    pub manifest_size: u64,
    /// The tarball's digest.
    pub digest: Digest,
    /// Bytes of the tarball.
    pub size: u64,
    /// The commit in the tarball, as the manifest says.
    pub commit: Checksum,
    /// The ref in the tarball, as the manifest says.
    #[serde(rename = "ref")]
    pub ref_name: String,
    /// OCI's name of the architecture, as the manifest says.
    pub architecture: String,
    /// When the manifest was stored, in nanoseconds since 1970; it grows with each
    /// version of a name, even if the clock is set back.
    pub stored: u64,
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

/// A directory of artifacts, locked by this process.
pub struct Store {
    artifacts: PathBuf,
    tmp: PathBuf,
    names: [Mutex<()>; LOCKS],
    _lock: File,
}

impl Store {
    /// Opens the store in `root`, which is created if absent, and removes what a
    /// crash left.
    ///
    /// # Errors
    /// When another process serves it, or the directory cannot be used.
    pub fn open(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| format!("creating the store {}", root.display()))?;
        let lock_path = root.join(".lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .with_context(|| format!("opening {}", lock_path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "the store {} is in use: another endpoint holds {}; only one may serve a directory",
                root.display(),
                lock_path.display()
            ),
            Err(TryLockError::Error(e)) => {
                return Err(e).with_context(|| format!("locking {}", lock_path.display()));
            }
        }
        let store = Self {
            artifacts: root.join("artifacts"),
            tmp: root.join(".tmp"),
            names: std::array::from_fn(|_| Mutex::new(())),
            _lock: lock,
        };
        for dir in [&store.artifacts, &store.tmp] {
            fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        sync_dir(root).with_context(|| format!("syncing {}", root.display()))?;
        store.recover()?;
        Ok(store)
    }

    /// Removes uploads that broke off and tarballs that lost against a manifest.
    fn recover(&self) -> Result<()> {
        for entry in fs::read_dir(&self.tmp).with_context(|| format!("reading {}", self.tmp.display()))? {
            let path = entry?.path();
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
            tracing::info!("removed {}: an upload that broke off", path.display());
        }
        for name in self.names()? {
            for version in self.version_names(&name)? {
                let id = Id { name: name.clone(), version };
                match self.record(&id) {
                    Ok(Some(record)) => self.sweep(&id, &record),
                    Ok(None) => {}
                    Err(error) => tracing::error!("{error:#}: the version is not served"),
                }
            }
        }
        Ok(())
    }

    /// Whether the store answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn check(&self) -> io::Result<()> {
        fs::read_dir(&self.artifacts)?;
        fs::metadata(&self.tmp).map(drop)
    }

    /// Bytes that are free for uploads.
    ///
    /// # Errors
    /// When the file system does not say.
    pub fn free(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.tmp)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Starts to receive a file.
    ///
    /// # Errors
    /// When no temporary file can be made.
    pub fn receive(&self) -> Result<Upload> {
        let file = tempfile::Builder::new()
            .prefix("upload-")
            .tempfile_in(&self.tmp)
            .with_context(|| format!("creating a temporary file in {}", self.tmp.display()))?;
        Ok(Upload { file: Some(file), hasher: Hasher::new(), size: 0 })
    }

    /// The record of a complete version.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn record(&self, id: &Id) -> Result<Option<Record>> {
        let path = self.dir(id).join(RECORD);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        };
        serde_json::from_slice(&bytes).map(Some).with_context(|| format!("reading {}", path.display()))
    }

    /// Opens the file of a version with that digest.
    ///
    /// # Errors
    /// When it cannot be opened; `None` where it is gone.
    pub fn open_file(&self, id: &Id, digest: &Digest) -> Result<Option<File>> {
        let path = self.dir(id).join(file_name(digest));
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("opening {}", path.display())),
        }
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
        let dir = self.create_dirs(id)?;
        received.place(&dir)
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
        let tarball = self.open_file(&id, &manifest.tarball.digest)?;
        let size = tarball.map(|file| file.metadata()).transpose()?.map(|metadata| metadata.len());
        if size != Some(manifest.tarball.size) {
            return Ok(Outcome::NoTarball);
        }
        let dir = self.create_dirs(&id)?;
        self.written(bytes)?.place(&dir)?;
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
        let path = dir.join(RECORD);
        let file = self.written(&serde_json::to_vec(&record)?)?.file.context("a written file is on disk")?;
        file.persist_noclobber(&path).map_err(|e| e.error).with_context(|| format!("creating {}", path.display()))?;
        sync_dir(&dir).with_context(|| format!("syncing {}", dir.display()))?;
        self.sweep(&id, &record);
        Ok(Outcome::Created)
    }

    /// Removes a version, complete or not; whether there was one.
    ///
    /// # Errors
    /// When the store fails.
    pub fn delete(&self, id: &Id) -> Result<bool> {
        let _guard = self.lock(&id.name);
        let dir = self.dir(id);
        // The record goes first: a version without its files must not be visible.
        match fs::remove_file(dir.join(RECORD)) {
            Ok(()) => sync_dir(&dir).with_context(|| format!("syncing {}", dir.display()))?,
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("removing {}", dir.join(RECORD).display())),
        }
        match fs::remove_dir_all(&dir) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).with_context(|| format!("removing {}", dir.display())),
        }
        let parent = self.artifacts.join(id.name.as_str());
        // It stays where other versions are in it.
        if fs::remove_dir(&parent).is_ok() {
            sync_dir(&self.artifacts).with_context(|| format!("syncing {}", self.artifacts.display()))?;
        } else {
            sync_dir(&parent).with_context(|| format!("syncing {}", parent.display()))?;
        }
        Ok(true)
    }

    /// The names of all artifacts that have a complete version, sorted.
    ///
    /// # Errors
    /// When the store fails.
    pub fn complete_names(&self) -> Result<Vec<Name>> {
        let mut names = Vec::new();
        for name in self.names()? {
            let complete = |version| self.dir(&Id { name: name.clone(), version }).join(RECORD).exists();
            if self.version_names(&name)?.into_iter().any(complete) {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// The complete versions of an artifact, newest first. One whose record cannot
    /// be read is left out, with a line in the log.
    ///
    /// # Errors
    /// When the store fails.
    pub fn versions(&self, name: &Name) -> Result<Vec<(Name, Record)>> {
        let mut versions = Vec::new();
        for version in self.version_names(name)? {
            let id = Id { name: name.clone(), version };
            match self.record(&id) {
                Ok(Some(record)) => versions.push((id.version, record)),
                Ok(None) => {}
                Err(error) => tracing::error!("{error:#}: the version is left out"),
            }
        }
        versions.sort_by(|(a, x), (b, y)| y.stored.cmp(&x.stored).then_with(|| b.cmp(a)));
        Ok(versions)
    }

    fn names(&self) -> Result<Vec<Name>> {
        names_in(&self.artifacts)
    }

    fn version_names(&self, name: &Name) -> Result<Vec<Name>> {
        names_in(&self.artifacts.join(name.as_str()))
    }

    fn dir(&self, id: &Id) -> PathBuf {
        self.artifacts.join(id.name.as_str()).join(id.version.as_str())
    }

    /// What changes a name's versions is done under its lock; a lock whose holder
    /// panicked guards nothing that could be half done in memory.
    fn lock(&self, name: &Name) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        self.names[(hasher.finish() % LOCKS as u64) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create_dirs(&self, id: &Id) -> Result<PathBuf> {
        let mut dir = self.artifacts.clone();
        for part in [&id.name, &id.version] {
            let parent = dir.clone();
            dir.push(part.as_str());
            match fs::create_dir(&dir) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(|| format!("creating {}", dir.display())),
            }
            // An earlier process may have died between creating it and this.
            sync_dir(&parent).with_context(|| format!("syncing {}", parent.display()))?;
        }
        Ok(dir)
    }

    /// A durable temporary file with these bytes.
    fn written(&self, bytes: &[u8]) -> Result<Received> {
        let mut upload = self.receive()?;
        upload.write(&[Bytes::copy_from_slice(bytes)])?;
        upload.finish()
    }

    /// Removes what a complete version does not need; the next start tries again.
    fn sweep(&self, id: &Id, record: &Record) {
        let keep = [RECORD.to_owned(), file_name(&record.manifest_digest), file_name(&record.digest)];
        let dir = self.dir(id);
        let swept = fs::read_dir(&dir).and_then(|entries| {
            for entry in entries {
                let entry = entry?;
                if !keep.iter().any(|name| entry.file_name() == name.as_str()) {
                    fs::remove_file(entry.path())?;
                    tracing::info!("removed {}: the manifest picked another", entry.path().display());
                }
            }
            Ok(())
        });
        if let Err(error) = swept {
            tracing::warn!("clearing {}: {error}", dir.display());
        }
    }
}

/// A file on its way in: written, hashed and counted in one go.
pub struct Upload {
    file: Option<NamedTempFile>,
    hasher: Hasher,
    size: u64,
}

impl Upload {
    /// Hashes and counts only: for a file that is there already.
    pub fn discard() -> Self {
        Self { file: None, hasher: Hasher::new(), size: 0 }
    }

    /// Adds `chunks`.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn write(&mut self, chunks: &[Bytes]) -> Result<()> {
        for chunk in chunks {
            self.hasher.update(chunk);
            self.size += chunk.len() as u64;
            if let Some(file) = &mut self.file {
                file.write_all(chunk).context("writing the upload")?;
            }
        }
        Ok(())
    }

    /// Makes the content durable.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn finish(self) -> Result<Received> {
        if let Some(file) = &self.file {
            file.as_file().sync_all().context("syncing the upload")?;
        }
        Ok(Received { file: self.file, digest: self.hasher.digest(), size: self.size })
    }
}

/// A file that came in whole. It is removed unless it gets its place.
pub struct Received {
    file: Option<NamedTempFile>,
    /// What was received.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

impl Received {
    /// Gives the file its name by digest in `dir`, durably.
    fn place(self, dir: &Path) -> Result<Outcome> {
        let path = dir.join(file_name(&self.digest));
        let outcome = match self.file.map(|file| file.persist_noclobber(&path)) {
            Some(Ok(_)) => Outcome::Created,
            Some(Err(e)) if e.error.kind() == ErrorKind::AlreadyExists => Outcome::Same,
            Some(Err(e)) => return Err(e.error).with_context(|| format!("creating {}", path.display())),
            None => bail!("{}: the version was deleted while the upload was under way; send it again", path.display()),
        };
        sync_dir(dir).with_context(|| format!("syncing {}", dir.display()))?;
        Ok(outcome)
    }
}

fn same_or_conflict(stored: Digest, sent: Digest) -> Outcome {
    if stored == sent { Outcome::Same } else { Outcome::Conflict(stored) }
}

fn file_name(digest: &Digest) -> String {
    format!("sha256-{}", digest.hex())
}

/// The entries of `dir` that are names by the protocol's grammar, sorted; none
/// where there is no such directory.
fn names_in(dir: &Path) -> Result<Vec<Name>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("reading {}", dir.display())),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", dir.display()))?;
        if let Some(name) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Nanoseconds since 1970; they fit until the year 2554.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}
