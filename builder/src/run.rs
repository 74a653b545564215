//! The Job's entry point: compose, pack, publish, and one line of JSON that says
//! how it ended.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use oscontainer_program::client::ClientOptions;
use oscontainer_program::exit;
use oscontainer_program::exit::Usage;
use oscontainer_program::options::Global;
use oscontainer_program::staging::Staging;
use reqwest::Url;
use serde::Serialize;

use crate::compose::{self, ComposeOptions};
use crate::pack::{self, Naming};
use crate::publish::{self, Published};

/// The largest result, in bytes: a pod's termination message is cut at 4 KiB,
/// and all containers of a pod share 12.
const MAX_RESULT: usize = 2 << 10;

/// What `run` takes.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// The treefile, YAML or JSON
    #[arg(env = "OSCONTAINER_TREEFILE")]
    pub treefile: PathBuf,
    /// The artifact endpoint's URL
    #[arg(long, value_name = "URL", env = "OSCONTAINER_ENDPOINT")]
    pub endpoint: Url,
    /// OSTree repository to commit to; kept from run to run [default: `repo` in the cache directory]
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_REPO")]
    pub repo: Option<PathBuf>,
    /// Write the result as one line of JSON, also after a failure (a pod's termination message)
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_RESULT_FILE")]
    pub result_file: Option<PathBuf>,
    #[command(flatten)]
    pub naming: Naming,
    #[command(flatten)]
    pub compose: ComposeOptions,
    #[command(flatten)]
    pub client: ClientOptions,
}

/// What `run` made.
#[derive(Debug, Serialize)]
struct Success {
    #[serde(flatten)]
    published: Published,
    /// Whether the endpoint has something that it had not before.
    changed: bool,
}

/// How `run` failed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Failure {
    error: String,
    exit_code: u8,
}

/// Runs the Job.
///
/// # Errors
/// As each stage's.
pub fn main(args: RunArgs, global: &Global) -> Result<()> {
    let result = run(&args);
    if let Some(file) = &args.result_file {
        let line = match &result {
            Ok(success) => serde_json::to_string(success)?,
            Err(error) => failure(error)?,
        };
        fs::write(file, format!("{line}\n")).with_context(|| format!("writing --result-file {}", file.display()))?;
    }
    global.print(&result?)
}

fn run(args: &RunArgs) -> Result<Success> {
    if args.compose.dry_run {
        return Err(Usage("--dry-run is compose's: run publishes what it composes".into()).into());
    }
    let cache = compose::cache_dir(&args.compose)?;
    let repo = args.repo.clone().unwrap_or_else(|| cache.join("repo"));
    let Some(commit) = compose::compose(&args.treefile, &repo, &args.compose)? else {
        anyhow::bail!("the compose made no commit");
    };
    let staging = Staging::new(&cache.join("work"), "artifact-")?;
    let artifact = staging.path().join("artifact");
    pack::pack(&repo, &commit.ref_name, &args.naming, &artifact)?;
    publish(&artifact, args)
}

fn publish(artifact: &Path, args: &RunArgs) -> Result<Success> {
    let published = publish::publish(artifact, &args.endpoint, &args.client)?;
    Ok(Success { changed: published.changed, published })
}

/// The failure as JSON, its text cut so that the line fits.
fn failure(error: &anyhow::Error) -> Result<String> {
    let mut failure = Failure { error: exit::chain(error), exit_code: exit::code(error) };
    loop {
        let line = serde_json::to_string(&failure)?;
        if line.len() < MAX_RESULT {
            return Ok(line);
        }
        let excess = line.len() - MAX_RESULT + 1;
        let keep = failure.error.len().saturating_sub(excess + '…'.len_utf8());
        failure.error.truncate(failure.error.floor_char_boundary(keep));
        failure.error.push('…');
    }
}
