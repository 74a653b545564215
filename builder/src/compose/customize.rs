//! What the treefile asks for beyond packages: units, the default target, files
//! added and removed, os-release, scripts. In rpm-ostree's order
//! (rust/src/composepost.rs, `compose_postprocess`).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oscontainer_program::reject;

use super::process;
use super::sandbox::Sandbox;
use super::tree::Tree;
use crate::treefile::Flattened;

/// Where a script lies in the tree while it runs.
const SCRIPT: &str = "usr/.oscontainer-postprocess";

/// Does all of it, in order.
///
/// # Errors
/// Rejected when the treefile asks for what the tree cannot give, or a script fails.
pub fn customize(tree: &Tree, flattened: &Flattened, version: Option<&str>) -> Result<()> {
    let treefile = &flattened.treefile;
    for unit in treefile.units.iter().flatten() {
        enable(tree, unit)?;
    }
    if let Some(target) = &treefile.default_target {
        tree.link("etc/systemd/system/default.target", &format!("/usr/lib/systemd/system/{target}"))?;
    }
    if let (Some(suffix), Some(version)) = (&treefile.mutate_os_release, version) {
        mutate_os_release(tree, suffix, version)?;
    }
    for path in treefile.remove_files.iter().flatten() {
        if path.starts_with('/') || path.split('/').any(|part| part == "..") {
            reject!("remove-files: {path:?} must be relative to the tree's root, without ..");
        }
        tracing::info!("removing /{path}");
        tree.remove(path)?;
    }
    for (source, destination) in &flattened.external.add_files {
        add_file(tree, source, destination)?;
    }
    for (index, script) in treefile.postprocess.iter().flatten().enumerate() {
        run_script(tree, script.as_bytes(), &format!("postprocess script {}", index + 1))?;
    }
    for script in &flattened.external.postprocess_scripts {
        let bytes = fs::read(script).with_context(|| format!("reading {}", script.display()))?;
        run_script(tree, &bytes, &format!("postprocess-script {}", script.display()))?;
    }
    Ok(())
}

/// Links the unit as `systemctl enable` would for multi-user.target, which is what
/// rpm-ostree does with `units`.
fn enable(tree: &Tree, unit: &str) -> Result<()> {
    if unit.contains('/') {
        reject!("units: {unit:?} is not a unit's name");
    }
    let file = format!("usr/lib/systemd/system/{unit}");
    if tree.entry(&file)?.is_none() {
        reject!("units: no package has {unit} in /usr/lib/systemd/system");
    }
    tree.link(&format!("etc/systemd/system/multi-user.target.wants/{unit}"), &format!("/{file}"))
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
    tree.write(destination, &bytes, mode)
}

/// Runs a script inside the tree, where /etc is still /etc.
fn run_script(tree: &Tree, script: &[u8], what: &str) -> Result<()> {
    tree.write(SCRIPT, script, 0o755)?;
    let mut command = Sandbox { writable: &[], network: false }.inside(tree.root());
    if script.starts_with(b"#!") {
        command.arg(PathBuf::from("/").join(SCRIPT));
    } else {
        command.arg("/bin/sh").arg(PathBuf::from("/").join(SCRIPT));
    }
    tracing::info!("running {what}");
    let ended = process::run("postprocess", &mut command)?;
    tree.remove(SCRIPT)?;
    if !ended.status.success() {
        reject!("{what} ended with {}; its last lines:{}", ended.status, ended.tail());
    }
    Ok(())
}
