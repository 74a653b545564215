//! Verification of a tarball while it streams by: one thread reads the canonical
//! tar and hashes it, the others check the objects and write them to the store.
//! Memory stays constant: objects travel in chunks through bounded channels.
//!
//!     reader ─▶ hash, count ─▶ tar entries ─▶ [objects] ─▶ checks on all cores ─▶ closure

mod closure;
mod object;
mod stream;
mod tarball;

use std::fs::File;
use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use oscontainer_artifact::manifest::Manifest;
use oscontainer_artifact::object::ObjectName;
use oscontainer_program::reject;

pub use object::{Check, Links, check_object};
use stream::Counted;

/// Bytes of an object that travel at a time.
const CHUNK: usize = 256 << 10;
/// Chunks of one large object, and objects, that wait for a worker.
const WAITING: usize = 4;

/// What is downloaded but not yet believed: the pinned manifest and the
/// tarball's bytes as they come.
pub struct Fetched<R> {
    /// The manifest, its digest checked.
    pub manifest: Manifest,
    /// The tarball.
    pub tarball: R,
}

/// An artifact that was verified as a whole. Only [`verify`] makes one.
pub struct Verified {
    manifest: Manifest,
    objects: Vec<ObjectName>,
}

impl Verified {
    /// The artifact's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The objects that the tarball holds, in no order.
    pub fn objects(&self) -> &[ObjectName] {
        &self.objects
    }
}

/// Where objects go while they are checked; nothing there may be visible before
/// [`verify`] returned.
pub trait Objects: Sync {
    /// A new file for the object's bytes, or nothing if it is there already and sound.
    ///
    /// # Errors
    /// When the store cannot be written.
    fn create(&self, name: &ObjectName) -> Result<Option<File>>;
}

/// Reads the tarball to its end and checks all of it.
///
/// # Errors
/// `Rejected` when it is not what the manifest says; other errors when it cannot
/// be read or the store cannot be written.
pub fn verify<R: Read>(fetched: Fetched<R>, store: &impl Objects, progress: impl Fn(u64)) -> Result<Verified> {
    let Fetched { manifest, tarball } = fetched;
    let mut counted = Counted::new(tarball, manifest.tarball.size, progress);
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let (jobs, queue) = sync_channel(workers * WAITING);
    let pool = Pool { queue: Mutex::new(queue), store, results: Mutex::default(), failure: Mutex::default() };
    let read = thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| pool.work());
        }
        let read = read_tarball(&mut counted, &manifest, &pool, &jobs);
        drop(jobs);
        read
    });
    // It was about what came before the place where reading failed.
    if let Some(error) = pool.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    read?;
    let digest = counted.finish()?;
    if digest != manifest.tarball.digest {
        reject!("the tarball's digest is {digest}, the manifest says {}", manifest.tarball.digest);
    }
    let results = pool.results.into_inner().unwrap_or_else(PoisonError::into_inner);
    let objects = results.iter().map(|(name, _)| *name).collect();
    closure::check(&manifest.commit, results)?;
    Ok(Verified { manifest, objects })
}

/// One object on its way to a worker.
struct Job {
    name: ObjectName,
    size: u64,
    chunks: Receiver<Vec<u8>>,
}

/// What the workers share.
struct Pool<'a, S> {
    queue: Mutex<Receiver<Job>>,
    store: &'a S,
    results: Mutex<Vec<(ObjectName, Links)>>,
    failure: Mutex<Option<anyhow::Error>>,
}

impl<S: Objects> Pool<'_, S> {
    fn work(&self) {
        loop {
            let job = self.queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(job) = job else { return };
            let name = job.name;
            if self.failed() {
                continue;
            }
            match self.check(job).with_context(|| format!("verifying object {name}")) {
                Ok(Some(links)) => self.results.lock().unwrap_or_else(PoisonError::into_inner).push((name, links)),
                Ok(None) => {}
                Err(error) => {
                    self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        }
    }

    /// Whether nothing more needs to be read.
    fn failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// What an object refers to; nothing where reading ended in the middle of it, which has a reason of its own.
    fn check(&self, job: Job) -> Result<Option<Links>> {
        let mut check = object::Check::new(job.name);
        let mut file = self.store.create(&job.name)?;
        let mut left = job.size;
        for chunk in job.chunks {
            left -= chunk.len() as u64;
            check.update(&chunk)?;
            if let Some(file) = &mut file {
                file.write_all(&chunk).context("writing it")?;
            }
        }
        if left > 0 { Ok(None) } else { Ok(Some(check.finish()?)) }
    }
}

/// Hands each object to the workers, and stops when one has failed.
fn read_tarball<S: Objects>(
    input: &mut impl Read,
    manifest: &Manifest,
    pool: &Pool<S>,
    jobs: &SyncSender<Job>,
) -> Result<()> {
    let mut reader = tarball::Reader::new(input, manifest);
    while let Some(entry) = reader.next()? {
        let (chunks, receiver) = sync_channel(WAITING);
        let mut left = entry.size;
        let mut job = Some(Job { name: entry.name, size: entry.size, chunks: receiver });
        loop {
            let length = left.min(CHUNK as u64) as usize;
            let mut chunk = vec![0; length];
            reader.read_content(&mut chunk)?;
            left -= length as u64;
            let taken = chunks.send(chunk).is_ok() && job.take().is_none_or(|job| jobs.send(job).is_ok());
            if !taken || pool.failed() {
                return Ok(());
            }
            if left == 0 {
                break;
            }
        }
        drop(chunks);
        reader.end_content()?;
    }
    Ok(())
}
