//! The OCI image layout, as a directory or as one tar file (OCI image
//! specification, image-layout.md): names, its list of images, and reading from it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oci_spec::image::{ANNOTATION_REF_NAME, Descriptor, ImageIndex};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::exit::Usage;
use oscontainer_program::reject;

use super::section::Section;

/// The file that says that a directory is an OCI image layout, and its content.
pub const LAYOUT_FILE: &str = "oci-layout";
pub const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// The layout's list of images.
pub const INDEX_FILE: &str = "index.json";
/// Where blobs lie, by the 64 hex digits of their digest.
pub const BLOBS: &str = "blobs/sha256";
/// The largest `index.json` that is read, in bytes: room for thousands of images.
const MAX_INDEX: u64 = 4 << 20;
/// The most entries of an archive that are read.
const MAX_ENTRIES: usize = 100_000;

/// A layout that is read.
pub enum Layout {
    /// A directory.
    Directory(PathBuf),
    /// An archive: its files' positions and sizes.
    Archive(File, HashMap<String, (u64, u64)>),
}

impl Layout {
    /// Opens the layout in the directory `path`.
    ///
    /// # Errors
    /// [`Usage`] when there is none.
    pub fn directory(path: &Path) -> Result<Self> {
        if !path.join(LAYOUT_FILE).is_file() {
            return Err(Usage(format!("{} is no OCI image layout", path.display())).into());
        }
        Ok(Self::Directory(path.to_owned()))
    }

    /// Opens the archive `path`.
    ///
    /// # Errors
    /// [`Usage`] when there is none; rejected when it is no archive of a layout.
    pub fn archive(path: &Path) -> Result<Self> {
        let shown = path.display();
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(Usage(format!("there is no file {shown}")).into()),
            Err(e) => return Err(e).with_context(|| format!("opening {shown}")),
        };
        let mut files = HashMap::new();
        let mut archive = tar::Archive::new(file.try_clone()?);
        for entry in archive.entries_with_seek()?.take(MAX_ENTRIES) {
            let (path, place) = match entry.and_then(|entry| {
                let path = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
                Ok((path, (entry.raw_file_position(), entry.size())))
            }) {
                Ok(entry) => entry,
                Err(e) => reject!("{shown} is no tar archive, or is damaged: {e}"),
            };
            files.insert(path, place);
        }
        if !files.contains_key(LAYOUT_FILE) {
            reject!("{shown} is no archive of an OCI image layout");
        }
        Ok(Self::Archive(file, files))
    }

    /// Opens a blob of `size` bytes at its byte `from`.
    ///
    /// # Errors
    /// Rejected when it is missing or has another size.
    pub fn blob(&self, digest: &Digest, size: u64, from: u64) -> Result<Box<dyn Read + '_>> {
        let name = format!("{BLOBS}/{}", digest.hex());
        let Some((reader, found)) = self.open(&name, from)? else { reject!("its blob {digest} is missing") };
        if found != size {
            reject!("its blob {digest} has {found} bytes, not {size}");
        }
        Ok(reader)
    }

    /// The images that the layout names.
    ///
    /// # Errors
    /// Rejected when the list is missing or damaged.
    pub fn images(&self) -> Result<Vec<Descriptor>> {
        let Some((reader, _)) = self.open(INDEX_FILE, 0)? else { reject!("it has no {INDEX_FILE}") };
        let mut bytes = Vec::new();
        reader.take(MAX_INDEX + 1).read_to_end(&mut bytes).with_context(|| format!("reading {INDEX_FILE}"))?;
        if bytes.len() as u64 > MAX_INDEX {
            reject!("its {INDEX_FILE} is larger than {MAX_INDEX} bytes");
        }
        match serde_json::from_slice::<ImageIndex>(&bytes) {
            Ok(index) => Ok(index.manifests().clone()),
            Err(e) => reject!("its {INDEX_FILE} is no OCI image index: {e}"),
        }
    }

    /// A file of the layout from its byte `from` on, and its whole size.
    fn open(&self, name: &str, from: u64) -> Result<Option<(Box<dyn Read + '_>, u64)>> {
        match self {
            Self::Directory(root) => {
                let path = root.join(name);
                let mut file = match File::open(&path) {
                    Ok(file) => file,
                    Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
                    Err(e) => return Err(e).with_context(|| format!("opening {}", path.display())),
                };
                let size = file.metadata().with_context(|| format!("reading {}", path.display()))?.len();
                std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(from))?;
                Ok(Some((Box::new(file), size)))
            }
            Self::Archive(file, files) => Ok(files.get(name).map(|(start, size)| {
                let section = Section::new(file, start.saturating_add(from), size.saturating_sub(from));
                (Box::new(section) as Box<dyn Read>, *size)
            })),
        }
    }
}

/// The name of an image in a layout, where it has one.
pub fn name(image: &Descriptor) -> Option<&str> {
    image.annotations().as_ref()?.get(ANNOTATION_REF_NAME).map(String::as_str)
}

/// The image named `tag`, or the only one, or the only one without a name.
///
/// # Errors
/// [`Usage`] when there is none.
pub fn choose(images: Vec<Descriptor>, tag: Option<&str>) -> Result<Descriptor> {
    let known: Vec<_> = images.iter().map(|image| name(image).unwrap_or("(no name)").to_owned()).collect();
    let mut chosen: Vec<_> = match tag {
        None if images.len() == 1 => images,
        _ => images.into_iter().filter(|image| name(image) == tag).collect(),
    };
    match (chosen.pop(), chosen.is_empty()) {
        (Some(image), true) => Ok(image),
        _ => Err(Usage(format!(
            "it has not exactly one image {}; it has: {}",
            tag.unwrap_or("without a name"),
            known.join(", ")
        ))
        .into()),
    }
}
