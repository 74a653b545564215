//! The `rpm-ostree` engine: `rpm-ostree compose tree` does all of it.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Checksum;
use oscontainer_program::reject;
use oscontainer_program::staging::Staging;

use super::{Commit, Engine, Job, commit, process};
use crate::treefile::{self, Machine};

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

    fn compose(&self, job: &Job) -> Result<Option<Commit>> {
        let options = job.options;
        let flattened = treefile::load(job.treefile, &Machine::host())?;
        let Some(ref_name) = flattened.treefile.treeref.clone() else {
            reject!("{} has no ref: add `ref: NAME`", job.treefile.display());
        };
        let repo = commit::open(job.repo)?;
        let staging = Staging::new(&job.cache.join("work"), "compose-")?;
        let id_file = staging.path().join("commitid");
        let cache = job.cache.join("rpm-ostree");
        fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;

        let mut command = Command::new("rpm-ostree");
        command.args(["compose", "tree", "--unified-core"]);
        command.arg("--repo").arg(job.repo).arg("--cachedir").arg(&cache).arg("--write-commitid-to").arg(&id_file);
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
        for (set, option) in [(options.force_nocache, "--force-nocache"), (options.dry_run, "--dry-run")] {
            if set {
                command.arg(option);
            }
        }
        let ended = process::run("rpm-ostree", command.arg(job.treefile))?;
        if !ended.status.success() {
            if ended.find(&RETRY).is_some() {
                anyhow::bail!("rpm-ostree ended with {}; its last lines:{}", ended.status, ended.tail());
            }
            reject!("rpm-ostree ended with {}; its last lines:{}", ended.status, ended.tail());
        }
        if options.dry_run {
            return Ok(None);
        }
        let commit = match fs::read_to_string(&id_file) {
            // With --write-commitid-to, rpm-ostree leaves the ref to its caller.
            Ok(id) => {
                let id: Checksum = id.trim().parse().context("reading the commit that rpm-ostree wrote")?;
                commit::set_ref(&repo, &ref_name, &id.to_string())?;
                id.to_string()
            }
            // Nothing changed: it wrote no commit and no file.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match commit::resolve(&repo, &ref_name)? {
                Some(commit) => commit,
                None => reject!("rpm-ostree ended well, but made no commit; its last lines:{}", ended.tail()),
            },
            Err(error) => return Err(error).with_context(|| format!("reading {}", id_file.display())),
        };
        let version = commit::metadata_string(&repo, &commit, "version")?;
        Ok(Some(Commit { ref_name, commit, version, repo: job.repo.to_owned() }))
    }
}
