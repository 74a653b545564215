//! Small OSTree repositories made by the real `ostree`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{ok, tool};

/// An archive-mode repository below a test's directory.
pub struct OstreeRepo {
    /// Where it is.
    pub path: PathBuf,
    tree: PathBuf,
}

impl OstreeRepo {
    /// An empty repository at `directory/name`.
    #[track_caller]
    pub fn new(directory: &Path, name: &str) -> Self {
        let repo = Self { path: directory.join(name), tree: directory.join(format!("{name}.tree")) };
        fs::create_dir(&repo.path).expect("the test's directory can be written");
        ok(repo.ostree().args(["init", "--mode=archive"]));
        repo
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
            .args(["--owner-uid=0", "--owner-gid=0", "--no-xattrs", "--add-metadata-string=version=1.<2>", &tree]));
        done.stdout.trim().to_owned()
    }

    /// `ostree` on this repository.
    pub fn ostree(&self) -> std::process::Command {
        let mut command = tool("ostree");
        command.arg(format!("--repo={}", self.path.display()));
        command
    }
}
