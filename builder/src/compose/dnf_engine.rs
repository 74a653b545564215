//! The `dnf` engine's way from a treefile to a commit, stage by stage.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Hasher;
use oscontainer_program::exit::Usage;
use oscontainer_program::reject;
use oscontainer_program::staging::Staging;

use super::commit::{self, Facts};
use super::dnf::Dnf;
use super::packages::{self, Package};
use super::tree::Tree;
use super::{Commit, Engine, Job, customize, kernel, layout, version};
use crate::treefile::{self, Flattened, Machine};

/// `dnf --installroot`, and the rest done here.
pub struct DnfEngine;

/// What rpm writes as the time of installation where SOURCE_DATE_EPOCH is not
/// set: the newest package's build time is not known before it is installed.
const INSTALL_TIME: u64 = 1;

/// Fields of a treefile that change the tree, and that only rpm-ostree carries out.
const NOT_BY_DNF: [&str; 19] = [
    "bootstrap-packages",
    "check-groups",
    "check-passwd",
    "cliwrap",
    "container-cmd",
    "extra-kargs",
    "gpg-key",
    "ima",
    "initramfs-args-legacy",
    "lockfile-repos",
    "modules",
    "opt-usrlocal",
    "opt-usrlocal-overlays",
    "ostree-layers",
    "ostree-override-layers",
    "platform-module",
    "remove-from-packages",
    "repo-packages",
    "sysusers",
];

impl Engine for DnfEngine {
    fn name(&self) -> &'static str {
        "dnf"
    }

    fn compose(&self, job: &Job) -> Result<Option<Commit>> {
        if !job.options.lockfile.is_empty() || job.options.write_lockfile_to.is_some() {
            return Err(Usage("the dnf engine has no lockfiles yet: use --engine rpm-ostree".into()).into());
        }
        let flattened = treefile::load(job.treefile, &Machine::host())?;
        supported(&flattened)?;
        let Some(ref_name) = flattened.treefile.treeref.clone() else {
            reject!("{} has no ref: add `ref: NAME`", job.treefile.display());
        };
        let epoch = source_date_epoch()?;
        // Owner and mode of what is made here are the tree's: they do not depend on the caller.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let staging = Staging::new(&job.cache.join("work"), "compose-")?;
        let root = staging.path().join("root");
        fs::create_dir(&root)?;
        let tree = Tree::open(&root)?;
        for dir in ["dev", "proc", "run", "tmp"] {
            tree.directory(dir)?;
        }
        let dnf =
            Dnf::prepare(&flattened, &staging.path().join("dnf"), job.cache, &root, epoch.unwrap_or(INSTALL_TIME))?;
        if job.options.dry_run {
            stage("resolving packages", || dnf.show())?;
            return Ok(None);
        }
        stage("downloading packages", || dnf.download())?;
        stage("installing packages", || dnf.install_cached())?;

        let repo = commit::open(job.repo)?;
        let packages = packages::installed(&root.join(layout::RPMDB), &dnf.home())?;
        let newest = packages.iter().map(|package| package.build_time).max().unwrap_or_default();
        let timestamp = epoch.unwrap_or(newest);
        let version = choose_version(job, &repo, &flattened, &ref_name, epoch)?;
        stage("customizing the tree", || customize::customize(&tree, &flattened, version.as_deref()))?;
        let kernel = stage("making the initramfs", || kernel::prepare(&tree, &flattened.treefile))?;
        stage("arranging the tree", || {
            tree.write("usr/share/rpm-ostree/treefile.json", flattened.to_json().to_string().as_bytes(), 0o644)?;
            layout::place_rpmdb(&tree)?;
            layout::clean(&tree)?;
            layout::arrange(&tree, &flattened.treefile)
        })?;
        let facts = Facts {
            version: version.as_deref(),
            title: title(&tree, &ref_name)?,
            packages: &packages,
            input_hash: input_hash(&flattened, &packages)?,
            kernel,
            timestamp,
            extra: extra_metadata(&flattened),
        };
        let parent = match &job.options.parent {
            Some(rev) => match commit::resolve(&repo, rev)? {
                Some(commit) => Some(commit),
                None => reject!("--parent {rev}: {} has no such ref or commit", job.repo.display()),
            },
            None => None,
        };
        let commit = stage("committing", || commit::commit(&repo, &root, &ref_name, parent.as_deref(), &facts))?;
        Ok(Some(Commit { ref_name, commit, version, repo: job.repo.to_owned() }))
    }
}

/// Runs one stage and logs how long it took.
fn stage<T>(what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    tracing::info!("{what}");
    let start = Instant::now();
    let result = run()?;
    tracing::info!("{what}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(result)
}

/// `SOURCE_DATE_EPOCH`, seconds since 1970 (reproducible-builds.org/specs/source-date-epoch).
fn source_date_epoch() -> Result<Option<u64>> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => {
            let seconds =
                text.parse().map_err(|_| Usage(format!("SOURCE_DATE_EPOCH {text:?} is not a number of seconds")))?;
            Ok(Some(seconds))
        }
        Err(_) => Ok(None),
    }
}

fn choose_version(
    job: &Job,
    repo: &ostree::Repo,
    flattened: &Flattened,
    ref_name: &str,
    epoch: Option<u64>,
) -> Result<Option<String>> {
    if let Some(version) = &job.options.version_string {
        return Ok(Some(version.clone()));
    }
    let Some(prefix) = &flattened.treefile.automatic_version_prefix else { return Ok(None) };
    let last = match commit::resolve(repo, ref_name)? {
        Some(commit) => commit::metadata_string(repo, &commit, "version")?,
        None => None,
    };
    let now = match epoch {
        Some(epoch) => i64::try_from(epoch).unwrap_or(i64::MAX),
        None => ostree::glib::DateTime::now_utc().context("reading the clock")?.to_unix(),
    };
    let suffix = flattened.treefile.automatic_version_suffix.as_deref();
    version::next(prefix, suffix, last.as_deref(), now).map(Some)
}

/// The name for people: os-release's, or the ref.
fn title(tree: &Tree, ref_name: &str) -> Result<String> {
    let text = tree.read("usr/lib/os-release")?.unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    Ok(name.map_or(ref_name, |name| name.trim_matches(['"', '\''])).to_owned())
}

/// The sha256 over all that went in: the flattened treefile, the files it names,
/// the packages' headers and this program's version.
fn input_hash(flattened: &Flattened, packages: &[Package]) -> Result<String> {
    let mut hasher = Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_be_bytes());
        hasher.update(bytes);
    };
    add(env!("CARGO_PKG_VERSION").as_bytes());
    add(flattened.to_json().to_string().as_bytes());
    let external = &flattened.external;
    for file in external.add_files.iter().map(|(source, _)| source).chain(&external.postprocess_scripts) {
        add(&fs::read(file).with_context(|| format!("reading {}", file.display()))?);
    }
    for package in packages {
        add(package.header.as_bytes());
    }
    Ok(hasher.checksum().to_string())
}

/// The treefile's `add-commit-metadata`.
fn extra_metadata(flattened: &Flattened) -> Vec<(String, serde_json::Value)> {
    let extra = flattened.treefile.add_commit_metadata.iter().flatten();
    extra.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Refuses what this engine would have to ignore.
fn supported(flattened: &Flattened) -> Result<()> {
    let json = flattened.to_json();
    let set = |name: &&str| {
        json.get(*name).is_some_and(|value| match value {
            serde_json::Value::Null | serde_json::Value::Bool(false) => false,
            serde_json::Value::Array(items) => !items.is_empty(),
            serde_json::Value::Object(fields) => !fields.is_empty(),
            _ => true,
        })
    };
    let unsupported: Vec<&str> = NOT_BY_DNF.iter().copied().filter(|name| set(name)).collect();
    if !unsupported.is_empty() {
        reject!(
            "the treefile sets {}, which the dnf engine does not carry out yet: use --engine rpm-ostree",
            unsupported.join(", ")
        );
    }
    Ok(())
}
