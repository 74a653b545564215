//! The commands; what each takes is in its own module.

use anyhow::Result;
use clap::{Parser, Subcommand};
use clap_complete::Shell;
use oscontainer_program::options::{self, Global};

use crate::{compose, endpoint, pack, publish, run, treefile};

/// Compose an operating system from a treefile and publish it as an artifact.
#[derive(Debug, Parser)]
#[command(name = "oscontainer-builder", version)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compose a host image into an OSTree repository
    Compose(compose::ComposeArgs),
    /// Print a treefile with includes, conditionals and variables resolved, as JSON
    Flatten(treefile::FlattenArgs),
    /// Write a commit as an artifact: manifest.json and repo.tar
    Pack(pack::PackArgs),
    /// Upload an artifact to an endpoint
    Publish(publish::PublishArgs),
    /// Compose, pack and publish: the Job's entry point
    Run(run::RunArgs),
    /// Serve the artifact endpoint
    Endpoint(endpoint::EndpointArgs),
    /// Print the completion script of a shell
    Completions { shell: Shell },
}

/// Runs the command of the command line.
pub fn run(cli: Cli) -> Result<()> {
    let global = &cli.global;
    match cli.command {
        Command::Compose(args) => compose::main(args, global),
        Command::Flatten(args) => treefile::main(args, global),
        Command::Pack(args) => pack::main(args, global),
        Command::Publish(args) => publish::main(args, global),
        Command::Run(args) => run::main(args, global),
        Command::Endpoint(args) => endpoint::main(args, global),
        Command::Completions { shell } => {
            options::completions::<Cli>(shell);
            Ok(())
        }
    }
}
