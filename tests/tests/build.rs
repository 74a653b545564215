//! The Containerfiles, built by the real buildah: the aggregator's as an ordinary
//! user, the builder's and the direct one as root.

use std::fs;
use std::path::Path;

use e2e::artifacts::{Artifact, REF, Served};
use e2e::containers::{Buildah, USER, copy_aggregator, debian_base};
use e2e::http::Static;
use e2e::repo::OstreeRepo;
use e2e::{ok, rpms, source_dir, target_dir, tool};
use serde_json::Value;
use tempfile::TempDir;

/// A directory that other users may enter.
fn open_directory() -> TempDir {
    let dir = TempDir::new().unwrap();
    ok(tool("chmod").arg("755").arg(dir.path()));
    dir
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// A context that holds the static aggregator and both its Containerfiles.
fn aggregator_context(dir: &Path) {
    fs::create_dir(dir).unwrap();
    for file in ["Containerfile", "Containerfile.base"] {
        fs::copy(source_dir().join("aggregator").join(file), dir.join(file)).unwrap();
    }
    copy_aggregator(dir);
}

#[test]
fn an_ordinary_user_builds_the_oscontainer() {
    let dir = open_directory();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    let server = Static::start();
    let artifact = Artifact::of(&repo.path).serve(&server, "/a");
    let context = dir.path().join("context");
    aggregator_context(&context);
    let buildah = Buildah::as_user(dir.path());
    let base = format!("localhost/oscontainer-aggregator:{}", version());
    buildah.ok(buildah
        .command()
        .args(["build", "-q", "-t", &base, "-f"])
        .arg(context.join("Containerfile.base"))
        .arg(&context));
    let build = |artifact: &Served, digest: &str, more: &[&str]| {
        let mut command = buildah.command();
        command.args(["build", "-t", "localhost/oscontainer", "-f"]).arg(context.join("Containerfile")).args(more);
        command.args(["--build-arg", &format!("ARTIFACT_URL={}", artifact.url)]);
        command.args(["--build-arg", &format!("ARTIFACT_DIGEST={digest}"), "--build-arg", &format!("COMMIT={commit}")]);
        command.arg(&context);
        command
    };
    let refused = buildah.run(&mut build(&artifact, &format!("sha256:{}", "0".repeat(64)), &[]));
    assert!(refused.code != 0 && refused.stderr.contains("expected is sha256:000"), "{refused:?}");
    buildah.ok(&mut build(&artifact, &artifact.digest, &[]));

    let image = format!("oci:{}:one", buildah.directory("image").display());
    buildah.ok(buildah.command().args(["push", "localhost/oscontainer", &image]));
    let config: Value = serde_json::from_str(&ok(tool("skopeo").args(["inspect", "--config", &image])).stdout).unwrap();
    let config = &config["config"];
    assert_eq!(config["Labels"]["ostree.commit"], commit.as_str());
    assert_eq!(config["Labels"]["oscontainer.artifact"], artifact.digest.as_str());
    assert_eq!(config["Entrypoint"], serde_json::json!(["/usr/bin/oscontainer-aggregator", "serve"]));
    assert_eq!(config["User"], "65532:65532");
    let unpacked = dir.path().join("unpacked");
    ok(tool("umoci").args(["unpack", "--image"]).arg(image.replacen("oci:", "", 1)).arg(&unpacked));
    let inside = format!("--repo={}", unpacked.join("rootfs/srv/repo").display());
    ok(tool("ostree").args([&inside, "fsck"]));
    assert_eq!(ok(tool("ostree").args([&inside, "rev-parse", REF])).stdout.trim(), commit);
    assert!(ok(tool("ostree").args([&inside, "summary", "--view"])).stdout.contains(&commit));

    // The next one upon it: one layer more, and the others as they are.
    repo.commit(REF, "two");
    let artifact = Artifact::of(&repo.path).serve(&server, "/b");
    buildah.ok(&mut build(&artifact, &artifact.digest, &["--build-arg", "PREVIOUS=localhost/oscontainer"]));
    let second = format!("oci:{}:two", buildah.directory("image").display());
    buildah.ok(buildah.command().args(["push", "localhost/oscontainer", &second]));
    let layers = |image: &str| ok(tool("skopeo").args(["inspect", image])).json()["Layers"].clone();
    let (before, after) = (layers(&image), layers(&second));
    let (before, after) = (before.as_array().unwrap(), after.as_array().unwrap());
    assert_eq!((after.len(), &after[..before.len()]), (before.len() + 1, &before[..]));
}

/// kaniko runs what a Containerfile says in its own container: as an ordinary user here, nothing is
/// mounted, neither /proc nor /dev nor /tmp.
#[test]
fn nothing_needs_to_be_mounted() {
    let dir = open_directory();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let server = Static::start();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("usr/bin")).unwrap();
    let program = "usr/bin/oscontainer-aggregator";
    fs::copy(target_dir().join("static/oscontainer-aggregator"), root.join(program)).unwrap();
    ok(tool("chown").args(["-R", &format!("{USER}:")]).arg(&root));
    let inside = format!("--repo={}", root.join("srv/repo").display());
    for (text, layer) in [("one", "0001.json"), ("two", "0002.json")] {
        let commit = repo.commit(REF, text);
        let artifact = Artifact::of(&repo.path).serve(&server, &format!("/{text}"));
        let mut fetch = tool("setpriv");
        fetch.args(["--reuid", USER, "--regid", USER, "--clear-groups", "unshare", "--map-root-user", "chroot"]);
        fetch.arg(&root).arg(format!("/{program}")).args(["fetch", &artifact.url, "--digest", &artifact.digest]);
        ok(fetch.args(["--output", "/srv/repo", "--layer-index", "/usr/share/oscontainer/layers"]));
        ok(tool("ostree").args([&inside, "fsck"]));
        assert_eq!(ok(tool("ostree").args([&inside, "rev-parse", REF])).stdout.trim(), commit);
        assert!(root.join("usr/share/oscontainer/layers").join(layer).exists());
    }
    let mut top: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    top.sort();
    assert_eq!(top, ["srv", "usr"]);
}

#[test]
fn a_direct_build_composes_and_assembles_the_same_commit() {
    let dir = TempDir::new().unwrap();
    let buildah = Buildah::as_root(dir.path());
    let scratch = buildah.ok(buildah.command().args(["from", "scratch"])).stdout;
    buildah.ok(buildah.command().args(["add", "-q", scratch.trim()]).arg(debian_base()));
    buildah.ok(buildah.command().args(["commit", "-q", "--rm", scratch.trim(), "localhost/base"]));
    let mut images = buildah.environment(source_dir().join("builder/images.sh").to_str().unwrap());
    buildah.ok(images
        .env("BASE", "localhost/base")
        .env("IMAGES", dir.path().join("images"))
        .arg(target_dir())
        .arg(version()));
    for name in ["builder", "aggregator"] {
        let archive = dir.path().join(format!("images/oscontainer-{name}.oci.tar"));
        ok(tool("skopeo").arg("inspect").arg(format!("oci-archive:{}", archive.display())));
    }

    let treefiles = dir.path().join("treefiles");
    ok(tool("cp").arg("-r").arg(source_dir().join("treefiles")).arg(&treefiles));
    let repository = "[demo]\nname=demo\nbaseurl=file:///rpms\ngpgcheck=0\n";
    fs::write(treefiles.join("demo.repo"), repository).unwrap();
    let mut build = buildah.command();
    build.args(["build", "--cap-add=all", "-t", "localhost/host", "--build-arg", "TREEFILE=demo.yaml", "-v"]);
    build.arg(format!("{}:/rpms:ro", rpms::demo_repo().display()));
    build.arg("-f").arg(source_dir().join("builder/Containerfile.direct")).arg(&treefiles);
    buildah.ok(&mut build);
    let root = buildah.mount("localhost/host");
    let inside = format!("--repo={}", root.join("srv/repo").display());
    ok(tool("ostree").args([&inside, "fsck"]));
    let built = ok(tool("ostree").args([&inside, "rev-parse", REF])).stdout;

    // The same treefile, the same packages: the same commit on this machine.
    rpms::write_repo_file(&treefiles.join("demo.repo"), "demo", &rpms::demo_repo()).unwrap();
    let mut compose = e2e::builder();
    compose.args(["compose", "--engine", "dnf", "--repo"]).arg(dir.path().join("repo"));
    compose.arg("--cache-dir").arg(dir.path().join("cache")).arg(treefiles.join("demo.yaml"));
    ok(&mut compose);
    let repo = format!("--repo={}", dir.path().join("repo").display());
    assert_eq!(ok(tool("ostree").args([&repo, "rev-parse", REF])).stdout, built);
}
