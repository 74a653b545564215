//! What goes into the image from a repository: one ref's commit, all that it
//! reaches, and the files that make an archive-mode repository of them. The
//! repository's own config and other refs stay behind.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::object::{ObjectName, Type};
use oscontainer_artifact::tarball;
use oscontainer_program::exit::Usage;
use oscontainer_program::reject;

use super::index::{self, REPO};
use crate::repo::Repository;
use crate::rfc3339;
use crate::verify::{Links, check_object};

/// A ref's commit, as labels tell it.
pub struct Commit {
    /// The ref.
    pub ref_name: String,
    /// The commit that it names.
    pub checksum: Checksum,
    /// The commit's time (RFC 3339).
    pub created: String,
    /// The commit's `version`, where it has one.
    pub version: Option<String>,
    /// The commit's subject; often empty.
    pub subject: String,
}

/// A commit and all its objects, each of them there.
pub struct Source {
    /// The commit.
    pub commit: Commit,
    /// The objects, as `CHECKSUM.TYPE`, and their sizes in bytes.
    pub objects: BTreeMap<String, u64>,
    repo: Repository,
    summary: Vec<u8>,
}

impl Source {
    /// Takes `ref_name`, or the only ref, of the repository at `path`.
    ///
    /// # Errors
    /// [`Usage`] when the ref is not there or not given among several; rejected when
    /// the repository is of another mode or lacks an object.
    pub fn open(path: &Path, ref_name: Option<&str>) -> Result<Self> {
        let repo = Repository::open(path)?;
        let refs = repo.refs()?;
        let (ref_name, checksum) = choose(&refs, ref_name, path)?;
        let info = repo.commit(&checksum)?;
        let Some(created) = rfc3339::utc(info.timestamp) else {
            reject!("commit {checksum} has the impossible timestamp {}", info.timestamp)
        };
        let objects = reached(path, &checksum)?;
        let summary = repo.summary(&BTreeMap::from([(ref_name.clone(), checksum)]))?;
        let commit = Commit { ref_name, checksum, created, version: info.version, subject: info.subject };
        Ok(Self { commit, objects, repo, summary })
    }

    /// The object `CHECKSUM.TYPE`, open.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn object(&self, name: &str) -> Result<File> {
        let path = self.repo.path().join(index::object_in_repo(name));
        File::open(&path).with_context(|| format!("opening {}", path.display()))
    }

    /// The files of the repository in the image that are no objects, with their
    /// paths there: the ref before the summary that names it.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let Commit { ref_name, checksum, .. } = &self.commit;
        vec![
            (format!("{REPO}/config"), tarball::CONFIG.to_vec()),
            (format!("{REPO}/refs/heads/{ref_name}"), format!("{checksum}\n").into_bytes()),
            (format!("{REPO}/summary"), self.summary.clone()),
        ]
    }
}

/// All that `commit` reaches, and its detached metadata where it has some. What names
/// other objects is verified on the way; files are taken as `fetch` verified them,
/// but each must be there.
fn reached(repo: &Path, commit: &Checksum) -> Result<BTreeMap<String, u64>> {
    let mut objects = BTreeMap::new();
    let mut waiting = vec![ObjectName::new(*commit, Type::Commit)];
    let detached = ObjectName::new(*commit, Type::CommitMeta);
    if repo.join(detached.path()).exists() {
        waiting.push(detached);
    }
    while let Some(name) = waiting.pop() {
        let Entry::Vacant(object) = objects.entry(name.to_string()) else { continue };
        let path = repo.join(name.path());
        let reading = || format!("reading object {name} of {}", repo.display());
        let metadata = match path.symlink_metadata() {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => reject!("{} is no regular file", path.display()),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                reject!("{} lacks object {name}, which {commit} reaches: fetch it again", repo.display())
            }
            Err(e) => return Err(e).with_context(reading),
        };
        object.insert(metadata.len());
        if name.kind == Type::File {
            continue;
        }
        let file = File::open(&path).with_context(reading)?;
        match check_object(name, file).with_context(reading)? {
            Links::Commit(commit) => {
                waiting.push(ObjectName::new(commit.tree, Type::Dirtree));
                waiting.push(ObjectName::new(commit.meta, Type::Dirmeta));
            }
            Links::Dirtree(tree) => {
                waiting.extend(tree.files.iter().map(|file| ObjectName::new(*file, Type::File)));
                for (tree, meta) in tree.directories {
                    waiting.extend([ObjectName::new(tree, Type::Dirtree), ObjectName::new(meta, Type::Dirmeta)]);
                }
            }
            Links::None => {}
        }
    }
    Ok(objects)
}

fn choose(refs: &BTreeMap<String, Checksum>, wanted: Option<&str>, path: &Path) -> Result<(String, Checksum)> {
    let path = path.display();
    let known = refs.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    let chosen = match wanted {
        Some(name) => refs.get_key_value(name),
        None if refs.len() > 1 => {
            return Err(Usage(format!("{path} has several refs ({known}): name one by --ref")).into());
        }
        None => refs.first_key_value(),
    };
    let chosen = chosen.ok_or_else(|| match wanted {
        Some(name) => Usage(format!("{path} has no ref {name}; it has: {known}")),
        None => Usage(format!("{path} has no refs")),
    });
    chosen.map(|(name, checksum)| (name.clone(), *checksum)).context("choosing the ref")
}
