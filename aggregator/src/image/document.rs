//! The image's JSON documents. The same input gives the same bytes: keys are sorted,
//! and every time in them is the commit's.

use std::collections::HashMap;

use anyhow::{Context, Result};
use oci_spec::image::{
    ANNOTATION_BASE_IMAGE_DIGEST, ANNOTATION_CREATED, ANNOTATION_DESCRIPTION, ANNOTATION_REVISION, ANNOTATION_TITLE,
    ANNOTATION_VERSION, ConfigBuilder, Descriptor, HistoryBuilder, ImageConfiguration, ImageConfigurationBuilder,
    ImageIndex, ImageIndexBuilder, ImageManifest, ImageManifestBuilder, MediaType, Os, PlatformBuilder, RootFsBuilder,
};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::exit::Usage;
use serde::Serialize;

use super::facts::Commit;
use super::index::REPO;
use super::layer::Layer;

/// The server in the image.
pub const SERVER: &str = "usr/bin/oscontainer-aggregator";
/// Who runs the server unless the pod says otherwise: nobody that exists anywhere.
const USER: &str = "65532:65532";
/// Where the server listens. With IPv6 switched off it takes IPv4 alone.
const LISTEN: &str = "[::]:8080";
const PORT: &str = "8080/tcp";
const PROGRAM: &str = concat!("oscontainer-aggregator ", env!("CARGO_PKG_VERSION"));

/// `document` as JSON with sorted keys: oci-spec keeps labels and annotations in hash
/// maps, whose order differs from run to run.
///
/// # Errors
/// None that can happen: all keys are strings.
pub fn bytes(document: &impl Serialize) -> Result<Vec<u8>> {
    let mut value = serde_json::to_value(document).context("writing a JSON document of the image")?;
    value.sort_all_objects();
    Ok(serde_json::to_vec(&value)?)
}

/// The image's config; `base` is the image whose layers it goes on with. The options are in the environment, so that a pod can set
/// them otherwise.
///
/// # Errors
/// None that can happen: every required field is given.
pub fn config(
    commit: &Commit,
    base: Option<&Digest>,
    architecture: &str,
    layers: &[Layer],
) -> Result<ImageConfiguration> {
    let history = (0..layers.len()).map(|layer| {
        HistoryBuilder::default()
            .created(commit.created.clone())
            .created_by(format!("{PROGRAM} image: layer {layer}"))
            .build()
    });
    let config = ConfigBuilder::default()
        .user(USER)
        .exposed_ports([PORT.to_owned()])
        .env(["PATH=/usr/bin".to_owned(), format!("OSCONTAINER_REPO=/{REPO}"), format!("OSCONTAINER_LISTEN={LISTEN}")])
        .entrypoint([format!("/{SERVER}"), "serve".to_owned()])
        .working_dir("/")
        .labels(labels(commit, base))
        .build()?;
    let root = RootFsBuilder::default()
        .typ("layers")
        .diff_ids(layers.iter().map(|layer| layer.diff_id.to_string()).collect::<Vec<_>>())
        .build()?;
    Ok(ImageConfigurationBuilder::default()
        .created(commit.created.clone())
        .architecture(architecture)
        .os(Os::Linux)
        .config(config)
        .rootfs(root)
        .history(history.collect::<Result<Vec<_>, _>>()?)
        .build()?)
}

/// The image's manifest; its annotations are the config's labels.
///
/// # Errors
/// None that can happen: every required field is given.
pub fn manifest(commit: &Commit, base: Option<&Digest>, config: Descriptor, layers: &[Layer]) -> Result<ImageManifest> {
    let layers = layers.iter().map(|layer| descriptor(MediaType::ImageLayerGzip, layer.size, layer.digest));
    Ok(ImageManifestBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageManifest)
        .config(config)
        .layers(layers.collect::<Result<Vec<_>>>()?)
        .annotations(labels(commit, base))
        .build()?)
}

/// A descriptor of a blob.
///
/// # Errors
/// None that can happen: a digest of ours is one of OCI's.
pub fn descriptor(media_type: MediaType, size: u64, digest: Digest) -> Result<Descriptor> {
    let digest: oci_spec::image::Digest = digest.to_string().parse()?;
    Ok(Descriptor::new(media_type, size, digest))
}

/// The manifest's descriptor with the platform, as an index has it.
///
/// # Errors
/// None that can happen: every required field is given.
pub fn platform(mut manifest: Descriptor, architecture: &str) -> Result<Descriptor> {
    manifest.set_platform(Some(PlatformBuilder::default().architecture(architecture).os(Os::Linux).build()?));
    Ok(manifest)
}

/// The image index `current`, which images for several machines go into; an empty one where there is none.
///
/// # Errors
/// [`Usage`] when `current` is no image index.
pub fn growing(current: Option<&[u8]>) -> Result<ImageIndex> {
    match current.map(serde_json::from_slice::<ImageIndex>) {
        None => index(Vec::new()),
        Some(Ok(index)) => Ok(index),
        Some(Err(_)) => Err(Usage("there is an image for one machine under that name: name another tag".into()).into()),
    }
}

/// The image index `current`, with `manifest` in it: in place of the one for the same machine, if there is
/// one. `manifest` has its platform.
///
/// # Errors
/// Those of [`growing`].
pub fn add_to_index(current: Option<&[u8]>, manifest: Descriptor) -> Result<Vec<u8>> {
    let mut index = growing(current)?;
    let mut manifests = index.manifests().clone();
    manifests.retain(|other| machine(other) != machine(&manifest));
    manifests.push(manifest);
    // Whoever comes first, the index is the same.
    let place = |manifest: &Descriptor| manifest.platform().as_ref().map(|p| p.architecture().to_string());
    manifests.sort_by_key(|manifest| (place(manifest), manifest.digest().to_string()));
    index.set_manifests(manifests);
    // Docker's list is the same but for this.
    index.set_media_type(Some(MediaType::ImageIndex));
    bytes(&index)
}

/// The machine that a manifest in an image index is for: system, architecture and, unless it is what everybody means
/// who names none, variant (containerd, `platforms/normalize.go`).
pub fn machine(manifest: &Descriptor) -> Option<(String, String, Option<String>)> {
    let platform = manifest.platform().as_ref()?;
    let (system, architecture) = (platform.os().to_string(), platform.architecture().to_string());
    let usual = match architecture.as_str() {
        "amd64" => "v1",
        "arm64" => "v8",
        "arm" => "v7",
        _ => "",
    };
    let variant = platform.variant().clone().filter(|variant| variant != usual && !variant.is_empty());
    Some((system, architecture, variant))
}

/// An image index of `manifests`.
///
/// # Errors
/// None that can happen: every required field is given.
pub fn index(manifests: Vec<Descriptor>) -> Result<ImageIndex> {
    Ok(ImageIndexBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageIndex)
        .manifests(manifests)
        .build()?)
}

fn labels(commit: &Commit, base: Option<&Digest>) -> HashMap<String, String> {
    let checksum = commit.checksum.to_string();
    let mut labels = vec![
        (ANNOTATION_CREATED, commit.created.clone()),
        (ANNOTATION_REVISION, checksum.clone()),
        (ANNOTATION_TITLE, commit.ref_name.clone()),
        ("ostree.commit", checksum),
        ("ostree.ref", commit.ref_name.clone()),
    ];
    if let Some(version) = &commit.version {
        labels.extend([(ANNOTATION_VERSION, version.clone()), ("version", version.clone())]);
    }
    if !commit.subject.is_empty() {
        labels.push((ANNOTATION_DESCRIPTION, commit.subject.clone()));
    }
    if let Some(digest) = base {
        labels.push((ANNOTATION_BASE_IMAGE_DIGEST, digest.to_string()));
    }
    labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
