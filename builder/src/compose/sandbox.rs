//! Programs that work on the tree run under bubblewrap: own mounts, processes and
//! IPC, nothing of the host writable but what they are given, and they die with us.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use anyhow::Result;

/// What rpm and scriptlets need of root's capabilities (capabilities(7)). Others lead out of a chroot.
const CAPABILITIES: [&str; 10] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    // Where device nodes are made, none can be opened: bubblewrap mounts with nodev.
    "CAP_MKNOD",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// Where programs and libraries lie besides /usr, on systems where these are no links into it.
const PROGRAMS: [&str; 6] = ["bin", "lib", "lib32", "lib64", "libx32", "sbin"];
/// What dnf, rpm and their libraries read of the host's /etc in any case: no secrets.
const ETC: [&str; 10] = [
    "alternatives",
    "crypto-policies",
    "group",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "nsswitch.conf",
    "passwd",
    "rpm",
];
/// What they read besides where they have the network: keys of certificates may be there.
const ETC_OF_NETWORK: [&str; 12] = [
    "ca-certificates",
    "dnf",
    "gai.conf",
    "gnutls",
    "host.conf",
    "hosts",
    "os-release",
    "pki",
    "protocols",
    "resolv.conf",
    "services",
    "ssl",
];
/// systemd-resolved's directory.
const RESOLVED: &str = "/run/systemd/resolve";
/// The variables by which libcurl finds proxies (curl(1)), in lower case.
const PROXIES: [&str; 5] = ["all_proxy", "ftp_proxy", "http_proxy", "https_proxy", "no_proxy"];

/// What a sandboxed program may do beyond reading the host.
pub struct Sandbox<'a> {
    /// Host directories that it may write, and where it sees them.
    pub writable: &'a [(&'a Path, &'a Path)],
    /// Whether it has the host's network.
    pub network: bool,
}

impl Sandbox<'_> {
    /// A command that sees the host's programs and what they need of its configuration, read-only;
    /// `readable` wherever it is; and `root` writable with /dev and /proc in it, for a program that
    /// enters it by chroot (as rpm does for scriptlets). A chroot keeps no scriptlet of root's from
    /// what is around it: so nothing else of the host is, and nothing secret where there is no network.
    /// With the network no scriptlet may run.
    ///
    /// # Errors
    /// When the host's root directory cannot be read.
    pub fn outside(&self, root: &Path, readable: &[&Path]) -> Result<Command> {
        let mut command = self.base();
        environment(&mut command);
        programs(&mut command, Path::new("/"), Path::new("/"))?;
        let of_network: &[&str] = if self.network { &ETC_OF_NETWORK } else { &[] };
        for name in ETC.iter().chain(of_network) {
            let path = Path::new("/etc").join(name);
            command.arg("--ro-bind-try").args([&path, &path]);
        }
        command.args(["--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/var/cache", "--dir", "/var/tmp"]);
        proc(&mut command, Path::new("/proc"));
        if self.network {
            // Name resolution may lead there (systemd-resolved).
            command.args(["--ro-bind-try", RESOLVED, RESOLVED]);
            let passed = PROXIES.iter().flat_map(|name| [(*name).to_owned(), name.to_ascii_uppercase()]);
            command.envs(passed.filter_map(|name| Some((name.clone(), std::env::var_os(name)?))));
        }
        for path in readable.iter().filter(|path| path.parent().is_some()) {
            command.arg("--ro-bind-try").args([path, path]);
        }
        for (from, to) in [(root, root)].iter().chain(self.writable) {
            command.arg("--bind").args([from, to]);
        }
        command.arg("--dev").arg(root.join("dev"));
        proc(&mut command, &root.join("proc"));
        for scratch in ["run", "tmp"] {
            command.arg("--tmpfs").arg(root.join(scratch));
        }
        Ok(command)
    }

    /// A command that sees the host read-only, `readable` wherever it is, and works in
    /// `root`, writable, which is just a directory to it.
    pub fn beside(&self, root: &Path, readable: &[&Path]) -> Command {
        let mut command = self.base();
        command.args(["--ro-bind", "/", "/", "--dev", "/dev", "--tmpfs", "/tmp"]);
        proc(&mut command, Path::new("/proc"));
        for path in readable {
            command.arg("--ro-bind").args([path, path]);
        }
        for (from, to) in [(root, root)].iter().chain(self.writable) {
            command.arg("--bind").args([from, to]);
        }
        command.arg("--chdir").arg(root);
        command
    }

    /// A command that sees the arranged tree at `root`, read-only, as a system that was
    /// booted from it: with its own /etc, and all else but /usr empty.
    ///
    /// # Errors
    /// When the tree cannot be read.
    pub fn arranged(&self, root: &Path) -> Result<Command> {
        let mut command = self.base();
        programs(&mut command, root, Path::new("/"))?;
        command.arg("--ro-bind").args([&root.join("usr/etc"), Path::new("/etc")]);
        command.args(["--dev", "/dev", "--tmpfs", "/run", "--tmpfs", "/tmp", "--tmpfs", "/var", "--dir", "/var/tmp"]);
        command.args(["--dir", "/sys", "--dir", "/root", "--chdir", "/"]);
        proc(&mut command, Path::new("/proc"));
        self.bind(&mut command);
        environment(&mut command);
        Ok(command)
    }

    /// A command whose `/` is `root`, writable.
    pub fn inside(&self, root: &Path) -> Command {
        let mut command = self.base();
        command.arg("--bind").arg(root).arg("/");
        command.args(["--dev", "/dev", "--tmpfs", "/run", "--tmpfs", "/tmp", "--chdir", "/"]);
        proc(&mut command, Path::new("/proc"));
        self.bind(&mut command);
        environment(&mut command);
        command
    }

    fn bind(&self, command: &mut Command) {
        for (from, to) in self.writable {
            command.arg("--bind").args([from, to]);
        }
    }

    fn base(&self) -> Command {
        let mut command = Command::new(&*BUBBLEWRAP);
        command.args(["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--new-session"]);
        command.args(["--hostname", "localhost", "--cap-drop", "ALL"]);
        command.args(CAPABILITIES.iter().flat_map(|name| ["--cap-add", name]));
        if !self.network {
            command.arg("--unshare-net");
        }
        command
    }
}

/// That of a program in the tree, or of one that starts such: nothing of the caller's, which could
/// change what it does, or be a secret.
fn environment(command: &mut Command) {
    command.env_clear().envs([
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("LC_ALL", "C.UTF-8"),
        ("SYSTEMD_OFFLINE", "1"),
        ("container", "bwrap-osbuild"),
    ]);
}

/// Lets a command see the /usr of `from`, and the links to it (bin, lib and their like) or what
/// stands in their place, at `to`.
fn programs(command: &mut Command, from: &Path, to: &Path) -> Result<()> {
    command.arg("--ro-bind").args([from.join("usr"), to.join("usr")]);
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (name, path) = (entry.file_name(), entry.path());
        match fs::read_link(&path) {
            Ok(target) if target.starts_with("usr") || target.starts_with("/usr") => {
                command.arg("--symlink").arg(target).arg(to.join(name));
            }
            Err(_) if PROGRAMS.iter().any(|known| name == *known) => {
                command.arg("--ro-bind").args([path, to.join(name)]);
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where bubblewrap is: by the caller's PATH, which what it runs does not have.
static BUBBLEWRAP: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join("bwrap")).find(|program| program.is_file());
    found.unwrap_or_else(|| PathBuf::from("bwrap"))
});

/// Whether the kernel lets us mount /proc: it does not where a container has masked
/// paths of its own one, for a new one would show them.
static NEW_PROC: LazyLock<bool> = LazyLock::new(|| {
    let mut command = Command::new(&*BUBBLEWRAP);
    command.args(["--unshare-pid", "--ro-bind", "/", "/", "--proc", "/proc", "true"]);
    let tried = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let new = tried.is_ok_and(|status| status.success());
    let which = if new { "a /proc of their own" } else { "this container's /proc, read-only" };
    tracing::info!("scriptlets see {which}");
    new
});

fn proc(command: &mut Command, to: &Path) {
    if *NEW_PROC {
        command.arg("--proc").arg(to);
    } else {
        command.args(["--ro-bind", "/proc"]).arg(to);
    }
}
