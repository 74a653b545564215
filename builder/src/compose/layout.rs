//! Brings an installed tree into the layout that OSTree wants: all content in
//! /usr, /etc as its template in /usr/etc, /var empty, and links where a system
//! expects directories (libostree, docs/adapting-existing.md).

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use oscontainer_program::reject;

use super::accounts::Accounts;
use super::process;
use super::tree::Tree;
use crate::treefile::Treefile;

/// Links of the root directory: name and what it holds.
const LINKS: [(&str, &str); 8] = [
    ("home", "var/home"),
    ("opt", "var/opt"),
    ("srv", "var/srv"),
    ("root", "var/roothome"),
    ("mnt", "var/mnt"),
    ("media", "run/media"),
    ("ostree", "sysroot/ostree"),
    ("usr/local", "../var/usrlocal"),
];
/// Directories of /var that the links need; made at every boot.
const VAR_DIRECTORIES: &str = "\
d /var/home 0755 root root - -
d /var/opt 0755 root root - -
d /var/srv 0755 root root - -
d /var/roothome 0700 root root - -
d /var/mnt 0755 root root - -
d /run/media 0755 root root - -
d /var/usrlocal 0755 root root - -
d /var/usrlocal/bin 0755 root root - -
d /var/usrlocal/etc 0755 root root - -
d /var/usrlocal/games 0755 root root - -
d /var/usrlocal/include 0755 root root - -
d /var/usrlocal/lib 0755 root root - -
d /var/usrlocal/man 0755 root root - -
d /var/usrlocal/sbin 0755 root root - -
d /var/usrlocal/share 0755 root root - -
d /var/usrlocal/src 0755 root root - -
";
/// What dnf, rpm and ldconfig leave, and no image needs or can have reproducible.
const LEFTOVERS: [&str; 16] = [
    "etc/dnf/modules.d",
    "etc/machine-id",
    "usr/lib/sysimage/libdnf5",
    "var/cache/dnf",
    "var/cache/ldconfig",
    "var/cache/libdnf5",
    "var/cache/yum",
    "var/lib/dnf",
    "var/lib/rpm",
    "var/log/dnf.librepo.log",
    "var/log/dnf.log",
    "var/log/dnf.rpm.log",
    "var/log/dnf5.log",
    "var/log/hawkey.log",
    "var/log/lastlog",
    "var/log/faillog",
];
/// Where regular files of /var go; systemd-tmpfiles copies them at boot.
const FACTORY: &str = "usr/share/factory";
/// The rpm database's place in an OSTree-based system, and its second one, from
/// which rpm-ostree reads the base packages.
pub const RPMDB: &str = "usr/share/rpm";
const BASE_RPMDB: &str = "usr/lib/sysimage/rpm-ostree-base-db";

/// Removes what the installation left besides the packages' content.
///
/// # Errors
/// When something cannot be removed.
pub fn clean(tree: &Tree) -> Result<()> {
    for path in LEFTOVERS {
        tree.remove(path)?;
    }
    for dir in ["dev", "proc", "sys", "run", "tmp"] {
        tree.remove(dir)?;
        tree.directory(dir)?;
    }
    Ok(())
}

/// Moves everything to its place. The tree must have been cleaned.
///
/// # Errors
/// Rejected when the tree holds what a commit cannot.
pub fn arrange(tree: &Tree, treefile: &Treefile) -> Result<()> {
    let accounts = Accounts::read(tree)?;
    super::accounts::split(tree, treefile.etc_group_members.as_deref().unwrap_or_default())?;
    for (link, target) in LINKS {
        replace_directory(tree, link, target)?;
    }
    tree.directory("sysroot")?;
    if treefile.tmp_is_dir.unwrap_or(false) {
        fs::set_permissions(tree.directory("tmp")?, fs::Permissions::from_mode(0o1777))?;
    } else {
        tree.link("tmp", "sysroot/tmp")?;
    }
    empty_var(tree, &accounts)?;
    // An empty machine-id makes systemd set one up at the first boot.
    if treefile.machineid_compat.unwrap_or(true) {
        tree.write("etc/machine-id", b"", 0o644)?;
    } else {
        tree.remove("etc/machine-id")?;
    }
    if tree.entry("usr/etc")?.is_some() {
        reject!("a package has /usr/etc, which is the place of /etc's template in an OSTree commit");
    }
    tree.rename("etc", "usr/etc")?;
    check(tree.root(), tree.root())
}

/// Replaces a directory of the root by a link; what it holds goes below /var's
/// factory, as everything in /var does.
fn replace_directory(tree: &Tree, link: &str, target: &str) -> Result<()> {
    let holds = match tree.entry(link)? {
        Some(place) if place.symlink_metadata()?.is_dir() => fs::read_dir(&place)?.next().is_some(),
        _ => false,
    };
    if let (true, Some(var)) = (holds, target.trim_start_matches("../").strip_prefix("var/")) {
        tree.rename(link, &format!("var/{var}"))?;
    } else if holds {
        reject!("a package has content in /{link}, which is not part of an OSTree commit");
    }
    tree.link(link, target)
}

/// Describes /var for systemd-tmpfiles and empties it. Nothing is lost: regular
/// files move to /usr/share/factory and are copied from there at boot.
fn empty_var(tree: &Tree, accounts: &Accounts) -> Result<()> {
    let var = tree.directory("var")?;
    let mut lines = Vec::new();
    describe(&var, "/var", tree, accounts, &mut lines)?;
    lines.sort();
    let ours = VAR_DIRECTORIES.lines().map(|line| line.split(' ').nth(1).unwrap_or_default()).collect::<Vec<_>>();
    lines.retain(|line| line.split(' ').nth(1).is_none_or(|path| !ours.contains(&path)));
    tree.write("usr/lib/tmpfiles.d/rpm-ostree-1-autovar.conf", VAR_DIRECTORIES.as_bytes(), 0o644)?;
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    tree.write("usr/lib/tmpfiles.d/rpm-ostree-autovar.conf", text.as_bytes(), 0o644)?;
    tree.remove("var")?;
    tree.directory("var").map(drop)
}

/// Adds the lines of tmpfiles.d(5) that make what is below `dir`.
fn describe(dir: &Path, path: &str, tree: &Tree, accounts: &Accounts, lines: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("reading {path} of the tree"))? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            reject!("{path} of the tree holds a name that is not UTF-8");
        };
        let path = format!("{path}/{name}");
        if path.contains(char::is_whitespace) {
            reject!("{path:?} of the tree has white space in its name, which tmpfiles.d cannot express here");
        }
        let meta = entry.path().symlink_metadata()?;
        let owner = format!("{} {}", accounts.user(meta.uid()), accounts.group(meta.gid()));
        let mode = meta.mode() & 0o7777;
        if meta.is_dir() {
            lines.push(format!("d {path} {mode:04o} {owner} - -"));
            describe(&entry.path(), &path, tree, accounts, lines)?;
        } else if meta.is_symlink() {
            let target = fs::read_link(entry.path())?;
            lines.push(format!("L {path} - - - - {}", target.display()));
        } else if meta.is_file() {
            let factory = format!("{FACTORY}{path}");
            tracing::info!("{path} is a regular file: it moves to /{factory} and is copied back at boot");
            tree.rename(&path, &factory)?;
            lines.push(format!("C {path} {mode:04o} {owner} - /{factory}"));
        } else {
            reject!("{path} of the tree is a device, socket or pipe, which a commit cannot hold");
        }
    }
    Ok(())
}

/// Puts the rpm database in its places, readable on a read-only /usr.
///
/// # Errors
/// When sqlite3 is missing or fails.
pub fn place_rpmdb(tree: &Tree) -> Result<()> {
    let Some(dir) = tree.find(RPMDB)? else { reject!("the tree has no rpm database: no package was installed") };
    let database = dir.join("rpmdb.sqlite");
    if database.exists() {
        let mut command = Command::new("sqlite3");
        command.arg(&database).arg("PRAGMA journal_mode=DELETE;");
        process::output("sqlite3", &mut command)?;
    }
    for leftover in [".rpm.lock", "rpmdb.sqlite-shm", "rpmdb.sqlite-wal"] {
        tree.remove(&format!("{RPMDB}/{leftover}"))?;
    }
    let base = tree.directory(BASE_RPMDB)?;
    for entry in fs::read_dir(&dir)? {
        let entry = entry?;
        fs::hard_link(entry.path(), base.join(entry.file_name())).context("linking the rpm database")?;
    }
    tree.write("usr/lib/rpm/macros.d/macros.rpm-ostree", b"%_dbpath /usr/share/rpm\n", 0o644)?;
    if tree.entry("usr/lib/sysimage/rpm")?.is_some() {
        tree.remove("usr/lib/sysimage/rpm")?;
        tree.link("usr/lib/sysimage/rpm", "../../share/rpm")?;
    }
    Ok(())
}

/// Rejects what a commit cannot hold, with its path.
fn check(dir: &Path, root: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            check(&entry.path(), root)?;
        } else if kind.is_block_device() || kind.is_char_device() || kind.is_fifo() || kind.is_socket() {
            let path = entry.path();
            let path = path.strip_prefix(root).unwrap_or(&path);
            reject!("/{} of the tree is a device, socket or pipe, which a commit cannot hold", path.display());
        }
    }
    Ok(())
}
