//! The Job's entry point: compose, pack, publish, start the aggregation, and one line of
//! JSON that says how it ended.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use oscontainer_artifact::manifest::Manifest;
use oscontainer_program::client::ClientOptions;
use oscontainer_program::exit::{self, Usage};
use oscontainer_program::options::Global;
use oscontainer_program::outcome;
use oscontainer_program::staging::{self, Staging};
use oscontainer_program::stop;
use reqwest::Url;
use serde::Serialize;

use crate::cluster::events::{EventOptions, Reporter};
use crate::cluster::trigger::TriggerOptions;
use crate::compose::{self, ComposeOptions};
use crate::endpoint::size;
use crate::pack::{self, Naming};
use crate::publish::{self, Published};
use crate::restore;

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
    /// Keep the last N commits of the ref in the repository
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..),
        env = "OSCONTAINER_KEEP_COMMITS")]
    pub keep_commits: u32,
    /// Remove packages from the cache until it takes at most SIZE (bytes, or with KiB, MiB, GiB, TiB)
    #[arg(long, value_name = "SIZE", value_parser = size, env = "OSCONTAINER_CACHE_SIZE")]
    pub cache_size: Option<u64>,
    /// Do not go on from the newest artifact at the endpoint where the repository has no commit of the ref
    #[arg(long, env = "OSCONTAINER_FRESH")]
    pub fresh: bool,
    #[command(flatten)]
    pub naming: Naming,
    #[command(flatten)]
    pub compose: ComposeOptions,
    #[command(flatten)]
    pub client: ClientOptions,
    #[command(flatten)]
    pub trigger: TriggerOptions,
    #[command(flatten)]
    pub events: EventOptions,
}

/// What `run` made.
#[derive(Debug, Serialize)]
struct Success {
    #[serde(flatten)]
    published: Published,
    /// Whether the endpoint has something that it had not before.
    changed: bool,
}

/// Runs the Job.
///
/// # Errors
/// As each stage's.
pub fn main(args: RunArgs, global: &Global) -> Result<()> {
    stop::on_signals()?;
    let mut reporter = Reporter::new(&args.events);
    let result = run(&args, &mut reporter);
    match &result {
        Ok(Success { published, changed }) => {
            let new = if *changed { "" } else { ", as before" };
            let (digest, url) = (&published.manifest_digest, &published.manifest_url);
            reporter.done("Published", &format!("{} is {digest}{new}: {url}", published.ref_name));
        }
        Err(error) => reporter.failed("Failed", &format!("exit code {}: {}", exit::code(error), exit::chain(error))),
    }
    if let Some(file) = &args.result_file {
        outcome::write(file, &result)?;
    }
    global.print(&result?)
}

fn run(args: &RunArgs, reporter: &mut Reporter) -> Result<Success> {
    if args.compose.dry_run {
        return Err(Usage("--dry-run is compose's: run publishes what it composes".into()).into());
    }
    let cache = compose::cache_dir(&args.compose)?;
    compose::become_root(&cache)?;
    let repo = args.repo.clone().unwrap_or_else(|| cache.join("repo"));
    let staging = Staging::new(&cache.join("work"), "artifact-")?;
    if !args.fresh {
        let ref_name = compose::ref_name(&args.treefile)?;
        if compose::commit::Previous::find(&repo, &ref_name)?.is_none() {
            let name = args.naming.name(&ref_name)?;
            restore::restore((&args.endpoint, &args.client), &name, &ref_name, &repo, staging.path())?;
        }
    }
    reporter.stage("Composing", &format!("composing {}", args.treefile.display()));
    let options = ComposeOptions { keep: true, ..args.compose.clone() };
    let commit = compose::compose(&args.treefile, &repo, &options)?;
    // The manifest of what was published last under this name.
    let last = cache.join(format!("published-{}.json", args.naming.name(&commit.ref_name)?));
    let published = match as_before(args, &commit, &last)? {
        Some(published) => {
            tracing::info!("{} is there already, of this commit: nothing is packed", published.manifest_url);
            published
        }
        None => {
            let artifact = staging.path().join("artifact");
            reporter.stage("Packing", &format!("packing {} as {}", commit.ref_name, commit.commit));
            let packed = pack::pack(&repo, &commit.ref_name, &args.naming, &artifact)?;
            reporter.stage("Publishing", &format!("publishing to {}", args.endpoint));
            let published = publish::publish(&artifact, Some(&packed), &args.endpoint, &args.client)?;
            staging::write(&last, &fs::read(&packed.manifest).context("reading the manifest")?)?;
            published
        }
    };
    // A try before this one may have published and gone no further.
    if let Some(started) = args.trigger.start(&published, args.events.job_uid()).context("the artifact is published")? {
        reporter.done("Triggered", &format!("started {started} for {}", published.manifest_digest));
    }
    let given_back = give_back(args, &repo, &cache, &commit.ref_name);
    stop::check()?;
    if let Err(error) = given_back {
        // Such as another run that composes into the same repository.
        tracing::warn!("the next run gives disk space back, this one cannot: {}", exit::chain(&error));
    }
    Ok(Success { changed: published.changed, published })
}

/// What an earlier run published of a commit that did not change, if the endpoint has it still: then there
/// is nothing to pack. Of the manifest only our own copy is trusted.
fn as_before(args: &RunArgs, commit: &compose::Commit, last: &Path) -> Result<Option<Published>> {
    let bytes = match fs::read(last) {
        Ok(bytes) if !commit.changed => bytes,
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("reading {}", last.display()));
        }
        _ => return Ok(None),
    };
    // What a newer version wrote may be something else.
    let Ok(manifest) = Manifest::parse(&bytes) else { return Ok(None) };
    let named = args.naming.version.as_deref().is_none_or(|version| version == manifest.version.as_str());
    if !named || manifest.commit.to_string() != commit.commit || manifest.ref_name != commit.ref_name {
        return Ok(None);
    }
    publish::again(&bytes, &args.endpoint, &args.client)
}

/// Removes old commits from the repository and old packages from the cache.
fn give_back(args: &RunArgs, repo: &Path, cache: &Path, ref_name: &str) -> Result<()> {
    compose::commit::prune(repo, ref_name, args.keep_commits as usize, args.repo.is_none())?;
    args.cache_size.map_or(Ok(()), |size| compose::bound_cache(cache, size))
}
