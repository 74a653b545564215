//! `compose`, `pack` and `run` with the dnf engine on real RPMs, and with the
//! rpm-ostree engine on a stand-in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::LazyLock;
use std::time::Duration;

use e2e::containers::USER;
use e2e::{Server, aggregator, builder, compose, fails, ok, rpms, run, source_dir, tool};
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

/// One whole compose of the demo, shared by the tests that only look at it.
struct Composed {
    dir: TempDir,
    commit: String,
}

static DEMO: LazyLock<Composed> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let treefile = treefile(&dir.path().join("treefiles"), "");
    let done = ok(&mut compose(dir.path(), &treefile));
    let result = done.json();
    assert_eq!(result["ref"], "demo/x86_64/host");
    assert_eq!(result["version"], "1");
    // What it says of itself: for machines, and for people at the end of the log.
    let stages = result["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|stage| stage["name"].as_str().unwrap()).collect();
    let expected =
        ["downloading packages", "installing packages", "customizing the tree", "arranging the tree", "committing"];
    assert_eq!(names, expected);
    assert!(stages.iter().all(|stage| stage["seconds"].as_f64().unwrap() >= 0.0), "{stages:?}");
    let table: Vec<&str> = done.stderr.lines().rev().take(5).collect();
    assert!(
        table.iter().rev().zip(expected).all(|(line, name)| line.contains(name) && line.ends_with(" s")),
        "{table:?}"
    );
    assert!(result["newObjects"].as_u64().unwrap() > 1000 && result["newBytes"].as_u64().unwrap() > 1 << 20);
    assert_eq!((&result["previous"], &result["changed"]), (&serde_json::Value::Null, &true.into()));
    let packages = result["packages"].as_array().unwrap();
    assert_eq!(result["added"].as_array().unwrap().len(), packages.len());
    assert!(packages.iter().all(|package| package["bytes"].is_u64() && package["evr"].is_string()), "{packages:?}");
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

/// On a difference, says which paths differ, and how: owners, mode, attributes, content.
#[track_caller]
fn assert_same_commit(one: &Path, first: &str, other: &Path, second: &str) {
    if first == second {
        return;
    }
    let list = |repo: &Path, commit: &str| -> BTreeMap<String, String> {
        let listed = ok(tool("ostree").args(["ls", "-R", "-C", "-X", "--repo"]).arg(repo).args([commit, "/"])).stdout;
        let entry = |line: &str| Some((line[line.find(" /")? + 1..].to_owned(), line.to_owned()));
        listed.lines().filter_map(entry).collect()
    };
    let content = |repo: &Path, commit: &str, path: &str| {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut cat = tool("ostree");
        cat.args(["cat", "--repo"]).arg(repo).args([commit, path]).stdout(file.reopen().unwrap()).status().unwrap();
        file
    };
    let (before, after) = (list(one, first), list(other, second));
    let mut text = String::new();
    let paths: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for path in paths {
        let lines = [before.get(path), after.get(path)].map(|line| line.map_or("(not there)", String::as_str));
        // A directory is another when something in it is: its first checksum.
        let own = |line: &str| {
            line.split_whitespace()
                .enumerate()
                .filter(|(at, _)| *at != 4)
                .map(|(_, part)| part.to_owned())
                .collect::<Vec<_>>()
        };
        if lines[0] == lines[1] || (lines.iter().all(|line| line.starts_with('d')) && own(lines[0]) == own(lines[1])) {
            continue;
        }
        text += &format!("- {}\n+ {}\n", lines[0], lines[1]);
        if lines.iter().all(|line| line.starts_with('-')) {
            let [one, other] = [content(one, first, path), content(other, second, path)];
            let diff = run(tool("diff").arg("-U0").args([one.path(), other.path()])).stdout;
            text.extend(diff.lines().skip(2).take(10).map(|line| format!("    {line}\n")));
        }
    }
    let show =
        |repo: &Path, commit: &str| ok(tool("ostree").args(["show", "--raw", "--repo"]).arg(repo).arg(commit)).stdout;
    let metadata = if text.is_empty() { format!("- {}\n+ {}", show(one, first), show(other, second)) } else { text };
    panic!("the commits differ in:\n{metadata}");
}

#[test]
fn a_difference_is_told_with_its_path_and_kind() {
    let dir = tempfile::tempdir().unwrap();
    let (repo, tree) = (dir.path().join("repo"), dir.path().join("tree"));
    ok(tool("ostree").args(["init", "--mode=archive", "--repo"]).arg(&repo));
    fs::create_dir_all(tree.join("same")).unwrap();
    fs::write(tree.join("same/content"), "one\n").unwrap();
    fs::write(tree.join("mode"), "").unwrap();
    fs::write(tree.join("gone"), "").unwrap();
    let commit = || {
        let mut command = tool("ostree");
        command.arg("commit").args(["--orphan", "--timestamp=@1"]).arg(format!("--repo={}", repo.display()));
        ok(command.arg(&tree)).stdout.trim().to_owned()
    };
    let first = commit();
    fs::write(tree.join("same/content"), "two\n").unwrap();
    fs::set_permissions(tree.join("mode"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::remove_file(tree.join("gone")).unwrap();
    let second = commit();
    let told = std::panic::catch_unwind(|| assert_same_commit(&repo, &first, &repo, &second)).unwrap_err();
    let told = told.downcast_ref::<String>().unwrap();
    for part in ["-00600 ", "-00644 ", " /mode\n", "    -one\n    +two\n", "+ (not there)\n"] {
        assert!(told.contains(part), "{part:?}: {told}");
    }
    assert!(!told.lines().any(|line| line.ends_with(" /same") || line.ends_with(" /")), "{told}");
}

#[test]
fn two_composes_give_the_same_tarball() {
    let first = &*DEMO;
    std::thread::sleep(Duration::from_secs(1));
    // Not below /tmp, which is emptied in the tree.
    let second = tempfile::tempdir_in(e2e::target_dir()).unwrap();
    // Nor does it matter what the caller has set, or to whom new files in its directories belong.
    let cache = second.path().join("cache");
    fs::create_dir(&cache).unwrap();
    std::os::unix::fs::chown(&cache, None, Some(12)).unwrap();
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o2777)).unwrap();
    let mut elsewhere = compose(second.path(), &treefile(&second.path().join("elsewhere"), ""));
    let caller =
        [("LANGUAGE", "de"), ("LANG", "de_DE.UTF-8"), ("TZ", "Asia/Tokyo"), ("TMPDIR", "/var/tmp"), ("X", "y")];
    let result = ok(elsewhere.envs(caller)).json();
    let repo = second.path().join("repo");
    assert_same_commit(&first.dir.path().join("repo"), &first.commit, &repo, result["commit"].as_str().unwrap());
    let one = pack(&first.dir.path().join("repo"), &second.path().join("one"));
    let two = pack(&repo, &second.path().join("two"));
    assert_eq!(one["digest"], two["digest"]);
    ok(tool("cmp").arg(second.path().join("one/repo.tar")).arg(second.path().join("two/repo.tar")));
}

#[test]
fn a_tree_with_a_kernel_is_the_same_on_one_core_and_deploys() {
    let dir = tempfile::tempdir_in(e2e::target_dir()).unwrap();
    let treefile = treefile(&dir.path().join("treefiles"), "");
    ok(tool("cp").arg("-rT").arg(source_dir().join("tests/boot")).arg(treefile.parent().unwrap()));
    rpms::write_repo_file(&treefile.with_file_name("demo.repo"), "demo", &rpms::host_repo()).unwrap();
    let treefile = treefile.with_file_name("host.yaml");
    let first = ok(&mut compose(dir.path(), &treefile)).json();
    let commit = first["commit"].as_str().unwrap();

    let alone = dir.path().join("alone");
    let on_all_cores = compose(&alone, &treefile);
    let mut on_one_core = tool("taskset");
    on_one_core.args(["--cpu-list", "0"]).arg(on_all_cores.get_program()).args(on_all_cores.get_args());
    let second = ok(&mut on_one_core).json();
    assert_same_commit(&dir.path().join("repo"), commit, &alone.join("repo"), second["commit"].as_str().unwrap());

    // Nor does it depend on what the repository has already: accounts are kept, shadows too.
    let again = ok(compose(dir.path(), &treefile).args(["--force-nocache", "--version-string", "1"])).json();
    assert_same_commit(&dir.path().join("repo"), commit, &dir.path().join("repo"), again["commit"].as_str().unwrap());

    let repo = format!("--repo={}", dir.path().join("repo").display());
    let ostree = |arguments: &[&str]| ok(tool("ostree").arg(&repo).args(arguments)).stdout;
    let kernel = ostree(&["show", "--print-metadata-key=ostree.linux", commit]);
    let modules = format!("/usr/lib/modules/{}", kernel.trim().trim_matches('\''));
    let listed = ostree(&["ls", commit, &modules]);
    for file in ["vmlinuz", "initramfs.img", "modules.dep.bin"] {
        assert!(listed.contains(&format!("{modules}/{file}")), "{listed}");
    }
    assert!(ostree(&["show", "--print-metadata-key=ostree.bootable", commit]).contains("true"));

    // As a node does it; the bootloader's entry names what came with the commit.
    let sysroot = dir.path().join("sysroot");
    fs::create_dir(&sysroot).unwrap();
    let admin = |arguments: &[&str]| {
        ok(tool("ostree").arg("admin").args(arguments).arg(format!("--sysroot={}", sysroot.display())))
    };
    ok(tool("ostree").args(["admin", "init-fs", "--modern"]).arg(&sysroot));
    admin(&["os-init", "host"]);
    let node = format!("--repo={}", sysroot.join("ostree/repo").display());
    ok(tool("ostree").args([&node, "pull-local"]).arg(dir.path().join("repo")).arg(commit));
    admin(&["deploy", "--os=host", commit]);
    let entry = fs::read_to_string(sysroot.join("boot/loader/entries/ostree-1-host.conf")).unwrap();
    let path = |key: &str| {
        let line = entry.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{key}: {entry}"));
        sysroot.join("boot").join(line.trim().trim_start_matches('/'))
    };
    assert!(path("linux ").is_file() && path("initrd ").is_file() && entry.contains("version 1"), "{entry}");
    ok(tool("chattr").arg("-i").arg(sysroot.join(format!("ostree/deploy/host/deploy/{commit}.0"))));
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
        // What a script leaves is read with care.
        (
            "repos: [demo]\npackages: [filesystem, setup, bash, coreutils]\n\
             postprocess: ['mkfifo /usr/lib/tmpfiles.d/x.conf']\n",
            "/usr/lib/tmpfiles.d/x.conf of the tree is not a regular file",
        ),
        (
            "repos: [demo]\npackages: [filesystem, setup, bash, coreutils]\n\
             postprocess: ['printf \"root:x:0:0:\\\\351:/root:/bin/sh\" > /etc/passwd']\n",
            "/etc/passwd of the tree is not UTF-8",
        ),
        (
            "repos: [demo]\npackages: [filesystem, setup, bash, coreutils]\n\
             postprocess: ['touch /usr/share/rpm/rpmdb.sqlite-journal']\n",
            "rpmdb.sqlite-journal in the tree is no file of an rpm database",
        ),
        ("repos: [demo]\npackages: [filesystem, setup]\nunits: [none.service]\n", "none.service"),
        ("repos: [demo]\npackages: [filesystem]\nautomatic-version-prefix: '1.<date:%Y'\n", "<date: is not closed"),
        ("repos: [demo]\npackages: [filesystem]\nostree-layers: [other]\n", "ostree-layers"),
    ];
    for (text, reason) in cases {
        fails(&mut compose(dir.path(), &small(dir.path(), text)), 3, reason);
    }
    let full = "postprocess: ['echo No space left on device; exit 1']\n";
    let treefile = small(dir.path(), &format!("repos: [demo]\npackages: [filesystem, setup, bash, coreutils]\n{full}"));
    fails(&mut compose(dir.path(), &treefile), 1, "a disk is full");
    let replaced = |text: &str, from: &str, to: &str| {
        let treefile = small(dir.path(), text);
        fs::write(&treefile, fs::read_to_string(&treefile).unwrap().replace(from, to)).unwrap();
        treefile
    };
    let treefile = replaced("repos: [demo]\npackages: [filesystem]\n", "test/host", "a b");
    fails(&mut compose(dir.path(), &treefile), 3, "host.yaml:1: \"a b\" is no name of a ref");
    let treefile = replaced("repos: [far]\npackages: [filesystem]\n", "releasever: \"1\"\n", "");
    fs::write(dir.path().join("far.repo"), "[far]\nname=far\nbaseurl=http://127.0.0.1:9/$releasever\n").unwrap();
    fails(&mut compose(dir.path(), &treefile), 3, "\"far\" has $releasever in its baseurl");
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
    for _ in 0..4 {
        let milliseconds = RandomState::new().hash_one(0) % 6000;
        eprintln!("killing it after {milliseconds} ms");
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
fn a_killed_pack_leaves_a_whole_artifact_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let repo = DEMO.dir.path().join("repo");
    let whole = pack(&repo, &dir.path().join("whole"));
    let output = dir.path().join("artifact");
    for milliseconds in [1, 5, 10, 20, 30, 45, 60, 80, 100, 150] {
        let mut command = builder();
        command.args(["pack", "--ref", "demo/x86_64/host", "--repo"]).arg(&repo).arg("--output").arg(&output);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        if output.join("manifest.json").exists() {
            ok(tool("diff").arg("-r").arg(&output).arg(dir.path().join("whole")));
            fs::remove_dir_all(&output).unwrap();
        }
    }
    assert_eq!(pack(&repo, &output)["digest"], whole["digest"]);
    ok(tool("diff").arg("-r").arg(&output).arg(dir.path().join("whole")));
}

#[test]
fn an_archive_repository_gets_the_objects_that_libostree_writes() {
    let dir = tempfile::tempdir().unwrap();
    let packages =
        "repos: [demo]\npackages: [filesystem, setup, bash, coreutils, iputils-ping, libc-bin, demo-agent]\n";
    let added = "add-files: [[text, /usr/share/text], [noise, /usr/share/noise], [zeros, /usr/share/zeros]]\n";
    let treefile = small(dir.path(), &format!("{packages}{added}"));
    // Larger than what is deflated as a whole: not a multiple of its parts, a multiple, and what is shorter than it
    // can be told.
    let lines = (0..).map(|number: u64| format!("{number} {}\n", number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40));
    let text: String = lines.take(2_300_000).collect();
    assert!(text.len() > 34 << 20, "{}", text.len());
    fs::write(dir.path().join("text"), text).unwrap();
    ok(tool("openssl").args(["rand", "-out"]).arg(dir.path().join("noise")).arg((36 << 20).to_string()));
    fs::File::create(dir.path().join("zeros")).unwrap().set_len(100 << 20).unwrap();
    let compose_into = |mode: &str| {
        let repo = dir.path().join(mode);
        ok(tool("ostree").arg("init").arg(format!("--mode={mode}")).arg(format!("--repo={}", repo.display())));
        let mut command = builder();
        command.args(["compose", "--engine", "dnf", "--output-format", "json", "--cache-dir"]);
        command.arg(dir.path().join("cache")).arg("--repo").arg(&repo).arg(&treefile);
        (ok(&mut command).json()["commit"].as_str().unwrap().to_owned(), repo)
    };
    // Into any other mode, libostree itself writes.
    let (libostrees, bare_user) = compose_into("bare-user");
    let (ours, archive) = compose_into("archive");
    ok(tool("ostree").arg("fsck").arg(format!("--repo={}", archive.display())));
    assert_same_commit(&bare_user, &libostrees, &archive, &ours);

    // Nor are they larger.
    let peer = dir.path().join("peer");
    let in_peer = format!("--repo={}", peer.display());
    ok(tool("ostree").args(["init", "--mode=archive", &in_peer]));
    ok(tool("ostree").args(["pull-local", &in_peer]).arg(&bare_user).arg(&libostrees));
    let size = |repo: &Path| {
        let listed = ok(tool("find").arg(repo.join("objects")).args(["-name", "*.filez", "-printf", "%s\n"])).stdout;
        listed.lines().map(|size| size.parse::<u64>().unwrap()).sum::<u64>()
    };
    assert!(size(&archive) <= size(&peer), "{} bytes, {} of libostree", size(&archive), size(&peer));
}

#[test]
fn what_did_not_change_is_not_composed_again() {
    let dir = tempfile::tempdir().unwrap();
    let treefile = small(dir.path(), "repos: [demo]\npackages: [filesystem, setup]\nautomatic-version-prefix: '4'\n");
    // No repository asks for a release.
    fs::write(&treefile, fs::read_to_string(&treefile).unwrap().replace("releasever: \"1\"\n", "")).unwrap();
    let composed = |options: &[&str]| {
        let result = ok(compose(dir.path(), &treefile).args(options)).json();
        (result["commit"].as_str().unwrap().to_owned(), result["version"].to_string(), result["changed"] == true)
    };
    let first = composed(&[]);
    assert_eq!((first.1.as_str(), first.2), ("\"4\"", true));
    assert_eq!(composed(&[]), (first.0.clone(), "\"4\"".to_owned(), false));
    assert_eq!(composed(&["--version-string", "4"]), (first.0.clone(), "\"4\"".to_owned(), false));
    // Each of these asks for another commit.
    let version = composed(&["--version-string", "5"]);
    assert_eq!((version.1.as_str(), version.2), ("\"5\"", true));
    let parent = composed(&["--version-string", "5", "--parent", &first.0]);
    assert!(parent.2 && parent.0 != version.0);
    let forced = composed(&["--force-nocache"]);
    // The one before was 5, which the prefix does not continue.
    assert_eq!((forced.1.as_str(), forced.2), ("\"4\"", true));
    fs::write(&treefile, fs::read_to_string(&treefile).unwrap() + "postprocess: ['#!/bin/true']\n").unwrap();
    let other = run(&mut compose(dir.path(), &treefile));
    assert!(other.code == 3, "the tree has no /bin/true: {other:?}");
}

#[test]
fn an_ordinary_user_composes_the_same_commit_also_where_proc_is_masked() {
    let dir = tempfile::tempdir_in(e2e::target_dir()).unwrap();
    let treefile = treefile(&dir.path().join("treefiles"), "");
    ok(tool("chown").arg("-R").arg(format!("{USER}:")).arg(dir.path()));
    let compose = |repo: &str, before: &[&str]| {
        let mut command = tool("setpriv");
        command.args(["--reuid", USER, "--regid", USER, "--init-groups", "--reset-env"]).args(before);
        command.arg(builder().get_program()).args(["compose", "--engine", "dnf", "--output-format", "json", "--repo"]);
        command.arg(dir.path().join(repo)).arg("--cache-dir").arg(dir.path().join("cache")).arg(&treefile);
        ok(&mut command)
    };
    let done = compose("repo", &[]);
    assert!(done.stderr.contains("/proc of their own"), "{}", done.stderr);
    assert_eq!(done.json()["commit"], DEMO.commit.as_str());

    // As in a container whose runtime masks paths: mounts that a new namespace cannot undo.
    let mask = r#"mount --bind /dev/null /proc/uptime
        unshare --user --mount sh -c 'for _ in $(seq 50); do grep -q . /proc/self/gid_map && break; sleep 0.1; done; exec "$@"' sh "$@" &
        for map in uid_map gid_map; do
            for _ in $(seq 50); do printf '0 0 1\n1 1 65535\n' 2>/dev/null >/proc/$!/$map && break; sleep 0.1; done
        done
        wait $!"#;
    let masked = ["unshare", "--user", "--map-root-user", "--map-auto", "--mount", "sh", "-ec", mask, "sh"];
    let done = compose("masked", &masked);
    assert!(done.stderr.contains("/proc, read-only"), "{}", done.stderr);
    assert_eq!(done.json()["commit"], DEMO.commit.as_str());
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
ls "${treefile%/*}" >> "$LOG"
tree=$(mktemp -d); trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree/usr/bin"; echo hi > "$tree/usr/bin/hi"
ostree commit --repo="$repo" --orphan --tree=dir="$tree" "${metadata[@]}" "${parent[@]}" > "$id"
if grep -q pruned "$treefile"; then
  ostree config --repo="$repo" set core.lock-timeout-secs 1
  ! ostree prune --repo="$repo" --refs-only || { echo "error: a commit without a ref could be pruned" >&2; exit 1; }
fi
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
    ok(&mut compose("a", &["--dry-run"]));
    assert!(fs::read_to_string(&log).unwrap().contains("--dry-run") && !dir.path().join("repo").exists());
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
    // Until the ref is set, nobody else can remove the commit.
    let kept = ok(&mut compose("pruned", &["--version-string", "10"])).json();
    ok(tool("ostree").args(["prune", "--refs-only", "--repo"]).arg(dir.path().join("repo")));
    ok(tool("ostree").args(["show", kept["commit"].as_str().unwrap(), "--repo"]).arg(dir.path().join("repo")));
    // It reads only what is beside the treefile.
    fs::create_dir(dir.path().join("repos")).unwrap();
    fs::write(dir.path().join("repos/x.repo"), "[x]\nbaseurl=http://127.0.0.1:1/\n").unwrap();
    ok(&mut compose("c", &["--repos-dir", dir.path().join("repos").to_str().unwrap()]));
    assert!(fs::read_to_string(&log).unwrap().contains("\nrepos-dir-x.repo\n"));
    fails(&mut compose("broken", &[]), 3, "rpm-ostree ended with");
    let mut without = compose("a", &["--engine", "rpm-ostree"]);
    without.env("PATH", std::env::var("PATH").unwrap());
    if run(tool("sh").args(["-c", "command -v rpm-ostree"])).code != 0 {
        fails(&mut without, 2, "rpm-ostree is not in the PATH");
    }
    fails(&mut compose("offline", &[]), 1, "rpm-ostree ended with");
}
