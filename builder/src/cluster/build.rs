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
/// The same where it says nothing, as `image --max-layers` has it.
const DEFAULT_MAX_LAYERS: usize = 64;
/// The label of a build that names its BuildConfig.
const LABEL: &str = "openshift.io/build-config.name";

/// What is to be done for an artifact.
enum Choice {
    /// A build of this BuildConfig.
    Build(String),
    /// Nothing: the image has its commit.
    Nothing(Image),
}

/// Starts a build of the BuildConfig `name`, or of the one for updates where that goes: `buildconfigs/instantiate` takes
/// a BuildRequest and gives a Build.
///
/// # Errors
/// Rejected when the cluster has or allows no such thing.
pub async fn instantiate(client: &Client, namespace: &str, name: &str, published: &Published) -> Result<Started> {
    let name = match chosen(client, namespace, name, published).await? {
        Choice::Build(name) => name,
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

async fn chosen(client: &Client, namespace: &str, name: &str, published: &Published) -> Result<Choice> {
    let config = found(client, path(namespace, "build", &format!("buildconfigs/{name}"))).await?.unwrap_or_default();
    let annotations = &config["metadata"]["annotations"];
    let Some(next) = annotations[NEXT].as_str() else { return Ok(Choice::Build(name.to_owned())) };
    if !valid(next) {
        reject!("the annotation {NEXT} of the BuildConfig {name} says {next:?}, which is no name");
    }
    // Builds of one BuildConfig wait for each other, those of two do not: the older image could come last.
    for name in [name, next] {
        if runs(client, namespace, name).await? {
            tracing::info!("builds of {name} are under way, and this one waits for them");
            return Ok(Choice::Build(name.to_owned()));
        }
    }
    let image = tag(client, namespace, &config["spec"]["output"]["to"]).await?;
    let base = tag(client, namespace, &config["spec"]["strategy"]["dockerStrategy"]["from"]).await?;
    let most = annotations[MAX_LAYERS].as_str().and_then(|most| most.parse().ok()).unwrap_or(DEFAULT_MAX_LAYERS);
    let (image, base) = (image.unwrap_or_default(), base.unwrap_or_default());
    let label =
        |name: &str| image["image"]["dockerImageMetadata"]["Config"]["Labels"][name].as_str().unwrap_or_default();
    let (layers, below) = (layers(&image), layers(&base));
    let why = if image.is_null() {
        "there is none yet".to_owned()
    } else if label("ostree.ref") != published.ref_name {
        format!("the one there is has the ref {:?}", label("ostree.ref"))
    } else if below.is_empty() || !layers.starts_with(&below) {
        "the one there is began with another image of the aggregator".to_owned()
    } else if let Some(there) = Image::of(&image).filter(|_| label("ostree.commit") == published.commit) {
        tracing::info!("{} has the commit {} already", there.image, published.commit);
        return Ok(Choice::Nothing(there));
    } else if layers.len() > most {
        format!("the one there is has {} layers", layers.len())
    } else {
        return Ok(Choice::Build(next.to_owned()));
    };
    tracing::info!("the image begins anew: {why}");
    Ok(Choice::Build(name.to_owned()))
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

/// Whether a build of this BuildConfig has not ended.
async fn runs(client: &Client, namespace: &str, name: &str) -> Result<bool> {
    let selector = format!("builds?labelSelector={}%3D{name}", LABEL.replace('/', "%2F"));
    let list = found(client, path(namespace, "build", &selector)).await?.unwrap_or_default();
    let mut phases = list["items"].as_array().into_iter().flatten().map(|build| &build["status"]["phase"]);
    Ok(phases.any(|phase| ["New", "Pending", "Running"].iter().any(|unfinished| phase == unfinished)))
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

/// What is there; nothing where we may not know.
async fn found(client: &Client, path: String) -> Result<Option<Value>> {
    match ask(client, Request::get(path).body(Vec::new())).await {
        Ok(found) => Ok(Some(found)),
        Err(kube::Error::Api(status)) if [403, 404].contains(&status.code) => {
            tracing::info!("{}", status.message);
            Ok(None)
        }
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
