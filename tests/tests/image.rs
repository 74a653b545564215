//! `image`, driven as a user drives it; what it writes is read by the engines and the
//! registry that people use.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::repo::OstreeRepo;
use e2e::{aggregator, fails, free_address, ok, run, tool};
use serde_json::Value;
use tempfile::TempDir;

const REF: &str = "demo/x86_64/host";

fn image(repo: &Path, output: &str) -> Command {
    let mut command = aggregator();
    command.args(["image", "--output-format", "json", "--repo"]).arg(repo).args(["--output", output]);
    command
}

fn skopeo(arguments: &[&str]) -> Value {
    let done = ok(tool("skopeo").args(arguments));
    serde_json::from_str(&done.stdout).expect("skopeo prints JSON")
}

/// Paths below `root`, as `find` prints them.
fn listing(root: &Path) -> Vec<String> {
    let done = ok(tool("find").arg(root).args(["-mindepth", "1", "-printf", "%P\n"]));
    let mut lines: Vec<String> = done.stdout.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// The blob that a descriptor names, in the layout at `root`.
fn blob(root: &Path, descriptor: &Value) -> PathBuf {
    let digest = descriptor["digest"].as_str().expect("a descriptor has a digest");
    root.join("blobs/sha256").join(digest.strip_prefix("sha256:").expect("sha256 is used"))
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("the file is there")).expect("it is JSON")
}

#[test]
fn an_image_is_a_log_of_layers_that_say_what_they_hold() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    let out = dir.path().join("out");
    let printed = ok(&mut image(&repo.path, &format!("oci:{}:v1", out.display()))).json();
    assert_eq!(printed["image"], format!("oci:{}:v1", out.display()));
    assert_eq!((&printed["layers"], &printed["fresh"]), (&2.into(), &true.into()));

    let index = json(&out.join("index.json"));
    let entry = &index["manifests"][0];
    assert_eq!(entry["digest"], printed["digest"]);
    assert_eq!(entry["annotations"]["org.opencontainers.image.ref.name"], "v1");
    let manifest = json(&blob(&out, entry));
    let config = json(&blob(&out, &manifest["config"]));
    let labels = &config["config"]["Labels"];
    for (label, expected) in [
        ("ostree.commit", commit.as_str()),
        ("ostree.ref", REF),
        ("version", "1.<2>"),
        ("org.opencontainers.image.version", "1.<2>"),
        ("org.opencontainers.image.revision", &commit),
        ("org.opencontainers.image.created", "2023-11-14T22:13:20Z"),
    ] {
        assert_eq!(labels[label], expected, "{label}");
        assert_eq!(manifest["annotations"][label], expected, "{label}");
    }
    assert_eq!(config["created"], "2023-11-14T22:13:20Z");
    let entrypoint = ["/usr/bin/oscontainer-aggregator", "serve"];
    assert_eq!(config["config"]["Entrypoint"], serde_json::json!(entrypoint));

    let mut new_bytes = 0;
    for (number, layer) in manifest["layers"].as_array().unwrap().iter().enumerate() {
        assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
        let path = blob(&out, layer);
        let size = fs::metadata(&path).unwrap().len();
        assert_eq!(layer["size"], size);
        new_bytes += size;
        let sum = ok(tool("sh").args(["-c", "gzip -dc \"$0\" | sha256sum"]).arg(&path)).stdout;
        assert_eq!(config["rootfs"]["diff_ids"][number], format!("sha256:{}", &sum[..64]));

        // The index is the first file, and it names every entry after it.
        let name = format!("usr/share/oscontainer/layers/{number:04}.json");
        let own: Value = serde_json::from_str(&ok(tool("tar").arg("-xzOf").arg(&path).arg(&name)).stdout)
            .expect("the index is JSON");
        assert_eq!((&own["schemaVersion"], &own["layer"]), (&1.into(), &number.into()));
        let entries = ok(tool("tar").arg("-tzf").arg(&path)).stdout;
        let first = entries.lines().find(|entry| !entry.ends_with('/'));
        assert_eq!(first, Some(name.as_str()));
        let mut expected: Vec<String> = strings(&own["directories"]).map(|path| format!("{path}/")).collect();
        let objects = own["objects"].as_object().unwrap();
        expected.extend(objects.keys().map(|name| format!("srv/repo/objects/{}/{}", &name[..2], &name[2..])));
        expected.extend(own["files"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap().to_owned()));
        expected.push(name);
        let mut entries: Vec<&str> = entries.lines().collect();
        entries.sort_unstable();
        expected.sort();
        assert_eq!(entries, expected);
        if number == 1 {
            assert_eq!((own["ref"].as_str(), own["commit"].as_str()), (Some(REF), Some(commit.as_str())));
        }
        assert_size_follows_from(&own, &path);
    }
    assert_eq!(printed["newBytes"], new_bytes);

    // What is in it is a repository that libostree finds nothing wrong with.
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    for layer in manifest["layers"].as_array().unwrap() {
        ok(tool("tar").arg("-C").arg(&root).arg("-xpzf").arg(blob(&out, layer)));
    }
    let inside = format!("--repo={}", root.join("srv/repo").display());
    ok(tool("ostree").args([&inside, "fsck"]));
    assert_eq!(ok(tool("ostree").args([&inside, "rev-parse", REF])).stdout.trim(), commit);
    let summary = ok(tool("ostree").args([&inside, "summary", "--view"])).stdout;
    assert!(summary.contains(REF) && summary.contains(&commit), "{summary}");
    let odd =
        ok(tool("find").arg(&root).args(["-mindepth", "1", "-not", "-perm", "644", "-not", "-perm", "755"])).stdout;
    assert_eq!(odd, "");
}

fn strings(value: &Value) -> impl Iterator<Item = &str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// docs/image.md: the index alone gives the size of its layer.
fn assert_size_follows_from(index: &Value, layer: &Path) {
    let own = serde_json::to_vec(index).unwrap().len() as u64 + 1;
    let objects = index["objects"].as_object().unwrap().values().cloned();
    let files = index["files"].as_array().unwrap().iter().map(|file| file["size"].clone());
    let content: u64 = objects.chain(files).map(|size| 512 + size.as_u64().unwrap().next_multiple_of(512)).sum::<u64>();
    let directories = 512 * index["directories"].as_array().unwrap().len() as u64;
    let tar = 512 + own.next_multiple_of(512) + content + directories + 1024;
    assert_eq!(fs::metadata(layer).unwrap().len(), 10 + tar + 5 * (tar / 65_535 + 1) + 8);
}

#[test]
fn two_runs_a_second_apart_give_one_digest() {
    let mut digests = Vec::new();
    for run in 0..2 {
        let dir = TempDir::new().unwrap();
        let repo = OstreeRepo::new(dir.path(), "repo");
        repo.commit(REF, "one");
        if run == 1 {
            // What is not reached from the ref, and what the repository says of itself, stays out.
            repo.commit("another/ref", "two");
            ok(repo.ostree().args(["remote", "add", "--no-gpg-verify", "r", "http://example.com/"]));
            std::thread::sleep(Duration::from_millis(1100));
        }
        for output in ["oci:x", "oci:y:tag", "oci-archive:z.tar"] {
            let done = ok(image(&repo.path, output).args(["--ref", REF]).current_dir(dir.path()));
            digests.push(done.json()["digest"].as_str().unwrap().to_owned());
        }
        let entries = listing(dir.path());
        assert!(!entries.iter().any(|entry| entry.contains("oscontainer-")), "{entries:?}");
        digests.push(ok(tool("sha256sum").arg(dir.path().join("z.tar"))).stdout[..64].to_owned());
    }
    assert_eq!(digests[..4], digests[4..]);
    assert!(digests[0] == digests[1] && digests[1] == digests[2], "{digests:?}");
}

#[test]
fn a_layout_and_an_archive_are_read_and_copied_with_one_digest() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    let layout = format!("oci:{}", dir.path().join("layout").display());
    let archive = format!("oci-archive:{}:v1", dir.path().join("a.tar").display());
    let digest = ok(&mut image(&repo.path, &layout)).json()["digest"].clone();
    ok(&mut image(&repo.path, &archive));
    for reference in [&layout, &archive] {
        let seen = skopeo(&["inspect", reference]);
        assert_eq!(seen["Digest"], digest);
        assert_eq!(seen["Labels"]["ostree.commit"], commit);
    }

    let registry = Registry::start(dir.path());
    let pushed = format!("docker://{}/oscontainer:v1", registry.address);
    let back = format!("oci:{}:v1", dir.path().join("back").display());
    ok(tool("skopeo").args(["copy", "--dest-tls-verify=false", &layout, &pushed]));
    assert_eq!(skopeo(&["inspect", "--tls-verify=false", &pushed])["Digest"], digest);
    ok(tool("skopeo").args(["copy", "--src-tls-verify=false", &pushed, &back]));
    assert_eq!(skopeo(&["inspect", &back])["Digest"], digest);

    // Another reader of layouts, without a container engine.
    let bundle = dir.path().join("bundle");
    ok(tool("umoci").args(["unpack", "--image"]).arg(back.trim_start_matches("oci:")).arg(&bundle));
    let inside = format!("--repo={}", bundle.join("rootfs/srv/repo").display());
    ok(tool("ostree").args([&inside, "fsck"]));
}

#[test]
fn an_image_joins_a_layout_that_is_there() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.commit(REF, "one");
    let out = dir.path().join("out");
    let to = |tag: &str| format!("oci:{}:{tag}", out.display());
    let first = ok(&mut image(&repo.path, &to("a"))).json()["digest"].clone();
    let again = ok(&mut image(&repo.path, &to("a"))).json()["digest"].clone();
    assert_eq!(first, again);
    repo.commit(REF, "two");
    let second = ok(&mut image(&repo.path, &to("b"))).json()["digest"].clone();
    assert_ne!(first, second);
    assert_eq!(skopeo(&["inspect", &to("a")])["Digest"], first);
    assert_eq!(skopeo(&["inspect", &to("b")])["Digest"], second);
    ok(&mut image(&repo.path, &to("a")));
    assert_eq!(skopeo(&["inspect", &to("a")])["Digest"], second);
    assert_eq!(json(&out.join("index.json"))["manifests"].as_array().unwrap().len(), 2);
    let entries = listing(&out);
    assert!(entries.iter().all(|entry| !entry.starts_with('.')), "{entries:?}");
}

#[test]
fn a_killed_run_leaves_nothing_visible_and_the_next_one_cleans_up() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.commit(REF, "one");
    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    let out = work.join("out");
    for output in ["oci:work/out", "oci-archive:work/out"] {
        let mut child = image(&repo.path, output)
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the aggregator starts");
        // Killed as soon as it writes: the layers are still to come.
        while fs::read_dir(&work).unwrap().count() == 0 {
            assert!(child.try_wait().expect("a child can be asked").is_none(), "it ended before it wrote");
        }
        child.kill().expect("it can be killed");
        child.wait().expect("it can be waited for");
        assert!(!out.exists());
        assert_eq!(listing(&work).iter().filter(|entry| !entry.contains('/')).count(), 1);
        ok(image(&repo.path, output).current_dir(dir.path()));
        assert_eq!(fs::read_dir(&work).unwrap().count(), 1, "what the killed run left is gone");
        assert!(out.exists());
        ok(tool("rm").arg("-r").arg(&out));
    }
}

#[test]
fn bad_input_is_told_apart() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let path = dir.path().join("out");
    let out = format!("oci:{}", path.display());
    fails(&mut image(&repo.path, &out), 2, "no refs");
    repo.commit(REF, "one");
    for (output, reason) in [
        ("docker://localhost/a", "skopeo copy oci:DIR docker://"),
        ("out", "oci:DIR"),
        ("oci:", "oci:DIR"),
        ("oci:x:-", "not a valid name"),
        ("oci:/", "no directory"),
    ] {
        fails(&mut image(&repo.path, output), 2, reason);
    }
    fails(&mut image(&repo.path, &format!("oci:{}", repo.path.display())), 2, "no OCI image layout");
    fails(image(&repo.path, &out).args(["--ref", "no/such"]), 2, "no/such");
    fails(image(&repo.path, &out).args(["--server", "/bin/true"]), 2, "make static");
    fails(image(&repo.path, &out).args(["--server", "/etc/passwd"]), 2, "no ELF executable");
    repo.commit("b", "two");
    fails(&mut image(&repo.path, &out), 2, "several refs");

    let objects = ok(tool("find").arg(repo.path.join("objects")).args(["-name", "*.filez"])).stdout;
    fs::remove_file(objects.lines().next().expect("there are objects")).unwrap();
    let done = run(image(&repo.path, &out).args(["--ref", REF]));
    let other = run(image(&repo.path, &out).args(["--ref", "b"]));
    assert!(done.code == 3 || other.code == 3, "{done:?} {other:?}");

    let bare = dir.path().join("bare");
    ok(tool("ostree").arg(format!("--repo={}", bare.display())).args(["init", "--mode=bare-user"]));
    fails(&mut image(&bare, &out), 2, "archive");
    assert!(!dir.path().join("nowhere").exists());
    fails(&mut image(&dir.path().join("nowhere"), &out), 2, "nowhere");
}

#[test]
fn podman_runs_it_read_only_as_any_user_and_ostree_pulls() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    let archive = format!("oci-archive:{}", dir.path().join("a.tar").display());
    ok(&mut image(&repo.path, &archive));
    let podman = Podman::new(dir.path());
    let id = ok(podman.command().args(["pull", "-q", &archive])).stdout.trim().to_owned();
    let address = free_address();
    let container = ok(podman
        .command()
        .args(["run", "-d", "--rm", "--read-only", "--cap-drop=all", "--user=12345", "--network=host"])
        .args(["--env", &format!("OSCONTAINER_LISTEN={address}"), &id]))
    .stdout;
    let url = format!("http://{address}");
    wait_for(|| run(tool("curl").args(["-sf", &format!("{url}/healthz")])).code == 0, "the container to answer");
    let mirror = OstreeRepo::new(dir.path(), "mirror");
    ok(mirror.ostree().args(["remote", "add", "--set=gpg-verify=false", "r", &url]));
    ok(mirror.ostree().args(["pull", "--mirror", "r"]));
    ok(mirror.ostree().arg("fsck"));
    assert_eq!(ok(mirror.ostree().args(["rev-parse", REF])).stdout.trim(), commit);
    ok(podman.command().args(["stop", "-t", "5", container.trim()]));
}

/// Waits up to 30 s for something that is soon so.
#[track_caller]
fn wait_for(mut condition: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited 30 s for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Podman with a store of its own, on machines with cgroups v1 and without
/// CAP_SYS_RESOURCE too.
struct Podman {
    root: PathBuf,
}

impl Podman {
    fn new(dir: &Path) -> Self {
        let root = dir.join("podman");
        fs::create_dir(&root).unwrap();
        let conf = "[engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n\
                    [containers]\ndefault_ulimits = [\"nofile=20000:20000\", \"nproc=4096:4096\"]\n";
        fs::write(root.join("containers.conf"), conf).unwrap();
        Self { root }
    }

    fn command(&self) -> Command {
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

/// Debian's docker-registry on loopback, with its store in `dir`.
struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    fn start(dir: &Path) -> Self {
        let address = free_address();
        let config = dir.join("registry.yml");
        let store = dir.join("registry");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: \"{address}\"}}\n",
            store.display()
        );
        fs::write(&config, text).unwrap();
        let child = tool("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        let registry = Self { child, address };
        let url = format!("http://{}/v2/", registry.address);
        wait_for(|| run(tool("curl").args(["-sf", &url])).code == 0, "the registry to answer");
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended already; that is what the drop wants.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
