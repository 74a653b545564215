//! Where an image is written to: a layout or a registry.

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use oci_spec::image::{Descriptor, MediaType};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::exit::{self, Usage};

use super::facts::Commit;
use super::layer::Layer;
use super::layout_output::LayoutOutput;
use super::previous::Previous;
use super::reference::Reference;
use super::registry::{Registries, Registry};
use super::stored_gzip::Hashing;
use super::{document, input, referrers};

/// How often an image is added to an image index that others change.
const INDEX_TRIES: usize = 20;

/// Writes the bytes of a blob and gives their digest; the same each time it is called.
pub type WriteBlob<'a> = &'a mut dyn FnMut(&mut dyn Write) -> Result<Digest>;

/// An image that is being written.
pub enum Output {
    /// A directory or an archive.
    Layout(LayoutOutput),
    /// A repository of a registry.
    Registry(Box<Registry>),
}

impl Output {
    /// Begins an image at `reference`.
    ///
    /// # Errors
    /// [`Usage`] when something else lies there; else when it cannot be written.
    pub fn create(reference: &Reference, registries: &Registries<'_>) -> Result<Self> {
        let Reference::Registry(name) = reference else { return Ok(Self::Layout(LayoutOutput::create(reference)?)) };
        if name.digest().is_some() {
            return Err(Usage(format!("--output {reference} names a digest: name a tag")).into());
        }
        Ok(Self::Registry(Box::new(registries.open(name, true)?)))
    }

    /// Stores a blob of exactly `size` bytes. For a registry it is written twice: once for its
    /// digest, and then, unless the registry has it, into the upload; so it never lies on a disk.
    ///
    /// # Errors
    /// Those of `write`, and when the blob cannot be stored.
    pub fn blob(&mut self, size: u64, write: WriteBlob<'_>) -> Result<Digest> {
        match self {
            Self::Layout(layout) => layout.blob(size, write),
            Self::Registry(registry) => {
                let digest = write(&mut io::sink())?;
                if !registry.has(&digest)? {
                    registry.push(&digest, size, write)?;
                }
                Ok(digest)
            }
        }
    }

    /// Takes a layer over from `previous`: nothing moves where it is there already, or the
    /// registry can mount it.
    ///
    /// # Errors
    /// Rejected when the layer is not what the previous image says.
    pub fn keep(&mut self, previous: &Previous, layer: &Layer) -> Result<()> {
        let mut write = |out: &mut dyn Write| {
            let mut blob = Hashing::new(previous.blob(layer)?)?;
            io::copy(&mut blob, out)?;
            let (digest, _) = blob.finish()?;
            if digest != layer.digest {
                oscontainer_program::reject!("its digest is {digest}");
            }
            Ok(digest)
        };
        match self {
            Self::Layout(layout) if layout.has(layer) => Ok(()),
            Self::Layout(layout) => layout.blob(layer.size, &mut write).map(|_| ()),
            Self::Registry(registry) => {
                let (here, from) = (registry.reference(), previous.repository());
                let same = from.filter(|from| from.registry() == here.registry());
                // Its index was just read there.
                let there = same.is_some_and(|from| from.repository() == here.repository());
                if there || registry.has(&layer.digest)? {
                    return Ok(());
                }
                if same.is_some_and(|from| registry.mount(from, &layer.digest)) {
                    return Ok(());
                }
                registry.push(&layer.digest, layer.size, &mut write)
            }
        }
    }

    /// Stores the manifest, attaches the commit's documents where that can be done, and makes the
    /// image visible under its name: by itself, or as one of an image index.
    ///
    /// # Errors
    /// When the result cannot be written.
    pub fn finish(self, manifest: &[u8], architecture: &str, commit: &Commit, in_index: bool) -> Result<Finished> {
        let digest = Digest::of(manifest);
        let descriptor = document::descriptor(MediaType::ImageManifest, manifest.len() as u64, digest)?;
        let machine = document::platform(descriptor.clone(), architecture)?;
        let mut index = None;
        match self {
            Self::Layout(mut layout) => {
                layout.blob(manifest.len() as u64, &mut |out| {
                    out.write_all(manifest)?;
                    Ok(digest)
                })?;
                let mut named = machine;
                if in_index {
                    named = layout.add_to_index(named)?;
                    index = Some(input::digest(&named)?);
                }
                layout.finish(named)?;
            }
            Self::Registry(registry) => {
                // First, so that whoever sees the image finds them.
                match referrers::attach(&registry, &descriptor, commit) {
                    Err(error) if exit::code(&error) == exit::REJECTED => {
                        tracing::warn!("the registry takes no attached documents: {}", exit::chain(&error));
                    }
                    attached => attached.context("attaching the documents of the commit")?,
                }
                if in_index {
                    registry.push_manifest(manifest, &MediaType::ImageManifest, None)?;
                    index = Some(add_to_index(&registry, &machine)?);
                } else {
                    registry.push_manifest(manifest, &MediaType::ImageManifest, Some(registry.tag()))?;
                }
            }
        }
        Ok(Finished { digest, index })
    }
}

/// An image that was written.
pub struct Finished {
    /// The digest of its manifest.
    pub digest: Digest,
    /// The digest of the image index that it is in.
    pub index: Option<Digest>,
}

/// Adds `manifest` to the image index that the tag names. A registry has no locks: what another
/// did at the same time is seen afterwards, and then it is done again.
fn add_to_index(registry: &Registry, manifest: &Descriptor) -> Result<Digest> {
    let mut written = None;
    for _ in 0..INDEX_TRIES {
        let current = registry.tagged(registry.tag())?;
        let index = document::add_to_index(current.as_deref(), manifest.clone())?;
        let digest = Digest::of(&index);
        if written == Some(digest) && current.as_deref() == Some(&index[..]) {
            return Ok(digest);
        }
        registry.push_manifest(&index, &MediaType::ImageIndex, Some(registry.tag()))?;
        written = Some(digest);
    }
    bail!("the image index {} changes all the time", registry.reference())
}
