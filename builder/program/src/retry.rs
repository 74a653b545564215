//! Transfers are tried again when they fail on the way: after a pause that doubles
//! and is never the same twice, as long as the server asks for, within a deadline.

use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use clap::Args;
use tokio::time::Instant;

use crate::client::retry_after;
use crate::exit;

/// The first pause; each one gets up to as much again at random.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest pause of our own.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The longest pause that a server is granted.
const LONGEST_ASKED: Duration = Duration::from_secs(600);

/// Options of every transfer.
#[derive(Debug, Clone, Args)]
pub struct RetryOptions {
    /// How often a transfer that does not get on is tried again
    #[arg(long, value_name = "N", default_value_t = 7, env = "OSCONTAINER_RETRIES")]
    retries: usize,
    /// Seconds that all transfers may take together [default: no limit]
    #[arg(long, value_name = "SECONDS", env = "OSCONTAINER_DEADLINE")]
    deadline: Option<u64>,
}

/// The patience that is left for the transfers of one command.
pub struct Retry {
    retries: usize,
    pauses: ExponentialBackoff,
    deadline: Option<(Instant, u64)>,
}

impl Retry {
    /// All of the patience that the options grant; the deadline runs from now.
    pub fn new(options: &RetryOptions) -> Self {
        let deadline = options.deadline.map(|seconds| (Instant::now() + Duration::from_secs(seconds), seconds));
        Self { retries: options.retries, pauses: pauses(options.retries), deadline }
    }

    /// The same patience anew, but for the deadline, which stays.
    pub fn renewed(&self) -> Self {
        Self { retries: self.retries, pauses: pauses(self.retries), deadline: self.deadline }
    }

    /// Something arrived: the next failure is the first in a row.
    pub fn progress(&mut self) {
        self.pauses = pauses(self.retries);
    }

    /// Runs `work` until it succeeds, fails for good, or the patience is at its end.
    ///
    /// # Errors
    /// The last one of `work`.
    pub async fn run<T>(&mut self, what: &str, mut work: impl AsyncFnMut() -> Result<T>) -> Result<T> {
        loop {
            let done = self.bounded(work()).await;
            match done {
                Ok(value) => {
                    self.progress();
                    return Ok(value);
                }
                Err(error) => self.pause(what, error).await?,
            }
        }
    }

    /// `work`, which ends at the deadline at the latest.
    ///
    /// # Errors
    /// As `work`; that the deadline has passed.
    pub async fn bounded<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.deadline {
            None => work.await,
            Some((end, seconds)) => tokio::time::timeout_at(end, work)
                .await
                .map_err(|_| anyhow!("the --deadline of {seconds} s has passed"))
                .flatten(),
        }
    }

    /// Waits before the next try of `what`.
    ///
    /// # Errors
    /// `error`, when there is to be none.
    pub async fn pause(&mut self, what: &str, error: Error) -> Result<()> {
        if exit::code(&error) != exit::RETRY {
            return Err(error);
        }
        let Some(pause) = self.pauses.next() else { return Err(error) };
        let pause = pause.max(retry_after(&error).unwrap_or_default().min(LONGEST_ASKED));
        if let Some((end, seconds)) = self.deadline
            && Instant::now() + pause >= end
        {
            return Err(error).context(format!("giving up, for the --deadline of {seconds} s leaves no time"));
        }
        tracing::warn!("{what} failed, next try in {:.1} s: {}", pause.as_secs_f32(), exit::chain(&error));
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

fn pauses(retries: usize) -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_max_times(retries)
        .with_jitter()
        .build()
}
