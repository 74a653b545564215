//! Buildah and podman, each in a store of the test's own; buildah: as root, or as the
//! ordinary user that `make setup-test` makes. On machines with cgroups v1 and
//! without CAP_SYS_RESOURCE too.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Done, ok, run, succeeded, target_dir, tool};

/// The ordinary user: with subordinate ids, and nothing else.
pub const USER: &str = "oscontainer-test";

/// containers.conf(5): for machines with cgroups v1, and without CAP_SYS_RESOURCE.
const CONF: &str = "\
[engine]
runtime = \"runc\"
cgroup_manager = \"cgroupfs\"
events_logger = \"file\"
[containers]
default_ulimits = [\"nofile=20000:20000\", \"nproc=4096:4096\"]
";

/// The packages of [`debian_base`]: what builder/Containerfile would install.
const BASE_PACKAGES: &str = "bubblewrap,ca-certificates,dnf,libostree-1-1,rpm,sqlite3";

/// Buildah as one user.
pub struct Buildah {
    root: PathBuf,
    user: Option<&'static str>,
}

impl Buildah {
    /// With a store in `dir`, for root.
    pub fn as_root(dir: &Path) -> Self {
        Self::new(dir, None)
    }

    /// With a store in `dir`, for [`USER`], to whom the store then belongs.
    pub fn as_user(dir: &Path) -> Self {
        Self::new(dir, Some(USER))
    }

    fn new(dir: &Path, user: Option<&'static str>) -> Self {
        let root = dir.join("buildah");
        fs::create_dir_all(root.join("run")).unwrap();
        fs::write(root.join("containers.conf"), CONF).unwrap();
        let storage = ["graphroot", "runroot"].map(|key| format!("{key} = \"{}\"\n", root.join(key).display()));
        fs::write(root.join("storage.conf"), format!("[storage]\ndriver = \"vfs\"\n{}", storage.concat())).unwrap();
        if let Some(user) = user {
            ok(tool("chown").arg("-R").arg(format!("{user}:")).arg(&root));
        }
        Self { root, user }
    }

    /// `buildah`, with isolation by chroot, which needs neither runc nor cgroups.
    pub fn command(&self) -> Command {
        self.environment("buildah")
    }

    /// Runs a `command` of this buildah's to its end, whatever it is.
    ///
    /// Now and then buildah fails by itself: where it seals the copy of its own program
    /// (containers/storage, pkg/unshare/unshare.c) while the kernel still holds a page of
    /// it. That alone is tried again.
    pub fn run(&self, command: &mut Command) -> Done {
        let mut done = run(command);
        for _ in 0..4 {
            if done.code == 0 || !done.stderr.contains("sealing memfd copy: Device or resource busy") {
                break;
            }
            done = run(command);
        }
        done
    }

    /// The same, and requires that it ends with 0.
    #[track_caller]
    pub fn ok(&self, command: &mut Command) -> Done {
        let done = self.run(command);
        succeeded(command, done)
    }

    /// `program` as this user, in an environment in which buildah finds the store.
    pub fn environment(&self, program: &str) -> Command {
        let mut command = match self.user {
            Some(user) => {
                let mut command = tool("setpriv");
                command.args(["--reuid", user, "--regid", user, "--init-groups", "--reset-env", "env"]);
                command.arg(format!("PATH={}", std::env::var("PATH").unwrap()));
                command.args(self.variables().map(|(name, value)| format!("{name}={value}")));
                command.arg(program);
                command
            }
            None => {
                let mut command = tool(program);
                command.envs(self.variables());
                command
            }
        };
        command.current_dir(&self.root);
        command
    }

    fn variables(&self) -> impl Iterator<Item = (&'static str, String)> {
        let below = |name: &str| self.root.join(name).display().to_string();
        [
            ("BUILDAH_ISOLATION", "chroot".to_owned()),
            ("CONTAINERS_CONF", below("containers.conf")),
            ("CONTAINERS_STORAGE_CONF", below("storage.conf")),
            ("HOME", below("home")),
            ("XDG_RUNTIME_DIR", below("run")),
        ]
        .into_iter()
    }

    /// A path of this user's, where nothing is yet.
    pub fn directory(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The root file system of `image`, as long as the store is there; for root only.
    pub fn mount(&self, image: &str) -> PathBuf {
        let container = self.ok(self.command().args(["from", "--pull-never", image])).stdout;
        PathBuf::from(self.ok(self.command().args(["mount", container.trim()])).stdout.trim())
    }
}

impl Drop for Buildah {
    fn drop(&mut self) {
        // Its files belong to subordinate ids, and mounts may be left.
        run(self.command().args(["rm", "--all"]));
        run(self.command().args(["rmi", "--all", "--force"]));
    }
}

/// Podman with a store of its own, on machines with cgroups v1 and without
/// CAP_SYS_RESOURCE too.
pub struct Podman {
    root: PathBuf,
}

impl Podman {
    /// With its store in `dir`.
    pub fn new(dir: &Path) -> Self {
        let root = dir.join("podman");
        fs::create_dir(&root).unwrap();
        fs::write(root.join("containers.conf"), CONF).unwrap();
        Self { root }
    }

    /// `podman` on this store.
    pub fn command(&self) -> Command {
        let mut command = tool("podman");
        command.env("CONTAINERS_CONF", self.root.join("containers.conf")).arg("--storage-driver=vfs");
        for (option, name) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            command.arg(option).arg(self.root.join(name));
        }
        command
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // A failed test may leave its container running.
        run(self.command().args(["rm", "-f", "-a", "-t", "0"]));
    }
}

/// Copies what `aggregator/Containerfile.base` takes into `context`, as `make static` left it.
pub fn copy_aggregator(context: &Path) {
    for file in ["oscontainer-aggregator", "ca-certificates.crt"] {
        fs::copy(target_dir().join("static").join(file), context.join(file)).unwrap();
    }
}

/// A small Debian with the tools that the builder's image needs, in place of Fedora,
/// which cannot be had everywhere: a tarball, made once by mmdebstrap from where apt
/// takes its packages.
pub fn debian_base() -> PathBuf {
    let fixtures = target_dir().join("fixtures");
    fs::create_dir_all(&fixtures).unwrap();
    let lock = File::create(fixtures.join(".base.lock")).unwrap();
    lock.lock().unwrap();
    let base = fixtures.join("base.tar");
    if !base.exists() {
        let partial = fixtures.join("base.partial.tar");
        let release = fs::read_to_string("/etc/os-release").unwrap();
        let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("stable");
        let mut command = tool("mmdebstrap");
        command.args(["--quiet", "--variant=apt", &format!("--include={BASE_PACKAGES}"), suite]).arg(&partial);
        let sources = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().map(|entry| entry.unwrap().path());
        let is_source = |path: &PathBuf| path.extension().is_some_and(|end| end == "list" || end == "sources");
        command.args(
            sources.chain([PathBuf::from("/etc/apt/sources.list")]).filter(|path| is_source(path) && path.exists()),
        );
        ok(&mut command);
        fs::rename(&partial, &base).unwrap();
    }
    base
}
