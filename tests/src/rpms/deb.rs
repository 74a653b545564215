//! Debian packages: which ones a list of names needs, how they get here, and how
//! an unpacked one is described as an RPM. Speaks to apt and dpkg.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use rpm::Dependency;

use super::package::{Evr, File, Kind, Package, Regular, SOURCE_DATE_EPOCH, versioned};

/// Names that Debian's maintainer scripts need and a tree of RPMs does not; and
/// those that `filesystem`, `setup` and `demo-release` stand for.
const DROPPED: [&str; 16] = [
    "base-files",
    "base-passwd",
    "debconf",
    "debconf-2.0",
    "debianutils",
    "dpkg",
    "init-system-helpers",
    "initramfs-tools",
    "install-info",
    "libcap2-bin",
    "libpam-runtime",
    "linux-base",
    "perl-base",
    "sysvinit-utils",
    "usr-is-merged",
    "usrmerge",
];

/// What Debian sets in maintainer scripts, which are dropped.
const CAPABILITIES: [(&str, &str); 1] = [("/usr/bin/ping", "cap_net_raw=ep")];

/// One package as the archive's index describes it.
#[derive(Debug)]
pub struct Deb {
    name: String,
    version: String,
    architecture: String,
    summary: String,
    /// Each inner list is an alternative, `a | b`.
    depends: Vec<Vec<Relation>>,
    provides: Vec<Relation>,
}

/// `NAME (RELATION VERSION)`.
#[derive(Debug, Clone)]
struct Relation {
    name: String,
    version: Option<(String, String)>,
}

/// All packages that `names` need, sorted by name.
///
/// # Errors
///
/// When apt knows no such package, or an alternative cannot be met by the first
/// that it lists.
pub fn closure(names: &[&str], cache: &Path) -> Result<Vec<Deb>> {
    std::fs::create_dir_all(cache).with_context(|| format!("creating {}", cache.display()))?;
    let mut found: BTreeMap<String, Deb> = BTreeMap::new();
    let mut asked: BTreeSet<String> = BTreeSet::new();
    let mut wanted: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
    while !wanted.is_empty() {
        for deb in show(&wanted, cache)? {
            found.insert(deb.name.clone(), deb);
        }
        asked.append(&mut wanted);
        for group in found.values().flat_map(|deb| &deb.depends) {
            if !group.iter().any(|relation| asked.contains(&relation.name)) {
                wanted.extend(group.first().map(|relation| relation.name.clone()));
            }
        }
    }
    // What was asked for and has no record is virtual: another must provide it.
    let provided: BTreeSet<&str> =
        found.values().flat_map(|deb| &deb.provides).map(|relation| relation.name.as_str()).collect();
    let missing: Vec<_> =
        asked.iter().filter(|name| !found.contains_key(*name) && !provided.contains(name.as_str())).collect();
    ensure!(missing.is_empty(), "apt has no package {missing:?}: name one that provides it, or run `apt-get update`");
    Ok(found.into_values().collect())
}

fn show(names: &BTreeSet<String>, cache: &Path) -> Result<Vec<Deb>> {
    let apt_show = || output(apt("apt-cache", cache)?.args(["show", "--no-all-versions"]).args(names));
    let mut text = apt_show()?;
    if !text.contains("Filename: ") {
        // A fresh container image has no lists.
        output(Command::new("apt-get").args(["--quiet", "update"])).context("updating apt's lists")?;
        text = apt_show()?;
    }
    text.split("\n\n").filter(|stanza| !stanza.trim().is_empty()).map(Deb::parse).collect()
}

/// apt keeps no binary index in container images and makes one at every call, in
/// seconds; here it finds it in `cache`.
fn apt(program: &str, cache: &Path) -> Result<Command> {
    let cache = std::path::absolute(cache).with_context(|| format!("finding {}", cache.display()))?;
    let mut command = Command::new(program);
    for index in ["pkgcache", "srcpkgcache"] {
        command.arg("-o").arg(format!("Dir::Cache::{index}={}/{index}.bin", cache.display()));
    }
    Ok(command)
}

impl Deb {
    fn parse(stanza: &str) -> Result<Self> {
        let field =
            |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        let needed = |name: &str| field(name).with_context(|| format!("reading {name} of apt's record {stanza:?}"));
        let mut depends = Vec::new();
        for group in [field("Pre-Depends"), field("Depends")].into_iter().flatten().flat_map(|list| list.split(',')) {
            let group: Vec<_> = group.split('|').map(Relation::parse).collect();
            if !group.iter().any(|relation| DROPPED.contains(&relation.name.as_str())) {
                depends.push(group);
            }
        }
        Ok(Self {
            name: needed("Package")?.to_owned(),
            version: needed("Version")?.to_owned(),
            architecture: needed("Architecture")?.to_owned(),
            summary: field("Description").or(field("Description-en")).unwrap_or("a Debian package").to_owned(),
            depends,
            provides: field("Provides").into_iter().flat_map(|list| list.split(',')).map(Relation::parse).collect(),
        })
    }

    /// Its name, which the RPM keeps.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn file_name(&self) -> String {
        format!("{}_{}_{}.deb", self.name, self.version.replace(':', "%3a"), self.architecture)
    }

    /// Unpacks this package from `cache` and describes it as an RPM.
    ///
    /// # Errors
    ///
    /// When the archive cannot be read or holds what no package should.
    pub fn convert(&self, cache: &Path) -> Result<Package> {
        let path = cache.join(self.file_name());
        let files = read_files(&path).with_context(|| format!("converting {}", path.display()))?;
        let mut requires: Vec<_> = self.depends.iter().map(|group| requirement(group)).collect();
        requires.push(Dependency::any("filesystem"));
        let provides = self.provides.iter().map(|relation| match &relation.version {
            Some((relation_is, version)) => versioned(&relation.name, relation_is, version),
            None => Dependency::any(&relation.name),
        });
        Ok(Package {
            name: self.name.clone(),
            evr: Evr::from_debian(&self.version),
            arch: rpm_architecture(&self.architecture).to_owned(),
            summary: self.summary.clone(),
            requires,
            // Debian's recommendations would double the tree.
            recommends: Vec::new(),
            provides: provides.collect(),
            files,
            scripts: Vec::new(),
        })
    }
}

impl Relation {
    fn parse(text: &str) -> Self {
        let (name, version) = text.trim().split_once(" (").unwrap_or((text.trim(), ""));
        let version = version.trim_end_matches(')').split_once(' ');
        Self {
            // `python3:any` says which architecture, and there is only one here.
            name: name.split(':').next().unwrap_or(name).to_owned(),
            version: version.map(|(relation, version)| (relation.to_owned(), version.trim().to_owned())),
        }
    }
}

fn requirement(group: &[Relation]) -> Dependency {
    match group {
        [Relation { name, version: Some((relation, version)) }] => versioned(name, relation, version),
        [Relation { name, version: None }] => Dependency::any(name),
        _ => {
            let names: Vec<_> = group.iter().map(|relation| relation.name.as_str()).collect();
            Dependency::any(format!("({})", names.join(" or ")))
        }
    }
}

fn rpm_architecture(debian: &str) -> &str {
    match debian {
        "all" => "noarch",
        "amd64" => "x86_64",
        "arm64" => "aarch64",
        "ppc64el" => "ppc64le",
        other => other,
    }
}

/// RPM's name of the architecture whose packages apt gives.
///
/// # Errors
///
/// When dpkg cannot be run.
pub fn architecture() -> Result<String> {
    let debian = output(Command::new("dpkg").arg("--print-architecture"))?;
    Ok(rpm_architecture(debian.trim()).to_owned())
}

/// Downloads those of `debs` that `cache` does not have.
///
/// # Errors
///
/// When apt cannot download one.
pub fn download(debs: &[Deb], cache: &Path) -> Result<()> {
    let missing: Vec<_> = debs.iter().filter(|deb| !cache.join(deb.file_name()).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    // Beside the cache's files, then moved: what has its name there is whole.
    let partial = tempfile::tempdir_in(cache).context("creating a directory for downloads")?;
    let mut command = apt("apt-get", cache)?;
    // Without this apt warns that its own user cannot write here.
    command.args(["--quiet", "-o", "APT::Sandbox::User=root", "download"]).current_dir(partial.path());
    command.args(missing.iter().map(|deb| format!("{}={}", deb.name, deb.version)));
    output(&mut command).context("downloading Debian packages")?;
    for deb in missing {
        let name = deb.file_name();
        std::fs::rename(partial.path().join(&name), cache.join(&name)).with_context(|| format!("keeping {name}"))?;
    }
    Ok(())
}

/// The entries of a deb, where they belong in a tree with a merged /usr.
fn read_files(deb: &Path) -> Result<Vec<File>> {
    let conffiles = conffiles(deb)?;
    let mut files: BTreeMap<String, File> = BTreeMap::new();
    let mut hardlinks: Vec<(String, String)> = Vec::new();
    let archive = bytes(Command::new("dpkg-deb").arg("--fsys-tarfile").arg(deb))?;
    for entry in tar::Archive::new(archive.as_slice()).entries()? {
        let mut entry = entry?;
        let original = absolute(&entry.path()?)?;
        let path = merged(&original);
        let kind = match entry.header().entry_type() {
            tar::EntryType::Directory => Kind::Directory,
            tar::EntryType::Symlink => {
                let target = entry.link_name()?.context("reading a link without a target")?;
                let Some(target) = link_target(&original, &path, &target)? else { continue };
                Kind::Symlink(target)
            }
            tar::EntryType::Link => {
                let first = entry.link_name()?.context("reading a link without a target")?;
                hardlinks.push((path, merged(&absolute(&first)?)));
                continue;
            }
            tar::EntryType::Regular => {
                let mut content = Vec::new();
                entry.read_to_end(&mut content)?;
                let caps = CAPABILITIES.iter().find(|(of, _)| *of == path).map(|(_, caps)| *caps);
                Kind::Regular(Regular { content, hardlink: None, config: conffiles.contains(&path), caps })
            }
            other => bail!("{path} is a {other:?}: no package of a host should have one"),
        };
        if files.get(&path).is_some_and(|_| matches!(kind, Kind::Directory)) || path == "/" {
            continue;
        }
        let header = entry.header();
        let file = File {
            owner: header.username()?.unwrap_or("root").to_owned(),
            group: header.groupname()?.unwrap_or("root").to_owned(),
            mode: u16::try_from(header.mode()? & 0o7777)?,
            mtime: u32::try_from(header.mtime()?)?.min(SOURCE_DATE_EPOCH),
            kind,
            path: path.clone(),
        };
        files.insert(path, file);
    }
    for (path, first) in hardlinks {
        let shared = files.get_mut(&first).with_context(|| format!("finding {first}, the other name of {path}"))?;
        let Kind::Regular(regular) = &mut shared.kind else { bail!("{first} has two names but is no file") };
        regular.hardlink = Some(first);
        let twin = File { path: path.clone(), ..shared.clone() };
        files.insert(path, twin);
    }
    Ok(files.into_values().collect())
}

fn conffiles(deb: &Path) -> Result<BTreeSet<String>> {
    let control = bytes(Command::new("dpkg-deb").arg("--ctrl-tarfile").arg(deb))?;
    let mut names = BTreeSet::new();
    for entry in tar::Archive::new(control.as_slice()).entries()? {
        let mut entry = entry?;
        if entry.path()?.ends_with("conffiles") {
            let mut text = String::new();
            entry.read_to_string(&mut text)?;
            names.extend(text.lines().map(merged));
        }
    }
    Ok(names)
}

fn absolute(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("reading the name {path:?}: it is not UTF-8"))?;
    Ok(format!("/{}", text.trim_start_matches("./").trim_end_matches('/')))
}

/// `/bin/x` is `/usr/bin/x` where /bin is a link into /usr.
fn merged(path: &str) -> String {
    let top = path.split('/').nth(1).unwrap_or_default();
    if super::synthetic::MERGED.contains(&top) { format!("/usr{path}") } else { path.to_owned() }
}

/// The target that a link needs where it lies now; `None` for a link to itself,
/// such as Debian's `/usr/bin/which` to `/bin/which`.
fn link_target(original: &str, path: &str, target: &Path) -> Result<Option<String>> {
    let target = target.to_str().with_context(|| format!("reading the target of {path}: it is not UTF-8"))?;
    if target.starts_with('/') {
        return Ok((merged(target) != path).then(|| target.to_owned()));
    }
    if original == path || !target.starts_with("../") {
        return Ok(Some(target.to_owned()));
    }
    // A relative link that left its directory, which is one level deeper now.
    let mut parts: Vec<_> = original.split('/').skip(1).collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "." | "" => {}
            ".." => _ = parts.pop(),
            name => parts.push(name),
        }
    }
    let resolved = merged(&format!("/{}", parts.join("/")));
    Ok((resolved != path).then_some(resolved))
}

fn output(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8(bytes(command)?)?)
}

/// What `command` printed; its standard error is part of the error.
pub(super) fn bytes(command: &mut Command) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output()
        .with_context(|| format!("running {program}"))?;
    let arguments = || command.get_args().collect::<Vec<_>>().join(OsStr::new(" ")).to_string_lossy().into_owned();
    ensure!(
        done.status.success(),
        "{program} {} ended with {}: {}",
        arguments(),
        done.status,
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(done.stdout)
}

/// The cache that lies beside a repository at `output`.
pub fn default_cache(output: &Path) -> PathBuf {
    output.with_file_name("debs")
}
