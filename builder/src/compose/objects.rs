//! A tree's content as objects of an archive-mode repository, on all cores. Each file
//! is hashed, and deflated only if the repository lacks its object. The names are
//! libostree's; the deflate streams are smaller than zlib's at the same level.
//!
//!     tree ─▶ walk (owners, labels) ─▶ [files, largest first] ─▶ hash, deflate ─▶ staging ─▶ objects

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError, mpsc};
use std::thread;

use anyhow::{Context, Result, ensure};
use flate2::{Compress, Compression, FlushCompress, Status};
use libdeflater::{CompressionLvl, Compressor};
use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::object::{FileHeader, ObjectName, Type};
use oscontainer_program::progress::Progress;
use oscontainer_program::staging::Staging;
use oscontainer_program::{reject, stop};
use ostree::glib::prelude::ToVariant;
use ostree::{MutableTree, Repo, SePolicy, gio};
use rustix::fs::{lgetxattr, lgetxattr_query, llistxattr, llistxattr_query, lremovexattr, syncfs};
use rustix::io::Errno;

/// zlib's default, at which libostree deflates.
const LEVEL: i32 = 6;
/// Files up to this size, in bytes, are deflated as a whole, which is faster.
const WHOLE: u64 = 32 << 20;
/// Larger ones are deflated in parts of this many bytes on all cores. What the parts are must not depend on the
/// machine, for the bytes of the object do.
const PART: u64 = 4 << 20;
/// How far back a deflate stream may refer, in bytes (RFC 1951, section 2).
const WINDOW: u64 = 32 << 10;
/// Bytes of files, and of what they deflate to, in memory at a time.
const MEMORY: u64 = 96 << 20;
/// The attributes that a tree brings itself (rpm-ostree has the same list). Others, such as labels and
/// default ACLs, are those of the file system that it is made on.
const ATTRIBUTES: [&[u8]; 2] = [b"security.capability", b"user.pax.flags"];
/// The attribute that the tree's policy gives.
const SELINUX: &[u8] = b"security.selinux";

/// What was written.
#[derive(Debug, Default, Clone, Copy)]
pub struct Written {
    /// Content objects that the repository lacked.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Writes trees into one repository. Nothing is in its place before it is on the disk.
pub struct Writer {
    store: Store,
    /// What was written ahead.
    known: HashMap<Version, Checksum>,
}

impl Writer {
    /// For the repository at `path`.
    ///
    /// # Errors
    /// When it cannot be written to.
    pub fn new(path: &Path) -> Result<Self> {
        Ok(Self { store: Store::new(path)?, known: HashMap::new() })
    }

    /// Writes the objects of a tree that is not finished, so that [`Writer::write`] has only
    /// the rest to do.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn write_ahead(&mut self, root: &Path, policy: Option<&SePolicy>) -> Result<()> {
        let mut walk = Walk { policy, files: Vec::new(), versions: HashMap::new() };
        walk.directory(root, "/")?;
        let checksums = self.store.write_all(&walk.files, &self.known)?;
        let written = walk.files.into_iter().zip(checksums);
        self.known.extend(written.map(|(file, checksum)| (file.version, checksum)));
        Ok(())
    }

    /// Writes what the tree at `root` holds, and describes the tree in `mtree`. A transaction
    /// of `repo` must be open.
    ///
    /// # Errors
    /// Rejected when the tree holds what no commit can; other errors on I/O.
    pub fn write(&self, repo: &Repo, root: &Path, policy: Option<&SePolicy>, mtree: &MutableTree) -> Result<Written> {
        let mut walk = Walk { policy, files: Vec::new(), versions: HashMap::new() };
        let tree = walk.directory(root, "/")?;
        let checksums = self.store.write_all(&walk.files, &self.known)?;
        let written = self.store.publish()?;
        fill(repo, mtree, &tree, &checksums, &mut HashMap::new())?;
        Ok(written)
    }
}

/// Extended attributes: name (with its NUL) and value, sorted.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// A directory of the tree.
struct Directory {
    /// Owner, group, mode, as a dirmeta object has them.
    attributes: (u32, u32, u32, Xattrs),
    directories: Vec<(String, Directory)>,
    /// Names and places in [`Walk::files`].
    files: Vec<(String, usize)>,
}

/// A file or symlink that becomes an object.
struct Pending {
    path: PathBuf,
    header: FileHeader,
    version: Version,
}

/// A file at one time: what is equal in this makes the same object.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Version {
    /// Device and number.
    inode: (u64, u64),
    /// When content or attributes last changed, in seconds and nanoseconds.
    changed: (i64, i64),
    header: Vec<u8>,
}

struct Walk<'a> {
    policy: Option<&'a SePolicy>,
    files: Vec<Pending>,
    /// Those of files with several names.
    versions: HashMap<Version, usize>,
}

impl Walk<'_> {
    /// Reads the directory at `path`, which is `name` in the tree.
    fn directory(&mut self, path: &Path, name: &str) -> Result<Directory> {
        stop::check()?;
        let meta = path.symlink_metadata().with_context(|| format!("reading {name} of the tree"))?;
        let xattrs = self.xattrs(path, name, meta.mode())?;
        let attributes = (meta.uid(), meta.gid(), meta.mode(), xattrs);
        let mut directory = Directory { attributes, directories: Vec::new(), files: Vec::new() };
        for entry in fs::read_dir(path).with_context(|| format!("reading {name} of the tree"))? {
            let entry = entry?;
            let Ok(file_name) = entry.file_name().into_string() else {
                reject!("{name} of the tree holds a name that is not UTF-8");
            };
            let child = format!("{}/{file_name}", name.trim_end_matches('/'));
            if entry.file_type()?.is_dir() {
                directory.directories.push((file_name, self.directory(&entry.path(), &child)?));
            } else {
                directory.files.push((file_name, self.file(entry.path(), &child)?));
            }
        }
        Ok(directory)
    }

    fn file(&mut self, path: PathBuf, name: &str) -> Result<usize> {
        let meta = path.symlink_metadata().with_context(|| format!("reading {name} of the tree"))?;
        let target = if meta.is_symlink() {
            let Ok(target) = fs::read_link(&path)?.into_os_string().into_string() else {
                reject!("{name} of the tree leads to a name that is not UTF-8");
            };
            target
        } else if meta.is_file() {
            String::new()
        } else {
            reject!("{name} of the tree is a device, socket or pipe, which a commit cannot hold");
        };
        let header = FileHeader {
            size: if meta.is_file() { meta.size() } else { 0 },
            uid: meta.uid(),
            gid: meta.gid(),
            mode: meta.mode(),
            target,
            xattrs: self.xattrs(&path, name, meta.mode())?,
        };
        let version = Version {
            inode: (meta.dev(), meta.ino()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            header: header.to_bytes(),
        };
        // Names of one inode may have different labels.
        if let Some(known) = self.versions.get(&version) {
            return Ok(*known);
        }
        let index = self.files.len();
        if meta.nlink() > 1 {
            self.versions.insert(version.clone(), index);
        }
        self.files.push(Pending { path, header, version });
        Ok(index)
    }

    fn xattrs(&self, path: &Path, name: &str, mode: u32) -> Result<Xattrs> {
        let mut xattrs = read_xattrs(path).with_context(|| format!("reading the attributes of {name} of the tree"))?;
        if let Some(policy) = self.policy {
            let label =
                policy.label(name, mode, gio::Cancellable::NONE).with_context(|| format!("labelling {name}"))?;
            if let Some(label) = label {
                xattrs.push((with_nul(SELINUX), with_nul(label.as_bytes())));
            }
        }
        xattrs.sort();
        Ok(xattrs)
    }
}

fn with_nul(bytes: &[u8]) -> Vec<u8> {
    [bytes, b"\0"].concat()
}

fn read_xattrs(path: &Path) -> rustix::io::Result<Xattrs> {
    let mut xattrs = Vec::new();
    for name in attributes(path)?.split(|byte| *byte == 0).filter(|name| ATTRIBUTES.contains(name)) {
        let mut value = vec![0; lgetxattr_query(path, name)?];
        let length = lgetxattr(path, name, &mut value)?;
        value.truncate(length);
        xattrs.push((with_nul(name), value));
    }
    Ok(xattrs)
}

/// The names of a file's attributes, each with a NUL behind it.
fn attributes(path: &Path) -> rustix::io::Result<Vec<u8>> {
    let size = match llistxattr_query(path) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        size => size?,
    };
    let mut names = vec![0; size];
    let length = llistxattr(path, &mut names)?;
    names.truncate(length);
    Ok(names)
}

/// Takes the attributes from the tree at `path` that are not its own, for a writer that takes all there
/// are. Labels stay: only a policy's come into a commit.
///
/// # Errors
/// When a directory cannot be read, or an attribute not be removed.
pub fn strip_attributes(path: &Path) -> Result<()> {
    stop::check()?;
    let stripping = || format!("taking foreign attributes from {}", path.display());
    let own = |name: &[u8]| name.is_empty() || name == SELINUX || ATTRIBUTES.contains(&name);
    for name in attributes(path).with_context(stripping)?.split(|byte| *byte == 0).filter(|name| !own(name)) {
        lremovexattr(path, name).with_context(stripping)?;
    }
    if path.symlink_metadata().with_context(stripping)?.is_dir() {
        for entry in fs::read_dir(path).with_context(stripping)? {
            strip_attributes(&entry?.path())?;
        }
    }
    Ok(())
}

/// Where objects wait until all of them are on the disk.
struct Store {
    repo: PathBuf,
    staging: Staging,
    /// The checksums that [`Store::staging`] has.
    staged: Mutex<HashSet<Checksum>>,
    bytes: AtomicU64,
    memory: Memory,
}

impl Store {
    fn new(repo: &Path) -> Result<Self> {
        Ok(Self {
            repo: repo.to_owned(),
            staging: Staging::new(&repo.join("tmp"), "oscontainer-")?,
            staged: Mutex::default(),
            bytes: AtomicU64::new(0),
            memory: Memory { left: Mutex::new(MEMORY), freed: Condvar::new() },
        })
    }

    /// The checksums of all `files`, in their order; those that are `known` are not read.
    fn write_all(&self, files: &[Pending], known: &HashMap<Version, Checksum>) -> Result<Vec<Checksum>> {
        // The largest first, so that no core is left with one at the end.
        let mut order: Vec<usize> = (0..files.len()).collect();
        order.sort_by_key(|index| std::cmp::Reverse(files[*index].header.size));
        let next = AtomicUsize::new(0);
        let read = files.iter().filter(|file| !known.contains_key(&file.version));
        let progress = Progress::bytes("writing objects", Some(read.map(|file| file.header.size).sum()));
        let checksums: Vec<OnceLock<Checksum>> = files.iter().map(|_| OnceLock::new()).collect();
        let work = || -> Result<()> {
            let mut deflate = Compressor::new(CompressionLvl::new(LEVEL).expect("6 is a level"));
            while let Some(index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                let file = &files[*index];
                let checksum = match known.get(&file.version) {
                    Some(checksum) => Ok(*checksum),
                    None => stop::check()
                        .and_then(|()| self.write(file, &mut deflate))
                        .inspect(|_| progress.add(file.header.size)),
                };
                let checksum = checksum.inspect_err(|_| next.store(files.len(), Ordering::Relaxed));
                // Nobody else has this index.
                let _ = checksums[*index]
                    .set(checksum.with_context(|| format!("writing the object of {}", file.path.display()))?);
            }
            Ok(())
        };
        thread::scope(|scope| {
            let cores = thread::available_parallelism().map_or(1, usize::from);
            let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        Ok(checksums.into_iter().map(|checksum| checksum.into_inner().expect("no worker failed")).collect())
    }

    fn write(&self, file: &Pending, deflate: &mut Compressor) -> Result<Checksum> {
        let header = &file.header;
        let mut hasher = header.hasher();
        if header.is_symlink() {
            let checksum = hasher.checksum();
            if self.is_new(&checksum) {
                self.create(&checksum)?.write_all(&header.to_bytes())?;
            }
            return Ok(checksum);
        }
        if header.size > WHOLE {
            return self.write_large(file);
        }
        let _memory = self.memory.take(2 * header.size);
        let content = fs::read(&file.path)?;
        ensure!(content.len() as u64 == header.size, "it changed while it was read");
        hasher.update(&content);
        let checksum = hasher.checksum();
        if self.is_new(&checksum) {
            let mut object = header.to_bytes();
            let start = object.len();
            object.resize(start + deflate.deflate_compress_bound(content.len()), 0);
            let length = deflate.deflate_compress(&content, &mut object[start..]);
            object.truncate(start + length.context("deflating it")?);
            self.create(&checksum)?.write_all(&object)?;
            self.bytes.fetch_add(object.len() as u64, Ordering::Relaxed);
        }
        Ok(checksum)
    }

    /// Once for its checksum and, if the object is new, again to deflate it: neither
    /// takes memory.
    fn write_large(&self, file: &Pending) -> Result<Checksum> {
        let content = File::open(&file.path)?;
        let mut hasher = file.header.hasher();
        let size = hasher.update_from(stop::Reader(&content))?;
        ensure!(size == file.header.size, "it changed while it was read");
        let checksum = hasher.checksum();
        if self.is_new(&checksum) {
            let mut output = self.create(&checksum)?;
            output.write_all(&file.header.to_bytes())?;
            self.deflate(&content, size, &mut output)?;
            self.bytes.fetch_add(output.metadata()?.len(), Ordering::Relaxed);
        }
        Ok(checksum)
    }

    /// Deflates the `size` bytes of `content` into `output`, its parts on all cores.
    fn deflate(&self, content: &File, size: u64, output: &mut File) -> Result<()> {
        let next = AtomicU64::new(0);
        let (sender, parts) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
                let (sender, next) = (sender.clone(), &next);
                scope.spawn(move || {
                    loop {
                        // Memory before the part: so the part that all others wait for has it.
                        let memory = self.memory.take(2 * PART);
                        let start = next.fetch_add(PART, Ordering::Relaxed);
                        if start >= size {
                            return;
                        }
                        let part = deflate_part(content, start, size).map(|part| (part, memory));
                        // Who no longer listens has an error already.
                        if sender.send((start, part)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            let mut early = BTreeMap::new();
            let mut written = 0;
            for (start, part) in parts {
                early.insert(start, part?);
                while let Some((part, _)) = early.remove(&written) {
                    output.write_all(&part)?;
                    written += PART;
                }
            }
            ensure!(written >= size, "a thread panicked");
            Ok(())
        })
    }

    /// Whether neither the repository nor an earlier file has the object.
    fn is_new(&self, checksum: &Checksum) -> bool {
        let new = self.staged.lock().unwrap_or_else(PoisonError::into_inner).insert(*checksum);
        let known = new && self.place(checksum).exists();
        if known {
            self.staged.lock().unwrap_or_else(PoisonError::into_inner).remove(checksum);
        }
        new && !known
    }

    fn create(&self, checksum: &Checksum) -> Result<File> {
        let path = self.staging.path().join(checksum.to_string());
        let file = File::options().write(true).create_new(true).mode(0o644).open(&path);
        file.with_context(|| format!("creating {}", path.display()))
    }

    /// Moves all objects to their places, when the disk has them.
    fn publish(&self) -> Result<Written> {
        let staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner);
        syncfs(File::open(self.staging.path())?).context("writing the objects to the disk")?;
        for checksum in staged.iter() {
            let from = self.staging.path().join(checksum.to_string());
            let to = self.place(checksum);
            fs::create_dir_all(to.parent().context("objects lie in directories")?)?;
            fs::rename(&from, &to).with_context(|| format!("moving an object to {}", to.display()))?;
        }
        Ok(Written { objects: staged.len() as u64, bytes: self.bytes.load(Ordering::Relaxed) })
    }

    /// Where the repository has a content object.
    fn place(&self, checksum: &Checksum) -> PathBuf {
        self.repo.join(ObjectName::new(*checksum, Type::File).path())
    }
}

/// The part of `content` that begins at `start`, as what follows the parts before it in a deflate stream.
fn deflate_part(content: &File, start: u64, size: u64) -> Result<Vec<u8>> {
    stop::check()?;
    let end = size.min(start + PART);
    let window = start.min(WINDOW);
    let mut input = vec![0; (window + end - start) as usize];
    content.read_exact_at(&mut input, start - window).context("it changed while it was read")?;
    let (window, input) = input.split_at(window as usize);
    let mut deflate = Compress::new(Compression::new(LEVEL as u32), false);
    if !window.is_empty() {
        deflate.set_dictionary(window)?;
    }
    let flush = if end == size { FlushCompress::Finish } else { FlushCompress::Sync };
    let mut output = Vec::with_capacity(PART as usize);
    loop {
        let status = deflate.compress_vec(&input[deflate.total_in() as usize..], &mut output, flush)?;
        // All is there when room is left.
        if status == Status::StreamEnd || end < size && output.len() < output.capacity() {
            return Ok(output);
        }
        output.reserve(WINDOW as usize);
    }
}

/// A budget of bytes.
struct Memory {
    left: Mutex<u64>,
    freed: Condvar,
}

/// Bytes of the budget, given back when dropped.
struct Taken<'a> {
    memory: &'a Memory,
    bytes: u64,
}

impl Memory {
    /// Waits until `bytes` are left, which are at most [`MEMORY`].
    fn take(&self, bytes: u64) -> Taken<'_> {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = self.freed.wait_while(left, |left| *left < bytes);
        *enough.unwrap_or_else(PoisonError::into_inner) -= bytes;
        Taken { memory: self, bytes }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.memory.left.lock().unwrap_or_else(PoisonError::into_inner) += self.bytes;
        self.memory.freed.notify_all();
    }
}

/// Describes `directory` in `mtree`; each dirmeta object is written once.
fn fill(
    repo: &Repo,
    mtree: &MutableTree,
    directory: &Directory,
    checksums: &[Checksum],
    known: &mut HashMap<(u32, u32, u32, Xattrs), String>,
) -> Result<()> {
    let dirmeta = match known.get(&directory.attributes) {
        Some(dirmeta) => dirmeta.clone(),
        None => {
            let (uid, gid, mode, xattrs) = &directory.attributes;
            let variant = (uid.to_be(), gid.to_be(), mode.to_be(), xattrs).to_variant();
            let checksum = repo
                .write_metadata(ostree::ObjectType::DirMeta, None, &variant, gio::Cancellable::NONE)
                .context("writing a directory's attributes")?;
            let checksum = checksum.to_hex();
            known.insert(directory.attributes.clone(), checksum.clone());
            checksum
        }
    };
    mtree.set_metadata_checksum(&dirmeta);
    for (name, index) in &directory.files {
        mtree.replace_file(name, &checksums[*index].to_string())?;
    }
    for (name, child) in &directory.directories {
        fill(repo, &mtree.ensure_dir(name)?, child, checksums, known)?;
    }
    Ok(())
}
