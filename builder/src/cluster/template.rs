//! The compose Job: `manifests/80-compose.yaml` itself, or another manifest of a Job, with
//! what `submit` changes in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Container, ProjectedVolumeSource, Volume};
use oscontainer_program::reject;
use serde::Deserialize;

/// The Job as `kubectl apply` takes it.
const MANIFEST: &str = include_str!("../../../manifests/80-compose.yaml");
/// The container that composes, and the volume that holds the treefile.
const CONTAINER: &str = "compose";
const VOLUME: &str = "treefile";

/// What a submitted Job has of its own.
pub struct Changes<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
    /// The treefile, relative to the volume.
    pub treefile: &'a str,
    /// What is in the volume.
    pub volume: ProjectedVolumeSource,
    /// The endpoint, if another than the template's.
    pub endpoint: Option<&'a str>,
    /// The builder's image, if another than the template's.
    pub image: Option<&'a str>,
    /// More arguments for `run`.
    pub arguments: &'a [String],
}

/// The one Job in a manifest; by default the built-in one.
///
/// # Errors
/// Rejected when there is none, or several.
pub fn read(path: Option<&Path>) -> Result<Job> {
    let (text, name) = match path {
        None => (MANIFEST.to_owned(), "the built-in manifest".to_owned()),
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("reading --template {}", path.display()))?;
            (text, path.display().to_string())
        }
    };
    let mut jobs = Vec::new();
    for document in serde_yaml::Deserializer::from_str(&text) {
        let parsed = serde_yaml::Value::deserialize(document);
        let value = match parsed {
            Ok(value) => value,
            Err(error) => reject!("{name}: {error}"),
        };
        if value.get("kind").and_then(serde_yaml::Value::as_str) == Some("Job") {
            match serde_yaml::from_value::<Job>(value) {
                Ok(job) => jobs.push(job),
                Err(error) => reject!("{name}: the Job: {error}"),
            }
        }
    }
    match <[Job; 1]>::try_from(jobs) {
        Ok([job]) => Ok(job),
        Err(jobs) => reject!("{name} has {} Jobs: expected one", jobs.len()),
    }
}

/// The Job of `template` with these changes.
///
/// # Errors
/// Rejected when the template has no container `compose` with a volume `treefile`.
pub fn apply(mut template: Job, changes: Changes<'_>) -> Result<Job> {
    template.metadata.name = Some(changes.name.to_owned());
    template.metadata.namespace = Some(changes.namespace.to_owned());
    let Some(pod) = template.spec.as_mut().and_then(|spec| spec.template.spec.as_mut()) else {
        reject!("the template's Job has no Pod");
    };
    let Some(volume) = pod.volumes.iter_mut().flatten().find(|volume| volume.name == VOLUME) else {
        reject!("the template's Job has no volume {VOLUME}");
    };
    *volume = Volume { name: VOLUME.to_owned(), projected: Some(changes.volume), ..Volume::default() };
    let Some(container) = pod.containers.iter_mut().find(|container| container.name == CONTAINER) else {
        reject!("the template's Job has no container {CONTAINER}");
    };
    let mounts = container.volume_mounts.iter().flatten();
    let Some(directory) = mounts.clone().find(|mount| mount.name == VOLUME).map(|mount| mount.mount_path.clone())
    else {
        reject!("the template's container {CONTAINER} does not mount the volume {VOLUME}");
    };
    if let Some(image) = changes.image {
        container.image = Some(image.to_owned());
    }
    arguments(container, &format!("{directory}/{}", changes.treefile), changes.endpoint, changes.arguments)?;
    Ok(template)
}

/// `run TREEFILE …`: with this treefile and endpoint, and nothing that it would start, for
/// `submit` does that.
fn arguments(container: &mut Container, treefile: &str, endpoint: Option<&str>, more: &[String]) -> Result<()> {
    let arguments = container.args.get_or_insert_default();
    if arguments.first().map(String::as_str) != Some("run") || arguments.len() < 2 {
        reject!("the template's container {CONTAINER} does not `run` a treefile");
    }
    treefile.clone_into(&mut arguments[1]);
    arguments.retain(|argument| !argument.starts_with("--trigger"));
    if let Some(endpoint) = endpoint {
        arguments.retain(|argument| !argument.starts_with("--endpoint="));
        arguments.push(format!("--endpoint={endpoint}"));
    }
    arguments.extend_from_slice(more);
    Ok(())
}

/// The labels by which objects are found.
pub fn labels(name: &str) -> BTreeMap<String, String> {
    let label = |key: &str, value: &str| (format!("app.kubernetes.io/{key}"), value.to_owned());
    BTreeMap::from([label("name", name), label("part-of", "oscontainer")])
}
