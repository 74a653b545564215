//! Where an image is read from: a layout or a registry.

use std::io::Read;

use anyhow::Result;
use oci_spec::image::{Descriptor, MediaType};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::reject;
use serde::Deserialize;

use super::document;
use super::layout::{self, Layout};
use super::reference::Reference;
use super::registry::{Registries, Registry};

/// The largest manifest, image index or config that is read, in bytes (OCI
/// distribution specification: registries should take manifests of 4 MiB).
pub const MAX_DOCUMENT: u64 = 4 << 20;

/// A place that images are read from.
pub enum Input {
    /// A directory or an archive.
    Layout(Layout),
    /// A repository of a registry.
    Registry(Box<Registry>),
}

impl Input {
    /// Opens the place where `reference` lies.
    ///
    /// # Errors
    /// [`oscontainer_program::exit::Usage`] when there is none.
    pub fn open(reference: &Reference, registries: &Registries<'_>) -> Result<Self> {
        Ok(match reference {
            Reference::Layout { path, .. } => Self::Layout(Layout::directory(path)?),
            Reference::Archive { path, .. } => Self::Layout(Layout::archive(path)?),
            Reference::Registry(reference) => Self::Registry(Box::new(registries.open(reference, false)?)),
        })
    }

    /// What `reference` names: a manifest or an image index; nothing if the registry has none. A tag is resolved
    /// once, here.
    ///
    /// # Errors
    /// When a layout has no such image, or its digest is wrong.
    pub fn image(&self, reference: &Reference) -> Result<Option<(Descriptor, Vec<u8>)>> {
        match (self, reference) {
            (Self::Layout(layout), Reference::Layout { tag, .. } | Reference::Archive { tag, .. }) => {
                let image = layout::choose(layout.images()?, tag.as_deref())?;
                let bytes = self.manifest(&image)?;
                Ok(Some((image, bytes)))
            }
            (Self::Registry(registry), _) => {
                let Some(bytes) = registry.find(registry.reference())? else { return Ok(None) };
                let media_type = media_type(&bytes)?;
                Ok(Some((document::descriptor(media_type, bytes.len() as u64, Digest::of(&bytes))?, bytes)))
            }
            _ => reject!("{reference} lies somewhere else"),
        }
    }

    /// A manifest or an image index by its descriptor, digest verified.
    ///
    /// # Errors
    /// Rejected when it is missing or damaged.
    pub fn manifest(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        match self {
            Self::Layout(_) => self.document(descriptor),
            Self::Registry(registry) => registry.manifest(&digest(descriptor)?),
        }
    }

    /// A blob that is a small JSON document, digest verified.
    ///
    /// # Errors
    /// Rejected when it is missing or damaged.
    pub fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let (expected, size) = (digest(descriptor)?, descriptor.size());
        if size > MAX_DOCUMENT {
            reject!("its document {expected} has {size} bytes, the limit is {MAX_DOCUMENT}");
        }
        let mut bytes = Vec::new();
        self.blob(&expected, size, (0, size))?.take(size + 1).read_to_end(&mut bytes)?;
        let found = Digest::of(&bytes);
        if found != expected {
            reject!("its document {expected} has the digest {found}");
        }
        Ok(bytes)
    }

    /// A blob of `size` bytes from one of its bytes to another; out of a layout more may come.
    ///
    /// # Errors
    /// Rejected when it is missing or has another size.
    pub fn blob(&self, digest: &Digest, size: u64, part: (u64, u64)) -> Result<Box<dyn Read + '_>> {
        match self {
            Self::Layout(layout) => layout.blob(digest, size, part.0),
            Self::Registry(registry) => Ok(registry.blob(digest, size, part)),
        }
    }
}

/// The digest in a descriptor.
///
/// # Errors
/// Rejected when it is no SHA-256.
pub fn digest(descriptor: &Descriptor) -> Result<Digest> {
    Ok(descriptor.digest().to_string().parse()?)
}

/// What a manifest says it is; OCI allows it to say nothing, and some tools say "".
fn media_type(bytes: &[u8]) -> Result<MediaType> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        #[serde(default)]
        media_type: String,
        manifests: Option<serde::de::IgnoredAny>,
    }
    match serde_json::from_slice::<Typed>(bytes) {
        Ok(Typed { media_type, .. }) if !media_type.is_empty() => Ok(media_type.as_str().into()),
        Ok(Typed { manifests: Some(_), .. }) => Ok(MediaType::ImageIndex),
        Ok(_) => Ok(MediaType::ImageManifest),
        Err(e) => reject!("its manifest cannot be read: {e}"),
    }
}
