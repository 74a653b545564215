//! An orderly end on SIGTERM and SIGINT: programs that were started are ended, whatever
//! waits or loops gives up at the next [`check`], and temporary directories go as on any
//! other error.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, getpid, kill_process, set_child_subreaper};
use tokio::signal::unix::{SignalKind, signal};

static STOPPED: AtomicBool = AtomicBool::new(false);
/// The programs that run.
static CHILDREN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
/// What else is to be told of a signal.
static LISTENERS: Mutex<Vec<Box<dyn Fn() + Send>>> = Mutex::new(Vec::new());

/// From now on, SIGTERM and SIGINT do not kill this process: they make [`check`] fail.
///
/// # Errors
/// When the handlers cannot be set.
pub fn on_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let guard = runtime.enter();
    let mut term = signal(SignalKind::terminate()).context("handling SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("handling SIGINT")?;
    drop(guard);
    // What outlives the program that started it becomes a child of this process, and can be ended.
    set_child_subreaper(Some(getpid())).context("becoming the parent of orphans")?;
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        STOPPED.store(true, Ordering::SeqCst);
        for child in CHILDREN.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            end(*child);
        }
        LISTENERS.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|listener| listener());
        end_orphans()
    });
    Ok(())
}

/// Ends what the ended programs had started themselves, and what became a child of this process
/// by their end: bubblewrap's own child does not notice it before it is ready. Goes on until this
/// process ends, for a program may have been started just before the signal.
fn end_orphans() -> ! {
    let programs = || !CHILDREN.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
    let me = std::process::id();
    let mut before = true;
    loop {
        let now = programs();
        let processes = if now || before { fs::read_dir("/proc").ok() } else { None };
        before = now;
        for entry in processes.into_iter().flatten().flatten() {
            let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            // ID (NAME) STATE PARENT …, where a name may hold anything (proc_pid_stat(5)).
            let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
            if let (Some(id), true) = (id, parent == Some(me)) {
                end(id);
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Fails after a signal.
///
/// # Errors
/// As said: worth a retry.
pub fn check() -> Result<()> {
    if STOPPED.load(Ordering::SeqCst) {
        bail!("stopped by a signal");
    }
    Ok(())
}

/// Calls `listener` when a signal comes, or now if one came already: for libraries that have a
/// way of their own to be told that they shall give up. It stays for good, and may be called twice.
pub fn listen(listener: impl Fn() + Send + 'static) {
    let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    if check().is_err() {
        listener();
    }
    listeners.push(Box::new(listener));
}

/// Waits for `work`, or for a signal.
///
/// # Errors
/// The work's, or that of [`check`].
pub async fn or<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        done = work => done,
        error = stopped() => Err(error),
    }
}

/// Ends, with the error of [`check`], when a signal came.
pub async fn stopped() -> anyhow::Error {
    loop {
        if let Err(error) = check() {
            return error;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A reader of what may be long: it fails after a signal.
pub struct Reader<R>(pub R);

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        check().map_err(io::Error::other)?;
        self.0.read(buffer)
    }
}

/// A program that is ended by SIGKILL when a signal stops this one; until it is dropped,
/// which must be before somebody else can have its number.
pub struct Child(u32);

impl Child {
    /// `id` is the number of its process.
    pub fn new(id: u32) -> Self {
        CHILDREN.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        if check().is_err() {
            end(id);
        }
        Self(id)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        CHILDREN.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

fn end(id: u32) {
    let pid = i32::try_from(id).ok().and_then(Pid::from_raw);
    // One that has ended already is as good.
    let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
}
