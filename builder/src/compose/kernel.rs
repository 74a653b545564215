//! The kernel and its initramfs in /usr/lib/modules/KVER, where OSTree's
//! bootloader support finds them (libostree, docs/deployment.md), and all else of
//! /boot in /usr/lib/ostree-boot (rpm-ostree, src/libpriv/rpmostree-postprocess.cxx).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Hasher;
use oscontainer_program::reject;

use super::sandbox::Sandbox;
use super::tree::Tree;
use super::{accounts, process};
use crate::treefile::Treefile;
use crate::treefile::types::BootLocation;

/// Where dracut sees the directory that it writes to, and the file's name there.
const OUTPUT: &str = "/run/oscontainer";
const INITRAMFS: &str = "initramfs.img";

/// What /boot holds besides the kernel, such as boot loaders; and where libostree
/// before 2018 looks for kernels.
const OSTREE_BOOT: &str = "usr/lib/ostree-boot";

/// The kernel of a tree.
pub struct Kernel {
    /// Its version.
    pub version: String,
}

impl Kernel {
    fn directory(&self) -> String {
        format!("usr/lib/modules/{}", self.version)
    }
}

/// Brings the kernel of the tree to its place; `None` for a tree without one.
///
/// # Errors
/// Rejected when there is more than one, or no modules for it; when depmod fails.
pub fn place(tree: &Tree) -> Result<Option<Kernel>> {
    let Some(version) = version(tree)? else { return Ok(None) };
    let kernel = Kernel { version };
    let (version, dir) = (&kernel.version, kernel.directory());
    if tree.entry(&format!("{dir}/vmlinuz"))?.is_none() {
        tree.rename(&format!("boot/vmlinuz-{version}"), &format!("{dir}/vmlinuz"))?;
    }
    if tree.entry(&format!("{dir}/vmlinuz"))?.is_none() {
        reject!("the tree has /{dir} but no kernel: neither vmlinuz there nor /boot/vmlinuz-{version}");
    }
    let mut depmod = Sandbox { writable: &[], network: false }.inside(tree.root());
    depmod.args(["depmod", "--all", version]);
    let ended = process::run("depmod", &mut depmod)?;
    ended.had_what_it_needs("depmod")?;
    if ended.find(&["execvp depmod"]).is_some() {
        reject!("the tree has a kernel but no depmod: add the package kmod");
    }
    ended.success("depmod")?;
    relocate_hmac(tree, &dir)?;
    keep_boot(tree, version)?;
    Ok(Some(kernel))
}

/// Makes the initramfs of the arranged tree, which is only read, below `work`.
///
/// # Errors
/// Rejected when dracut fails.
pub fn make_initramfs(tree: &Tree, treefile: &Treefile, kernel: &Kernel, work: &Path) -> Result<PathBuf> {
    let output = work.join("initramfs");
    fs::create_dir(&output)?;
    let sandbox = Sandbox { writable: &[(&output, Path::new(OUTPUT))], network: false };
    let mut dracut = sandbox.arranged(tree.root())?;
    // dracut looks for users in /etc only.
    for file in ["passwd", "group"] {
        let whole = work.join(file);
        fs::write(&whole, accounts::whole(tree, file)?)?;
        dracut.arg("--ro-bind").arg(whole).arg(format!("/etc/{file}"));
    }
    dracut.args(["dracut", "--no-hostonly", "--reproducible", "--force", "--add", "ostree", "--tmpdir", "/tmp"]);
    // gzip through pigz or xz with threads would write other bytes on other machines.
    dracut.args(["--compress", "gzip -n -6"]);
    dracut.args(treefile.initramfs_args.iter().flatten());
    dracut.args(["--kver", &kernel.version, &format!("{OUTPUT}/{INITRAMFS}")]);
    let ended = process::run("dracut", &mut dracut)?;
    ended.had_what_it_needs("dracut")?;
    if !ended.status.success() {
        reject!("dracut ended with {}; its last lines:{}", ended.status, ended.tail());
    }
    let image = output.join(INITRAMFS);
    if !image.exists() {
        reject!("dracut made no initramfs; its last lines:{}", ended.tail());
    }
    Ok(image)
}

/// Puts the initramfs, where there is one, beside the kernel, and links both where old
/// systems look for them.
///
/// # Errors
/// When files cannot be moved or linked.
pub fn finish(tree: &Tree, treefile: &Treefile, kernel: &Kernel, initramfs: Option<&Path>) -> Result<()> {
    let dir = kernel.directory();
    let mut names = vec!["vmlinuz"];
    if let Some(image) = initramfs {
        // As rpm-ostree has it: it is made here, of what everybody may read, and holds no secrets.
        fs::set_permissions(image, PermissionsExt::from_mode(0o644))?;
        let place = tree.place(&format!("{dir}/{INITRAMFS}"))?;
        fs::rename(image, &place).with_context(|| format!("moving the initramfs to {}", place.display()))?;
        names.push(INITRAMFS);
    }
    if treefile.boot_location.unwrap_or(BootLocation::New) == BootLocation::New {
        link_as_before(tree, &dir, &kernel.version, &names)?;
    }
    Ok(())
}

/// The kernel's checksum for FIPS names the kernel; where it does so with the directory that it had in its package,
/// leaves the name (rpm-ostree, rust/src/composepost.rs, `verify_kernel_hmac`).
fn relocate_hmac(tree: &Tree, dir: &str) -> Result<()> {
    let path = format!("{dir}/.vmlinuz.hmac");
    let Some(text) = tree.read(&path)? else { return Ok(()) };
    let Some((_, name)) = text.rsplit_once('/') else { return Ok(()) };
    let Some((checksum, _)) = text.split_once("  ") else { reject!("/{path} of the tree is no checksum and name") };
    tree.rewrite(&path, format!("{checksum}  {name}").as_bytes())
}

/// Moves what packages have in /boot to its place in /usr; /boot stays as a mount point.
fn keep_boot(tree: &Tree, version: &str) -> Result<()> {
    for ours in [format!("vmlinuz-{version}"), format!("initramfs-{version}.img"), format!("initrd.img-{version}")] {
        tree.remove(&format!("boot/{ours}"))?;
    }
    // A boot loader's entries are made where the tree is deployed; kernel-install(8) may have put some there, and
    // more under a name that is another one each time.
    tree.remove("boot/loader")?;
    if let Some(id) = tree.read("etc/machine-id")?
        && let id = id.trim()
        && id.len() == 32
        && id.bytes().all(|byte| byte.is_ascii_hexdigit())
    {
        tree.remove(&format!("boot/{id}"))?;
        tree.remove(&format!("boot/vmlinuz-0-rescue-{id}"))?;
        tree.remove(&format!("boot/initramfs-0-rescue-{id}.img"))?;
    }
    let holds = |place: Option<PathBuf>| -> Result<bool> {
        Ok(match place {
            Some(place) => fs::read_dir(place)?.next().is_some(),
            None => false,
        })
    };
    if holds(tree.find("boot")?)? {
        if holds(tree.find(OSTREE_BOOT)?)? {
            reject!("packages have content in both /boot and /{OSTREE_BOOT}, where it would go");
        }
        tree.rename("boot", OSTREE_BOOT)?;
    }
    tree.remove("boot")?;
    tree.directory("boot").map(drop)
}

/// Links kernel and initramfs under the names by which old versions of libostree find them.
fn link_as_before(tree: &Tree, dir: &str, version: &str, names: &[&str]) -> Result<()> {
    let mut hasher = Hasher::new();
    let mut places = Vec::new();
    for name in names {
        let place = tree.find(&format!("{dir}/{name}"))?.with_context(|| format!("finding the tree's {name}"))?;
        let file = tree.open_file(&format!("{dir}/{name}"))?.with_context(|| format!("finding the tree's {name}"))?;
        hasher.update_from(file).with_context(|| format!("reading {}", place.display()))?;
        places.push(place);
    }
    let checksum = hasher.checksum();
    for (name, place) in names.iter().zip(places) {
        let link = match *name {
            "vmlinuz" => format!("vmlinuz-{version}-{checksum}"),
            _ => format!("initramfs-{version}.img-{checksum}"),
        };
        let link = tree.place(&format!("{OSTREE_BOOT}/{link}"))?;
        fs::hard_link(&place, &link).with_context(|| format!("linking {}", link.display()))?;
    }
    Ok(())
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
