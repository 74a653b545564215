//! The `rpm-ostree` engine: `rpm-ostree compose tree` does all of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Checksum;
use oscontainer_program::reject;

use super::plan::Plan;
use super::process::{self, Ended};
use super::{Engine, Job, Made, commit};

/// Its lines that say that trying again may help; all else is the input's fault.
const RETRY: [&str; 6] = [
    "Curl error",
    "Could not resolve",
    "Cannot download",
    "Failed to download",
    "No space left",
    "Timeout was reached",
];

/// Spawns `rpm-ostree`.
pub struct RpmOstree;

/// Whether `rpm-ostree` is in the PATH.
pub fn is_installed() -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join("rpm-ostree").is_file()))
}

impl Engine for RpmOstree {
    fn name(&self) -> &'static str {
        "rpm-ostree"
    }

    fn plan(&self, job: &Job) -> Result<Option<Plan>> {
        // A dry run makes no repository where there is none, but rpm-ostree asks for one.
        let scratch = job.work.join("repo");
        let repo = if job.repo.join("config").exists() { job.repo } else { &scratch };
        // It says itself what it would install.
        compose_tree(job, repo, &["--dry-run"]).map(|_| None)
    }

    fn compose(&self, job: &Job) -> Result<Made> {
        let repo = commit::open(job.repo)?;
        // What rpm-ostree writes has no ref until we set it: nobody may prune it before.
        let transaction = commit::begin(&repo)?;
        let ended = job.stages.run("composing", || compose_tree(job, job.repo, &[]))?;
        let commit = match fs::read_to_string(id_file(job)) {
            // With --write-commitid-to, rpm-ostree leaves the ref to its caller.
            Ok(id) => {
                let id: Checksum = id.trim().parse().context("reading the commit that rpm-ostree wrote")?;
                if job.options.keep {
                    commit::keep(&repo, job.ref_name, &id.to_string())?;
                }
                commit::set_ref(&repo, transaction, job.ref_name, &id.to_string())?;
                id.to_string()
            }
            // Nothing changed: it wrote no commit and no file.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match commit::resolve(&repo, job.ref_name)? {
                Some(commit) => commit,
                None => reject!("rpm-ostree ended well, but made no commit; its last lines:{}", ended.tail()),
            },
            Err(error) => return Err(error).with_context(|| format!("reading {}", id_file(job).display())),
        };
        Ok(Made { commit, ..Made::default() })
    }
}

/// Where rpm-ostree writes the commit's checksum.
fn id_file(job: &Job) -> PathBuf {
    job.work.join("commitid")
}

/// Runs `rpm-ostree compose tree` on `repo`, which is made where there is none.
fn compose_tree(job: &Job, repo: &Path, more: &[&str]) -> Result<Ended> {
    let options = job.options;
    commit::open(repo)?;
    let cache = job.cache.join("rpm-ostree");
    fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
    let mut command = contained();
    command.args(["rpm-ostree", "compose", "tree", "--unified-core"]);
    command.arg("--repo").arg(repo).arg("--cachedir").arg(&cache).arg("--write-commitid-to").arg(id_file(job));
    match &options.parent {
        Some(parent) => command.arg("--parent").arg(parent),
        None => command.arg("--no-parent"),
    };
    if let Some(version) = &options.version_string {
        command.arg("--add-metadata-string").arg(format!("version={version}"));
    }
    for lockfile in &options.lockfile {
        command.arg("--ex-lockfile").arg(lockfile);
    }
    if let Some(file) = &options.write_lockfile_to {
        command.arg("--ex-write-lockfile-to").arg(file);
    }
    if options.force_nocache {
        command.arg("--force-nocache");
    }
    let ended = process::run("rpm-ostree", command.args(more).arg(job.treefile))?;
    ended.had_what_it_needs("rpm-ostree")?;
    if !ended.status.success() {
        if ended.find(&RETRY).is_some() {
            anyhow::bail!("rpm-ostree ended with {}; its last lines:{}", ended.status, ended.tail());
        }
        reject!("rpm-ostree ended with {}; its last lines:{}", ended.status, ended.tail());
    }
    Ok(ended)
}

/// What runs a program in namespaces that end with it, so that no process and no mount of
/// rpm-ostree's (it has some by FUSE) outlives a signal; or just runs it, where the kernel
/// allows us no namespaces.
fn contained() -> Command {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
        command
    };
    match process::output("unshare", unshare().arg("true")) {
        Ok(_) => unshare(),
        Err(error) => {
            tracing::debug!("rpm-ostree gets no namespaces of its own: {error:#}");
            Command::new("env")
        }
    }
}
