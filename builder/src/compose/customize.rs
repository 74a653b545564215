//! What the treefile asks for beyond packages: units, the default target, files
//! added and removed, os-release, scripts. In rpm-ostree's order
//! (rust/src/composepost.rs, `compose_postprocess`).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oscontainer_program::reject;
use ostree::glib::{Regex, RegexCompileFlags, RegexMatchFlags};

use super::process;
use super::sandbox::Sandbox;
use super::tree::Tree;
use crate::treefile::{Flattened, Treefile};

/// Where packages put systemd's units.
const UNITS: &str = "usr/lib/systemd/system";
/// Where a script lies in the tree while it runs.
const SCRIPT: &str = "usr/.oscontainer-postprocess";

/// Does all of it, in order. Scripts see `timestamp` as SOURCE_DATE_EPOCH, so that what they date is the
/// same tomorrow.
///
/// # Errors
/// Rejected when the treefile asks for what the tree cannot give, or a script fails.
pub fn customize(tree: &Tree, flattened: &Flattened, version: Option<&str>, timestamp: u64) -> Result<()> {
    let treefile = &flattened.treefile;
    for unit in treefile.units.iter().flatten() {
        enable(tree, unit)?;
    }
    if let Some(target) = &treefile.default_target {
        tree.link(&format!("{UNITS}/default.target"), &format!("/{UNITS}/{target}"))?;
    }
    if let (Some(suffix), Some(version)) = (&treefile.mutate_os_release, version) {
        mutate_os_release(tree, suffix, version)?;
    }
    for path in treefile.remove_files.iter().flatten() {
        let relative = !path.starts_with('/') && path.split('/').all(|part| part != "..");
        if !relative || path.split('/').all(|part| part.is_empty() || part == ".") {
            reject!("remove-files: {path:?} must be relative to the tree's root, without .., and not the root itself");
        }
        tracing::info!("removing /{path}");
        tree.remove(path)?;
    }
    for (source, destination) in &flattened.external.add_files {
        add_file(tree, source, destination)?;
    }
    for (index, script) in treefile.postprocess.iter().flatten().enumerate() {
        run_script(tree, script.as_bytes(), &format!("postprocess script {}", index + 1), timestamp)?;
    }
    for script in &flattened.external.postprocess_scripts {
        let bytes = fs::read(script).with_context(|| format!("reading {}", script.display()))?;
        run_script(tree, &bytes, &format!("postprocess-script {}", script.display()), timestamp)?;
    }
    // A unit may come from add-files or a script as well.
    for unit in treefile.units.iter().flatten() {
        if tree.entry(&format!("{UNITS}/{unit}"))?.is_none() {
            reject!("units: nothing put {unit} into /{UNITS}");
        }
    }
    Ok(())
}

/// Removes the files that `remove-from-packages` matches. `files` are all packages'
/// names and paths; what another package has too stays.
///
/// # Errors
/// Rejected when an expression is none.
pub fn remove_from_packages(tree: &Tree, treefile: &Treefile, files: &[(String, String)]) -> Result<()> {
    let mut removed = BTreeSet::new();
    for rule in treefile.remove_from_packages.iter().flatten() {
        let Some((package, expressions)) = rule.split_first() else { continue };
        let paths: Vec<&str> =
            files.iter().filter(|(name, _)| name == package).map(|(_, path)| path.as_str()).collect();
        if paths.is_empty() {
            tracing::warn!("remove-from-packages: no package {package} is installed");
        }
        for expression in expressions {
            // The engine and the flag that rpm-ostree has, so that the same files match.
            let flags = RegexCompileFlags::JAVASCRIPT_COMPAT;
            if expression.contains('\0') {
                reject!("remove-from-packages: {package}: {expression:?} has a NUL character in it");
            }
            if let Err(error) = Regex::new(expression, flags, RegexMatchFlags::DEFAULT) {
                reject!("remove-from-packages: {package}: {expression:?}: {}", error.message());
            }
            for path in &paths {
                if Regex::match_simple(expression, *path, flags, RegexMatchFlags::DEFAULT) {
                    removed.insert((package.as_str(), *path));
                }
            }
        }
    }
    // A directory goes with all that its package has in it.
    let gone = |name: &str, path: &str| {
        let ancestors = Path::new(path).ancestors().filter_map(Path::to_str);
        ancestors.into_iter().any(|dir| removed.contains(&(name, dir)))
    };
    let (gone, kept): (Vec<_>, Vec<_>) = files.iter().partition(|(name, path)| gone(name, path));
    let kept: BTreeSet<&str> = kept.into_iter().map(|(_, path)| path.as_str()).collect();
    let mut gone: Vec<&str> = gone.into_iter().map(|(_, path)| path.as_str()).collect();
    // What is in a directory comes before it.
    gone.sort_unstable_by(|a, b| b.cmp(a));
    for path in gone.into_iter().filter(|path| !kept.contains(path)) {
        let Some(place) = tree.entry(path)? else { continue };
        if !place.symlink_metadata()?.is_dir() {
            tracing::debug!("removing {path}");
            tree.remove(path)?;
        } else if fs::read_dir(&place)?.next().is_none() {
            tree.remove(path)?;
        }
    }
    Ok(())
}

/// Takes the write permission from all executable files.
///
/// # Errors
/// When a mode cannot be read or set.
pub fn protect_executables(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        let mode = meta.permissions().mode() & 0o7777;
        if meta.is_dir() {
            protect_executables(&entry.path())?;
        } else if meta.is_file() && mode & 0o111 != 0 && mode & 0o222 != 0 {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(mode & !0o222))
                .with_context(|| format!("setting the mode of {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Runs the programs of `finalize.d`: the host's, in the tree's root, which is arranged.
///
/// # Errors
/// Rejected when one fails.
pub fn finalize(tree: &Tree, flattened: &Flattened) -> Result<()> {
    let directory = &flattened.external.directory;
    let directory = fs::canonicalize(directory).with_context(|| format!("entering {}", directory.display()))?;
    for program in &flattened.external.finalize {
        let path = fs::canonicalize(program).with_context(|| format!("finding {}", program.display()))?;
        let readable = [directory.as_path(), path.parent().unwrap_or(&path)];
        let mut command = Sandbox { writable: &[], network: true }.beside(tree.root(), &readable);
        command.arg(&path).env("RPMOSTREE_WORKDIR", &directory);
        tracing::info!("running {}", program.display());
        let ended = process::run("finalize.d", &mut command)?;
        ended.had_what_it_needs("finalize.d")?;
        if !ended.status.success() {
            reject!("{} ended with {}; its last lines:{}", program.display(), ended.status, ended.tail());
        }
    }
    Ok(())
}

/// Links the unit as `systemctl enable` would for multi-user.target, which is what
/// rpm-ostree does with `units`.
fn enable(tree: &Tree, unit: &str) -> Result<()> {
    if unit.contains('/') {
        reject!("units: {unit:?} is not a unit's name");
    }
    tree.link(&format!("etc/systemd/system/multi-user.target.wants/{unit}"), &format!("/{UNITS}/{unit}"))
}

/// `OSTREE_VERSION` and the version in the pretty name, as rpm-ostree writes them.
fn mutate_os_release(tree: &Tree, base: &str, version: &str) -> Result<()> {
    let path = if tree.entry("usr/lib/os-release")?.is_some() { "usr/lib/os-release" } else { "etc/os-release" };
    let Some(text) = tree.read(path)? else { reject!("mutate-os-release: the tree has no os-release") };
    let mut out = String::new();
    for line in text.lines() {
        let mutated = ["VERSION=", "PRETTY_NAME="].iter().any(|key| line.starts_with(key));
        out.push_str(&if mutated { line.replace(base, version) } else { line.to_owned() });
        out.push('\n');
    }
    out.push_str(&format!("OSTREE_VERSION='{version}'\n"));
    tree.write(path, out.as_bytes(), 0o644)
}

/// Copies a file with its mode; its directories are made.
fn add_file(tree: &Tree, source: &Path, destination: &str) -> Result<()> {
    let bytes = fs::read(source).with_context(|| format!("reading {} (add-files)", source.display()))?;
    let mode = fs::metadata(source)?.permissions().mode() & 0o7777;
    tracing::info!("adding /{}", destination.trim_start_matches('/'));
    if tree.entry(destination)?.is_some_and(|place| place.is_dir() && !place.is_symlink()) {
        reject!("add-files: {destination} is a directory in the tree: name the file in it");
    }
    tree.write(destination, &bytes, mode)
}

/// Runs a script inside the tree, where /etc is still /etc.
fn run_script(tree: &Tree, script: &[u8], what: &str, timestamp: u64) -> Result<()> {
    tree.write(SCRIPT, script, 0o755)?;
    let mut command = Sandbox { writable: &[], network: false }.inside(tree.root());
    command.env("SOURCE_DATE_EPOCH", timestamp.to_string());
    if script.starts_with(b"#!") {
        command.arg(PathBuf::from("/").join(SCRIPT));
    } else {
        command.arg("/bin/sh").arg(PathBuf::from("/").join(SCRIPT));
    }
    tracing::info!("running {what}");
    let ended = process::run("postprocess", &mut command)?;
    tree.remove(SCRIPT)?;
    ended.had_what_it_needs(what)?;
    if !ended.status.success() {
        reject!("{what} ended with {}; its last lines:{}", ended.status, ended.tail());
    }
    Ok(())
}
