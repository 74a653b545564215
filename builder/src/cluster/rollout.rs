//! `rollout`: the last step of the aggregation Job. The mirror's Deployment gets the image
//! that was pushed, by its digest; an image that was not pushed is left where it is, and log
//! and Event say how to push it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use kube::api::{Patch, PatchParams};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::options::Global;
use oscontainer_program::{exit, outcome, reject};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::events::{EventOptions, Reporter};
use super::{connect, told};

/// What `rollout` takes.
#[derive(Debug, Clone, Args)]
pub struct RolloutArgs {
    /// The result of `oscontainer-aggregator image`, as its --result-file wrote it
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_IMAGE_RESULT")]
    image_result: PathBuf,
    /// The Deployment, in this Pod's namespace; its first container of the same name gets the image
    #[arg(long, value_name = "NAME", default_value = "mirror", env = "OSCONTAINER_DEPLOYMENT")]
    deployment: String,
    /// Write the result as one line of JSON, also after a failure (a pod's termination message)
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_RESULT_FILE")]
    result_file: Option<PathBuf>,
    #[command(flatten)]
    events: EventOptions,
}

/// Of the result of `image`, what matters here.
#[derive(Debug, Deserialize)]
struct Image {
    image: String,
    digest: Digest,
}

/// What `rollout` prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct RolledOut {
    /// Where the image is.
    image: String,
    /// The digest of its manifest.
    digest: Digest,
    /// The Deployment that runs it, if it was pushed.
    #[serde(skip_serializing_if = "Option::is_none")]
    deployment: Option<String>,
}

/// Sets the Deployment's image.
///
/// # Errors
/// When the result cannot be read, or the cluster refuses.
pub fn main(args: RolloutArgs, global: &Global) -> Result<()> {
    let reporter = Reporter::new(&args.events);
    let result = rollout(&args);
    match &result {
        Ok(RolledOut { image, digest, deployment: Some(deployment) }) => {
            reporter.done("RolledOut", &format!("Deployment {deployment} runs {image}@{digest}"));
        }
        Ok(RolledOut { image, digest, deployment: None }) => {
            let how = format!(
                "the image {digest} is in {image}; to push it: skopeo copy {image} docker://HOST/NAME:TAG; \
                 with the key `image` in a ConfigMap `oscontainer` this is done here"
            );
            tracing::info!("{how}");
            reporter.done("ImageReady", &how);
        }
        Err(error) => reporter.failed("RolloutFailed", &exit::chain(error)),
    }
    if let Some(file) = &args.result_file {
        outcome::write(file, &result)?;
    }
    global.print(&result?)
}

fn rollout(args: &RolloutArgs) -> Result<RolledOut> {
    let Image { image, digest } = read(&args.image_result)?;
    let Some(name) = image.strip_prefix("docker://") else {
        return Ok(RolledOut { image, digest, deployment: None });
    };
    // Without the tag: the digest decides.
    let tag = name.rfind(':').filter(|colon| !name[*colon..].contains('/'));
    let repository = &name[..tag.unwrap_or(name.len())];
    let pinned = format!("{repository}@{digest}");
    let container = json!({"name": args.deployment, "image": pinned});
    let image_patch = json!({"spec": {"template": {"spec": {"containers": [container]}}}});
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(async {
        let client = connect(None).await?;
        let api: Api<Deployment> = Api::default_namespaced(client);
        let patch = async |patch: &Value| {
            // Strategic: containers are merged by their names.
            let patched = api.patch(&args.deployment, &PatchParams::default(), &Patch::Strategic(patch)).await;
            patched.map_err(told).with_context(|| format!("setting the image of Deployment {}", args.deployment))
        };
        let patched = patch(&image_patch).await?;
        // As it was shipped; who wants more replicas has set their number.
        if patched.spec.and_then(|spec| spec.replicas) == Some(0) {
            patch(&json!({"spec": {"replicas": 1}})).await?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    tracing::info!("Deployment {} runs {pinned}", args.deployment);
    Ok(RolledOut { image: format!("docker://{repository}"), digest, deployment: Some(args.deployment.clone()) })
}

fn read(path: &Path) -> Result<Image> {
    let text = fs::read_to_string(path).with_context(|| format!("reading --image-result {}", path.display()))?;
    match serde_json::from_str(&text) {
        Ok(image) => Ok(image),
        Err(error) => reject!("{}: not the result of an image: {error}", path.display()),
    }
}
