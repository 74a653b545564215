//! The image before: its manifest, its config and its layers' indexes, checked
//! against each other. Its layers stay as they are; the next image adds to them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};

use anyhow::{Context, Result};
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};
use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::object::ObjectName;
use oscontainer_artifact::tarball;
use oscontainer_program::reject;

use super::container;
use super::index::{Entry, Index};
use super::input::{Input, digest};
use super::layer::{self, Layer};
use super::parallel::in_order;
use super::reference::Reference;
use super::registry::Registries;
use super::section::Section;
use super::stored_gzip;
use crate::verify::Check;

/// The most layers that are read: four times what `--max-layers` allows.
const MAX_LAYERS: usize = 500;
/// How many layers' indexes are read from a registry at a time.
const AT_ONCE: usize = 8;

/// An image that is read.
pub struct Previous {
    /// The digest of its manifest.
    pub digest: Digest,
    /// The manifest as it is.
    pub manifest: Vec<u8>,
    /// The config as it is.
    pub config: Vec<u8>,
    /// OCI's name of the machine that it is for.
    pub architecture: String,
    /// Its layers, from the first.
    pub layers: Vec<Kept>,
    input: Input,
    reference: Reference,
}

/// A layer that was checked.
pub struct Kept {
    /// Its digests and its size.
    pub layer: Layer,
    /// What it holds.
    pub index: Index,
    /// Bytes of the index; nothing for a layer that a container build made.
    own: Option<u64>,
}

/// Where objects lie.
pub struct Places {
    places: HashMap<ObjectName, Place>,
    /// Objects out of layers that a container build made, for these are compressed.
    spool: Option<File>,
}

/// Where an object starts, and its size in bytes.
#[derive(Clone, Copy)]
enum Place {
    /// In the tar of a layer.
    Layer(usize, u64, u64),
    Spool(u64, u64),
}

impl Previous {
    /// Opens the image at `reference`; of several machines' the one for `architecture`.
    /// Of each layer the index is read and compared with what the manifest and the config say;
    /// all of it is read in a layout, and in a registry if `verify` says so.
    ///
    /// # Errors
    /// [`oscontainer_program::exit::Usage`] when there is no such image; rejected when
    /// it is not an oscontainer or not whole.
    pub fn open(reference: &Reference, registries: &Registries<'_>, verify: bool, architecture: &str) -> Result<Self> {
        let read = || {
            let input = Input::open(reference, registries)?;
            Self::read(input, reference, verify, architecture)
        };
        read().with_context(|| format!("reading the previous image {reference}"))
    }

    fn read(input: Input, reference: &Reference, verify: bool, architecture: &str) -> Result<Self> {
        let (mut image, mut manifest_bytes) = input.image(reference)?;
        if *image.media_type() == MediaType::ImageIndex {
            image = for_machine(&manifest_bytes, architecture)?;
            manifest_bytes = input.manifest(&image)?;
        }
        if *image.media_type() != MediaType::ImageManifest {
            reject!("it is of the type {}, not an OCI image manifest", image.media_type());
        }
        let manifest: ImageManifest = parse(&manifest_bytes, "manifest")?;
        let config_bytes = input.document(manifest.config())?;
        let config: ImageConfiguration = parse(&config_bytes, "config")?;
        let (layers, diff_ids) = (manifest.layers(), config.rootfs().diff_ids());
        if layers.len() != diff_ids.len() {
            reject!("its manifest has {} layers, its config {}", layers.len(), diff_ids.len());
        }
        if layers.len() > MAX_LAYERS {
            reject!("it has {} layers; more than {MAX_LAYERS} are not read", layers.len());
        }
        if *config.os() != Os::Linux {
            reject!("it is for {}", config.os());
        }
        let described: Vec<_> = layers.iter().zip(diff_ids).collect();
        // Layers that are read whole keep the cores busy one by one.
        let whole = verify || matches!(input, Input::Layout(_));
        let kept = in_order(described.len(), if whole { 1 } else { AT_ONCE }, |number| {
            let (descriptor, diff_id) = described[number];
            read_layer(&input, number as u32, descriptor, diff_id, whole)
                .with_context(|| format!("reading layer {number}"))
        })?;
        if kept.is_empty() {
            reject!("it has no layers");
        }
        Ok(Self {
            digest: digest(&image)?,
            manifest: manifest_bytes,
            config: config_bytes,
            architecture: config.architecture().to_string(),
            layers: kept,
            input,
            reference: reference.clone(),
        })
    }

    /// The ref of its commits.
    ///
    /// # Errors
    /// Rejected when it has none, or several.
    pub fn ref_name(&self) -> Result<&str> {
        let mut names: Vec<_> = self.layers.iter().filter_map(|kept| kept.index.ref_name.as_deref()).collect();
        names.dedup();
        match names[..] {
            [name] => Ok(name),
            [] => reject!("the previous image {} holds no commit", self.reference),
            _ => reject!("the previous image {} holds several refs: {}", self.reference, names.join(", ")),
        }
    }

    /// The repository that it lies in, if it is one of a registry.
    pub fn repository(&self) -> Option<&oci_client::Reference> {
        match &self.reference {
            Reference::Registry(reference) => Some(reference),
            _ => None,
        }
    }

    /// The bytes of a layer's blob.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn blob(&self, layer: &Layer) -> Result<Box<dyn Read + '_>> {
        self.input.blob(&layer.digest, layer.size, 0).with_context(|| format!("reading {}", self.reference))
    }

    /// Where each of `wanted` lies.
    ///
    /// # Errors
    /// When a layer cannot be read.
    pub fn places(&self, wanted: impl Fn(&ObjectName) -> bool) -> Result<Places> {
        let mut places = HashMap::new();
        let mut spool = None;
        for (number, Kept { layer, index, own }) in self.layers.iter().enumerate() {
            let Some(own) = own else {
                if index.objects.keys().any(&wanted) {
                    let mut file = match spool.take() {
                        Some(file) => file,
                        None => tempfile::tempfile().context("making a temporary file")?,
                    };
                    let found = container::extract(self.blob(layer)?, &wanted, &mut file)?;
                    spool = Some(file);
                    places.extend(found.into_iter().map(|(name, start, size)| (name, Place::Spool(start, size))));
                }
                continue;
            };
            for (entry, start) in positions(index, *own) {
                if let Entry::Object(name, size) = entry
                    && wanted(name)
                {
                    places.insert(*name, Place::Layer(number, start, size));
                }
            }
        }
        Ok(Places { places, spool })
    }

    /// The object `name` at one of [`Self::places`]. Its checksum is verified while it is read.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn object<'a>(&'a self, name: ObjectName, places: &'a Places) -> Result<Box<dyn Read + 'a>> {
        let place = places.places.get(&name).with_context(|| format!("object {name} is not in {}", self.reference))?;
        let input: Box<dyn Read> = match *place {
            Place::Layer(layer, start, size) => self.content(layer, start, size)?,
            Place::Spool(start, size) => {
                let spool = places.spool.as_ref().context("there is no temporary file")?;
                Box::new(Section::new(spool, start, size))
            }
        };
        Ok(Box::new(Checked { input, check: Some(Check::new(name)) }))
    }

    /// The content of the file `path` in layer number `layer`; its digest is verified.
    ///
    /// # Errors
    /// Rejected when it is not what the index says.
    pub fn file(&self, layer: usize, path: &str) -> Result<Vec<u8>> {
        let kept = &self.layers[layer];
        let file = kept.index.files.iter().find(|file| file.path == path);
        let file = file.with_context(|| format!("{path} is not in {}", self.reference))?;
        let bytes = match kept.own {
            None => container::file(self.blob(&kept.layer)?, path)?,
            Some(own) => {
                let entries = positions(&kept.index, own).into_iter();
                let start = entries.filter(|(entry, _)| matches!(entry, Entry::File(found) if *found == file));
                let start = start.map(|(_, start)| start).next().context("finding a file")?;
                let mut bytes = Vec::new();
                self.content(layer, start, file.size)?.read_to_end(&mut bytes).map_err(damaged)?;
                bytes
            }
        };
        if Digest::of(&bytes) != file.digest {
            reject!("{path} in {} is not what the layer's index says", self.reference);
        }
        Ok(bytes)
    }

    /// `size` bytes of the layer's tar from `start` on.
    fn content(&self, layer: usize, start: u64, size: u64) -> Result<Box<dyn Read + '_>> {
        let Layer { digest, size: whole, .. } = self.layers[layer].layer;
        let (block, within) = stored_gzip::locate(start);
        let blob = self.input.blob(&digest, whole, block)?;
        let mut content = stored_gzip::Reader::at_block(blob);
        std::io::copy(&mut content.by_ref().take(within), &mut std::io::sink()).map_err(damaged)?;
        Ok(Box::new(content.take(size)))
    }
}

/// The index of layer number `number` and all that the layer says of itself, which is compared with all of the
/// layer if `whole` says so.
fn read_layer(input: &Input, number: u32, descriptor: &Descriptor, diff_id: &str, whole: bool) -> Result<Kept> {
    if *descriptor.media_type() != MediaType::ImageLayerGzip {
        reject!("it is of the type {}, so it is not a layer of an oscontainer", descriptor.media_type());
    }
    let expected = Layer { digest: digest(descriptor)?, size: descriptor.size(), diff_id: diff_id.parse()? };
    let mut blob = input.blob(&expected.digest, expected.size, 0)?;
    let mut start = [0; stored_gzip::START];
    blob.read_exact(&mut start).map_err(damaged)?;
    let blob = start.chain(blob);
    if !stored_gzip::is_stored(&start) {
        let index = container::scan(blob, number, &expected)?;
        return Ok(Kept { layer: expected, index, own: None });
    }
    let (bytes, index) = layer::read_index(blob, number)?;
    let own = bytes.len() as u64;
    let implied = stored_gzip::size(index.tar_size(own)?);
    if implied != expected.size {
        reject!("it has {} bytes, but its index describes {implied}", expected.size);
    }
    if whole {
        layer::compare(input.blob(&expected.digest, expected.size, 0)?, &index, &bytes, &expected)?;
    }
    Ok(Kept { layer: expected, index, own: Some(own) })
}

/// Where the content of each entry starts in the layer's tar.
fn positions(index: &Index, own: u64) -> Vec<(Entry<'_>, u64)> {
    let mut position = 0;
    let place = |entry: Entry<'_>| {
        let start = position + index.header_size(entry) as u64;
        position = start + entry.size() + tarball::padding(entry.size()) as u64;
        start
    };
    let entries: Vec<_> = index.entries(own).collect();
    let starts: Vec<_> = entries.iter().copied().map(place).collect();
    entries.into_iter().zip(starts).collect()
}

/// The manifest for `architecture` of an image for several machines.
fn for_machine(bytes: &[u8], architecture: &str) -> Result<Descriptor> {
    let index: ImageIndex = parse(bytes, "image index")?;
    let fits = |image: &&Descriptor| {
        image
            .platform()
            .as_ref()
            .is_some_and(|platform| *platform.os() == Os::Linux && platform.architecture().to_string() == architecture)
    };
    match index.manifests().iter().find(fits) {
        Some(image) => Ok(image.clone()),
        None => reject!("it has no image for {architecture}"),
    }
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    match serde_json::from_slice(bytes) {
        Ok(document) => Ok(document),
        Err(e) => reject!("its {what} cannot be read: {e}"),
    }
}

/// What came from an image and is damaged or cut is rejected; other errors stay.
pub fn damaged(error: std::io::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::InvalidData => Rejected::new(error.to_string()).into(),
        ErrorKind::UnexpectedEof => Rejected::new("it ends too early").into(),
        _ => error.into(),
    }
}

/// An object that is verified while it is read.
struct Checked<R> {
    input: R,
    check: Option<Check>,
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.input.read(buffer)?;
        let invalid = |e: Rejected| std::io::Error::new(ErrorKind::InvalidData, e.to_string());
        if count > 0 {
            self.check.iter_mut().try_for_each(|check| check.update(&buffer[..count])).map_err(invalid)?;
        } else if !buffer.is_empty()
            && let Some(check) = self.check.take()
        {
            check.finish().map_err(invalid)?;
        }
        Ok(count)
    }
}
