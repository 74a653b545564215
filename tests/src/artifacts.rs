//! Artifacts made by hand from a repository of the real `ostree`, so that tests
//! can change any byte of them and still have every digest right.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::manifest::{MEDIA_TYPE, Manifest, TARBALL_FILE, TARBALL_MEDIA_TYPE, Tarball};
use oscontainer_artifact::tarball::{CONFIG, DIRECTORIES, END, Kind, header, padding};

use crate::http::{Answer, Static};
use crate::{ok, tool};

/// The ref of every repository here.
pub const REF: &str = "demo/x86_64/host";

/// One entry of a tarball: its header as it is written, and its content.
#[derive(Clone)]
pub struct Entry {
    /// Path, for tests to find it.
    pub path: String,
    /// The header's bytes.
    pub header: Vec<u8>,
    /// The content, without padding.
    pub content: Vec<u8>,
}

impl Entry {
    /// A regular file with a canonical header.
    pub fn file(path: &str, content: Vec<u8>) -> Self {
        Self { path: path.to_owned(), header: header(path, Kind::File(content.len() as u64)), content }
    }

    /// A directory.
    pub fn directory(path: &str) -> Self {
        Self { path: path.to_owned(), header: header(path, Kind::Directory), content: Vec::new() }
    }

    /// The same path with other content.
    pub fn replace(&mut self, content: Vec<u8>) {
        *self = Self::file(&self.path, content);
    }
}

/// An artifact in memory.
#[derive(Clone)]
pub struct Artifact {
    /// The tarball's entries in their order.
    pub entries: Vec<Entry>,
    /// The manifest but for size and digest, which [`Artifact::serve`] sets.
    pub manifest: Manifest,
}

impl Artifact {
    /// Packs [`REF`] of the archive-mode repository at `repo`.
    pub fn of(repo: &Path) -> Self {
        let commit = ok(tool("ostree").arg("rev-parse").arg("--repo").arg(repo).arg(REF)).stdout.trim().to_owned();
        let reachable: Vec<String> = listed(repo, &commit);
        let mut entries = BTreeMap::new();
        for path in DIRECTORIES {
            entries.insert(path.to_owned(), Entry::directory(path));
        }
        let mut file = |path: &str, content: Vec<u8>| {
            entries.insert(path.to_owned(), Entry::file(path, content));
        };
        file("config", CONFIG.to_vec());
        file(&format!("refs/heads/{REF}"), format!("{commit}\n").into_bytes());
        for path in reachable {
            file(&path, fs::read(repo.join(&path)).expect("a listed object can be read"));
        }
        let manifest = Manifest {
            schema_version: 1,
            media_type: MEDIA_TYPE.to_owned(),
            name: "demo".parse().expect("a good name"),
            version: "1".parse().expect("a good version"),
            architecture: "amd64".to_owned(),
            ref_name: REF.to_owned(),
            commit: commit.parse().expect("ostree prints checksums"),
            tarball: Tarball {
                path: TARBALL_FILE.to_owned(),
                media_type: TARBALL_MEDIA_TYPE.to_owned(),
                size: 0,
                digest: Digest::of(b""),
            },
            annotations: BTreeMap::new(),
        };
        Self { entries: entries.into_values().collect(), manifest }
    }

    /// The entry whose path ends with `end`.
    #[track_caller]
    pub fn entry(&mut self, end: &str) -> &mut Entry {
        self.entries.iter_mut().find(|entry| entry.path.ends_with(end)).expect("there is such an entry")
    }

    /// The tarball's bytes.
    pub fn tarball(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in &self.entries {
            bytes.extend_from_slice(&entry.header);
            bytes.extend_from_slice(&entry.content);
            bytes.resize(bytes.len() + padding(entry.content.len() as u64), 0);
        }
        bytes.extend_from_slice(&END);
        bytes
    }

    /// Lets `server` answer with it, all digests right; gives the manifest's URL
    /// and digest.
    pub fn serve(&self, server: &Static, below: &str) -> Served {
        Served::new(server, below, self.manifest.clone(), self.tarball())
    }
}

/// An artifact that a server has.
pub struct Served {
    /// The manifest's URL.
    pub url: String,
    /// The manifest's digest.
    pub digest: String,
}

impl Served {
    /// Serves `tarball` and `manifest`, size and digest set, below a path.
    pub fn new(server: &Static, below: &str, mut manifest: Manifest, tarball: Vec<u8>) -> Self {
        manifest.tarball.size = tarball.len() as u64;
        manifest.tarball.digest = Digest::of(&tarball);
        let bytes = manifest.to_bytes();
        let digest = Digest::of(&bytes).to_string();
        server.set(&format!("{below}/manifest.json"), Answer::Bytes(Arc::new(bytes)));
        server.set(&format!("{below}/repo.tar"), Answer::Bytes(Arc::new(tarball)));
        Self { url: server.url(&format!("{below}/manifest.json")), digest }
    }
}

/// Commits `tree` into `repo`, which is made if it is absent.
pub fn commit(repo: &Path, tree: &Path, version: &str) {
    if !repo.exists() {
        ok(tool("ostree").arg("init").arg("--mode=archive").arg("--repo").arg(repo));
    }
    ok(tool("ostree")
        .arg("commit")
        .arg("--repo")
        .arg(repo)
        .args(["--branch", REF, "--owner-uid=0", "--owner-gid=0", "--no-xattrs", "--subject=test"])
        .arg("--parent=none")
        .arg(format!("--add-metadata-string=version={version}"))
        .arg("--timestamp=2026-01-01 00:00:00 UTC")
        .arg(tree));
}

/// The objects that a commit reaches, as paths.
fn listed(repo: &Path, commit: &str) -> Vec<String> {
    // A mirror of one commit holds what it reaches and nothing else.
    let mirror = tempfile::tempdir().expect("a temporary directory");
    let path = mirror.path().join("repo");
    ok(tool("ostree").arg("init").arg("--mode=archive").arg("--repo").arg(&path));
    ok(tool("ostree").arg("pull-local").arg("--repo").arg(&path).arg(repo).arg(commit));
    let mut paths = Vec::new();
    for directory in fs::read_dir(path.join("objects")).expect("the mirror has objects") {
        let directory = directory.expect("it can be read").path();
        for file in fs::read_dir(&directory).expect("it can be read") {
            let file = file.expect("it can be read").path();
            let name = file.strip_prefix(&path).expect("it is below").to_str().expect("names are ASCII").to_owned();
            if !name.ends_with(".commitpartial") {
                paths.push(name);
            }
        }
    }
    paths
}
