//! Progress: a bar on a terminal, a plain line every few seconds elsewhere. Log
//! lines go above the bars.

use std::io::{self, IsTerminal, Write};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};

/// How often a plain progress line is logged where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// The progress of one transfer or stage, in bytes.
pub struct Progress {
    bar: ProgressBar,
    what: String,
    total: Option<u64>,
    plain: Option<Mutex<Instant>>,
}

impl Progress {
    /// Starts to show `what`; `total` in bytes, where it is known.
    pub fn bytes(what: impl Into<String>, total: Option<u64>) -> Self {
        let what = what.into();
        let plain = !io::stderr().is_terminal();
        let bar = if plain || !tracing::enabled!(tracing::Level::INFO) {
            ProgressBar::hidden()
        } else {
            let template = match total {
                Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
                None => "{msg} {spinner} {bytes} {bytes_per_sec}",
            };
            let style = ProgressStyle::with_template(template).expect("the template is a constant");
            BARS.add(ProgressBar::no_length().with_style(style).with_message(what.clone()))
        };
        if let Some(total) = total {
            bar.set_length(total);
        }
        Self { bar, what, total, plain: plain.then(|| Mutex::new(Instant::now())) }
    }

    /// So many bytes are done in all: after a break there may be fewer than it seemed.
    pub fn set(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// `count` more bytes are done.
    pub fn add(&self, count: u64) {
        self.bar.inc(count);
        let Some(last) = &self.plain else { return };
        let Ok(mut last) = last.try_lock() else { return };
        if last.elapsed() >= PLAIN_INTERVAL {
            *last = Instant::now();
            let done = HumanBytes(self.bar.position());
            match self.total {
                Some(total) => tracing::info!("{}: {done} of {}", self.what, HumanBytes(total)),
                None => tracing::info!("{}: {done}", self.what),
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Where the log writes: stderr, with the bars out of the way.
pub struct LogWriter;

impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for LogWriter {
    type Writer = LogLine;

    fn make_writer(&'a self) -> LogLine {
        LogLine
    }
}

/// One write of the log.
pub struct LogLine;

impl Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
