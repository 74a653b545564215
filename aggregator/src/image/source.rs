//! What goes into the image from a repository: one ref's commit, all that it
//! reaches, and the files that make an archive-mode repository of them. The
//! repository's own config and other refs stay behind.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::thread;

use anyhow::{Context, Result};
use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::object::{ObjectName, Type};
use oscontainer_artifact::tarball;
use oscontainer_program::exit::Usage;
use oscontainer_program::reject;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, statat};
use rustix::io::Errno;

use super::facts::{self, Commit};
use super::index::REPO;
use super::parallel::in_order;
use crate::repo::Repository;
use crate::verify::Check;

/// The fewest objects that are worth a thread.
const MIN_SHARE: usize = 64;
/// Bytes of an object that are read at a time; most of those that name others have less.
const BUFFER: usize = 64 << 10;

/// A ref's commit in a repository, whose tree is not known yet.
pub struct Opened {
    commit: Commit,
    repo: Repository,
    /// The repository's directory: names below it are found sooner than below the root.
    directory: File,
    files: Vec<(String, Vec<u8>)>,
}

/// A ref's commit in a repository, and the names of all that it reaches.
pub struct Source {
    /// The commit.
    pub commit: Commit,
    /// What names other objects, and its size in bytes.
    trees: Vec<(ObjectName, u64)>,
    /// What names none.
    leaves: HashSet<ObjectName>,
    repo: Repository,
    directory: File,
    files: Vec<(String, Vec<u8>)>,
}

impl Opened {
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
        let directory = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { commit, repo, directory, files })
    }

    /// Reads and verifies all that names other objects, level by level, on all cores.
    ///
    /// # Errors
    /// Rejected when the repository lacks such an object or one is damaged.
    pub fn walk(self) -> Result<Source> {
        let Self { commit, repo, directory, files } = self;
        let mut source = Source { commit, trees: Vec::new(), leaves: HashSet::new(), repo, directory, files };
        let mut seen = HashSet::new();
        let mut level = vec![ObjectName::new(source.commit.checksum, Type::Commit)];
        while !level.is_empty() {
            let mut next = Vec::new();
            for (name, size, links) in source.each(&level, |name, buffer| source.read(*name, buffer))? {
                source.trees.push((name, size));
                for link in links {
                    if link.kind != Type::Dirtree {
                        source.leaves.insert(link);
                    } else if seen.insert(link) {
                        next.push(link);
                    }
                }
            }
            level = next;
        }
        Ok(source)
    }
}

impl Source {
    /// An object, open.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn object(&self, name: &ObjectName) -> Result<File> {
        let path = name.path();
        let opened = openat(&self.directory, path.as_str(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        Ok(opened.with_context(|| format!("opening {}", self.repo.path().join(path).display()))?.into())
    }

    /// The files of the repository in the image that are no checksummed objects, with
    /// their paths there: the ref before the summary that names it.
    pub fn files(&self) -> &[(String, Vec<u8>)] {
        &self.files
    }

    /// All that the commit reaches, and sizes in bytes; of objects that are `known` their known size, without a
    /// look at them. New files are taken as `fetch` verified them, but each must be there.
    ///
    /// # Errors
    /// Rejected when the repository lacks an object or one is damaged.
    pub fn reached(&self, known: impl Fn(&ObjectName) -> Option<u64>) -> Result<BTreeMap<ObjectName, u64>> {
        let mut objects: Vec<_> = self.trees.iter().map(|(name, size)| (*name, known(name).unwrap_or(*size))).collect();
        let mut new = Vec::new();
        for name in &self.leaves {
            match known(name) {
                Some(size) => objects.push((*name, size)),
                None => new.push(*name),
            }
        }
        let sizes = self.each(&new, |name, buffer| match name.kind {
            Type::File => Ok((self.size(*name)?, Vec::new())),
            _ => self.read(*name, buffer),
        })?;
        objects.extend(sizes.into_iter().map(|(name, size, _)| (name, size)));
        Ok(objects.into_iter().collect())
    }

    /// Calls `work` for each of `names`, on all cores; each thread has its buffer.
    fn each(
        &self,
        names: &[ObjectName],
        work: impl Fn(&ObjectName, &mut [u8]) -> Result<(u64, Vec<ObjectName>)> + Sync,
    ) -> Result<Vec<(ObjectName, u64, Vec<ObjectName>)>> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let parts: Vec<_> = names.chunks(names.len().div_ceil(cores).max(MIN_SHARE)).collect();
        let done = in_order(parts.len(), cores, |number| {
            let mut buffer = vec![0; BUFFER];
            let mut one = |name: &ObjectName| {
                let done = work(name, &mut buffer);
                let (size, links) =
                    done.with_context(|| format!("reading object {name} of {}", self.repo.path().display()))?;
                Ok((*name, size, links))
            };
            parts[number].iter().map(&mut one).collect::<Result<Vec<_>>>()
        })?;
        Ok(done.into_iter().flatten().collect())
    }

    /// The size of an object that is no file, and what it names; its checksum is verified.
    fn read(&self, name: ObjectName, buffer: &mut [u8]) -> Result<(u64, Vec<ObjectName>)> {
        // A pipe must not make us wait.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.directory, name.path().as_str(), flags, Mode::empty());
        let mut file = File::from(file.map_err(|error| self.missing(name, error))?);
        let mut check = Check::new(name);
        let mut size = 0;
        loop {
            match file.read(buffer) {
                Ok(0) => break,
                Ok(count) => {
                    size += count as u64;
                    check.update(&buffer[..count])?;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok((size, check.finish()?.names()))
    }

    /// The size of a file that must be there.
    fn size(&self, name: ObjectName) -> Result<u64> {
        let found = statat(&self.directory, name.path().as_str(), AtFlags::SYMLINK_NOFOLLOW);
        let found = found.map_err(|error| self.missing(name, error))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            reject!("it is no regular file");
        }
        Ok(u64::try_from(found.st_size)?)
    }

    fn missing(&self, name: ObjectName, error: Errno) -> anyhow::Error {
        let (path, commit) = (self.repo.path().display(), &self.commit.checksum);
        match error {
            Errno::NOENT => {
                Rejected::new(format!("{path} lacks object {name}, which {commit} reaches: fetch it again")).into()
            }
            Errno::LOOP => Rejected::new("it is no regular file").into(),
            error => error.into(),
        }
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
