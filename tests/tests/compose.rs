//! `compose`, `pack` and `run` with the dnf engine on real RPMs, and with the
//! rpm-ostree engine on a stand-in.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use e2e::{Server, aggregator, builder, fails, ok, rpms, source_dir, tool};
use tempfile::TempDir;

/// A treefile directory: the demo's treefile with lines added, and its `.repo` files.
fn treefile(dir: &Path, added: &str) -> PathBuf {
    let from = source_dir().join("treefiles");
    ok(tool("cp").arg("-r").arg(from.join(".")).arg(dir));
    rpms::write_repo_file(&dir.join("demo.repo"), "demo", &rpms::demo_repo()).unwrap();
    let path = dir.join("demo.yaml");
    fs::write(&path, fs::read_to_string(&path).unwrap() + added).unwrap();
    path
}

/// A smaller one, for what need not compose the whole demo.
fn small(dir: &Path, text: &str) -> PathBuf {
    rpms::write_repo_file(&dir.join("demo.repo"), "demo", &rpms::demo_repo()).unwrap();
    rpms::write_repo_file(&dir.join("faulty.repo"), "faulty", &rpms::faulty_repo()).unwrap();
    let path = dir.join("host.yaml");
    fs::write(&path, format!("ref: test/host\nselinux: false\nreleasever: \"1\"\n{text}")).unwrap();
    path
}

fn compose(dir: &Path, treefile: &Path) -> Command {
    let mut command = builder();
    command.args(["compose", "--engine", "dnf", "--output-format", "json", "--cache-dir"]).arg(dir.join("cache"));
    command.arg("--repo").arg(dir.join("repo")).arg(treefile);
    command
}

/// One whole compose of the demo, shared by the tests that only look at it.
struct Composed {
    dir: TempDir,
    commit: String,
}

static DEMO: LazyLock<Composed> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let treefile = treefile(&dir.path().join("treefiles"), "");
    let result = ok(&mut compose(dir.path(), &treefile)).json();
    assert_eq!(result["ref"], "demo/x86_64/host");
    assert_eq!(result["version"], "1");
    Composed { commit: result["commit"].as_str().unwrap().to_owned(), dir }
});

fn pack(repo: &Path, output: &Path) -> serde_json::Value {
    let mut command = builder();
    command.args(["--output-format", "json", "pack", "--ref", "demo/x86_64/host", "--repo"]).arg(repo);
    ok(command.arg("--output").arg(output)).json()
}

#[test]
fn a_checkout_has_the_owners_modes_links_and_capabilities_of_the_packages() {
    let demo = &*DEMO;
    let repo = demo.dir.path().join("repo");
    ok(tool("ostree").args(["fsck", "--repo"]).arg(&repo));
    let checkout = demo.dir.path().join("checkout");
    ok(tool("ostree").arg("checkout").arg("--repo").arg(&repo).arg(&demo.commit).arg(&checkout));
    // rpm itself compares: what it recorded with what a node would see, but for
    // configuration files, which are in /usr/etc now, and what moved to /var.
    let verify = e2e::run(
        tool("rpm")
            .arg("--dbpath")
            .arg(checkout.join("usr/share/rpm"))
            .arg("--root")
            .arg(&checkout)
            .args(["-Va", "--nomtime"]),
    );
    let wrong: Vec<&str> = verify
        .stdout
        .lines()
        .filter(|line| {
            line.rsplit(' ')
                .next()
                .is_some_and(|path| path.starts_with("/usr/bin/") || path.starts_with("/usr/lib/x86"))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let capabilities = ok(tool("getcap").arg(checkout.join("usr/bin/ping"))).stdout;
    assert!(capabilities.contains("cap_net_raw"), "{capabilities}");
    let hello = ok(tool("chroot").arg(&checkout).args(["/usr/bin/bash", "-c", "echo hi; cat /usr/lib/motd.d/demo"]));
    assert!(hello.stdout.starts_with("hi\n"), "{}", hello.stdout);
    for (link, target) in
        [("home", "var/home"), ("root", "var/roothome"), ("ostree", "sysroot/ostree"), ("tmp", "sysroot/tmp")]
    {
        assert_eq!(fs::read_link(checkout.join(link)).unwrap(), Path::new(target));
    }
    let root: Vec<_> =
        fs::read_dir(&checkout).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let known =
        ["bin", "boot", "dev", "home", "lib", "lib64", "media", "mnt", "opt", "ostree", "proc", "root", "run", "sbin"];
    let known = [&known[..], &["srv", "sys", "sysroot", "tmp", "usr", "var"]].concat();
    assert!(root.iter().all(|name| known.contains(&name.as_str())), "{root:?}");
    assert_eq!(fs::read_dir(checkout.join("var")).unwrap().count(), 0);
    let passwd = fs::read_to_string(checkout.join("usr/etc/passwd")).unwrap();
    assert!(passwd.starts_with("root:") && passwd.lines().count() == 1, "{passwd}");
}

#[test]
fn the_commit_says_what_is_in_it() {
    let demo = &*DEMO;
    let show = |key: &str| {
        let mut command = tool("ostree");
        command.arg("show").arg("--repo").arg(demo.dir.path().join("repo")).arg(format!("--print-metadata-key={key}"));
        ok(command.arg(&demo.commit)).stdout
    };
    assert!(show("rpmostree.rpmdb.pkglist").contains("('bash', '0', '5.2.15'"), "{}", show("rpmostree.rpmdb.pkglist"));
    assert_eq!(show("version").trim(), "'1'");
    assert_eq!(show("rpmostree.inputhash").trim().len(), 66);
    assert!(show("ostree.source-title").contains("demo"));
}

#[test]
fn two_composes_give_the_same_tarball() {
    let first = &*DEMO;
    std::thread::sleep(Duration::from_secs(1));
    let second = tempfile::tempdir().unwrap();
    let result = ok(&mut compose(second.path(), &treefile(&second.path().join("elsewhere"), ""))).json();
    let repo = second.path().join("repo");
    if result["commit"] != first.commit {
        ok(tool("ostree")
            .args(["pull-local", "--repo"])
            .arg(&repo)
            .arg(first.dir.path().join("repo"))
            .arg(&first.commit));
        let diff = ok(tool("ostree").args(["diff", "--repo"]).arg(&repo).arg(&first.commit).arg("demo/x86_64/host"));
        panic!("the commits differ in:\n{}", diff.stdout);
    }
    let one = pack(&first.dir.path().join("repo"), &second.path().join("one"));
    let two = pack(&repo, &second.path().join("two"));
    assert_eq!(one["digest"], two["digest"]);
    ok(tool("cmp").arg(second.path().join("one/repo.tar")).arg(second.path().join("two/repo.tar")));
}

#[test]
fn run_leads_from_treefile_to_artifact_that_tar_and_ostree_can_use() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    fs::write(&token, "secret\n").unwrap();
    let mut endpoint = builder();
    let endpoint = Server::start(
        endpoint.arg("endpoint").arg("--store").arg(dir.path().join("store")).arg("--token-file").arg(&token),
    );
    let result_file = dir.path().join("result");
    let run = |treefile: &Path| {
        let mut command = builder();
        command.args([
            "run",
            "--engine",
            "dnf",
            "--endpoint",
            &endpoint.url(),
            "--name",
            "host",
            "--version",
            "7",
            "--cache-dir",
        ]);
        command
            .arg(dir.path().join("cache"))
            .arg("--token-file")
            .arg(&token)
            .arg("--result-file")
            .arg(&result_file)
            .arg(treefile);
        command
    };
    let treefile = small(dir.path(), "repos: [demo]\npackages: [filesystem, setup]\n");
    ok(&mut run(&treefile));
    let line = fs::read_to_string(&result_file).unwrap();
    let result: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((line.matches('\n').count(), &result["changed"], &result["version"]), (1, &true.into(), &"7".into()));
    let url = result["manifestUrl"].as_str().unwrap();
    ok(tool("curl").current_dir(dir.path()).args(["-fsLO", url, "-fsLO", &url.replace("manifest.json", "repo.tar")]));
    let digest = result["manifestDigest"].as_str().unwrap().trim_start_matches("sha256:");
    fs::write(dir.path().join("sums"), format!("{digest}  manifest.json\n")).unwrap();
    ok(tool("sha256sum").current_dir(dir.path()).args(["-c", "sums"]));
    let unpacked = dir.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    ok(tool("tar").arg("-xf").arg(dir.path().join("repo.tar")).arg("-C").arg(&unpacked));
    ok(tool("ostree").args(["fsck", "--repo"]).arg(&unpacked));
    let fetched = dir.path().join("fetched");
    ok(aggregator()
        .args(["fetch", url, "--digest", result["manifestDigest"].as_str().unwrap(), "--output"])
        .arg(&fetched));
    ok(tool("ostree").args(["fsck", "--repo"]).arg(&fetched));

    let bad = small(dir.path(), "repos: [demo]\npackages: [no-such-package]\n");
    fails(&mut run(&bad), 3, "no-such-package");
    let result: serde_json::Value = serde_json::from_str(&fs::read_to_string(&result_file).unwrap()).unwrap();
    assert_eq!(result["exitCode"], 3);
    assert!(result["error"].as_str().unwrap().contains("no-such-package"));
}

#[test]
fn bad_input_is_one_error_and_no_ref() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("repos: [demo]\npackages: [filesystem]\nno-such-key: 1\n", "no-such-key"),
        ("repos: [demo]\npackages: [no-such-package]\n", "no-such-package"),
        ("repos: [nowhere]\npackages: [filesystem]\n", "nowhere"),
        ("repos: [demo, faulty]\npackages: [filesystem, setup, bash, coreutils, broken-script]\n", "broken-script"),
        ("repos: [demo, faulty]\npackages: [filesystem, setup, broken-requires]\n", "broken-requires"),
        ("repos: [demo, faulty]\npackages: [filesystem, setup, broken-owner]\n", "does not exist"),
        (
            "repos: [demo]\npackages: [filesystem, setup, bash, coreutils]\npostprocess: ['exit 9']\n",
            "postprocess script 1",
        ),
        ("repos: [demo]\npackages: [filesystem, setup]\nunits: [none.service]\n", "none.service"),
        ("repos: [demo]\npackages: [filesystem]\nremove-from-packages: [[filesystem, /etc]]\n", "remove-from-packages"),
    ];
    for (text, reason) in cases {
        fails(&mut compose(dir.path(), &small(dir.path(), text)), 3, reason);
    }
    let treefile = small(dir.path(), "repos: [far]\npackages: [filesystem]\n");
    fs::write(dir.path().join("far.repo"), "[far]\nname=far\nbaseurl=http://127.0.0.1:9/\ngpgcheck=0\nretries=1\n")
        .unwrap();
    fails(&mut compose(dir.path(), &treefile), 1, "http://127.0.0.1:9/");
    if dir.path().join("repo").exists() {
        assert_eq!(ok(tool("ostree").args(["refs", "--repo"]).arg(dir.path().join("repo"))).stdout, "");
    }
    assert_eq!(fs::read_dir(dir.path().join("cache/work")).unwrap().count(), 0);
}

#[test]
fn a_killed_compose_leaves_no_ref_and_the_next_one_works() {
    let dir = tempfile::tempdir().unwrap();
    let treefile = small(dir.path(), "repos: [demo]\npackages: [filesystem, setup, bash, coreutils]\n");
    for milliseconds in [300, 2500, 5000] {
        let mut child = compose(dir.path(), &treefile).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        let repo = dir.path().join("repo");
        if repo.join("refs/heads/test/host").exists() {
            ok(tool("ostree").args(["fsck", "--repo"]).arg(&repo));
        }
    }
    let commit = ok(&mut compose(dir.path(), &treefile)).json()["commit"].as_str().unwrap().to_owned();
    ok(tool("ostree").args(["fsck", "--repo"]).arg(dir.path().join("repo")));
    assert_eq!(commit.len(), 64);
    assert_eq!(fs::read_dir(dir.path().join("cache/work")).unwrap().count(), 0);
}

#[test]
fn a_bare_user_repository_packs_too() {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("repo");
    ok(tool("ostree").args(["init", "--mode=bare-user", "--repo"]).arg(&repo));
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "content").unwrap();
    ok(tool("ostree").args(["commit", "--branch=demo/x86_64/host", "--repo"]).arg(&repo).arg(&tree));
    pack(&repo, &dir.path().join("artifact"));
    let unpacked = dir.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    ok(tool("tar").arg("-xf").arg(dir.path().join("artifact/repo.tar")).arg("-C").arg(&unpacked));
    ok(tool("ostree").args(["fsck", "--repo"]).arg(&unpacked));
    let wrong = e2e::run(
        builder().args(["pack", "--ref", "no/such", "--repo"]).arg(&repo).arg("--output").arg(dir.path().join("x")),
    );
    assert_eq!(wrong.code, 3);
    assert!(!dir.path().join("x").exists());
}

/// The stand-in is no rpm-ostree: it takes what `rpm-ostree compose tree --help`
/// (2026.2) lists and nothing else, and commits a small tree by the real ostree.
const RPM_OSTREE: &str = r#"#!/usr/bin/env bash
set -euo pipefail
[ "$1 $2" = "compose tree" ] || { echo "error: Unknown command '$1 $2'" >&2; exit 1; }
shift 2
echo "$*" >> "$LOG"
metadata=() parent=() unified= cachedir= id= repo= treefile=
while [ $# -gt 0 ]; do
  case $1 in
    --unified-core) unified=1 ;;
    --no-parent|--force-nocache|--dry-run) ;;
    --repo) repo=$2; shift ;;
    --cachedir) cachedir=$2; shift ;;
    --write-commitid-to) id=$2; shift ;;
    --parent) parent=("--parent=$2"); shift ;;
    --add-metadata-string) metadata+=("--add-metadata-string=$2"); shift ;;
    --ex-lockfile|--ex-write-lockfile-to) shift ;;
    -*) echo "error: Unknown option $1" >&2; exit 1 ;;
    *) [ -z "$treefile" ] || { echo "error: too many arguments" >&2; exit 1; }; treefile=$1 ;;
  esac
  shift
done
[ -n "$unified" ] && [ -d "$cachedir" ] && [ -f "$treefile" ] && [ -f "$repo/config" ] || { echo "error: usage" >&2; exit 1; }
grep -q unchanged "$treefile" && { echo "No apparent changes since previous commit; use --force-nocache to override"; exit 0; }
grep -q broken "$treefile" && { echo "error: Packages not found: broken" >&2; exit 1; }
grep -q offline "$treefile" && { echo "error: cannot update repo 'x': Curl error (6): Could not resolve host" >&2; exit 1; }
tree=$(mktemp -d); trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree/usr/bin"; echo hi > "$tree/usr/bin/hi"
ostree commit --repo="$repo" --orphan --tree=dir="$tree" "${metadata[@]}" "${parent[@]}" > "$id"
"#;

#[test]
fn the_rpm_ostree_engine_drives_a_strict_stand_in() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    fs::write(bin.join("rpm-ostree"), RPM_OSTREE).unwrap();
    fs::set_permissions(bin.join("rpm-ostree"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let log = dir.path().join("log");
    let treefile = dir.path().join("host.yaml");
    let compose = |text: &str, options: &[&str]| {
        fs::write(&treefile, format!("ref: test/host\nrepos: [x]\npackages: [{text}]\n")).unwrap();
        let mut command = builder();
        command.env("PATH", &path).env("LOG", &log);
        command.args(["compose", "--output-format", "json", "--cache-dir"]).arg(dir.path().join("cache"));
        command.arg("--repo").arg(dir.path().join("repo")).args(options).arg(&treefile);
        command
    };
    let id = dir.path().join("id");
    let first = ok(&mut compose("a", &["--version-string", "9", "--write-commitid-to", id.to_str().unwrap()])).json();
    assert_eq!((&first["version"], &first["ref"]), (&"9".into(), &"test/host".into()));
    assert_eq!(fs::read_to_string(&id).unwrap(), first["commit"].as_str().unwrap());
    let head = ok(tool("ostree").args(["rev-parse", "test/host", "--repo"]).arg(dir.path().join("repo"))).stdout;
    assert_eq!(head.trim(), first["commit"].as_str().unwrap());
    assert!(fs::read_to_string(&log).unwrap().contains("--no-parent"));
    let unchanged = ok(&mut compose("unchanged", &[])).json();
    assert_eq!(unchanged["commit"], first["commit"]);
    let child =
        ok(&mut compose("b", &["--engine", "rpm-ostree", "--parent", head.trim(), "--lockfile", "l.json"])).json();
    assert_ne!(child["commit"], first["commit"]);
    assert!(fs::read_to_string(&log).unwrap().contains(&format!("--parent {} --ex-lockfile l.json", head.trim())));
    fails(&mut compose("broken", &[]), 3, "rpm-ostree ended with");
    fails(&mut compose("offline", &[]), 1, "rpm-ostree ended with");
}
