//! Composing: a treefile becomes a commit. What differs between engines is behind
//! one trait; the driver below names the stages.

mod accounts;
pub mod commit;
mod customize;
mod dnf;
mod dnf_engine;
mod kernel;
mod layout;
mod lockfile;
mod namespace;
mod objects;
mod packages;
mod plan;
mod policy;
pub mod process;
mod repo_file;
mod report;
mod repositories;
mod rpm_ostree;
mod sandbox;
mod tree;
mod version;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use commit::Previous;
use objects::Written;
use oscontainer_program::exit::Usage;
use oscontainer_program::options::{Global, OutputFormat};
use oscontainer_program::reject;
use oscontainer_program::staging::{self, Staging};
use oscontainer_program::stop;
use plan::Plan;
use report::{Changes, Installed, Report, Stages};
use serde::Serialize;

use crate::treefile::{self, Flattened, Machine};

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
    /// Where .repo files are taken from that define what the treefile names and none beside it does, such as
    /// /etc/yum.repos.d
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_REPOS_DIR")]
    pub repos_dir: Option<PathBuf>,
    /// Lockfile that pins packages; of a package in several, the last counts
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_LOCKFILE", value_delimiter = ',')]
    pub lockfile: Vec<PathBuf>,
    /// Write the packages that were taken as a lockfile
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
    /// Print what would be installed and what changed since the ref's commit, and compose nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Whether the commit that the ref names now stays, by a ref of its own: `run` wants it.
    #[arg(skip)]
    pub keep: bool,
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
    /// Where the treefile lies.
    pub treefile: &'a Path,
    /// What it and all that it includes say.
    pub flattened: &'a Flattened,
    /// The ref that the commit goes to.
    pub ref_name: &'a str,
    /// The repository; [`commit::open`] makes it where there is none.
    pub repo: &'a Path,
    /// The cache directory, which exists.
    pub cache: &'a Path,
    /// A directory of this compose's own, which goes when it ends.
    pub work: &'a Path,
    /// How to compose.
    pub options: &'a ComposeOptions,
    /// Runs what takes long, and keeps the time.
    pub stages: &'a Stages,
}

/// What an engine made.
#[derive(Debug, Default)]
pub struct Made {
    /// The commit's checksum.
    pub commit: String,
    /// The sizes of its packages by name and architecture, where they are known.
    pub sizes: BTreeMap<(String, String), u64>,
    /// What was new in the repository, where that is known.
    pub written: Option<Written>,
}

/// What composes a tree and commits it.
pub trait Engine {
    /// Its name for people.
    fn name(&self) -> &'static str;

    /// Composes `job` and sets its ref.
    ///
    /// # Errors
    /// [`oscontainer_artifact::Rejected`] where trying again is pointless.
    fn compose(&self, job: &Job) -> Result<Made>;

    /// Resolves `job` and says what [`Engine::compose`] would do; makes no repository.
    /// `None` where the engine's own words on stderr are all there is.
    ///
    /// # Errors
    /// As [`Engine::compose`].
    fn plan(&self, job: &Job) -> Result<Option<Plan>>;
}

/// What a compose made.
#[derive(Debug, Serialize)]
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
    /// Whether the ref named another commit before, or none.
    pub changed: bool,
    /// The rest, for machines; people find it in the log.
    #[serde(flatten)]
    pub report: Option<Report>,
}

/// Runs `compose`.
///
/// # Errors
/// As the engine's.
pub fn main(args: ComposeArgs, global: &Global) -> Result<()> {
    stop::on_signals()?;
    if args.options.dry_run {
        let plan = plan(&args.treefile, &args.repo, &args.options)?;
        return match (plan, global.output_format) {
            (Some(plan), OutputFormat::Text) => writeln!(stdout().lock(), "{plan}").context("writing to stdout"),
            (Some(plan), OutputFormat::Json) => global.print(&plan),
            (None, _) => Ok(()),
        };
    }
    let mut commit = compose(&args.treefile, &args.repo, &args.options)?;
    if global.output_format == OutputFormat::Text {
        commit.report = None;
    }
    global.print(&commit)
}

/// What [`compose`] would do.
///
/// # Errors
/// As the engine's.
fn plan(treefile: &Path, repo: &Path, options: &ComposeOptions) -> Result<Option<Plan>> {
    drive(treefile, repo, options, &Stages::default(), |engine, job| engine.plan(job))
}

/// Composes `treefile` into `repo`.
///
/// # Errors
/// As the engine's.
pub fn compose(treefile: &Path, repo: &Path, options: &ComposeOptions) -> Result<Commit> {
    let stages = Stages::default();
    let (ref_name, previous, made) = drive(treefile, repo, options, &stages, |engine, job| {
        let previous = Previous::find(repo, job.ref_name)?;
        Ok((job.ref_name.to_owned(), previous, engine.compose(job)?))
    })?;
    if let Some(file) = &options.write_commitid_to {
        staging::write(file, made.commit.as_bytes())?;
    }
    // By its own name: another compose may have set the ref since.
    let commit = Previous::find(repo, &made.commit)?;
    let commit = commit.with_context(|| format!("{} has no commit {} any more", repo.display(), made.commit))?;
    let version = commit.metadata_string("version")?;
    let before = previous.as_ref().map(Previous::packages).transpose()?.unwrap_or_default();
    let now = report::versions(commit.packages()?);
    let changed = previous.as_ref().is_none_or(|previous| previous.commit != made.commit);
    let report = Report {
        previous: previous.map(|previous| previous.commit),
        // The commit is there, whatever can be said about it.
        changes: Changes::between(&report::versions(before), &now).unwrap_or_else(|error| {
            tracing::warn!("comparing with the commit before: {error:#}");
            Changes::default()
        }),
        packages: now
            .into_iter()
            .map(|((name, arch), evr)| {
                let key = (name, arch);
                let bytes = made.sizes.get(&key).copied();
                Installed { name: key.0, evr, arch: key.1, bytes }
            })
            .collect(),
        new_objects: made.written.map(|written| written.objects),
        new_bytes: made.written.map(|written| written.bytes),
        stages: stages.into_list(),
    };
    if changed {
        tracing::info!("{ref_name} is commit {}: {report}", made.commit);
    }
    Ok(Commit { ref_name, commit: made.commit, version, repo: repo.to_owned(), changed, report: Some(report) })
}

/// The ref that a treefile names.
///
/// # Errors
/// Rejected when the treefile is wrong or names none.
pub fn ref_name(treefile: &Path) -> Result<String> {
    let flattened = treefile::load(treefile, &Machine::host())?;
    ref_of(treefile, &flattened)
}

fn ref_of(treefile: &Path, flattened: &Flattened) -> Result<String> {
    match &flattened.treefile.treeref {
        Some(ref_name) => match ostree::validate_rev(ref_name) {
            Ok(()) => Ok(ref_name.clone()),
            Err(_) => reject!("{}: {ref_name:?} is no name of a ref", flattened.origins.of("ref")),
        },
        None => reject!("{} has no ref: add `ref: NAME`", treefile.display()),
    }
}

/// Reads the treefile, chooses the engine, and gives it the job.
fn drive<T>(
    treefile: &Path,
    repo: &Path,
    options: &ComposeOptions,
    stages: &Stages,
    run: impl FnOnce(&dyn Engine, &Job) -> Result<T>,
) -> Result<T> {
    let cache = cache_dir(options)?;
    become_root(&cache)?;
    let engine: Box<dyn Engine> = match options.engine {
        EngineName::Dnf => Box::new(dnf_engine::DnfEngine),
        EngineName::Auto | EngineName::RpmOstree if rpm_ostree::is_installed() => Box::new(rpm_ostree::RpmOstree),
        EngineName::RpmOstree => {
            return Err(Usage("rpm-ostree is not in the PATH: install it, or use --engine dnf".into()).into());
        }
        EngineName::Auto => Box::new(dnf_engine::DnfEngine),
    };
    tracing::info!("composing {} with the {} engine", treefile.display(), engine.name());
    let mut flattened = treefile::load(treefile, &Machine::host())?;
    let ref_name = ref_of(treefile, &flattened)?;
    let staging = Staging::new(&cache.join("work"), "compose-")?;
    let completed = options
        .repos_dir
        .as_ref()
        .map(|directory| repositories::completed(treefile, &flattened, directory, &staging.path().join("treefile")));
    let completed = completed.transpose()?.flatten();
    if let Some(completed) = &completed {
        flattened = treefile::load(completed, &Machine::host())?;
    }
    let job = Job {
        treefile: completed.as_deref().unwrap_or(treefile),
        flattened: &flattened,
        ref_name: &ref_name,
        repo,
        cache: &cache,
        work: staging.path(),
        options,
        stages,
    };
    run(engine.as_ref(), &job)
}

pub use dnf::bound_cache;
pub use namespace::become_root;

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
