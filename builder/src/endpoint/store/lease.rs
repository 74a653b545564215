//! The lock of a store that cannot create an object only where there is none: an object that
//! says who serves the store, written anew all the time. It keeps a second endpoint out that
//! somebody starts by mistake; what comes in at the same time at one endpoint is ordered by
//! that endpoint's own locks. Its holder changes nothing in the store once it has been late to write it, for
//! half of the time after which another one may take it.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use opendal::{ErrorKind, Operator};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::segments::random;

/// The lock's path.
const LOCK: &str = "lock";
/// How often its holder writes it.
const RENEWAL: Duration = Duration::from_secs(5);
/// How long it must stand unchanged before its holder counts as dead.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long its holder relies on what it wrote: well before somebody else may.
const VALID: Duration = Duration::from_secs(PATIENCE.as_secs() / 2);
/// How long the store may take for a renewal.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often what is under way looks whether the lock is still held.
const GLANCE: Duration = Duration::from_millis(500);
/// How long after it was taken it must still be held: of two that find it free one is left.
const SETTLING: Duration = Duration::from_secs(1);

/// Who holds the lock. What processes share tells whether one can see the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    host: String,
    boot: String,
    /// The namespace in which `process` is a process id.
    processes: String,
    process: u32,
    /// Tells this holder from all others.
    unique: u64,
    /// Grows each time.
    renewed: u64,
}

impl Holder {
    fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let processes = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        Self {
            host: read("/proc/sys/kernel/hostname"),
            boot: read("/proc/sys/kernel/random/boot_id"),
            processes: processes.to_string_lossy().into_owned(),
            process: std::process::id(),
            unique: random(),
            renewed: 0,
        }
    }

    /// Whether it is certainly dead: it was a process here, and is none any more.
    fn is_dead(&self, this: &Self) -> bool {
        let visible = (&self.boot, &self.processes) == (&this.boot, &this.processes) && !self.processes.is_empty();
        visible && (self.process == this.process || !Path::new(&format!("/proc/{}", self.process)).exists())
    }
}

/// The lock is not held.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub enum Lost {
    /// It could not be renewed, which may pass.
    #[error("the store's lock could not be renewed in time: nothing is stored until it is")]
    Late,
    /// Somebody else has it.
    #[error("another endpoint serves this store now: stop one of them")]
    Taken,
}

/// Until when the lock is held: a time of [`uptime`].
#[derive(Clone)]
struct Held(Arc<Mutex<Result<Duration, Lost>>>);

impl Held {
    /// Written at `moment`.
    fn from(moment: Duration) -> Self {
        Self(Arc::new(Mutex::new(Ok(moment + VALID))))
    }

    fn check(&self) -> Result<(), Lost> {
        let until = (*self.state())?;
        if uptime().is_some_and(|now| now < until) { Ok(()) } else { Err(Lost::Late) }
    }

    /// Written again at `moment`; in vain where it was given back meanwhile.
    fn renewed(&self, moment: Duration) {
        if let Ok(until) = &mut *self.state() {
            *until = moment + VALID;
        }
    }

    fn state(&self) -> MutexGuard<'_, Result<Duration, Lost>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long the machine runs, with the time that it was suspended (proc_uptime(5)), which `Instant` leaves out.
fn uptime() -> Option<Duration> {
    let text = fs::read_to_string("/proc/uptime").ok()?;
    text.split(' ').next()?.parse().ok().map(Duration::from_secs_f64)
}

/// The lock, held until [`Lease::release`] or the process's end.
pub struct Lease {
    store: Operator,
    holder: Holder,
    held: Held,
}

impl Lease {
    /// Takes the lock of the store, which is shown as `shown`. Where its holder may be alive
    /// this takes half a minute.
    ///
    /// # Errors
    /// When another endpoint holds it.
    pub fn take(store: Operator, runtime: &Handle, shown: &str) -> Result<Self> {
        let holder = Holder::this();
        let held = runtime.block_on(async {
            let in_use = |other: &Holder| {
                let (host, process) = (&other.host, other.process);
                anyhow!(
                    "the store {shown} is in use: the endpoint on {host} (process {process}) holds it; \
                     only one may serve a store that cannot create conditionally"
                )
            };
            if let Some(other) = read(&store).await?.filter(|other| !other.is_dead(&holder)) {
                tracing::info!("the store {shown} is locked by {}: waiting to see whether it is alive", other.host);
                tokio::time::sleep(PATIENCE).await;
                if let Some(now) = read(&store).await?.filter(|now| *now != other && !now.is_dead(&holder)) {
                    return Err(in_use(&now));
                }
            }
            let written = uptime().context("reading /proc/uptime")?;
            write(&store, &holder).await?;
            match settled(&store, &holder).await? {
                Some(now) => Err(in_use(&now)),
                None => Ok(Held::from(written)),
            }
        })?;
        runtime.spawn(renew(store.clone(), holder.clone(), held.clone()));
        Ok(Self { store, holder, held })
    }

    /// Whether it is still held.
    ///
    /// # Errors
    /// When it was not renewed in time, or another endpoint has taken it.
    pub fn check(&self) -> Result<()> {
        Ok(self.held.check()?)
    }

    /// Does `work` as long as it is held.
    ///
    /// # Errors
    /// Those of `work` and of [`Lease::check`].
    pub async fn during<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.check()?;
        let ends = async {
            loop {
                tokio::time::sleep(GLANCE).await;
                if let Err(lost) = self.check() {
                    return lost;
                }
            }
        };
        tokio::select! {
            done = work => done,
            lost = ends => Err(lost),
        }
    }

    /// Gives it back, so that the next endpoint need not wait.
    pub fn release(&self, runtime: &Handle) {
        if matches!(std::mem::replace(&mut *self.held.state(), Err(Lost::Taken)), Err(Lost::Taken)) {
            return;
        }
        let released = runtime.block_on(async {
            match read(&self.store).await? {
                Some(holder) if holder.unique == self.holder.unique => Ok(self.store.delete(LOCK).await?),
                _ => Ok::<_, anyhow::Error>(()),
            }
        });
        if let Err(error) = released {
            tracing::warn!("giving the store's lock back: {error:#}");
        }
    }
}

/// Writes the lock anew until somebody else holds it.
async fn renew(store: Operator, mut holder: Holder, held: Held) {
    loop {
        tokio::time::sleep(RENEWAL).await;
        let late = match held.check() {
            Err(Lost::Taken) => return,
            checked => checked.is_err(),
        };
        holder.renewed += 1;
        let renewal = tokio::time::timeout(RENEWAL_TIMEOUT, renewed(&store, &holder, late));
        match renewal.await.context("the store does not answer").flatten() {
            Ok(Ok(written)) => held.renewed(written),
            Ok(Err(found)) => {
                tracing::error!("the endpoint on {} has taken this store: nothing is stored here any more", found.host);
                *held.state() = Err(Lost::Taken);
                return;
            }
            Err(error) => tracing::warn!("renewing the store's lock: {error:#}"),
        }
    }
}

/// Writes the lock anew, unless somebody else has it; says when, or who. One that was `late` may meet somebody who
/// takes it just now, and waits to see who is left, as that one does.
async fn renewed(store: &Operator, holder: &Holder, late: bool) -> Result<Result<Duration, Holder>> {
    if let Some(found) = read(store).await?.filter(|found| found.unique != holder.unique) {
        return Ok(Err(found));
    }
    let written = uptime().context("reading /proc/uptime")?;
    write(store, holder).await?;
    let other = if late { settled(store, holder).await? } else { None };
    Ok(other.map_or(Ok(written), Err))
}

/// Who else has the lock a while after it was written.
async fn settled(store: &Operator, holder: &Holder) -> Result<Option<Holder>> {
    tokio::time::sleep(SETTLING).await;
    Ok(read(store).await?.filter(|found| found.unique != holder.unique))
}

async fn read(store: &Operator) -> Result<Option<Holder>> {
    match store.read(LOCK).await {
        // A lock that cannot be read is nobody's.
        Ok(content) => Ok(serde_json::from_slice(&content.to_vec()).ok()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("reading the store's lock"),
    }
}

async fn write(store: &Operator, holder: &Holder) -> Result<()> {
    store.write(LOCK, serde_json::to_vec(holder)?).await.map(drop).context("writing the store's lock")
}
