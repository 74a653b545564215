//! Small OSTree repositories made by the real `ostree`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{ok, tool};

/// An archive-mode repository below a test's directory.
pub struct OstreeRepo {
    /// Where it is.
    pub path: PathBuf,
    tree: PathBuf,
    /// `KEY=VALUE` in GVariant's text form, for the metadata of commits.
    metadata: Vec<String>,
}

impl OstreeRepo {
    /// An empty repository at `directory/name`.
    #[track_caller]
    pub fn new(directory: &Path, name: &str) -> Self {
        let tree = directory.join(format!("{name}.tree"));
        let repo = Self { path: directory.join(name), tree, metadata: Vec::new() };
        fs::create_dir(&repo.path).expect("the test's directory can be written");
        ok(repo.ostree().args(["init", "--mode=archive"]));
        repo
    }

    /// The repository that lies at `path`; it is not committed to.
    pub fn at(path: PathBuf) -> Self {
        Self { tree: path.with_extension("tree"), path, metadata: Vec::new() }
    }

    /// Commits a small tree with `text` in one of its files to `ref_name`; gives the
    /// commit. The same text gives the same commit.
    #[track_caller]
    pub fn commit(&self, ref_name: &str, text: &str) -> String {
        let usr = self.tree.join("usr");
        fs::create_dir_all(usr.join("lib/deep")).expect("the tree can be made");
        for (file, content) in [("etc", text), ("lib/deep/empty", ""), ("lib/twice", "twice")] {
            fs::write(usr.join(file), content).expect("the tree can be written");
        }
        // More than one stored block of 65,535 bytes, and nothing that deflates well.
        let noise: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        fs::write(usr.join("lib/noise"), noise).expect("the tree can be written");
        let tree = format!("--tree=dir={}", self.tree.display());
        let branch = format!("--branch={ref_name}");
        let done = ok(self
            .ostree()
            .args(["commit", &branch, "--subject=a <small> tree", "--timestamp=@1700000000"])
            .args(["--owner-uid=0", "--owner-gid=0", "--no-xattrs", "--add-metadata-string=version=1.<2>", &tree])
            .args(self.metadata.iter().map(|pair| format!("--add-metadata={pair}"))));
        done.stdout.trim().to_owned()
    }

    /// The next commits have this in their metadata: `KEY=VALUE`, the value in GVariant's text form.
    pub fn add_metadata(&mut self, pair: &str) {
        self.metadata.push(pair.to_owned());
    }

    /// The next commits have none of it any more.
    pub fn clear_metadata(&mut self) {
        self.metadata.clear();
    }

    /// Puts `size` bytes that do not deflate, chosen by `seed`, into the tree of the next commits.
    #[track_caller]
    pub fn put_noise(&self, name: &str, size: usize, seed: u64) {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            // xorshift64 (Marsaglia, 2003).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .take(size)
        .collect();
        let lib = self.tree.join("usr/lib");
        fs::create_dir_all(&lib).expect("the tree can be made");
        fs::write(lib.join(name), noise).expect("the tree can be written");
    }

    /// `ostree` on this repository.
    pub fn ostree(&self) -> std::process::Command {
        let mut command = tool("ostree");
        command.arg(format!("--repo={}", self.path.display()));
        command
    }
}
