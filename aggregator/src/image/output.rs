//! Where an image is written to: a layout or a registry.

use std::io::{self, Write};

use anyhow::Result;
use oci_spec::image::MediaType;
use oscontainer_artifact::digest::Digest;
use oscontainer_program::exit::Usage;

use super::facts::Commit;
use super::layer::Layer;
use super::layout_output::LayoutOutput;
use super::previous::Previous;
use super::reference::Reference;
use super::registry::Registries;
use super::registry_output::RegistryOutput;
use super::stored_gzip::Hashing;
use super::{document, input};

/// Writes the bytes of a blob and gives their digest; the same each time it is called.
pub type WriteBlob<'a> = &'a mut dyn FnMut(&mut dyn Write) -> Result<Digest>;

/// An image that is being written.
pub enum Output {
    /// A directory or an archive.
    Layout(LayoutOutput),
    /// A repository of a registry.
    Registry(Box<RegistryOutput>),
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
        Ok(Self::Registry(Box::new(RegistryOutput::new(registries.open(name, true)?))))
    }

    /// Makes sure that images for several machines can be under its name, long before this one is.
    ///
    /// # Errors
    /// [`Usage`] when there is an image for one; else when it cannot be read.
    pub fn takes_machines(&self) -> Result<()> {
        let named = match self {
            Self::Layout(layout) => layout.named()?,
            Self::Registry(registry) => registry.named()?,
        };
        document::growing(named.as_deref()).map(drop)
    }

    /// Stores a blob of exactly `size` bytes. For a registry a large one is written twice: once for its
    /// digest, and then, unless the registry has it, into the upload; so it never lies on a disk.
    ///
    /// # Errors
    /// Those of `write`, and when the blob cannot be stored.
    pub fn blob(&mut self, size: u64, write: WriteBlob<'_>) -> Result<Digest> {
        match self {
            Self::Layout(layout) => layout.blob(size, write),
            Self::Registry(registry) => registry.blob(size, write),
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
            Self::Registry(registry) => registry.keep(previous, layer, &mut write),
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
        let machine = document::platform(descriptor, architecture)?;
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
            Self::Registry(registry) => index = registry.finish(manifest, &machine, commit, in_index)?,
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
