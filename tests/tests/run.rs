//! `run` from run to run: what it keeps, what it gives back, and from where it goes on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::endpoint::{Endpoint, bearer};
use e2e::{builder, fails, ok, rpms, tool};
use serde_json::Value;

/// A treefile whose tree changes with `text`.
fn treefile(dir: &Path, text: &str) -> PathBuf {
    rpms::write_repo_file(&dir.join("demo.repo"), "demo", &rpms::demo_repo()).unwrap();
    fs::write(dir.join("motd"), text).unwrap();
    let path = dir.join("host.yaml");
    let fields = "selinux: false\nreleasever: \"1\"\nrepos: [demo]\npackages: [filesystem, setup, demo-agent, bash, coreutils]\n";
    fs::write(&path, format!("ref: test/host\n{fields}add-files: [[motd, /usr/lib/motd]]\n")).unwrap();
    path
}

fn run(endpoint: &Endpoint, dir: &Path, version: &str) -> Command {
    let token = dir.join("token");
    fs::write(&token, bearer().trim_start_matches("Authorization: Bearer ")).unwrap();
    let mut command = builder();
    command.args(["run", "--engine", "dnf", "--output-format", "json", "--endpoint", &endpoint.url("")]);
    command.args(["--version-string", version, "--cache-dir"]).arg(dir.join("cache"));
    command.arg("--token-file").arg(token).arg(dir.join("host.yaml"));
    command
}

fn refs(repo: &Path) -> Vec<String> {
    let text = ok(tool("ostree").args(["refs", "--repo"]).arg(repo)).stdout;
    let mut refs: Vec<String> = text.lines().map(str::to_owned).collect();
    refs.sort();
    refs
}

#[test]
fn the_last_commits_are_kept_and_the_rest_is_given_back() {
    let endpoint = Endpoint::start();
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("cache/repo");
    let mut commits = Vec::new();
    for number in 1..=4 {
        treefile(dir.path(), &format!("release {number}"));
        let mut command = run(&endpoint, dir.path(), &number.to_string());
        let result = ok(command.args(["--keep-commits", "2", "--cache-size", "1KiB"])).json();
        commits.push(result["commit"].as_str().unwrap().to_owned());
        // The same again changes nothing, here either; nothing is packed for that.
        let again = ok(&mut command);
        assert!(again.stderr.contains("nothing is packed"), "{}", again.stderr);
        let same = (&again.json()["commit"], &again.json()["changed"], &again.json()["manifestDigest"]);
        assert_eq!(same, (&result["commit"], &Value::Bool(false), &result["manifestDigest"]));
        // Unless the endpoint has it no more.
        if number == 1 {
            let path = "/v1/artifacts/test-host/1";
            assert_eq!(endpoint.curl(path, &["-X", "DELETE", "-H", &bearer()]).status, 204);
            let again = ok(&mut command).json();
            assert_eq!((&again["changed"], &again["manifestDigest"]), (&Value::Bool(true), &result["manifestDigest"]));
        }
    }
    assert_eq!(refs(&repo), ["kept/test/host/3", "test/host"]);
    let show = |commit: &str| e2e::run(tool("ostree").args(["show", commit, "--repo"]).arg(&repo)).code == 0;
    assert_eq!(commits.iter().map(|commit| show(commit)).collect::<Vec<_>>(), [false, false, true, true]);
    ok(tool("ostree").args(["fsck", "--all", "--repo"]).arg(&repo));
    let more = ok(run(&endpoint, dir.path(), "4").args(["--keep-commits", "1"])).json();
    assert_eq!((more["commit"].as_str(), refs(&repo)), (Some(commits[3].as_str()), vec!["test/host".to_owned()]));
    assert!(!show(&commits[2]));
}

#[test]
fn a_builder_without_its_repository_goes_on_from_the_endpoint() {
    let endpoint = Endpoint::start();
    let (first, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    treefile(first.path(), "one");
    let one = ok(&mut run(&endpoint, first.path(), "1")).json();

    // The same input on another machine: nothing is composed.
    treefile(other.path(), "one");
    let mut command = run(&endpoint, other.path(), "1");
    let same = ok(&mut command);
    assert!(same.stderr.contains("nothing changed since commit"), "{}", same.stderr);
    assert_eq!(same.json()["manifestDigest"], one["manifestDigest"]);
    let repo = other.path().join("cache/repo");
    ok(tool("ostree").args(["fsck", "--repo"]).arg(&repo));

    // Other input: what the commits have in common is not written again, and numbers stay.
    fs::remove_dir_all(other.path().join("cache")).unwrap();
    treefile(other.path(), "two");
    let two = ok(&mut run(&endpoint, other.path(), "2"));
    assert!(
        two.stderr.contains(&format!("the commit before is {}", one["commit"].as_str().unwrap())),
        "{}",
        two.stderr
    );
    let new = two.stderr.lines().find(|line| line.contains("new content objects")).unwrap();
    let count: u64 = new.trim().split(' ').next().unwrap().parse().unwrap();
    assert!(count < 20, "{new}");
    ok(tool("ostree").args(["fsck", "--repo"]).arg(&repo));

    // On request, not.
    fs::remove_dir_all(other.path().join("cache")).unwrap();
    treefile(other.path(), "three");
    let fresh = ok(run(&endpoint, other.path(), "3").arg("--fresh"));
    assert!(!fresh.stderr.contains("the commit before is"), "{}", fresh.stderr);

    // A damaged artifact is no commit before.
    fs::remove_dir_all(other.path().join("cache")).unwrap();
    for path in endpoint.stored() {
        let path = endpoint.path("store").join(path);
        let mut bytes = fs::read(&path).unwrap();
        if bytes.len() < 1 << 20 {
            continue;
        }
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    fails(&mut run(&endpoint, other.path(), "4"), 3, "its manifest says sha256:");
    assert!(!repo.join("refs/heads/test/host").exists());
}
