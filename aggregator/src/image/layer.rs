//! A layer: the entries of its index, in the index's order, as a canonical tar in
//! stored gzip. Its size is known before the first byte is written, and what is
//! written holds to it; what is read is compared with it.

use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::object::ObjectName;
use oscontainer_artifact::tarball::{self, END, Kind};
use oscontainer_program::progress::Progress;
use oscontainer_program::reject;

use super::index::{self, Budget, DIRECTORY, Entry, Index};
use super::output::Output;
use super::previous::damaged;
use super::stored_gzip::{self, Hashing, StoredGzip};

/// A layer in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// The digest of its tar, for the image's config.
    pub diff_id: Digest,
    /// The digest of the blob, for the image's manifest.
    pub digest: Digest,
    /// The blob's size in bytes.
    pub size: u64,
}

/// Where the content of a layer's entries comes from.
pub trait Contents {
    /// Opens an object.
    ///
    /// # Errors
    /// When it cannot be read.
    fn object(&self, name: &ObjectName) -> Result<Box<dyn Read + '_>>;

    /// Opens another file by its path in the image.
    ///
    /// # Errors
    /// When it cannot be read.
    fn file(&self, path: &str) -> Result<Box<dyn Read + '_>>;
}

/// Writes the layer that `index` describes into `output`.
///
/// # Errors
/// [`Rejected`] when an object has not the size that the index says; else when
/// something cannot be read or written.
pub fn write(output: &mut Output, index: &Index, contents: &dyn Contents) -> Result<Layer> {
    let own = index.to_bytes()?;
    let size = stored_gzip::size(index.tar_size(own.len() as u64)?);
    let mut written = None;
    let digest = output.blob(size, &mut |blob| {
        let progress = Progress::bytes(format!("writing layer {}", index.layer), Some(size));
        let mut out = StoredGzip::new(blob)?;
        for entry in index.entries(own.len() as u64) {
            let header = index.header(entry);
            out.write_all(&header).context("writing a layer")?;
            match entry {
                Entry::Directory(_) => {}
                Entry::Index(size) => file(&mut out, size, &mut &own[..])?,
                Entry::Object(name, size) => {
                    let copied = contents.object(name).and_then(|mut content| file(&mut out, size, &mut content));
                    copied.with_context(|| format!("reading object {name}"))?;
                }
                Entry::File(entry) => {
                    let copied = contents.file(&entry.path);
                    let copied = copied.and_then(|mut content| file(&mut out, entry.size, &mut content));
                    copied.with_context(|| format!("writing {}", entry.path))?;
                }
            }
            progress.add(header.len() as u64 + entry.size());
        }
        out.write_all(&END)?;
        Ok(written.insert(out.finish()?).file)
    })?;
    let written = written.context("a layer was not written")?;
    ensure!(written.size == size, "layer {} has {} bytes, not {size}", index.layer, written.size);
    Ok(Layer { diff_id: written.content, digest, size })
}

fn file(out: &mut StoredGzip<impl Write>, size: u64, content: &mut dyn Read) -> Result<()> {
    // One byte more than expected would be seen.
    let copied = out.copy(&mut content.take(size + 1)).map_err(damaged)?;
    if copied != size {
        return Err(Rejected::new(format!(
            "the file had {size} bytes when its size was taken and has others now: something writes to it"
        ))
        .into());
    }
    Ok(out.write_all(&[0; tarball::BLOCK][..tarball::padding(size)])?)
}

/// Reads the index of layer number `number` from the start of its blob: the bytes, and
/// what they say. Nothing after it is read.
///
/// # Errors
/// Rejected when the layer does not start with an index, or with one for which `budget` has no room.
pub fn read_index(blob: impl Read, number: u32, budget: &Budget) -> Result<(Vec<u8>, Index)> {
    let mut tar = stored_gzip::Reader::new(blob).map_err(damaged)?;
    let path = index::path(number);
    // Directories above the index come before it.
    for _ in 0..=DIRECTORY.split('/').count() {
        let mut block = [0; tarball::BLOCK];
        tar.read_exact(&mut block).map_err(damaged)?;
        let header = tar::Header::from_byte_slice(&block);
        let name = header.path_bytes().into_owned();
        let above = String::from_utf8_lossy(&name);
        if DIRECTORY.starts_with(above.trim_end_matches('/'))
            && block[..] == tarball::header(above.trim_end_matches('/'), Kind::Directory)[..]
        {
            continue;
        }
        let size = header.entry_size().unwrap_or(u64::MAX);
        if size > index::MAX_SIZE || block[..] != tarball::header(&path, Kind::File(size))[..] {
            break;
        }
        budget.take(size)?;
        let mut bytes = Vec::new();
        tar.take(size).read_to_end(&mut bytes).map_err(damaged)?;
        let index = Index::parse(&bytes, number)?;
        return Ok((bytes, index));
    }
    reject!("its first file is not {path}, so it is not a layer of an oscontainer")
}

/// Reads a whole layer and compares it with its `index`, whose bytes are `own`, and
/// with the digests that the image has for it. What the objects hold is not looked at.
///
/// # Errors
/// Rejected when they differ.
pub fn compare(blob: impl Read, index: &Index, own: &[u8], expected: &Layer) -> Result<()> {
    let progress = Progress::bytes(format!("reading layer {}", index.layer), Some(expected.size));
    let file = Hashing::new(blob)?;
    let mut tar = Hashing::new(stored_gzip::Reader::new(file).map_err(damaged)?)?;
    let mut buffer = vec![0; 256 << 10];
    for entry in index.entries(own.len() as u64) {
        let header = index.header(entry);
        let mut found = vec![0; header.len()];
        tar.read_exact(&mut found).map_err(damaged)?;
        if found != header {
            reject!("its content is not what its index says: {} is expected", index.path_of(entry));
        }
        let mut hasher = oscontainer_artifact::digest::Hasher::new();
        let mut left = entry.size();
        while left > 0 {
            let length = left.min(buffer.len() as u64) as usize;
            tar.read_exact(&mut buffer[..length]).map_err(damaged)?;
            if matches!(entry, Entry::File(_) | Entry::Index(_)) {
                hasher.update(&buffer[..length]);
            }
            left -= length as u64;
        }
        let wanted = match entry {
            Entry::File(file) => Some(file.digest),
            Entry::Index(_) => Some(Digest::of(own)),
            _ => None,
        };
        if wanted.is_some_and(|wanted| wanted != hasher.digest()) {
            reject!("its content is not what its index says: {} is another", index.path_of(entry));
        }
        let padding = &mut buffer[..tarball::padding(entry.size())];
        tar.read_exact(padding).map_err(damaged)?;
        if padding.iter().any(|b| *b != 0) {
            reject!("its content is not what its index says: {} is not padded with zeros", index.path_of(entry));
        }
        progress.add(header.len() as u64 + entry.size());
    }
    let mut end = END;
    tar.read_exact(&mut end).map_err(damaged)?;
    if end != END {
        reject!("its content goes on after what its index says");
    }
    let (diff_id, content) = tar.finish()?;
    let (digest, _) = content.finish().map_err(damaged)?.finish()?;
    let found = Layer { diff_id, digest, size: expected.size };
    if found != *expected {
        reject!("its digests are {digest} and {diff_id}, the image says {} and {}", expected.digest, expected.diff_id);
    }
    Ok(())
}
