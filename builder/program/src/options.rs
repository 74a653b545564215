//! The options that every command of both programs takes, and the log that they
//! set up on stderr. Results go to stdout and are printed here too.

use std::io::{IsTerminal, Write, stderr, stdout};
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, ValueEnum};
use clap_complete::Shell;
use serde::Serialize;
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::exit;

/// Options before or after any command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Log more (-vv: everything)
    #[arg(short, long, action = clap::ArgAction::Count, global = true, env = "OSCONTAINER_VERBOSE")]
    pub verbose: u8,
    /// Log warnings and errors only, without progress
    #[arg(short, long, global = true, conflicts_with = "verbose", env = "OSCONTAINER_QUIET")]
    pub quiet: bool,
    /// How the log on stderr is written
    #[arg(long, value_enum, default_value_t = LogFormat::Text, global = true, env = "OSCONTAINER_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// How the result on stdout is written
    #[arg(long, value_enum, default_value_t = OutputFormat::Text, global = true, env = "OSCONTAINER_OUTPUT_FORMAT")]
    pub output_format: OutputFormat,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How a command's result is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// `key: value` lines.
    Text,
    /// One JSON object.
    Json,
}

impl Global {
    /// Sends the log to stderr as the options say. Called once, by `main`.
    fn init_log(&self) {
        let level = match (self.quiet, self.verbose) {
            (true, _) => Level::WARN,
            (_, 0) => Level::INFO,
            (_, 1) => Level::DEBUG,
            _ => Level::TRACE,
        };
        // What kube logs as an error it gives as one too.
        let kube = if self.verbose == 0 { LevelFilter::OFF } else { level.into() };
        let shown = Targets::new().with_default(level).with_target("kube_client", kube);
        let log = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(crate::progress::LogWriter)
            .with_target(false)
            .with_ansi(stderr().is_terminal());
        match self.log_format {
            LogFormat::Text => log.without_time().finish().with(shown).init(),
            LogFormat::Json => log.json().flatten_event(true).finish().with(shown).init(),
        }
    }

    /// Prints a command's result: `key: value` lines, or one JSON object.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn print(&self, result: &impl Serialize) -> anyhow::Result<()> {
        let value = serde_json::to_value(result)?;
        let mut out = stdout().lock();
        match (self.output_format, value.as_object()) {
            (OutputFormat::Text, Some(fields)) => {
                for (key, value) in fields {
                    match value {
                        serde_json::Value::Null => {}
                        serde_json::Value::String(text) => writeln!(out, "{key}: {text}")?,
                        other => writeln!(out, "{key}: {other}")?,
                    }
                }
            }
            _ => writeln!(out, "{value}")?,
        }
        Ok(())
    }
}

/// Prints the completion script of program `C` for `shell`.
pub fn completions<C: CommandFactory>(shell: Shell) {
    let mut command = C::command();
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut stdout());
}

/// A program's `main`: reads the command line, runs the command, and turns its
/// error into one line on stderr and the exit code.
pub fn main<C: Parser>(global: fn(&C) -> &Global, run: fn(C) -> anyhow::Result<()>) -> ExitCode {
    let cli = C::parse();
    global(&cli).init_log();
    match run(cli) {
        Ok(()) => ExitCode::from(exit::DONE),
        Err(error) => {
            tracing::error!("{}", exit::chain(&error));
            ExitCode::from(exit::code(&error))
        }
    }
}
