//! Layers that a container build makes of what `fetch` adds to the repository in an
//! image: `fetch` writes their index, and here they are read again. Their tar and gzip
//! have any form, so all of such a layer is read, always.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::path::Path;

use anyhow::{Context, Result};
use flate2::read::MultiGzDecoder;
use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::object::{ObjectName, Type};
use oscontainer_program::reject;
use tar::EntryType;

use super::facts::Commit;
use super::index::{self, Budget, DIRECTORY, FileEntry, Index, REPO};
use super::layer::Layer;
use super::log::Log;
use super::stored_gzip::Hashing;
use crate::repo::{self, Repository};

/// The first index that a container build writes: the layer below is the server's, without one.
const FIRST: u32 = 1;

/// Bytes of what may come before an entry of a tar: its header, and its names and attributes where that has no
/// room for them. Readers keep these in memory.
const MAX_HEADERS: u64 = 1 << 20;
/// Bytes that an entry counts, beside its name, among those of an image's indexes.
const ENTRY: u64 = 100;

/// The largest tar that is read, in bytes: gzip makes a thousand bytes of one, and all of them are hashed.
const MAX_TAR: u64 = 64 << 30;

/// What `fetch` added to a repository.
pub struct Added<'a> {
    /// The ref.
    pub ref_name: &'a str,
    /// The commit that it names now.
    pub commit: Checksum,
    /// All that the artifact holds.
    pub reached: &'a [ObjectName],
    /// What was not there before, and sizes in bytes.
    pub written: BTreeMap<ObjectName, u64>,
}

/// Writes the index of the layer that holds what was `added`, beside those of earlier
/// layers in `directory`, none if nothing was; and beside that directory the documents
/// that describe the commit in the repository `repo`.
///
/// # Errors
/// Rejected when an earlier index is damaged; else when it cannot be written.
pub fn write_index(directory: &Path, repo: &Path, added: Added<'_>) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    let commit = Commit::read(&Repository::open(repo)?, added.ref_name.to_owned(), added.commit)?;
    for (name, content) in commit.documents()? {
        let path = directory.parent().unwrap_or(directory).join(name);
        if !fs::read(&path).is_ok_and(|found| found == content) {
            repo::replace(&path, &content)?;
        }
    }
    let earlier = read_indexes(directory)?;
    let log = Log::of(earlier.values());
    let is_object = |name: &&ObjectName| name.kind != Type::CommitMeta;
    let reached = added.reached.iter().filter(is_object).copied().collect();
    if added.written.is_empty() && log.commits.last().is_some_and(|(_, last)| *last == added.commit) {
        return Ok(());
    }
    let mut index = Index::new(earlier.keys().next_back().map_or(FIRST, |last| last + 1));
    index.ref_name = Some(added.ref_name.to_owned());
    index.commit = Some(added.commit);
    index.objects = added.written.into_iter().filter(|(name, _)| is_object(&name)).collect();
    (index.dropped, index.restored) = log.step(&reached);
    // What was damaged was written again.
    index.restored.retain(|name| !index.objects.contains_key(name));
    repo::replace(&directory.join(index::file_name(index.layer)), &index.to_bytes()?)
}

/// Makes sure that what is added to the image whose indexes lie in `directory` has its ref.
///
/// # Errors
/// Rejected when it has not, or when an index is damaged; else when they cannot be read.
pub fn goes_on(directory: &Path, ref_name: &str) -> Result<()> {
    let last = read_indexes(directory)?.into_values().rev().find_map(|index| index.ref_name);
    if let Some(last) = last.filter(|last| last != ref_name) {
        reject!("the image has the ref {last}, and the artifact {ref_name}: build it without PREVIOUS");
    }
    Ok(())
}

/// The commits of the image whose indexes lie in `directory`, in their order.
///
/// # Errors
/// Rejected when an index is damaged; else when they cannot be read.
pub fn commits_of(directory: &Path) -> Result<Vec<Checksum>> {
    Ok(read_indexes(directory)?.values().filter_map(|index| index.commit).collect())
}

/// The indexes in a directory by their numbers.
fn read_indexes(directory: &Path) -> Result<BTreeMap<u32, Index>> {
    let reading = || format!("reading {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(e).with_context(reading),
    };
    let mut indexes = BTreeMap::new();
    for entry in entries {
        let path = entry.with_context(reading)?.path();
        let Some(number) = path.file_name().and_then(|name| name.to_str()).and_then(index::number) else { continue };
        let mut bytes = Vec::new();
        let file = File::open(&path).and_then(|file| file.take(index::MAX_SIZE + 1).read_to_end(&mut bytes));
        file.with_context(|| format!("reading {}", path.display()))?;
        let index = Index::parse(&bytes, number).with_context(|| format!("reading {}", path.display()))?;
        indexes.insert(number, index);
    }
    Ok(indexes)
}

/// What layer number `number` of an image holds, as its tar shows it; commit and objects are
/// compared with the index in it, and the digests with those that the image has for it.
///
/// # Errors
/// Rejected when it is damaged, hides what earlier layers hold, has objects of a
/// repository but no index that says so, or more than `budget` has room for.
pub fn scan(blob: impl Read, number: u32, expected: &Layer, budget: &Budget) -> Result<Index> {
    let mut found = Index::new(number);
    let mut files = BTreeMap::new();
    let mut own = None;
    walk(blob, Some(expected), |entry, content| {
        let path = entry.path;
        budget.take(path.len() as u64 + ENTRY)?;
        if entry.kind == EntryType::Directory {
            found.directories.push(path.to_owned());
        } else if entry.kind != EntryType::Regular {
            if path.starts_with("srv") || path.starts_with("usr/share/oscontainer") {
                reject!("its entry {path} is no file and no directory");
            }
        } else if let Some(number) =
            path.strip_prefix(DIRECTORY).and_then(|rest| index::number(rest.strip_prefix('/')?))
        {
            if own.is_some() || entry.size > index::MAX_SIZE {
                reject!("it has more than one index, or one that is too large");
            }
            budget.take(entry.size)?;
            let mut bytes = Vec::new();
            content.read_to_end(&mut bytes)?;
            own = Some(Index::parse(&bytes, number)?);
        } else if let Some(name) = object(path) {
            found.objects.insert(name, entry.size);
        } else {
            let mut content = Hashing::new(content)?;
            io::copy(&mut content, &mut io::sink())?;
            let digest = content.finish()?.0;
            let file = FileEntry { path: path.to_owned(), size: entry.size, digest, executable: entry.executable };
            files.insert(file.path.clone(), file);
        }
        Ok(())
    })?;
    found.files = files.into_values().collect();
    match own {
        None if found.objects.is_empty() => Ok(found),
        None => reject!("it has objects of a repository, but no index"),
        Some(own) if own.objects != found.objects => reject!("it has not the objects that its index says"),
        Some(own) => {
            (found.ref_name, found.commit) = (own.ref_name, own.commit);
            (found.dropped, found.restored) = (own.dropped, own.restored);
            Ok(found)
        }
    }
}

/// Copies the objects that are `wanted` into `spool`; gives the place and the size of each.
///
/// # Errors
/// Rejected when the layer is damaged.
pub fn extract(
    blob: impl Read,
    wanted: impl Fn(&ObjectName) -> bool,
    spool: &mut File,
) -> Result<Vec<(ObjectName, u64, u64)>> {
    let mut places = Vec::new();
    walk(blob, None, |entry, content| {
        if let Some(name) = object(entry.path).filter(|name| entry.kind == EntryType::Regular && wanted(name)) {
            let start = spool.stream_position()?;
            io::copy(content, spool)?;
            places.push((name, start, entry.size));
        }
        Ok(())
    })?;
    spool.flush()?;
    Ok(places)
}

/// The content of the file `path`.
///
/// # Errors
/// Rejected when the layer is damaged or has no such file.
pub fn file(blob: impl Read, path: &str) -> Result<Vec<u8>> {
    let mut found = None;
    walk(blob, None, |entry, content| {
        if entry.path == path && entry.kind == EntryType::Regular {
            if entry.size > index::MAX_FILE {
                reject!("it has {} bytes, the limit is {}", entry.size, index::MAX_FILE);
            }
            content.read_to_end(found.insert(Vec::new()))?;
        }
        Ok(())
    })?;
    found.with_context(|| format!("{path} is not there"))
}

/// The object at a path in the image; detached metadata is none.
fn object(path: &str) -> Option<ObjectName> {
    let name = ObjectName::from_path(path.strip_prefix(REPO)?.strip_prefix('/')?)?;
    (name.kind != Type::CommitMeta).then_some(name)
}

/// An entry of a layer's tar.
struct Entry<'a> {
    path: &'a str,
    kind: EntryType,
    size: u64,
    executable: bool,
}

/// Gives each entry of a layer and its content to `visit`. The digests are compared if they
/// are `expected`.
fn walk(
    blob: impl Read,
    expected: Option<&Layer>,
    mut visit: impl FnMut(&Entry<'_>, &mut dyn Read) -> Result<()>,
) -> Result<()> {
    let failed = Cell::new(false);
    // What reading the blob did not cause, its content did.
    let damaged = |error: io::Error| match failed.get() {
        true => error.into(),
        false => anyhow::Error::from(Rejected::new(format!("it is no tar with gzip, or is damaged: {error}"))),
    };
    let file = Hashing::new(Watched { input: blob, failed: &failed })?;
    let left = Cell::new(Some(MAX_HEADERS));
    let inflated = Limited { input: MultiGzDecoder::new(file), left: MAX_TAR };
    let tar = Headers { input: Hashing::new(inflated)?, left: &left };
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        left.set(None);
        let path = match std::str::from_utf8(&entry.path_bytes()) {
            Ok(path) => path.trim_start_matches("./").trim_matches('/').to_owned(),
            Err(_) => reject!("it has an entry whose name is not UTF-8"),
        };
        if path.split('/').any(|part| part == ".." || part.starts_with(".wh.")) {
            reject!("its entry {path} removes what earlier layers hold, or leads out of the image");
        }
        if !path.is_empty() {
            let executable = entry.header().mode().map_err(damaged)? & 0o111 != 0;
            let about = Entry { path: &path, kind: entry.header().entry_type(), size: entry.size(), executable };
            visit(&about, &mut entry).with_context(|| format!("reading {path}"))?;
        }
        io::copy(&mut entry, &mut io::sink()).map_err(damaged)?;
        left.set(Some(MAX_HEADERS));
    }
    let mut tar = archive.into_inner().input;
    io::copy(&mut tar, &mut io::sink()).map_err(damaged)?;
    let (diff_id, gzip) = tar.finish()?;
    let mut file = gzip.input.into_inner();
    io::copy(&mut file, &mut io::sink()).map_err(damaged)?;
    let (digest, _) = file.finish()?;
    match expected {
        Some(layer) if (layer.digest, layer.diff_id) != (digest, diff_id) => {
            reject!("its digests are {digest} and {diff_id}, the image says {} and {}", layer.digest, layer.diff_id)
        }
        _ => Ok(()),
    }
}

/// Bounds what is read before an entry.
struct Headers<'a, R> {
    input: R,
    /// How many bytes there may still be; nothing within an entry.
    left: &'a Cell<Option<u64>>,
}

impl<R: Read> Read for Headers<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        if let Some(left) = self.left.get() {
            let left = left.checked_sub(count as u64).ok_or_else(|| {
                io::Error::new(ErrorKind::InvalidData, "an entry's headers are larger than a mebibyte")
            })?;
            self.left.set(Some(left));
        }
        Ok(count)
    }
}

/// Bounds what a layer inflates to.
struct Limited<R> {
    input: R,
    left: u64,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        let left = self.left.checked_sub(count as u64);
        self.left = left.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "it inflates to more than 64 GiB"))?;
        Ok(count)
    }
}

/// Remembers that reading failed.
struct Watched<'a, R> {
    input: R,
    failed: &'a Cell<bool>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.input.read(buffer).inspect_err(|_| self.failed.set(true))
    }
}
