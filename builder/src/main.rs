//! `oscontainer-builder`: from a treefile to an artifact at an endpoint.
//!
//!     treefile ─▶ compose ─▶ commit ─▶ pack ─▶ publish ─▶ [endpoint]

mod cli;
mod cluster;
mod compose;
mod endpoint;
mod pack;
mod publish;
mod restore;
mod run;
mod treefile;

use std::process::ExitCode;

fn main() -> ExitCode {
    oscontainer_program::options::main(|cli: &cli::Cli| &cli.global, cli::run)
}
