//! `image --previous`: the log of layers goes on, begins afresh, and is not believed when it lies.

use std::fs;
use std::path::Path;
use std::process::Command;

use e2e::images::{REF, assert_size_follows_from, image, layers, listing, strings, unpack};
use e2e::oci::{Image, blob, json};
use e2e::registry::{Access, Registry};
use e2e::repo::OstreeRepo;
use e2e::{fails, ok, run, tool};
use serde_json::Value;
use tempfile::TempDir;

#[test]
fn the_next_image_keeps_the_layers_and_adds_what_is_new() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let path = |name: &str| dir.path().join(name);
    let oci = |name: &str| format!("oci:{}", path(name).display());
    let first = repo.commit(REF, "one");
    let before = ok(&mut image(&repo.path, &oci("a"))).json();
    let old_objects: Vec<String> = listing(&repo.path.join("objects"));
    let second = repo.commit(REF, "two");
    let new_objects: Vec<String> = listing(&repo.path.join("objects"))
        .into_iter()
        .filter(|object| object.contains('/') && !old_objects.contains(object))
        .map(|object| object.replace('/', ""))
        .collect();
    assert!(new_objects.len() >= 3, "{new_objects:?}");
    // No file that is in the image already is needed.
    let old = old_objects.iter().find(|object| object.ends_with(".filez")).unwrap();
    fs::rename(repo.path.join("objects").join(old), path("away")).unwrap();

    let after = ok(image(&repo.path, &oci("b")).args(["--previous", &oci("a")])).json();
    assert_eq!((&after["layers"], &after["fresh"]), (&3.into(), &false.into()));
    assert_eq!(after["previous"], before["digest"]);
    assert_eq!(layers(&oci("b"))[..2], layers(&oci("a")));
    let next = Image::read(&path("b"));
    assert_eq!(after["newBytes"], next.manifest["layers"][2]["size"]);
    assert_eq!(next.config["config"]["Labels"]["org.opencontainers.image.base.digest"], before["digest"]);
    let own = blob(&path("b"), &next.manifest["layers"][2]);
    let index = ok(tool("tar").arg("-xzOf").arg(&own).arg("usr/share/oscontainer/layers/0002.json")).stdout;
    let index: Value = serde_json::from_str(&index).unwrap();
    assert_size_follows_from(&index, &own);
    assert_eq!(
        index["objects"].as_object().unwrap().keys().collect::<Vec<_>>(),
        new_objects.iter().collect::<Vec<_>>()
    );
    assert_eq!(index["commit"], second);
    let dropped: Vec<&str> = strings(&index["dropped"]).collect();
    assert!(dropped.contains(&format!("{first}.commit").as_str()) && dropped.len() == new_objects.len(), "{dropped:?}");
    let files: Vec<&str> = index["files"].as_array().unwrap().iter().filter_map(|file| file["path"].as_str()).collect();
    let documents = ["usr/share/oscontainer/sbom.spdx.json", "usr/share/oscontainer/provenance.json"];
    assert_eq!(files, [&documents[..], &["srv/repo/refs/heads/demo/x86_64/host", "srv/repo/summary"]].concat());
    fs::rename(path("away"), repo.path.join("objects").join(old)).unwrap();

    // The earlier commit is still there, and all of it is sound.
    let inside = unpack(&path("b"), &path("root"));
    ok(inside.ostree().arg("fsck"));
    assert_eq!(ok(inside.ostree().args(["rev-parse", REF])).stdout.trim(), second);
    ok(inside.ostree().args(["ls", "-R", &first]));

    // The same from an archive into an archive, into the layout of the previous image, and once more.
    let archive = format!("oci-archive:{}", path("a.tar").display());
    ok(tool("skopeo").args(["copy", "-q", &oci("a"), &archive]));
    for (previous, output) in [(&archive, &archive), (&oci("a"), &oci("a:next")), (&oci("a:next"), &oci("c"))] {
        let done = ok(image(&repo.path, output).args(["--previous", previous])).json();
        assert_eq!(done["digest"], after["digest"], "{previous} {output}");
    }
    // Nothing is new: the image is what it was.
    let same = ok(image(&repo.path, &oci("d")).args(["--previous", &archive])).json();
    assert_eq!((&same["newBytes"], &same["layers"], &same["digest"]), (&0.into(), &3.into(), &after["digest"]));

    // Back to the commit before: no object is new.
    ok(repo.ostree().args(["reset", REF, &first]));
    let back = ok(image(&repo.path, &oci("e")).args(["--previous", &archive])).json();
    assert_eq!(back["layers"], 4);
    let index = Image::read(&path("e"));
    let tar = String::from_utf8_lossy(&index.layers[3]).into_owned();
    assert!(tar.contains("\"objects\":{},") && tar.contains("\"restored\":["), "{tar}");
}

#[test]
fn ten_updates_in_a_row_then_a_fresh_start_with_the_last_commits() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let out = format!("oci:{}", dir.path().join("out").display());
    let mut commits = vec![repo.commit(REF, "0")];
    ok(&mut image(&repo.path, &out));
    for update in 1..=10 {
        commits.push(repo.commit(REF, &update.to_string()));
        let before = layers(&out);
        let done = ok(image(&repo.path, &out).args(["--previous", &out, "--max-layers=12"])).json();
        assert_eq!((&done["layers"], &done["fresh"]), (&(2 + update).into(), &false.into()));
        assert_eq!(layers(&out)[..before.len()], before);
        assert!(done["newBytes"].as_u64().unwrap() < 20_000, "{done}");
    }
    // A repository, such as fetch makes it, that has the last commit only.
    commits.push(repo.commit(REF, "11"));
    let last = OstreeRepo::new(dir.path(), "last");
    ok(last.ostree().arg("pull-local").arg(&repo.path).arg(commits.last().unwrap()));
    ok(last.ostree().args(["refs", "--create", REF, commits.last().unwrap()]));
    let mut next = image(&last.path, &out);
    let done = ok(next.args(["--previous", &out, "--max-layers=12", "--keep-commits=3"]));
    assert!(done.stderr.contains("beginning a new log of layers: there would be more than 12"), "{}", done.stderr);
    let done = done.json();
    assert_eq!((&done["layers"], &done["fresh"]), (&4.into(), &true.into()));
    let inside = unpack(&dir.path().join("out"), &dir.path().join("root"));
    ok(inside.ostree().arg("fsck"));
    for (age, commit) in commits.iter().rev().enumerate() {
        let there = run(inside.ostree().args(["ls", "-R", commit])).code == 0;
        assert_eq!(there, age < 3, "{age}");
    }
    assert_eq!(ok(inside.ostree().args(["rev-parse", REF])).stdout.trim(), commits[11]);
}

#[test]
fn an_image_in_docker_s_form_is_gone_on_with() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let registry = Registry::start(dir.path(), Access::Plain);
    let oci = |name: &str| format!("oci:{}", dir.path().join(name).display());
    repo.commit(REF, "one");
    ok(&mut image(&repo.path, &oci("a")));
    let docker = registry.image("host:1");
    let mut copy = tool("skopeo");
    ok(copy.args(["copy", "-q", "--format=v2s2", "--dest-tls-verify=false", &oci("a"), &docker]));
    let next = |name: &str| {
        let mut next = image(&repo.path, &oci(name));
        ok(next.args(["--tls-verify=false", "--previous", &docker])).json()
    };
    // Where nothing is new, the image is one of OCI all the same.
    let same = next("same");
    assert_eq!((&same["layers"], &same["newBytes"]), (&2.into(), &0.into()));
    let raw = ok(tool("skopeo").args(["inspect", "--raw", &oci("same")])).json();
    assert_eq!(raw["mediaType"], "application/vnd.oci.image.manifest.v1+json");
    repo.commit(REF, "two");
    assert_eq!((&next("next")["layers"], &next("next")["fresh"]), (&3.into(), &false.into()));
    assert_eq!(layers(&oci("next"))[..2], layers(&oci("a")));
}

#[test]
fn more_commits_than_layers_are_a_mistake() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.commit(REF, "one");
    let out = format!("oci:{}", dir.path().join("out").display());
    let mut image = image(&repo.path, &out);
    fails(image.args(["--keep-commits=3", "--max-layers=3"]), 2, "needs --max-layers 4 or more");
    assert!(!dir.path().join("out").exists());
}

#[test]
fn too_much_that_nothing_needs_begins_afresh() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let out = format!("oci:{}", dir.path().join("out").display());
    let server = fs::metadata(e2e::target_dir().join("static/oscontainer-aggregator")).unwrap().len();
    // After one update some 21 % of it are of no use, after two 35 %.
    let size = server as usize * 3 / 8;
    let mut fresh = Vec::new();
    for update in 0..4 {
        repo.put_noise("blob", size, update);
        repo.commit(REF, "same");
        let mut command = image(&repo.path, &out);
        if update > 0 {
            command.args(["--previous", &out]);
        }
        // Kept commits are no waste.
        if update == 3 {
            command.args(["--keep-commits=4", "--max-waste=0"]);
        }
        fresh.push(ok(&mut command).json()["fresh"].as_bool().unwrap());
    }
    assert_eq!(fresh[..3], [true, false, true]);
    let other = ok(image(&repo.path, &out).args(["--previous", &out, "--fresh"])).json();
    assert_eq!((&other["layers"], &other["fresh"]), (&2.into(), &true.into()));
}

#[test]
fn a_hostile_previous_image_is_rejected() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    let good = dir.path().join("good");
    ok(&mut image(&repo.path, &format!("oci:{}", good.display())));
    let out = dir.path().join("out");
    let with = |previous: &Path| {
        let mut command = image(&repo.path, &format!("oci:{}", out.display()));
        command.args(["--ref", REF, "--previous", &format!("oci:{}", previous.display())]);
        command
    };
    let bad = dir.path().join("bad");
    let check = |edit: &dyn Fn(&mut Image), reason: &str| {
        let mut changed = Image::read(&good);
        edit(&mut changed);
        changed.write(&bad);
        fails(&mut with(&bad), 3, reason);
        assert!(!out.exists());
        fs::remove_dir_all(&bad).unwrap();
    };
    let summary = fs::read(unpack(&good, &dir.path().join("root")).path.join("summary")).unwrap().len();
    let entry = |size: usize| format!("\"path\":\"srv/repo/summary\",\"size\":{size},");
    check(&|image| image.replace(1, &entry(summary), &entry(summary + 1)), "not what its index says");
    check(&|image| image.replace(1, &entry(summary), &entry(999)), "but its index describes");
    check(&|image| image.replace(1, "\"layer\":1", "\"layer\":2"), "says that it is layer 2");
    check(&|image| image.replace(1, "{\"schemaVersion\":1", "{\"schemaVersion\":2"), "of version 2");
    check(&|image| image.replace(1, "\"directories\":[\"srv\"", "\"directories\":[\"../\""), "has the path");
    let whiteout = |image: &mut Image| image.replace(1, "\"path\":\"srv/repo/config\"", "\"path\":\"srv/repo/.wh.ig\"");
    check(&whiteout, "has the path");
    check(&|image| image.replace(1, "\"files\":[", "\"film\":[ "), "cannot be read");
    check(&|image| image.replace(1, "srv/repo/config\0", "srv/repo/confix\0"), "srv/repo/config is expected");
    check(&|image| image.replace(1, "repo_version=1", "repo_version=2"), "srv/repo/config is another");
    check(&|image| image.layers[1].extend([0; 512]), "but its index describes");
    check(&|image| image.layers.swap(0, 1), "its first file is not usr/share/oscontainer/layers/0000.json");
    check(&|image| image.layers.clear(), "no layers");
    check(&|image| image.config["architecture"] = "s390x".into(), "is for s390x");
    check(
        &|image| image.config["rootfs"]["diff_ids"] = serde_json::json!([]),
        "its manifest has 2 layers, its config 0",
    );
    check(&|image| image.config["os"] = "windows".into(), "windows");

    // Digests that are not right.
    let spoil = |path: &Path, reason: &str| {
        let content = fs::read(path).unwrap();
        let mut changed = content.clone();
        *changed.last_mut().unwrap() ^= 1;
        fs::write(path, &changed).unwrap();
        fails(&mut with(&good), 3, reason);
        fs::write(path, &content[..content.len() - 1]).unwrap();
        fails(&mut with(&good), 3, "bytes, not");
        fs::remove_file(path).unwrap();
        fails(&mut with(&good), 3, "is missing");
        fs::write(path, content).unwrap();
    };
    let parts = Image::read(&good);
    spoil(&blob(&good, &parts.manifest["layers"][1]), "CRC-32");
    spoil(&blob(&good, &parts.manifest["config"]), "has the digest");
    spoil(&blob(&good, &json(&good.join("index.json"))["manifests"][0]), "has the digest");

    // Another's image, another ref, and nothing at all.
    let other = dir.path().join("other");
    ok(tool("umoci").args(["init", "--layout"]).arg(&other));
    let name = format!("{}:x", other.display());
    ok(tool("umoci").args(["new", "--image", &name]));
    ok(tool("umoci").args(["insert", "--image", &name]).arg(repo.path.join("config")).arg("/config"));
    // (umoci leaves its tar without an end.)
    fails(&mut with(&other), 3, "reading layer 0");
    ok(repo.ostree().args(["refs", "--create", "other/ref", &commit]));
    let mut renamed = image(&repo.path, &format!("oci:{}", out.display()));
    renamed.args(["--ref", "other/ref", "--previous", &format!("oci:{}", good.display())]);
    fails(&mut renamed, 3, "holds the ref demo/x86_64/host, not other/ref: --fresh");
    fails(&mut with(&dir.path().join("none")), 2, "no OCI image layout");
    fails(image_of(&repo, &out).args(["--previous", "oci-archive:none"]), 2, "there is no file none");
    fails(image_of(&repo, &out).args(["--previous", &format!("oci:{}:y", good.display())]), 2, "one image y");
    fails(image_of(&repo, &out).args(["--previous", "docker:x"]), 2, "--previous docker:x");
    assert!(!out.exists());
    assert_eq!(ok(renamed.arg("--fresh")).json()["fresh"], true);
}

fn image_of(repo: &OstreeRepo, out: &Path) -> Command {
    let mut command = image(&repo.path, &format!("oci:{}", out.display()));
    command.args(["--ref", REF]);
    command
}
