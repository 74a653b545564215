//! Composing: a treefile becomes a commit. What differs between engines is behind
//! one trait; the driver below names the stages.

mod accounts;
pub mod commit;
mod customize;
mod dnf;
mod dnf_engine;
mod kernel;
mod layout;
mod packages;
pub mod process;
mod rpm_ostree;
mod sandbox;
mod tree;
mod version;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use oscontainer_program::exit::Usage;
use oscontainer_program::options::Global;
use serde::Serialize;

/// What `compose` takes; `run` takes the same.
#[derive(Debug, Clone, Args)]
pub struct ComposeArgs {
    /// The treefile, YAML or JSON
    #[arg(env = "OSCONTAINER_TREEFILE")]
    pub treefile: PathBuf,
    /// OSTree repository to commit to; made in archive mode where there is none
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_REPO")]
    pub repo: PathBuf,
    #[command(flatten)]
    pub options: ComposeOptions,
}

/// How to compose.
#[derive(Debug, Clone, Args)]
pub struct ComposeOptions {
    /// What composes the tree
    #[arg(long, value_enum, default_value_t = EngineName::Auto, env = "OSCONTAINER_ENGINE")]
    pub engine: EngineName,
    /// Where packages and trees under work lie [default: /var/cache/oscontainer, or below $XDG_CACHE_HOME]
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_CACHE_DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Lockfile that pins packages (rpm-ostree engine)
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_LOCKFILE", value_delimiter = ',')]
    pub lockfile: Vec<PathBuf>,
    /// Write the packages that were taken as a lockfile (rpm-ostree engine)
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_WRITE_LOCKFILE_TO")]
    pub write_lockfile_to: Option<PathBuf>,
    /// Write the commit's checksum into a file
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_WRITE_COMMITID_TO")]
    pub write_commitid_to: Option<PathBuf>,
    /// The commit's version, instead of the treefile's automatic one
    #[arg(long, value_name = "V", env = "OSCONTAINER_VERSION_STRING")]
    pub version_string: Option<String>,
    /// Parent of the commit: a ref or a checksum
    #[arg(long, value_name = "REV", env = "OSCONTAINER_PARENT")]
    pub parent: Option<String>,
    /// Compose even if nothing changed
    #[arg(long, env = "OSCONTAINER_FORCE_NOCACHE")]
    pub force_nocache: bool,
    /// Resolve the packages and show them, but compose nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// The engines by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EngineName {
    /// rpm-ostree where it is installed, else dnf
    Auto,
    /// dnf --installroot, and the rest is done here
    Dnf,
    /// rpm-ostree compose tree
    RpmOstree,
}

/// One compose: what an engine is given.
pub struct Job<'a> {
    /// The treefile.
    pub treefile: &'a Path,
    /// The repository, which exists.
    pub repo: &'a Path,
    /// The cache directory, which exists.
    pub cache: &'a Path,
    /// How to compose.
    pub options: &'a ComposeOptions,
}

/// What composes a tree and commits it.
pub trait Engine {
    /// Its name for people.
    fn name(&self) -> &'static str;

    /// Composes `job` and gives the commit; `None` after a dry run.
    ///
    /// # Errors
    /// [`oscontainer_artifact::Rejected`] where trying again is pointless.
    fn compose(&self, job: &Job) -> Result<Option<Commit>>;
}

/// What a compose made.
#[derive(Debug, Clone, Serialize)]
pub struct Commit {
    /// The ref that names it.
    #[serde(rename = "ref")]
    pub ref_name: String,
    /// Its checksum, 64 hex digits.
    pub commit: String,
    /// Its version, where it has one.
    pub version: Option<String>,
    /// The repository that it lies in.
    pub repo: PathBuf,
}

/// Runs `compose`.
///
/// # Errors
/// As the engine's.
pub fn main(args: ComposeArgs, global: &Global) -> Result<()> {
    match compose(&args.treefile, &args.repo, &args.options)? {
        Some(commit) => global.print(&commit),
        None => Ok(()),
    }
}

/// Composes `treefile` into `repo`.
///
/// # Errors
/// As the engine's.
pub fn compose(treefile: &Path, repo: &Path, options: &ComposeOptions) -> Result<Option<Commit>> {
    let engine: Box<dyn Engine> = match options.engine {
        EngineName::Dnf => Box::new(dnf_engine::DnfEngine),
        EngineName::RpmOstree => Box::new(rpm_ostree::RpmOstree),
        EngineName::Auto if rpm_ostree::is_installed() => Box::new(rpm_ostree::RpmOstree),
        EngineName::Auto => Box::new(dnf_engine::DnfEngine),
    };
    tracing::info!("composing {} with the {} engine", treefile.display(), engine.name());
    let cache = cache_dir(options)?;
    let composed = engine.compose(&Job { treefile, repo, cache: &cache, options })?;
    if let (Some(commit), Some(file)) = (&composed, &options.write_commitid_to) {
        fs::write(file, &commit.commit).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(composed)
}

/// The cache directory, made where it is missing; an absolute path.
///
/// # Errors
/// When it cannot be made, or there is no place for it.
pub fn cache_dir(options: &ComposeOptions) -> Result<PathBuf> {
    let cache = options.cache_dir.clone().map_or_else(default_cache, Ok)?;
    fs::create_dir_all(&cache).with_context(|| format!("making the cache directory {}", cache.display()))?;
    fs::canonicalize(&cache).with_context(|| format!("entering the cache directory {}", cache.display()))
}

fn default_cache() -> Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok("/var/cache/oscontainer".into());
    }
    let home = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let home = home.ok_or_else(|| Usage("neither XDG_CACHE_HOME nor HOME is set: give --cache-dir".into()))?;
    Ok(home.join("oscontainer"))
}
