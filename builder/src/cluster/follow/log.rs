//! The log of one container, whole: after a break it goes on behind the last line that
//! was shown, by the timestamps that the kubelet gives to lines.

use std::io::{Write, stderr};
use std::time::Duration;

use futures_util::io::{AsyncBufReadExt, AsyncReadExt};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::LogParams;
use oscontainer_program::exit;
use oscontainer_program::progress::LogLine;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::cluster::Access;

/// The first and the longest pause before a log is asked for again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The longest line, in bytes, that is shown as one.
const MAX_LINE: u64 = 1 << 20;
/// How long a connection may go on bringing the log of a container that has ended; if it is
/// dead, another one is not.
const GRACE: Duration = Duration::from_secs(3);
/// How long the rest of the log of an ended container is asked for.
const REST: Duration = Duration::from_secs(45);

/// Where a log is.
#[derive(Clone)]
pub struct Place {
    /// The cluster.
    pub access: Access,
    /// The Pod's namespace.
    pub namespace: String,
    /// The Pod.
    pub pod: String,
    /// The container.
    pub container: String,
}

/// What is known of the container whose log it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It runs.
    Runs,
    /// It has ended: nothing will be added.
    Ended,
    /// It has ended, and runs again: its log is the `previous` one.
    Replaced,
}

/// A log that is being read; dropped, no more of it is shown.
pub struct Log {
    state: watch::Sender<State>,
    task: JoinHandle<()>,
}

impl Log {
    /// Begins to show the log of a container; its lines start with its name, unless it is
    /// alone.
    pub fn start(place: Place, alone: bool) -> Self {
        let (state, receiver) = watch::channel(State::Runs);
        let prefix = if alone { String::new() } else { format!("{}: ", place.container) };
        let reader = Reader { place, prefix, last: None, same: 0, told: None };
        Self { state, task: tokio::spawn(reader.run(receiver)) }
    }

    /// The container has ended.
    pub fn ended(&self) {
        self.set(State::Ended);
    }

    /// The container has ended, and runs again.
    pub fn replaced(&self) {
        self.set(State::Replaced);
    }

    fn set(&self, state: State) {
        self.state.send_if_modified(|now| {
            let later = *now == State::Runs || state == State::Replaced;
            later && std::mem::replace(now, state) != state
        });
    }

    /// Waits until all of it was shown.
    pub async fn finish(mut self) {
        self.ended();
        if let Err(error) = (&mut self.task).await {
            tracing::warn!("reading a log: {error}");
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Reader {
    place: Place,
    prefix: String,
    /// The time of the last line shown.
    last: Option<Timestamp>,
    /// How many lines of that time were shown.
    same: usize,
    /// The last line that had no time: the kubelet's own, which it says each time.
    told: Option<String>,
}

impl Reader {
    async fn run(mut self, mut state: watch::Receiver<State>) {
        let mut pause = FIRST_PAUSE;
        let mut ended: Option<Instant> = None;
        loop {
            let now = *state.borrow_and_update();
            if now != State::Runs {
                ended.get_or_insert_with(Instant::now);
            }
            let before = (self.last, self.same);
            let over = async {
                // Without a sender nothing changes any more.
                if state.changed().await.is_err() || now != State::Runs {
                    std::future::pending::<()>().await;
                }
                sleep(GRACE).await;
            };
            let passed = tokio::select! {
                passed = self.pass(now) => passed,
                () = over => Ok(()),
            };
            match passed {
                // One whole pass after the end has shown everything.
                Ok(()) if now != State::Runs => return,
                Ok(()) => {}
                Err(error) => {
                    let name = format!("{}/{}", self.place.pod, self.place.container);
                    tracing::debug!("the log of {name}: {error}");
                    let gone = matches!(&error, kube::Error::Api(status) if status.code == 404);
                    if ended.is_some_and(|since| gone || since.elapsed() > REST) {
                        let reason = exit::chain(&crate::cluster::told(error));
                        tracing::warn!("the end of the log of {name} is lost: {reason}");
                        return;
                    }
                }
            }
            if *state.borrow() != now {
                continue;
            }
            pause = if before == (self.last, self.same) { (pause * 2).min(LONGEST_PAUSE) } else { FIRST_PAUSE };
            tokio::select! {
                () = sleep(if ended.is_some() { FIRST_PAUSE } else { pause }) => {}
                Ok(()) = state.changed() => {}
            }
        }
    }

    /// Reads the log from where it stopped to where it ends or breaks.
    async fn pass(&mut self, state: State) -> Result<(), kube::Error> {
        let parameters = LogParams {
            container: Some(self.place.container.clone()),
            follow: state != State::Replaced,
            previous: state == State::Replaced,
            timestamps: true,
            // kube rounds to whole seconds, upwards too: what came before would be lost.
            since_time: self.last.and_then(|last| Timestamp::from_second(last.as_second()).ok()),
            ..LogParams::default()
        };
        let pods = self.place.access.api::<Pod>(&self.place.namespace);
        let mut stream = Box::pin(pods.log_stream(&self.place.pod, &parameters).await?);
        // Lines of the last time come again, and with whole seconds some before them.
        let (last, mut skip) = (self.last, self.same);
        loop {
            let mut line = Vec::new();
            let mut limited = (&mut stream).take(MAX_LINE);
            limited.read_until(b'\n', &mut line).await.map_err(kube::Error::ReadEvents)?;
            let full = limited.limit() == 0;
            let whole = line.pop_if(|byte| *byte == b'\n').is_some() || full;
            // Half a line comes again, whole, unless it is all that there will be.
            if !whole && (line.is_empty() || state == State::Runs) {
                return Ok(());
            }
            let line = String::from_utf8_lossy(&line);
            let stamped = line.split_once(' ').and_then(|(time, text)| Some((time.parse::<Timestamp>().ok()?, text)));
            let Some((time, text)) = stamped else {
                if self.told.as_deref() != Some(&*line) {
                    self.show(&line);
                    self.told = Some(line.into_owned());
                }
                continue;
            };
            match last {
                Some(last) if time < last => continue,
                Some(last) if time == last && skip > 0 => {
                    skip -= 1;
                    continue;
                }
                _ => {}
            }
            self.same = if self.last == Some(time) { self.same + 1 } else { 1 };
            self.last = Some(time);
            self.show(text);
        }
    }

    fn show(&self, line: &str) {
        let text = format!("{}{line}\n", self.prefix);
        // Who does not read us does not want to.
        let _ = LogLine.write_all(text.as_bytes());
        let _ = stderr().flush();
    }
}
