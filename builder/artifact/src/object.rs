//! OSTree's object formats as they lie in an archive-mode repository: names,
//! commit, dirtree, dirmeta and the header of a `.filez` (libostree,
//! `src/libostree/ostree-core.h` and `ostree-core.c`). Pure functions on byte
//! slices. GVariant readers are lenient by design; whatever a checksum does not
//! cover is therefore serialised again and compared.

use std::fmt;
use std::str::FromStr;

use gvariant::aligned_bytes::copy_to_align;
use gvariant::{Cast, Marker, NonFixedWidthArray, Structure, gv};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Rejected;
use crate::digest::{Checksum, Hasher};

/// `S_IFMT` and the types that objects have (POSIX, `sys/stat.h`; Linux's values).
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// What an object is; the extension of its file says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Type {
    /// A commit.
    Commit,
    /// Detached metadata of a commit; it is named after the commit, not after its own content.
    CommitMeta,
    /// A directory's owner, mode and extended attributes.
    Dirmeta,
    /// A directory's entries.
    Dirtree,
    /// A regular file or a symlink.
    File,
}

impl Type {
    const ALL: [Self; 5] = [Self::Commit, Self::CommitMeta, Self::Dirmeta, Self::Dirtree, Self::File];

    /// The extension in an archive-mode repository.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::CommitMeta => "commitmeta",
            Self::Dirmeta => "dirmeta",
            Self::Dirtree => "dirtree",
            Self::File => "filez",
        }
    }
}

/// An object's name: checksum and type.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The checksum of its content (for a `.commitmeta`: of its commit).
    pub checksum: Checksum,
    /// What it is.
    pub kind: Type,
}

impl ObjectName {
    /// The name of an object.
    pub fn new(checksum: Checksum, kind: Type) -> Self {
        Self { checksum, kind }
    }

    /// `objects/XX/REST.EXTENSION`, relative to the repository.
    pub fn path(&self) -> String {
        let hex = self.checksum.to_string();
        format!("objects/{}/{}.{}", &hex[..2], &hex[2..], self.kind.extension())
    }

    /// The name behind a path as [`Self::path`] writes it; nothing else is one.
    pub fn from_path(path: &str) -> Option<Self> {
        let (start, rest) = path.strip_prefix("objects/")?.split_once('/')?;
        if start.len() != 2 {
            return None;
        }
        format!("{start}{rest}").parse().ok()
    }
}

impl FromStr for ObjectName {
    type Err = Rejected;

    /// Reads `CHECKSUM.EXTENSION`.
    fn from_str(text: &str) -> Result<Self, Rejected> {
        let parsed = text.split_once('.').and_then(|(checksum, extension)| {
            let kind = Type::ALL.into_iter().find(|kind| kind.extension() == extension)?;
            Some(Self { checksum: checksum.parse().ok()?, kind })
        });
        parsed.ok_or_else(|| Rejected::new(format!("{text:?} is not the name of an object")))
    }
}

impl Serialize for ObjectName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ObjectName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.checksum, self.kind.extension())
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A commit, `(a{sv}aya(say)sstayay)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// Seconds since 1970.
    pub timestamp: u64,
    /// The first line of the message.
    pub subject: String,
    /// The commit before, where it has one.
    pub parent: Option<Checksum>,
    /// The dirtree of the root.
    pub tree: Checksum,
    /// The dirmeta of the root.
    pub meta: Checksum,
    /// The string `version` of the metadata, where it has one.
    pub version: Option<String>,
    /// The hash of what went into the compose ([`INPUT_HASHES`]), where the metadata have one.
    pub input_hash: Option<String>,
    /// The RPMs in the tree, `rpmostree.rpmdb.pkglist`, in the metadata's order.
    pub packages: Vec<Package>,
}

/// The keys of the hash of a compose's input, the one that counts first: ours, and rpm-ostree's.
const INPUT_HASHES: [&str; 2] = ["oscontainer.input-hash", crate::manifest::INPUTHASH];

/// An RPM, as a commit's metadata list it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its epoch, `0` where it has none.
    pub epoch: String,
    /// Its version.
    pub version: String,
    /// Its release.
    pub release: String,
    /// RPM's name of the machine, such as `x86_64` or `noarch`.
    pub architecture: String,
}

impl Package {
    /// `[EPOCH:]VERSION-RELEASE`.
    pub fn evr(&self) -> String {
        let epoch = if self.epoch.is_empty() || self.epoch == "0" { String::new() } else { format!("{}:", self.epoch) };
        format!("{epoch}{}-{}", self.version, self.release)
    }
}

impl Commit {
    /// Reads a commit object.
    ///
    /// # Errors
    /// When a checksum in it has not 32 bytes, or the elements of an array overlap.
    pub fn parse(bytes: &[u8]) -> Result<Self, Rejected> {
        let aligned = copy_to_align(bytes);
        let commit = gv!("(a{sv}aya(say)sstayay)").cast(aligned.as_ref());
        let (metadata, parent, _related, subject, _body, timestamp, tree, meta) = commit.to_tuple();
        let metadata = elements(metadata).collect::<Result<Vec<_>, _>>()?;
        let text = |wanted: &str| {
            metadata.iter().find_map(|entry| {
                let (key, value) = entry.to_tuple();
                Some(value.get(gv!("s")).filter(|_| key.to_str() == wanted)?.to_str().to_owned())
            })
        };
        let list = metadata.iter().find_map(|entry| {
            let (key, value) = entry.to_tuple();
            value.get(gv!("a(sssss)")).filter(|_| key.to_str() == "rpmostree.rpmdb.pkglist")
        });
        let packages = list.into_iter().flat_map(elements).map(|entry| {
            let (name, epoch, version, release, architecture) = entry?.to_tuple();
            let [name, epoch, version, release, architecture] =
                [name, epoch, version, release, architecture].map(|text| text.to_str().to_owned());
            Ok(Package { name, epoch, version, release, architecture })
        });
        let parent = if parent.is_empty() { None } else { Some(checksum(parent, "the parent")?) };
        Ok(Self {
            timestamp: u64::from_be(*timestamp),
            subject: subject.to_str().to_owned(),
            parent,
            tree: checksum(tree, "the root dirtree")?,
            meta: checksum(meta, "the root dirmeta")?,
            version: text("version"),
            input_hash: INPUT_HASHES.into_iter().find_map(text),
            packages: packages.collect::<Result<_, Rejected>>()?,
        })
    }
}

/// What a dirtree, `(a(say)a(sayay))`, refers to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dirtree {
    /// The file objects.
    pub files: Vec<Checksum>,
    /// The directories: dirtree and dirmeta.
    pub directories: Vec<(Checksum, Checksum)>,
}

impl Dirtree {
    /// Reads a dirtree object and checks its names: none that could lead out of
    /// its directory, each once, sorted.
    ///
    /// # Errors
    /// When a name is bad, a checksum has not 32 bytes, or the bytes are not in
    /// normal form.
    pub fn parse(bytes: &[u8]) -> Result<Self, Rejected> {
        let aligned = copy_to_align(bytes);
        let (files, directories) = gv!("(a(say)a(sayay))").cast(aligned.as_ref()).to_tuple();
        let mut tree = Self::default();
        let mut names: Vec<&str> = Vec::new();
        let mut file_entries = Vec::new();
        let mut directory_entries = Vec::new();
        for entry in elements(files) {
            let (name, content) = entry?.to_tuple();
            names.push(name.to_str());
            tree.files.push(checksum(content, "a file")?);
            file_entries.push((name.to_str(), content));
        }
        ascending(&names)?;
        for entry in elements(directories) {
            let (name, content, meta) = entry?.to_tuple();
            names.push(name.to_str());
            tree.directories.push((checksum(content, "a dirtree")?, checksum(meta, "a dirmeta")?));
            directory_entries.push((name.to_str(), content, meta));
        }
        ascending(&names[tree.files.len()..])?;
        names.sort_unstable();
        ascending(&names)?;
        if gv!("(a(say)a(sayay))").serialize_to_vec(&(&file_entries[..], &directory_entries[..])) != bytes {
            return Err(Rejected::new("it is not in normal form"));
        }
        Ok(tree)
    }
}

/// Checks a dirmeta object, `(uuua(ayay))`: a directory's mode, normal form.
///
/// # Errors
/// When it is not so, or larger than a file's header may be.
pub fn check_dirmeta(bytes: &[u8]) -> Result<(), Rejected> {
    if bytes.len() > FileHeader::MAX_SIZE as usize {
        return Err(Rejected::new(format!("it is larger than the limit of {} bytes", FileHeader::MAX_SIZE)));
    }
    let aligned = copy_to_align(bytes);
    let (uid, gid, mode, xattrs) = gv!("(uuua(ayay))").cast(aligned.as_ref()).to_tuple();
    let pairs: Vec<_> = elements(xattrs).map(|pair| Ok(pair?.to_tuple())).collect::<Result<_, Rejected>>()?;
    if gv!("(uuua(ayay))").serialize_to_vec(&(*uid, *gid, *mode, &pairs[..])) != bytes {
        return Err(Rejected::new("it is not in normal form"));
    }
    let mode = u32::from_be(*mode);
    if mode & !0o7777 != S_IFDIR {
        return Err(Rejected::new(format!("mode {mode:o} is not a directory's")));
    }
    Ok(())
}

/// The header of a `.filez`, `(tuuuusa(ayay))`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHeader {
    /// Bytes of content once inflated; 0 for a symlink.
    pub size: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Type and permissions, as `st_mode`.
    pub mode: u32,
    /// Where a symlink leads to; empty for a regular file.
    pub target: String,
    /// Extended attributes: name (with its NUL) and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl FileHeader {
    /// Bytes before the GVariant: its length, big-endian, and 4 zeros.
    pub const PREFIX: usize = 8;
    /// The largest GVariant that is read, in bytes: a path, and Linux's limit of
    /// 64 KiB for all names and for each value of extended attributes, several times.
    pub const MAX_SIZE: u32 = 1 << 20;

    /// The length of the GVariant that follows the 8 bytes `prefix`.
    ///
    /// # Errors
    /// When it is above the limit, or the padding is not zero.
    pub fn length(prefix: [u8; Self::PREFIX]) -> Result<usize, Rejected> {
        let [a, b, c, d, padding @ ..] = prefix;
        let length = u32::from_be_bytes([a, b, c, d]);
        if padding != [0; 4] {
            return Err(Rejected::new("the padding of its header is not zero"));
        }
        if length > Self::MAX_SIZE {
            return Err(Rejected::new(format!(
                "its header of {length} bytes is above the limit of {}",
                Self::MAX_SIZE
            )));
        }
        Ok(length as usize)
    }

    /// Reads the GVariant.
    ///
    /// # Errors
    /// When it is not what [`Self::to_bytes`] writes, or no regular file or symlink.
    pub fn parse(bytes: &[u8]) -> Result<Self, Rejected> {
        let aligned = copy_to_align(bytes);
        let (size, uid, gid, mode, rdev, target, xattrs) = gv!("(tuuuusa(ayay))").cast(aligned.as_ref()).to_tuple();
        let xattrs = elements(xattrs).map(|pair| {
            let (name, value) = pair?.to_tuple();
            Ok((name.to_vec(), value.to_vec()))
        });
        let header = Self {
            size: u64::from_be(*size),
            uid: u32::from_be(*uid),
            gid: u32::from_be(*gid),
            mode: u32::from_be(*mode),
            target: target.to_str().to_owned(),
            xattrs: xattrs.collect::<Result<_, Rejected>>()?,
        };
        if *rdev != 0 {
            return Err(Rejected::new("it has a device number"));
        }
        let right = match header.mode & !0o7777 {
            S_IFREG => header.target.is_empty(),
            S_IFLNK => !header.target.is_empty() && header.size == 0,
            _ => false,
        };
        if !right {
            return Err(Rejected::new(format!(
                "mode {:o}, size {} and target {:?} are no regular file's and no symlink's",
                header.mode, header.size, header.target
            )));
        }
        if header.to_bytes()[Self::PREFIX..] != *bytes {
            return Err(Rejected::new("its header is not in normal form"));
        }
        Ok(header)
    }

    /// Whether it is a symlink, which has no content.
    pub fn is_symlink(&self) -> bool {
        self.mode & S_IFMT == S_IFLNK
    }

    /// What a `.filez` starts with: the prefix and the GVariant.
    pub fn to_bytes(&self) -> Vec<u8> {
        framed(gv!("(tuuuusa(ayay))").serialize_to_vec(&(
            self.size.to_be(),
            self.uid.to_be(),
            self.gid.to_be(),
            self.mode.to_be(),
            0_u32,
            self.target.as_str(),
            &borrowed(&self.xattrs)[..],
        )))
    }

    /// A hasher that has seen what the object's checksum covers before the
    /// content: the header `(uuuusa(ayay))`, which has no size.
    pub fn hasher(&self) -> Hasher {
        let mut hasher = Hasher::new();
        hasher.update(&framed(gv!("(uuuusa(ayay))").serialize_to_vec(&(
            self.uid.to_be(),
            self.gid.to_be(),
            self.mode.to_be(),
            0_u32,
            self.target.as_str(),
            &borrowed(&self.xattrs)[..],
        ))));
        hasher
    }
}

/// libostree's framing of a header (`_ostree_write_variant_with_size`).
fn framed(variant: Vec<u8>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FileHeader::PREFIX + variant.len());
    bytes.extend_from_slice(&(variant.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend(variant);
    bytes
}

fn checksum(bytes: &[u8], what: &str) -> Result<Checksum, Rejected> {
    Checksum::from_bytes(bytes)
        .ok_or_else(|| Rejected::new(format!("the checksum of {what} in it has {} bytes, not 32", bytes.len())))
}

fn ascending(names: &[&str]) -> Result<(), Rejected> {
    if let Some(name) = names.iter().find(|name| matches!(**name, "" | "." | "..") || name.contains('/')) {
        return Err(Rejected::new(format!("it has an entry with the name {name:?}")));
    }
    match names.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => {
            Err(Rejected::new(format!("its entries {:?} and {:?} are not sorted or not unique", pair[0], pair[1])))
        }
        None => Ok(()),
    }
}

/// The elements of an array, none of which is empty in normal form, up to the one that cannot be there beside those
/// before it: where framing offsets go back and forth, each second element may be nearly the whole array, and what
/// is made of all of them be a thousand times as large.
fn elements<T: Cast + ?Sized>(array: &NonFixedWidthArray<T>) -> impl Iterator<Item = Result<&T, Rejected>> {
    let mut left = size_of_val(array);
    array.iter().map(move |element| match left.checked_sub(size_of_val(element)) {
        Some(rest) if rest < left => {
            left = rest;
            Ok(element)
        }
        _ => Err(Rejected::new("it is not in normal form: the elements of an array overlap or are empty")),
    })
}

fn borrowed(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Vec<(&[u8], &[u8])> {
    xattrs.iter().map(|(name, value)| (&name[..], &value[..])).collect()
}
