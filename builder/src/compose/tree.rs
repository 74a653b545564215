//! The tree that is being composed. Every path into it is resolved as if the tree
//! were `/`, so that a symbolic link of a package cannot lead out of it.

use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use oscontainer_program::reject;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};
use rustix::io::Errno;

/// The largest file that is read as text, in bytes: those of account and configuration files are far below.
const TEXT: u64 = 16 << 20;

/// A directory that will be `/` of the composed system.
pub struct Tree {
    root: PathBuf,
    fd: OwnedFd,
}

impl Tree {
    /// Opens `root`, which exists.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(root: &Path) -> Result<Self> {
        let root = fs::canonicalize(root).with_context(|| format!("opening {}", root.display()))?;
        let fd = openat(CWD, &root, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("opening {}", root.display()))?;
        Ok(Self { root, fd })
    }

    /// Where the tree lies on the host.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The host path of what `path` leads to, all links followed; `None` where
    /// there is nothing.
    ///
    /// # Errors
    /// Other than that nothing is there.
    pub fn find(&self, path: &str) -> Result<Option<PathBuf>> {
        let Some(fd) = self.resolve(path)? else { return Ok(None) };
        fs::read_link(by_number(&fd)).map(Some).with_context(|| format!("resolving /{path} in the tree"))
    }

    /// What `path` leads to, all links followed, without opening it: of a device or a pipe that would do
    /// something, or wait.
    fn resolve(&self, path: &str) -> Result<Option<OwnedFd>> {
        let relative = Path::new(path.trim_start_matches('/'));
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        match openat2(&self.fd, relative, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("resolving /{path} in the tree")),
        }
    }

    /// The host path of `path` itself: links are followed but for the last part.
    /// Its directory is made where it is missing.
    ///
    /// # Errors
    /// When the directory cannot be made or entered.
    pub fn place(&self, path: &str) -> Result<PathBuf> {
        let path = path.trim_matches('/');
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        anyhow::ensure!(!name.is_empty() && name != "." && name != "..", "{path:?} names no file");
        if let Some(parent) = self.find(parent)? {
            return Ok(parent.join(name));
        }
        let parent = self.place(parent)?;
        fs::create_dir(&parent).with_context(|| format!("making {}", parent.display()))?;
        fs::set_permissions(&parent, Permissions::from_mode(0o755))?;
        Ok(parent.join(name))
    }

    /// The host path of `path` itself, where something is there.
    ///
    /// # Errors
    /// When the directory cannot be entered.
    pub fn entry(&self, path: &str) -> Result<Option<PathBuf>> {
        let path = path.trim_matches('/');
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        let Some(parent) = self.find(parent)? else { return Ok(None) };
        let place = parent.join(name);
        Ok(place.symlink_metadata().is_ok().then_some(place))
    }

    /// The regular file that `path` leads to.
    fn regular(&self, path: &str) -> Result<Option<OwnedFd>> {
        let Some(fd) = self.resolve(path)? else { return Ok(None) };
        let stat = fstat(&fd).with_context(|| format!("looking at /{path} of the tree"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            reject!("/{path} of the tree is not a regular file");
        }
        Ok(Some(fd))
    }

    /// Opens a file to read it; `None` where there is none. Nothing else of the tree's is to be opened by name:
    /// scriptlets may have put anything there.
    ///
    /// # Errors
    /// Rejected when it is not a regular file.
    pub fn open_file(&self, path: &str) -> Result<Option<File>> {
        let Some(fd) = self.regular(path)? else { return Ok(None) };
        File::open(by_number(&fd)).map(Some).with_context(|| format!("opening /{path} of the tree"))
    }

    /// The file's text; `None` where there is none.
    ///
    /// # Errors
    /// Rejected when it is not a regular file of UTF-8, or larger than any text.
    pub fn read(&self, path: &str) -> Result<Option<String>> {
        match self.read_bytes(path)?.map(String::from_utf8).transpose() {
            Ok(text) => Ok(text),
            Err(_) => reject!("/{path} of the tree is not UTF-8"),
        }
    }

    /// The file's content; `None` where there is none.
    ///
    /// # Errors
    /// Rejected when it is not a regular file, or larger than any text.
    pub fn read_bytes(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open_file(path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        let read = file.take(TEXT + 1).read_to_end(&mut bytes);
        read.with_context(|| format!("reading /{path} of the tree"))?;
        if bytes.len() as u64 > TEXT {
            reject!("/{path} of the tree has more than {} MiB", TEXT >> 20);
        }
        Ok(Some(bytes))
    }

    /// Gives a regular file that is there other content; owner and mode stay.
    ///
    /// # Errors
    /// When it is not there, or cannot be written.
    pub fn rewrite(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let fd = self.regular(path)?.with_context(|| format!("finding /{path} of the tree"))?;
        fs::write(by_number(&fd), bytes).with_context(|| format!("writing /{path} of the tree"))
    }

    /// Writes a regular file with `mode`, in the place of what is there.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &str, bytes: &[u8], mode: u32) -> Result<()> {
        self.remove(path)?;
        let place = self.place(path)?;
        fs::write(&place, bytes).with_context(|| format!("writing /{path} of the tree"))?;
        fs::set_permissions(&place, Permissions::from_mode(mode))
            .with_context(|| format!("writing /{path} of the tree"))
    }

    /// Makes the symbolic link `path` that holds `target`, in the place of what is there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn link(&self, path: &str, target: &str) -> Result<()> {
        self.remove(path)?;
        symlink(target, self.place(path)?).with_context(|| format!("linking /{path} of the tree"))
    }

    /// Makes the directory, with mode 0755, unless it is there.
    ///
    /// # Errors
    /// When it cannot be made, or something else is there.
    pub fn directory(&self, path: &str) -> Result<PathBuf> {
        let place = self.place(path)?;
        match fs::create_dir(&place) {
            Ok(()) => fs::set_permissions(&place, Permissions::from_mode(0o755))?,
            Err(error) if error.kind() == ErrorKind::AlreadyExists && place.is_dir() => {}
            Err(error) => return Err(error).with_context(|| format!("making /{path} of the tree")),
        }
        Ok(place)
    }

    /// Removes `path` and all below it; nothing there is fine.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, path: &str) -> Result<()> {
        let Some(place) = self.entry(path)? else { return Ok(()) };
        let removed =
            if place.symlink_metadata()?.is_dir() { fs::remove_dir_all(&place) } else { fs::remove_file(&place) };
        removed.with_context(|| format!("removing /{path} of the tree"))
    }

    /// Moves `from` to `to`, in the place of what is there; nothing there is fine.
    ///
    /// # Errors
    /// When it cannot be moved.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        let Some(source) = self.entry(from)? else { return Ok(()) };
        self.remove(to)?;
        fs::rename(source, self.place(to)?).with_context(|| format!("moving /{from} of the tree to /{to}"))
    }
}

/// The path by which the kernel knows what is open (proc(5)).
fn by_number(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}
