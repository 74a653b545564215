//! One object, checked as its bytes come: its checksum from its content, and for
//! a `.filez` everything that the checksum does not cover.

use std::io::Read;

use anyhow::Result;
use miniz_oxide::inflate::stream::{InflateState, inflate};
use miniz_oxide::{DataFormat, MZError, MZFlush, MZStatus};
use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::{Checksum, Digest, Hasher};
use oscontainer_artifact::object::{Commit, Dirtree, FileHeader, ObjectName, Type, check_dirmeta};

/// What is read at most; all in bytes.
struct Limits {
    /// A commit, dirtree, dirmeta or commitmeta: half of libostree's
    /// `OSTREE_MAX_METADATA_SIZE` (128 MiB).
    metadata: usize,
    /// Inflated at a time.
    buffer: usize,
}

const LIMITS: Limits = Limits { metadata: 64 << 20, buffer: 64 << 10 };

/// What a verified object refers to.
pub enum Links {
    /// A commit: root dirtree and dirmeta.
    Commit(Commit),
    /// A directory's entries.
    Dirtree(Dirtree),
    /// Nothing.
    None,
}

impl Links {
    /// The names of all that it refers to.
    pub fn names(&self) -> Vec<ObjectName> {
        match self {
            Self::Commit(commit) => {
                vec![ObjectName::new(commit.tree, Type::Dirtree), ObjectName::new(commit.meta, Type::Dirmeta)]
            }
            Self::Dirtree(tree) => {
                let files = tree.files.iter().map(|file| ObjectName::new(*file, Type::File));
                let directories = tree.directories.iter().flat_map(|(tree, meta)| {
                    [ObjectName::new(*tree, Type::Dirtree), ObjectName::new(*meta, Type::Dirmeta)]
                });
                files.chain(directories).collect()
            }
            Self::None => Vec::new(),
        }
    }
}

/// Checks a whole object from a reader, such as one that is on disk already.
///
/// # Errors
/// `Rejected` when it is damaged; other errors when reading fails.
pub fn check_object(name: ObjectName, mut input: impl Read) -> Result<Links> {
    let mut check = Check::new(name);
    let mut buffer = vec![0; LIMITS.buffer];
    loop {
        match input.read(&mut buffer)? {
            0 => return Ok(check.finish()?),
            count => check.update(&buffer[..count])?,
        }
    }
}

/// The check of one object.
pub struct Check {
    name: ObjectName,
    /// The object, or of a file its header until that is complete.
    start: Vec<u8>,
    content: Option<Content>,
}

impl Check {
    /// A check that has seen nothing of the object yet.
    pub fn new(name: ObjectName) -> Self {
        Self { name, start: Vec::new(), content: None }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// When they cannot belong to the object.
    pub fn update(&mut self, bytes: &[u8]) -> Result<(), Rejected> {
        if let Some(content) = &mut self.content {
            return content.update(bytes);
        }
        if self.name.kind != Type::File {
            if self.start.len() + bytes.len() > LIMITS.metadata {
                return Err(Rejected::new(format!("it is larger than the limit of {} bytes", LIMITS.metadata)));
            }
            self.start.extend_from_slice(bytes);
            return Ok(());
        }
        let mut rest = bytes;
        take(&mut self.start, &mut rest, FileHeader::PREFIX);
        let Some(prefix) = self.start.first_chunk() else { return Ok(()) };
        let end = FileHeader::PREFIX + FileHeader::length(*prefix)?;
        take(&mut self.start, &mut rest, end);
        if self.start.len() == end {
            let header = FileHeader::parse(&self.start[FileHeader::PREFIX..])?;
            let mut content = Content::new(&header);
            content.update(rest)?;
            self.content = Some(content);
        }
        Ok(())
    }

    /// The object is complete.
    ///
    /// # Errors
    /// When it is not what its name says.
    pub fn finish(self) -> Result<Links, Rejected> {
        let found = match (self.name.kind, self.content) {
            (Type::File, Some(content)) => content.finish()?,
            (Type::File, None) => return Err(Rejected::new("it ends within its header")),
            (Type::CommitMeta, _) => self.name.checksum,
            _ => {
                let mut hasher = Hasher::new();
                hasher.update(&self.start);
                hasher.checksum()
            }
        };
        if found != self.name.checksum {
            return Err(Rejected::new(format!("its content has the checksum {found}")));
        }
        match self.name.kind {
            Type::Commit => Ok(Links::Commit(Commit::parse(&self.start)?)),
            Type::Dirtree => Ok(Links::Dirtree(Dirtree::parse(&self.start)?)),
            Type::Dirmeta => check_dirmeta(&self.start).map(|()| Links::None),
            Type::File | Type::CommitMeta => Ok(Links::None),
        }
    }
}

/// Moves bytes from `rest` until `buffer` has `length` of them.
fn take(buffer: &mut Vec<u8>, rest: &mut &[u8], length: usize) {
    let count = length.saturating_sub(buffer.len()).min(rest.len());
    buffer.extend_from_slice(&rest[..count]);
    *rest = &rest[count..];
}

/// What follows a file's header: nothing for a symlink, else one raw deflate stream.
struct Content {
    hasher: Hasher,
    left: u64,
    inflate: Option<Inflate>,
    /// The last byte so far: the very last one is looked at closely.
    held: Option<u8>,
    buffer: Vec<u8>,
}

impl Content {
    fn new(header: &FileHeader) -> Self {
        let inflate = (!header.is_symlink()).then(Inflate::new);
        Self { hasher: header.hasher(), left: header.size, inflate, held: None, buffer: vec![0; LIMITS.buffer] }
    }

    fn update(&mut self, bytes: &[u8]) -> Result<(), Rejected> {
        let Some((last, bytes)) = bytes.split_last() else { return Ok(()) };
        if let Some(held) = self.held.replace(*last) {
            self.inflate(&[held])?;
        }
        self.inflate(bytes)
    }

    fn inflate(&mut self, bytes: &[u8]) -> Result<(), Rejected> {
        let Some(inflate) = &mut self.inflate else {
            return Err(Rejected::new("it is a symlink and has content"));
        };
        inflate.push(bytes, &mut self.buffer, |output| {
            self.left = self.left.checked_sub(output.len() as u64).ok_or_else(too_much)?;
            self.hasher.update(output);
            Ok(())
        })
    }

    fn finish(mut self) -> Result<Checksum, Rejected> {
        if let (Some(inflate), Some(held)) = (&self.inflate, self.held) {
            inflate.check_last(held, &mut self.buffer)?;
        }
        if let Some(held) = self.held {
            self.inflate(&[held])?;
        }
        if self.inflate.is_some_and(|inflate| !inflate.ended) {
            return Err(Rejected::new("its deflate stream is not complete"));
        }
        if self.left != 0 {
            return Err(Rejected::new(format!("its content is {} bytes shorter than its header says", self.left)));
        }
        Ok(self.hasher.checksum())
    }
}

fn too_much() -> Rejected {
    Rejected::new("its content is longer than its header says")
}

/// A raw deflate stream (RFC 1951).
#[derive(Clone)]
struct Inflate {
    state: Box<InflateState>,
    ended: bool,
}

impl Inflate {
    fn new() -> Self {
        Self { state: InflateState::new_boxed(DataFormat::Raw), ended: false }
    }

    /// Inflates all of `input`, handing the output on in parts.
    fn push(
        &mut self,
        mut input: &[u8],
        buffer: &mut [u8],
        mut output: impl FnMut(&[u8]) -> Result<(), Rejected>,
    ) -> Result<(), Rejected> {
        loop {
            if self.ended {
                let rest = if input.is_empty() { Ok(()) } else { Err("it has bytes after its deflate stream") };
                return rest.map_err(Rejected::new);
            }
            let result = inflate(&mut self.state, input, buffer, MZFlush::None);
            input = &input[result.bytes_consumed..];
            output(&buffer[..result.bytes_written])?;
            match result.status {
                Ok(MZStatus::StreamEnd) => self.ended = true,
                Ok(_) if input.is_empty() && result.bytes_written < buffer.len() => return Ok(()),
                Ok(_) => {}
                // Nothing is left to be done with an empty input.
                Err(MZError::Buf) if input.is_empty() => return Ok(()),
                Err(error) => return Err(Rejected::new(format!("its deflate stream is damaged ({error:?})"))),
            }
        }
    }

    /// The bits of the last byte that follow the stream's end must be zero. The
    /// inflater does not tell where the stream ended. If the highest bit that is
    /// set is such a bit, then neither it nor those above it matter for what comes
    /// out; if it is not, the last bit of the end-of-block code is at or above it,
    /// and turning that one over always matters.
    fn check_last(&self, last: u8, buffer: &mut [u8]) -> Result<(), Rejected> {
        let mut outcome = |byte: u8| {
            let mut copy = self.clone();
            let mut hasher = Hasher::new();
            let result = copy.push(&[byte], buffer, |output| {
                hasher.update(output);
                Ok(())
            });
            result.is_ok().then(|| (copy.ended, hasher.digest()))
        };
        let expected: Option<(bool, Digest)> = outcome(last);
        let Some(highest) = last.checked_ilog2() else { return Ok(()) };
        if (highest..8).all(|bit| outcome(last ^ (1 << bit)) == expected) {
            return Err(Rejected::new("the bits after its deflate stream are not zero"));
        }
        Ok(())
    }
}
