//! Programs that work on the tree run under bubblewrap: own mounts, processes and
//! IPC, nothing of the host writable but what they are given, and they die with us.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use anyhow::Result;

/// What a sandboxed program may do beyond reading the host.
pub struct Sandbox<'a> {
    /// Host directories that it may write, and where it sees them.
    pub writable: &'a [(&'a Path, &'a Path)],
    /// Whether it has the host's network.
    pub network: bool,
}

impl Sandbox<'_> {
    /// A command that sees the host read-only, `readable` wherever it is, and `root` writable
    /// with /dev and /proc in it, for a program that enters it by chroot (as rpm does for
    /// scriptlets).
    pub fn outside(&self, root: &Path, readable: &[&Path]) -> Command {
        let mut command = self.base();
        command.args(["--ro-bind", "/", "/", "--dev", "/dev", "--tmpfs", "/tmp"]);
        proc(&mut command, Path::new("/proc"));
        // The host's caches are of no use here, and mount points can be made in this one.
        command.args(["--tmpfs", "/var/cache"]);
        for path in readable.iter().filter(|path| path.parent().is_some()) {
            command.arg("--ro-bind-try").args([path, path]);
        }
        for (from, to) in [(root, root)].iter().chain(self.writable) {
            command.arg("--bind").args([from, to]);
        }
        if self.network {
            // Name resolution may lead through /run (systemd-resolved).
            command.args(["--ro-bind-try", "/run", "/run"]);
        }
        command.arg("--dev").arg(root.join("dev"));
        proc(&mut command, &root.join("proc"));
        for scratch in ["run", "tmp"] {
            command.arg("--tmpfs").arg(root.join(scratch));
        }
        command
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
        command.arg("--ro-bind").args([&root.join("usr"), Path::new("/usr")]);
        command.arg("--ro-bind").args([&root.join("usr/etc"), Path::new("/etc")]);
        for entry in fs::read_dir(root)? {
            let entry = entry?;
            // bin, lib and their like
            if let Ok(target) = fs::read_link(entry.path())
                && target.starts_with("usr")
            {
                command.arg("--symlink").arg(target).arg(Path::new("/").join(entry.file_name()));
            }
        }
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
        let mut command = Command::new("bwrap");
        command.args(["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--new-session"]);
        if !self.network {
            command.arg("--unshare-net");
        }
        command
    }
}

/// That of a program in the tree.
fn environment(command: &mut Command) {
    command.env_clear().envs([
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("LC_ALL", "C.UTF-8"),
        ("container", "bwrap-osbuild"),
    ]);
}

/// Whether the kernel lets us mount /proc: it does not where a container has masked
/// paths of its own one, for a new one would show them.
static NEW_PROC: LazyLock<bool> = LazyLock::new(|| {
    let mut command = Command::new("bwrap");
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
