//! The `dnf` engine: `dnf --installroot` installs, the rest is ours.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use oscontainer_program::{exit, reject, stop};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, utimensat};

use super::lockfile::{self, Available, Divided, Lockfile};
use super::plan::{self, Planned};
use super::process::{self, Ended};
use super::repo_file::{self, Section};
use super::sandbox::Sandbox;
use crate::treefile::Flattened;

/// What dnf and rpm say when the input is wrong, not the weather; the most telling first.
const REJECTED: [&str; 13] = [
    "does not exist - using root",
    "is not signed",
    "Public key for",
    "are not correct for this package",
    "GPG check FAILED",
    "No match for argument",
    "Unable to find a match",
    "nothing provides",
    "conflicts with",
    "conflicts between attempted installs",
    "There are no enabled repositories",
    "Unknown repo",
    "conflicting requests",
];
/// Lines of rpm about a scriptlet that failed; dnf itself may go on after some.
const SCRIPTLET: [&str; 2] = ["scriptlet failed, exit status", "scriptlet failed, signal"];
/// Lines that say that trying again may help.
const RETRY: [&str; 5] =
    ["Failed to download metadata", "Cannot download", "Curl error", "No space left", "Error downloading packages"];

/// Locks the cache.
const LOCK: &str = ".oscontainer.lock";
/// Where dnf sees its cache.
const CACHE: &str = "/var/cache/dnf";
/// Where below the working directory the `.repo` files are, and where without what is only for the network: of these
/// scriptlets may know.
const REPOS: &str = "repos";
const REPOS_OFFLINE: &str = "repos-offline";
/// Where their variables are.
const VARS: &str = "vars";

/// Where dnf works for one compose.
pub struct Dnf<'a> {
    flattened: &'a Flattened,
    /// Configuration and private HOME; goes with the compose.
    work: PathBuf,
    /// Metadata and packages; stays, and other composes use it too.
    cache: PathBuf,
    /// What this compose needs of it, which nobody else changes.
    snapshot: PathBuf,
    root: PathBuf,
    /// `SOURCE_DATE_EPOCH` for rpm: what it writes as the time of installation.
    epoch: u64,
    /// The repositories that the `.repo` files define.
    known: Vec<Section>,
    /// Whether dnf has asked the repositories for what is new: it does so once, so that all stages see the same.
    refreshed: Cell<bool>,
    /// What a lockfile takes from each of the treefile's `lockfile-repos`; empty while that is
    /// being found out.
    pinned: BTreeMap<String, Vec<String>>,
    /// What a lockfile pins and no repository has.
    missing: Vec<String>,
}

impl<'a> Dnf<'a> {
    /// Writes the configuration below `work`, for an installation into `root`.
    ///
    /// # Errors
    /// When a repository of the treefile has no `.repo` file, or files cannot be written.
    pub fn prepare(flattened: &'a Flattened, work: &Path, cache: &Path, root: &Path, epoch: u64) -> Result<Self> {
        let (work, root, cache, snapshot) = (work.to_owned(), root.to_owned(), cache.join("dnf"), work.join("cache"));
        let (known, refreshed, pinned, missing) = (Vec::new(), Cell::new(false), BTreeMap::new(), Vec::new());
        let mut dnf = Self { flattened, work, cache, snapshot, root, epoch, known, refreshed, pinned, missing };
        for dir in ["home", REPOS, REPOS_OFFLINE, VARS] {
            fs::create_dir_all(dnf.work.join(dir)).context("making dnf's directories")?;
        }
        fs::create_dir_all(&dnf.cache).with_context(|| format!("making {}", dnf.cache.display()))?;
        // Debian's rpm keeps its database in the home directory, and rpm may not
        // touch the mode of what is mounted.
        let macros = "%_dbpath /usr/share/rpm\n%_netsharedpath /dev:/proc:/sys\n%_install_langs ";
        let langs = flattened.treefile.install_langs.as_ref().map_or("all".to_owned(), |langs| langs.join(":"));
        fs::write(dnf.work.join("home/.rpmmacros"), format!("{macros}{langs}\n"))?;
        dnf.configure(&[])?;
        for (name, value) in flattened.treefile.repovars.iter().flatten() {
            if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
                reject!("repovars: {name:?} is no name of a variable: letters, digits and _ make one");
            }
            fs::write(dnf.work.join(VARS).join(name), value)?;
        }
        dnf.known = dnf.copy_repositories()?;
        Ok(dnf)
    }

    /// Writes dnf's configuration; `others` are packages that a lockfile forbids.
    fn configure(&self, others: &[String]) -> Result<()> {
        let treefile = &self.flattened.treefile;
        let mut conf = format!(
            "[main]\ngpgcheck=1\nbest=1\nkeepcache=1\nplugins=0\ncheck_config_file_age=0\nzchunk=0\n\
             install_weak_deps={}\n",
            treefile.recommends.unwrap_or(true),
        );
        if treefile.documentation == Some(false) {
            conf.push_str("tsflags=nodocs\n");
        }
        let excluded = treefile.exclude_packages.iter().flatten().chain(others);
        let excluded: Vec<&str> = excluded.map(String::as_str).collect();
        if !excluded.is_empty() {
            conf.push_str(&format!("excludepkgs={}\n", excluded.join(",")));
        }
        fs::write(self.work.join("dnf.conf"), conf).context("writing dnf's configuration")
    }

    /// Makes the packages that `lockfile` pins the only ones of their names.
    ///
    /// # Errors
    /// When the repositories cannot be read.
    pub fn pin(&mut self, lockfile: &Lockfile) -> Result<()> {
        if lockfile.is_empty() {
            return Ok(());
        }
        let repositories = self.flattened.treefile.lockfile_repos.as_deref().unwrap_or_default();
        self.pinned = repositories.iter().map(|repo| (repo.clone(), Vec::new())).collect();
        let available = {
            let _lock = self.lock()?;
            self.available(true, &lockfile.names())?
        };
        let Divided { pinned, others, missing } = lockfile.divide(&available);
        if !missing.is_empty() {
            tracing::warn!("no repository has what the lockfile pins: {}", missing.join(", "));
        }
        self.missing = missing;
        for package in pinned {
            if let Some(allowed) = self.pinned.get_mut(&package.repository) {
                allowed.push(package.nevra());
            }
        }
        // What it has besides is not for this compose.
        self.pinned.retain(|_, allowed| !allowed.is_empty());
        let others: Vec<String> = others.into_iter().map(Available::nevra).collect();
        tracing::info!("the lockfile leaves out {} packages that repositories have", others.len());
        self.configure(&others)
    }

    /// What the repositories have under `names`, everything where there are none; without the network, what the
    /// snapshot knows of them.
    fn available(&self, network: bool, names: &[&str]) -> Result<Vec<Available>> {
        let mut command = self.command(network)?;
        if !network {
            command.arg("--cacheonly");
        }
        let format = "%{name}|%{epoch}|%{version}-%{release}|%{arch}|%{sourcerpm}|%{repoid}|%{location}\\n";
        command.args(["--quiet", "repoquery", "--qf", format]).args(names);
        let text = process::output("dnf", &mut command)?;
        let parse = |line: &str| {
            let fields: [&str; 7] = line.split('|').collect::<Vec<_>>().try_into().ok()?;
            let [name, epoch, version, arch, source, repository, location] = fields.map(str::to_owned);
            let evr = if matches!(epoch.as_str(), "0" | "(none)") { version } else { format!("{epoch}:{version}") };
            Some(Available { name, evr, arch, source, repository, location })
        };
        let lines = text.lines().filter(|line| !line.is_empty());
        lines.map(|line| parse(line).with_context(|| format!("reading dnf's answer {line:?}"))).collect()
    }

    /// Copies the `.repo` files beside the treefile, and no others; gives what they define.
    fn copy_repositories(&self) -> Result<Vec<Section>> {
        let dir = &self.flattened.external.directory;
        let mut known = Vec::new();
        for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "repo") {
                let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
                let mut sections = match repo_file::parse(&text) {
                    Ok(sections) => sections,
                    Err(wrong) => reject!("{}: {wrong}", path.display()),
                };
                // dnf's own options, which it does not take from here.
                sections.retain(|section| section.id != "main");
                sections.iter_mut().for_each(|section| self.leave_to_others(section));
                let name = path.file_name().context("a directory entry has a name")?;
                let write = |to: &str, keep: fn(&str) -> bool| {
                    let text: String = sections.iter().map(|section| section.text(keep)).collect();
                    fs::write(self.work.join(to).join(name), text).context("writing a .repo file")
                };
                write(REPOS, |_| true)?;
                write(REPOS_OFFLINE, |key| !repo_file::is_for_network(key))?;
                known.extend(sections);
            }
        }
        self.check_repositories(&known)?;
        Ok(known)
    }

    /// A package that is to come from one repository is not there in the others.
    fn leave_to_others(&self, section: &mut Section) {
        for entry in self.flattened.treefile.repo_packages.iter().flatten() {
            if entry.repo != section.id {
                section.exclude(&entry.packages.iter().map(String::as_str).collect::<Vec<_>>().join(","));
            }
        }
    }

    /// Rejects repositories that are not there or cannot be used.
    fn check_repositories(&self, known: &[Section]) -> Result<()> {
        let treefile = &self.flattened.treefile;
        let of_packages = treefile.repo_packages.iter().flatten().map(|entry| &entry.repo);
        let of_lockfiles = treefile.lockfile_repos.as_deref().unwrap_or_default();
        for repo in self.repositories().iter().chain(of_packages.clone()).chain(of_lockfiles) {
            if known.iter().all(|section| section.id != *repo) {
                reject!(
                    "the treefile names the repository {repo:?}, but no .repo file in {} defines it",
                    self.flattened.external.directory.display()
                );
            }
        }
        for repo in of_packages {
            if !self.repositories().is_empty() && !self.repositories().contains(repo) {
                reject!("repo-packages takes packages from {repo:?}, which is not among `repos`: add it there");
            }
        }
        let used = known.iter().filter(|section| match self.repositories() {
            [] => section.is_enabled(),
            named => named.contains(&section.id) || of_lockfiles.contains(&section.id),
        });
        for section in used.filter(|_| treefile.releasever.is_none()) {
            let mut words = section.words();
            if let Some((key, _)) =
                words.find(|(_, word)| word.contains("$releasever") || word.contains("${releasever"))
            {
                reject!(
                    "the repository {:?} has $releasever in its {key}, but the treefile has no releasever: add one",
                    section.id
                );
            }
        }
        Ok(())
    }

    /// The files and directories of this machine that repositories name in the options that `keep` takes.
    fn local(&self, section: &Section, keep: impl Fn(&str) -> bool) -> Vec<PathBuf> {
        let path = |(_, word): (&str, &str)| {
            let word = self.expand(word);
            // Of certificates and their keys it is a path.
            let path = word.strip_prefix("file://").or(word.starts_with('/').then_some(&word));
            path.map(PathBuf::from)
        };
        section.words().filter(|(key, _)| keep(key)).filter_map(path).collect()
    }

    /// Puts in the values of the variables that dnf knows.
    fn expand(&self, text: &str) -> String {
        let treefile = &self.flattened.treefile;
        let releasever = treefile.releasever.iter().map(|value| ("releasever", value.to_string()));
        let basearch = treefile.basearch.iter().map(|value| ("basearch", value.clone()));
        let given = treefile.repovars.iter().flatten().map(|(name, value)| (name.as_str(), value.clone()));
        releasever.chain(basearch).chain(given).fold(text.to_owned(), |text, (name, value)| {
            text.replace(&format!("${{{name}}}"), &value).replace(&format!("${name}"), &value)
        })
    }

    fn repositories(&self) -> &[String] {
        self.flattened.treefile.repos.as_deref().unwrap_or_default()
    }

    /// All that is to be installed, sorted.
    fn packages(&self) -> BTreeSet<&String> {
        let treefile = &self.flattened.treefile;
        let of_repositories = treefile.repo_packages.iter().flatten().flat_map(|entry| &entry.packages);
        treefile.packages.iter().flatten().chain(of_repositories).collect()
    }

    /// dnf, with the network and the cache that all composes share, or without and with the snapshot of it.
    fn command(&self, network: bool) -> Result<Command> {
        let cache = if network { &self.cache } else { &self.snapshot };
        // dnf 4 takes its cache from below the installroot and, for some files, from
        // outside of it, whatever it is told: it finds ours in both places.
        let inside = self.root.join(CACHE.trim_start_matches('/'));
        let writable = [(cache.as_path(), Path::new(CACHE)), (cache.as_path(), inside.as_path())];
        // Without, scriptlets run: they need know of repositories no more than dnf for what is in the cache.
        let (repos, needed): (_, fn(&str) -> bool) = match network {
            true => (REPOS, |_| true),
            false => (REPOS_OFFLINE, |key| ["baseurl", "gpgkey"].contains(&key)),
        };
        let mut readable: Vec<PathBuf> = ["dnf.conf", "home", VARS, repos].map(|name| self.work.join(name)).into();
        readable.extend(self.known.iter().flat_map(|section| self.local(section, needed)));
        let readable: Vec<&Path> = readable.iter().map(PathBuf::as_path).collect();
        let mut command = Sandbox { writable: &writable, network }.outside(&self.root, &readable)?;
        if !network {
            // They are those of the cache that all composes share, and scriptlets run beside them.
            for entry in fs::read_dir(cache)? {
                let packages = Path::new(&entry?.file_name()).join("packages");
                if cache.join(&packages).is_dir() {
                    for place in [Path::new(CACHE), &inside] {
                        command.arg("--ro-bind").args([cache.join(&packages), place.join(&packages)]);
                    }
                }
            }
        }
        command.arg("dnf").arg("--config").arg(self.work.join("dnf.conf"));
        command.arg("--installroot").arg(&self.root);
        // Its log and state stay where it puts them, inside the tree; they are removed there.
        command.arg(format!("--setopt=cachedir={CACHE}"));
        // From the configuration file, dnf 4 would take the variables from where it found the repositories.
        for (option, name) in [("reposdir", repos), ("varsdir", VARS)] {
            command.arg(format!("--setopt={option}={}", self.work.join(name).display()));
        }
        if network && !self.refreshed.replace(true) {
            // What has not changed is not fetched again.
            command.arg("--refresh");
        }
        let treefile = &self.flattened.treefile;
        // Without one, dnf would look for a package that no repository need have; no repository in use has it.
        let releasever = treefile.releasever.as_ref().map_or("none".to_owned(), ToString::to_string);
        command.arg(format!("--releasever={releasever}"));
        if !self.repositories().is_empty() {
            command.arg("--disablerepo=*");
            command.args(self.repositories().iter().map(|repo| format!("--enablerepo={repo}")));
        }
        for repo in treefile.lockfile_repos.iter().flatten().filter(|repo| !self.repositories().contains(repo)) {
            match self.pinned.get(repo) {
                None => command.arg(format!("--disablerepo={repo}")),
                Some(all) if all.is_empty() => command.arg(format!("--enablerepo={repo}")),
                Some(allowed) => command
                    .arg(format!("--enablerepo={repo}"))
                    .arg(format!("--setopt={repo}.includepkgs={}", allowed.join(","))),
            };
        }
        command.env("HOME", self.work.join("home")).env("SOURCE_DATE_EPOCH", self.epoch.to_string());
        // systemd's kernel-install(8) would make an initramfs of its own, and a boot loader's entry
        // with a random name.
        command.env("KERNEL_INSTALL_BYPASS", "1");
        Ok(command)
    }

    /// The private home directory, whose rpm macros name the database's place.
    pub fn home(&self) -> PathBuf {
        self.work.join("home")
    }

    /// Resolves the packages and installs none.
    ///
    /// # Errors
    /// Rejected when they cannot be resolved; else worth a retry.
    pub fn resolve(&self) -> Result<Vec<Planned>> {
        let _lock = self.lock()?;
        let mut command = self.command(true)?;
        command.args(["--assumeno", "install"]).args(self.packages());
        let ended = process::run("dnf", &mut command)?;
        // This is how dnf says that it did as it was told.
        if ended.find(&["Operation aborted"]).is_some() {
            return plan::parse(&ended.lines);
        }
        self.judge(ended).map(|_| Vec::new())
    }

    /// Downloads the packages into the cache, with the network, and keeps what
    /// [`Dnf::install_cached`] needs of it for this compose. Gives the packages, and their files; `None` where
    /// one is not where its repository says.
    ///
    /// # Errors
    /// Rejected when they cannot be resolved; else worth a retry.
    pub fn download(&self) -> Result<(Vec<Planned>, Option<Vec<PathBuf>>)> {
        let _lock = self.lock()?;
        let ended = self.install(true, &["--downloadonly"])?;
        let packages = plan::parse(&ended.lines)?;
        self.take_snapshot()?;
        let files = self.locate(&packages)?;
        files.iter().flatten().filter(|file| file.starts_with(&self.snapshot)).for_each(|file| note_use(file));
        let missing = packages.iter().zip(&files).find(|(_, file)| file.is_none());
        if let Some((package, _)) = missing {
            tracing::warn!(
                "the file of {} is not where {} says: whether packages are new is not known before they are installed",
                package.name,
                package.repository
            );
        }
        Ok((packages, files.into_iter().collect()))
    }

    /// Installs what [`Dnf::download`] left, without the network.
    ///
    /// # Errors
    /// Rejected when a scriptlet fails or an owner is unknown.
    pub fn install_cached(&self) -> Result<()> {
        self.install(false, &["--cacheonly"]).map(drop)
    }

    fn install(&self, network: bool, options: &[&str]) -> Result<Ended> {
        let mut command = self.command(network)?;
        command.arg("--assumeyes").args(options).arg("install").args(self.packages());
        self.judge(process::run("dnf", &mut command)?)
    }

    /// As [`judge`]; packages that a lockfile left none of are a reason.
    fn judge(&self, ended: Ended) -> Result<Ended> {
        let missing = self.missing.join(", ");
        judge(ended).map_err(|error| match exit::code(&error) {
            exit::REJECTED if !missing.is_empty() => {
                error.context(format!("no repository has what the lockfile pins: {missing}"))
            }
            _ => error,
        })
    }

    fn lock(&self) -> Result<File> {
        lock(&self.cache)
    }

    /// Links the packages of the cache and copies the metadata, so that what other composes do
    /// there is nothing to this one, and what this one does is nothing to them.
    fn take_snapshot(&self) -> Result<()> {
        copy_tree(&self.cache, &self.snapshot)
            .with_context(|| format!("linking what this compose needs of {}", self.cache.display()))
    }

    /// The files of `packages`, which are in the snapshot or in a local repository.
    fn locate(&self, packages: &[Planned]) -> Result<Vec<Option<PathBuf>>> {
        let names: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
        let available = self.available(false, &Vec::from_iter(names))?;
        let mut directories: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        for section in &self.known {
            directories.insert(section.id.clone(), self.local(section, |key| key == "baseurl"));
        }
        for entry in fs::read_dir(&self.snapshot)? {
            let entry = entry?;
            // ID-HASH
            if let Some((repository, _)) = entry.file_name().to_string_lossy().rsplit_once('-') {
                directories.entry(repository.to_owned()).or_default().push(entry.path().join("packages"));
            }
        }
        let mut files = Vec::new();
        for package in packages {
            let is = |other: &&Available| {
                let same = other.name == package.name && other.arch == package.arch;
                same && other.evr == package.evr && other.repository == package.repository
            };
            let mut found = Vec::new();
            for location in available.iter().filter(is).map(|package| Path::new(&package.location)) {
                // The cache has no directories.
                let places = [Some(location), location.file_name().map(Path::new)].into_iter().flatten();
                for directory in directories.get(&package.repository).into_iter().flatten() {
                    found.extend(places.clone().map(|place| directory.join(place)).find(|path| path.is_file()));
                }
            }
            files.push(only(found)?);
        }
        Ok(files)
    }
}

/// The one of `paths`, or any where all have the same content: a repository may have been at another address.
fn only(mut paths: Vec<PathBuf>) -> Result<Option<PathBuf>> {
    let Some(first) = paths.pop() else { return Ok(None) };
    for other in paths {
        if lockfile::digest(&other)? != lockfile::digest(&first)? {
            return Ok(None);
        }
    }
    Ok(Some(first))
}

/// Notes that a file of the cache was used now, whatever the mount's options say; dnf remembers its time of change.
fn note_use(path: &Path) {
    let now = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    };
    if let Err(error) = utimensat(CWD, path, &now, AtFlags::empty()) {
        tracing::debug!("noting the use of {}: {error}", path.display());
    }
}

/// Waits until no other compose works in `cache`: dnf's own locks name processes, which mean
/// nothing in another namespace.
fn lock(cache: &Path) -> Result<File> {
    let path = cache.join(LOCK);
    let lock = File::create(&path).with_context(|| format!("making {}", path.display()))?;
    if lock.try_lock().is_err() {
        tracing::info!("waiting for another compose, which works in {}", cache.display());
        while lock.try_lock().is_err() {
            stop::check()?;
            thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(lock)
}

/// Removes packages from the cache directory, those that were not used for longest first, until
/// the rest of it, metadata too, takes at most `bytes`. Metadata goes last: that of repositories that
/// were not used for longest.
///
/// # Errors
/// When files cannot be listed or removed.
pub fn bound_cache(cache: &Path, bytes: u64) -> Result<()> {
    let cache = cache.join("dnf");
    if !cache.is_dir() {
        return Ok(());
    }
    let _lock = lock(&cache)?;
    let (mut files, mut left) = (Vec::new(), 0);
    find_files(&cache, &mut |path| {
        if let Ok(meta) = path.symlink_metadata() {
            left += meta.len();
            let metadata = path.extension() != Some(OsStr::new("rpm"));
            files.push((metadata, meta.atime(), meta.atime_nsec(), path.to_owned(), meta.len()));
        }
    })?;
    files.retain(|(.., path, _)| path.file_name() != Some(OsStr::new(LOCK)));
    files.sort();
    for (.., path, size) in files {
        if left <= bytes {
            break;
        }
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        left -= size;
        tracing::info!("removed {} from the cache, which may take {bytes} bytes", path.display());
    }
    Ok(())
}

/// Makes `to` like `from`: packages are links, all else are copies.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_tree(&path, &target)?;
        } else if path.extension() == Some(OsStr::new("rpm")) {
            fs::hard_link(&path, &target)?;
        } else if entry.file_type()?.is_file() {
            fs::copy(&path, &target)?;
        }
    }
    Ok(())
}

fn find_files(directory: &Path, found: &mut dyn FnMut(&Path)) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() { find_files(&entry.path(), found)? } else { found(&entry.path()) }
    }
    Ok(())
}

/// Turns dnf's end into ours: what is wrong, and whether trying again can help.
fn judge(ended: Ended) -> Result<Ended> {
    ended.had_what_it_needs("dnf")?;
    if let Some(line) = ended.find(&SCRIPTLET) {
        reject!("a package's scriptlet failed: {line}; what it said is among the last lines:{}", ended.tail());
    }
    if let Some(line) = ended.find(&["bwrap: "]).filter(|_| !ended.status.success()) {
        match line.contains("execvp") {
            true => reject!("dnf cannot be started: {line}; is it installed?"),
            false => reject!("bubblewrap cannot make a sandbox here: {line}; docs/compose.md says what it needs"),
        }
    }
    let rejected = REJECTED.iter().find_map(|text| ended.find(&[text]));
    if let Some(line) = rejected.filter(|line| line.contains("using root")) {
        reject!("{line}: the file's owner would silently be wrong; add the package that makes this user or group");
    }
    if ended.status.success() {
        return Ok(ended);
    }
    if let Some(line) = ended.find(&["more space needed on the"]) {
        bail!("no space left where the tree is made, in the cache directory: {}", line.trim());
    }
    if let Some(line) = ended.find(&RETRY) {
        bail!("dnf could not get the packages: {line}; its last lines:{}", ended.tail());
    }
    if let Some(line) = rejected {
        reject!("dnf cannot install the packages: {line}; its last lines:{}", ended.tail());
    }
    ended.success("dnf")
}
