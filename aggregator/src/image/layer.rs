//! A layer: the entries of its index, in the index's order, as a canonical tar in
//! stored gzip. Its size is known before the first byte is written, and what is
//! written holds to it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::tarball::{self, END, Kind};
use oscontainer_program::progress::Progress;

use super::index::{self, Index};
use super::output::Output;
use super::stored_gzip::{self, StoredGzip};

/// A layer in the output.
pub struct Layer {
    /// The digest of its tar, for the image's config.
    pub diff_id: Digest,
    /// The digest of the blob, for the image's manifest.
    pub digest: Digest,
    /// The blob's size in bytes.
    pub size: u64,
}

/// Where the content of a layer's entries comes from.
pub struct Contents<'a> {
    /// Opens the object `CHECKSUM.TYPE`.
    pub object: &'a dyn Fn(&str) -> Result<File>,
    /// Files that are open or in memory, by their path in the image.
    pub files: BTreeMap<String, Box<dyn Read + 'a>>,
}

/// Writes the layer that `index` describes into `output`.
///
/// # Errors
/// [`Rejected`] when an object has not the size that the index says; else when
/// something cannot be read or written.
pub fn write(output: &mut Output, index: &Index, mut contents: Contents<'_>) -> Result<Layer> {
    let own = index.to_bytes()?;
    let size = stored_gzip::size(index.tar_size(own.len() as u64));
    let progress = Progress::bytes(format!("writing layer {}", index.layer), Some(size));
    let mut written = None;
    let digest = output.blob(size, |blob| {
        let mut tar = Tar { out: StoredGzip::new(blob)?, progress: &progress };
        let (above, below) = index.directories();
        above.into_iter().try_for_each(|path| tar.directory(path))?;
        tar.file(&tarball::header(&index.path(), Kind::File(own.len() as u64)), own.len() as u64, &own[..])?;
        below.into_iter().try_for_each(|path| tar.directory(path))?;
        for (name, size) in &index.objects {
            let path = index::object_path(name);
            let file = (contents.object)(name)?;
            tar.file(&tarball::header(&path, Kind::File(*size)), *size, file)
                .with_context(|| format!("reading object {name}"))?;
        }
        for entry in &index.files {
            let content = contents.files.remove(&entry.path).with_context(|| format!("{} is missing", entry.path))?;
            let header = if entry.executable {
                tarball::executable(&entry.path, entry.size)
            } else {
                tarball::header(&entry.path, Kind::File(entry.size))
            };
            tar.file(&header, entry.size, content).with_context(|| format!("writing {}", entry.path))?;
        }
        tar.out.write_all(&END)?;
        Ok(written.insert(tar.out.finish()?).file)
    })?;
    let written = written.context("a layer was not written")?;
    ensure!(written.size == size, "layer {} has {} bytes, not {size}", index.layer, written.size);
    Ok(Layer { diff_id: written.content, digest, size })
}

struct Tar<'a, W> {
    out: StoredGzip<W>,
    progress: &'a Progress,
}

impl<W: Write> Tar<'_, W> {
    fn directory(&mut self, path: &str) -> Result<()> {
        self.out.write_all(&tarball::header(path, Kind::Directory)).context("writing a layer")
    }

    fn file(&mut self, header: &[u8], size: u64, content: impl Read) -> Result<()> {
        self.out.write_all(header)?;
        // One byte more than expected would be seen.
        let copied = std::io::copy(&mut content.take(size + 1), &mut self.out)?;
        if copied != size {
            return Err(Rejected::new(format!(
                "the file had {size} bytes when its size was taken and has others now: something writes to it"
            ))
            .into());
        }
        self.out.write_all(&[0; tarball::BLOCK][..tarball::padding(size)])?;
        self.progress.add(header.len() as u64 + size);
        Ok(())
    }
}
