//! What is attached to an image in a registry: the list of packages and the provenance, each
//! as an artifact whose subject is the image's manifest (OCI image specification 1.1,
//! "Guidelines for Artifact Usage"). Registries without the referrers API get the list of
//! them under the tag `sha256-DIGEST` (OCI distribution specification 1.1, "Referrers Tag Schema").

use std::collections::HashMap;

use anyhow::Result;
use oci_spec::image::{ANNOTATION_CREATED, Descriptor, ImageIndex, ImageManifestBuilder, MediaType};
use oscontainer_artifact::digest::Digest;

use super::document;
use super::facts::{Commit, PREDICATE};
use super::input::digest;
use super::parallel::in_order;
use super::registry::Registry;
use super::registry_output::{RegistryOutput, change_index};

/// SPDX as JSON (IANA's registry of media types).
const SPDX: &str = "application/spdx+json";
/// An in-toto statement (in-toto attestation framework, "Bundle").
const IN_TOTO: &str = "application/vnd.in-toto+json";
/// The annotation that says which of our documents one is.
const OURS: &str = "oscontainer.document";
/// What an artifact without a config has as its config (OCI image specification).
const EMPTY: &[u8] = b"{}";

/// A document that is to be attached.
pub struct Document {
    media_type: MediaType,
    blob: Descriptor,
    annotations: HashMap<String, String>,
}

/// Gives the documents of `commit` for the `image` to `output`, where they wait.
///
/// # Errors
/// When `output` cannot store what waits there already.
pub fn prepare(output: &mut RegistryOutput, image: &Digest, commit: &Commit) -> Result<Vec<Document>> {
    let annotation = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let created = annotation(ANNOTATION_CREATED, &commit.created);
    let predicate = annotation("in-toto.io/predicate-type", PREDICATE);
    let documents = [
        (SPDX, commit.sbom(), HashMap::from([annotation(OURS, "packages"), created.clone()])),
        (IN_TOTO, commit.provenance(Some(image)), HashMap::from([annotation(OURS, "provenance"), created, predicate])),
    ];
    output.add(Digest::of(EMPTY), EMPTY.to_vec())?;
    let prepare = |(media_type, content, annotations): (&str, _, _)| {
        let (media_type, bytes) = (MediaType::Other(media_type.to_owned()), document::bytes(&content)?);
        let digest = Digest::of(&bytes);
        let blob = document::descriptor(media_type.clone(), bytes.len() as u64, digest)?;
        output.add(digest, bytes)?;
        Ok(Document { media_type, blob, annotations })
    };
    documents.into_iter().map(prepare).collect()
}

/// Attaches `documents`, which the registry has, to the image that `subject` describes, which need not
/// be there yet.
///
/// # Errors
/// When the registry does not take them.
pub fn attach(registry: &Registry, subject: &Descriptor, documents: Vec<Document>) -> Result<()> {
    let image = digest(subject)?;
    let config = document::descriptor(MediaType::EmptyJSON, EMPTY.len() as u64, Digest::of(EMPTY))?;
    let entries = in_order(documents.len(), documents.len(), |number| {
        let Document { media_type, blob, annotations } = &documents[number];
        let manifest = ImageManifestBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageManifest)
            .artifact_type(media_type.clone())
            .config(config.clone())
            .layers(vec![blob.clone()])
            .subject(subject.clone())
            .annotations(annotations.clone())
            .build()?;
        let bytes = document::bytes(&manifest)?;
        registry.push_manifest(&bytes, &MediaType::ImageManifest, None)?;
        let mut entry = document::descriptor(MediaType::ImageManifest, bytes.len() as u64, Digest::of(&bytes))?;
        entry.set_artifact_type(Some(media_type.clone()));
        entry.set_annotations(Some(annotations.clone()));
        Ok(entry)
    })?;
    match registry.referrers(&image)? {
        Some(listed) if entries.iter().all(|entry| listed.contains(&entry.digest().to_string())) => Ok(()),
        _ => list(registry, &image.to_string().replace(':', "-"), &entries),
    }
}

/// Adds `entries` to the list that `tag` names, where a registry without the referrers API has it.
fn list(registry: &Registry, tag: &str, entries: &[Descriptor]) -> Result<()> {
    match registry.tagged(tag)? {
        // Nobody knows the image yet, so nobody else attaches to it.
        None => registry.push_manifest(&add(None, entries)?, &MediaType::ImageIndex, Some(tag)),
        Some(_) => change_index(registry, tag, |found| add(found, entries)).map(|_| ()),
    }
}

/// The list `found` with `entries` in it, each in place of the one that we attached before; what others attached stays.
fn add(found: Option<&[u8]>, entries: &[Descriptor]) -> Result<Vec<u8>> {
    // What is no image index is nobody's list.
    let list = found.and_then(|bytes| Some((bytes, serde_json::from_slice::<ImageIndex>(bytes).ok()?)));
    let Some((bytes, mut index)) = list else { return document::bytes(&document::index(entries.to_vec())?) };
    let mut manifests = index.manifests().clone();
    if entries.iter().all(|entry| manifests.iter().any(|found| found.digest() == entry.digest())) {
        return Ok(bytes.to_vec());
    }
    manifests.retain(|found| ours(found).is_none() || entries.iter().all(|entry| ours(entry) != ours(found)));
    manifests.extend_from_slice(entries);
    index.set_manifests(manifests);
    document::bytes(&index)
}

/// Which of our documents an entry of a list is, if it is one.
fn ours(entry: &Descriptor) -> Option<&String> {
    entry.annotations().as_ref()?.get(OURS)
}
