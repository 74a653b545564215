//! An image in an OCI image layout: a new directory, one that is there already, or a
//! tar archive of one. Nothing is visible until it is whole: a new directory and an
//! archive appear by one rename; into an existing layout blobs go first, each by a
//! rename, and then `index.json`.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use oci_spec::image::{ANNOTATION_REF_NAME, Descriptor, ImageIndex, ImageIndexBuilder, MediaType};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::tarball::{self, Kind};
use oscontainer_program::exit::Usage;
use oscontainer_program::staging::Staging;
use rustix::fs::{FlockOperation, flock};

use super::document;
use super::reference::{Reference, Transport};

/// The file that says that a directory is an OCI image layout, and its content
/// (OCI image specification, image-layout.md).
const LAYOUT_FILE: &str = "oci-layout";
const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// The layout's list of images.
const INDEX_FILE: &str = "index.json";
/// Where blobs lie, by the 64 hex digits of their digest.
const BLOBS: &str = "blobs/sha256";
/// The largest `index.json` that is read, in bytes: room for thousands of images.
const MAX_INDEX: u64 = 4 << 20;

/// An image that is being written.
pub struct Output {
    target: PathBuf,
    tag: Option<String>,
    staging: Staging,
    form: Form,
}

enum Form {
    /// A new layout, in the staging directory until the end.
    New { root: PathBuf },
    /// A layout that is there already.
    Existing,
    /// An archive, a file in the staging directory until the end.
    Archive { file: File, path: PathBuf },
}

impl Output {
    /// Begins an image at `reference`.
    ///
    /// # Errors
    /// [`Usage`] when something else lies there; else when it cannot be written.
    pub fn create(reference: &Reference) -> Result<Self> {
        let target = std::path::absolute(reference.path())?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(Usage(format!("--output {reference} names no directory that could be made")).into());
        };
        let (parent, prefix) = (parent.to_owned(), format!(".{}.oscontainer-", name.to_string_lossy()));
        let existing = match fs::read_dir(&target) {
            Ok(mut entries) => entries.next().is_some(),
            Err(e) if e.kind() == ErrorKind::NotFound => false,
            Err(e) if e.kind() == ErrorKind::NotADirectory => reference.transport() == Transport::Layout,
            Err(e) => return Err(e).with_context(|| format!("reading {}", target.display())),
        };
        let (staging, form) = match reference.transport() {
            Transport::Layout if existing => {
                if !target.join(LAYOUT_FILE).is_file() {
                    return Err(Usage(format!(
                        "{} is there and is no OCI image layout: name a new directory",
                        target.display()
                    ))
                    .into());
                }
                (Staging::new(&target, ".blobs.oscontainer-")?, Form::Existing)
            }
            Transport::Layout => {
                let staging = Staging::new(&parent, &prefix)?;
                let root = staging.path().join("layout");
                fs::create_dir_all(root.join(BLOBS)).with_context(|| format!("making {}", root.display()))?;
                write_file(&root.join(LAYOUT_FILE), LAYOUT)?;
                (staging, Form::New { root })
            }
            Transport::Archive => {
                if target.is_dir() {
                    return Err(Usage(format!("{} is a directory: name a file", target.display())).into());
                }
                let staging = Staging::new(&parent, &prefix)?;
                let path = staging.path().join("archive.tar");
                let mut file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
                for directory in ["blobs", BLOBS] {
                    file.write_all(&tarball::header(directory, Kind::Directory))?;
                }
                (staging, Form::Archive { file, path })
            }
        };
        Ok(Self { target, tag: reference.tag().map(str::to_owned), staging, form })
    }

    /// Stores a blob of exactly `size` bytes, which `write` writes and whose digest
    /// it gives.
    ///
    /// # Errors
    /// Those of `write`, and when the blob cannot be stored.
    pub fn blob(&mut self, size: u64, write: impl FnOnce(&mut File) -> Result<Digest>) -> Result<Digest> {
        let root = match &mut self.form {
            Form::Archive { file, .. } => return archived(file, size, write),
            Form::New { root } => root.clone(),
            Form::Existing => self.target.clone(),
        };
        let path = self.staging.path().join("blob");
        let writing = || format!("writing {}", path.display());
        let mut file = File::create(&path).with_context(writing)?;
        let digest = write(&mut file).with_context(writing)?;
        ensure!(file.metadata()?.len() == size, "a blob has another size than its {size} bytes");
        file.sync_all().with_context(writing)?;
        let blobs = root.join(BLOBS);
        fs::create_dir_all(&blobs).with_context(|| format!("making {}", blobs.display()))?;
        fs::rename(&path, blobs.join(digest.hex())).with_context(|| format!("storing {digest}"))?;
        Ok(digest)
    }

    /// Names the image whose manifest `manifest` describes, and makes all visible.
    ///
    /// # Errors
    /// When the result cannot be written.
    pub fn finish(self, mut manifest: Descriptor) -> Result<()> {
        if let Some(tag) = &self.tag {
            manifest.set_annotations(Some([(ANNOTATION_REF_NAME.to_owned(), tag.clone())].into()));
        }
        let target = self.target.display().to_string();
        match self.form {
            Form::New { root } => {
                write_file(&root.join(INDEX_FILE), &document::bytes(&index(vec![manifest])?)?)?;
                for directory in [root.join(BLOBS), root.join("blobs"), root.clone()] {
                    sync_directory(&directory)?;
                }
                fs::rename(&root, &self.target).with_context(|| format!("renaming the layout to {target}"))?;
            }
            Form::Existing => {
                // Other writers of the same layout wait here, so that no entry is lost.
                let lock = File::open(&self.target)?;
                flock(&lock, FlockOperation::LockExclusive).with_context(|| format!("locking {target}"))?;
                sync_directory(&self.target.join(BLOBS))?;
                let mut manifests = read_index(&self.target.join(INDEX_FILE))?;
                let name = |entry: &Descriptor| {
                    entry.annotations().as_ref().and_then(|all| all.get(ANNOTATION_REF_NAME)).cloned()
                };
                manifests.retain(|entry| name(entry) != self.tag);
                manifests.push(manifest);
                let path = self.staging.path().join(INDEX_FILE);
                write_file(&path, &document::bytes(&index(manifests)?)?)?;
                fs::rename(&path, self.target.join(INDEX_FILE))
                    .with_context(|| format!("writing {target}/{INDEX_FILE}"))?;
                sync_directory(&self.target)?;
            }
            Form::Archive { mut file, path } => {
                for (name, content) in [(LAYOUT_FILE, LAYOUT), (INDEX_FILE, &document::bytes(&index(vec![manifest])?)?)]
                {
                    file.write_all(&tarball::header(name, Kind::File(content.len() as u64)))?;
                    file.write_all(content)?;
                    file.write_all(&vec![0; tarball::padding(content.len() as u64)])?;
                }
                file.write_all(&tarball::END)?;
                file.sync_all().with_context(|| format!("writing {}", path.display()))?;
                fs::rename(&path, &self.target).with_context(|| format!("renaming the archive to {target}"))?;
            }
        }
        if let Some(parent) = self.target.parent() {
            sync_directory(parent)?;
        }
        Ok(())
    }
}

/// Appends a blob to an archive. Its name, the digest, is known only afterwards: the
/// header, whose size does not depend on it, is written last.
fn archived(file: &mut File, size: u64, write: impl FnOnce(&mut File) -> Result<Digest>) -> Result<Digest> {
    let header = |digest: Digest| tarball::header(&format!("{BLOBS}/{}", digest.hex()), Kind::File(size));
    let start = file.stream_position()?;
    let room = header(Digest::from([0; 32])).len() as u64;
    file.seek(SeekFrom::Start(start + room))?;
    let digest = write(file)?;
    ensure!(file.stream_position()? == start + room + size, "a blob has another size than its {size} bytes");
    file.write_all(&vec![0; tarball::padding(size)])?;
    file.write_all_at(&header(digest), start)?;
    Ok(digest)
}

fn index(manifests: Vec<Descriptor>) -> Result<ImageIndex> {
    Ok(ImageIndexBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageIndex)
        .manifests(manifests)
        .build()?)
}

fn read_index(path: &Path) -> Result<Vec<Descriptor>> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_INDEX + 1).read_to_end(&mut text))
        .with_context(|| format!("reading {}", path.display()))?;
    if text.len() as u64 > MAX_INDEX {
        oscontainer_program::reject!("{} is larger than {MAX_INDEX} bytes", path.display());
    }
    match serde_json::from_slice::<ImageIndex>(&text) {
        Ok(index) => Ok(index.manifests().clone()),
        Err(e) => oscontainer_program::reject!("{} is no OCI image index: {e}", path.display()),
    }
}

fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    let writing = || format!("writing {}", path.display());
    let mut file = File::create(path).with_context(writing)?;
    file.write_all(content).with_context(writing)?;
    file.sync_all().with_context(writing)
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).with_context(|| format!("syncing {}", path.display()))
}
