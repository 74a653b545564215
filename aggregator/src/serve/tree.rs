//! The repository's files, opened below one directory descriptor without following
//! any symbolic link, and the ETags that come from their content.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek};
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use oscontainer_artifact::digest::{Digest, Hasher};
use oscontainer_program::buffer::Buffer;
use oscontainer_program::files::Served;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use super::path::Entry;

/// A file up to this size, in bytes, is hashed for every request; an object, sent in one piece.
const SMALL: u64 = 64 << 10;
/// An object smaller than this, in bytes, is read before its size is known.
const TINY: usize = 16 << 10;
/// How many larger files' digests are remembered.
const MAX_REMEMBERED: usize = 4096;
/// Bytes hashed at a time.
const CHUNK: usize = 256 << 10;

/// A repository's directory.
pub struct Tree {
    root: File,
    /// Whether paths have to be opened one component after the other.
    step_by_step: AtomicBool,
    digests: Mutex<HashMap<Identity, Digest>>,
}

/// What changes when a file's content does: device, inode, size, mtime and ctime
/// with nanoseconds. In an image all mtimes are 0, but a write changes the ctime.
#[derive(PartialEq, Eq, Hash)]
struct Identity([i128; 5]);

impl Tree {
    /// Opens the repository at `path`.
    ///
    /// # Errors
    /// When it is no directory that can be read.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, path, flags, Mode::empty())
            .with_context(|| format!("opening the repository {}", path.display()))?;
        Ok(Self { root: root.into(), step_by_step: AtomicBool::new(false), digests: Mutex::default() })
    }

    /// Opens what `entry` names, if it is a regular file; it may block for what is no object.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for what is not there, no regular file or behind a link.
    pub fn get(&self, entry: &Entry) -> io::Result<Served> {
        let mut file = self.walk(&entry.path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(ErrorKind::NotFound.into());
        }
        let size = metadata.len();
        let etag = match &entry.object {
            Some(name) => etag(name, size),
            None => self.digest(&mut file)?.hex(),
        };
        Ok(Served {
            file: file.into(),
            size,
            etag,
            content_type: entry.content_type,
            cache_control: entry.cache_control,
        })
    }

    /// An object that is small, whole, with its ETag; nothing for what is large, no object, or no
    /// regular file, nor while too many wait for others. It may block, as long as a read of so few bytes takes.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for what is not there.
    pub fn small(&self, entry: &Entry) -> io::Result<Option<(Buffer, String)>> {
        let Some(name) = entry.object.as_ref().filter(|_| Buffer::may_copy()) else { return Ok(None) };
        let mut file = self.walk(&entry.path)?;
        // Mostly that is all of it, and the next read says so.
        let mut start = [MaybeUninit::uninit(); TINY];
        if let Ok((bytes, rest @ [_, ..])) = rustix::io::read(&file, &mut start[..])
            && !bytes.is_empty()
            && let Ok(([], _)) = rustix::io::read(&file, &mut rest[..1])
        {
            return Ok(Buffer::copy(bytes).map(|copy| (copy, etag(name, bytes.len() as u64))));
        }
        let metadata = file.metadata()?;
        let size = metadata.len();
        if !metadata.is_file() || size > SMALL {
            return Ok(None);
        }
        let Some(mut buffer) = Buffer::whole(size as usize) else { return Ok(None) };
        file.rewind()?;
        file.read_exact(&mut buffer)?;
        Ok(Some((buffer, etag(name, size))))
    }

    fn walk(&self, path: &str) -> io::Result<File> {
        // Mostly one system call is enough. It is not there before Linux 5.6, and some sandboxes forbid it.
        if !self.step_by_step.load(Ordering::Relaxed) {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            match openat2(&self.root, path, flags, Mode::empty(), within) {
                Ok(file) => return Ok(file.into()),
                Err(Errno::NOSYS | Errno::PERM) => self.step_by_step.store(true, Ordering::Relaxed),
                // Somebody renamed something meanwhile.
                Err(Errno::AGAIN) => {}
                Err(e) => return Err(error(e)),
            }
        }
        let (directories, last) = path.rsplit_once('/').unwrap_or(("", path));
        let mut at = None;
        let open = |at: &Option<File>, name: &str, flags| {
            let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(at.as_ref().unwrap_or(&self.root), name, flags, Mode::empty()).map(File::from).map_err(error)
        };
        for directory in directories.split('/').filter(|directory| !directory.is_empty()) {
            at = Some(open(&at, directory, OFlags::PATH | OFlags::DIRECTORY)?);
        }
        // A pipe must not make the server wait.
        open(&at, last, OFlags::RDONLY | OFlags::NONBLOCK)
    }

    /// The digest of an open file, which is at its start before and after.
    fn digest(&self, file: &mut File) -> io::Result<Digest> {
        let metadata = file.metadata()?;
        let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        let identity = Identity([
            i128::from(metadata.dev()),
            i128::from(metadata.ino()),
            i128::from(metadata.len()),
            nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        ]);
        let large = metadata.len() > SMALL;
        if large && let Some(known) = self.remembered().get(&identity) {
            return Ok(*known);
        }
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; CHUNK.min(metadata.len() as usize + 1)];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => hasher.update(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        file.rewind()?;
        let digest = hasher.digest();
        if large {
            let mut digests = self.remembered();
            if digests.len() >= MAX_REMEMBERED {
                digests.clear();
            }
            digests.insert(identity, digest);
        }
        Ok(digest)
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, HashMap<Identity, Digest>> {
        // A panic elsewhere leaves the map as it was: every entry is true by itself.
        self.digests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An object's ETag: the name pins what the object says; the size, how it was deflated as well.
fn etag(name: &str, size: u64) -> String {
    format!("{name}-{size:x}")
}

/// What is behind a link or cannot be is not there.
fn error(error: Errno) -> io::Error {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG | Errno::XDEV => ErrorKind::NotFound.into(),
        other => other.into(),
    }
}
