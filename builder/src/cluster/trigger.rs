//! What comes after publishing: an OpenShift build, or a Job made of the suspended CronJob
//! that is its template. Either is told the artifact's URL and digest; what they make is decided by nothing else.

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use clap::Args;
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{Container, EnvVar};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, ResourceExt};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::{reject, stop};

use super::{build, jobs, patiently, told};
use crate::cluster::follow::Watched;
use crate::publish::Published;

/// The variables, and build arguments, that name the artifact.
pub const URL: &str = "ARTIFACT_URL";
pub const DIGEST: &str = "ARTIFACT_DIGEST";
/// Digits of a digest in a Job's name, which has at most 63 letters.
const DIGITS: usize = 10;

/// What is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An OpenShift BuildConfig is instantiated.
    BuildConfig(String),
    /// A Job is made of a CronJob.
    CronJob(String),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some(("buildconfig", name)) if valid(name) => Ok(Self::BuildConfig(name.to_owned())),
            Some(("cronjob", name)) if valid(name) => Ok(Self::CronJob(name.to_owned())),
            _ => Err("expected buildconfig/NAME or cronjob/NAME".to_owned()),
        }
    }
}

/// Whether it can be the name of an object, and one part of a URL.
pub fn valid(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() <= 253
        && name.bytes().all(|b| letter(b) || b"-.".contains(&b))
        && name.bytes().next().is_some_and(letter)
        && name.bytes().last().is_some_and(letter)
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuildConfig(name) => write!(f, "buildconfig/{name}"),
            Self::CronJob(name) => write!(f, "cronjob/{name}"),
        }
    }
}

/// What `run` starts when it is done.
#[derive(Debug, Clone, Args)]
pub struct TriggerOptions {
    /// Start the aggregation in the cluster: buildconfig/NAME (OpenShift), or cronjob/NAME, of which a Job
    /// is made
    #[arg(long, value_name = "KIND/NAME", env = "OSCONTAINER_TRIGGER")]
    trigger: Option<Target>,
    /// Where that is [default: this Pod's namespace]
    #[arg(long, value_name = "NAMESPACE", requires = "trigger", env = "OSCONTAINER_TRIGGER_NAMESPACE")]
    trigger_namespace: Option<String>,
}

impl TriggerOptions {
    /// Starts what is to be started, for the Job with the uid `by`; gives its name, if there was anything to do.
    ///
    /// # Errors
    /// As [`start`].
    pub fn start(&self, published: &Published, by: Option<&str>) -> Result<Option<String>> {
        let Some(target) = &self.trigger else { return Ok(None) };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
        runtime.block_on(stop::or(async {
            let client = super::connect(None).await?;
            let namespace = self.trigger_namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
            Ok(match start(&client, &namespace, target, (published, by)).await? {
                Started::Follow(watched) => Some(format!("{watched} in {namespace}")),
                Started::Before(_) => None,
            })
        }))
    }
}

/// What was published, and the uid of the Job that composed it, if it was one.
type Composed<'a> = (&'a Published, Option<&'a str>);

/// An image in a cluster's registry.
pub struct Image {
    /// Its name, with the digest.
    pub image: String,
    /// The digest.
    pub digest: String,
}

/// What comes of starting an aggregation.
pub enum Started {
    /// What is to be followed.
    Follow(Watched),
    /// Nothing: this image has the artifact already.
    Before(Image),
}

/// Starts `target` in `namespace` for what was published.
///
/// # Errors
/// Rejected when the cluster has or allows no such thing.
pub async fn start(client: &Client, namespace: &str, target: &Target, composed: Composed<'_>) -> Result<Started> {
    let started = match target {
        Target::BuildConfig(name) => build::instantiate(client, namespace, name, composed.0).await,
        Target::CronJob(name) => make_job(client, namespace, name, composed).await.map(Started::Follow),
    };
    let started = started.with_context(|| format!("starting {target} in {namespace}"))?;
    if let Started::Follow(watched) = &started {
        tracing::info!("started {watched} in {namespace}");
    }
    Ok(started)
}

/// A Job of the CronJob's template. Its name ends in a digest of the artifact's and of who
/// composed it: a second try by the same compose Job makes no second one, and every other compose
/// Job aggregates again, which is cheap where nothing is new, and sets the mirror right.
async fn make_job(client: &Client, namespace: &str, name: &str, composed: Composed<'_>) -> Result<Watched> {
    let cron_jobs: Api<CronJob> = Api::namespaced(client.clone(), namespace);
    let template = patiently(async || cron_jobs.get(name).await).await.map_err(told)?;
    let job = job_of(&template, name, composed)?;
    let job_name = job.name_any();
    let api: Api<Job> = Api::namespaced(client.clone(), namespace);
    let (parameters, tries) = (PostParams::default(), Cell::new(0));
    let made = patiently(async || {
        tries.update(|tries| tries + 1);
        api.create(&parameters, &job).await
    });
    let before = match made.await {
        Ok(_) => false,
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
            tracing::info!("{namespace} has the Job {job_name} already, for the same artifact and compose Job");
            // After the first try it is most likely ours: an answer got lost.
            tries.get() == 1
        }
        Err(error) => return Err(told(error)),
    };
    Ok(Watched { before, ..Watched::job(job_name) })
}

fn job_of(cron_job: &CronJob, name: &str, (published, by): Composed<'_>) -> Result<Job> {
    let Some(template) = cron_job.spec.as_ref().map(|spec| spec.job_template.clone()) else {
        reject!("the CronJob {name} has no spec");
    };
    // Nobody's: a Job for each run.
    let by = by.map_or_else(super::suffix, str::to_owned);
    let digest = Digest::of(format!("{} {by}", published.manifest_digest).as_bytes()).hex();
    let end = &digest[..DIGITS];
    let start = &name[..name.len().min(63 - 1 - DIGITS)];
    let metadata = template.metadata.unwrap_or_default();
    let mut annotations = metadata.annotations.unwrap_or_default();
    // As `kubectl create job --from` does; then the CronJob's history limits count these Jobs.
    annotations.insert("cronjob.kubernetes.io/instantiate".to_owned(), "manual".to_owned());
    annotations.insert("oscontainer/artifact".to_owned(), published.manifest_digest.clone());
    let mut spec = template.spec.unwrap_or_default();
    let pod = spec.template.spec.as_mut().context("the CronJob's Job has no Pod")?;
    for container in pod.init_containers.iter_mut().flatten().chain(&mut pod.containers) {
        set(container, URL, &published.manifest_url);
        set(container, DIGEST, &published.manifest_digest);
    }
    Ok(Job {
        metadata: ObjectMeta {
            name: Some(format!("{start}-{end}")),
            namespace: cron_job.namespace(),
            labels: metadata.labels,
            annotations: Some(annotations),
            owner_references: cron_job.uid().map(|uid| {
                vec![OwnerReference {
                    api_version: "batch/v1".to_owned(),
                    kind: "CronJob".to_owned(),
                    name: name.to_owned(),
                    uid,
                    controller: Some(true),
                    // To block its deletion one would have to be allowed to update it.
                    block_owner_deletion: None,
                }]
            }),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        ..Job::default()
    })
}

fn set(container: &mut Container, name: &str, value: &str) {
    let variables = container.env.get_or_insert_default();
    variables.retain(|variable| variable.name != name);
    // First: `args` and later variables may refer to it.
    variables.insert(0, EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None });
}

impl Watched {
    /// A Job, whose Pods have its name as a label.
    pub fn job(name: String) -> Self {
        Self { pods: format!("batch.kubernetes.io/job-name={name}"), resource: jobs(), name, before: false }
    }
}
