//! Events about the Job that this process runs in: its stages, how it ended, with which
//! digest. They are for people and for machines (docs/kubernetes.md has the reasons), and
//! no Event is worth a failed Job: what goes wrong here is only logged.

use std::time::{Duration, Instant};

use clap::Args;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use oscontainer_program::{exit, stop};
use tokio::runtime::Runtime;

/// The least time between two Events of stages; one that comes sooner is left out. How a
/// Job ended is always told.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long the API server may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The same after a signal, when this process has some ten seconds left in all.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// The longest note that the API takes is 1 KiB (events.k8s.io/v1, Event).
const MAX_NOTE: usize = 1000;
/// Who reports.
const CONTROLLER: &str = "oscontainer-builder";

/// The Job that this process runs in, as the downward API names it.
#[derive(Debug, Clone, Args)]
pub struct EventOptions {
    /// The Kubernetes Job that this runs in: its Events tell the stages and the result
    #[arg(long, value_name = "NAME", env = "OSCONTAINER_JOB")]
    job: Option<String>,
    /// That Job's uid
    #[arg(long, value_name = "UID", env = "OSCONTAINER_JOB_UID", requires = "job")]
    job_uid: Option<String>,
}

impl EventOptions {
    /// The Job's uid, where there is one.
    pub fn job_uid(&self) -> Option<&str> {
        self.job_uid.as_deref()
    }
}

/// Writes Events about one Job, or nothing.
pub struct Reporter {
    target: Option<Target>,
    last: Option<Instant>,
}

struct Target {
    runtime: Runtime,
    client: Client,
    job: ObjectReference,
}

impl Reporter {
    /// One for the Job of the options; one that is silent where there is none, or no cluster.
    pub fn new(options: &EventOptions) -> Self {
        let target = options.job.as_ref().and_then(|job| {
            Target::new(job, options.job_uid.as_ref())
                .inspect_err(|error| tracing::warn!("no Events are written: {}", exit::chain(error)))
                .ok()
        });
        Self { target, last: None }
    }

    /// A stage begins. `reason` is its name, one word in CamelCase.
    pub fn stage(&mut self, reason: &str, note: &str) {
        if self.last.is_some_and(|last| last.elapsed() < INTERVAL) {
            return;
        }
        self.last = Some(Instant::now());
        self.write("Normal", reason, note);
    }

    /// The Job has done something that lasts.
    pub fn done(&self, reason: &str, note: &str) {
        self.write("Normal", reason, note);
    }

    /// The Job fails.
    pub fn failed(&self, reason: &str, note: &str) {
        self.write("Warning", reason, note);
    }

    fn write(&self, kind: &str, reason: &str, note: &str) {
        let Some(target) = &self.target else { return };
        let event = target.event(kind, reason, note);
        let api: Api<Event> = Api::default_namespaced(target.client.clone());
        let written = target.runtime.block_on(async {
            let parameters = PostParams::default();
            let stopped = async {
                stop::stopped().await;
                tokio::time::sleep(LAST_WORDS).await;
            };
            tokio::select! {
                written = tokio::time::timeout(TIMEOUT, api.create(&parameters, &event)) => written.ok(),
                () = stopped => None,
            }
        });
        match written {
            Some(Ok(_)) => {}
            Some(Err(error)) => tracing::warn!("writing an Event: {}", exit::chain(&super::told(error))),
            None => tracing::warn!("writing an Event: no answer in time"),
        }
    }
}

impl Target {
    fn new(job: &str, uid: Option<&String>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(super::connect(None))?;
        let job = ObjectReference {
            api_version: Some("batch/v1".to_owned()),
            kind: Some("Job".to_owned()),
            name: Some(job.to_owned()),
            namespace: Some(client.default_namespace().to_owned()),
            uid: uid.cloned(),
            ..ObjectReference::default()
        };
        Ok(Self { runtime, client, job })
    }

    fn event(&self, kind: &str, reason: &str, note: &str) -> Event {
        let mut note = note.to_owned();
        note.truncate(note.floor_char_boundary(MAX_NOTE));
        let job = self.job.name.as_deref().unwrap_or_default();
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{job}.{}{}", super::suffix(), super::suffix())),
                namespace: self.job.namespace.clone(),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(Timestamp::now())),
            type_: Some(kind.to_owned()),
            reason: Some(reason.to_owned()),
            action: Some(reason.to_owned()),
            note: Some(note),
            regarding: Some(self.job.clone()),
            reporting_controller: Some(CONTROLLER.to_owned()),
            // In a Pod, the Pod's name.
            reporting_instance: Some(std::env::var("HOSTNAME").unwrap_or_else(|_| CONTROLLER.to_owned())),
            ..Event::default()
        }
    }
}
