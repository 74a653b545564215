//! What makes room: surplus versions, uploads that did not go on, and tarballs whose
//! manifest has not come. Never the newest version, and never one that is read.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::resume;
use super::routes::{Shared, blocking};
use super::store::{Id, Record, Store, now};

/// The shortest and the longest time between two rounds.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(3600));
/// How long after a read a version counts as being read: its reader may be between the
/// manifest and the tarball, or between two connections.
const READ_LATELY: Duration = Duration::from_secs(300);
/// Nanoseconds of a day.
const DAY: u64 = 24 * 60 * 60 * 1_000_000_000;

/// Which versions are kept. What either option keeps is kept.
#[derive(Debug, Clone, Args)]
pub struct KeepOptions {
    /// Keep the newest N versions of each name, and remove older ones [default: all]
    #[arg(long, value_name = "N", env = "OSCONTAINER_KEEP")]
    keep: Option<NonZeroUsize>,
    /// Keep versions of the last N days, and remove older ones, but never the newest [default: all]
    #[arg(long, value_name = "N", env = "OSCONTAINER_KEEP_DAYS")]
    keep_days: Option<u64>,
}

impl KeepOptions {
    /// Whether a version may go: the `index`th newest of its name, `age` nanoseconds old.
    fn surplus(&self, index: usize, age: u64) -> bool {
        let beyond = self.keep.is_none_or(|keep| index >= keep.get());
        let old = self.keep_days.is_none_or(|days| age / DAY >= days);
        let asked = self.keep.is_some() || self.keep_days.is_some();
        index > 0 && asked && beyond && old
    }
}

/// Which versions are being read, and when they were read last.
#[derive(Default)]
pub struct Readers(Mutex<HashMap<Id, Reads>>);

/// The reads of a version.
#[derive(Default)]
struct Reads {
    under_way: usize,
    /// When the last one ended that got something.
    last: Option<Instant>,
    /// Whether it is being removed.
    goes: bool,
}

impl Reads {
    fn count(&self) -> bool {
        self.goes || self.under_way > 0 || self.last.is_some_and(|last| last.elapsed() < READ_LATELY)
    }
}

/// A read under way; it is over when the last copy is dropped.
#[derive(Clone)]
pub struct Reading(Arc<Guard>);

struct Guard {
    readers: Arc<Readers>,
    id: Id,
    /// Whether something is sent.
    sends: AtomicBool,
}

impl Reading {
    /// There is something to be sent: when it has been, the version was read.
    pub fn sends(&self) {
        self.0.sends.store(true, Ordering::Relaxed);
    }
}

/// A version that nobody reads until this is dropped.
struct Going<'a> {
    readers: &'a Readers,
    id: &'a Id,
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        self.readers.versions().remove(self.id);
    }
}

impl Readers {
    /// A version is being read from now on; `None` where it is just being removed.
    pub fn begin(self: &Arc<Self>, id: Id) -> Option<Reading> {
        let mut versions = self.versions();
        let reads = versions.entry(id.clone()).or_default();
        if reads.goes {
            return None;
        }
        reads.under_way += 1;
        Some(Reading(Arc::new(Guard { readers: Arc::clone(self), id, sends: AtomicBool::new(false) })))
    }

    /// Keeps readers from a version, unless it is being read or was lately.
    fn close<'a>(&'a self, id: &'a Id) -> Option<Going<'a>> {
        let mut versions = self.versions();
        if versions.get(id).is_some_and(Reads::count) {
            return None;
        }
        versions.insert(id.clone(), Reads { goes: true, ..Reads::default() });
        Some(Going { readers: self, id })
    }

    /// Forgets the versions that nobody has read lately.
    fn prune(&self) {
        self.versions().retain(|_, reads| reads.count());
    }

    fn versions(&self) -> MutexGuard<'_, HashMap<Id, Reads>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut versions = self.readers.versions();
        let Some(reads) = versions.get_mut(&self.id) else { return };
        reads.under_way -= 1;
        if self.sends.load(Ordering::Relaxed) {
            reads.last = Some(Instant::now());
        }
        // Whatever name somebody asks for, nothing is kept of those that are not there.
        if !reads.count() {
            versions.remove(&self.id);
        }
    }
}

/// What makes room, from time to time and whenever a version was stored.
pub struct Housekeeping {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Housekeeping {
    /// Starts it.
    pub fn start(shared: Shared) -> Self {
        let stop = CancellationToken::new();
        Self { stop: stop.clone(), task: tokio::spawn(run(shared, stop)) }
    }

    /// Ends it, with the step that it is at.
    pub async fn stop(self) {
        self.stop.cancel();
        if let Err(error) = self.task.await {
            tracing::error!("housekeeping: {error}");
        }
    }
}

async fn run(shared: Shared, stop: CancellationToken) {
    let pause = (shared.limits.upload_expiry / 4).clamp(PAUSE.0, PAUSE.1);
    while !stop.is_cancelled() {
        // What fails is in the log, and tried again the next time.
        resume::remove_stale(&shared).await;
        remove_surplus(&shared, &stop).await;
        shared.readers.prune();
        let changed = tokio::time::timeout(pause, shared.changed.notified());
        let _ = stop.run_until_cancelled(changed).await;
    }
}

async fn remove_surplus(shared: &Shared, stop: &CancellationToken) {
    let now = now();
    for (name, versions) in blocking(shared, Store::all).await.unwrap_or_default() {
        let surplus = |(index, (_, record)): &(usize, (_, Record))| {
            shared.limits.keep.surplus(*index, now.saturating_sub(record.stored))
        };
        for (_, (version, record)) in versions.into_iter().enumerate().filter(surplus) {
            let id = Id { name: name.clone(), version };
            if stop.is_cancelled() {
                return;
            }
            let Some(_going) = shared.readers.close(&id) else { continue };
            let surplus = id.clone();
            if let Ok(true) = blocking(shared, move |store| store.delete_this(&surplus, &record)).await {
                tracing::info!("{} {}: removed, there are newer ones", id.name, id.version);
            }
        }
    }
}
