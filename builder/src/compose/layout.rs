//! Brings an installed tree into the layout that OSTree wants: all content in
//! /usr, /etc as its template in /usr/etc, /var empty, and links where a system
//! expects directories (libostree, docs/adapting-existing.md).

use std::collections::BTreeSet;
use std::fs;
use std::iter::Peekable;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::str::Chars;

use anyhow::{Context, Result};
use oscontainer_program::reject;
use rustix::fs::FileType;

use super::accounts::Accounts;
use super::packages::{self, RPMDB, Volatile};
use super::policy;
use super::process;
use super::tree::Tree;
use crate::treefile::Treefile;
use crate::treefile::types::{OptUsrLocal, RpmdbBackend};

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
/// Where systemd finds its units.
const UNITS: &str = "usr/lib/systemd/system";
/// What else the root directory holds.
const TOPLEVEL: [&str; 15] = [
    "bin", "boot", "dev", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin", "sys", "sysroot", "tmp", "usr",
    "var",
];
/// Directories of /var that the links need; made at every boot.
const VAR_DIRECTORIES: &str = "\
d /var/home 0755 root root - -
d /var/srv 0755 root root - -
d /var/roothome 0700 root root - -
d /var/mnt 0755 root root - -
d /run/media 0755 root root - -
L /var/lib/rpm - - - - ../../usr/share/rpm
";
/// Those for /opt and /usr/local.
const OPT_DIRECTORIES: &str = "\
d /var/opt 0755 root root - -
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
/// The old places of what is in /usr/lib/opt and /usr/local.
const OPT_LINKS: &str = "\
L /var/opt - - - - ../usr/lib/opt
L /var/usrlocal - - - - ../usr/local
";
/// What dnf, rpm and ldconfig leave, and no image needs or can have reproducible.
const LEFTOVERS: [&str; 24] = [
    "etc/.updated",
    "etc/dnf/modules.d",
    "etc/machine-id",
    "usr/lib/sysimage/libdnf5",
    "var/.updated",
    "var/cache/dnf",
    "var/cache/ldconfig",
    "var/cache/libdnf5",
    "var/cache/yum",
    "var/lib/dbus/machine-id",
    "var/lib/dnf",
    // A seed that all nodes share is none.
    "var/lib/plymouth/boot-duration",
    "var/lib/rpm",
    "var/lib/systemd/catalog/database",
    "var/lib/systemd/random-seed",
    "var/log/btmp",
    "var/log/dnf.librepo.log",
    "var/log/dnf.log",
    "var/log/dnf.rpm.log",
    "var/log/dnf5.log",
    "var/log/hawkey.log",
    "var/log/lastlog",
    "var/log/wtmp",
    "var/log/faillog",
];
/// Caches that scriptlets fill; the directories are packages'.
const CACHES: [&str; 2] = ["var/cache/fontconfig", "var/cache/man"];
/// Where regular files of /var go; systemd-tmpfiles copies them at boot.
const FACTORY: &str = "usr/share/factory";
/// Where content of /opt goes: it is updated with the rest of /usr.
const OPT: &str = "usr/lib/opt";
/// Directories of /var/lib that belong to /usr/lib, with links to them (rpm-ostree,
/// rust/src/composepost.rs, `COMPAT_VARLIB_SYMLINKS`).
const OF_USR: [&str; 2] = ["alternatives", "vagrant"];
/// The second place of the rpm database, from which rpm-ostree reads the base packages.
const BASE_RPMDB: &str = "usr/lib/sysimage/rpm-ostree-base-db";

/// Removes what the installation left besides the packages' content.
///
/// # Errors
/// When something cannot be removed.
pub fn clean(tree: &Tree) -> Result<()> {
    for path in LEFTOVERS {
        tree.remove(path)?;
    }
    for cache in CACHES {
        for name in names(tree, cache)? {
            tree.remove(&format!("{cache}/{name}"))?;
        }
    }
    for dir in ["dev", "proc", "sys", "run", "tmp"] {
        tree.remove(dir)?;
        tree.directory(dir)?;
    }
    Ok(())
}

/// Moves everything to its place. The tree must have been cleaned; `volatile` is what packages
/// have below /run.
///
/// # Errors
/// Rejected when the tree holds what a commit cannot.
pub fn arrange(tree: &Tree, treefile: &Treefile, volatile: &[Volatile]) -> Result<()> {
    let accounts = Accounts::read(tree)?;
    super::accounts::split(tree, treefile.etc_group_members.as_deref().unwrap_or_default())?;
    // The policy's tools make the labels of home directories of it.
    new_homes(tree)?;
    let opt = treefile.opt_usrlocal.unwrap_or(OptUsrLocal::Var);
    let stay: &[&str] = match opt {
        OptUsrLocal::Var => &[],
        OptUsrLocal::Root => &["opt", "usr/local"],
        OptUsrLocal::StateOverlay => &["usr/local"],
    };
    let mut links = move_to_usr(tree, opt)?;
    if treefile.selinux.unwrap_or(true) {
        policy::place(tree)?;
    }
    remount(tree)?;
    for (link, target) in LINKS.into_iter().filter(|(link, _)| !stay.contains(link)) {
        let in_usr = link == "opt" && opt == OptUsrLocal::StateOverlay;
        replace_directory(tree, link, if in_usr { OPT } else { target })?;
    }
    for dir in stay {
        tree.directory(dir)?;
    }
    if opt == OptUsrLocal::StateOverlay {
        overlay(tree)?;
    }
    tree.directory("sysroot")?;
    if treefile.tmp_is_dir.unwrap_or(false) {
        fs::set_permissions(tree.directory("tmp")?, fs::Permissions::from_mode(0o1777))?;
    } else {
        tree.link("tmp", "sysroot/tmp")?;
    }
    for entry in volatile {
        links.push(describe_volatile(entry)?);
    }
    empty_var(tree, &accounts, opt, links)?;
    // An empty machine-id makes systemd set one up at the first boot.
    if treefile.machineid_compat.unwrap_or(true) {
        tree.write("etc/machine-id", b"", 0o644)?;
    } else {
        tree.remove("etc/machine-id")?;
    }
    if tree.entry("usr/etc")?.is_some_and(|place| place.is_symlink()) {
        tree.remove("usr/etc")?;
    }
    if tree.entry("usr/etc")?.is_some() {
        reject!("a package has /usr/etc, which is the place of /etc's template in an OSTree commit");
    }
    tree.rename("etc", "usr/etc")?;
    check_toplevel(tree.root())?;
    check(tree.root(), tree.root(), treefile.ignore_devices.unwrap_or(true))
}

/// Rejects content beside what an OSTree-based system has in its root: a node would
/// mount it read-only, and nobody would look for it there. An empty directory is a
/// mount point.
fn check_toplevel(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        let known = TOPLEVEL.iter().any(|known| name == *known) || LINKS.iter().any(|(link, _)| name == *link);
        let empty = entry.file_type()?.is_dir() && fs::read_dir(entry.path())?.next().is_none();
        if !known && !empty {
            reject!("a package has content in /{}, which is not part of an OSTree commit", name.display());
        }
    }
    Ok(())
}

/// Replaces a directory of the root by a link; what it holds goes below /var's
/// factory, as everything in /var does.
fn replace_directory(tree: &Tree, link: &str, target: &str) -> Result<()> {
    let holds = match tree.entry(link)? {
        Some(place) if place.symlink_metadata()?.is_dir() => fs::read_dir(&place)?.next().is_some(),
        _ => false,
    };
    if let (true, Some(var)) = (holds, target.trim_start_matches("../").strip_prefix("var/")) {
        merge(tree, link, &format!("var/{var}"))?;
    } else if holds {
        reject!("a package has content in /{link}, which is not part of an OSTree commit");
    }
    tree.link(link, target)
}

/// Moves what the directory `from` holds into `to`, where none of it must be yet.
///
/// # Errors
/// Rejected when some of it is.
pub fn merge(tree: &Tree, from: &str, to: &str) -> Result<()> {
    if tree.entry(to)?.is_none() {
        return tree.rename(from, to);
    }
    for name in names(tree, from)? {
        let (from, to) = (format!("{from}/{name}"), format!("{to}/{name}"));
        if tree.entry(&to)?.is_some() {
            reject!("packages have both /{from} and /{to}, which are one place in an OSTree-based system");
        }
        tree.rename(&from, &to)?;
    }
    tree.remove(from)
}

/// The names in a directory of the tree, sorted; none where there is no such directory.
fn names(tree: &Tree, path: &str) -> Result<Vec<String>> {
    let Some(dir) = tree.entry(path)?.filter(|place| place.is_dir() && !place.is_symlink()) else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("reading /{path} of the tree"))? {
        let Ok(name) = entry?.file_name().into_string() else {
            reject!("/{path} of the tree holds a name that is not UTF-8");
        };
        names.push(name);
    }
    names.sort();
    Ok(names)
}

/// Moves to /usr what packages have elsewhere and an update must bring; gives the lines of tmpfiles.d(5)
/// that link it from where they had it.
fn move_to_usr(tree: &Tree, opt: OptUsrLocal) -> Result<Vec<String>> {
    let mut links = Vec::new();
    let packaged = if opt == OptUsrLocal::Root { Vec::new() } else { names(tree, "opt")? };
    for name in packaged.iter().filter(|_| opt == OptUsrLocal::Var) {
        if tree.entry(&format!("var/opt/{name}"))?.is_some() {
            reject!(
                "packages have both /opt/{name} and /var/opt/{name}, which are one place in an OSTree-based system"
            );
        }
        let link = quote(&format!("/var/opt/{name}"))?;
        links.push(format!("L {link} - - - - ../../{OPT}/{}", escape(name)));
    }
    if !packaged.is_empty() {
        let linked = if opt == OptUsrLocal::Var { ", with links to it" } else { "" };
        tracing::info!("what packages have in /opt is in /{OPT}{linked}");
        merge(tree, "opt", OPT)?;
    }
    for name in OF_USR {
        let (from, to) = (format!("var/lib/{name}"), format!("usr/lib/{name}"));
        if tree.entry(&from)?.is_some_and(|place| place.is_dir() && !place.is_symlink()) {
            merge(tree, &from, &to)?;
            links.push(format!("L /{from} - - - - ../../{to}"));
        }
    }
    Ok(links)
}

/// New users' home directories are in /var.
fn new_homes(tree: &Tree) -> Result<()> {
    let Some(text) = tree.read("etc/default/useradd")? else { return Ok(()) };
    let line = |line: &str| if line.starts_with("HOME=") { "HOME=/var/home\n".to_owned() } else { format!("{line}\n") };
    tree.write("etc/default/useradd", text.lines().map(line).collect::<String>().as_bytes(), 0o644)
}

/// Has every node mount what its users and packages of its own write to /opt and /usr/local above what the commit
/// has there (libostree, src/boot/ostree-state-overlay@.service; enabled as rpm-ostree does,
/// tests/compose/test-state-overlays.sh).
fn overlay(tree: &Tree) -> Result<()> {
    const TEMPLATE: &str = "ostree-state-overlay@.service";
    tree.directory(OPT)?;
    if tree.entry(&format!("{UNITS}/{TEMPLATE}"))?.is_none() {
        reject!(
            "opt-usrlocal: state-overlay needs {TEMPLATE}, which no package here has (ostree 2024.1 and newer have it)"
        );
    }
    for path in ["usr-lib-opt", "usr-local"] {
        let unit = format!("ostree-state-overlay@{path}.service");
        tree.link(&format!("{UNITS}/local-fs.target.requires/{unit}"), &format!("../{unit}"))?;
    }
    Ok(())
}

/// Enables what OSTree-based systems need at boot, whatever the distribution's presets say.
fn remount(tree: &Tree) -> Result<()> {
    for unit in ["ostree-finalize-staged.path", "ostree-remount.service"] {
        let wanted = format!("{UNITS}/multi-user.target.wants/{unit}");
        if tree.entry(&format!("{UNITS}/{unit}"))?.is_some() && tree.entry(&wanted)?.is_none() {
            tree.link(&wanted, &format!("../{unit}"))?;
        }
    }
    Ok(())
}

/// Describes /var and /run for systemd-tmpfiles and empties /var. Nothing is lost: regular
/// files move to /usr/share/factory and are copied from there at boot. `opt` says what of /opt and
/// /usr/local is in it. `lines` are described already.
fn empty_var(tree: &Tree, accounts: &Accounts, opt: OptUsrLocal, mut lines: Vec<String>) -> Result<()> {
    let opt_directories = match opt {
        OptUsrLocal::Var => OPT_DIRECTORIES,
        // What a package has there stays there.
        OptUsrLocal::StateOverlay if names(tree, "var/opt")?.is_empty() => OPT_LINKS,
        _ => "",
    };
    let var = tree.directory("var")?;
    describe(&var, "/var", tree, accounts, &mut lines)?;
    lines.sort();
    lines.dedup();
    let directories = [VAR_DIRECTORIES, opt_directories].concat();
    // What a package says itself counts, but for a file that it has content for; systemd-tmpfiles
    // warns of a second line.
    let mut known = tmpfiles(tree)?;
    known.extend(directories.lines().filter_map(made_by));
    lines.retain(|line| line.starts_with("C ") || made_by(line).is_none_or(|path| !known.contains(&path)));
    tree.write("usr/lib/tmpfiles.d/rpm-ostree-1-autovar.conf", directories.as_bytes(), 0o644)?;
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    tree.write("usr/lib/tmpfiles.d/rpm-ostree-autovar.conf", text.as_bytes(), 0o644)?;
    tree.remove("var")?;
    tree.directory("var").map(drop)
}

/// The paths that the tree's own tmpfiles.d make.
fn tmpfiles(tree: &Tree) -> Result<BTreeSet<String>> {
    let mut paths = BTreeSet::new();
    let Some(dir) = tree.find("usr/lib/tmpfiles.d")? else { return Ok(paths) };
    for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".conf")
            && let Some(text) = tree.read_bytes(&format!("usr/lib/tmpfiles.d/{name}"))?
        {
            paths.extend(String::from_utf8_lossy(&text).lines().filter_map(made_by));
        }
    }
    Ok(paths)
}

/// The path that a line of tmpfiles.d(5) makes, where it makes one.
fn made_by(line: &str) -> Option<String> {
    let mut rest = line.chars().peekable();
    let kind = word(&mut rest)?;
    let makes = kind.starts_with(['d', 'D', 'v', 'q', 'Q', 'f', 'F', 'C', 'L', 'p', 'c', 'b']);
    makes.then(|| word(&mut rest)).flatten().map(|path| path.trim_end_matches('/').to_owned())
}

/// The next word of a line, which may be quoted and have escapes as in C (systemd, src/basic/extract-word.c).
fn word(rest: &mut Peekable<Chars>) -> Option<String> {
    while rest.next_if(|next| next.is_ascii_whitespace()).is_some() {}
    rest.peek()?;
    let (mut word, mut quote) = (Vec::new(), None);
    while let Some(next) = rest.next() {
        match (next, quote) {
            ('\\', _) => word.extend(escaped(rest)?),
            (next, Some(open)) if next == open => quote = None,
            ('"' | '\'', None) => quote = Some(next),
            (next, None) if next.is_ascii_whitespace() => break,
            (next, _) => word.extend(next.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    String::from_utf8(word).ok()
}

/// What an escape stands for, without its backslash.
fn escaped(rest: &mut Peekable<Chars>) -> Option<Vec<u8>> {
    Some(match rest.next()? {
        'x' => {
            let mut digit = || rest.next()?.to_digit(16);
            vec![u8::try_from(digit()? * 16 + digit()?).ok()?]
        }
        's' => vec![b' '],
        't' => vec![b'\t'],
        'n' => vec![b'\n'],
        other => other.to_string().into_bytes(),
    })
}

/// The line of tmpfiles.d(5) that makes what a package has below /run.
fn describe_volatile(entry: &Volatile) -> Result<String> {
    let Volatile { path, mode, owner: (user, group), target } = entry;
    let (quoted, permissions) = (quote(path)?, mode & 0o7777);
    Ok(match FileType::from_raw_mode(*mode) {
        FileType::Directory => format!("d {quoted} {permissions:04o} {user} {group} - -"),
        FileType::Symlink => format!("L {quoted} - - - - {}", escape(target)),
        _ => reject!("a package has the file {path}, which would be gone after a boot"),
    })
}

/// A path as tmpfiles.d(5) takes it. Of escapes, older versions of systemd (252) know only those of quotes.
fn quote(path: &str) -> Result<String> {
    if path.contains(char::is_control) {
        reject!("{path:?} of the tree has a control character in its name, which tmpfiles.d cannot express");
    }
    // It would begin a specifier.
    let path = path.replace('%', "%%");
    Ok(match path.contains(is_special) {
        true => format!("\"{}\"", path.replace('\\', r"\\").replace('"', "\\\"")),
        false => path,
    })
}

/// A path as the last field of tmpfiles.d(5) takes it, which has escapes as in C, and no quotes.
fn escape(path: &str) -> String {
    let escape = |next: char| match next {
        '%' => "%%".to_owned(),
        next if is_special(next) => format!("\\x{:02x}", u32::from(next)),
        next => next.to_string(),
    };
    path.chars().map(escape).collect()
}

fn is_special(next: char) -> bool {
    next.is_ascii_whitespace() || next.is_ascii_control() || ['"', '\'', '\\'].contains(&next)
}

/// Adds the lines of tmpfiles.d(5) that make what is below `dir`.
fn describe(dir: &Path, path: &str, tree: &Tree, accounts: &Accounts, lines: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("reading {path} of the tree"))? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            reject!("{path} of the tree holds a name that is not UTF-8");
        };
        let path = format!("{path}/{name}");
        let quoted = quote(&path)?;
        let meta = entry.path().symlink_metadata()?;
        let owner = format!("{} {}", accounts.user(meta.uid()), accounts.group(meta.gid()));
        let mode = meta.mode() & 0o7777;
        if meta.is_dir() {
            lines.push(format!("d {quoted} {mode:04o} {owner} - -"));
            describe(&entry.path(), &path, tree, accounts, lines)?;
        } else if meta.is_symlink() {
            let target = fs::read_link(entry.path())?;
            let Some(target) = target.to_str() else { reject!("the link {path} of the tree is not UTF-8") };
            lines.push(format!("L {quoted} - - - - {}", escape(target)));
        } else if meta.is_file() {
            let factory = format!("{FACTORY}{path}");
            tracing::info!("{path} is a regular file: it moves to /{factory} and is copied back at boot");
            tree.rename(&path, &factory)?;
            lines.push(format!("C {quoted} {mode:04o} {owner} - /{FACTORY}{}", escape(&path)));
        } else {
            reject!("{path} of the tree is a device, socket or pipe, which a commit cannot hold");
        }
    }
    Ok(())
}

/// Says in the tree where its rpm database is, and lets /usr/etc be /etc until [`arrange`] makes it so: then
/// scripts that work on the tree find both. Host keys of ssh that scriptlets made go; what the treefile brings later
/// stays.
///
/// # Errors
/// When it cannot be written.
pub fn prepare_for_scripts(tree: &Tree) -> Result<()> {
    for name in names(tree, "etc/ssh")? {
        if name.starts_with("ssh_host_") && (name.ends_with("_key") || name.ends_with("_key.pub")) {
            tracing::warn!("/etc/ssh/{name} is removed: each node makes a key of its own, which is no other's");
            tree.remove(&format!("etc/ssh/{name}"))?;
        }
    }
    tree.write("usr/lib/rpm/macros.d/macros.rpm-ostree", b"%_dbpath /usr/share/rpm\n", 0o644)?;
    if tree.entry("usr/lib/sysimage/rpm")?.is_some() {
        tree.remove("usr/lib/sysimage/rpm")?;
        tree.link("usr/lib/sysimage/rpm", "../../share/rpm")?;
    }
    if tree.entry("usr/etc")?.is_none() {
        tree.link("usr/etc", "../etc")?;
    }
    Ok(())
}

/// Puts the rpm database in its places, readable on a read-only /usr.
///
/// # Errors
/// Rejected when the tree's own rpm could not read it; when sqlite3 is missing or fails.
pub fn place_rpmdb(tree: &Tree, backend: Option<RpmdbBackend>, home: &Path) -> Result<()> {
    let dir = packages::database(tree)?;
    let database = dir.join("rpmdb.sqlite");
    if database.exists() {
        let mut command = packages::program("sqlite3", &dir, home);
        // What was removed, such as keys, is still in free pages without VACUUM.
        command.arg(&database).arg("PRAGMA journal_mode=DELETE; VACUUM;");
        process::output("sqlite3", &mut command)?;
        let macros = tree.read("usr/lib/rpm/macros")?.unwrap_or_default();
        let wanted = macros.lines().find_map(|line| line.strip_prefix("%_db_backend")).map(str::trim);
        if let Some(wanted) = wanted.filter(|wanted| *wanted != "sqlite" && backend != Some(RpmdbBackend::Host)) {
            reject!(
                "rpmdb: the rpm in the tree has its database in the format {wanted:?}, and the dnf engine writes \
                 sqlite: use --engine rpm-ostree, or `rpmdb: host` to keep it so"
            );
        }
    }
    for leftover in [".rpm.lock", "rpmdb.sqlite-shm", "rpmdb.sqlite-wal"] {
        tree.remove(&format!("{RPMDB}/{leftover}"))?;
    }
    let base = tree.directory(BASE_RPMDB)?;
    for entry in fs::read_dir(&dir)? {
        let entry = entry?;
        fs::hard_link(entry.path(), base.join(entry.file_name())).context("linking the rpm database")?;
    }
    Ok(())
}

/// Rejects what a commit cannot hold, with its path. Device nodes are left out where
/// `ignore_devices`, but for overlayfs's whiteouts, which get the name that libostree
/// knows for them.
fn check(dir: &Path, root: &Path, ignore_devices: bool) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            check(&entry.path(), root, ignore_devices)?;
        } else if ignore_devices && kind.is_char_device() && entry.metadata()?.rdev() == 0 {
            let mut quoted = std::ffi::OsString::from(".ostree-wh.");
            quoted.push(entry.file_name());
            let quoted = entry.path().with_file_name(quoted);
            let mode = entry.metadata()?.mode() & 0o7777;
            fs::remove_file(entry.path())?;
            fs::write(&quoted, "").with_context(|| format!("writing {}", quoted.display()))?;
            fs::set_permissions(&quoted, fs::Permissions::from_mode(mode))?;
        } else if ignore_devices && (kind.is_block_device() || kind.is_char_device()) {
            tracing::info!("leaving out the device node {}", entry.path().display());
            fs::remove_file(entry.path())?;
        } else if kind.is_block_device() || kind.is_char_device() || kind.is_fifo() || kind.is_socket() {
            let path = entry.path();
            let path = path.strip_prefix(root).unwrap_or(&path);
            reject!("/{} of the tree is a device, socket or pipe, which a commit cannot hold", path.display());
        }
    }
    Ok(())
}
