//! Runs a foreign program: its output goes to the user's log line by line, and its
//! last lines into the error when it fails.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result};
use oscontainer_program::stop;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};

/// How many of the last lines are part of an error.
const TAIL: usize = 20;
/// The longest line, in bytes: more of it is another one.
const LINE: u64 = 16 << 10;
/// The last lines that are kept, in bytes: what a scriptlet prints has no end that we know.
const KEPT: usize = 16 << 20;

const SIGKILL: i32 = Signal::KILL.as_raw();

/// What a program left behind when it ended, however it ended.
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// All lines that it wrote to stdout and stderr, in the order they came.
    pub lines: Vec<String>,
}

impl Ended {
    /// The last lines, each on a line of its own.
    pub fn tail(&self) -> String {
        let from = self.lines.len().saturating_sub(TAIL);
        self.lines[from..].iter().map(|line| format!("\n    {line}")).collect()
    }

    /// The first line that contains one of `texts`.
    pub fn find(&self, texts: &[&str]) -> Option<&str> {
        self.lines.iter().map(String::as_str).find(|line| texts.iter().any(|text| line.contains(text)))
    }

    /// Requires that no disk was full and nobody killed the program (the kernel does, where memory is short): that
    /// is no fault of the input, and may pass.
    ///
    /// # Errors
    /// As said.
    pub fn had_what_it_needs(&self, what: &str) -> Result<()> {
        if let Some(line) = self.find(&["No space left on device"]).filter(|_| !self.status.success()) {
            anyhow::bail!("a disk is full: {}; the last lines:{}", line.trim(), self.tail());
        }
        // Shells, and bubblewrap, say so of what they ran.
        const KILLED: i32 = 128 + SIGKILL;
        match (self.status.signal(), self.status.code()) {
            (Some(SIGKILL), _) | (_, Some(KILLED)) => {
                anyhow::bail!("{what} was killed; is there too little memory? Its last lines:{}", self.tail())
            }
            _ => Ok(()),
        }
    }

    /// Requires success; `what` ran says the error, with the last lines.
    ///
    /// # Errors
    /// When the program failed.
    pub fn success(self, what: &str) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        anyhow::bail!("{what} ended with {}; its last lines:{}", self.status, self.tail())
    }
}

/// Runs `command` to its end with stdout and stderr in one pipe; every line is
/// logged with `name` in front.
///
/// # Errors
/// When it cannot be started, or a signal stopped it and this program.
pub fn run(name: &str, command: &mut Command) -> Result<Ended> {
    stop::check()?;
    let (reader, writer) = std::io::pipe().context("making a pipe")?;
    tracing::debug!("running {command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("duplicating a pipe")?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("starting {name} ({:?}): is it installed?", command.get_program()))?;
    // The command holds the pipe's writing end, and the pipe ends only without it.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let running = stop::Child::new(child.id());
    let (mut lines, mut kept) = (VecDeque::new(), 0);
    let mut reader = BufReader::new(reader);
    let mut bytes = Vec::new();
    while reader.by_ref().take(LINE).read_until(b'\n', &mut bytes).context("reading a program's output")? > 0 {
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        bytes.clear();
        if !line.is_empty() {
            tracing::info!("{name}: {line}");
            kept += line.len();
            lines.push_back(line);
        }
        while kept > KEPT {
            kept -= lines.pop_front().map_or(kept, |line: String| line.len());
        }
    }
    // Its number is its own until it was waited for.
    waitid(WaitId::Pid(Pid::from_child(&child)), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
    drop(running);
    let status = child.wait().with_context(|| format!("waiting for {name}"))?;
    stop::check()?;
    Ok(Ended { status, lines: lines.into() })
}

/// Runs `command` and gives its standard output; what it says on stderr becomes
/// part of the error when it fails.
///
/// # Errors
/// When it cannot be started or fails.
pub fn output(name: &str, command: &mut Command) -> Result<String> {
    stop::check()?;
    tracing::debug!("running {command:?}");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {name} ({:?}): is it installed?", command.get_program()))?;
    let running = stop::Child::new(child.id());
    let output = child.wait_with_output().with_context(|| format!("waiting for {name}"))?;
    drop(running);
    stop::check()?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        anyhow::bail!("{name} ended with {}: {}", output.status, stderr.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("reading the output of {name}"))
}
