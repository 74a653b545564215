//! A layer's own index: its first file, small, that says what the layer holds. Who
//! has the indexes of an image knows every object in it, in which order the commits
//! came and what each of them reaches, without reading the layers: a ranged GET of
//! each layer's start is enough. The format is in docs/image.md.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow};
use oscontainer_artifact::digest::{Checksum, Digest};
use oscontainer_artifact::object::{ObjectName, Type};
use oscontainer_artifact::protocol::valid_ref;
use oscontainer_artifact::tarball::{self, END, Kind};
use oscontainer_program::reject;
use serde::{Deserialize, Serialize};

/// The media type in every index.
pub const MEDIA_TYPE: &str = "application/vnd.oscontainer.layer.v1+json";
/// Where the indexes lie in the image, one for each layer.
pub const DIRECTORY: &str = "usr/share/oscontainer/layers";
/// The repository in the image.
pub const REPO: &str = "srv/repo";
/// The largest index that is read, and the most that an image's may have together, in bytes: room for three
/// million objects.
pub const MAX_SIZE: u64 = 256 << 20;
/// The largest file that is read into memory, in bytes: detached metadata, which libostree takes up to twice that
/// size (`OSTREE_MAX_METADATA_SIZE`).
pub const MAX_FILE: u64 = 64 << 20;
/// The longest path, in bytes: a ref of 255 bytes below the repository, and some room.
const MAX_PATH: usize = 512;

/// What a layer holds, in the order of its entries: the directories above the index,
/// the index, the other directories, the objects, the other files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Index {
    /// Always 1.
    schema_version: u32,
    /// Always [`MEDIA_TYPE`].
    media_type: String,
    /// The layer's place in the log, from 0.
    pub layer: u32,
    /// The ref of the commit that the layer brings; a layer may bring only the server.
    #[serde(rename = "ref", skip_serializing_if = "Option::is_none")]
    pub ref_name: Option<String>,
    /// What the ref names from this layer on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<Checksum>,
    /// Directories that no earlier layer has, without a slash at the end.
    pub directories: Vec<String>,
    /// What the commit reaches and no earlier layer has, and sizes in bytes.
    pub objects: BTreeMap<ObjectName, u64>,
    /// All other files.
    pub files: Vec<FileEntry>,
    /// Objects of earlier layers that the commit before reaches, and this one does not. Sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dropped: Vec<ObjectName>,
    /// Objects of earlier layers that this commit reaches, and the one before does not. Sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restored: Vec<ObjectName>,
}

/// A file that is no object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its path in the image.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Of its content.
    pub digest: Digest,
    /// Whether its mode is 0755, not 0644.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
}

/// An entry of a layer's tar.
#[derive(Debug, Clone, Copy)]
pub enum Entry<'a> {
    /// A directory.
    Directory(&'a str),
    /// The index itself, and its size in bytes.
    Index(u64),
    /// An object and its size in bytes.
    Object(&'a ObjectName, u64),
    /// Another file.
    File(&'a FileEntry),
}

impl Entry<'_> {
    /// Bytes of its content.
    pub fn size(&self) -> u64 {
        match self {
            Self::Directory(_) => 0,
            Self::Index(size) | Self::Object(_, size) => *size,
            Self::File(file) => file.size,
        }
    }
}

impl Index {
    /// The index of an empty layer.
    pub fn new(layer: u32) -> Self {
        Self {
            schema_version: 1,
            media_type: MEDIA_TYPE.to_owned(),
            layer,
            ref_name: None,
            commit: None,
            directories: Vec::new(),
            objects: BTreeMap::new(),
            files: Vec::new(),
            dropped: Vec::new(),
            restored: Vec::new(),
        }
    }

    /// Reads the index of layer number `layer`; nothing but what [`Self::to_bytes`]
    /// writes is one.
    ///
    /// # Errors
    /// Rejected, with the reason.
    pub fn parse(bytes: &[u8], layer: u32) -> Result<Self> {
        let index: Self = match serde_json::from_slice(bytes) {
            Ok(index) => index,
            Err(e) => reject!("its index cannot be read: {e}"),
        };
        if index.schema_version != 1 || index.media_type != MEDIA_TYPE {
            reject!("its index is of version {} and type {:?}", index.schema_version, index.media_type);
        }
        if index.layer != layer {
            reject!("its index says that it is layer {}", index.layer);
        }
        if index.ref_name.is_some() != index.commit.is_some() {
            reject!("its index names only one of ref and commit");
        }
        if let Some(name) = index.ref_name.as_ref().filter(|name| !valid_ref(name)) {
            reject!("its index has the ref {name:?}");
        }
        let own = index.path();
        let mut seen = HashSet::new();
        for path in index.directories.iter().chain(index.files.iter().map(|file| &file.path)) {
            if !valid_path(path) || *path == own || !seen.insert(path) {
                reject!("its index has the path {path:?}");
            }
        }
        if let Some(name) = index.objects.keys().find(|name| name.kind == Type::CommitMeta) {
            reject!("its index has {name} among the objects");
        }
        if !index.dropped.is_sorted() || !index.restored.is_sorted() || index.to_bytes()? != bytes {
            reject!("its index is not in canonical form");
        }
        Ok(index)
    }

    /// Its path in the image. Every layer has its own, for a later layer's files
    /// would hide an earlier one's of the same name.
    pub fn path(&self) -> String {
        path(self.layer)
    }

    /// Adds `path` and every directory above it that is not `known` from earlier layers.
    pub fn add_directory(&mut self, known: &HashSet<String>, path: &str) {
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let directory = &path[..end];
            if !known.contains(directory) && !self.directories.iter().any(|present| present == directory) {
                self.directories.push(directory.to_owned());
            }
        }
    }

    /// The canonical bytes: no spaces, the fields in their order, a newline at the end.
    ///
    /// # Errors
    /// None that can happen: all keys are strings.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(self).context("writing a layer's index")?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// The layer's entries in their order, where `own` bytes are the index itself.
    pub fn entries(&self, own: u64) -> impl Iterator<Item = Entry<'_>> {
        let above = |path: &&String| DIRECTORY == *path || DIRECTORY.starts_with(&format!("{path}/"));
        let directories = |wanted: bool| {
            let chosen = self.directories.iter().filter(move |path| above(path) == wanted);
            chosen.map(|path| Entry::Directory(path))
        };
        directories(true)
            .chain([Entry::Index(own)])
            .chain(directories(false))
            .chain(self.objects.iter().map(|(name, size)| Entry::Object(name, *size)))
            .chain(self.files.iter().map(Entry::File))
    }

    /// The path of `entry` in the image.
    pub fn path_of(&self, entry: Entry<'_>) -> String {
        match entry {
            Entry::Directory(path) => path.to_owned(),
            Entry::Index(_) => self.path(),
            Entry::Object(name, _) => format!("{REPO}/{}", name.path()),
            Entry::File(file) => file.path.clone(),
        }
    }

    /// The one header of `entry` in this layer.
    pub fn header(&self, entry: Entry<'_>) -> Vec<u8> {
        let path = self.path_of(entry);
        match entry {
            Entry::Directory(_) => tarball::header(&path, Kind::Directory),
            Entry::File(file) if file.executable => tarball::executable(&path, file.size),
            _ => tarball::header(&path, Kind::File(entry.size())),
        }
    }

    /// Bytes of that header.
    pub fn header_size(&self, entry: Entry<'_>) -> usize {
        match entry {
            // Its path always fits.
            Entry::Object(_, size) => tarball::header_size("", size),
            _ => self.header(entry).len(),
        }
    }

    /// The exact size of the layer's tar, where `own` bytes are the index itself.
    ///
    /// # Errors
    /// Rejected when the sizes in it are beyond all measure.
    pub fn tar_size(&self, own: u64) -> Result<u64> {
        let add = |sum: u64, entry: Entry<'_>| {
            let size = entry.size();
            sum.checked_add(size)?.checked_add((self.header_size(entry) + tarball::padding(size)) as u64)
        };
        let sum = self.entries(own).try_fold(END.len() as u64, add).filter(|sum| *sum < 1 << 60);
        sum.ok_or_else(|| anyhow!(oscontainer_artifact::Rejected::new("its index has impossible sizes")))
    }
}

/// What is left of the bytes that the indexes of an image may have together; several threads take of it.
pub struct Budget(AtomicU64);

impl Budget {
    /// All of it.
    pub fn new() -> Self {
        Self(AtomicU64::new(MAX_SIZE))
    }

    /// Takes `bytes` of it.
    ///
    /// # Errors
    /// Rejected when no so many are left.
    pub fn take(&self, bytes: u64) -> Result<()> {
        match self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)) {
            Ok(_) => Ok(()),
            Err(_) => reject!("its layers' indexes are larger than the limit of {MAX_SIZE} bytes"),
        }
    }
}

/// The path of the index of layer number `layer`.
pub fn path(layer: u32) -> String {
    format!("{DIRECTORY}/{}", file_name(layer))
}

/// The name of the index of layer number `layer`.
pub fn file_name(layer: u32) -> String {
    format!("{layer:04}.json")
}

/// The layer whose index has this name.
pub fn number(name: &str) -> Option<u32> {
    let number = name.strip_suffix(".json")?.parse().ok()?;
    (file_name(number) == name).then_some(number)
}

fn valid_path(path: &str) -> bool {
    path.len() <= MAX_PATH
        && path.bytes().all(|b| b.is_ascii_graphic())
        // Names that start so remove what earlier layers hold (OCI image specification, "Whiteouts").
        && path.split('/').all(|component| !matches!(component, "" | "." | "..") && !component.starts_with(".wh."))
}
