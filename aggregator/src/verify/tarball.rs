//! A strict reader of the canonical tarball (`oscontainer_artifact::tarball`).
//! Each header is read with the `tar` crate and then written again: what is not
//! byte for byte the one header of its path, kind and size is rejected.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read};

use anyhow::{Context, Result};
use oscontainer_artifact::Rejected;
use oscontainer_artifact::manifest::Manifest;
use oscontainer_artifact::object::ObjectName;
use oscontainer_artifact::tarball::{BLOCK, CONFIG, DIRECTORIES, Kind, header, padding};
use oscontainer_program::reject;
use tar::{EntryType, Header, PaxExtensions};

/// The largest pax extended header, in bytes: a path of 255 bytes and a size, some times.
const MAX_PAX: u64 = 2048;

/// An object in the tarball; its content is read next.
pub struct Entry {
    /// Which object.
    pub name: ObjectName,
    /// Bytes.
    pub size: u64,
}

/// The reader. Entries other than objects are checked by it.
pub struct Reader<'a, R> {
    input: &'a mut R,
    size: u64,
    reference: String,
    reference_content: Vec<u8>,
    missing: BTreeSet<String>,
    last: String,
    content: u64,
}

impl<'a, R: Read> Reader<'a, R> {
    /// Reads the tarball that `manifest` describes.
    pub fn new(input: &'a mut R, manifest: &Manifest) -> Self {
        let reference = format!("refs/heads/{}", manifest.ref_name);
        let mut missing: BTreeSet<_> = DIRECTORIES.iter().map(ToString::to_string).collect();
        missing.insert("config".to_owned());
        missing.insert(reference.clone());
        let reference_content = format!("{}\n", manifest.commit).into_bytes();
        let (last, size) = (String::new(), manifest.tarball.size);
        Self { input, size, reference, reference_content, missing, last, content: 0 }
    }

    /// The next object, after all entries before it were checked; nothing at the
    /// end, when everything that has to be there was.
    ///
    /// # Errors
    /// `Rejected`, naming the entry; other errors when reading fails.
    pub fn next(&mut self) -> Result<Option<Entry>> {
        while let Some((path, kind)) = self.header()? {
            if path <= self.last {
                reject!("the tarball's entry {path:?} is not sorted or not unique: it follows {:?}", self.last);
            }
            self.last.clone_from(&path);
            match (kind, ObjectName::from_path(&path)) {
                (Kind::File(size), Some(name)) => {
                    self.content = size;
                    return Ok(Some(Entry { name, size }));
                }
                (Kind::Directory, _) if DIRECTORIES.contains(&path.as_str()) => {}
                (Kind::File(size), _) if path == "config" => self.expect(&path, size, CONFIG)?,
                (Kind::File(size), _) if path == self.reference => {
                    let content = self.reference_content.clone();
                    self.expect(&path, size, &content)?;
                }
                _ => reject!("the tarball has an entry {path:?} that does not belong there"),
            }
            self.missing.remove(&path);
        }
        match self.missing.first() {
            Some(path) => reject!("the tarball has no entry {path:?}"),
            None => Ok(None),
        }
    }

    /// Fills `buffer` with the next bytes of the object.
    ///
    /// # Errors
    /// When the tarball ends early or reading fails.
    pub fn read_content(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.read(buffer)
    }

    /// Reads what pads the object to a block.
    ///
    /// # Errors
    /// When it is not zero, the tarball ends early or reading fails.
    pub fn end_content(&mut self) -> Result<()> {
        self.padding(self.content)
    }

    fn expect(&mut self, path: &str, size: u64, content: &[u8]) -> Result<()> {
        let mut found = vec![0; size.min(content.len() as u64) as usize];
        self.read(&mut found)?;
        if size != content.len() as u64 || found != content {
            reject!("the tarball's {path:?} does not hold what it must: {:?}", String::from_utf8_lossy(content));
        }
        self.padding(size)
    }

    /// Path and kind of the next entry; nothing at the archive's end.
    fn header(&mut self) -> Result<Option<(String, Kind)>> {
        let mut bytes = vec![0; BLOCK];
        self.read(&mut bytes)?;
        if bytes.iter().all(|b| *b == 0) {
            let mut second = [0; BLOCK];
            self.read(&mut second)?;
            if second != [0; BLOCK] {
                reject!("the tarball goes on after a block of zeros");
            }
            return Ok(None);
        }
        let (mut path, mut size) = (None, None);
        if block(&bytes).entry_type() == EntryType::XHeader {
            let length = entry_size(block(&bytes), "a pax header")?;
            if length > MAX_PAX {
                reject!("the tarball has a pax header of {length} bytes after {:?}, the limit is {MAX_PAX}", self.last);
            }
            let mut records = vec![0; length as usize + padding(length)];
            self.read(&mut records)?;
            for record in PaxExtensions::new(&records[..length as usize]) {
                let record = record.map_err(|e| self.bad(&e.to_string()))?;
                match record.key_bytes() {
                    b"path" => path = Some(record.value_bytes().to_vec()),
                    b"size" => size = record.value().ok().and_then(|text| text.parse().ok()),
                    other => {
                        let key = String::from_utf8_lossy(other).into_owned();
                        return Err(self.bad(&format!("it has a record {key:?}")).into());
                    }
                }
            }
            bytes.extend(records);
            let start = bytes.len();
            bytes.resize(start + BLOCK, 0);
            self.read(&mut bytes[start..])?;
        }
        let last = block(&bytes[bytes.len() - BLOCK..]);
        let path = path.unwrap_or_else(|| last.path_bytes().into_owned());
        let shown = String::from_utf8_lossy(&path).into_owned();
        if !path.is_ascii() {
            reject!("the tarball's entry {shown:?} is not ASCII");
        }
        let (path, kind) = match last.entry_type() {
            EntryType::Directory => (shown.strip_suffix('/').unwrap_or(&shown).to_owned(), Kind::Directory),
            EntryType::Regular => (shown.clone(), Kind::File(size.map_or_else(|| entry_size(last, &shown), Ok)?)),
            other => reject!("the tarball's entry {shown:?} is neither a file nor a directory but {other:?}"),
        };
        if let Kind::File(size) = kind
            && size > self.size
        {
            reject!("the tarball's entry {shown:?} states {size} bytes, the whole tarball has {}", self.size);
        }
        if header(&path, kind) != bytes {
            reject!("the header of the tarball's entry {shown:?} is not canonical");
        }
        Ok(Some((path, kind)))
    }

    fn bad(&self, why: &str) -> Rejected {
        Rejected::new(format!("the tarball's pax header after {:?} is not canonical: {why}", self.last))
    }

    fn padding(&mut self, size: u64) -> Result<()> {
        let mut bytes = [0; BLOCK];
        let bytes = &mut bytes[..padding(size)];
        self.read(bytes)?;
        if bytes.iter().any(|b| *b != 0) {
            reject!("the padding after the tarball's entry {:?} is not zero", self.last);
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        match self.input.read_exact(buffer) {
            // A connection that broke is another kind: then the reader has an error of its own.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                reject!("the tarball ends too early, after {:?}", self.last)
            }
            done => done.context("reading the tarball"),
        }
    }
}

fn block(bytes: &[u8]) -> &Header {
    Header::from_byte_slice(&bytes[..BLOCK])
}

fn entry_size(header: &Header, path: &str) -> Result<u64> {
    header.entry_size().map_err(|e| Rejected::new(format!("the size of the tarball's entry {path:?}: {e}")).into())
}
