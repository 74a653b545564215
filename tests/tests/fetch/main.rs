//! `fetch`: a good artifact becomes a repository that the real `ostree` likes; a bad
//! one leaves one clear error and nothing else.

mod pieces;
mod transfer;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use e2e::artifacts::{Artifact, Entry, REF, Served, commit};
use e2e::http::{Answer, Static};
use e2e::{aggregator, fails, ok, run, tool};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::tarball::{BLOCK, Kind, header};
use tempfile::TempDir;

/// How the config in the tarball ends.
const CONFIG_END: &[u8] = b"indexed-deltas=true\n";

/// A working directory with a source repository, and a server.
struct Scene {
    directory: TempDir,
    server: Static,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("out")).unwrap();
        Self { directory, server: Static::start() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A tree with the kinds of files that there are, committed.
    fn artifact(&self) -> Artifact {
        let tree = self.path("tree");
        fs::create_dir_all(tree.join("usr/bin")).unwrap();
        fs::create_dir_all(tree.join("usr/empty")).unwrap();
        fs::write(tree.join("usr/bin/tool"), noise(100_000)).unwrap();
        fs::set_permissions(tree.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::write(tree.join("usr/text"), "the quick brown fox\n".repeat(5000)).unwrap();
        fs::write(tree.join("usr/none"), "").unwrap();
        fs::write(tree.join("usr/zeros"), vec![0; 3_000_000]).unwrap();
        symlink("usr/bin", tree.join("bin")).unwrap();
        commit(&self.path("source"), &tree, "1.0");
        Artifact::of(&self.path("source"))
    }

    fn fetch(&self, served: &Served) -> Command {
        let mut command = aggregator();
        command.args(["fetch", &served.url, "--digest", &served.digest, "--output"]).arg(self.path("out/repo"));
        command.args(["--output-format", "json"]).env("OSCONTAINER_RETRIES", "0");
        command
    }

    #[track_caller]
    fn rejected(&self, served: &Served, reason: &str) {
        self.failed(served, 3, reason);
    }

    #[track_caller]
    fn failed(&self, served: &Served, code: i32, reason: &str) {
        fails(&mut self.fetch(served), code, reason);
        assert_eq!(names(&self.path("out")), [""; 0], "something was left behind");
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A xorshift generator, so that every run is the same.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    (0..length).map(|_| random.below(256) as u8).collect()
}

fn ostree(repo: &Path, arguments: &[&str]) -> String {
    ok(tool("ostree").arg(format!("--repo={}", repo.display())).args(arguments)).stdout
}

#[test]
fn a_good_artifact_becomes_a_repository_that_ostree_likes() {
    let scene = Scene::new();
    let artifact = scene.artifact();
    let mut served = artifact.serve(&scene.server, "/a/1");
    scene.server.set("/a/latest/manifest.json", Answer::Redirect("/a/1/manifest.json".to_owned()));
    served.url = scene.server.url("/a/latest/manifest.json");
    let result = ok(&mut scene.fetch(&served)).json();
    let (repo, source) = (scene.path("out/repo"), scene.path("source"));
    let objects = artifact.entries.iter().filter(|entry| entry.path.starts_with("objects/")).count();
    assert_eq!(result["commit"], artifact.manifest.commit.to_string());
    assert_eq!(result["ref"], REF);
    assert_eq!(result["objects"], objects);
    assert_eq!(result["bytes"], artifact.tarball().len());
    assert_eq!(names(&scene.path("out")), ["repo"]);

    ostree(&repo, &["fsck"]);
    assert_eq!(ostree(&repo, &["ls", "-R", "-C", REF]), ostree(&source, &["ls", "-R", "-C", REF]));
    ostree(&source, &["summary", "-u"]);
    let lines = |repo| -> Vec<String> {
        let text = ostree(repo, &["summary", "-v"]);
        text.lines().filter(|line| !line.starts_with("Last-Modified")).map(str::to_owned).collect()
    };
    assert_eq!(lines(&repo), lines(&source));
    let summary = ostree(&repo, &["summary", "-v"]);
    let modified = summary.lines().find(|line| line.starts_with("Last-Modified")).unwrap();
    assert!(modified.contains("2026-01-01"), "the summary's time is the commit's: {modified}");

    for file in ["config", "summary"] {
        scene.server.set(&format!("/r/{file}"), Answer::Bytes(Arc::new(fs::read(repo.join(file)).unwrap())));
    }
    for entry in artifact.entries.iter().filter(|entry| !entry.content.is_empty()) {
        let bytes = fs::read(repo.join(&entry.path)).unwrap();
        assert_eq!(bytes, entry.content, "{}", entry.path);
        scene.server.set(&format!("/r/{}", entry.path), Answer::Bytes(Arc::new(bytes)));
    }
    let mirror = scene.path("mirror");
    ok(tool("ostree").args(["init", "--mode=archive", "--repo"]).arg(&mirror));
    ostree(&mirror, &["remote", "add", "--no-gpg-verify", "r", &scene.server.url("/r")]);
    ostree(&mirror, &["pull", "--mirror", "r"]);
    ostree(&mirror, &["fsck"]);
    assert_eq!(ostree(&mirror, &["rev-parse", REF]).trim(), artifact.manifest.commit.to_string());
}

#[test]
fn an_artifact_that_was_carried_by_hand_needs_no_server() {
    let scene = Scene::new();
    let artifact = scene.artifact();
    let (tarball, carried) = (artifact.tarball(), scene.path("carried by hand"));
    let mut served = artifact.serve(&scene.server, "/a");
    fs::create_dir(&carried).unwrap();
    let manifest = carried.join("manifest.json");
    ok(tool("curl").args(["-sSf", &served.url, "-o"]).arg(&manifest));
    fs::write(carried.join("repo.tar"), &tarball).unwrap();
    served.url = format!("file://{}", manifest.display()).replace(' ', "%20");
    let result = ok(&mut scene.fetch(&served)).json();
    assert_eq!(result["bytes"], tarball.len());
    ostree(&scene.path("out/repo"), &["fsck"]);
    fs::remove_dir_all(scene.path("out/repo")).unwrap();

    // It is believed no more than a server.
    let mut flipped = tarball.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(carried.join("repo.tar"), &flipped).unwrap();
    scene.rejected(&served, "tarball");
    fs::write(carried.join("repo.tar"), &tarball[1..]).unwrap();
    scene.rejected(&served, "the manifest says");
    fs::remove_file(carried.join("repo.tar")).unwrap();
    scene.failed(&served, 1, "repo.tar");
    fs::write(&manifest, "{}").unwrap();
    scene.rejected(&served, "has the digest");
    fs::remove_file(&manifest).unwrap();
    scene.failed(&served, 1, "manifest.json");
    for (url, reason) in [("file://host/manifest.json", "file:///absolute"), ("ftp://host/x", "http, https or file")] {
        scene.failed(&Served { url: url.to_owned(), digest: served.digest.clone() }, 2, reason);
    }
}

#[test]
fn an_update_adds_only_what_is_new() {
    let scene = Scene::new();
    let first = scene.artifact();
    ok(&mut scene.fetch(&first.serve(&scene.server, "/1")));
    let repo = scene.path("out/repo");
    let inode = |path: &str| fs::metadata(repo.join(path)).unwrap().ino();
    let objects = first.entries.iter().filter(|entry| entry.path.starts_with("objects/"));
    let before: Vec<_> = objects.map(|entry| (entry.path.clone(), inode(&entry.path))).collect();
    let config = inode("config");

    fs::write(scene.path("tree/usr/text"), "new\n").unwrap();
    commit(&scene.path("source"), &scene.path("tree"), "1.1");
    let second = Artifact::of(&scene.path("source"));
    // One of the old objects that the update needs is damaged.
    let needed = |path: &str| path.ends_with(".filez") && second.entries.iter().any(|entry| entry.path == path);
    let damaged = before.iter().map(|(path, _)| path).find(|path| needed(path)).unwrap();
    fs::write(repo.join(damaged), "damaged").unwrap();
    let done = ok(&mut scene.fetch(&second.serve(&scene.server, "/2")));
    assert!(done.stderr.contains("WARN") && done.stderr.contains(damaged), "{}", done.stderr);

    for (path, old) in before.iter().filter(|(path, _)| path != damaged) {
        assert_eq!(inode(path), *old, "{path} was touched");
    }
    assert_eq!(inode("config"), config);
    assert_eq!(names(&repo.join("tmp")), ["cache"]);
    ostree(&repo, &["fsck"]);
    assert_eq!(ostree(&repo, &["rev-parse", REF]).trim(), second.manifest.commit.to_string());
    assert!(ostree(&repo, &["ls", "-R", &first.manifest.commit.to_string()]).contains("/usr/text"));

    let mut third = second.clone();
    third.entry(".dirmeta").content[0] ^= 1;
    fails(&mut scene.fetch(&third.serve(&scene.server, "/3")), 3, ".dirmeta");
    assert_eq!(names(&repo.join("tmp")), ["cache"]);
    ostree(&repo, &["fsck"]);
}

#[test]
fn what_is_no_repository_is_not_touched() {
    let scene = Scene::new();
    let served = scene.artifact().serve(&scene.server, "/a");
    fs::create_dir(scene.path("out/repo")).unwrap();
    fs::write(scene.path("out/repo/file"), "mine").unwrap();
    fails(&mut scene.fetch(&served), 2, "is not an OSTree repository");
    assert_eq!(names(&scene.path("out/repo")), ["file"]);
}

#[test]
fn a_wrong_manifest_is_rejected() {
    let scene = Scene::new();
    let artifact = scene.artifact();
    let zero = format!("sha256:{}", "0".repeat(64));
    let at = |path: &str| Served { url: scene.server.url(path), digest: zero.clone() };
    let good = artifact.serve(&scene.server, "/a");
    scene.rejected(&at("/a/manifest.json"), &good.digest);
    scene.rejected(&at("/a/manifest.json"), &zero);
    scene.rejected(&at("/absent/manifest.json"), "404");
    scene.server.set("/big/manifest.json", Answer::Bytes(Arc::new(vec![b' '; 1 << 20])));
    scene.rejected(&at("/big/manifest.json"), "larger than the limit");
    scene.server.set("/b/manifest.json", Answer::Status(503));
    scene.failed(&at("/b/manifest.json"), 1, "503");

    let mut json: serde_json::Value = serde_json::from_slice(&artifact.manifest.to_bytes()).unwrap();
    json["more"] = "field".into();
    let bytes = serde_json::to_vec(&json).unwrap();
    let digest = Digest::of(&bytes).to_string();
    scene.server.set("/u/manifest.json", Answer::Bytes(Arc::new(bytes)));
    scene.rejected(&Served { url: scene.server.url("/u/manifest.json"), digest }, "more");
}

#[test]
fn a_tarball_that_is_not_whole_fails() {
    let scene = Scene::new();
    let artifact = scene.artifact();
    let tarball = artifact.tarball();
    let served = artifact.serve(&scene.server, "/a");
    for end in [0, 100, 5000, tarball.len() / 2, tarball.len() - 1] {
        let short = tarball[..end].to_vec();
        scene.server.set("/a/repo.tar", Answer::Cut(Arc::new(tarball.clone()), end));
        scene.failed(&served, 1, "/a/");
        scene.server.set("/a/repo.tar", Answer::Bytes(Arc::new(short.clone())));
        scene.rejected(&served, "repo.tar");
        scene.rejected(&Served::new(&scene.server, "/s", artifact.manifest.clone(), short), "tarball");
    }
    scene.server.set("/a/repo.tar", Answer::Bytes(Arc::new([&tarball[..], b"\0"].concat())));
    scene.rejected(&served, "repo.tar");
}

#[test]
fn hostile_tarballs_are_rejected() {
    let scene = Scene::new();
    let good = scene.artifact();
    let object = good.entries.iter().find(|entry| entry.path.ends_with(".filez")).unwrap().path.clone();
    let with = |change: &dyn Fn(&mut Artifact)| {
        let mut artifact = good.clone();
        change(&mut artifact);
        artifact.serve(&scene.server, "/h")
    };
    for (kind, link) in [
        (tar::EntryType::Char, None),
        (tar::EntryType::Block, None),
        (tar::EntryType::Fifo, None),
        (tar::EntryType::Symlink, Some("/etc/passwd")),
        (tar::EntryType::Link, Some("../../etc/passwd")),
        (tar::EntryType::GNULongName, None),
        (tar::EntryType::XGlobalHeader, None),
    ] {
        let mut header = tar::Header::new_ustar();
        header.set_path("dev").unwrap();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(0o644);
        if let Some(link) = link {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        let entry = Entry { path: "dev".to_owned(), header: header.as_bytes().to_vec(), content: Vec::new() };
        scene.rejected(&with(&|artifact| artifact.entries.insert(1, entry.clone())), "dev");
    }
    for path in ["extra", "../extra", "/etc/extra", "objects/../../x", "objects/zz/y.filez", "refs/heads/other"] {
        let added = with(&|artifact| {
            artifact.entries.push(Entry::file(path, b"x".to_vec()));
            artifact.entries.sort_by(|a, b| a.path.cmp(&b.path));
        });
        scene.rejected(&added, path);
    }
    scene.rejected(&with(&|artifact| artifact.entries.retain(|entry| entry.path != object)), "is missing");
    scene.rejected(&with(&|artifact| artifact.entries.retain(|entry| entry.path != "state")), "state");
    scene.rejected(&with(&|artifact| artifact.entries.retain(|entry| entry.path != "config")), "config");
    scene.rejected(&with(&|artifact| artifact.entry("config").replace(b"[core]\n".to_vec())), "config");
    scene.rejected(&with(&|artifact| artifact.entry(REF).content[0] ^= 1), REF);
    scene.rejected(&with(&|artifact| artifact.manifest.ref_name = "other".to_owned()), REF);
    scene.rejected(&with(&|artifact| artifact.manifest.commit = "0".repeat(64).parse().unwrap()), REF);
    scene.rejected(
        &with(&|artifact| artifact.entries.insert(1, artifact.entries[0].clone())),
        "not sorted or not unique",
    );
    scene.rejected(&with(&|artifact| artifact.entries.swap(1, 2)), "not sorted or not unique");
    let huge = with(&|artifact| artifact.entry(&object).header = header(&object, Kind::File(100 << 30)));
    scene.rejected(&huge, "107374182400 bytes");
    // mode, uid, mtime, user name, and the bytes after the prefix.
    for offset in [106, 114, 146, 265, 505] {
        let changed = with(&|artifact| {
            let bytes = &mut artifact.entry(&object).header;
            bytes[offset] = if bytes[offset] == b'1' { b'2' } else { b'1' };
            let mut block = tar::Header::from_byte_slice(bytes).clone();
            block.set_cksum();
            bytes.copy_from_slice(block.as_bytes());
        });
        scene.rejected(&changed, "is not canonical");
    }
    // Framing offsets that go back and forth: each second element of an array is nearly all of it.
    let overlapping = || -> Vec<u8> {
        let (whole, offsets) = (500_000_u32, 100_001);
        let mut array = vec![0; whole as usize];
        array.extend((0..offsets).flat_map(|number| (if number % 2 == 0 { whole } else { 0 }).to_le_bytes()));
        array
    };
    let mut bytes = vec![0; 24 + 1];
    bytes.extend(overlapping());
    bytes.extend(25_u32.to_le_bytes());
    let bomb = [&(bytes.len() as u32).to_be_bytes()[..], &[0; 4], &bytes].concat();
    scene.rejected(&with(&|artifact| artifact.entry(&object).replace(bomb.clone())), "overlap");
    let bomb = [&[0; 12][..], &overlapping()].concat();
    let name = Digest::of(&bomb).hex();
    let added = with(&|artifact| {
        artifact.entries.push(Entry::file(&format!("objects/{}/{}.dirmeta", &name[..2], &name[2..]), bomb.clone()));
        artifact.entries.sort_by(|a, b| a.path.cmp(&b.path));
    });
    scene.rejected(&added, "overlap");
    let tarball = good.tarball();
    let raw = |bytes: Vec<u8>| Served::new(&scene.server, "/h", good.manifest.clone(), bytes);
    scene.rejected(&raw([&tarball[..], &[0; BLOCK]].concat()), "after its end");
    scene.rejected(&raw([&tarball[..], b"x"].concat()), "after its end");
    scene.rejected(&raw([&tarball[..tarball.len() - BLOCK], &[1; BLOCK]].concat()), "goes on after");
    let start = tarball.windows(CONFIG_END.len()).position(|window| window == CONFIG_END).unwrap();
    let mut padded = tarball.clone();
    padded[start + CONFIG_END.len() + 3] = 1;
    scene.rejected(&raw(padded), "padding");
}

#[test]
fn no_byte_of_an_object_can_change() {
    let scene = Scene::new();
    let good = scene.artifact();
    let rejected = |entry: &Entry, reason: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut artifact = good.clone();
        let mut content = entry.content.clone();
        change(&mut content);
        artifact.entry(&entry.path).replace(content);
        let done = fails(&mut scene.fetch(&artifact.serve(&scene.server, "/o")), 3, reason);
        let name = entry.path["objects/".len()..].replace('/', "");
        assert!(done.stderr.contains(&name), "{}", done.stderr);
        assert_eq!(names(&scene.path("out")), [""; 0], "something was left behind");
    };
    let objects: Vec<_> = good.entries.iter().filter(|entry| entry.path.starts_with("objects/")).collect();
    let objects: Vec<_> = objects.into_iter().filter(|entry| !entry.content.is_empty()).collect();
    // Detached metadata has no checksum: the tarball's digest alone pins it.
    let objects: Vec<_> = objects.into_iter().filter(|entry| !entry.path.ends_with(".commitmeta")).collect();
    let files: Vec<_> = objects.iter().filter(|entry| entry.path.ends_with(".filez")).collect();
    for entry in &files {
        for offset in [0, 3, 4, 7, 8, 15, 16, 20, 24, 28, 32] {
            rejected(entry, "", &|bytes| bytes[offset] ^= 1);
        }
        rejected(entry, "", &|bytes| bytes.push(0));
        rejected(entry, "", &|bytes| bytes.truncate(bytes.len() - 1));
        rejected(entry, "ends within its header", &|bytes| bytes.truncate(5));
    }
    // An empty file's stream, 03 00, ends in the second bit of its last byte.
    let empty = files.iter().find(|entry| entry.content.ends_with(&[3, 0])).unwrap();
    for bit in 2..8 {
        rejected(empty, "bits after", &|bytes| *bytes.last_mut().unwrap() |= 1 << bit);
    }
    let size = |entry: &Entry| u64::from_be_bytes(entry.content[8..16].try_into().unwrap());
    let bomb = files.iter().max_by_key(|entry| size(entry)).unwrap();
    rejected(bomb, "longer than", &|bytes| bytes[8..16].copy_from_slice(&10_u64.to_be_bytes()));

    let mut random = Random(42);
    for _ in 0..60 {
        let entry = objects[random.below(objects.len())];
        let (byte, bit) = (random.below(entry.content.len()), random.below(8));
        let header = |content: &[u8]| u32::from_be_bytes(content[..4].try_into().unwrap()) as usize + 8;
        if !entry.path.ends_with(".filez") || byte < header(&entry.content) {
            rejected(entry, "verifying object", &|bytes| bytes[byte] ^= 1 << bit);
            continue;
        }
        // A deflate stream can say the same in several ways (the bits before a stored
        // block, for one): such a flip may pass, but never with other content.
        let mut artifact = good.clone();
        artifact.entry(&entry.path).content[byte] ^= 1 << bit;
        let done = run(&mut scene.fetch(&artifact.serve(&scene.server, "/o")));
        if done.code == 0 {
            let repo = scene.path("out/repo");
            ostree(&repo, &["fsck"]);
            let expected = ostree(&scene.path("source"), &["ls", "-R", "-C", REF]);
            assert_eq!(ostree(&repo, &["ls", "-R", "-C", REF]), expected);
            fs::remove_dir_all(&repo).unwrap();
        } else {
            assert!(done.code == 3 && done.stderr.contains("verifying object"), "{done:?}");
            assert_eq!(names(&scene.path("out")), [""; 0], "something was left behind");
        }
    }
}

#[test]
fn a_killed_run_leaves_nothing_visible_and_the_next_one_works() {
    let scene = Scene::new();
    let served = scene.artifact().serve(&scene.server, "/a");
    let mut random = Random(7);
    for round in 0..25 {
        let repo = scene.path("out/repo");
        let mut child = scene.fetch(&served).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.below(150_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        if repo.exists() {
            ostree(&repo, &["fsck"]);
            fs::remove_dir_all(&repo).unwrap();
        }
        if round % 5 == 4 {
            ok(&mut scene.fetch(&served));
            ostree(&repo, &["fsck"]);
            assert_eq!(names(&scene.path("out")), ["repo"]);
            fs::remove_dir_all(&repo).unwrap();
        }
    }
}

#[test]
fn memory_stays_flat() {
    let scene = Scene::new();
    let tree = scene.path("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("large"), noise(200 << 20)).unwrap();
    commit(&scene.path("source"), &tree, "1");
    let served = Artifact::of(&scene.path("source")).serve(&scene.server, "/a");
    let mut child = scene.fetch(&served).stdout(Stdio::null()).spawn().unwrap();
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut peak = 0;
    let ended = loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
        peak = line.split_whitespace().next().map_or(0, |kib| kib.parse::<u64>().unwrap()).max(peak);
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(ended.success());
    assert!(peak > 0 && peak < 100 << 10, "peak of {peak} KiB");
}
