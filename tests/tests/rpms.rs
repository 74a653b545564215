//! The fixture that all composes rest on: its packages are valid, install as a
//! tree that works, and are the same bytes whenever they are made.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use e2e::rpms::{self, Variant};
use e2e::{Done, ok, run, tool};
use oscontainer_artifact::digest::Digest;

/// The RPM files of a repository by package name.
fn packages(repository: &Path) -> BTreeMap<String, PathBuf> {
    let entries = fs::read_dir(repository).expect("the repository can be listed");
    let files = entries.map(|entry| entry.expect("an entry can be read").path());
    let rpms: Vec<_> = files.filter(|path| path.extension().is_some_and(|extension| extension == "rpm")).collect();
    let names = ok(tool("rpm").args(["-qp", "--qf", "%{NAME}\n"]).args(&rpms)).stdout;
    names.lines().map(str::to_owned).zip(rpms).collect()
}

fn query(rpm: &Path, format: &str) -> String {
    ok(tool("rpm").args(["-qp", "--qf", format]).arg(rpm)).stdout
}

/// A tree to install into, with what scriptlets need.
struct Root {
    directory: tempfile::TempDir,
}

impl Root {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        fs::write(directory.path().join(".rpmmacros"), "%_dbpath /usr/share/rpm\n").expect("macros can be written");
        Self { directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// `dnf install` of `names` in a mount namespace of its own, where the tree
    /// has /dev/null; nothing of that is left behind.
    fn install(&self, repositories: &[PathBuf], names: &[&str]) -> Done {
        let script = "mkdir -p \"$0/dev\" && mount -t tmpfs none \"$0/dev\" && mknod -m 666 \"$0/dev/null\" c 1 3 && exec \"$@\"";
        let mut command = tool("unshare");
        command.args(["--mount", "sh", "-c", script]).arg(self.path()).args(["dnf", "--assumeyes", "--nogpgcheck"]);
        command.arg(format!("--installroot={}", self.path().display()));
        command.arg(format!("--setopt=cachedir={}", self.directory.path().join("cache").display()));
        command.args(["--setopt=reposdir=/nonexistent", "--releasever=1"]);
        for (number, repository) in repositories.iter().enumerate() {
            command.arg(format!("--repofrompath=r{number},file://{}", repository.display()));
            command.arg(format!("--repo=r{number}"));
        }
        let epoch = rpms::package::SOURCE_DATE_EPOCH.to_string();
        command.env("HOME", self.directory.path()).env("SOURCE_DATE_EPOCH", epoch);
        run(command.arg("install").args(names))
    }

    fn chroot(&self, script: &str) -> String {
        ok(tool("chroot").arg(self.path()).args(["/bin/bash", "-c", script])).stdout
    }
}

#[test]
fn packages_are_valid_and_say_what_debs_said() {
    let packages = packages(&rpms::demo_repo());
    let checked = ok(tool("rpm").args(["-K", "--nosignature"]).args(packages.values()));
    assert_eq!(checked.stdout.lines().filter(|line| line.ends_with("digests OK")).count(), packages.len());

    let dump = |name: &str| {
        query(
            &packages[name],
            "[%{FILENAMES} %{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILEFLAGS:fflags} %{FILECAPS}\n]",
        )
    };
    assert!(dump("passwd").contains("/usr/bin/chage -rwxr-sr-x root:shadow "));
    assert!(dump("iputils-ping").contains("/usr/bin/ping -rwxr-xr-x root:root  cap_net_raw=ep"));
    let conffile =
        dump("passwd").lines().any(|line| line.starts_with("/etc/default/useradd ") && line.contains(" cn "));
    assert!(conffile, "a conffile is %config(noreplace): {}", dump("passwd"));
    assert_eq!(query(&packages["passwd"], "%{EPOCH}"), "1");
    let requires = ok(tool("rpm").args(["-qp", "--requires"]).arg(&packages["libc6"])).stdout;
    assert!(requires.lines().any(|line| line == "libgcc-s1"), "{requires}");
    assert!(!dump("bash").contains("\n/bin/"), "/bin is merged into /usr");
}

#[test]
fn a_tree_installs_and_runs() {
    let root = Root::new();
    let names: Vec<_> = rpms::DEMO.iter().chain(&["demo-release", "demo-agent"]).copied().collect();
    let done = root.install(&[rpms::demo_repo()], &names);
    assert!(done.code == 0, "{done:?}");
    let said = format!("{}{}", done.stdout, done.stderr);
    assert!(!said.contains("warning:") && !said.contains("scriptlet failed"), "{said}");

    assert_eq!(
        root.chroot("echo hi; . /etc/os-release; echo $ID; awk 'BEGIN { print 6 * 7 }'"),
        "hi\noscontainer-demo\n42\n"
    );
    assert_eq!(root.chroot("demo-agent; id -u demo"), "demo agent, release 1\n980\n");
    assert_eq!(
        root.chroot("cat /usr/lib/demo/lua /usr/lib/demo/files"),
        "written by lua in %post\nagent\nfiles\nlua\n"
    );
    assert_eq!(
        root.chroot("stat -c '%U:%G %a' /var/lib/demo/seed /etc/demo/agent.conf"),
        "demo:demo 600\nroot:demo 640\n"
    );
    assert!(root.path().join("etc/ld.so.cache").exists(), "the file trigger ran ldconfig");

    let metadata = |name: &str| fs::symlink_metadata(root.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(metadata("usr/bin/chage").permissions().mode() & 0o7777, 0o2755);
    assert_eq!(metadata("usr/bin/chage").gid(), 42);
    assert_eq!(metadata("usr/bin/gunzip").ino(), metadata("usr/bin/uncompress").ino());
    assert!(metadata("bin").file_type().is_symlink());
    let capabilities = ok(tool("getcap").arg(root.path().join("usr/bin/ping"))).stdout;
    assert!(capabilities.ends_with("cap_net_raw=ep\n"), "{capabilities}");

    let update = root.install(&[rpms::update_repo()], &["demo-agent-1.0-2"]);
    assert!(update.code == 0, "{update:?}");
    assert_eq!(root.chroot("demo-agent"), "demo agent, release 2\n");
}

#[test]
fn twice_the_same_bytes() {
    let again = tempfile::tempdir().expect("a temporary directory can be made");
    let first = rpms::demo_repo();
    let second = again.path().join("demo");
    let debs = first.ancestors().nth(2).expect("it lies below the fixtures").join("debs");
    rpms::make(Variant::Demo, &second, &debs).expect("the repository can be made");
    assert_eq!(digests(&first), digests(&second));
}

#[test]
fn an_update_changes_three_packages() {
    let (demo, update) = (digests(&rpms::demo_repo()), digests(&rpms::update_repo()));
    let is_rpm = |name: &&String| name.ends_with(".rpm");
    let newer: Vec<_> = update
        .iter()
        .filter(|(name, digest)| demo.get(*name) != Some(digest))
        .map(|(name, _)| name)
        .filter(is_rpm)
        .collect();
    assert_eq!(newer.len(), 3, "{newer:?}");
    assert_eq!(demo.keys().filter(is_rpm).count(), update.keys().filter(is_rpm).count());
    let versions = |repository: &Path| {
        let rpms = packages(repository);
        let listed = ok(tool("rpm").args(["-qp", "--qf", "%{NAME} %{EVR}\n"]).args(rpms.values())).stdout;
        listed.lines().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let (demo, update) = (versions(&rpms::demo_repo()), versions(&rpms::update_repo()));
    let changed: Vec<_> = update.difference(&demo).filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(changed, ["demo-agent", "findutils", "sed"]);
}

#[test]
fn faulty_packages_fail_as_they_should() {
    let repositories = [rpms::demo_repo(), rpms::faulty_repo()];
    let missing = Root::new().install(&repositories, &["broken-requires"]);
    assert!(missing.code != 0 && missing.stderr.contains("nothing provides no-package-provides-this"), "{missing:?}");
    let root = Root::new();
    let done = root.install(&repositories, &["bash", "broken-script", "broken-owner"]);
    let said = format!("{}{}", done.stdout, done.stderr);
    assert!(said.contains("broken-script: this cannot work"), "{said}");
    assert!(said.contains("exit status 3"), "{said}");
    assert!(said.contains("group nosuchgroup does not exist"), "{said}");
}

/// The digest of every file below a repository, by its path.
fn digests(repository: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let listed = ok(tool("find").current_dir(repository).args([".", "-type", "f"])).stdout;
    for name in listed.lines().filter(|name| *name != "./made-by") {
        let bytes = fs::read(repository.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        found.insert(name.to_owned(), Digest::of(&bytes).to_string());
    }
    found
}
