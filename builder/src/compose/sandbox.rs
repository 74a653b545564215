//! Programs that work on the tree run under bubblewrap: own mounts, processes and
//! IPC, nothing of the host writable but what they are given, and they die with us.

use std::path::Path;
use std::process::Command;

/// What a sandboxed program may do beyond reading the host.
pub struct Sandbox<'a> {
    /// Host directories that it may write.
    pub writable: &'a [&'a Path],
    /// Whether it has the host's network.
    pub network: bool,
}

impl Sandbox<'_> {
    /// A command that sees the host read-only, and `root` writable with /dev and
    /// /proc in it, for a program that enters it by chroot (as rpm does for scriptlets).
    pub fn outside(&self, root: &Path) -> Command {
        let mut command = self.base();
        command.args(["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]);
        for path in self.writable.iter().chain([&root]) {
            command.arg("--bind").args([path, path]);
        }
        if self.network {
            // Name resolution may lead through /run (systemd-resolved).
            command.args(["--ro-bind-try", "/run", "/run"]);
        }
        command.arg("--dev").arg(root.join("dev"));
        command.arg("--proc").arg(root.join("proc"));
        for scratch in ["run", "tmp"] {
            command.arg("--tmpfs").arg(root.join(scratch));
        }
        command
    }

    /// A command whose `/` is `root`, writable.
    pub fn inside(&self, root: &Path) -> Command {
        let mut command = self.base();
        command.arg("--bind").arg(root).arg("/");
        command.args(["--dev", "/dev", "--proc", "/proc", "--tmpfs", "/run", "--tmpfs", "/tmp", "--chdir", "/"]);
        for path in self.writable {
            command.arg("--bind").args([path, path]);
        }
        command.env_clear().envs([
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
            ("LC_ALL", "C.UTF-8"),
            ("container", "bwrap-osbuild"),
        ]);
        command
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
