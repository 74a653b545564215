//! `image`, driven as a user drives it; what it writes is read by the engines and the
//! registry that people use.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use e2e::artifacts::Artifact;
use e2e::containers::Podman;
use e2e::http::Static;
use e2e::images::{REF, assert_size_follows_from, image, listing, skopeo, strings, unpack};
use e2e::oci::{Image, blob, json};
use e2e::registry::{Access, Registry};
use e2e::repo::OstreeRepo;
use e2e::{aggregator, fails, free_address, ok, run, target_dir, tool, wait_for};
use serde_json::Value;
use tempfile::TempDir;

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

#[test]
fn the_packages_and_where_they_come_from_lie_in_the_image() {
    let dir = TempDir::new().unwrap();
    let mut repo = OstreeRepo::new(dir.path(), "repo");
    // As rpm-ostree lists them, in an order of its own.
    let packages = "[('zlib', '0', '1.2', '3', 'x86_64'), ('perl+x', '4', '5.36~a', '7', 'noarch')]";
    let input = "ab".repeat(32);
    repo.add_metadata(&format!("rpmostree.rpmdb.pkglist=@a(sssss) {packages}"));
    repo.add_metadata(&format!("rpmostree.inputhash='{input}'"));
    let commit = repo.commit(REF, "one");
    let mut artifact = Artifact::of(&repo.path);
    artifact.manifest.annotations.insert("oscontainer.builder".into(), "9.9".into());
    let artifact = artifact.serve(&Static::start(), "/a");
    let fetched = dir.path().join("fetched");
    ok(aggregator().args(["fetch", &artifact.url, "--digest", &artifact.digest, "--output"]).arg(&fetched));
    let out = dir.path().join("out");
    let first = ok(&mut image(&fetched, &format!("oci:{}", out.display()))).json();

    let root = unpack(&out, &dir.path().join("root")).path.join("../..");
    let sbom = json(&root.join("usr/share/oscontainer/sbom.spdx.json"));
    assert_eq!(sbom["spdxVersion"], "SPDX-2.3");
    assert_eq!(sbom["creationInfo"]["created"], "2023-11-14T22:13:20Z");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let found: Vec<_> =
        sbom["packages"].as_array().unwrap().iter().map(|p| (text(&p["name"]), text(&p["versionInfo"]))).collect();
    let expected = [(REF, "1.<2>"), ("perl+x", "4:5.36~a-7"), ("zlib", "1.2-3")];
    assert_eq!(found, expected.map(|(name, version)| (name.to_owned(), version.to_owned())));
    assert_eq!(sbom["packages"][0]["checksums"][0]["checksumValue"], commit.as_str());
    let purl = &sbom["packages"][1]["externalRefs"][0]["referenceLocator"];
    assert_eq!(purl, "pkg:rpm/perl%2Bx@5.36~a-7?arch=noarch&epoch=4");
    let ids: std::collections::BTreeSet<_> =
        sbom["packages"].as_array().unwrap().iter().map(|p| p["SPDXID"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 3);
    for relation in sbom["relationships"].as_array().unwrap() {
        assert!(ids.contains(relation["relatedSpdxElement"].as_str().unwrap()), "{relation}");
    }

    let statement = json(&root.join("usr/share/oscontainer/provenance.json"));
    assert_eq!(statement["_type"], "https://in-toto.io/Statement/v1");
    let subjects: Vec<_> =
        statement["subject"].as_array().unwrap().iter().map(|s| s["digest"]["sha256"].as_str().unwrap()).collect();
    assert_eq!(subjects[..2], [&commit[..], artifact.digest.strip_prefix("sha256:").unwrap()]);
    let predicate = &statement["predicate"];
    assert_eq!(predicate["buildDefinition"]["resolvedDependencies"][0]["digest"]["sha256"], input);
    assert_eq!(predicate["runDetails"]["builder"]["version"]["oscontainer-builder"], "9.9");

    // Fetched and assembled elsewhere, the same; without an artifact, less is known.
    let again = dir.path().join("again");
    ok(aggregator().args(["fetch", &artifact.url, "--digest", &artifact.digest, "--output"]).arg(&again));
    let second = ok(&mut image(&again, &format!("oci:{}", dir.path().join("out2").display()))).json();
    assert_eq!(first["digest"], second["digest"]);
    let local = dir.path().join("local");
    ok(&mut image(&repo.path, &format!("oci:{}", local.display())));
    let statement =
        json(&unpack(&local, &dir.path().join("root2")).path.join("../../usr/share/oscontainer/provenance.json"));
    assert_eq!(statement["subject"].as_array().unwrap().len(), 1);

    // What somebody wrote over it is not believed.
    fs::write(again.join("extensions/oscontainer/artifact.json"), "{}").unwrap();
    fails(&mut image(&again, &format!("oci:{}", dir.path().join("out3").display())), 3, "artifact.json is damaged");
}

#[test]
fn images_for_several_machines_share_a_name() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.commit(REF, "one");
    // A program for another machine: nobody runs it here.
    let program = target_dir().join("static/oscontainer-aggregator");
    let mut bytes = fs::read(&program).unwrap();
    let other = if bytes[18] == 62 { ("arm64", 183) } else { ("amd64", 62) };
    bytes[18] = other.1;
    let server = dir.path().join("server");
    fs::write(&server, bytes).unwrap();
    let layout = dir.path().join("out");
    let out = format!("oci:{}:host", layout.display());
    let registry = Registry::start(dir.path(), Access::Plain);
    for output in [&out, &registry.image("host:1")] {
        let add = |server: &Path| {
            let mut command = image(&repo.path, output);
            ok(command.args(["--index", "--tls-verify=false", "--server"]).arg(server)).json()
        };
        let own = add(&program);
        let both = add(&server);
        assert_ne!(own["digest"], both["digest"]);
        // Once more changes nothing, and a newer image takes the place of its own machine's.
        assert_eq!(add(&program)["index"], both["index"]);
        let raw = ok(tool("skopeo").args(["inspect", "--raw", "--tls-verify=false", output])).json();
        assert_eq!(raw["mediaType"], "application/vnd.oci.image.index.v1+json");
        let mut found: Vec<_> = raw["manifests"].as_array().unwrap().iter().map(|m| m["digest"].clone()).collect();
        let mut expected = vec![own["digest"].clone(), both["digest"].clone()];
        found.sort_by_key(Value::to_string);
        expected.sort_by_key(Value::to_string);
        assert_eq!(found, expected);
        let inspected =
            ok(tool("skopeo").args(["inspect", "--override-arch", other.0, "--tls-verify=false", output])).json();
        assert_eq!(inspected["Architecture"], other.0);
        // The next image of one of them goes on with it.
        repo.commit(REF, "two");
        let mut next = image(&repo.path, output);
        let next = ok(next.args(["--index", "--tls-verify=false", "--previous", output])).json();
        assert_eq!((&next["previous"], &next["layers"]), (&own["digest"], &3.into()));
        let raw = ok(tool("skopeo").args(["inspect", "--raw", "--tls-verify=false", output])).json();
        assert_eq!(raw["manifests"].as_array().unwrap().len(), 2);
        ok(repo.ostree().args(["reset", REF, &format!("{REF}^")]));
    }
    // Who names the usual variant means the same machine, and what others wrote into the index stays.
    if other.0 == "arm64" {
        let image_name = registry.image("host:1");
        let mut raw = ok(tool("skopeo").args(["inspect", "--raw", "--tls-verify=false", &image_name])).json();
        raw["annotations"] = serde_json::json!({ "who": "somebody" });
        for manifest in raw["manifests"].as_array_mut().unwrap() {
            if manifest["platform"]["architecture"] == "arm64" {
                manifest["platform"]["variant"] = "v8".into();
            }
        }
        let index = dir.path().join("index.json");
        fs::write(&index, raw.to_string()).unwrap();
        let url = format!("http://{}/v2/host/manifests/1", registry.address);
        let kind = format!("Content-Type: {}", raw["mediaType"].as_str().unwrap());
        ok(tool("curl")
            .args(["-sSf", "-X", "PUT", "-H", &kind, "--data-binary"])
            .arg(format!("@{}", index.display()))
            .arg(url));
        let mut add = image(&repo.path, &image_name);
        ok(add.args(["--index", "--tls-verify=false", "--server"]).arg(&server));
        let found = ok(tool("skopeo").args(["inspect", "--raw", "--tls-verify=false", &image_name])).json();
        assert_eq!(
            (found["manifests"].as_array().unwrap().len(), &found["annotations"]["who"]),
            (2, &"somebody".into())
        );
    }
    // Upon what is there, which has nothing for the second machine at first.
    let name = registry.image("pushed:1");
    let push = |server: &Path, more: &[&str]| {
        let mut command = image(&repo.path, &out);
        command.args(["--tls-verify=false", "--push", name.trim_start_matches("docker://"), "--server"]).arg(server);
        command.args(more);
        command
    };
    let own = ok(&mut push(&program, &["--index"])).json();
    fails(&mut push(&server, &[]), 3, &format!("no image for {}: --index adds one", other.0));
    let both = ok(&mut push(&server, &["--index"])).json();
    assert_eq!((&own["previous"], &both["previous"]), (&Value::Null, &Value::Null));
    assert_eq!(ok(&mut push(&program, &["--index"])).json()["previous"], own["digest"]);
    ok(&mut image(&repo.path, &format!("oci:{}:single", layout.display())));
    fails(
        image(&repo.path, &format!("oci:{}:single", layout.display())).arg("--index"),
        2,
        "an image for one machine under that name",
    );
}

#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.commit(REF, "one");
    let small = dir.path().join("small");
    fs::create_dir(&small).unwrap();
    ok(tool("mount").args(["-t", "tmpfs", "-o", "size=8m", "none"]).arg(&small));
    for output in ["oci:small/out", "oci-archive:small/out"] {
        fails(image(&repo.path, output).current_dir(dir.path()), 1, "No space left on device");
        assert_eq!(listing(&small), [""; 0], "{output}");
    }
    ok(tool("umount").arg(&small));
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

    let registry = Registry::start(dir.path(), Access::Plain);
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
        ("docker://localhost/a", "no tag"),
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

/// docs/image.md, of the server's layer: under 12 MB, nothing else in it, and a start in under 50 ms, for
/// which a busy machine gets more here.
#[test]
fn the_server_is_small_alone_and_soon_there() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.commit(REF, "one");
    let out = dir.path().join("out");
    ok(&mut image(&repo.path, &format!("oci:{}", out.display())));
    let image = Image::read(&out);
    let size = image.manifest["layers"][0]["size"].as_u64().unwrap();
    assert!(size < 12_000_000, "the server's layer has {size} bytes");
    let mut files = Vec::new();
    for layer in &image.layers {
        let tar = dir.path().join("tar");
        fs::write(&tar, layer).unwrap();
        let listed = ok(tool("tar").arg("-tvf").arg(&tar)).stdout;
        assert!(listed.lines().all(|line| line.starts_with(['-', 'd'])), "{listed}");
        let executable = listed.lines().filter(|line| line.starts_with("-rwx"));
        files.extend(executable.filter_map(|line| line.split(' ').next_back().map(str::to_owned)));
    }
    assert_eq!(files, ["usr/bin/oscontainer-aggregator"], "no shell, and nothing else that runs");
    let best = (0..5).map(|_| start(&repo)).min().unwrap();
    assert!(best < Duration::from_millis(500), "the server was there after {best:?}");
}

/// How long it takes from the program's start to its first answer.
fn start(repo: &OstreeRepo) -> Duration {
    let address = free_address();
    let mut serve = aggregator();
    serve.args(["-q", "serve", "--listen", &address, "--repo"]).arg(&repo.path);
    let begun = Instant::now();
    let mut child = serve.spawn().expect("the aggregator starts");
    let mut answer = String::new();
    while answer.is_empty() {
        assert!(child.try_wait().expect("a child can be asked").is_none(), "it ended before it answered");
        if let Ok(mut stream) = TcpStream::connect(&address) {
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            stream.read_to_string(&mut answer).unwrap();
        }
    }
    let time = begun.elapsed();
    child.kill().expect("it can be killed");
    child.wait().expect("it can be waited for");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    time
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
    let shell =
        run(podman.command().args(["run", "--rm", "--network=host", "--entrypoint=/bin/sh", &id, "-c", "true"]));
    assert_ne!(shell.code, 0, "there is no shell: {shell:?}");
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
