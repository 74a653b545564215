//! The commands; what each takes is in its own module.

use anyhow::Result;
use clap::{Parser, Subcommand};
use clap_complete::Shell;
use oscontainer_program::options::{self, Global};

use crate::cluster::{rollout, submit};
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
    /// Print the JSON schema of treefiles, with which editors complete and check them
    Schema,
    /// Write a commit as an artifact: manifest.json and repo.tar
    Pack(pack::PackArgs),
    /// Upload an artifact to an endpoint
    Publish(publish::PublishArgs),
    /// Compose, pack and publish: the Job's entry point
    Run(Box<run::RunArgs>),
    /// Create the Job in a cluster, follow it, and start the aggregation
    Submit(submit::SubmitArgs),
    /// Set the mirror's Deployment to an image: the aggregation Job's last step
    Rollout(rollout::RolloutArgs),
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
        Command::Schema => treefile::print_schema(),
        Command::Pack(args) => pack::main(args, global),
        Command::Publish(args) => publish::main(args, global),
        Command::Run(args) => run::main(*args, global),
        Command::Submit(args) => submit::main(args, global),
        Command::Rollout(args) => rollout::main(args, global),
        Command::Endpoint(args) => endpoint::main(args, global),
        Command::Completions { shell } => {
            options::completions::<Cli>(shell);
            Ok(())
        }
    }
}
