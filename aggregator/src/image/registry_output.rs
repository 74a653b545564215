//! Writes an image into a repository of a registry. What fits into a chunk waits in memory until several such
//! blobs go at a time, for a registry takes its time for each; what is larger is made twice.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use oci_spec::image::{Descriptor, MediaType};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::exit;

use super::facts::Commit;
use super::layer::Layer;
use super::output::WriteBlob;
use super::parallel::in_order;
use super::previous::Previous;
use super::registry::{Mount, Registry};
use super::upload::CHUNK;
use super::{document, input, referrers};

/// How many blobs are uploaded at a time.
const AT_ONCE: usize = 5;
/// How often an image is added to an image index that others change.
const INDEX_TRIES: usize = 20;
/// The shortest pause before an image index is read again, and what is added to it at random at the most.
const INDEX_PAUSE: (Duration, u64) = (Duration::from_millis(100), 300);

/// An image that is being written.
pub struct RegistryOutput {
    /// Where it goes.
    pub registry: Registry,
    waiting: Vec<(Digest, Bytes)>,
    mount: Option<Mount>,
}

impl RegistryOutput {
    /// Begins an image in `registry`.
    pub fn new(registry: Registry) -> Self {
        Self { registry, waiting: Vec::new(), mount: None }
    }

    /// Stores a blob of exactly `size` bytes.
    ///
    /// # Errors
    /// Those of `write`, and when the blob cannot be stored.
    pub fn blob(&mut self, size: u64, write: WriteBlob<'_>) -> Result<Digest> {
        if size > CHUNK as u64 {
            let digest = write(&mut io::sink())?;
            if !self.registry.has(&digest)? {
                self.registry.push(&digest, size, None, &mut |upload| write(upload))?;
            }
            return Ok(digest);
        }
        let mut bytes = Vec::with_capacity(size as usize);
        let digest = write(&mut bytes)?;
        ensure!(bytes.len() as u64 == size, "a blob has {} bytes, not {size}", bytes.len());
        self.add(digest, bytes)?;
        Ok(digest)
    }

    /// The manifest or image index that the tag names already, if there is one.
    ///
    /// # Errors
    /// When the registry does not give it.
    pub fn named(&self) -> Result<Option<Vec<u8>>> {
        self.registry.tagged(self.registry.tag())
    }

    /// Lets a blob wait for others.
    ///
    /// # Errors
    /// When those that wait already cannot be stored, for they are enough.
    pub fn add(&mut self, digest: Digest, bytes: Vec<u8>) -> Result<()> {
        let waiting: usize = self.waiting.iter().map(|(_, bytes)| bytes.len()).sum();
        if waiting + bytes.len() > CHUNK {
            self.flush()?;
        }
        self.waiting.push((digest, bytes.into()));
        Ok(())
    }

    /// Stores what waits.
    ///
    /// # Errors
    /// When that cannot be done.
    pub fn flush(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        in_order(waiting.len(), AT_ONCE, |number| {
            let (digest, bytes) = &waiting[number];
            if self.registry.has(digest)? {
                return Ok(());
            }
            self.registry.push(digest, bytes.len() as u64, None, &mut |upload| {
                upload.send(bytes.clone())?;
                Ok(*digest)
            })
        })?;
        Ok(())
    }

    /// Takes a layer over from `previous`, which `write` copies where it has to move.
    ///
    /// # Errors
    /// When it cannot be read, or the registry does not take it.
    pub fn keep(&mut self, previous: &Previous, layer: &Layer, write: WriteBlob<'_>) -> Result<()> {
        let Self { registry, mount, .. } = self;
        let (here, from) = (registry.reference(), previous.repository());
        let same = from.filter(|from| from.registry() == here.registry());
        // Its index was just read there.
        let there = same.is_some_and(|from| from.repository() == here.repository());
        if there || registry.has(&layer.digest)? {
            return Ok(());
        }
        // An image has one previous one.
        if let (Some(from), None) = (same, &mount) {
            *mount = Some(registry.mount(from)?);
        }
        registry.push(&layer.digest, layer.size, mount.as_ref(), &mut |upload| write(upload))
    }

    /// Stores what waits and the `manifest` that `machine` describes, with the documents of `commit` where the
    /// registry takes them, under the tag that is meant or in the image index there; gives that one's digest.
    ///
    /// # Errors
    /// When the registry does not take them.
    pub fn finish(
        mut self,
        manifest: &[u8],
        machine: &Descriptor,
        commit: &Commit,
        in_index: bool,
    ) -> Result<Option<Digest>> {
        let documents = referrers::prepare(&mut self, &input::digest(machine)?, commit)?;
        self.flush()?;
        let Self { registry, .. } = self;
        // First, so that whoever sees the image finds them.
        let subject = document::descriptor(MediaType::ImageManifest, machine.size(), input::digest(machine)?)?;
        if let Err(error) = referrers::attach(&registry, &subject, documents) {
            tracing::warn!("the registry has not taken the attached documents: {}", exit::chain(&error));
        }
        let tag = (!in_index).then(|| registry.tag());
        registry.push_manifest(manifest, &MediaType::ImageManifest, tag)?;
        if in_index { add_to_index(&registry, machine).map(Some) } else { Ok(None) }
    }
}

/// Adds `manifest` to the image index that the tag names.
fn add_to_index(registry: &Registry, manifest: &Descriptor) -> Result<Digest> {
    let index = change_index(registry, registry.tag(), |current| document::add_to_index(current, manifest.clone()))?;
    Ok(Digest::of(&index))
}

/// Puts what `change` makes of the image index that `tag` names in its place, and looks twice whether it stays there: a
/// registry has no locks, and what another puts there at the same time may take its place. Gives what is there.
///
/// # Errors
/// Those of `change`; when the registry does not take it.
pub fn change_index(
    registry: &Registry,
    tag: &str,
    change: impl Fn(Option<&[u8]>) -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    let mut seen = 0;
    for _ in 0..INDEX_TRIES {
        let current = registry.tagged(tag)?;
        let index = change(current.as_deref())?;
        if current.as_ref() == Some(&index) {
            seen += 1;
            if seen == 2 {
                return Ok(index);
            }
        } else {
            seen = 0;
            registry.push_manifest(&index, &MediaType::ImageIndex, Some(tag))?;
        }
        let (least, more) = INDEX_PAUSE;
        let random = RandomState::new().hash_one(0);
        thread::sleep(least + Duration::from_millis(random % more));
    }
    bail!("the image index {tag} of {} changes all the time", registry.reference())
}
