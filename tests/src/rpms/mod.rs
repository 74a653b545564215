//! A small, real RPM repository made of Debian packages: what the demo and the
//! tests compose from where there is no mirror of an RPM distribution.
//!
//! debs (apt) → [`package::Package`] → RPM files → createrepo_c. Debian's
//! maintainer scripts are dropped; the few that matter come back as scriptlets.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};
use oscontainer_artifact::digest::Digest;
use rpm::Dependency;

pub mod deb;
pub mod package;
pub mod selinux;
pub mod synthetic;

use deb::Deb;
use package::{Kind, Package, SOURCE_DATE_EPOCH, Script, When};

/// The Debian packages of the demo; what they need comes with them.
pub const DEMO: [&str; 12] = [
    "bash",
    "coreutils",
    "findutils",
    "grep",
    "gzip",
    "iputils-ping",
    "libc-bin",
    "mawk",
    "passwd",
    "sed",
    "tar",
    "util-linux",
];

/// What a host that boots needs besides: a kernel, an initramfs, an init, a login.
pub const HOST: [&str; 13] = [
    "dbus",
    "dracut-core",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "linux-image-cloud-amd64",
    "login",
    "ostree-boot",
    "procps",
    "rpm",
    "systemd",
    "systemd-sysv",
    "udev",
];

/// What makes a host as large as real ones, some 250 packages: for measuring.
pub const LARGE: [&str; 38] = [
    "bash-completion",
    "btrfs-progs",
    "bzip2",
    "ca-certificates",
    "chrony",
    "cifs-utils",
    "crun",
    "cryptsetup-bin",
    "curl",
    "dmidecode",
    "dosfstools",
    "ethtool",
    "file",
    "gdisk",
    "git",
    "ipset",
    "iptables",
    "jq",
    "less",
    "lsof",
    "lvm2",
    "nfs-common",
    "nftables",
    "openssh-server",
    "parted",
    "pciutils",
    "psmisc",
    "python3",
    "rsync",
    "socat",
    "strace",
    "sudo",
    "tcpdump",
    "tmux",
    "usbutils",
    "vim-tiny",
    "wget",
    "xfsprogs",
];

/// Converted packages that have a newer release in [`Variant::Update`], beside
/// `demo-agent`.
pub const UPDATED: [&str; 2] = ["findutils", "sed"];

/// Those that have one in [`Variant::LargeUpdate`]; none of them is in the initramfs.
pub const LARGE_UPDATED: [&str; 18] = [
    "chrony",
    "curl",
    "jq",
    "libarchive13",
    "libexpat1",
    "libgnutls30",
    "libsqlite3-0",
    "libxml2",
    "lsof",
    "openssh-server",
    "openssl",
    "rsync",
    "strace",
    "sudo",
    "tcpdump",
    "tmux",
    "vim-tiny",
    "wget",
];

/// Which repository to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// The demo's packages.
    Demo,
    /// The same with three newer packages: [`UPDATED`] and `demo-agent`.
    Update,
    /// The demo's packages and [`HOST`].
    Host,
    /// The host's packages and [`LARGE`].
    Large,
    /// The same with newer ones of [`LARGE_UPDATED`].
    LargeUpdate,
    /// Only packages that a compose must refuse, to be used beside the demo's.
    Faulty,
    /// Only a SELinux policy.
    Selinux,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Self::Demo => "demo",
            Self::Update => "update",
            Self::Host => "host",
            Self::Large => "large",
            Self::LargeUpdate => "large-update",
            Self::Faulty => "faulty",
            Self::Selinux => "selinux",
        }
    }

    /// The converted packages that are newer in it.
    fn updated(self) -> &'static [&'static str] {
        match self {
            Self::Update => &UPDATED,
            Self::LargeUpdate => &LARGE_UPDATED,
            _ => &[],
        }
    }
}

/// The demo's repository below the target directory, made when it is not there.
pub fn demo_repo() -> PathBuf {
    fixture(Variant::Demo)
}

/// The repository with the three newer packages.
pub fn update_repo() -> PathBuf {
    fixture(Variant::Update)
}

/// The repository of a host that boots.
pub fn host_repo() -> PathBuf {
    fixture(Variant::Host)
}

/// The repository of broken packages.
pub fn faulty_repo() -> PathBuf {
    fixture(Variant::Faulty)
}

/// The repository of the SELinux policy.
pub fn selinux_repo() -> PathBuf {
    fixture(Variant::Selinux)
}

fn fixture(variant: Variant) -> PathBuf {
    let fixtures = crate::target_dir().join("fixtures");
    let output = fixtures.join("rpms").join(variant.name());
    make(variant, &output, &fixtures.join("debs")).unwrap_or_else(|e| panic!("{e:?}"));
    output
}

/// Makes the repository at `output`, or keeps one that this very code made.
/// Processes that ask for it at the same time wait for the first.
///
/// # Errors
///
/// When a package cannot be downloaded or converted, or on I/O errors. What was
/// at `output` is then still there.
pub fn make(variant: Variant, output: &Path, cache: &Path) -> Result<()> {
    let parent = output.parent().context("finding the directory of the repository")?;
    fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let lock = File::create(parent.join(".lock")).context("creating the lock of the fixtures")?;
    lock.lock().context("waiting for the lock of the fixtures")?;

    let stamp = output.join("made-by");
    let made_by = made_by(variant);
    if fs::read_to_string(&stamp).is_ok_and(|found| found == made_by) {
        return Ok(());
    }
    let staging = tempfile::tempdir_in(parent).context("creating a directory for the repository")?;
    let mut packages = match variant {
        Variant::Faulty => synthetic::faulty().into_iter().map(Source::Described).collect(),
        Variant::Selinux => vec![Source::Described(selinux::policy(cache)?)],
        Variant::Demo | Variant::Update => sources(&DEMO, cache)?,
        Variant::Host => sources(&[&DEMO[..], &HOST].concat(), cache)?,
        Variant::Large | Variant::LargeUpdate => sources(&[&DEMO[..], &HOST, &LARGE].concat(), cache)?,
    };
    if variant == Variant::Update {
        packages.retain(|source| source.name() != "demo-agent");
        packages.push(Source::Described(synthetic::agent("2")));
    }
    write_all(packages, variant, cache, staging.path())?;
    index(staging.path())?;
    fs::write(staging.path().join("made-by"), made_by).context("writing the stamp of the repository")?;

    let staging = staging.keep();
    if output.exists() {
        fs::remove_dir_all(output).with_context(|| format!("removing the old {}", output.display()))?;
    }
    // A temporary directory is private; a repository is for everyone to read.
    fs::set_permissions(&staging, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .and_then(|()| fs::rename(&staging, output))
        .with_context(|| format!("moving the repository to {}", output.display()))
}

/// Writes `NAME.repo` for the repository at `baseurl`.
///
/// # Errors
///
/// When it cannot be written.
pub fn write_repo_file(file: &Path, name: &str, repository: &Path) -> Result<()> {
    let baseurl = fs::canonicalize(repository).with_context(|| format!("finding {}", repository.display()))?;
    let text = format!("[{name}]\nname={name}\nbaseurl=file://{}\ngpgcheck=0\nenabled=1\n", baseurl.display());
    fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}

/// The code that decides what is in a repository, as a digest.
fn made_by(variant: Variant) -> String {
    let sources = concat!(
        include_str!("mod.rs"),
        include_str!("deb.rs"),
        include_str!("package.rs"),
        include_str!("selinux.rs"),
        include_str!("synthetic.rs"),
        include_str!("altfiles.c")
    );
    format!("{} {}\n", variant.name(), Digest::of(sources.as_bytes()))
}

enum Source {
    Deb(Deb),
    Described(Package),
}

impl Source {
    fn name(&self) -> &str {
        match self {
            Self::Deb(deb) => deb.name(),
            Self::Described(package) => &package.name,
        }
    }
}

fn sources(names: &[&str], cache: &Path) -> Result<Vec<Source>> {
    let debs = deb::closure(names, cache)?;
    deb::download(&debs, cache)?;
    let described = synthetic::base(&deb::architecture()?)?.into_iter().map(Source::Described);
    Ok(described.chain(debs.into_iter().map(Source::Deb)).collect())
}

/// Converts on all cores: packages do not depend on one another here.
fn write_all(packages: Vec<Source>, variant: Variant, cache: &Path, output: &Path) -> Result<()> {
    let queue = Mutex::new(VecDeque::from(packages));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || -> Result<()> {
        while let Some(source) = next() {
            let mut package = match source {
                Source::Described(package) => package,
                Source::Deb(deb) => deb.convert(cache)?,
            };
            finish(&mut package);
            if variant.updated().contains(&package.name.as_str()) {
                update(&mut package);
            }
            package.write(output)?;
        }
        Ok(())
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// What Debian's maintainer scripts and essential packages would have done.
fn finish(package: &mut Package) {
    match package.name.as_str() {
        "bash" => {
            // Debian's sh is dash, chosen by a diversion.
            package.files.push(package::File::symlink("/usr/bin/sh", "bash"));
            package.provides.extend(["/bin/sh", "/bin/bash"].map(Dependency::any));
        }
        "mawk" => package.files.push(package::File::symlink("/usr/bin/awk", "mawk")),
        "libc-bin" => package.scripts.push(Script {
            when: When::FilesAdded("/usr/lib"),
            interpreter: "/bin/sh",
            body: "/sbin/ldconfig\n".to_owned(),
        }),
        // The accounts that its maintainer scripts would have made.
        "systemd" => package.scripts.push(Script {
            when: When::FilesAdded("/usr/lib/sysusers.d"),
            interpreter: "/bin/sh",
            body: "systemd-sysusers\n".to_owned(),
        }),
        "filesystem" | "setup" => return,
        _ => {}
    }
    // A directory has one owner; rpm minds when two disagree about its mode.
    let owned = |path: &str| synthetic::owns_directory(path);
    package.files.retain(|file| !(matches!(file.kind, Kind::Directory) && owned(&file.path)));
}

/// A newer release with other bytes in its programs and libraries, which still run: an
/// ELF file may be followed by anything.
fn update(package: &mut Package) {
    package.evr.release.push_str(".1");
    for file in &mut package.files {
        if let Kind::Regular(regular) = &mut file.kind
            && regular.content.starts_with(b"\x7fELF")
        {
            regular.content.extend_from_slice(b"\nnewer\n");
        }
    }
}

fn index(repository: &Path) -> Result<()> {
    let revision = SOURCE_DATE_EPOCH.to_string();
    let mut command = Command::new("createrepo_c");
    command.args(["--quiet", "--no-database", "--set-timestamp-to-revision", "--revision", &revision]);
    deb::bytes(command.arg(repository)).context("indexing the repository")?;
    Ok(())
}
