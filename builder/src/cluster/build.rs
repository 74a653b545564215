//! OpenShift's builds. A BuildConfig whose build begins with the aggregator's image may name another one, for updates,
//! whose build begins with the image that both make: that adds one layer, with what is new (docs/openshift.md).

use anyhow::Result;
use axum::http::Request;
use kube::Client;
use oscontainer_program::reject;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::follow::Watched;
use super::trigger::{DIGEST, Image, Started, URL, valid};
use super::{builds, patiently, told};
use crate::publish::Published;

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
    let path = format!("{}/instantiate", path(namespace, "build", &format!("buildconfigs/{name}")));
    let request = Request::post(path).header("content-type", "application/json");
    // Where the answer got lost there are two builds; the second changes nothing.
    let build: Value = ask(client, request.body(body.to_string().into_bytes())).await.map_err(told)?;
    let Some(build) = build["metadata"]["name"].as_str() else {
        reject!("the cluster's answer names no build");
    };
    let pods = format!("openshift.io/build.name={build}");
    Ok(Started::Follow(Watched { resource: builds(), name: build.to_owned(), pods, before: false }))
}

/// What is to be done where the BuildConfig is `name`.
///
/// # Errors
/// [`Forbidden`] where we may not know, among others.
async fn choose(client: &Client, namespace: &str, name: &str, published: &Published) -> Result<Choice> {
    let Some(config) = found(client, path(namespace, "build", &format!("buildconfigs/{name}"))).await? else {
        // Starting it says so.
        return Ok(Choice::Build(name.to_owned()));
    };
    let annotations = &config["metadata"]["annotations"];
    let Some(next) = annotations[NEXT].as_str() else { return Ok(Choice::Build(name.to_owned())) };
    if !valid(next) {
        reject!("the annotation {NEXT} of the BuildConfig {name} says {next:?}, which is no name");
    }
    let most = match annotations[MAX_LAYERS].as_str().map(str::parse) {
        None => DEFAULT_MAX_LAYERS,
        Some(Ok(most)) => most,
        Some(Err(_)) => reject!("the annotation {MAX_LAYERS} of the BuildConfig {name} is no number"),
    };
    let image = tag(client, namespace, &config["spec"]["output"]["to"]).await?;
    let base = tag(client, namespace, &config["spec"]["strategy"]["dockerStrategy"]["from"]).await?.unwrap_or_default();
    let layers = image.as_ref().map(layers).unwrap_or_default();
    let label = |name: &str| {
        let image = image.as_ref().unwrap_or(&Value::Null);
        image["image"]["dockerImageMetadata"]["Config"]["Labels"][name].as_str().unwrap_or_default()
    };
    let below = self::layers(&base);
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
    let newest = |builds: &[Value]| builds.iter().map(made).max();
    let failed = of_next.iter().filter(|build| is(build, &["Failed", "Error"])).map(made).max();
    if failed.is_some() && failed >= newest(&of_next).max(newest(&of_whole)) {
        return Ok(Choice::Anew(format!("the last build of {next} failed")));
    }
    Ok(Choice::Build(next.to_owned()))
}

/// When a build was made, as the API writes it: later times are greater.
fn made(build: &Value) -> String {
    build["metadata"]["creationTimestamp"].as_str().unwrap_or_default().to_owned()
}

fn is(build: &Value, phases: &[&str]) -> bool {
    build["status"]["phase"].as_str().is_some_and(|phase| phases.contains(&phase))
}

/// The digests of an ImageStreamTag's layers, the lowest first; none where OpenShift does not know them.
fn layers(tag: &Value) -> Vec<&str> {
    let layers = tag["image"]["dockerImageLayers"].as_array().into_iter().flatten();
    layers.filter_map(|layer| layer["name"].as_str()).collect()
}

impl Image {
    /// The one of an ImageStreamTag.
    fn of(tag: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Some(Self {
            image: text(&tag["image"]["dockerImageReference"])?,
            digest: text(&tag["image"]["metadata"]["name"])?,
        })
    }
}

/// The builds of this BuildConfig.
async fn builds_of(client: &Client, namespace: &str, name: &str) -> Result<Vec<Value>> {
    // A label has 63 letters, and OpenShift cuts the name.
    let selector = format!("{}%3D{}", LABEL.replace('/', "%2F"), &name[..name.len().min(63)]);
    let list = found(client, path(namespace, "build", &format!("builds?labelSelector={selector}"))).await?;
    Ok(list.unwrap_or_default()["items"].as_array().cloned().unwrap_or_default())
}

/// The ImageStreamTag that a BuildConfig refers to, if it is one and is there.
async fn tag(client: &Client, namespace: &str, reference: &Value) -> Result<Option<Value>> {
    let Some(name) = reference["name"].as_str().filter(|_| reference["kind"] == "ImageStreamTag") else {
        return Ok(None);
    };
    let namespace = reference["namespace"].as_str().unwrap_or(namespace);
    found(client, path(namespace, "image", &format!("imagestreamtags/{name}"))).await
}

fn path(namespace: &str, group: &str, rest: &str) -> String {
    format!("/apis/{group}.openshift.io/v1/namespaces/{namespace}/{rest}")
}

/// What we may not know.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Forbidden(String);

/// What is there.
///
/// # Errors
/// [`Forbidden`], among others.
async fn found(client: &Client, path: String) -> Result<Option<Value>> {
    match ask(client, Request::get(path).body(Vec::new())).await {
        Ok(found) => Ok(Some(found)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(kube::Error::Api(status)) if status.code == 403 => Err(Forbidden(status.message.clone()).into()),
        Err(error) => Err(told(error)),
    }
}

async fn ask<T: DeserializeOwned>(
    client: &Client,
    request: axum::http::Result<Request<Vec<u8>>>,
) -> Result<T, kube::Error> {
    let request = request.map_err(kube::Error::HttpError)?;
    patiently(async || client.request(request.clone()).await).await
}
