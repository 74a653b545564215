//! The image before: its manifest, its config and its layers' indexes, checked
//! against each other. Its layers stay as they are; the next image adds to them.

use std::cell::{RefCell, RefMut};
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
use super::document;
use super::index::{Budget, Entry, Index, MAX_FILE};
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

/// What Docker calls a manifest, an image index and a layer (distribution, "Image Manifest Version 2, Schema 2"):
/// the same documents, but for the names. OpenShift's builds make such images.
const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// Bytes of a layer that are read over rather than asked for anew behind them.
const NEAR: u64 = 1 << 20;

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
    is_oci: bool,
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

/// Which image is read.
pub struct Wanted<'a> {
    /// Where it is.
    pub reference: &'a Reference,
    /// Of several machines' the one for this.
    pub architecture: &'a str,
    /// Read all layers in a registry too.
    pub verify: bool,
    /// There need not be one.
    pub optional: bool,
    /// An image index need not have one for the machine.
    pub new_machine: bool,
}

/// Where objects lie, and the layers that are open for them.
pub struct Places<'a> {
    places: HashMap<ObjectName, Place>,
    /// Objects out of layers that a container build made, for these are compressed.
    spool: Option<File>,
    open: RefCell<HashMap<usize, Content<'a>>>,
}

/// The tar of a layer from a place on.
struct Content<'a> {
    tar: stored_gzip::Reader<Box<dyn Read + 'a>>,
    position: u64,
}

/// Where an object starts, and its size in bytes.
#[derive(Clone, Copy)]
enum Place {
    /// In the tar of a layer.
    Layer(usize, u64, u64),
    Spool(u64, u64),
}

impl Previous {
    /// Opens the image that is `wanted`, if there is one.
    /// Of each layer the index is read and compared with what the manifest and the config say;
    /// all of it is read in a layout, and in a registry if that is wanted.
    ///
    /// # Errors
    /// [`oscontainer_program::exit::Usage`] when there is no such image; rejected when
    /// it is not an oscontainer or not whole.
    pub fn open(wanted: &Wanted<'_>, registries: &Registries<'_>) -> Result<Option<Self>> {
        let read = || {
            let input = Input::open(wanted.reference, registries)?;
            Self::read(input, wanted)
        };
        read().with_context(|| format!("reading the previous image {}", wanted.reference))
    }

    fn read(input: Input, wanted: &Wanted<'_>) -> Result<Option<Self>> {
        let &Wanted { reference, architecture, verify, .. } = wanted;
        let (mut image, mut manifest_bytes) = match input.image(reference)? {
            Some(found) => found,
            None if wanted.optional => return Ok(None),
            None => reject!("there is no such image: the registry answered 404"),
        };
        if *image.media_type() == MediaType::ImageIndex || *image.media_type() == docker(LIST) {
            image = match for_machine(&manifest_bytes, architecture)? {
                Some(found) => found,
                None if wanted.new_machine => {
                    tracing::info!("the image index {reference} has no image for {architecture} yet");
                    return Ok(None);
                }
                None => {
                    reject!("it has no image for {architecture}: --index adds one, --fresh begins a new log of layers")
                }
            };
            manifest_bytes = input.manifest(&image)?;
        }
        if ![MediaType::ImageManifest, docker(MANIFEST)].contains(image.media_type()) {
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
        let budget = Budget::new();
        let kept = in_order(described.len(), if whole { 1 } else { AT_ONCE }, |number| {
            let (descriptor, diff_id) = described[number];
            expected(descriptor, diff_id)
                .and_then(|layer| read_layer(&input, number as u32, layer, &budget, whole))
                .with_context(|| format!("reading layer {number}"))
        })?;
        if kept.is_empty() {
            reject!("it has no layers");
        }
        Ok(Some(Self {
            digest: digest(&image)?,
            is_oci: *image.media_type() == MediaType::ImageManifest,
            manifest: manifest_bytes,
            config: config_bytes,
            architecture: config.architecture().to_string(),
            layers: kept,
            input,
            reference: reference.clone(),
        }))
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

    /// Whether its manifest is one of OCI, as all that are written here.
    pub fn is_oci(&self) -> bool {
        self.is_oci
    }

    /// Where it is.
    pub fn reference(&self) -> &Reference {
        &self.reference
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
        self.input
            .blob(&layer.digest, layer.size, (0, layer.size))
            .with_context(|| format!("reading {}", self.reference))
    }

    /// Where each of `wanted` lies.
    ///
    /// # Errors
    /// When a layer cannot be read.
    pub fn places(&self, wanted: impl Fn(&ObjectName) -> bool) -> Result<Places<'_>> {
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
        Ok(Places { places, spool, open: RefCell::default() })
    }

    /// The object `name` at one of [`Self::places`]. Its checksum is verified while it is read.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn object<'a, 'b>(&'a self, name: ObjectName, places: &'b Places<'a>) -> Result<Box<dyn Read + 'b>> {
        let Some(place) = places.places.get(&name) else { reject!("object {name} is not in {}", self.reference) };
        let input: Box<dyn Read> = match *place {
            Place::Layer(layer, start, size) => Box::new(Opened(self.seek(places, layer, start)?).take(size)),
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
        if file.size > MAX_FILE {
            reject!("{path} in {} has {} bytes, the limit is {MAX_FILE}", self.reference, file.size);
        }
        let bytes = match kept.own {
            None => container::file(self.blob(&kept.layer)?, path)?,
            Some(own) => {
                let entries = positions(&kept.index, own).into_iter();
                let start = entries.filter(|(entry, _)| matches!(entry, Entry::File(found) if *found == file));
                let start = start.map(|(_, start)| start).next().context("finding a file")?;
                let mut bytes = Vec::new();
                let content = self.content(layer, start, start + file.size)?;
                content.take(file.size).read_to_end(&mut bytes).map_err(damaged)?;
                bytes
            }
        };
        if Digest::of(&bytes) != file.digest {
            reject!("{path} in {} is not what the layer's index says", self.reference);
        }
        Ok(bytes)
    }

    /// A layer's tar at `start`: the one that is open, if that is not far away, for objects are asked for in the
    /// order in which they lie there.
    fn seek<'a, 'b>(&'a self, places: &'b Places<'a>, layer: usize, start: u64) -> Result<RefMut<'b, Content<'a>>> {
        let mut open = places.open.borrow_mut();
        let near = |content: &Content<'_>| start.checked_sub(content.position).is_some_and(|gap| gap <= NEAR);
        if !open.get(&layer).is_some_and(near) {
            open.insert(layer, self.content(layer, start, u64::MAX)?);
        }
        let content = RefMut::filter_map(open, |open| open.get_mut(&layer));
        let mut content = content.ok().context("opening a layer")?;
        content.skip_to(start)?;
        Ok(content)
    }

    /// A layer's tar from `start` to `end`; somewhat more may come.
    fn content(&self, layer: usize, start: u64, end: u64) -> Result<Content<'_>> {
        let Layer { digest, size, .. } = self.layers[layer].layer;
        let (block, within) = stored_gzip::locate(start);
        let blob = self.input.blob(&digest, size, (block, stored_gzip::end(end)))?;
        let mut content = Content { tar: stored_gzip::Reader::at_block(blob), position: start - within };
        content.skip_to(start)?;
        Ok(content)
    }
}

impl Content<'_> {
    fn skip_to(&mut self, start: u64) -> Result<()> {
        let gap = start - self.position;
        std::io::copy(&mut self.take(gap), &mut std::io::sink()).map_err(damaged)?;
        Ok(())
    }
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.tar.read(buffer)?;
        self.position += count as u64;
        Ok(count)
    }
}

/// A layer that is open for one object.
struct Opened<'a, 'b>(RefMut<'b, Content<'a>>);

impl Read for Opened<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

fn docker(media_type: &str) -> MediaType {
    MediaType::Other(media_type.to_owned())
}

/// What manifest and config say of a layer.
fn expected(descriptor: &Descriptor, diff_id: &str) -> Result<Layer> {
    if ![MediaType::ImageLayerGzip, docker(LAYER)].contains(descriptor.media_type()) {
        reject!("it is of the type {}, so it is not a layer of an oscontainer", descriptor.media_type());
    }
    Ok(Layer { digest: digest(descriptor)?, size: descriptor.size(), diff_id: diff_id.parse()? })
}

/// The index of layer number `number` and all that the layer says of itself, which is compared with all of the
/// layer if `whole` says so.
fn read_layer(input: &Input, number: u32, expected: Layer, budget: &Budget, whole: bool) -> Result<Kept> {
    let mut blob = input.blob(&expected.digest, expected.size, (0, expected.size))?;
    let mut start = [0; stored_gzip::START];
    blob.read_exact(&mut start).map_err(damaged)?;
    let blob = start.chain(blob);
    if !stored_gzip::is_stored(&start) {
        let index = container::scan(blob, number, &expected, budget)?;
        return Ok(Kept { layer: expected, index, own: None });
    }
    let (bytes, index) = layer::read_index(blob, number, budget)?;
    let own = bytes.len() as u64;
    let implied = stored_gzip::size(index.tar_size(own)?);
    if implied != expected.size {
        reject!("it has {} bytes, but its index describes {implied}", expected.size);
    }
    if whole {
        layer::compare(input.blob(&expected.digest, expected.size, (0, expected.size))?, &index, &bytes, &expected)?;
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

/// The manifest for `architecture` of an image for several machines, if there is one.
fn for_machine(bytes: &[u8], architecture: &str) -> Result<Option<Descriptor>> {
    let index: ImageIndex = parse(bytes, "image index")?;
    let wanted = Some((Os::Linux.to_string(), architecture.to_owned(), None));
    Ok(index.manifests().iter().find(|image| document::machine(image) == wanted).cloned())
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
