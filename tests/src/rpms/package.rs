//! A package as the fixtures describe it, and how it becomes an RPM file. The
//! only place that knows the `rpm` crate.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rpm::{BuildConfig, CompressionWithLevel, Dependency, FileOptions, FileOptionsBuilder, PackageBuilder, Scriptlet};

/// Seconds since the epoch: build time of all packages, and the newest that a
/// file in them can be. Fixed, for the same debs must give the same RPMs.
pub const SOURCE_DATE_EPOCH: u32 = 1_750_000_000;

/// One RPM to be.
#[derive(Debug, Default)]
pub struct Package {
    /// Name, as in `rpm -q`.
    pub name: String,
    /// Epoch, version and release.
    pub evr: Evr,
    /// RPM's name of the architecture, such as `x86_64` or `noarch`.
    pub arch: String,
    /// One line.
    pub summary: String,
    /// Capabilities that must be there; rich ones, such as `(a or b)`, too.
    pub requires: Vec<Dependency>,
    /// Capabilities that should be there too.
    pub recommends: Vec<Dependency>,
    /// Capabilities beside the package's own name.
    pub provides: Vec<Dependency>,
    /// Everything in the payload, in any order.
    pub files: Vec<File>,
    /// What rpm runs at which moment.
    pub scripts: Vec<Script>,
}

/// Epoch, version and release of a package.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Evr {
    /// 0 where there is none.
    pub epoch: u32,
    /// Without a dash.
    pub version: String,
    /// Without a dash.
    pub release: String,
}

impl Evr {
    /// Reads a Debian version, `[EPOCH:]UPSTREAM[-REVISION]`. What RPM does not
    /// allow in a version becomes a dot; rpm orders tildes and digits as dpkg does.
    pub fn from_debian(version: &str) -> Self {
        let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
        let (version, release) = rest.rsplit_once('-').unwrap_or((rest, "1"));
        let allowed = |part: &str| part.replace(|c: char| !c.is_ascii_alphanumeric() && !"._+~".contains(c), ".");
        Self { epoch: epoch.parse().unwrap_or(0), version: allowed(version), release: allowed(release) }
    }

    fn of_dependency(&self) -> String {
        format!("{}:{}-{}", self.epoch, self.version, self.release)
    }
}

/// A dependency on exactly, or on at least, a Debian version of a package.
pub fn versioned(name: &str, relation: &str, version: &str) -> Dependency {
    let mut evr = Evr::from_debian(version);
    // A dependency without a revision is met by any release of that version.
    if !version.contains('-') {
        evr.release.clear();
    }
    let text = evr.of_dependency();
    let text = text.trim_end_matches('-');
    match relation {
        "=" => Dependency::eq(name, text),
        ">=" => Dependency::greater_eq(name, text),
        // Upper bounds only say what Debian's own release managers need.
        _ => Dependency::any(name),
    }
}

/// One entry of a payload.
#[derive(Debug, Clone)]
pub struct File {
    /// Absolute, after the merge of /bin, /sbin and /lib into /usr.
    pub path: String,
    /// By name: rpm looks it up in the tree's own `/etc/passwd`.
    pub owner: String,
    /// By name, as the owner.
    pub group: String,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u16,
    /// Seconds since the epoch.
    pub mtime: u32,
    /// What it is.
    pub kind: Kind,
}

/// What an entry is.
#[derive(Debug, Clone)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A symbolic link to this target.
    Symlink(String),
    /// A regular file.
    Regular(Regular),
}

/// A regular file of a payload.
#[derive(Debug, Clone, Default)]
pub struct Regular {
    /// All of its bytes.
    pub content: Vec<u8>,
    /// The same text for all names of one inode.
    pub hardlink: Option<String>,
    /// Marked `%config(noreplace)`.
    pub config: bool,
    /// File capabilities in the notation of `setcap`.
    pub caps: Option<&'static str>,
}

impl File {
    /// A directory of root's.
    pub fn directory(path: &str, mode: u16) -> Self {
        Self::roots(path, mode, Kind::Directory)
    }

    /// A symbolic link.
    pub fn symlink(path: &str, target: &str) -> Self {
        Self::roots(path, 0o777, Kind::Symlink(target.to_owned()))
    }

    /// A regular file of root's.
    pub fn regular(path: &str, mode: u16, content: impl AsRef<[u8]>) -> Self {
        let content = content.as_ref().to_vec();
        Self::roots(path, mode, Kind::Regular(Regular { content, ..Regular::default() }))
    }

    /// A `%config(noreplace)` file of root's.
    pub fn config(path: &str, mode: u16, content: &str) -> Self {
        let content = content.as_bytes().to_vec();
        Self::roots(path, mode, Kind::Regular(Regular { content, config: true, ..Regular::default() }))
    }

    /// The same entry with other owners.
    pub fn owned_by(self, owner: &str, group: &str) -> Self {
        Self { owner: owner.to_owned(), group: group.to_owned(), ..self }
    }

    fn roots(path: &str, mode: u16, kind: Kind) -> Self {
        let root = || "root".to_owned();
        Self { path: path.to_owned(), owner: root(), group: root(), mode, mtime: SOURCE_DATE_EPOCH, kind }
    }
}

/// A scriptlet.
#[derive(Debug, Clone)]
pub struct Script {
    /// When it runs.
    pub when: When,
    /// Such as `/bin/sh` or `<lua>`.
    pub interpreter: &'static str,
    /// Its text.
    pub body: String,
}

/// The moments at which rpm runs something.
#[derive(Debug, Clone)]
pub enum When {
    /// `%pre`
    Pre,
    /// `%post`
    Post,
    /// `%posttrans`
    PostTrans,
    /// `%transfiletriggerin`: once, after a transaction that added files below a path.
    FilesAdded(&'static str),
}

impl Package {
    /// Writes `NAME-VERSION-RELEASE.ARCH.rpm` into `dir`; gives its path.
    ///
    /// # Errors
    ///
    /// When the description is not one of a valid package, or on I/O errors.
    pub fn write(self, dir: &Path) -> Result<PathBuf> {
        let file_name = format!("{}-{}-{}.{}.rpm", self.name, self.evr.version, self.evr.release, self.arch);
        let path = dir.join(&file_name);
        self.write_to(&path).with_context(|| format!("writing {}", path.display()))?;
        let mtime = std::time::UNIX_EPOCH + std::time::Duration::from_secs(SOURCE_DATE_EPOCH.into());
        // createrepo_c records it.
        std::fs::File::options()
            .append(true)
            .open(&path)
            .and_then(|file| file.set_modified(mtime))
            .with_context(|| format!("setting the time of {}", path.display()))?;
        Ok(path)
    }

    fn write_to(self, path: &Path) -> Result<()> {
        let license = "LicenseRef-See-Copyright";
        let mut builder = PackageBuilder::new(&self.name, &self.evr.version, license, &self.arch, &self.summary);
        builder
            // Speed over size: the files live only as long as a test directory.
            .using_config(BuildConfig::v4().compression(CompressionWithLevel::Gzip(1)).source_date(SOURCE_DATE_EPOCH))
            .release(self.evr.release.as_str())
            .build_host("localhost")
            .vendor("oscontainer fixtures");
        if self.evr.epoch > 0 {
            builder.epoch(self.evr.epoch);
        }
        for dependency in self.requires {
            builder.requires(dependency);
        }
        for dependency in self.recommends {
            builder.recommends(dependency);
        }
        for dependency in self.provides {
            builder.provides(dependency);
        }
        for script in self.scripts {
            add_script(&mut builder, script);
        }
        for file in self.files {
            let path = file.path.clone();
            add_file(&mut builder, file).with_context(|| format!("adding {path}"))?;
        }
        builder.build()?.write_file(path)?;
        Ok(())
    }
}

fn add_script(builder: &mut PackageBuilder, script: Script) {
    let scriptlet = Scriptlet::new(script.body).prog(vec![script.interpreter]);
    if script.interpreter == "<lua>" {
        // The crate takes every interpreter for a program that some package
        // has; rpm runs this one itself.
        builder.provides(Dependency::any(script.interpreter));
    }
    match script.when {
        When::Pre => builder.pre_install_script(scriptlet),
        When::Post => builder.post_install_script(scriptlet),
        When::PostTrans => builder.post_trans_script(scriptlet),
        When::FilesAdded(below) => builder.trans_file_trigger_in(below, None, scriptlet),
    };
}

fn add_file(builder: &mut PackageBuilder, file: File) -> Result<()> {
    let described = |options: FileOptionsBuilder| {
        let options = options.user(file.owner).group(file.group).permissions(file.mode);
        with_marks(options.modified_at(file.mtime.into()), &file.path)
    };
    match file.kind {
        Kind::Directory => builder.with_dir_entry(described(FileOptions::dir(&file.path)))?,
        Kind::Symlink(target) => builder.with_symlink(described(FileOptions::symlink(&file.path, target)))?,
        Kind::Regular(regular) => {
            let mut options = described(FileOptions::new(&file.path));
            if regular.config {
                options = options.config().noreplace();
            }
            if let Some(identity) = regular.hardlink {
                options = options.hardlink(identity);
            }
            if let Some(caps) = regular.caps {
                options = options.caps(caps)?;
            }
            builder.with_file_contents(regular.content, options)?
        }
    };
    Ok(())
}

/// `%doc` and `%lang(…)`, which rpmbuild derives from the path too: they are
/// what `tsflags=nodocs` and `install_langs` go by.
fn with_marks(options: FileOptionsBuilder, path: &str) -> FileOptionsBuilder {
    if ["/usr/share/doc/", "/usr/share/man/", "/usr/share/info/"].iter().any(|docs| path.starts_with(docs)) {
        return options.doc();
    }
    match path.strip_prefix("/usr/share/locale/").and_then(|rest| rest.split_once('/')) {
        Some((language, _)) => options.language(language),
        None => options,
    }
}
