//! `--repos-dir`: repositories that no `.repo` file beside the treefile defines, such as those of
//! the distribution that the builder's image is made of.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use oscontainer_program::reject;

use crate::treefile::Flattened;

/// Where the treefile is to be composed from: `work`, if a repository of its own is defined in
/// `directory` only. Then that holds all that is beside the treefile, and the `.repo` files.
/// (rpm-ostree reads only those that are beside the treefile.)
///
/// # Errors
/// Rejected when neither place defines a repository, or the treefile's files are not all beside it.
pub fn completed(treefile: &Path, flattened: &Flattened, directory: &Path, work: &Path) -> Result<Option<PathBuf>> {
    let fields = &flattened.treefile;
    let of_packages = fields.repo_packages.iter().flatten().map(|entry| &entry.repo);
    let named = [&fields.repos, &fields.lockfile_repos].into_iter().flatten().flatten().chain(of_packages);
    let mut missing: BTreeSet<String> = named.cloned().collect();
    let beside = &flattened.external.directory;
    for (_, text) in repo_files(beside)? {
        defined(&text).for_each(|name| {
            missing.remove(name);
        });
    }
    if missing.is_empty() {
        return Ok(None);
    }
    only_below(flattened, directory)?;
    fs::create_dir(work).with_context(|| format!("making {}", work.display()))?;
    let reading = || format!("reading {}", beside.display());
    for entry in fs::read_dir(beside).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let original = std::path::absolute(entry.path()).with_context(reading)?;
        symlink(original, work.join(entry.file_name())).context("linking what is beside the treefile")?;
    }
    for (path, text) in repo_files(directory)? {
        let wanted: Vec<&str> = defined(&text).filter(|name| missing.contains(*name)).collect();
        if let (false, Some(name)) = (wanted.is_empty(), path.file_name().and_then(|name| name.to_str())) {
            tracing::info!("{} of {}", wanted.join(" and "), path.display());
            fs::write(work.join(format!("repos-dir-{name}")), &text).context("writing a .repo file")?;
            wanted.into_iter().for_each(|name| {
                missing.remove(name);
            });
        }
    }
    match (missing.first(), treefile.file_name()) {
        (None, Some(name)) => Ok(Some(work.join(name))),
        (name, _) => reject!(
            "the treefile names the repository {:?}, but no .repo file in {} or {} defines it",
            name.map_or("", String::as_str),
            beside.display(),
            directory.display()
        ),
    }
}

/// That all files are where the links lead.
fn only_below(flattened: &Flattened, directory: &Path) -> Result<()> {
    let external = &flattened.external;
    let added = external.add_files.iter().map(|(source, _)| source);
    let others = external.postprocess_scripts.iter().chain(&external.passwd).chain(&external.group);
    for file in flattened.sources.iter().chain(added).chain(others).chain(&external.finalize) {
        let below = file.strip_prefix(&external.directory).unwrap_or(file);
        if !below.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
            reject!(
                "with repositories of --repos-dir {} all files must be below the treefile's directory; {} is not",
                directory.display(),
                file.display()
            );
        }
    }
    Ok(())
}

/// The `.repo` files in a directory, by name.
fn repo_files(directory: &Path) -> Result<Vec<(PathBuf, String)>> {
    let listing = || format!("reading {}", directory.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(listing)? {
        let path = entry.with_context(listing)?.path();
        if path.extension().is_some_and(|extension| extension == "repo") {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            found.push((path, text));
        }
    }
    found.sort();
    Ok(found)
}

/// The repositories that a `.repo` file defines.
fn defined(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.trim().strip_prefix('[')?.strip_suffix(']'))
}
