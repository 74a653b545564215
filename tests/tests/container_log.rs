//! Container builds that go on with the image before: each adds one layer with what is
//! new, and `image --previous` takes the result.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::artifacts::{Artifact, REF};
use e2e::containers::{Buildah, copy_aggregator};
use e2e::http::Static;
use e2e::oci::{blob, json};
use e2e::repo::OstreeRepo;
use e2e::{aggregator, fails, ok, run, source_dir, tool};
use serde_json::Value;
use tempfile::TempDir;

const BASE: &str = "localhost/base";

/// Builds oscontainers one upon the other.
struct Builds {
    buildah: Buildah,
    context: PathBuf,
    server: Static,
}

impl Builds {
    fn new(dir: &Path) -> Self {
        let context = dir.join("context");
        fs::create_dir(&context).unwrap();
        copy_aggregator(&context);
        let buildah = Buildah::as_root(dir);
        let base = source_dir().join("aggregator/Containerfile.base");
        buildah.ok(buildah.command().args(["build", "-q", "-t", BASE, "-f"]).arg(base).arg(&context));
        Self { buildah, context, server: Static::start() }
    }

    /// Builds `name` out of the only commit of `repo`, upon `previous`, and pushes it to a layout.
    fn build(&self, repo: &OstreeRepo, previous: &str, name: &str) -> PathBuf {
        let artifact = Artifact::of(&repo.path).serve(&self.server, &format!("/{name}"));
        let mut command = self.buildah.command();
        command.args(["build", "-q", "-t", &format!("localhost/{name}"), "-f"]);
        command.arg(source_dir().join("aggregator/Containerfile"));
        for (key, value) in
            [("PREVIOUS", previous), ("ARTIFACT_URL", &artifact.url), ("ARTIFACT_DIGEST", &artifact.digest)]
        {
            command.arg("--build-arg").arg(format!("{key}={value}"));
        }
        self.buildah.ok(command.arg(&self.context));
        self.push(name)
    }

    fn push(&self, name: &str) -> PathBuf {
        let layout = self.buildah.directory(name);
        let image = format!("localhost/{name}");
        self.buildah.ok(self.buildah.command().args(["push", "-q", &image, &format!("oci:{}:x", layout.display())]));
        layout
    }
}

fn image(repo: &OstreeRepo, previous: &Path, output: &Path) -> Command {
    let mut command = aggregator();
    command.args(["image", "--output-format", "json", "--ref", REF, "--repo"]).arg(&repo.path);
    command.arg("--previous").arg(format!("oci:{}", previous.display()));
    command.arg("--output").arg(format!("oci:{}:x", output.display()));
    command
}

/// The layers of the image in the layout at `root`.
fn layers(root: &Path) -> Vec<Value> {
    let manifest = json(&blob(root, &json(&root.join("index.json"))["manifests"][0]));
    manifest["layers"].as_array().unwrap().clone()
}

/// The repository in the image at `root`, as umoci unpacks it.
fn unpack(root: &Path, to: PathBuf) -> OstreeRepo {
    ok(tool("umoci").args(["unpack", "--image", &format!("{}:x", root.display())]).arg(&to));
    OstreeRepo::at(to.join("rootfs/srv/repo"))
}

/// A repository that holds nothing but the last commit of `repo`, as fetch makes it.
fn only_last(repo: &OstreeRepo, dir: &Path, name: &str, commit: &str) -> OstreeRepo {
    let last = OstreeRepo::new(dir, name);
    ok(last.ostree().arg("pull-local").arg(&repo.path).arg(commit));
    ok(last.ostree().args(["refs", "--create", REF, commit]));
    last
}

#[test]
fn builds_and_image_go_on_with_one_another() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let builds = Builds::new(dir.path());
    let first = repo.commit(REF, "one");
    let one = builds.build(&repo, BASE, "one");
    let second = repo.commit(REF, "two");
    let two = builds.build(&repo, "localhost/one", "two");
    let kept = layers(&two);
    assert_eq!((kept.len(), &kept[..2]), (3, &layers(&one)[..]));

    // The new layer: what is new, and nothing else.
    let new = blob(&two, &kept[2]);
    let index = "usr/share/oscontainer/layers/0002.json";
    let own: Value = serde_json::from_str(&ok(tool("tar").arg("-xzOf").arg(&new).arg(index)).stdout).unwrap();
    assert_eq!((own["ref"].as_str(), own["commit"].as_str()), (Some(REF), Some(second.as_str())));
    let entries = ok(tool("tar").arg("-tzf").arg(&new)).stdout;
    let mut found: Vec<&str> = entries.lines().filter(|entry| !entry.ends_with('/')).collect();
    let names = own["objects"].as_object().unwrap().keys();
    let mut expected: Vec<String> = names.map(|n| format!("srv/repo/objects/{}/{}", &n[..2], &n[2..])).collect();
    assert!(expected.len() >= 4, "{own}");
    expected.extend([index.to_owned(), format!("srv/repo/refs/heads/{REF}"), "srv/repo/summary".to_owned()]);
    let documents = ["usr/share/oscontainer/sbom.spdx.json", "usr/share/oscontainer/provenance.json"];
    expected.extend(documents.map(str::to_owned));
    expected.push("srv/repo/extensions/oscontainer/artifact.json".to_owned());
    expected.sort();
    found.sort_unstable();
    assert_eq!(found, expected);

    // Another ref has no place in it, and nothing is fetched in vain.
    let rootfs = dir.path().join("two.unpacked/rootfs");
    unpack(&two, dir.path().join("two.unpacked"));
    let mut other = Artifact::of(&repo.path);
    other.manifest.ref_name = "other/host".to_owned();
    let other = other.serve(&builds.server, "/other");
    let mut fetch = aggregator();
    fetch.args(["fetch", &other.url, "--digest", &other.digest, "--output"]).arg(rootfs.join("srv/repo"));
    fetch.arg("--layer-index").arg(rootfs.join("usr/share/oscontainer/layers"));
    let reason = format!("the image has the ref {REF}, and the artifact other/host: build it without PREVIOUS");
    fails(&mut fetch, 3, &reason);

    // The next image, without a container build.
    let third = repo.commit(REF, "three");
    let out = dir.path().join("three");
    let done = ok(&mut image(&repo, &two, &out)).json();
    assert_eq!((&done["layers"], &done["fresh"]), (&4.into(), &false.into()));
    assert!(done["newBytes"].as_u64().unwrap() < 20_000, "{done}");
    assert_eq!(layers(&out)[..3], kept);
    let inside = unpack(&out, dir.path().join("three.unpacked"));
    ok(inside.ostree().arg("fsck"));
    assert_eq!(ok(inside.ostree().args(["rev-parse", REF])).stdout.trim(), third);
    ok(inside.ostree().args(["ls", "-R", &first]));
    assert!(inside.path.join("../../usr/share/oscontainer/layers/0003.json").exists());

    // And a container build upon that.
    let mut copy = builds.buildah.environment("skopeo");
    copy.args(["copy", "-q", &format!("oci:{}:x", out.display()), "containers-storage:localhost/three"]);
    ok(&mut copy);
    repo.commit(REF, "four");
    let four = builds.build(&repo, "localhost/three", "four");
    assert_eq!(layers(&four).len(), 5);
    let fifth = repo.commit(REF, "five");
    let last = only_last(&repo, dir.path(), "last", &fifth);
    let out = dir.path().join("five");
    assert_eq!(ok(&mut image(&last, &four, &out)).json()["layers"], 6);

    // A new log takes older commits out of the layers of container builds.
    let out = dir.path().join("fresh");
    let done = ok(image(&last, &two, &out).args(["--fresh", "--keep-commits=2"])).json();
    assert_eq!((&done["layers"], &done["fresh"]), (&3.into(), &true.into()));
    let inside = unpack(&out, dir.path().join("fresh.unpacked"));
    ok(inside.ostree().arg("fsck"));
    ok(inside.ostree().args(["ls", "-R", &second]));
    assert_ne!(run(inside.ostree().args(["ls", "-R", &first])).code, 0);
}

#[test]
fn layers_that_are_not_what_fetch_leaves_are_rejected() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let builds = Builds::new(dir.path());
    repo.commit(REF, "one");
    builds.build(&repo, BASE, "one");
    let out = dir.path().join("out");
    let change = |name: &str, edit: &dyn Fn(&Path), reason: &str| {
        let container =
            builds.buildah.ok(builds.buildah.command().args(["from", "--pull-never", "localhost/one"])).stdout;
        let root = builds.buildah.ok(builds.buildah.command().args(["mount", container.trim()])).stdout;
        edit(Path::new(root.trim()));
        builds.buildah.ok(builds.buildah.command().args([
            "commit",
            "-q",
            "--rm",
            container.trim(),
            &format!("localhost/{name}"),
        ]));
        fails(&mut image(&repo, &builds.push(name), &out), 3, reason);
        assert!(!out.exists());
    };
    let object = "srv/repo/objects/00/11111111111111111111111111111111111111111111111111111111111111.filez";
    let write = |root: &Path, path: &str, content: &str| {
        fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
        fs::write(root.join(path), content).unwrap();
    };
    change("more", &|root| write(root, object, "x"), "but no index");
    change("less", &|root| fs::remove_file(root.join("srv/repo/summary")).unwrap(), "removes what earlier layers hold");
    change(
        "link",
        &|root| std::os::unix::fs::symlink("/etc", root.join("srv/link")).unwrap(),
        "no file and no directory",
    );
    change("odd", &|root| write(root, "usr/share/oscontainer/layers/0002.json", "{}"), "its index cannot be read");
    let lying = fs::read_to_string(
        unpack(&builds.push("one"), dir.path().join("one")).path.join("../../usr/share/oscontainer/layers/0001.json"),
    )
    .unwrap()
    .replace("\"layer\":1", "\"layer\":2");
    change("lie", &|root| write(root, "usr/share/oscontainer/layers/0002.json", &lying), "not the objects");
    let mut without = image(&repo, &builds.push("base"), &out);
    fails(&mut without, 3, "holds no commit");
    assert_eq!(ok(without.arg("--fresh")).json()["fresh"], true);
}
