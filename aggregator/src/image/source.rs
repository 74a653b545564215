//! What goes into the image from a repository: one ref's commit, all that it
//! reaches, and the files that make an archive-mode repository of them. The
//! repository's own config and other refs stay behind.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::object::{ObjectName, Type};
use oscontainer_artifact::tarball;
use oscontainer_program::exit::Usage;
use oscontainer_program::reject;

use super::facts::{self, Commit};
use super::index::REPO;
use super::parallel::in_order;
use crate::repo::Repository;
use crate::verify::check_object;

/// The fewest objects that are worth a thread.
const MIN_SHARE: usize = 32;

/// A ref's commit in a repository.
pub struct Source {
    /// The commit.
    pub commit: Commit,
    repo: Repository,
    files: Vec<(String, Vec<u8>)>,
}

impl Source {
    /// Takes `ref_name`, or the only ref, of the repository at `path`.
    ///
    /// # Errors
    /// [`Usage`] when the ref is not there or not given among several; rejected when
    /// the repository is of another mode or the commit is damaged.
    pub fn open(path: &Path, ref_name: Option<&str>) -> Result<Self> {
        let repo = Repository::open(path)?;
        let refs = repo.refs()?;
        let (ref_name, checksum) = choose(&refs, ref_name, path)?;
        let commit = Commit::read(&repo, ref_name, checksum)?;
        let ref_name = &commit.ref_name;
        let summary = repo.summary(&BTreeMap::from([(ref_name.clone(), checksum)]))?;
        let mut files = vec![(format!("{REPO}/config"), tarball::CONFIG.to_vec())];
        let detached = ObjectName::new(checksum, Type::CommitMeta).path();
        match fs::read(path.join(&detached)) {
            Ok(content) => files.push((format!("{REPO}/{detached}"), content)),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.join(&detached).display())),
        }
        for (name, content) in commit.documents()? {
            files.push((format!("{}/{name}", facts::DIRECTORY), content));
        }
        files.push((format!("{REPO}/refs/heads/{ref_name}"), format!("{checksum}\n").into_bytes()));
        files.push((format!("{REPO}/summary"), summary));
        Ok(Self { commit, repo, files })
    }

    /// An object, open.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn object(&self, name: &ObjectName) -> Result<File> {
        let path = self.repo.path().join(name.path());
        File::open(&path).with_context(|| format!("opening {}", path.display()))
    }

    /// The files of the repository in the image that are no checksummed objects, with
    /// their paths there: the ref before the summary that names it.
    pub fn files(&self) -> &[(String, Vec<u8>)] {
        &self.files
    }

    /// All that the commit reaches, and sizes in bytes; of files that are `known` their
    /// known size, without a look at them. What names other objects is verified on the
    /// way; new files are taken as `fetch` verified them, but each must be there. The
    /// tree is walked level by level, on all cores.
    ///
    /// # Errors
    /// Rejected when the repository lacks an object or one is damaged.
    pub fn reached(&self, known: impl Fn(&ObjectName) -> Option<u64> + Sync) -> Result<BTreeMap<ObjectName, u64>> {
        let mut objects = BTreeMap::new();
        let mut level = vec![ObjectName::new(self.commit.checksum, Type::Commit)];
        while !level.is_empty() {
            let mut next = HashSet::new();
            for (name, size, links) in self.read_level(&level, &known)? {
                objects.insert(name, size);
                next.extend(links);
            }
            level = next.into_iter().filter(|name| !objects.contains_key(name)).collect();
        }
        Ok(objects)
    }

    fn read_level(
        &self,
        level: &[ObjectName],
        known: &(impl Fn(&ObjectName) -> Option<u64> + Sync),
    ) -> Result<Vec<(ObjectName, u64, Vec<ObjectName>)>> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let parts: Vec<_> = level.chunks(level.len().div_ceil(cores).max(MIN_SHARE)).collect();
        let read = in_order(parts.len(), cores, |number| {
            let links = |name: &ObjectName| {
                let (size, links) = self.links(*name, known(name))?;
                Ok((*name, size, links))
            };
            parts[number].iter().map(links).collect::<Result<Vec<_>>>()
        })?;
        Ok(read.into_iter().flatten().collect())
    }

    /// The size of an object and what it names.
    fn links(&self, name: ObjectName, known: Option<u64>) -> Result<(u64, Vec<ObjectName>)> {
        if let Some(size) = known.filter(|_| matches!(name.kind, Type::File | Type::Dirmeta)) {
            return Ok((size, Vec::new()));
        }
        let repo = self.repo.path();
        let path = repo.join(name.path());
        let reading = || format!("reading object {name} of {}", repo.display());
        let metadata = match path.symlink_metadata() {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => reject!("{} is no regular file", path.display()),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                reject!(
                    "{} lacks object {name}, which {} reaches: fetch it again",
                    repo.display(),
                    self.commit.checksum
                )
            }
            Err(e) => return Err(e).with_context(reading),
        };
        let size = known.unwrap_or(metadata.len());
        if name.kind == Type::File {
            return Ok((size, Vec::new()));
        }
        let file = File::open(&path).with_context(reading)?;
        Ok((size, check_object(name, file).with_context(reading)?.names()))
    }
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
