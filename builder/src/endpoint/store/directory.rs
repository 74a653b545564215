//! Artifacts in a directory, safe at every moment of a crash.
//!
//!     STORE/.lock                                   held by the one process that serves it
//!     STORE/.tmp/…                                  uploads in one request; emptied at the start
//!     STORE/uploads/NAME/VERSION/sha256-HEX.LENGTH  uploads that are resumed
//!     STORE/artifacts/NAME/VERSION/sha256-HEX       tarballs and the manifest, by digest

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::protocol::Name;
use oscontainer_program::staging::{remove_if_there, sync_dir};
use rustix::fs::StatVfsMountFlags;
use tempfile::NamedTempFile;

use super::Interrupted;
use super::backend::{Backend, Partial, Promise, Promises, Sink, Source, Stored};
use super::record::{Id, RECORD, Record, digest_of, file_name};
use super::upload::Hashed;

/// What was written so long before the last sign of life may have been on its way to the
/// platters when the machine stopped. A file system writes everything within half a minute.
const UNSETTLED: Duration = Duration::from_secs(600);
/// Tells one run of the kernel from the next (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A directory of artifacts, locked by this process.
pub struct Directory {
    artifacts: PathBuf,
    uploads: PathBuf,
    tmp: PathBuf,
    /// Whether the machine may have stopped since the directory was served last.
    rebooted: bool,
    /// The uploads in one request, by the names of their files in `tmp`.
    promises: Promises,
    _lock: File,
}

impl Directory {
    /// Opens the store in `root`, which is created if absent.
    ///
    /// # Errors
    /// When another process serves it, or the directory cannot be used.
    pub fn open(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| format!("creating the store {}", root.display()))?;
        let lock_path = root.join(".lock");
        let using = || format!("using {}", lock_path.display());
        let mut lock =
            File::options().create(true).truncate(false).read(true).write(true).open(&lock_path).with_context(using)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "the store {} is in use: another endpoint holds {}; only one may serve a directory",
                root.display(),
                lock_path.display()
            ),
            Err(TryLockError::Error(e)) => return Err(e).with_context(using),
        }
        let boot = fs::read_to_string(BOOT_ID).unwrap_or_default();
        let mut served = String::new();
        lock.read_to_string(&mut served).with_context(using)?;
        let store = Self {
            artifacts: root.join("artifacts"),
            uploads: root.join("uploads"),
            tmp: root.join(".tmp"),
            rebooted: served != boot || boot.is_empty(),
            promises: Promises::default(),
            _lock: lock,
        };
        for dir in [&store.artifacts, &store.uploads, &store.tmp] {
            fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        sync_dir(root)?;
        Ok(store)
    }

    /// Notes that what is here was looked at since the machine started.
    fn settle(&self) -> Result<()> {
        let mut lock = &self._lock;
        let boot = fs::read(BOOT_ID).unwrap_or_default();
        let mut write = || {
            lock.set_len(0)?;
            lock.seek(SeekFrom::Start(0))?;
            lock.write_all(&boot)?;
            lock.sync_all()
        };
        write().context("writing .lock")
    }

    /// What is wrong with a complete version's files. Its damaged ones are removed.
    fn damage(&self, id: &Id, record: &Record, thorough: bool) -> Result<Option<String>> {
        let files = [(record.digest, record.size), (record.manifest_digest, record.manifest_size)];
        let mut damage = None;
        for (digest, size) in files {
            let path = self.dir(id).join(file_name(&digest));
            let found = match fs::metadata(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => format!("{} is missing", path.display()),
                // A disk that cannot be read now says nothing about what is on it.
                Err(error) => return Err(error).with_context(|| format!("looking at {}", path.display())),
                Ok(metadata) if metadata.len() != size => {
                    remove_if_there(&path)?;
                    format!("{} has {} bytes, not {size}", path.display(), metadata.len())
                }
                Ok(_) if thorough && hash(&path)? != digest => {
                    remove_if_there(&path)?;
                    format!("{} has another digest", path.display())
                }
                Ok(_) => continue,
            };
            damage = Some(found);
        }
        Ok(damage)
    }

    /// Removes the tarballs that wait for their manifest and were damaged when the machine stopped.
    fn check_staged(&self, since: SystemTime) -> Result<()> {
        for id in self.ids(&self.artifacts)? {
            let dir = self.dir(&id);
            if dir.join(RECORD).exists() {
                continue;
            }
            for name in file_names(&dir)? {
                let path = dir.join(&name);
                let late = fs::metadata(&path).and_then(|metadata| metadata.modified()).is_ok_and(|time| time >= since);
                if let Some(digest) = digest_of(&name)
                    && late
                    && hash(&path)? != digest
                {
                    remove_if_there(&path)?;
                    tracing::warn!("removed {}: it was damaged when the machine stopped", path.display());
                }
            }
        }
        Ok(())
    }

    fn dir(&self, id: &Id) -> PathBuf {
        self.artifacts.join(id.name.as_str()).join(id.version.as_str())
    }

    fn upload_dir(&self, id: &Id) -> PathBuf {
        self.uploads.join(id.name.as_str()).join(id.version.as_str())
    }

    /// The file of an upload, and its length.
    fn upload_file(&self, id: &Id, digest: &Digest) -> Result<Option<(PathBuf, u64)>> {
        let dir = self.upload_dir(id);
        let wanted = format!("{}.", file_name(digest));
        let length = |name: &String| name.strip_prefix(&wanted)?.parse().ok();
        Ok(file_names(&dir)?.iter().find_map(|name| Some((dir.join(name), length(name)?))))
    }

    fn open_file(&self, id: &Id, digest: &Digest) -> Result<Option<Stored>> {
        let path = self.dir(id).join(file_name(digest));
        let opening = || format!("opening {}", path.display());
        match File::open(&path) {
            Ok(file) => {
                let size = file.metadata().with_context(opening)?.len();
                Ok(Some(Stored { size, source: Source::File(file) }))
            }
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(opening),
        }
    }

    fn temporary(&self) -> Result<NamedTempFile> {
        tempfile::Builder::new()
            .prefix("upload-")
            .tempfile_in(&self.tmp)
            .with_context(|| format!("creating a temporary file in {}", self.tmp.display()))
    }

    /// All versions that have a directory below `root`.
    fn ids(&self, root: &Path) -> Result<Vec<Id>> {
        let mut ids = Vec::new();
        for name in names_in(root)? {
            for version in names_in(&root.join(name.as_str()))? {
                ids.push(Id { name: name.clone(), version });
            }
        }
        Ok(ids)
    }
}

impl Backend for Directory {
    fn check(&self) -> Result<()> {
        fs::read_dir(&self.artifacts).context("checking the store")?;
        let mount = rustix::fs::statvfs(&self.tmp).context("checking the store")?;
        ensure!(!mount.f_flag.contains(StatVfsMountFlags::RDONLY), "the store's file system is mounted read-only");
        Ok(())
    }

    fn recover(&self, records: &[(Id, Record)]) -> Result<Vec<(Id, String)>> {
        for name in file_names(&self.tmp)? {
            let path = self.tmp.join(name);
            remove_if_there(&path)?;
            tracing::info!("removed {}: an upload that broke off", path.display());
        }
        let unsettled = u64::try_from(UNSETTLED.as_nanos()).unwrap_or(u64::MAX);
        let newest = records.iter().map(|(_, record)| record.stored).max().unwrap_or_default();
        let since = newest.saturating_sub(unsettled);
        let mut damaged = Vec::new();
        for (id, record) in records {
            let thorough = self.rebooted && record.stored >= since;
            match self.damage(id, record, thorough)? {
                Some(damage) => damaged.push((id.clone(), damage)),
                None => self.sweep(id, record)?,
            }
        }
        if self.rebooted {
            self.check_staged(SystemTime::UNIX_EPOCH + Duration::from_nanos(since))?;
            self.settle()?;
        }
        Ok(damaged)
    }

    fn records(&self, name: Option<&Name>) -> Result<Vec<(Id, Vec<u8>)>> {
        let ids = match name {
            None => self.ids(&self.artifacts)?,
            Some(name) => names_in(&self.artifacts.join(name.as_str()))?
                .into_iter()
                .map(|version| Id { name: name.clone(), version })
                .collect(),
        };
        let mut records = Vec::new();
        for id in ids {
            if let Some(bytes) = self.read(&id, RECORD)? {
                records.push((id, bytes));
            }
        }
        Ok(records)
    }

    fn read(&self, id: &Id, file: &str) -> Result<Option<Vec<u8>>> {
        let path = self.dir(id).join(file);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
        }
    }

    fn create(&self, id: &Id, file: &str, bytes: &[u8]) -> Result<bool> {
        let mut temporary = self.temporary()?;
        temporary.write_all(bytes).and_then(|()| temporary.as_file().sync_all()).context("writing a file")?;
        persist(temporary, &create_dirs(&self.artifacts, id)?.join(file))
    }

    fn remove(&self, id: &Id, file: &str) -> Result<()> {
        let dir = self.dir(id);
        remove_if_there(&dir.join(file))?;
        if dir.exists() { sync_dir(&dir) } else { Ok(()) }
    }

    fn manifest(&self, id: &Id, digest: &Digest) -> Result<Option<Stored>> {
        self.open_file(id, digest)
    }

    fn tarball(&self, id: &Id, digest: &Digest) -> Result<Option<Stored>> {
        self.open_file(id, digest)
    }

    fn whole(&self, id: &Id, digest: &Digest) -> Result<Option<u64>> {
        Ok(self.tarball(id, digest)?.map(|tarball| tarball.size))
    }

    fn renew(&self, id: &Id, digest: &Digest) -> Result<()> {
        let path = self.dir(id).join(file_name(digest));
        let touched = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        touched.with_context(|| format!("touching {}", path.display()))
    }

    fn receive(&self, id: &Id, length: u64) -> Result<Box<dyn Sink>> {
        let file = self.temporary()?;
        let name = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let promise = self.promises.grant(name, length);
        Ok(Writing::boxed(Incoming::Whole(file, promise), &self.artifacts, id))
    }

    fn partial(&self, id: &Id, digest: &Digest) -> Result<Option<Partial>> {
        let Some((path, length)) = self.upload_file(id, digest)? else { return Ok(None) };
        let offset = fs::metadata(&path).with_context(|| format!("reading {}", path.display()))?.len();
        Ok(Some(Partial { offset, length, ..Partial::default() }))
    }

    fn begin(&self, id: &Id, digest: &Digest, length: u64) -> Result<Partial> {
        let dir = create_dirs(&self.uploads, id)?;
        let path = dir.join(format!("{}.{length}", file_name(digest)));
        File::create_new(&path).with_context(|| format!("creating {}", path.display()))?;
        sync_dir(&dir)?;
        Ok(Partial { length, ..Partial::default() })
    }

    fn append(&self, id: &Id, digest: &Digest, partial: &Partial, hashed: &mut Hashed) -> Result<Box<dyn Sink>> {
        let (path, _) = self.upload_file(id, digest)?.context("the upload is gone")?;
        let opening = || format!("opening {}", path.display());
        let mut file = File::options().read(true).write(true).open(&path).with_context(opening)?;
        file.seek(SeekFrom::Start(hashed.offset)).with_context(opening)?;
        let known = (&mut file).take(partial.offset - hashed.offset);
        hashed.offset += hashed.hasher.update_from(known).with_context(|| format!("reading {}", path.display()))?;
        Ok(Writing::boxed(Incoming::Part(file, path), &self.artifacts, id))
    }

    fn cancel(&self, id: &Id, digest: &Digest) -> Result<()> {
        if let Some((path, _)) = self.upload_file(id, digest)? {
            remove_if_there(&path)?;
        }
        remove_empty(&self.uploads, id);
        Ok(())
    }

    fn uploads(&self) -> Result<Vec<(Id, Digest)>> {
        let mut uploads = Vec::new();
        for id in self.ids(&self.uploads)? {
            let names = file_names(&self.upload_dir(&id))?;
            let digests = names.iter().filter_map(|name| digest_of(name.split_once('.')?.0));
            uploads.extend(digests.map(|digest| (id.clone(), digest)));
        }
        Ok(uploads)
    }

    fn is_stale(&self, id: &Id, digest: &Digest, age: Duration) -> Result<bool> {
        Ok(self.upload_file(id, digest)?.is_some_and(|(path, _)| is_older(&path, age)))
    }

    fn incomplete(&self) -> Result<Vec<Id>> {
        let mut ids = self.ids(&self.artifacts)?;
        ids.retain(|id| !self.dir(id).join(RECORD).exists());
        Ok(ids)
    }

    fn expire(&self, id: &Id, age: Duration) -> Result<()> {
        let dir = self.dir(id);
        if dir.join(RECORD).exists() {
            return Ok(());
        }
        for name in file_names(&dir)? {
            let path = dir.join(&name);
            if is_older(&path, age) {
                remove_if_there(&path)?;
                tracing::info!("removed {}: its manifest has not come", path.display());
            }
        }
        remove_empty(&self.artifacts, id);
        Ok(())
    }

    fn sweep(&self, id: &Id, record: &Record) -> Result<()> {
        remove_dir(&self.upload_dir(id))?;
        remove_empty(&self.uploads, id);
        let keep = [RECORD.to_owned(), file_name(&record.manifest_digest), file_name(&record.digest)];
        let dir = self.dir(id);
        for name in file_names(&dir)? {
            if !keep.contains(&name) {
                let path = dir.join(name);
                remove_if_there(&path)?;
                tracing::info!("removed {}: the manifest picked another", path.display());
            }
        }
        Ok(())
    }

    fn delete(&self, id: &Id) -> Result<bool> {
        let uploads = remove_dir(&self.upload_dir(id))?;
        remove_empty(&self.uploads, id);
        // The record goes first: a version without its files must not be visible.
        self.remove(id, RECORD)?;
        if !remove_dir(&self.dir(id))? {
            return Ok(uploads);
        }
        let parent = self.artifacts.join(id.name.as_str());
        // It stays where other versions are in it.
        sync_dir(if fs::remove_dir(&parent).is_ok() { &self.artifacts } else { &parent })?;
        Ok(true)
    }

    fn used(&self) -> Result<u64> {
        let size = |path: PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
        let promised = |name: &str| self.promises.all().get(name).copied().unwrap_or_default();
        let names = file_names(&self.tmp)?;
        let mut used = names.into_iter().map(|name| promised(&name).max(size(self.tmp.join(name)))).sum();
        for id in self.ids(&self.artifacts)? {
            let dir = self.dir(&id);
            used += file_names(&dir)?.into_iter().map(|name| size(dir.join(name))).sum::<u64>();
        }
        for id in self.ids(&self.uploads)? {
            let promised = |name: String| name.rsplit_once('.').and_then(|(_, length)| length.parse::<u64>().ok());
            used += file_names(&self.upload_dir(&id))?.into_iter().filter_map(promised).sum::<u64>();
        }
        Ok(used)
    }

    fn free(&self) -> Result<Option<u64>> {
        let stat = rustix::fs::statvfs(&self.tmp).context("asking how much space is left")?;
        Ok(Some(stat.f_bavail.saturating_mul(stat.f_frsize)))
    }
}

/// How many bytes are written before the disk is asked to take them, while more come in: a
/// sync at the end has little left to do then.
const FLUSH: u64 = 32 << 20;

/// A tarball that is being written.
struct Writing {
    file: Incoming,
    artifacts: PathBuf,
    id: Id,
    /// Bytes that nobody asked the disk to take yet.
    unflushed: u64,
    flush: Flush,
}

/// A flush that may be under way; nothing of it goes on once it is dropped.
#[derive(Default)]
struct Flush(Option<JoinHandle<(File, io::Result<()>)>>);

impl Flush {
    fn start(&mut self, file: File) {
        self.0 = Some(std::thread::spawn(move || {
            let synced = file.sync_data();
            (file, synced)
        }));
    }

    fn is_under_way(&self) -> bool {
        self.0.as_ref().is_some_and(|flush| !flush.is_finished())
    }

    /// Waits for its end. Where it failed, nothing more may be written.
    fn end(&mut self) -> io::Result<()> {
        let Some(flush) = self.0.take() else { return Ok(()) };
        let (file, synced) = flush.join().map_err(|_| io::Error::other("the thread that flushes ended"))?;
        or_emptied(&file, synced)
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        // What could be told to nobody any more is dealt with: the file is empty then.
        let _ = self.end();
    }
}

/// Passes on how a sync ended. The kernel tells of a failed write once, and then takes the page for written
/// (fsync(2)): nothing of the file is believed any more, for a later sync would find nothing wrong.
fn or_emptied(file: &File, synced: io::Result<()>) -> io::Result<()> {
    if synced.is_err()
        && let Err(error) = file.set_len(0)
    {
        tracing::error!("emptying an upload that the disk did not take: {error}");
    }
    synced
}

enum Incoming {
    /// In one go; removed unless it gets its place.
    Whole(NamedTempFile, #[expect(dead_code, reason = "it lasts as long as the file")] Promise),
    /// To be resumed.
    Part(File, PathBuf),
}

impl Writing {
    fn boxed(file: Incoming, artifacts: &Path, id: &Id) -> Box<dyn Sink> {
        Box::new(Self { file, artifacts: artifacts.to_owned(), id: id.clone(), unflushed: 0, flush: Flush::default() })
    }

    /// Starts to flush, unless that is still under way.
    fn flush(&mut self) -> Result<()> {
        if self.flush.is_under_way() {
            return Ok(());
        }
        self.flush.end().context("syncing the disk")?;
        let file = self.file().try_clone().context("opening the upload again")?;
        self.flush.start(file);
        self.unflushed = 0;
        Ok(())
    }

    fn file(&mut self) -> &mut File {
        match &mut self.file {
            Incoming::Whole(file, _) => file.as_file_mut(),
            Incoming::Part(file, _) => file,
        }
    }
}

impl Sink for Writing {
    fn write(&mut self, chunks: &[Bytes]) -> Result<()> {
        for chunk in chunks {
            self.file().write_all(chunk).context("writing to the disk")?;
            self.unflushed += chunk.len() as u64;
        }
        if self.unflushed >= FLUSH { self.flush() } else { Ok(()) }
    }

    fn sync(&mut self) -> Result<()> {
        self.flush.end().context("syncing the disk")?;
        let file = self.file();
        or_emptied(file, file.sync_all()).context("syncing the disk")
    }

    fn place(self: Box<Self>, digest: &Digest) -> Result<bool> {
        let dir = create_dirs(&self.artifacts, &self.id)?;
        let path = dir.join(file_name(digest));
        match self.file {
            Incoming::Whole(file, _) => persist(file, &path),
            Incoming::Part(_, from) => match fs::rename(&from, &path) {
                Ok(()) => sync_dir(&dir).map(|()| true),
                Err(error) if error.kind() == ErrorKind::NotFound => bail!(Interrupted::DELETED),
                Err(error) => Err(error).with_context(|| format!("creating {}", path.display())),
            },
        }
    }
}

/// Gives a synced file its path, durably; false if there is one already.
fn persist(file: NamedTempFile, path: &Path) -> Result<bool> {
    let created = match file.persist_noclobber(path) {
        Ok(_) => true,
        Err(e) if e.error.kind() == ErrorKind::AlreadyExists => false,
        Err(e) => return Err(e.error).with_context(|| format!("creating {}", path.display())),
    };
    path.parent().map_or(Ok(()), sync_dir).map(|()| created)
}

/// The directory of a version below `root`, durably.
fn create_dirs(root: &Path, id: &Id) -> Result<PathBuf> {
    let mut dir = root.to_owned();
    for part in [&id.name, &id.version] {
        let parent = dir.clone();
        dir.push(part.as_str());
        match fs::create_dir(&dir) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).with_context(|| format!("creating {}", dir.display())),
        }
        // An earlier process may have died between creating it and this.
        sync_dir(&parent)?;
    }
    Ok(dir)
}

fn hash(path: &Path) -> Result<Digest> {
    File::open(path).and_then(Digest::read).with_context(|| format!("reading {}", path.display()))
}

fn is_older(path: &Path, age: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| SystemTime::now().duration_since(modified).is_ok_and(|since| since >= age))
}

/// Removes a directory and all that is in it; whether there was one.
fn remove_dir(dir: &Path) -> Result<bool> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| format!("removing {}", dir.display())),
    }
}

/// Removes the version's and the name's directory below `root`, where nothing is in them.
fn remove_empty(root: &Path, id: &Id) {
    let parent = root.join(id.name.as_str());
    // Whatever is still in use stays.
    let _ = fs::remove_dir(parent.join(id.version.as_str()));
    let _ = fs::remove_dir(&parent);
}

/// The entries of `dir` that are names by the protocol's grammar, sorted.
fn names_in(dir: &Path) -> Result<Vec<Name>> {
    let mut names: Vec<Name> = file_names(dir)?.into_iter().filter_map(|name| name.parse().ok()).collect();
    names.sort();
    Ok(names)
}

/// The names of what is in `dir`; none where there is no such directory.
fn file_names(dir: &Path) -> Result<Vec<String>> {
    let read = || {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<_>>()
    };
    match read() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        names => names.with_context(|| format!("reading {}", dir.display())),
    }
}
