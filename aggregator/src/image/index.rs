//! A layer's own index: its first file, small, that says what the layer holds. Who
//! has the indexes of an image knows every object in it and in which order the
//! commits came, without reading the layers: a ranged GET of each layer's start is
//! enough. The format is in docs/image.md.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::tarball::{self, END, Kind};
use serde::{Deserialize, Serialize};

/// The media type in every index.
pub const MEDIA_TYPE: &str = "application/vnd.oscontainer.layer.v1+json";
/// Where the indexes lie in the image, one for each layer.
pub const DIRECTORY: &str = "usr/share/oscontainer/layers";
/// The repository in the image.
pub const REPO: &str = "srv/repo";

/// What a layer holds, in the order of its entries: the directories above the index,
/// the index, the other directories, the objects, the other files.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Index {
    /// Always 1.
    schema_version: u32,
    /// Always [`MEDIA_TYPE`].
    media_type: String,
    /// The layer's place in the log, from 0.
    pub layer: u32,
    /// The ref and the commit that the layer brings; a layer may bring only the server.
    #[serde(flatten)]
    pub brings: Option<Brings>,
    /// Directories that no earlier layer has, without a slash at the end.
    pub directories: Vec<String>,
    /// What the commit reaches and no earlier layer has: names as in
    /// `objects/`, without the slash, and sizes in bytes.
    pub objects: BTreeMap<String, u64>,
    /// All other files.
    pub files: Vec<FileEntry>,
}

/// The ref and the commit of a layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Brings {
    /// The ref.
    #[serde(rename = "ref")]
    pub ref_name: String,
    /// What it names from this layer on.
    pub commit: Checksum,
}

/// A file that is no object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its path in the image.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Whether its mode is 0755, not 0644.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
}

impl Index {
    /// The index of an empty layer.
    pub fn new(layer: u32, brings: Option<Brings>) -> Self {
        Self {
            schema_version: 1,
            media_type: MEDIA_TYPE.to_owned(),
            layer,
            brings,
            directories: Vec::new(),
            objects: BTreeMap::new(),
            files: Vec::new(),
        }
    }

    /// Its path in the image. Every layer has its own, for a later layer's files
    /// would hide an earlier one's of the same name.
    pub fn path(&self) -> String {
        format!("{DIRECTORY}/{:04}.json", self.layer)
    }

    /// Adds `path` and every directory above it that `earlier` layers and this one lack.
    pub fn add_directory(&mut self, earlier: &[Index], path: &str) {
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let directory = &path[..end];
            let present = |index: &Index| index.directories.iter().any(|known| known == directory);
            if !present(self) && !earlier.iter().any(present) {
                self.directories.push(directory.to_owned());
            }
        }
    }

    /// The directories that come before the index, and those that come after it.
    pub fn directories(&self) -> (impl Iterator<Item = &str>, impl Iterator<Item = &str>) {
        let above = |directory: &&str| DIRECTORY == *directory || DIRECTORY.starts_with(&format!("{directory}/"));
        let all = || self.directories.iter().map(String::as_str);
        (all().filter(above), all().filter(move |directory| !above(directory)))
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

    /// The exact size of the layer's tar, where `own` bytes are the index itself.
    pub fn tar_size(&self, own: u64) -> u64 {
        let file = |path: &str, size: u64| {
            tarball::header(path, Kind::File(size)).len() as u64 + size + tarball::padding(size) as u64
        };
        let directories = self.directories.iter().map(|path| tarball::header(path, Kind::Directory).len() as u64);
        let objects = self.objects.iter().map(|(name, size)| file(&object_path(name), *size));
        let files = self.files.iter().map(|entry| file(&entry.path, entry.size));
        file(&self.path(), own) + directories.chain(objects).chain(files).sum::<u64>() + END.len() as u64
    }
}

/// Where the object `name` (`CHECKSUM.TYPE`) lies in the image.
pub fn object_path(name: &str) -> String {
    format!("{REPO}/{}", object_in_repo(name))
}

/// Where the object `name` (`CHECKSUM.TYPE`) lies in a repository.
pub fn object_in_repo(name: &str) -> String {
    let (directory, rest) = name.split_at(2);
    format!("objects/{directory}/{rest}")
}
