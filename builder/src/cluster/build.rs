//! OpenShift's builds. A BuildConfig whose build begins with the aggregator's image may name another one, for updates,
//! whose build begins with the image that both make: that adds one layer, with what is new (docs/openshift.md).

use anyhow::Result;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, PostParams};
use kube::{Api, Client, ResourceExt};
use oscontainer_program::reject;
use serde_json::{Value, json};

use super::follow::Watched;
use super::trigger::{DIGEST, Image, Started, URL, valid};
use super::{patiently, told};
use crate::publish::Published;

/// OpenShift's resources: group, kind and plural.
const BUILD_CONFIG: [&str; 3] = ["build.openshift.io", "BuildConfig", "buildconfigs"];
const BUILD: [&str; 3] = ["build.openshift.io", "Build", "builds"];
const IMAGE_STREAM_TAG: [&str; 3] = ["image.openshift.io", "ImageStreamTag", "imagestreamtags"];
/// The annotation that names the BuildConfig for updates.
const NEXT: &str = "oscontainer/next";
/// The annotation that says how many layers an image may have that is added to.
const MAX_LAYERS: &str = "oscontainer/max-layers";
/// The same where it says nothing, as with `image --max-layers`.
const DEFAULT_MAX_LAYERS: usize = 64;
/// The label of an image that names the artifact in it (aggregator/Containerfile).
const ARTIFACT: &str = "oscontainer.artifact";
/// The label of a build that names its BuildConfig.
const LABEL: &str = "openshift.io/build-config.name";

/// What is to be done for an artifact.
enum Choice {
    /// A build of this BuildConfig.
    Build(String),
    /// A build that begins with the aggregator's image, for this reason.
    Anew(String),
    /// Nothing: this image has it.
    Nothing(Image),
}

/// Starts a build of the BuildConfig `name`, or of the one for updates where that goes: `buildconfigs/instantiate` takes
/// a BuildRequest and gives a Build.
///
/// # Errors
/// Rejected when the cluster has or allows no such thing.
pub async fn instantiate(client: &Client, namespace: &str, name: &str, published: &Published) -> Result<Started> {
    let choice = match choose(client, namespace, name, published).await {
        Ok(choice) => choice,
        Err(error) => Choice::Anew(error.downcast::<Forbidden>()?.0),
    };
    let name = match choice {
        Choice::Build(name) => name,
        Choice::Anew(why) => {
            tracing::info!("the image begins anew: {why}");
            name.to_owned()
        }
        Choice::Nothing(image) => return Ok(Started::Before(image)),
    };
    let body = json!({
        "apiVersion": "build.openshift.io/v1",
        "kind": "BuildRequest",
        "metadata": {"name": name, "namespace": namespace},
        "triggeredBy": [{"message": format!("oscontainer published {}", published.manifest_digest)}],
        "dockerStrategyOptions": {"buildArgs": [
            {"name": URL, "value": published.manifest_url},
            {"name": DIGEST, "value": published.manifest_digest},
            {"name": "REF", "value": published.ref_name},
            {"name": "COMMIT", "value": published.commit},
            {"name": "VERSION", "value": published.version},
        ]},
    });
    let (configs, parameters) = (api(client, namespace, BUILD_CONFIG), PostParams::default());
    // Where the answer got lost there are two builds; the second changes nothing.
    let started = patiently(async || configs.create_subresource("instantiate", &name, &parameters, &body).await);
    let build: Value = started.await.map_err(told)?;
    let Some(build) = build["metadata"]["name"].as_str() else {
        reject!("the cluster's answer names no build");
    };
    let pods = format!("openshift.io/build.name={build}");
    Ok(Started::Follow(Watched { resource: resource(BUILD), name: build.to_owned(), pods, before: false }))
}

/// What is to be done where the BuildConfig is `name`.
///
/// # Errors
/// [`Forbidden`] where we may not know, among others.
async fn choose(client: &Client, namespace: &str, name: &str, published: &Published) -> Result<Choice> {
    let configs = api(client, namespace, BUILD_CONFIG);
    let Some(config) = found(async || configs.get(name).await).await? else {
        // Starting it says so.
        return Ok(Choice::Build(name.to_owned()));
    };
    let annotations = config.annotations();
    let Some(next) = annotations.get(NEXT) else { return Ok(Choice::Build(name.to_owned())) };
    if !valid(next) {
        reject!("the annotation {NEXT} of the BuildConfig {name} says {next:?}, which is no name");
    }
    let most = match annotations.get(MAX_LAYERS).map(|most| most.parse()) {
        None => DEFAULT_MAX_LAYERS,
        Some(Ok(most)) => most,
        Some(Err(_)) => reject!("the annotation {MAX_LAYERS} of the BuildConfig {name} is no number"),
    };
    let spec = &config.data["spec"];
    let image = tag(client, namespace, &spec["output"]["to"]).await?;
    let base = tag(client, namespace, &spec["strategy"]["dockerStrategy"]["from"]).await?;
    let (layers, below) = (layers(image.as_ref()), layers(base.as_ref()));
    let labels = image.as_ref().map(|image| &image.data["image"]["dockerImageMetadata"]["Config"]["Labels"]);
    let label = |name: &str| labels.and_then(|labels| labels[name].as_str()).unwrap_or_default();
    if image.is_some() && label("ostree.ref") != published.ref_name {
        return Ok(Choice::Anew(format!("the one there is has the ref {:?}", label("ostree.ref"))));
    }
    if image.is_some() && (below.is_empty() || !layers.starts_with(&below)) {
        return Ok(Choice::Anew("the one there is began with another image of the aggregator".to_owned()));
    }
    // Builds of one BuildConfig wait for each other, those of two do not: the older image could come last.
    let (of_whole, of_next) = (builds_of(client, namespace, name).await?, builds_of(client, namespace, next).await?);
    for (name, builds) in [(name, &of_whole), (next, &of_next)] {
        if builds.iter().any(|build| is(build, &["New", "Pending", "Running"])) {
            tracing::info!("builds of {name} are under way, and this one waits for them");
            return Ok(Choice::Build(name.to_owned()));
        }
    }
    let Some(image) = &image else { return Ok(Choice::Anew("there is none yet".to_owned())) };
    if let Some(there) = Image::of(image).filter(|_| label(ARTIFACT) == published.manifest_digest) {
        tracing::info!("{} has the artifact {} already", there.image, published.manifest_digest);
        return Ok(Choice::Nothing(there));
    }
    if layers.len() >= most {
        return Ok(Choice::Anew(format!("the one there is has {} layers", layers.len())));
    }
    let failed =
        of_next.iter().filter(|build| is(build, &["Failed", "Error"])).map(ResourceExt::creation_timestamp).max();
    if failed.is_some() && failed >= of_next.iter().chain(&of_whole).map(ResourceExt::creation_timestamp).max() {
        return Ok(Choice::Anew(format!("the last build of {next} failed")));
    }
    Ok(Choice::Build(next.to_owned()))
}

fn is(build: &DynamicObject, phases: &[&str]) -> bool {
    build.data["status"]["phase"].as_str().is_some_and(|phase| phases.contains(&phase))
}

/// The digests of an ImageStreamTag's layers, the lowest first; none where OpenShift does not know them.
fn layers(tag: Option<&DynamicObject>) -> Vec<&str> {
    let layers = tag.and_then(|tag| tag.data["image"]["dockerImageLayers"].as_array());
    layers.into_iter().flatten().filter_map(|layer| layer["name"].as_str()).collect()
}

impl Image {
    /// The one of an ImageStreamTag.
    fn of(tag: &DynamicObject) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Some(Self {
            image: text(&tag.data["image"]["dockerImageReference"])?,
            digest: text(&tag.data["image"]["metadata"]["name"])?,
        })
    }
}

/// The builds of this BuildConfig.
async fn builds_of(client: &Client, namespace: &str, name: &str) -> Result<Vec<DynamicObject>> {
    // A label has 63 letters, and OpenShift cuts the name.
    let parameters = ListParams::default().labels(&format!("{LABEL}={}", &name[..name.len().min(63)]));
    let builds = api(client, namespace, BUILD);
    let list = found(async || builds.list(&parameters).await).await?;
    Ok(list.map(|list| list.items).unwrap_or_default())
}

/// The ImageStreamTag that a BuildConfig refers to, if it is one and is there.
async fn tag(client: &Client, namespace: &str, reference: &Value) -> Result<Option<DynamicObject>> {
    let Some(name) = reference["name"].as_str().filter(|_| reference["kind"] == "ImageStreamTag") else {
        return Ok(None);
    };
    let tags = api(client, reference["namespace"].as_str().unwrap_or(namespace), IMAGE_STREAM_TAG);
    found(async || tags.get(name).await).await
}

fn api(client: &Client, namespace: &str, kind: [&str; 3]) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &resource(kind))
}

fn resource([group, kind, plural]: [&str; 3]) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, "v1", kind), plural)
}

/// What we may not know.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Forbidden(String);

/// What is there.
///
/// # Errors
/// [`Forbidden`], among others.
async fn found<T>(ask: impl AsyncFn() -> kube::Result<T>) -> Result<Option<T>> {
    match patiently(ask).await {
        Ok(found) => Ok(Some(found)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(kube::Error::Api(status)) if status.code == 403 => Err(Forbidden(status.message.clone()).into()),
        Err(error) => Err(told(error)),
    }
}
