//! Writes an image into an OCI image layout: a new directory, one that is there already, or a
//! tar archive of one. Nothing is visible until it is whole: a new directory and an
//! archive appear by one rename; into an existing layout blobs go first, each by a
//! rename, and then `index.json`.

use std::fs::{self, File};
use std::io::{self, ErrorKind, IoSlice, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail, ensure};
use oci_spec::image::{ANNOTATION_REF_NAME, Descriptor, MediaType};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::tarball::{self, Kind};
use oscontainer_program::exit::Usage;
use oscontainer_program::staging::{Staging, sync_dir};
use rustix::fs::{FlockOperation, flock};

use super::document;
use super::input::{MAX_DOCUMENT, digest};
use super::layer::Layer;
use super::layout::{self, BLOBS, INDEX_FILE, LAYOUT, LAYOUT_FILE, Layout};
use super::output::WriteBlob;
use super::reference::Reference;

/// Bytes that may wait to be written to the disk before this begins in the background.
const SYNC: u64 = 16 << 20;

/// An image that is being written.
pub struct LayoutOutput {
    target: PathBuf,
    tag: Option<String>,
    staging: Staging,
    form: Form,
    /// The lock of a layout that is there already, once it is taken.
    lock: Option<File>,
}

enum Form {
    /// A new layout, in the staging directory until the end.
    New { root: PathBuf },
    /// A layout that is there already.
    Existing,
    /// An archive, a file in the staging directory until the end.
    Archive { file: File, path: PathBuf },
}

impl LayoutOutput {
    /// Begins an image at `reference`.
    ///
    /// # Errors
    /// [`Usage`] when something else lies there; else when it cannot be written.
    pub fn create(reference: &Reference) -> Result<Self> {
        let (path, tag, archive) = match reference {
            Reference::Layout { path, tag } => (path, tag, false),
            Reference::Archive { path, tag } => (path, tag, true),
            Reference::Registry(_) => bail!("{reference} is no layout"),
        };
        let target = std::path::absolute(path)?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(Usage(format!("--output {reference} names no directory that could be made")).into());
        };
        let (parent, prefix) = (parent.to_owned(), format!(".{}.oscontainer-", name.to_string_lossy()));
        let existing = match fs::read_dir(&target) {
            Ok(mut entries) => entries.next().is_some(),
            Err(e) if e.kind() == ErrorKind::NotFound => false,
            Err(e) if e.kind() == ErrorKind::NotADirectory => !archive,
            Err(e) => return Err(e).with_context(|| format!("reading {}", target.display())),
        };
        let (staging, form) = match archive {
            false if existing => {
                if !target.join(LAYOUT_FILE).is_file() {
                    return Err(Usage(format!(
                        "{} is there and is no OCI image layout: name a new directory",
                        target.display()
                    ))
                    .into());
                }
                (Staging::new(&target, ".blobs.oscontainer-")?, Form::Existing)
            }
            false => {
                let staging = Staging::new(&parent, &prefix)?;
                let root = staging.path().join("layout");
                fs::create_dir_all(root.join(BLOBS)).with_context(|| format!("making {}", root.display()))?;
                write_file(&root.join(LAYOUT_FILE), LAYOUT)?;
                (staging, Form::New { root })
            }
            true => {
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
        Ok(Self { target, tag: tag.clone(), staging, form, lock: None })
    }

    /// Stores a blob of exactly `size` bytes, which `write` writes and whose digest
    /// it gives.
    ///
    /// # Errors
    /// Those of `write`, and when the blob cannot be stored.
    pub fn blob(&mut self, size: u64, write: WriteBlob<'_>) -> Result<Digest> {
        let root = match &mut self.form {
            Form::Archive { file, .. } => return archived(file, size, write),
            Form::New { root } => root.clone(),
            Form::Existing => self.target.clone(),
        };
        let path = self.staging.path().join("blob");
        let writing = || format!("writing {}", path.display());
        let file = File::create(&path).with_context(writing)?;
        let mut syncing = Syncing::new(&file)?;
        let digest = write(&mut syncing).with_context(writing)?;
        syncing.finish().with_context(writing)?;
        ensure!(file.metadata()?.len() == size, "a blob has another size than its {size} bytes");
        file.sync_all().with_context(writing)?;
        let blobs = root.join(BLOBS);
        fs::create_dir_all(&blobs).with_context(|| format!("making {}", blobs.display()))?;
        fs::rename(&path, blobs.join(digest.hex())).with_context(|| format!("storing {digest}"))?;
        Ok(digest)
    }

    /// Whether a layer is there already.
    pub fn has(&self, layer: &Layer) -> bool {
        let path = self.target.join(BLOBS).join(layer.digest.hex());
        let found = path.metadata().is_ok_and(|found| found.is_file() && found.len() == layer.size);
        matches!(self.form, Form::Existing) && found
    }

    /// The manifest or image index that has the tag already, if there is one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn named(&self) -> Result<Option<Vec<u8>>> {
        if !matches!(self.form, Form::Existing) {
            return Ok(None);
        }
        let layout = Layout::directory(&self.target)?;
        let named = layout.images()?.into_iter().find(|image| layout::name(image) == self.tag.as_deref());
        let Some(named) = named else { return Ok(None) };
        let mut bytes = Vec::new();
        layout.blob(&digest(&named)?, named.size(), 0)?.take(MAX_DOCUMENT).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    /// Adds the image that `manifest` describes to the image index that has the tag already, if there
    /// is one; gives what describes the index.
    ///
    /// # Errors
    /// [`Usage`] when the tag names something else; else when the index cannot be written.
    pub fn add_to_index(&mut self, manifest: Descriptor) -> Result<Descriptor> {
        if matches!(self.form, Form::Existing) {
            // Other writers of the same layout wait here, to the end of this one.
            self.lock()?;
        }
        let index = document::add_to_index(self.named()?.as_deref(), manifest)?;
        let digest = Digest::of(&index);
        self.blob(index.len() as u64, &mut |out| {
            out.write_all(&index)?;
            Ok(digest)
        })?;
        document::descriptor(MediaType::ImageIndex, index.len() as u64, digest)
    }

    fn lock(&mut self) -> Result<()> {
        if self.lock.is_none() {
            let locking = || format!("locking {}", self.target.display());
            let lock = File::open(&self.target).with_context(locking)?;
            flock(&lock, FlockOperation::LockExclusive).with_context(locking)?;
            self.lock = Some(lock);
        }
        Ok(())
    }

    /// Names the image or image index that `manifest` describes, and makes all visible.
    ///
    /// # Errors
    /// When the result cannot be written.
    pub fn finish(mut self, mut manifest: Descriptor) -> Result<()> {
        if matches!(self.form, Form::Existing) {
            // Other writers of the same layout wait here, so that no entry is lost.
            self.lock()?;
        }
        if let Some(tag) = &self.tag {
            manifest.set_annotations(Some([(ANNOTATION_REF_NAME.to_owned(), tag.clone())].into()));
        }
        let target = self.target.display().to_string();
        match self.form {
            Form::New { root } => {
                write_file(&root.join(INDEX_FILE), &document::bytes(&document::index(vec![manifest])?)?)?;
                for directory in [root.join(BLOBS), root.join("blobs"), root.clone()] {
                    sync_dir(&directory)?;
                }
                fs::rename(&root, &self.target).with_context(|| format!("renaming the layout to {target}"))?;
            }
            Form::Existing => {
                sync_dir(&self.target.join(BLOBS))?;
                let reading = || format!("reading {target}");
                let mut manifests = Layout::directory(&self.target)?.images().with_context(reading)?;
                manifests.retain(|entry| layout::name(entry) != self.tag.as_deref());
                manifests.push(manifest);
                let path = self.staging.path().join(INDEX_FILE);
                write_file(&path, &document::bytes(&document::index(manifests)?)?)?;
                fs::rename(&path, self.target.join(INDEX_FILE))
                    .with_context(|| format!("writing {target}/{INDEX_FILE}"))?;
                sync_dir(&self.target)?;
            }
            Form::Archive { mut file, path } => {
                for (name, content) in
                    [(LAYOUT_FILE, LAYOUT), (INDEX_FILE, &document::bytes(&document::index(vec![manifest])?)?)]
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
            sync_dir(parent)?;
        }
        Ok(())
    }
}

/// Has a file written to the disk while more of it comes, so that little is left at the end.
struct Syncing {
    file: File,
    unsynced: u64,
    ask: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Syncing {
    fn new(file: &File) -> Result<Self> {
        let (ask, asked) = sync_channel(0);
        let synced = file.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("sync".into())
            .spawn(move || asked.into_iter().try_for_each(|()| synced.sync_data()))?;
        Ok(Self { file: file.try_clone()?, unsynced: 0, ask, thread })
    }

    fn finish(self) -> io::Result<()> {
        drop(self.ask);
        self.thread.join().map_err(|_| io::Error::other("the thread that syncs panicked"))?
    }
}

impl Write for Syncing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let count = self.file.write_vectored(parts)?;
        self.unsynced += count as u64;
        // While the thread is busy it is asked again later.
        if self.unsynced >= SYNC && self.ask.try_send(()).is_ok() {
            self.unsynced = 0;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Appends a blob to an archive. Its name, the digest, is known only afterwards: the
/// header, whose size does not depend on it, is written last.
fn archived(file: &mut File, size: u64, write: WriteBlob<'_>) -> Result<Digest> {
    let header = |digest: Digest| tarball::header(&format!("{BLOBS}/{}", digest.hex()), Kind::File(size));
    let start = file.stream_position()?;
    let room = header(Digest::from([0; 32])).len() as u64;
    file.seek(SeekFrom::Start(start + room))?;
    let mut syncing = Syncing::new(file)?;
    let digest = write(&mut syncing)?;
    syncing.finish()?;
    ensure!(file.stream_position()? == start + room + size, "a blob has another size than its {size} bytes");
    file.write_all(&vec![0; tarball::padding(size)])?;
    file.write_all_at(&header(digest), start)?;
    Ok(digest)
}

fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    let writing = || format!("writing {}", path.display());
    let mut file = File::create(path).with_context(writing)?;
    file.write_all(content).with_context(writing)?;
    file.sync_all().with_context(writing)
}
