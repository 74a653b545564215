//! The lock of a store that cannot create an object only where there is none: an object that
//! says who serves the store, written anew all the time. It keeps a second endpoint out that
//! somebody starts by mistake; what comes in at the same time at one endpoint is ordered by
//! that endpoint's own locks.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
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

/// The lock, held until [`Lease::release`] or the process's end.
pub struct Lease {
    store: Operator,
    holder: Holder,
    lost: Arc<AtomicBool>,
}

impl Lease {
    /// Takes the lock of the store, which is shown as `shown`. Where its holder may be alive
    /// this takes half a minute.
    ///
    /// # Errors
    /// When another endpoint holds it.
    pub fn take(store: Operator, runtime: &Handle, shown: &str) -> Result<Self> {
        let holder = Holder::this();
        let lost = Arc::new(AtomicBool::new(false));
        runtime.block_on(async {
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
            write(&store, &holder).await?;
            tokio::time::sleep(SETTLING).await;
            match read(&store).await? {
                Some(now) if now.unique != holder.unique => Err(in_use(&now)),
                _ => Ok(()),
            }
        })?;
        runtime.spawn(renew(store.clone(), holder.clone(), Arc::clone(&lost)));
        Ok(Self { store, holder, lost })
    }

    /// Whether it is still held.
    ///
    /// # Errors
    /// When another endpoint has taken it.
    pub fn check(&self) -> Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            bail!("another endpoint serves this store now: stop one of them");
        }
        Ok(())
    }

    /// Gives it back, so that the next endpoint need not wait.
    pub fn release(&self, runtime: &Handle) {
        if self.lost.swap(true, Ordering::Relaxed) {
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
async fn renew(store: Operator, mut holder: Holder, lost: Arc<AtomicBool>) {
    loop {
        tokio::time::sleep(RENEWAL).await;
        if lost.load(Ordering::Relaxed) {
            return;
        }
        let renewed = match read(&store).await {
            Ok(Some(found)) if found.unique != holder.unique => {
                tracing::error!("the endpoint on {} has taken this store: nothing is stored here any more", found.host);
                lost.store(true, Ordering::Relaxed);
                return;
            }
            Ok(_) => {
                holder.renewed += 1;
                write(&store, &holder).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = renewed {
            tracing::warn!("renewing the store's lock: {error:#}");
        }
    }
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
