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

/// SPDX as JSON (IANA's registry of media types).
const SPDX: &str = "application/spdx+json";
/// An in-toto statement (in-toto attestation framework, "Bundle").
const IN_TOTO: &str = "application/vnd.in-toto+json";
/// What an artifact without a config has as its config (OCI image specification).
const EMPTY: &[u8] = b"{}";

/// Attaches the documents of `commit` to the image that `subject` describes, which need not
/// be there yet.
///
/// # Errors
/// When the registry does not take them.
pub fn attach(registry: &Registry, subject: &Descriptor, commit: &Commit) -> Result<()> {
    let image = digest(subject)?;
    let created = (ANNOTATION_CREATED.to_owned(), commit.created.clone());
    let predicate = ("in-toto.io/predicate-type".to_owned(), PREDICATE.to_owned());
    let config = store(registry, MediaType::EmptyJSON, EMPTY)?;
    let documents = [
        (SPDX, commit.sbom(), HashMap::from([created.clone()])),
        (IN_TOTO, commit.provenance(Some(&image)), HashMap::from([created, predicate])),
    ];
    let entries = in_order(documents.len(), documents.len(), |number| {
        let (media_type, content, annotations) = &documents[number];
        let media_type = MediaType::Other((*media_type).to_owned());
        let layer = store(registry, media_type.clone(), &document::bytes(content)?)?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageManifest)
            .artifact_type(media_type.clone())
            .config(config.clone())
            .layers(vec![layer])
            .subject(subject.clone())
            .annotations(annotations.clone())
            .build()?;
        let bytes = document::bytes(&manifest)?;
        registry.push_manifest(&bytes, &MediaType::ImageManifest, None)?;
        let mut entry = document::descriptor(MediaType::ImageManifest, bytes.len() as u64, Digest::of(&bytes))?;
        entry.set_artifact_type(Some(media_type));
        entry.set_annotations(Some(annotations.clone()));
        Ok(entry)
    })?;
    let listed = registry.referrers(&image)?;
    if entries.iter().any(|entry| !listed.contains(&entry.digest().to_string())) {
        list(registry, &image, entries)?;
    }
    Ok(())
}

/// Adds `entries` to the list of what refers to `image`, in place of others of their types.
fn list(registry: &Registry, image: &Digest, entries: Vec<Descriptor>) -> Result<()> {
    let tag = image.to_string().replace(':', "-");
    let found = registry.tagged(&tag)?;
    // What is no image index is nobody's list.
    let index = found.and_then(|bytes| serde_json::from_slice::<ImageIndex>(&bytes).ok());
    let mut manifests = index.map(|index| index.manifests().clone()).unwrap_or_default();
    manifests.retain(|found| entries.iter().all(|entry| entry.artifact_type() != found.artifact_type()));
    manifests.extend(entries);
    registry.push_manifest(&document::bytes(&document::index(manifests)?)?, &MediaType::ImageIndex, Some(&tag))
}

fn store(registry: &Registry, media_type: MediaType, bytes: &[u8]) -> Result<Descriptor> {
    let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
    if !registry.has(&digest)? {
        registry.push(&digest, size, &mut |out| {
            out.write_all(bytes)?;
            Ok(digest)
        })?;
    }
    document::descriptor(media_type, size, digest)
}
