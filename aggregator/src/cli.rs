//! The commands; what each takes is in its own module.

use anyhow::Result;
use clap::{Parser, Subcommand};
use clap_complete::Shell;
use oscontainer_program::options::{self, Global};

use crate::{fetch, image, serve};

/// Fetch and verify an artifact, assemble the oscontainer, serve it.
#[derive(Debug, Parser)]
#[command(name = "oscontainer-aggregator", version)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Download an artifact and verify it into an OSTree repository
    Fetch(fetch::FetchArgs),
    /// Assemble the oscontainer from a repository, without any container daemon
    Image(image::ImageArgs),
    /// Serve a repository over HTTP: the oscontainer's entry point
    Serve(serve::ServeArgs),
    /// Print the completion script of a shell
    Completions { shell: Shell },
}

/// Runs the command of the command line.
pub fn run(cli: Cli) -> Result<()> {
    let global = &cli.global;
    match cli.command {
        Command::Fetch(args) => fetch::main(args, global),
        Command::Image(args) => image::main(args, global),
        Command::Serve(args) => serve::main(args, global),
        Command::Completions { shell } => {
            options::completions::<Cli>(shell);
            Ok(())
        }
    }
}
