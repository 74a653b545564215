//! The kernel and its initramfs in /usr/lib/modules/KVER, where OSTree's
//! bootloader support finds them (libostree, docs/deployment.md).

use std::fs;

use anyhow::{Context, Result};
use oscontainer_program::reject;

use super::process;
use super::sandbox::Sandbox;
use super::tree::Tree;
use crate::treefile::Treefile;

/// dracut writes here, inside the tree.
const SCRATCH: &str = "usr/.oscontainer-initramfs.img";

/// Prepares the kernel that the tree has; gives its version, or `None` for a tree
/// without one.
///
/// # Errors
/// Rejected when there is more than one, or no modules for it; when dracut fails.
pub fn prepare(tree: &Tree, treefile: &Treefile) -> Result<Option<String>> {
    let Some(version) = version(tree)? else { return Ok(None) };
    let dir = format!("usr/lib/modules/{version}");
    if tree.entry(&format!("{dir}/vmlinuz"))?.is_none() {
        tree.rename(&format!("boot/vmlinuz-{version}"), &format!("{dir}/vmlinuz"))?;
    }
    if tree.entry(&format!("{dir}/vmlinuz"))?.is_none() {
        reject!("the tree has /{dir} but no kernel: neither vmlinuz there nor /boot/vmlinuz-{version}");
    }
    let mut depmod = Sandbox { writable: &[], network: false }.inside(tree.root());
    depmod.args(["depmod", "--all", &version]);
    process::run("depmod", &mut depmod)?.success("depmod")?;
    let mut dracut = Sandbox { writable: &[], network: false }.inside(tree.root());
    dracut.args(["dracut", "--no-hostonly", "--reproducible", "--force", "--add", "ostree", "--tmpdir", "/tmp"]);
    // gzip through pigz or xz with threads would write other bytes on other machines.
    dracut.args(["--compress", "gzip -n -6"]);
    dracut.args(treefile.initramfs_args.iter().flatten());
    dracut.args(["--kver", &version, &format!("/{SCRATCH}")]);
    let ended = process::run("dracut", &mut dracut)?;
    if !ended.status.success() {
        reject!("dracut ended with {}; its last lines:{}", ended.status, ended.tail());
    }
    let Some(image) = tree.entry(SCRATCH)? else {
        reject!("dracut made no initramfs; its last lines:{}", ended.tail())
    };
    fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    tree.rename(SCRATCH, &format!("{dir}/initramfs.img"))?;
    tree.remove("boot")?;
    tree.directory("boot")?;
    Ok(Some(version))
}

fn version(tree: &Tree) -> Result<Option<String>> {
    let Some(modules) = tree.find("usr/lib/modules")? else { return Ok(None) };
    let mut versions = Vec::new();
    for entry in fs::read_dir(&modules).with_context(|| format!("reading {}", modules.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            versions.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    versions.sort();
    if versions.len() > 1 {
        reject!("the tree has more than one kernel: {}; keep one package of them", versions.join(", "));
    }
    Ok(versions.pop())
}
