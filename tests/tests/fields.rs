//! What the dnf engine makes of a treefile's fields, and what it says before it does, on
//! real RPMs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use e2e::rpms::package::{Evr, File, Kind, Package, Script, When};
use e2e::{builder, compose, fails, ok, rpms, tool};
use rpm::Dependency;

/// A directory with the treefile `host.yaml` and a repository of the demo's packages.
fn small(dir: &Path, text: &str) -> PathBuf {
    rpms::write_repo_file(&dir.join("demo.repo"), "demo", &rpms::demo_repo()).unwrap();
    let path = dir.join("host.yaml");
    fs::write(&path, format!("ref: test/host\nrepos: [demo]\nselinux: false\nreleasever: \"1\"\n{text}")).unwrap();
    path
}

/// The text of a file in the newest commit.
fn file(dir: &Path, path: &str) -> String {
    ok(tool("ostree").arg("cat").arg("--repo").arg(dir.join("repo")).args(["test/host", path])).stdout
}

fn script(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn fields_change_the_tree() {
    let dir = tempfile::tempdir().unwrap();
    let treefile = small(
        dir.path(),
        r#"repovars: {variant: update}
repo-packages:
- repo: demo
  packages: [demo-agent]
packages: [filesystem, setup, bash, coreutils, sed]
container: true
container-cmd: [/usr/bin/bash, -l]
readonly-executables: true
opt-usrlocal: root
default-target: rescue.target
remove-from-packages:
- [filesystem, "^/usr/share/(?!man)", "^/usr/src$"]
- [setup, 'shel+s$']
postprocess:
- |
  #!/bin/bash
  mkdir -p /usr/local/share && echo local > /usr/local/share/x
"#,
    );
    // The repository's path has the variable in it.
    let update = rpms::update_repo();
    let text =
        format!("[other]\nname=other\nbaseurl=file://{}/$variant\ngpgcheck=0\n", update.parent().unwrap().display())
            + "excludepkgs=sed\n[main]\ngpgcheck=1\n";
    fs::write(dir.path().join("other.repo"), text).unwrap();
    fs::write(&treefile, fs::read_to_string(&treefile).unwrap().replace("[demo]", "[demo, other]")).unwrap();
    script(
        &dir.path().join("finalize.d/10-last"),
        "#!/bin/sh\nset -e\ntest -d usr/etc\nbasename \"$RPMOSTREE_WORKDIR\" > usr/share/man/finalized\n",
    );
    ok(&mut compose(dir.path(), &treefile));

    let checkout = dir.path().join("checkout");
    ok(tool("ostree").arg("checkout").arg("--repo").arg(dir.path().join("repo")).arg("test/host").arg(&checkout));
    let shown = |key: &str| {
        let mut command = tool("ostree");
        command.arg("show").arg("--repo").arg(dir.path().join("repo")).arg(format!("--print-metadata-key={key}"));
        ok(command.arg("test/host")).stdout
    };
    // `other` has a higher release.
    let packages = shown("rpmostree.rpmdb.pkglist");
    assert!(packages.contains("('demo-agent', '0', '1.0', '1', 'noarch')"), "{packages}");
    let sed = packages.split("('").find(|package| package.starts_with("sed',")).unwrap();
    assert!(!sed.contains(".1', '"), "of {sed} there is a newer one, which the .repo file excludes");
    assert_eq!(shown("ostree.container-cmd").trim(), "['/usr/bin/bash', '-l']");
    let mode = |path: &str| fs::metadata(checkout.join(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("usr/bin/bash"), mode("usr/lib/demo/agent"), mode("usr/etc/profile")), (0o555, 0o555, 0o644));
    assert!(fs::symlink_metadata(checkout.join("opt")).unwrap().is_dir());
    assert_eq!(fs::read_to_string(checkout.join("usr/local/share/x")).unwrap(), "local\n");
    let autovar = fs::read_to_string(checkout.join("usr/lib/tmpfiles.d/rpm-ostree-1-autovar.conf")).unwrap();
    assert!(autovar.contains("/var/home") && !autovar.contains("/var/opt"), "{autovar}");
    assert!(!checkout.join("usr/etc/shells").exists() && checkout.join("usr/etc/profile").exists());
    assert!(!checkout.join("usr/src").exists() && !checkout.join("usr/share/misc").exists());
    assert!(checkout.join("usr/share/man/man1").is_dir());
    let target = fs::read_link(checkout.join("usr/lib/systemd/system/default.target")).unwrap();
    assert_eq!(target, Path::new("/usr/lib/systemd/system/rescue.target"));
    let finalized = fs::read_to_string(checkout.join("usr/share/man/finalized")).unwrap();
    assert_eq!(finalized.trim(), dir.path().file_name().unwrap().to_str().unwrap());

    script(&dir.path().join("finalize.d/20-fails"), "#!/bin/sh\necho no luck; exit 4\n");
    fails(&mut compose(dir.path(), &treefile), 3, "20-fails ended with exit status: 4");
}

#[test]
fn accounts_keep_their_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let packages = "packages: [filesystem, setup]\n";
    fs::write(dir.path().join("passwd"), "root:x:0:0:root:/root:/bin/sh\nbin:x:77:78:bin:/:/bin/false\n").unwrap();
    fs::write(dir.path().join("group"), "root:x:0:\nmail:x:444:\nbin:x:78:\n").unwrap();
    let from_files = "check-passwd: {type: file, filename: passwd}\ncheck-groups: {type: file, filename: group}\n";
    let treefile = small(dir.path(), &format!("{packages}{from_files}"));
    ok(&mut compose(dir.path(), &treefile));
    assert_eq!(file(dir.path(), "/usr/lib/passwd"), "bin:x:77:78:bin:/:/bin/false\n");
    assert_eq!(file(dir.path(), "/usr/etc/shadow"), "root:*::0:99999:7:::\nbin:*::0:99999:7:::\n");
    let rpmnew =
        tool("ostree").arg("ls").arg("--repo").arg(dir.path().join("repo")).args(["test/host", "/usr/etc"]).output();
    assert!(!String::from_utf8(rpmnew.unwrap().stdout).unwrap().contains("rpmnew"));

    // From then on the previous commit has the numbers, whatever `setup` says.
    ok(&mut compose(dir.path(), &small(dir.path(), packages)));
    assert!(file(dir.path(), "/usr/lib/group").contains("mail:x:444:"));
    let head = || ok(tool("ostree").args(["rev-parse", "test/host", "--repo"]).arg(dir.path().join("repo"))).stdout;
    let second = head();
    ok(&mut compose(dir.path(), &small(dir.path(), packages)));
    assert_eq!(head(), second, "a kept account changes the commit");
    let changed = small(dir.path(), &format!("{packages}preserve-passwd: false\n"));
    let done = fails(&mut compose(dir.path(), &changed), 3, "check-groups: group mail was 444, and is 8 now");
    assert!(done.stderr.contains("check-passwd: user bin was 77:78, and is 2:2 now"), "{}", done.stderr);

    let data = "preserve-passwd: false\ncheck-passwd: {type: data, entries: {man: [6, 12], gone: 0}}\ncheck-groups: {type: none}\n";
    let treefile = small(dir.path(), &format!("{packages}{data}"));
    fails(&mut compose(dir.path(), &treefile), 3, "user gone (0:0) is gone, but files belong to it");
    ok(&mut compose(dir.path(), &small(dir.path(), &format!("{packages}{data}ignore-removed-users: [gone]\n"))));
    assert!(file(dir.path(), "/usr/lib/passwd").contains("bin:x:2:2:"));
    // Nobody need change a password that is none; the packages' day is not kept.
    assert!(file(dir.path(), "/usr/etc/shadow").contains("man:*::0:99999:7:::"));

    let half = small(dir.path(), &format!("{packages}check-passwd: {{type: file, filename: passwd}}\n"));
    fails(&mut compose(dir.path(), &half), 3, "must both be of type file or neither");
}

#[test]
fn what_dnf_does_not_carry_out_is_refused_with_all_places() {
    let dir = tempfile::tempdir().unwrap();
    let host = "include: base.yaml\ncliwrap: true\nima: false\nostree-layers: [a]\nconditional-include:\n\
                - if: basearch != \"none\"\n  include:\n    gpg-key: \"1\"\n";
    let treefile = small(dir.path(), host);
    let base = "packages: [filesystem]\nselinux-label-version: 1\nostree-layers: [b]\ncliwrap: true\nrepo-metadata: disabled\n\
                override-remove: [bash]\nsysusers: compose-forced\nlockfile-repos: [x]\nmetadata: {a: 1}\n";
    fs::write(dir.path().join("base.yaml"), base).unwrap();
    let done = fails(&mut compose(dir.path(), &treefile), 3, "use --engine rpm-ostree");
    let [host, base] = ["host.yaml", "base.yaml"].map(|name| dir.path().join(name).display().to_string());
    let expected = format!(
        "the dnf engine does not carry out cliwrap ({host}:6), selinux-label-version ({base}:2), gpg-key ({host}:12), ostree-layers ({host}:8, {base}:3): use"
    );
    assert!(done.stderr.contains(&expected), "{}", done.stderr);
    let layering = format!("override-remove ({base}:6): for layering on a booted system, not for a compose");
    assert!(done.stderr.contains(&layering), "{}", done.stderr);
    let units = small(dir.path(), "include: base.yaml\nmachineid-compat: false\n");
    fs::write(dir.path().join("base.yaml"), "packages: [filesystem]\nunits: [a.service]\n").unwrap();
    let reason = format!("units ({base}:2) has no effect with machineid-compat: false ({host}:6)");
    fails(&mut compose(dir.path(), &units), 3, &reason);
    for (text, reason) in [
        ("selinux: true\nmetadata: {}\n", "the tree has no policy"),
        ("repo-packages: [{repo: demo2, packages: [bash]}]\n", "names the repository \"demo2\""),
        ("repovars: {\"../x\": y}\n", "repovars: \"../x\" is no name of a variable"),
        ("remove-from-packages: [[setup, '(']]\n", "remove-from-packages: setup: \"(\""),
    ] {
        let treefile = small(dir.path(), &format!("packages: [filesystem, setup]\n{text}"));
        let without = fs::read_to_string(&treefile).unwrap().replacen(
            "selinux: false\n",
            "",
            usize::from(text.starts_with("selinux")),
        );
        fs::write(&treefile, without).unwrap();
        fails(&mut compose(dir.path(), &treefile), 3, reason);
    }
    assert!(!dir.path().join("repo/refs/heads/test").exists());
}

#[test]
fn a_dry_run_says_what_would_change() {
    let dir = tempfile::tempdir().unwrap();
    let dry = |text: &str, format: &str| {
        let treefile = small(dir.path(), text);
        let update = rpms::update_repo();
        rpms::write_repo_file(&dir.path().join("other.repo"), "other", &update).unwrap();
        let mut command = builder();
        command.args(["compose", "--dry-run", "--engine", "dnf", "--output-format", format, "--cache-dir"]);
        command.arg(dir.path().join("cache")).arg("--repo").arg(dir.path().join("repo")).arg(treefile);
        ok(&mut command)
    };
    let agent = "packages: [filesystem, setup, demo-agent, bash, coreutils]\nadd-files: [[motd, /usr/lib/motd]]\n";
    fs::write(dir.path().join("motd"), "one").unwrap();
    let first = dry(agent, "json").json();
    assert_eq!((&first["changed"], &first["previous"], &first["ref"]), (&true.into(), &().into(), &"test/host".into()));
    assert!(!dir.path().join("repo").exists());
    let commit = ok(&mut compose(dir.path(), &small(dir.path(), agent))).json()["commit"].clone();

    // The plan is what was installed then, package by package.
    let mut show = tool("ostree");
    show.args(["show", "test/host", "--print-metadata-key=rpmostree.rpmdb.pkglist", "--repo"])
        .arg(dir.path().join("repo"));
    let installed = ok(&mut show).stdout;
    let planned = first["packages"].as_array().unwrap();
    assert_eq!(installed.matches("', '").count(), planned.len() * 4);
    for package in planned {
        let evr = package["evr"].as_str().unwrap();
        let version = evr.rsplit_once('-').unwrap().0.rsplit(':').next().unwrap();
        assert!(installed.contains(&format!("('{}', ", package["name"].as_str().unwrap())), "{package}");
        assert!(installed.contains(&format!("'{version}'")), "{package}");
        assert!(package["repository"] == "demo" && package["bytes"].as_u64().unwrap() > 0, "{package}");
    }
    let same = dry(agent, "json").json();
    assert_eq!(
        (&same["changed"], &same["previous"], &same["fields"]),
        (&false.into(), &commit, &serde_json::json!([]))
    );
    assert!(dry(agent, "text").stdout.contains(&format!("nothing changed since commit {}", commit.as_str().unwrap())));

    fs::write(dir.path().join("motd"), "two").unwrap();
    let other = agent.replace("bash, ", "").replace("coreutils", "coreutils, sed") + "documentation: false\n";
    let text = other.replacen("packages:", "repo-packages: [{repo: other, packages: [demo-agent]}]\npackages:", 1);
    let text = format!("{text}repos: [demo, other]\n");
    let treefile = small(dir.path(), "");
    fs::write(&treefile, fs::read_to_string(&treefile).unwrap().replace("repos: [demo]\n", "")).unwrap();
    let base = fs::read_to_string(&treefile).unwrap();
    fs::write(&treefile, base + &text).unwrap();
    let mut command = compose(dir.path(), &treefile);
    command.arg("--dry-run");
    let changed = ok(&mut command).json();
    assert_eq!(changed["changed"], true);
    assert_eq!(changed["fields"], serde_json::json!(["documentation", "packages", "repo-packages", "repos"]));
    assert_eq!((&changed["files"], &changed["downgraded"]), (&true.into(), &serde_json::json!([])));
    let agent = serde_json::json!({"package": "demo-agent.noarch", "from": "1.0-1", "to": "1.0-2"});
    assert!(changed["upgraded"].as_array().unwrap().contains(&agent), "{}", changed["upgraded"]);
    let starts = |key: &str, name: &str| {
        changed[key].as_array().unwrap().iter().any(|package| package.as_str().unwrap().starts_with(name))
    };
    assert!(starts("added", "sed-"), "{}", changed["added"]);
    let mut command = builder();
    command.args(["compose", "--engine", "dnf", "--dry-run", "--cache-dir"]).arg(dir.path().join("cache"));
    let text = ok(command.arg("--repo").arg(dir.path().join("repo")).arg(&treefile)).stdout;
    assert!(text.contains("demo-agent.noarch 1.0-1 → 1.0-2") && text.contains("content of files"), "{text}");
    let head = ok(tool("ostree").args(["rev-parse", "test/host", "--repo"]).arg(dir.path().join("repo"))).stdout;
    assert_eq!(head.trim(), commit.as_str().unwrap());
}

#[test]
fn the_kernel_is_where_old_and_new_systems_look_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let fields = "no-initramfs: true\nadd-files: []\npackages: [filesystem, setup, bash, coreutils, kmod, linux-image-cloud-amd64]\n";
    let compose_with = |more: &str| {
        let treefile = small(dir.path(), &format!("{fields}{more}"));
        rpms::write_repo_file(&dir.path().join("demo.repo"), "demo", &rpms::host_repo()).unwrap();
        ok(&mut compose(dir.path(), &treefile));
        let list = |path: &str| {
            let mut command = tool("ostree");
            command.args(["ls", "--checksum", "--recursive", "--repo"]).arg(dir.path().join("repo"));
            ok(command.args(["test/host", path])).stdout
        };
        let mut linux = tool("ostree");
        linux.args(["show", "test/host", "--print-metadata-key=ostree.linux", "--repo"]).arg(dir.path().join("repo"));
        let version = ok(&mut linux).stdout.trim().trim_matches('\'').to_owned();
        (list(&format!("/usr/lib/modules/{version}/vmlinuz")), list("/usr/lib/ostree-boot"), list("/boot"), version)
    };
    let left = "postprocess:\n- |\n  #!/bin/bash\n  set -e\n  mkdir -p /boot/loader/entries\n  \
                touch /boot/loader/entries/one.conf\n  \
                echo '0123  /boot/vmlinuz-1' > \"$(echo /usr/lib/modules/*)/.vmlinuz.hmac\"\n";
    let (modules, old, boot, version) = compose_with(left);
    assert_eq!(file(dir.path(), &format!("/usr/lib/modules/{version}/.vmlinuz.hmac")), "0123  vmlinuz-1\n");
    assert!(!old.contains("loader"), "{old}");
    let checksum = |line: &str| line.split_whitespace().nth(4).unwrap().to_owned();
    let link = old.lines().find(|line| line.contains(&format!("/usr/lib/ostree-boot/vmlinuz-{version}-"))).unwrap();
    assert_eq!(checksum(&modules), checksum(link));
    assert!(old.contains(&format!("/usr/lib/ostree-boot/config-{version}")), "{old}");
    assert!(!old.contains("initramfs") && boot.lines().count() == 1, "{old}\n{boot}");
    let (_, old, _, _) = compose_with("boot-location: modules\n");
    assert!(old.contains("/config-") && !old.contains("vmlinuz"), "{old}");

    // A dracut that fails is told with its last words, and nothing else changes.
    let fails_script = "postprocess:\n  - |\n    #!/bin/bash\n    printf '#!/bin/bash\\necho no module ostree >&2; exit 7\\n' > /usr/bin/dracut\n    chmod 755 /usr/bin/dracut\n";
    let treefile =
        small(dir.path(), &format!("{}{fails_script}", fields.replace("no-initramfs: true", "no-initramfs: false")));
    rpms::write_repo_file(&dir.path().join("demo.repo"), "demo", &rpms::host_repo()).unwrap();
    let done = fails(&mut compose(dir.path(), &treefile), 3, "dracut ended with exit status: 7");
    assert!(done.stderr.contains("no module ostree"), "{}", done.stderr);
}

/// A repository of one package that has something for each of the smaller fields, and of one
/// that it recommends.
fn repository_of_everything(dir: &Path) {
    let package = |name: &str, files: Vec<File>| Package {
        name: name.to_owned(),
        evr: Evr { epoch: 0, version: "1".to_owned(), release: "1".to_owned() },
        arch: "noarch".to_owned(),
        summary: name.to_owned(),
        files,
        ..Package::default()
    };
    let linked = |path: &str| {
        let mut file = File::regular(path, 0o644, "one inode\n");
        if let Kind::Regular(regular) = &mut file.kind {
            regular.hardlink = Some("linked".to_owned());
        }
        file
    };
    let unit = "[Unit]\nDescription=x\n[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n";
    let told = "d /run/everything/told 0700 mail mail -\nd '/var/lib/everything/x y' 0755 root root\n";
    let mut files = vec![
        File::regular("/usr/share/doc/everything/readme", 0o644, "read me\n"),
        File::regular("/usr/share/locale/de/LC_MESSAGES/everything.mo", 0o644, "de"),
        File::regular("/usr/share/locale/fr/LC_MESSAGES/everything.mo", 0o644, "fr"),
        linked("/usr/lib/everything/a"),
        linked("/usr/lib/everything/b"),
        File::regular("/usr/lib/systemd/system/wanted.service", 0o644, unit),
        File::regular("/usr/lib/systemd/system/unwanted.service", 0o644, unit),
        File::regular("/usr/lib/systemd/system-preset/10-everything.preset", 0o644, "enable wanted.*\ndisable *\n"),
        File::regular("/usr/lib/sysusers.d/everything.conf", 0o644, "u everything 777 - /var/lib/everything\n"),
        File::regular("/usr/lib/tmpfiles.d/everything.conf", 0o644, told),
        File::directory("/var/lib/everything", 0o2750).owned_by("mail", "man"),
        File::regular("/var/lib/everything/data%", 0o640, "content\n").owned_by("mail", "man"),
        File::symlink("/var/lib/everything/link", "data%"),
        File::regular("/var/lib/everything/a b\"", 0o644, "odd\n"),
        File::directory("/var/lib/everything/x y", 0o755),
        File::directory("/run/everything", 0o711),
        File::directory("/run/everything/told", 0o700),
        File::symlink("/run/everything/link", "told"),
    ];
    files.extend(["/usr/share/doc/everything", "/usr/lib/everything"].map(|path| File::directory(path, 0o755)));
    let preset = "systemctl --no-reload preset wanted.service unwanted.service\n".to_owned();
    let script = Script { when: When::PostTrans, interpreter: "/bin/sh", body: preset };
    let everything = Package {
        requires: ["filesystem", "setup", "systemd"].map(Dependency::any).to_vec(),
        recommends: vec![Dependency::any("recommended")],
        scripts: vec![script],
        ..package("everything", files)
    };
    fs::create_dir(dir).unwrap();
    everything.write(dir).unwrap();
    package("recommended", vec![File::regular("/usr/lib/recommended", 0o644, "")]).write(dir).unwrap();
    let moved = vec![
        File::directory("/opt/tool", 0o755),
        File::regular("/opt/tool/run", 0o755, "new\n"),
        File::regular("/var/opt/data", 0o644, "kept\n"),
        File::directory("/var/lib/alternatives", 0o755),
        File::regular("/var/lib/alternatives/tool", 0o644, "auto\n"),
        File::regular("/var/lib/systemd/random-seed", 0o600, "the same for all\n"),
        File::regular("/var/log/wtmp", 0o664, ""),
        File::regular("/var/lib/dbus/machine-id", 0o644, "0123\n"),
        File::regular("/var/cache/man/index.db", 0o644, "a cache\n"),
        File::regular("/etc/ssh/ssh_host_rsa_key", 0o600, "everybody's\n"),
        File::config("/etc/default/useradd", 0o644, "GROUP=100\nHOME=/home\n"),
        File::regular("/usr/lib/systemd/system/ostree-remount.service", 0o644, unit),
    ];
    let twice = ["/opt/one", "/var/opt/one"].map(|path| File::regular(path, 0o644, ""));
    let overlay = vec![
        File::regular("/usr/lib/systemd/system/ostree-state-overlay@.service", 0o644, unit),
        File::regular("/usr/local/bin/own", 0o755, "own\n"),
    ];
    for (name, files) in [("moved", moved), ("twice", twice.to_vec()), ("overlay", overlay)] {
        Package { requires: vec![Dependency::any("filesystem")], ..package(name, files) }.write(dir).unwrap();
    }
    // Whose file it is, nobody knows.
    for (name, content) in [("owner", "one"), ("rival", "other")] {
        let files = vec![File::regular("/usr/lib/owned", 0o644, content)];
        Package { requires: vec![Dependency::any("filesystem")], ..package(name, files) }.write(dir).unwrap();
    }
    let lost = Package {
        requires: vec![Dependency::any("filesystem")],
        ..package("lost", vec![File::regular("/run/lost", 0o644, "x")])
    };
    lost.write(dir).unwrap();
    ok(tool("createrepo_c").arg("-q").arg(dir));
}

#[test]
fn smaller_fields_and_what_packages_bring_are_in_the_tree() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    repository_of_everything(&dir.path().join("own"));
    let packages = "packages: [filesystem, setup, demo-release, bash, coreutils, everything]\n";
    let composed = |name: &str, fields: &str, options: &[&str]| {
        let treefile = small(dir.path(), &format!("{packages}{fields}"));
        rpms::write_repo_file(&dir.path().join("demo.repo"), "demo", &rpms::host_repo()).unwrap();
        rpms::write_repo_file(&dir.path().join("own.repo"), "own", &dir.path().join("own")).unwrap();
        fs::write(&treefile, fs::read_to_string(&treefile).unwrap().replace("[demo]", "[demo, own]")).unwrap();
        ok(compose(dir.path(), &treefile).args(options));
        let checkout = dir.path().join(name);
        let repo = dir.path().join("repo");
        ok(tool("ostree").args(["checkout", "--repo"]).arg(repo).arg("test/host").arg(&checkout));
        checkout
    };
    let mutate = "automatic-version-prefix: \"1\"\nmutate-os-release: \"1\"\n";
    let tree = composed("first", mutate, &["--version-string", "1.7"]);
    let read = |path: &str| fs::read_to_string(tree.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let is = |path: &str| tree.join(path).symlink_metadata().is_ok();
    let os_release = read("usr/lib/os-release");
    assert!(os_release.contains("OSTREE_VERSION='1.7'") && os_release.contains("demo 1.7\""), "{os_release}");
    assert!(is("usr/share/doc/everything/readme") && is("usr/lib/recommended"));
    assert!(is("usr/share/locale/de/LC_MESSAGES/everything.mo") && is("usr/share/locale/fr/LC_MESSAGES/everything.mo"));
    assert_eq!(read("usr/etc/machine-id"), "");
    assert_eq!(fs::read_link(tree.join("tmp")).unwrap(), Path::new("sysroot/tmp"));
    assert!(!read("usr/etc/group").contains("sudo"));
    // Of what a package has: one object of several names, presets, accounts, /var and /run.
    let mut list = tool("ostree");
    list.args(["ls", "-C", "--repo"]).arg(dir.path().join("repo")).args(["test/host", "/usr/lib/everything"]);
    let listed = ok(&mut list).stdout;
    let object = |name: &str| listed.lines().find(|line| line.ends_with(name)).unwrap().split_whitespace().nth(4);
    assert_eq!(object("/usr/lib/everything/a"), object("/usr/lib/everything/b"));
    assert_eq!(
        (read("usr/lib/everything/a"), read("usr/lib/everything/b")),
        ("one inode\n".into(), "one inode\n".into())
    );
    let wants = "usr/etc/systemd/system/multi-user.target.wants";
    assert!(is(&format!("{wants}/wanted.service")) && !is(&format!("{wants}/unwanted.service")));
    assert!(read("usr/lib/passwd").contains("everything:x:777:777:"), "{}", read("usr/lib/passwd"));
    let autovar = read("usr/lib/tmpfiles.d/rpm-ostree-autovar.conf");
    let ours: Vec<&str> = autovar.lines().filter(|line| line.contains("everything")).collect();
    assert_eq!(
        ours,
        [
            r#"C "/var/lib/everything/a b\"" 0644 root root - /usr/share/factory/var/lib/everything/a\x20b\x22"#,
            "C /var/lib/everything/data%% 0640 mail man - /usr/share/factory/var/lib/everything/data%%",
            "L /run/everything/link - - - - told",
            "L /var/lib/everything/link - - - - data%%",
            "d /run/everything 0711 root root - -",
            "d /var/lib/everything 2750 mail man - -",
        ]
    );
    assert_eq!(read("usr/share/factory/var/lib/everything/data%"), "content\n");
    // systemd itself takes these lines.
    let made = dir.path().join("made");
    ok(tool("cp").arg("-a").arg(&tree).arg(&made));
    fs::rename(made.join("usr/etc"), made.join("etc")).unwrap();
    ok(tool("sh")
        .args(["-c", "cat $0/usr/lib/passwd >> $0/etc/passwd; cat $0/usr/lib/group >> $0/etc/group"])
        .arg(&made));
    let files = ["rpm-ostree-1-autovar.conf", "rpm-ostree-autovar.conf", "everything.conf"];
    let done = ok(tool("systemd-tmpfiles").arg("--create").arg(format!("--root={}", made.display())).args(files));
    assert!(!done.stderr.contains("Duplicate"), "{}", done.stderr);
    assert_eq!(fs::read_to_string(made.join("var/lib/everything/data%")).unwrap(), "content\n");
    assert_eq!(fs::read_to_string(made.join("var/lib/everything/a b\"")).unwrap(), "odd\n");
    let meta = |path: &str| {
        let meta = made.join(path).symlink_metadata().unwrap();
        (meta.mode() & 0o7777, meta.uid(), meta.gid())
    };
    assert_eq!(meta("var/lib/everything"), (0o2750, 8, 12));
    assert_eq!(meta("run/everything/told"), (0o700, 8, 8));

    let other = "documentation: false\nrecommends: false\ninstall-langs: [de]\ntmp-is-dir: true\n\
                 machineid-compat: false\netc-group-members: [sudo]\n";
    let tree = composed("second", other, &[]);
    let is = |path: &str| tree.join(path).symlink_metadata().is_ok();
    assert!(!is("usr/share/doc/everything/readme") && !is("usr/lib/recommended"));
    assert!(
        is("usr/share/locale/de/LC_MESSAGES/everything.mo") && !is("usr/share/locale/fr/LC_MESSAGES/everything.mo")
    );
    assert!(!is("usr/etc/machine-id"));
    let tmp = tree.join("tmp").symlink_metadata().unwrap();
    assert_eq!((tmp.is_dir(), tmp.mode() & 0o7777), (true, 0o1777));
    let group = |path: &str| fs::read_to_string(tree.join(path)).unwrap();
    assert!(group("usr/etc/group").contains("sudo:x:27:") && group("usr/lib/group").contains("sudo:x:27:"));

    for (package, reason) in [
        ("owner, rival", "/usr/lib/owned conflicts between"),
        ("lost", "has the file /run/lost"),
        ("twice", "both /opt/one and /var/opt/one"),
    ] {
        let treefile = small(dir.path(), &format!("packages: [filesystem, setup, {package}]\n"));
        fs::write(&treefile, fs::read_to_string(&treefile).unwrap().replace("[demo]", "[demo, own]")).unwrap();
        fails(&mut compose(dir.path(), &treefile), 3, reason);
    }
}

/// What an update must bring is in /usr, however packages have it, and what belongs to one machine is
/// nowhere; scripts find /etc under both names, the package database's place and the treefile.
#[test]
fn what_an_update_must_bring_is_in_usr() {
    let dir = tempfile::tempdir().unwrap();
    repository_of_everything(&dir.path().join("own"));
    let text = r#"packages: [filesystem, setup, bash, coreutils, grep, moved]
postprocess:
- |
  #!/bin/bash
  set -e
  test /usr/etc/default/useradd -ef /etc/default/useradd
  echo script > /usr/etc/made
  grep -q moved /usr/share/rpm-ostree/treefile.json
  grep -q /usr/share/rpm /usr/lib/rpm/macros.d/macros.rpm-ostree
  echo "$SOURCE_DATE_EPOCH $HOSTNAME" > /usr/lib/seen
add-files:
- [added, /usr/etc/added]
"#;
    fs::write(dir.path().join("added"), "file\n").unwrap();
    let treefile = small(dir.path(), text);
    rpms::write_repo_file(&dir.path().join("own.repo"), "own", &dir.path().join("own")).unwrap();
    fs::write(&treefile, fs::read_to_string(&treefile).unwrap().replace("[demo]", "[demo, own]")).unwrap();
    ok(&mut compose(dir.path(), &treefile));
    let autovar = file(dir.path(), "/usr/lib/tmpfiles.d/rpm-ostree-autovar.conf");
    for line in [
        "L /var/opt/tool - - - - ../../usr/lib/opt/tool",
        "L /var/lib/alternatives - - - - ../../usr/lib/alternatives",
        "C /var/opt/data 0644 root root - /usr/share/factory/var/opt/data",
    ] {
        assert!(autovar.lines().any(|found| found == line), "{line}: {autovar}");
    }
    assert!(["random-seed", "wtmp", "machine-id", "index.db"].iter().all(|name| !autovar.contains(name)), "{autovar}");
    let keys =
        ok(tool("ostree").args(["ls", "--repo"]).arg(dir.path().join("repo")).args(["test/host", "/usr/etc/ssh"]));
    assert!(!keys.stdout.contains("ssh_host"), "{}", keys.stdout);
    for (path, content) in [
        ("/usr/lib/opt/tool/run", "new\n"),
        ("/usr/lib/alternatives/tool", "auto\n"),
        ("/usr/etc/default/useradd", "GROUP=100\nHOME=/var/home\n"),
        ("/usr/etc/made", "script\n"),
        ("/usr/etc/added", "file\n"),
        ("/usr/lib/seen", "1750000000 localhost\n"),
    ] {
        assert_eq!(file(dir.path(), path), content, "{path}");
    }
    let wants = "/usr/lib/systemd/system/multi-user.target.wants";
    let listed = ok(tool("ostree").args(["ls", "--repo"]).arg(dir.path().join("repo")).args(["test/host", wants]));
    assert!(listed.stdout.contains("ostree-remount.service -> ../ostree-remount.service"), "{}", listed.stdout);

    let overlaid = |packages: &str| {
        let text = format!("packages: [filesystem, setup, {packages}]\nopt-usrlocal: state-overlay\n");
        let treefile = small(dir.path(), &text);
        fs::write(&treefile, fs::read_to_string(&treefile).unwrap().replace("[demo]", "[demo, own]")).unwrap();
        compose(dir.path(), &treefile)
    };
    ok(&mut overlaid("moved, overlay"));
    assert_eq!(file(dir.path(), "/usr/lib/opt/tool/run"), "new\n");
    assert_eq!(file(dir.path(), "/usr/local/bin/own"), "own\n");
    let autovar = ["", "-1"].map(|part| format!("/usr/lib/tmpfiles.d/rpm-ostree{part}-autovar.conf"));
    let autovar = autovar.map(|path| file(dir.path(), &path)).concat();
    assert!(!autovar.contains("/var/opt/tool") && !autovar.contains("d /var/usrlocal"), "{autovar}");
    let requires = "/usr/lib/systemd/system/local-fs.target.requires";
    let mut list = tool("ostree");
    list.args(["ls", "--repo"]).arg(dir.path().join("repo")).args(["test/host", "/opt", requires]);
    let listed = ok(&mut list).stdout;
    for link in [
        " /opt -> usr/lib/opt",
        "@usr-lib-opt.service -> ../ostree-state-overlay@usr-lib-opt.service",
        "@usr-local.service -> ../ostree-state-overlay@usr-local.service",
    ] {
        assert!(listed.contains(link), "{link}: {listed}");
    }
    // Old paths lead there, where no package has them.
    assert!(!autovar.contains("L /var/opt "), "{autovar}");
    ok(&mut overlaid("overlay"));
    let autovar = file(dir.path(), "/usr/lib/tmpfiles.d/rpm-ostree-1-autovar.conf");
    for line in ["L /var/opt - - - - ../usr/lib/opt", "L /var/usrlocal - - - - ../usr/local"] {
        assert!(autovar.lines().any(|found| found == line), "{line}: {autovar}");
    }
    fails(&mut overlaid("moved"), 3, "needs ostree-state-overlay@.service, which no package here has");

    for (text, reason) in [
        ("add-files: [[added, /usr/lib]]\n", "add-files: /usr/lib is a directory in the tree"),
        ("remove-files: [\"./\"]\n", "not the root itself"),
    ] {
        let treefile = small(dir.path(), &format!("packages: [filesystem, setup]\n{text}"));
        fails(&mut compose(dir.path(), &treefile), 3, reason);
    }
}
