//! What the next image is made of: which layers stay, and what the new ones hold.
//! Nothing is read or written here but the repository's metadata.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Read;

use anyhow::{Context, Result};
use oscontainer_artifact::digest::{Checksum, Digest};
use oscontainer_artifact::object::{ObjectName, Type};
use oscontainer_artifact::tarball;
use oscontainer_program::reject;

use super::document::SERVER;
use super::index::{DIRECTORY, FileEntry, Index, REPO};
use super::layer::Contents;
use super::log::{self, Log};
use super::previous::{Places, Previous};
use super::server::Server;
use super::source::Source;

/// When a log of layers ends and a new one begins.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Whatever the layers are, begin afresh.
    pub fresh: bool,
    /// How many commits stay pullable, the new one included.
    pub keep_commits: usize,
    /// How many percent of the bytes may be of objects and files that no kept commit needs.
    pub max_waste: u64,
    /// The most layers.
    pub max_layers: usize,
}

/// The next image.
pub struct Plan<'a> {
    /// How many layers of the previous image stay, from the first.
    pub kept: usize,
    /// The layers that come after them.
    pub new: Vec<Index>,
    contents: Sources<'a>,
}

impl<'a> Plan<'a> {
    /// Plans the image of `source` and `server` after `previous`.
    ///
    /// # Errors
    /// Rejected when `previous` is for something else, and when the repository is not whole.
    pub fn new(
        source: &'a Source,
        server: &'a Server,
        previous: Option<&'a Previous>,
        limits: &Limits,
    ) -> Result<Self> {
        let previous = match previous {
            Some(previous) if belongs(previous, source, server, limits)? => previous,
            _ => return Self::afresh(source, server, None, Vec::new()),
        };
        let indexes = || previous.layers.iter().map(|kept| &kept.index);
        let log = Log::of(indexes());
        let objects = source.reached(|name| log.objects.get(name).map(|(_, size)| *size))?;
        let older: Vec<_> = log.commits.iter().filter(|(_, commit)| *commit != source.commit.checksum).collect();
        let older: Vec<(Checksum, HashSet<ObjectName>)> = older[older.len().saturating_sub(limits.keep_commits - 1)..]
            .iter()
            .map(|(layer, commit)| (*commit, log::reached_at(indexes(), *layer)))
            .collect();
        if limits.fresh {
            tracing::info!("beginning a new log of layers, as --fresh says");
            return Self::afresh(source, server, Some(previous), older);
        }
        let kept = previous.layers.len();
        let index = next(&log, kept as u32, source, server, &objects);
        let Some(index) = index else {
            return Ok(Self { kept, new: Vec::new(), contents: Sources::new(source, server, objects) });
        };
        let needed = live(&log, &index, &objects, &older);
        let mut after = log;
        after.push(&index);
        let waste = after.bytes.saturating_sub(needed);
        if u128::from(waste) * 100 > u128::from(after.bytes) * u128::from(limits.max_waste) {
            tracing::info!(
                "beginning a new log of layers: {waste} of {} bytes would be of no use, more than {} %",
                after.bytes,
                limits.max_waste
            );
        } else if kept + 1 > limits.max_layers {
            tracing::info!("beginning a new log of layers: there would be more than {}", limits.max_layers);
        } else {
            return Ok(Self { kept, new: vec![index], contents: Sources::new(source, server, objects) });
        }
        Self::afresh(source, server, Some(previous), older)
    }

    /// A new log: the server, each older commit that is kept, and the source's commit.
    fn afresh(
        source: &'a Source,
        server: &'a Server,
        previous: Option<&'a Previous>,
        older: Vec<(Checksum, HashSet<ObjectName>)>,
    ) -> Result<Self> {
        let objects = source.reached(|_| None)?;
        let mut base = Index::new(0);
        base.add_directory(&HashSet::new(), DIRECTORY);
        base.add_directory(&HashSet::new(), "usr/bin");
        base.files.push(server_entry(server));
        let mut log = Log::of([&base]);
        let mut new = vec![base];
        let mut contents = Sources::new(source, server, objects);
        if let Some(previous) = previous {
            let before = Log::of(previous.layers.iter().map(|kept| &kept.index));
            let places = previous.places(|name| older.iter().any(|(_, reached)| reached.contains(name)))?;
            for (commit, reached) in older {
                let mut index = Index::new(new.len() as u32);
                let sizes = reached.iter().map(|name| {
                    let size = contents.objects.get(name).or_else(|| before.objects.get(name).map(|(_, size)| size));
                    let Some(size) = size else { reject!("object {name} of {commit} is in no layer") };
                    Ok((*name, *size))
                });
                let reached: BTreeMap<_, _> = sizes.collect::<Result<_>>()?;
                bring(&mut index, &log, &source.commit.ref_name, commit, &reached);
                let detached = format!("{REPO}/{}", ObjectName::new(commit, Type::CommitMeta).path());
                if let Some((layer, file)) = before.files.get(&detached) {
                    contents.files.insert(detached, previous.file(*layer, &file.path)?);
                    index.files.push(file.clone());
                }
                log.push(&index);
                new.push(index);
            }
            contents.older = Some((previous, places));
        }
        if let Some(index) = next(&log, new.len() as u32, source, server, &contents.objects) {
            new.push(index);
        }
        Ok(Self { kept: 0, new, contents })
    }

    /// Whether a new log of layers begins.
    pub fn fresh(&self) -> bool {
        self.kept == 0
    }

    /// What the new layers hold.
    pub fn contents(&self) -> &dyn Contents {
        &self.contents
    }
}

/// Whether the layers of `previous` can be gone on with; those of another ref or machine
/// are of no use even for `--fresh`.
fn belongs(previous: &Previous, source: &Source, server: &Server, limits: &Limits) -> Result<bool> {
    let (found, wanted) = (previous.architecture.as_str(), server.architecture);
    if found != wanted {
        if limits.fresh {
            return Ok(false);
        }
        reject!("the previous image is for {found}, the server for {wanted}: --fresh begins a new log of layers");
    }
    let (found, wanted) = match previous.ref_name() {
        Err(_) if limits.fresh => return Ok(false),
        found => (found?, source.commit.ref_name.as_str()),
    };
    if found != wanted {
        if limits.fresh {
            return Ok(false);
        }
        reject!("the previous image holds the ref {found}, not {wanted}: --fresh begins a new log of layers");
    }
    Ok(true)
}

/// The layer that brings the source's commit and the server to `log`, as far as they
/// are not there; nothing when there is nothing new.
fn next(
    log: &Log,
    number: u32,
    source: &Source,
    server: &Server,
    objects: &BTreeMap<ObjectName, u64>,
) -> Option<Index> {
    let mut index = Index::new(number);
    let mut files = vec![server_entry(server)];
    files.extend(source.files().iter().map(|(path, content)| FileEntry {
        path: path.clone(),
        size: content.len() as u64,
        digest: Digest::of(content),
        executable: false,
    }));
    files.retain(|file| !log.has(file));
    let commit = &source.commit;
    let known = log.commits.last().is_some_and(|(_, last)| *last == commit.checksum);
    if known && files.is_empty() {
        return None;
    }
    if !known {
        bring(&mut index, log, &commit.ref_name, commit.checksum, objects);
        for directory in tarball::DIRECTORIES {
            index.add_directory(&log.directories, &format!("{REPO}/{directory}"));
        }
    }
    index.add_directory(&log.directories, DIRECTORY);
    for file in &files {
        if let Some((directory, _)) = file.path.rsplit_once('/') {
            index.add_directory(&log.directories, directory);
        }
    }
    index.files = files;
    Some(index)
}

/// Lets `index` bring `commit`, which reaches `objects`.
fn bring(index: &mut Index, log: &Log, ref_name: &str, commit: Checksum, objects: &BTreeMap<ObjectName, u64>) {
    index.ref_name = Some(ref_name.to_owned());
    index.commit = Some(commit);
    let new = objects.iter().filter(|(name, _)| !log.objects.contains_key(*name));
    index.objects = new.map(|(name, size)| (*name, *size)).collect();
    (index.dropped, index.restored) = log.step(&objects.keys().copied().collect());
    let digits: BTreeSet<_> =
        index.objects.keys().map(|name| name.path()["objects/".len()..][..2].to_owned()).collect();
    for digits in digits {
        index.add_directory(&log.directories, &format!("{REPO}/objects/{digits}"));
    }
}

/// Bytes of what the kept commits reach and of the newest files, `index` on top of `log`.
fn live(
    log: &Log,
    index: &Index,
    objects: &BTreeMap<ObjectName, u64>,
    older: &[(Checksum, HashSet<ObjectName>)],
) -> u64 {
    let mut others: HashSet<_> = older.iter().flat_map(|(_, reached)| reached).collect();
    others.retain(|name| !objects.contains_key(*name));
    let others = others.into_iter().filter_map(|name| log.objects.get(name)).map(|(_, size)| size);
    let replaced = |path: &str| index.files.iter().any(|file| file.path == path);
    let files = log.files.values().map(|(_, file)| file).filter(|file| !replaced(&file.path)).chain(&index.files);
    objects.values().chain(others).copied().chain(files.map(|file| file.size)).fold(0, u64::saturating_add)
}

fn server_entry(server: &Server) -> FileEntry {
    FileEntry { path: SERVER.to_owned(), size: server.size, digest: server.digest, executable: true }
}

/// What new layers are made of: the repository, the server, and of older commits that
/// the repository may lack, the previous image.
struct Sources<'a> {
    source: &'a Source,
    server: &'a Server,
    objects: BTreeMap<ObjectName, u64>,
    files: BTreeMap<String, Vec<u8>>,
    older: Option<(&'a Previous, Places<'a>)>,
}

impl<'a> Sources<'a> {
    fn new(source: &'a Source, server: &'a Server, objects: BTreeMap<ObjectName, u64>) -> Self {
        let files = source.files().iter().cloned().collect();
        Self { source, server, objects, files, older: None }
    }
}

impl Contents for Sources<'_> {
    fn object(&self, name: &ObjectName) -> Result<Box<dyn Read + '_>> {
        match &self.older {
            Some((previous, places)) if !self.objects.contains_key(name) => previous.object(*name, places),
            _ => Ok(Box::new(self.source.object(name)?)),
        }
    }

    fn file(&self, path: &str) -> Result<Box<dyn Read + '_>> {
        if path == SERVER {
            return Ok(self.server.content());
        }
        let content = self.files.get(path).with_context(|| format!("{path} is not there"))?;
        Ok(Box::new(&content[..]))
    }
}
