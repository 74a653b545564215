//! What goes into a compose: lockfiles, signatures, repositories that misbehave, caches that
//! several composes share, and disks that are full.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use e2e::http::{Answer, Static};
use e2e::rpms::package::{Evr, File, Package, Script, When};
use e2e::{builder, compose, fails, ok, rpms, run, tool};
use oscontainer_artifact::digest::Digest;
use rpm::Dependency;
use serde_json::{Value, json};

/// A treefile of the demo's and the update's packages.
fn both(dir: &Path, text: &str) -> PathBuf {
    for (id, repository) in [("demo", rpms::demo_repo()), ("update", rpms::update_repo())] {
        rpms::write_repo_file(&dir.join(format!("{id}.repo")), id, &repository).unwrap();
    }
    treefile(dir, text)
}

fn treefile(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("host.yaml");
    fs::write(&path, format!("ref: test/host\nselinux: false\nreleasever: \"1\"\n{text}")).unwrap();
    path
}

/// The version of a package in compose's result.
fn version(result: &Value, name: &str) -> String {
    let packages = result["packages"].as_array().unwrap();
    let package = packages.iter().find(|package| package["name"] == name).unwrap();
    package["evr"].as_str().unwrap().to_owned()
}

fn write_lockfile(path: &Path, packages: Value) {
    fs::write(path, json!({ "packages": packages }).to_string()).unwrap();
}

#[test]
fn a_lockfile_pins_packages_and_gives_the_same_commit_again() {
    let dir = tempfile::tempdir().unwrap();
    let lock = dir.path().join("lock.json");
    let packages = "packages: [filesystem, setup, demo-agent, bash, coreutils, sed]\n";
    let host = both(dir.path(), packages);
    let free = ok(&mut compose(dir.path(), &host)).json();
    assert_eq!(version(&free, "demo-agent"), "1.0-2");

    write_lockfile(&lock, json!({ "demo-agent": { "evra": "0:1.0-1.noarch" } }));
    let written = dir.path().join("written.json");
    let mut command = compose(dir.path(), &host);
    let pinned = ok(command.arg("--lockfile").arg(&lock).arg("--write-lockfile-to").arg(&written)).json();
    assert_eq!(version(&pinned, "demo-agent"), "1.0-1");
    assert_eq!(version(&pinned, "sed"), version(&free, "sed"));
    let down = json!([{ "package": "demo-agent.noarch", "from": "1.0-2", "to": "1.0-1" }]);
    assert_eq!((&pinned["downgraded"], &pinned["upgraded"], &pinned["added"]), (&down, &json!([]), &json!([])));
    assert_eq!(pinned["previous"], free["commit"]);

    // What was written names every package with the digest of its file.
    let text: Value = serde_json::from_str(&fs::read_to_string(&written).unwrap()).unwrap();
    let locked = text["packages"].as_object().unwrap();
    assert_eq!(locked.len(), pinned["packages"].as_array().unwrap().len());
    let rpm = rpms::demo_repo().join("demo-agent-1.0-1.noarch.rpm");
    let agent = json!({ "evra": "1.0-1.noarch", "digest": Digest::of(&fs::read(rpm).unwrap()).to_string() });
    assert_eq!(locked["demo-agent"], agent);
    assert!(locked.values().all(|package| package["digest"].as_str().unwrap().starts_with("sha256:")));

    // With it: the same commit, in another repository.
    let other = tempfile::tempdir().unwrap();
    let again = ok(compose(other.path(), &host).arg("--lockfile").arg(&written)).json();
    assert_eq!(again["commit"], pinned["commit"]);
    // The last of several counts.
    let overrides = dir.path().join("overrides.yaml");
    fs::write(&overrides, "packages:\n  demo-agent:\n    evr: 1.0-2\n").unwrap();
    let mut command = compose(other.path(), &host);
    let newer = ok(command.arg("--lockfile").arg(&written).arg("--lockfile").arg(&overrides)).json();
    assert_eq!(version(&newer, "demo-agent"), "1.0-2");

    let zero = format!("sha256:{}", "0".repeat(64));
    // One lockfile may serve other treefiles and architectures too.
    let more = json!({ "demo-agent": { "evra": "1.0-1.noarch" }, "not-here": { "evra": "1-1.s390x" } });
    write_lockfile(&lock, more);
    let done = ok(compose(other.path(), &host).arg("--lockfile").arg(&lock));
    assert!(done.stderr.contains("no repository has what the lockfile pins: not-here 1-1.s390x"), "{}", done.stderr);
    assert_eq!(version(&done.json(), "demo-agent"), "1.0-1");
    for (packages, reason) in [
        (json!({ "demo-agent": { "evra": "9-9.noarch" } }), "no repository has what the lockfile pins: demo-agent 9-9"),
        (json!({ "demo-agent": { "evra": "1.0-1.noarch", "digest": zero } }), "but the lockfile pins sha256:000"),
        (json!({ "demo-agent": {} }), "needs one of evra and evr"),
    ] {
        write_lockfile(&lock, packages);
        fails(compose(other.path(), &host).arg("--lockfile").arg(&lock), 3, reason);
    }
    fails(compose(other.path(), &host).arg("--lockfile").arg(dir.path()), 3, "is no lockfile");
    // Repositories for what is pinned, and for nothing else.
    let host = both(dir.path(), &format!("repos: [demo]\nlockfile-repos: [update]\n{packages}"));
    write_lockfile(&lock, json!({ "demo-agent": { "evra": "1.0-2.noarch" } }));
    let mixed = ok(compose(dir.path(), &host).arg("--lockfile").arg(&lock)).json();
    assert_eq!(version(&mixed, "demo-agent"), "1.0-2");
    assert!(version(&mixed, "sed") != version(&free, "sed"));
    let without = ok(&mut compose(dir.path(), &host)).json();
    assert_eq!(version(&without, "demo-agent"), "1.0-1");
}

#[test]
fn a_lockfile_pins_all_architectures_and_takes_any_digest() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own");
    fs::create_dir(&own).unwrap();
    // A repository may name files as it likes.
    fs::create_dir_all(own.join("pool")).unwrap();
    let write = |arch: &str, release: &str| {
        let package = Package {
            name: "both".to_owned(),
            evr: Evr { epoch: 3, version: "1".to_owned(), release: release.to_owned() },
            arch: arch.to_owned(),
            summary: "For two architectures".to_owned(),
            files: vec![File::regular(&format!("/usr/lib/both-{arch}"), 0o644, release)],
            ..Package::default()
        };
        fs::rename(package.write(&own).unwrap(), own.join(format!("pool/{arch}-{release}.rpm"))).unwrap();
        ok(tool("createrepo_c").arg("-q").arg(&own));
    };
    for (arch, release) in [("x86_64", "1"), ("i686", "1"), ("x86_64", "2"), ("i686", "2")] {
        write(arch, release);
    }
    let packages = "packages: [filesystem, setup, both.x86_64, both.i686]\n";
    let host = both(dir.path(), &format!("repos: [demo, own]\n{packages}"));
    rpms::write_repo_file(&dir.path().join("own.repo"), "own", &own).unwrap();
    let lock = dir.path().join("lock.json");
    let with_lock = |lock: &Path| {
        let mut command = compose(dir.path(), &host);
        command.arg("--lockfile").arg(lock);
        command
    };
    write_lockfile(&lock, json!({ "both": { "evr": "3:1-1" } }));
    let written = dir.path().join("written.json");
    let pinned = ok(with_lock(&lock).arg("--write-lockfile-to").arg(&written)).json();
    let versions = |result: &Value| {
        let packages = result["packages"].as_array().unwrap().iter();
        let found = packages.filter(|package| package["name"] == "both");
        found.map(|package| format!("{} {}", package["evr"], package["arch"]).replace('"', "")).collect::<Vec<_>>()
    };
    assert_eq!(versions(&pinned), ["3:1-1 i686", "3:1-1 x86_64"]);
    let text: Value = serde_json::from_str(&fs::read_to_string(&written).unwrap()).unwrap();
    assert_eq!(text["packages"]["both"], json!({ "evr": "3:1-1" }));
    assert!(text["packages"]["setup"]["evra"].is_string() && text["packages"]["setup"]["digest"].is_string());
    let again = ok(&mut with_lock(&written)).json();
    assert_eq!((&again["commit"], &again["changed"]), (&pinned["commit"], &json!(false)));
    // With its architecture, it is the only one of its name.
    write_lockfile(&lock, json!({ "both": { "evra": "3:1-1.x86_64" } }));
    fails(&mut with_lock(&lock), 3, "both");

    // What the repository has got since is seen at once.
    ["x86_64", "i686"].iter().for_each(|arch| write(arch, "3"));
    assert_eq!(versions(&ok(&mut compose(dir.path(), &host)).json()), ["3:1-3 i686", "3:1-3 x86_64"]);

    // The algorithms of repositories' metadata.
    let rpm = rpms::demo_repo().join("setup-1.0-1.noarch.rpm");
    for algorithm in ["md5", "sha1", "sha256", "sha384", "sha512"] {
        let sum = ok(tool(&format!("{algorithm}sum")).arg(&rpm)).stdout;
        let digest = format!("{algorithm}:{}", sum.split(' ').next().unwrap());
        write_lockfile(&lock, json!({ "setup": { "evra": "1.0-1.noarch", "digest": digest } }));
        ok(&mut with_lock(&lock));
        let (start, end) = digest.split_at(digest.len() - 1);
        let wrong = format!("{start}{}", if end == "0" { "1" } else { "0" });
        write_lockfile(&lock, json!({ "setup": { "evra": "1.0-1.noarch", "digest": wrong } }));
        fails(&mut with_lock(&lock), 3, &format!("has {digest}, but the lockfile pins {wrong}"));
    }
}

#[test]
fn composes_share_a_cache_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let host = both(dir.path(), "repos: [demo]\npackages: [filesystem, setup, bash, coreutils, demo-agent]\n");
    // From a server, so that packages go through the cache.
    serve(&dir.path().join("demo.repo"), &rpms::demo_repo(), |_| None);
    let composes: Vec<_> = (0..3)
        .map(|number| {
            let mut command = builder();
            command.args(["compose", "--engine", "dnf", "--output-format", "json", "--cache-dir"]);
            command
                .arg(dir.path().join("cache"))
                .arg("--repo")
                .arg(dir.path().join(format!("repo{number}")))
                .arg(&host);
            std::thread::spawn(move || ok(&mut command).json()["commit"].clone())
        })
        .collect();
    let commits: Vec<Value> = composes.into_iter().map(|compose| compose.join().unwrap()).collect();
    assert!(commits.iter().all(|commit| *commit == commits[0]), "{commits:?}");
    assert_eq!(fs::read_dir(dir.path().join("cache/work")).unwrap().count(), 0);
}

/// Serves a repository, with other answers where `other` has one, and writes the `.repo` file.
fn serve(file: &Path, repository: &Path, other: impl Fn(&str) -> Option<Answer>) -> Static {
    let server = Static::start();
    let listed = ok(tool("find").current_dir(repository).args([".", "-type", "f"])).stdout;
    for name in listed.lines().map(|line| line.trim_start_matches("./")) {
        let bytes = Arc::new(fs::read(repository.join(name)).unwrap());
        // As librepo asks for it.
        server.set(&format!("/{}", name.replace('+', "%2b")), other(name).unwrap_or(Answer::Bytes(bytes)));
    }
    let text = format!("[demo]\nname=demo\nbaseurl={}\ngpgcheck=0\ntimeout=3\nretries=2\n", server.url(""));
    fs::write(file, text).unwrap();
    server
}

#[test]
fn repositories_that_misbehave_are_one_error_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let host = both(dir.path(), "repos: [demo]\npackages: [filesystem, setup, bash]\n");
    let bash = |name: &str| name.starts_with("bash-");
    let all = |name: &str| Arc::new(fs::read(rpms::demo_repo().join(name)).unwrap());
    let file = dir.path().join("demo.repo");
    let refuse = |reason: &str| {
        fails(&mut compose(dir.path(), &host), 1, reason);
        assert!(!dir.path().join("repo").exists());
        assert_eq!(fs::read_dir(dir.path().join("cache/work")).unwrap().count(), 0);
    };
    serve(&file, &rpms::demo_repo(), |name| bash(name).then(|| Answer::Cut(all(name), 5000)));
    refuse("dnf could not get the packages");
    serve(&file, &rpms::demo_repo(), |name| bash(name).then(|| Answer::Stall(all(name), 5000)));
    refuse("dnf could not get the packages");
    serve(&file, &rpms::demo_repo(), |name| name.ends_with("repomd.xml").then_some(Answer::Status(500)));
    refuse("dnf could not get the packages");
    let other = |name: &str| {
        let mut bytes = fs::read(rpms::demo_repo().join(name)).unwrap();
        let last = bytes.len() - 9;
        bytes[last] ^= 1;
        Answer::Bytes(Arc::new(bytes))
    };
    serve(&file, &rpms::demo_repo(), |name| bash(name).then(|| other(name)));
    refuse("dnf could not get the packages");
    // What was bad is not kept.
    serve(&file, &rpms::demo_repo(), |_| None);
    ok(&mut compose(dir.path(), &host));
}

#[test]
fn files_get_the_labels_of_the_tree_s_own_policy() {
    let dir = tempfile::tempdir().unwrap();
    rpms::write_repo_file(&dir.path().join("selinux.repo"), "selinux", &rpms::selinux_repo()).unwrap();
    let packages = "packages: [filesystem, setup, bash, coreutils, passwd, demo-agent, selinux-policy-default]\n";
    // As the real one does, it labels home directories by where useradd makes them.
    let semodule = r#"postprocess:
- |
  #!/bin/bash
  set -e
  mkdir -p /etc/default
  echo HOME=/home > /etc/default/useradd
  cat > /usr/sbin/semodule << 'END'
  #!/bin/bash
  . /etc/default/useradd
  line="$HOME/[^/]+ -d system_u:object_r:user_home_dir_t:s0"
  echo "$line" > /etc/selinux/default/contexts/files/file_contexts.homedirs
  END
  chmod 755 /usr/sbin/semodule
"#;
    let host = both(dir.path(), &format!("repos: [demo, selinux]\n{packages}{semodule}"));
    fs::write(&host, fs::read_to_string(&host).unwrap().replace("selinux: false", "selinux: true")).unwrap();
    let commit = ok(&mut compose(dir.path(), &host)).json()["commit"].as_str().unwrap().to_owned();
    let repo = dir.path().join("repo");
    let ostree = |arguments: &[&str]| {
        let mut command = tool("ostree");
        ok(command.arg(arguments[0]).arg("--repo").arg(&repo).args(&arguments[1..])).stdout
    };
    for (path, label) in [
        ("/usr/bin/bash", "shell_exec_t"),
        ("/usr/bin/passwd", "passwd_exec_t"),
        ("/usr/etc/demo/agent.conf", "etc_t"),
        ("/usr/lib", "lib_t"),
        ("/var", "var_t"),
    ] {
        let listed = ostree(&["ls", "-X", "-d", &commit, path]);
        assert!(listed.contains(&format!("system_u:object_r:{label}:s0")), "{listed}");
    }
    assert_eq!(
        ostree(&["cat", &commit, "/usr/etc/selinux/default/contexts/files/file_contexts.homedirs"]),
        "/var/home/[^/]+ -d system_u:object_r:user_home_dir_t:s0\n"
    );
    // The store of the policy's modules is updated with the policy.
    assert!(ostree(&["ls", "-R", &commit, "/usr/etc/selinux/default/active/modules"]).contains("/400/ssh/cil"));
    assert!(ostree(&["cat", &commit, "/usr/etc/selinux/semanage.conf"]).ends_with("\nstore-root=/etc/selinux\n"));
    let substituted = ostree(&["cat", &commit, "/usr/etc/selinux/default/contexts/files/file_contexts.subs_dist"]);
    for line in ["/home /var/home", "/usr/etc /etc", "/usr/lib/opt /opt"] {
        assert_eq!(substituted.lines().filter(|found| *found == line).count(), 1, "{line}: {substituted}");
    }
    let autovar = ostree(&["cat", &commit, "/usr/lib/tmpfiles.d/rpm-ostree-autovar.conf"]);
    assert!(!autovar.contains("/var/lib/selinux/default"), "{autovar}");
    // All others too: libostree labels a checkout in the same way.
    let checkout = dir.path().join("checkout");
    let checkout = checkout.to_str().unwrap();
    ostree(&["checkout", &commit, checkout]);
    ok(tool("sh").args(["-c", "find \"$0\" -exec setfattr -h -x security.selinux {} +", checkout]));
    ostree(&["commit", "-b", "theirs", &format!("--tree=dir={checkout}"), &format!("--selinux-policy={checkout}")]);
    let root =
        |rev: &str| ostree(&["ls", "-C", "-d", rev, "/"]).split_whitespace().skip(3).collect::<Vec<_>>().join(" ");
    assert_eq!(root("theirs"), root(&commit));
}

/// A scriptlet that tries to get out of the tree sees nothing of the host but its programs, changes
/// nothing, and finds nothing of the caller's environment.
#[test]
fn scriptlets_stay_in_the_tree() {
    const PROBE: &str = "mkdir -p /usr/lib/probe; exec 2>/usr/lib/probe/errors; cd /usr/lib/probe\n\
        env > env; cat /proc/sys/kernel/hostname > hostname; grep CapEff /proc/self/status > caps\n\
        outside=/proc/1/root; cat $outside/etc/shadow > shadow; ls $outside/root $outside/home $outside/srv > homes\n\
        for package in $outside/var/cache/dnf/*/packages/*.rpm /var/cache/dnf/*/packages/*.rpm; do\n\
        test -f $package && echo $package >> packages; echo spoilt >> $package; done\n\
        chroot $outside sh -c 'mount -o remount,bind,rw /usr; touch /usr/escaped && echo escaped > /tmp/escaped'\n\
        touch $outside/usr/escaped && echo escaped > escaped\n\
        ls -d $outside/etc/ssl $outside/etc/pki > certificates; test -e $outsideDIR/cache && echo found > work\n\
        cat $outsideDIR/secret.key > secrets; grep -s 's3cr[e]t' $outsideDIR/* $outsideDIR/cache/work/*/dnf/*/* >> secrets\n\
        true\n";
    let dir = tempfile::tempdir_in(e2e::target_dir()).unwrap();
    let own = dir.path().join("own");
    ok(tool("cp").arg("-r").arg(rpms::demo_repo()).arg(&own));
    let probe = Package {
        name: "probe".to_owned(),
        evr: Evr { epoch: 0, version: "1".to_owned(), release: "1".to_owned() },
        arch: "noarch".to_owned(),
        summary: "looks around".to_owned(),
        requires: ["filesystem", "setup", "bash", "coreutils", "grep"].map(Dependency::any).to_vec(),
        scripts: vec![Script {
            when: When::PostTrans,
            interpreter: "/bin/sh",
            body: PROBE.replace("$outsideDIR", &format!("$outside{}", dir.path().display())),
        }],
        ..Package::default()
    };
    let package = probe.write(&own).unwrap();
    ok(tool("createrepo_c").arg("-q").arg(&own));
    let host = treefile(dir.path(), "repos: [demo]\npackages: [probe]\n");
    let repo_file = dir.path().join("demo.repo");
    let _server = serve(&repo_file, &own, |_| None);
    let key = dir.path().join("secret.key");
    fs::write(&key, "s3cret\n").unwrap();
    let secrets = format!("username=u\npassword=s3cret\nsslclientkey={}\n", key.display());
    fs::write(&repo_file, fs::read_to_string(&repo_file).unwrap() + &secrets).unwrap();
    ok(compose(dir.path(), &host).env("SECRET", "of the caller").env("LANGUAGE", "de").env("HOSTNAME", "builder"));
    let read = |name: &str| {
        let path = format!("/usr/lib/probe/{name}");
        run(tool("ostree").arg("cat").arg("--repo").arg(dir.path().join("repo")).args(["test/host", &path])).stdout
    };
    let environment = read("env");
    assert!(environment.contains("LC_ALL=C.UTF-8"), "{environment}");
    assert!(["SECRET", "LANGUAGE", "HOSTNAME=builder"].iter().all(|name| !environment.contains(name)), "{environment}");
    assert_eq!(read("hostname"), "localhost\n");
    assert_eq!((read("shadow"), read("homes"), read("escaped")), Default::default());
    // It saw where dnf works, and nothing that is only for the network.
    assert_eq!(read("work"), "found\n");
    assert_eq!((read("certificates"), read("secrets")), Default::default());
    assert!(!Path::new("/usr/escaped").exists());
    let capabilities = read("caps");
    let set = u64::from_str_radix(capabilities.trim().rsplit('\t').next().unwrap(), 16).unwrap();
    // capabilities(7): CAP_DAC_READ_SEARCH, CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_PTRACE, CAP_SYS_ADMIN
    for number in [2, 16, 17, 19, 21] {
        assert_eq!(set >> number & 1, 0, "capability {number} in {capabilities}");
    }
    // It found packages, and none of them was changed.
    assert!(read("packages").contains("/packages/probe-1-1.noarch.rpm"), "{}", read("errors"));
    let cached = tool("find").arg(dir.path().join("cache/dnf")).args(["-name", "probe-*.rpm"]).output().unwrap();
    let cached = String::from_utf8(cached.stdout).unwrap();
    assert!(fs::read(cached.trim()).unwrap() == fs::read(package).unwrap());
}

/// A key of the test's own in `home`; gives its public half.
fn new_key(home: &Path, name: &str) -> PathBuf {
    fs::create_dir_all(home).unwrap();
    ok(tool("chmod").arg("700").arg(home));
    let gpg = || {
        let mut command = tool("gpg");
        command.env("GNUPGHOME", home).args(["--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]);
        command
    };
    ok(gpg().args(["--quick-generate-key", name, "rsa2048", "sign", "never"]));
    let public = home.join("public.asc");
    ok(gpg().args(["--armor", "--output"]).arg(&public).args(["--export", name]));
    public
}

#[test]
fn signatures_are_checked_unless_the_repo_file_says_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let (home, stranger) = (dir.path().join("key"), dir.path().join("other-key"));
    let (key, other_key) = (new_key(&home, "us"), new_key(&stranger, "them"));
    // The same packages twice, in repositories of their own.
    let repositories = ["unsigned", "signed"].map(|name| dir.path().join(name));
    for repository in &repositories {
        fs::create_dir(repository).unwrap();
        for entry in fs::read_dir(rpms::demo_repo()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if ["filesystem-", "setup-"].iter().any(|wanted| name.starts_with(wanted)) {
                let copy = repository.join(name);
                fs::copy(&path, &copy).unwrap();
                if *repository == repositories[1] {
                    let mut sign = tool("rpmsign");
                    sign.env("GNUPGHOME", &home).args(["--addsign", "--define", "_gpg_name us"]);
                    ok(sign.args(["--define", "__gpg /usr/bin/gpg"]).arg(copy));
                }
            }
        }
        ok(tool("createrepo_c").arg("-q").arg(repository));
    }
    let [unsigned_packages, signed_packages] = &repositories;
    let host = treefile(dir.path(), "repos: [packages]\npackages: [filesystem, setup]\n");
    let repo_file = |repository: &Path, options: &str| {
        let text = format!("[packages]\nname=packages\nbaseurl=file://{}\n{options}\n", repository.display());
        fs::write(dir.path().join("packages.repo"), text).unwrap();
    };
    let with_key = |key: &Path| format!("gpgkey=file://{}", key.display());
    repo_file(unsigned_packages, &with_key(&key));
    fails(&mut compose(dir.path(), &host), 3, "not signed");
    repo_file(unsigned_packages, "gpgcheck=0");
    let unsigned = ok(&mut compose(dir.path(), &host)).json();
    repo_file(signed_packages, &with_key(&other_key));
    fails(&mut compose(dir.path(), &host), 3, "Public key for");
    repo_file(signed_packages, &with_key(&key));
    let signed = ok(&mut compose(dir.path(), &host)).json();
    assert_eq!(signed["packages"], unsigned["packages"], "the key is no package of the tree");
    let again = ok(&mut compose(dir.path(), &host)).json();
    assert_eq!((&again["commit"], &again["changed"]), (&signed["commit"], &json!(false)));
    let checkout = dir.path().join("checkout");
    let mut command = tool("ostree");
    ok(command.args(["checkout", "-U", "test/host"]).arg(&checkout).arg("--repo").arg(dir.path().join("repo")));
    let database = checkout.join("usr/share/rpm");
    let listed = ok(tool("rpm").arg("--dbpath").arg(&database).args(["-qa", "--qf", "%{NAME}\n"])).stdout;
    assert_eq!(listed.lines().count(), signed["packages"].as_array().unwrap().len(), "{listed}");
}

/// A file system in memory of `size`, as long as it lives.
struct Disk(PathBuf);

impl Disk {
    fn new(path: PathBuf, size: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        ok(tool("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&path));
        Self(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(tool("umount").arg(&self.0));
    }
}

#[test]
fn a_full_disk_is_an_error_worth_a_retry_and_nothing_is_visible() {
    let dir = tempfile::tempdir().unwrap();
    let packages = "repos: [demo]\npackages: [filesystem, setup, bash, coreutils]\n";
    let host = both(dir.path(), packages);
    for (cache, repo, reason) in [
        ("20k", "200m", "space left"),
        ("12m", "200m", "no space left where the tree is made"),
        ("200m", "2m", "No space left on device"),
    ] {
        let disks = [("cache", cache), ("repo", repo)].map(|(name, size)| Disk::new(dir.path().join(name), size));
        fails(&mut compose(dir.path(), &host), 1, reason);
        assert!(!dir.path().join("repo/refs/heads/test/host").exists());
        assert_eq!(fs::read_dir(dir.path().join("cache/work")).unwrap().count(), 0);
        drop(disks);
    }
    // Nothing of ours is in /tmp.
    let elsewhere = tempfile::tempdir_in(e2e::target_dir()).unwrap();
    let host = both(elsewhere.path(), packages);
    let full = "mount -t tmpfs -o size=4k tmpfs /tmp; head -c 8k /dev/zero 2>/dev/null >/tmp/full; exec \"$0\" \"$@\"";
    let mut command = tool("unshare");
    command.args(["--mount", "sh", "-c", full]);
    let whole = compose(elsewhere.path(), &host);
    ok(command.arg(whole.get_program()).args(whole.get_args()));
}
