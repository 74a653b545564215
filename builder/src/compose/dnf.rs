//! The `dnf` engine: `dnf --installroot` installs, the rest is ours.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use oscontainer_program::reject;

use super::process::{self, Ended};
use super::sandbox::Sandbox;
use crate::treefile::Flattened;

/// What dnf and rpm say when the input is wrong, not the weather; the most telling first.
const REJECTED: [&str; 8] = [
    "does not exist - using root",
    "No match for argument",
    "Unable to find a match",
    "nothing provides",
    "conflicts with",
    "There are no enabled repositories",
    "Unknown repo",
    "conflicting requests",
];
/// Lines of rpm about a scriptlet that failed; dnf itself may go on after some.
const SCRIPTLET: [&str; 2] = ["scriptlet failed, exit status", "scriptlet failed, signal"];
/// Lines that say that trying again may help.
const RETRY: [&str; 5] =
    ["Failed to download metadata", "Cannot download", "Curl error", "No space left", "Error downloading packages"];

/// Where dnf works for one compose.
pub struct Dnf<'a> {
    flattened: &'a Flattened,
    /// Configuration and private HOME; goes with the compose.
    work: PathBuf,
    /// Metadata and packages; stays.
    cache: PathBuf,
    root: PathBuf,
    /// `SOURCE_DATE_EPOCH` for rpm: what it writes as the time of installation.
    epoch: u64,
}

impl<'a> Dnf<'a> {
    /// Writes the configuration below `work`, for an installation into `root`.
    ///
    /// # Errors
    /// When a repository of the treefile has no `.repo` file, or files cannot be written.
    pub fn prepare(flattened: &'a Flattened, work: &Path, cache: &Path, root: &Path, epoch: u64) -> Result<Self> {
        let dnf = Self { flattened, work: work.to_owned(), cache: cache.join("dnf"), root: root.to_owned(), epoch };
        for dir in ["home", "repos", "vars"] {
            fs::create_dir_all(dnf.work.join(dir)).context("making dnf's directories")?;
        }
        fs::create_dir_all(&dnf.cache).with_context(|| format!("making {}", dnf.cache.display()))?;
        // Debian's rpm keeps its database in the home directory, and rpm may not
        // touch the mode of what is mounted.
        let macros = "%_dbpath /usr/share/rpm\n%_netsharedpath /dev:/proc:/sys\n%_install_langs ";
        let langs = flattened.treefile.install_langs.as_ref().map_or("all".to_owned(), |langs| langs.join(":"));
        fs::write(dnf.work.join("home/.rpmmacros"), format!("{macros}{langs}\n"))?;
        fs::write(dnf.work.join("dnf.conf"), dnf.configuration())?;
        dnf.copy_repositories()?;
        Ok(dnf)
    }

    fn configuration(&self) -> String {
        let treefile = &self.flattened.treefile;
        let mut conf = format!(
            "[main]\ngpgcheck=1\nbest=1\nkeepcache=1\nplugins=0\ncheck_config_file_age=0\nzchunk=0\n\
             install_weak_deps={}\nreposdir={}\nvarsdir={}\n",
            treefile.recommends.unwrap_or(true),
            self.work.join("repos").display(),
            self.work.join("vars").display(),
        );
        if treefile.documentation == Some(false) {
            conf.push_str("tsflags=nodocs\n");
        }
        if let Some(exclude) = treefile.exclude_packages.as_ref().filter(|names| !names.is_empty()) {
            conf.push_str(&format!(
                "excludepkgs={}\n",
                exclude.iter().map(String::as_str).collect::<Vec<_>>().join(",")
            ));
        }
        conf
    }

    /// The `.repo` files beside the treefile, and no others.
    fn copy_repositories(&self) -> Result<()> {
        let dir = &self.flattened.external.directory;
        let mut known = Vec::new();
        for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "repo") {
                let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
                known.extend(
                    text.lines().filter_map(|line| line.trim().strip_prefix('[')?.strip_suffix(']').map(str::to_owned)),
                );
                let name = path.file_name().context("a directory entry has a name")?;
                fs::write(self.work.join("repos").join(name), text)?;
            }
        }
        for repo in self.repositories() {
            if !known.contains(repo) {
                reject!(
                    "the treefile names the repository {repo:?}, but no .repo file in {} defines it",
                    dir.display()
                );
            }
        }
        Ok(())
    }

    fn repositories(&self) -> &[String] {
        self.flattened.treefile.repos.as_deref().unwrap_or_default()
    }

    fn command(&self, network: bool) -> Command {
        let writable = [self.work.as_path(), self.cache.as_path()];
        let mut command = Sandbox { writable: &writable, network }.outside(&self.root);
        command.arg("dnf").arg("--config").arg(self.work.join("dnf.conf"));
        command.arg("--installroot").arg(&self.root);
        // Its log and state stay where it puts them, inside the tree; they are removed there.
        let mut cache = OsString::from("--setopt=cachedir=");
        cache.push(&self.cache);
        command.arg(cache);
        if let Some(releasever) = &self.flattened.treefile.releasever {
            command.arg(format!("--releasever={releasever}"));
        } else {
            // Without one, dnf looks for a package that no repository need have.
            command.arg("--releasever=/");
        }
        command.arg("--disablerepo=*");
        command.args(self.repositories().iter().map(|repo| format!("--enablerepo={repo}")));
        command
            .env("HOME", self.work.join("home"))
            .env("LC_ALL", "C.UTF-8")
            .env("SOURCE_DATE_EPOCH", self.epoch.to_string());
        command
    }

    /// The private home directory, whose rpm macros name the database's place.
    pub fn home(&self) -> PathBuf {
        self.work.join("home")
    }

    /// Resolves the packages and logs the transaction, but does none of it.
    ///
    /// # Errors
    /// Rejected when they cannot be resolved; else worth a retry.
    pub fn show(&self) -> Result<()> {
        let mut command = self.command(true);
        command.args(["--assumeno", "install"]).args(self.flattened.treefile.packages.iter().flatten());
        let ended = process::run("dnf", &mut command)?;
        // This is how dnf says that it did as it was told.
        if ended.find(&["Operation aborted"]).is_some() { Ok(()) } else { judge(ended) }
    }

    /// Downloads the packages into the cache, with the network.
    ///
    /// # Errors
    /// Rejected when they cannot be resolved; else worth a retry.
    pub fn download(&self) -> Result<()> {
        self.install(true, &["--downloadonly"])
    }

    /// Installs what [`Dnf::download`] left in the cache, without the network.
    ///
    /// # Errors
    /// Rejected when a scriptlet fails or an owner is unknown.
    pub fn install_cached(&self) -> Result<()> {
        self.install(false, &["--cacheonly"])
    }

    fn install(&self, network: bool, options: &[&str]) -> Result<()> {
        let mut command = self.command(network);
        let packages = self.flattened.treefile.packages.iter().flatten();
        command.arg("--assumeyes").args(options).arg("install").args(packages);
        judge(process::run("dnf", &mut command)?)
    }
}

/// Turns dnf's end into ours: what is wrong, and whether trying again can help.
fn judge(ended: Ended) -> Result<()> {
    if let Some(line) = ended.find(&SCRIPTLET) {
        reject!("a package's scriptlet failed: {line}; what it said is among the last lines:{}", ended.tail());
    }
    let rejected = REJECTED.iter().find_map(|text| ended.find(&[text]));
    if let Some(line) = rejected.filter(|line| line.contains("using root")) {
        reject!("{line}: the file's owner would silently be wrong; add the package that makes this user or group");
    }
    if ended.status.success() {
        return Ok(());
    }
    if let Some(line) = ended.find(&RETRY) {
        bail!("dnf could not get the packages: {line}; its last lines:{}", ended.tail());
    }
    if let Some(line) = rejected {
        reject!("dnf cannot install the packages: {line}; its last lines:{}", ended.tail());
    }
    ended.success("dnf").map(drop)
}
