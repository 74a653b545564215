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
use super::registry::{Attached, Registry};
use super::registry_output::RegistryOutput;

/// SPDX as JSON (IANA's registry of media types).
const SPDX: &str = "application/spdx+json";
/// An in-toto statement (in-toto attestation framework, "Bundle").
const IN_TOTO: &str = "application/vnd.in-toto+json";
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
    let created = (ANNOTATION_CREATED.to_owned(), commit.created.clone());
    let predicate = ("in-toto.io/predicate-type".to_owned(), PREDICATE.to_owned());
    let documents = [
        (SPDX, commit.sbom(), HashMap::from([created.clone()])),
        (IN_TOTO, commit.provenance(Some(image)), HashMap::from([created, predicate])),
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
        Attached::Listed(listed) if entries.iter().all(|entry| listed.contains(&entry.digest().to_string())) => Ok(()),
        Attached::Listed(_) => {
            let tag = tag(&image);
            list(registry, &tag, registry.tagged(&tag)?, entries)
        }
        Attached::Tagged(found) => list(registry, &tag(&image), found, entries),
    }
}

/// Where a registry without the referrers API has the list.
fn tag(image: &Digest) -> String {
    image.to_string().replace(':', "-")
}

/// Adds `entries` to the list that `tag` names, which is `found`, in place of others of their types.
fn list(registry: &Registry, tag: &str, found: Option<Vec<u8>>, entries: Vec<Descriptor>) -> Result<()> {
    // What is no image index is nobody's list.
    let index = found.as_ref().and_then(|bytes| serde_json::from_slice::<ImageIndex>(bytes).ok());
    let mut manifests = index.map(|index| index.manifests().clone()).unwrap_or_default();
    let has = |entry: &Descriptor| manifests.iter().any(|found| found.digest() == entry.digest());
    if entries.iter().all(has) {
        return Ok(());
    }
    manifests.retain(|found| entries.iter().all(|entry| entry.artifact_type() != found.artifact_type()));
    manifests.extend(entries);
    registry.push_manifest(&document::bytes(&document::index(manifests)?)?, &MediaType::ImageIndex, Some(tag))
}
