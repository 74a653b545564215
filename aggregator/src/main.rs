//! `oscontainer-aggregator`: from an artifact to an oscontainer, and its server.
//!
//!     [endpoint] ─▶ fetch ─▶ verify ─▶ repo ─▶ image ─▶ [registry] ─▶ serve

mod cli;
mod fetch;
mod image;
mod repo;
mod serve;
mod verify;

use std::process::ExitCode;

fn main() -> ExitCode {
    oscontainer_program::options::main(|cli: &cli::Cli| &cli.global, cli::run)
}
