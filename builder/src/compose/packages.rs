//! The packages of the tree, as its rpm database has them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use oscontainer_artifact::object;
use oscontainer_program::reject;

use super::process;
use super::sandbox::Sandbox;
use super::tree::Tree;

/// One installed package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Name, version and architecture, as a commit lists it.
    pub listed: object::Package,
    /// Seconds since 1970.
    pub build_time: u64,
    /// The sha256 (of old packages the sha1) of its header, in hex: what pins its content.
    pub header: String,
    /// Bytes that it takes installed.
    pub size: u64,
}

/// rpm's query for the fields of [`Package`], in their order.
const QUERY: &str = "%{NAME}\t%{EPOCHNUM}\t%{VERSION}\t%{RELEASE}\t%{ARCH}\t%{BUILDTIME}\t\
                     %|SHA256HEADER?{%{SHA256HEADER}}:{%{SHA1HEADER}}|\t%{LONGSIZE}\n";

/// The rpm database's place in an OSTree-based system.
pub const RPMDB: &str = "usr/share/rpm";

/// What may lie there: the files of rpm's formats sqlite and ndb. A journal of another name could make sqlite3 remove
/// files elsewhere (sqlite.org/fileformat.html, section 4.1: super-journals).
const DATABASE: [&str; 6] =
    [".rpm.lock", "Index.db", "Packages.db", "rpmdb.sqlite", "rpmdb.sqlite-shm", "rpmdb.sqlite-wal"];

/// Where the tree's rpm database lies on the host, whose programs read and change it.
///
/// # Errors
/// Rejected when there is none, or when a scriptlet has put something else there than its files, such
/// as a link that would lead out of the tree.
pub fn database(tree: &Tree) -> Result<PathBuf> {
    let Some(dir) = tree.find(RPMDB)?.filter(|dir| dir.is_dir()) else {
        reject!("the tree has no rpm database: no package was installed");
    };
    for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        if !entry.file_type()?.is_file() || DATABASE.iter().all(|known| name != *known) {
            reject!("/{RPMDB}/{} in the tree is no file of an rpm database", name.display());
        }
    }
    Ok(dir)
}

/// A program of the host's that reads or changes the database `dbpath`, which scriptlets wrote: it can write nothing
/// else.
pub fn program(name: &str, dbpath: &Path, home: &Path) -> Command {
    let mut command = Sandbox { writable: &[], network: false }.beside(dbpath, &[home]);
    // Scratch files belong on the disk.
    command.env("HOME", home).env("SQLITE_TMPDIR", dbpath).arg(name);
    command
}

fn rpm(dbpath: &Path, home: &Path) -> Command {
    let mut command = program("rpm", dbpath, home);
    command.arg("--dbpath").arg(dbpath);
    command
}

/// The packages in the database `dbpath` (a host path), sorted.
///
/// # Errors
/// When rpm cannot read the database.
pub fn installed(dbpath: &Path, home: &Path) -> Result<Vec<Package>> {
    query(rpm(dbpath, home).args(["--query", "--all", "--queryformat", QUERY]))
}

/// Removes the public keys that dnf keeps in the database `dbpath` as if they were packages.
///
/// # Errors
/// When rpm cannot change the database.
pub fn forget_keys(dbpath: &Path, home: &Path) -> Result<()> {
    const KEYS: &str = "gpg-pubkey";
    let listed = process::output("rpm", rpm(dbpath, home).args(["--query", "--all", KEYS]))?;
    if listed.is_empty() {
        return Ok(());
    }
    process::output(
        "rpm",
        rpm(dbpath, home).args(["--erase", "--justdb", "--nodeps", "--noscripts", "--notriggers"]).args(listed.lines()),
    )
    .map(drop)
}

/// The packages that `files` are, sorted.
///
/// # Errors
/// When rpm cannot read one.
pub fn of_files(files: &[PathBuf], home: &Path) -> Result<Vec<Package>> {
    let mut command = Command::new("rpm");
    // dnf has checked the signatures, with keys that this rpm has not.
    command.env("HOME", home).args(["--query", "--nosignature", "--queryformat", QUERY, "--package"]).args(files);
    query(&mut command)
}

fn query(command: &mut Command) -> Result<Vec<Package>> {
    let mut packages = process::output("rpm", command)?.lines().map(parse).collect::<Result<Vec<_>>>()?;
    packages.sort();
    Ok(packages)
}

/// The paths of all packages in the database: name and absolute path, directories too.
///
/// # Errors
/// When rpm cannot read the database.
pub fn files(dbpath: &Path, home: &Path) -> Result<Vec<(String, String)>> {
    let format = "[%{=NAME}\t%{FILENAMES}\n]";
    let text = process::output("rpm", rpm(dbpath, home).args(["--query", "--all", "--queryformat", format]))?;
    let pairs = text.lines().filter_map(|line| line.split_once('\t'));
    Ok(pairs.map(|(name, path)| (name.to_owned(), path.to_owned())).collect())
}

/// What a package has below /run, which is empty at every boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volatile {
    /// Its absolute path.
    pub path: String,
    /// File type and permissions.
    pub mode: u32,
    /// Owner and group by name.
    pub owner: (String, String),
    /// Where a symbolic link leads.
    pub target: String,
}

/// What packages in the database have below /run, but for `%ghost` files, which only programs make.
///
/// # Errors
/// When rpm cannot read the database.
pub fn volatile(dbpath: &Path, home: &Path) -> Result<Vec<Volatile>> {
    const GHOST: u32 = 1 << 6; // RPMFILE_GHOST (rpm, lib/rpmfiles.h)
    let format = "[%{FILEMODES}\t%{FILEFLAGS}\t%{FILEUSERNAME}\t%{FILEGROUPNAME}\t%{FILELINKTOS}\t%{FILENAMES}\n]";
    let text = process::output("rpm", rpm(dbpath, home).args(["--query", "--all", "--queryformat", format]))?;
    let mut found = Vec::new();
    for line in text.lines() {
        let Some((rest, path)) = line.rsplit_once('\t') else { continue };
        // These two are links in every tree with systemd.
        let links = [("/run/", "/run/"), ("/var/run/", "/run/"), ("/var/lock/", "/run/lock/")];
        let Some(path) = links.iter().find_map(|(from, to)| Some(format!("{to}{}", path.strip_prefix(from)?))) else {
            continue;
        };
        let [mode, flags, user, group, target] = fields(rest)?;
        let number = |text: &str| text.parse::<u32>().with_context(|| format!("reading rpm's answer {line:?}"));
        if number(flags)? & GHOST == 0 {
            let owner = (user.to_owned(), group.to_owned());
            found.push(Volatile { path, mode: number(mode)?, owner, target: target.to_owned() });
        }
    }
    Ok(found)
}

fn parse(line: &str) -> Result<Package> {
    let [name, epoch, version, release, architecture, build_time, header, size] = fields(line)?.map(str::to_owned);
    let number = |text: &str| text.parse().with_context(|| format!("reading rpm's answer {line:?}"));
    let (build_time, size) = (number(&build_time)?, number(&size)?);
    let listed = object::Package { name, epoch, version, release, architecture };
    Ok(Package { listed, build_time, header, size })
}

/// The fields of a line of rpm's answer.
fn fields<const N: usize>(line: &str) -> Result<[&str; N]> {
    let fields: Vec<&str> = line.split('\t').collect();
    fields.try_into().ok().with_context(|| format!("reading rpm's answer {line:?}"))
}
