//! Follows a Job or an OpenShift build to its end: its Pods' logs, through restarts and
//! broken connections; what keeps it from starting; how it ended.

mod log;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures_util::stream::{BoxStream, select_all};
use futures_util::{StreamExt, future};
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, watcher};
use kube::runtime::{WatchStreamExt, watcher::Event as Watch};
use kube::{Api, Resource, ResourceExt};
use oscontainer_artifact::Rejected;
use oscontainer_program::exit;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::{Instant, interval, timeout};

use super::{Access, PATIENCE, Pauses, patiently, refused, told};
use log::{Log, Place};

/// How long the API server may refuse us (401, 403) when it did not before: while it starts,
/// or until the credential plugin has a new token.
const REFUSALS: Duration = Duration::from_secs(30);
/// How long the rest of the logs may take when all has ended.
const LAST_LINES: Duration = Duration::from_secs(60);
/// Why a container waits that will not start by itself soon.
const WAITS: [&str; 8] = [
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
];
/// What the API server and its admission say of Pods that they will never take.
const NEVER: [&str; 4] =
    ["ValidatingAdmissionPolicy", "violates PodSecurity", "security context constraint", "admission webhook"];

/// What the kubelet says wherever the Secret `registry` is not made; whether an image is missing it
/// says besides.
const NO_SECRET: &str = "FailedToRetrieveImagePullSecret";
/// Bytes that are shown of a termination message that is not JSON.
const MAX_TEXT: usize = 600;
/// What helps where the admission policy knows another image.
const OTHER_IMAGE: &str =
    "submit --template manifests/80-compose.yaml sends the Job as it was applied, --image its image";

/// What is followed.
#[derive(Debug, Clone)]
pub struct Watched {
    /// Its resource: Jobs or builds.
    pub resource: ApiResource,
    /// Its name.
    pub name: String,
    /// The label selector of its Pods.
    pub pods: String,
    /// Whether it was there before it was to be made.
    pub before: bool,
}

impl Watched {
    /// Whether it is an OpenShift build, and no Job.
    pub fn is_build(&self) -> bool {
        self.resource.kind == "Build"
    }
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.resource.kind, self.name)
    }
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// Whether it did what it was to do.
    pub success: bool,
    /// Why it ended, as the cluster says.
    pub reason: String,
    /// What the container that decided left.
    pub left: Left,
    /// The object as it is now.
    pub object: Value,
}

/// What a container left at its end.
#[derive(Debug, Default)]
pub struct Left {
    /// The termination message, if that was a JSON object.
    pub message: Value,
    /// What it says if it was not: the last lines of the log, as a rule.
    pub text: String,
    /// The exit code.
    pub code: Option<i32>,
}

impl Left {
    fn of(state: &ContainerStateTerminated) -> Self {
        let said = state.message.as_deref().unwrap_or_default();
        let message = serde_json::from_str(said).ok().filter(Value::is_object);
        let text = if message.is_some() { String::new() } else { shortened(said) };
        Self { message: message.unwrap_or_default(), text, code: Some(state.exit_code) }
    }
}

/// The end of a text in one line; that is where logs say what was wrong.
fn shortened(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let error = lines.iter().rposition(|line| line.contains("ERROR") || line.starts_with("error:"));
    let text = lines[error.unwrap_or(0)..].join("; ");
    let start = text.ceil_char_boundary(text.len().saturating_sub(MAX_TEXT));
    if start == 0 { text } else { format!("…{}", &text[start..]) }
}

/// Nothing started in time, or never will.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotStarted(String);

/// Follows `watched` until it has ended.
///
/// # Errors
/// [`NotStarted`] when no container runs for `start_timeout`, or the cluster will never
/// take its Pods; when it is deleted; when the API server refuses, or does not answer for long.
pub async fn follow(access: &Access, namespace: &str, watched: &Watched, start_timeout: Duration) -> Result<Ended> {
    let mut seen = streams(access, namespace, watched);
    let mut follower = Follower::new(access, namespace, watched);
    let mut tick = interval(Duration::from_secs(1));
    let ended = loop {
        tokio::select! {
            _ = tick.tick() => {
                follower.check_started(start_timeout)?;
                if std::mem::take(&mut follower.unknown) {
                    if let Err(error) = access.renew().await {
                        follower.tell(exit::chain(&error), false);
                    }
                    seen = streams(access, namespace, watched);
                }
            }
            next = seen.next() => {
                let next = next.context("the cluster's watches ended")?;
                if let Some(ended) = follower.see(next)? {
                    break ended;
                }
            }
        }
    };
    // The watch of the Pods may be behind.
    let parameters = ListParams::default().labels(&watched.pods);
    let listed = patiently(async || access.api::<Pod>(namespace).list(&parameters).await).await.map_err(told)?;
    listed.items.into_iter().for_each(|pod| follower.pod(&pod));
    follower.finish(ended).await
}

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Owner,
    Pods,
    Events,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Owner => "what is followed",
            Self::Pods => "Pods",
            Self::Events => "Events",
        })
    }
}

/// Something that a watch brought.
enum Seen {
    Owner(Box<DynamicObject>),
    OwnerGone,
    Pod(Box<Pod>),
    PodGone(Box<Pod>),
    Event(Box<Event>),
    EventGone,
    /// All there is will come now, for the history between is lost.
    Listing(What),
    Listed(What),
    Trouble(What, watcher::Error),
}

fn streams(access: &Access, namespace: &str, watched: &Watched) -> impl futures_util::Stream<Item = Seen> + use<> {
    // A watch that has ended in time goes on where it was; one that has not is dead.
    let config = watcher::Config::default().timeout(access.silence);
    let owners = Api::namespaced_with(access.client(), namespace, &watched.resource);
    let by_name = config.clone().fields(&format!("metadata.name={}", watched.name));
    let owners = stream(What::Owner, owners, by_name, |object| Seen::Owner(Box::new(object)), |_| Seen::OwnerGone);
    let by_label = config.clone().labels(&watched.pods);
    let see = |pod| Seen::Pod(Box::new(pod));
    let pods = stream(What::Pods, access.api(namespace), by_label, see, |pod| Seen::PodGone(Box::new(pod)));
    let see = |event| Seen::Event(Box::new(event));
    let events = stream(What::Events, access.api(namespace), config, see, |_| Seen::EventGone);
    select_all([owners, pods, events])
}

/// A watch that goes on after every break.
fn stream<K>(
    what: What,
    api: Api<K>,
    config: watcher::Config,
    see: fn(K) -> Seen,
    gone: fn(K) -> Seen,
) -> BoxStream<'static, Seen>
where
    K: Resource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
{
    let watched = watcher(api, config).backoff(Pauses::default());
    let translate = move |next| match next {
        Ok(Watch::Apply(object) | Watch::InitApply(object)) => see(object),
        Ok(Watch::Delete(object)) => gone(object),
        Ok(Watch::Init) => Seen::Listing(what),
        Ok(Watch::InitDone) => Seen::Listed(what),
        Err(error) => Seen::Trouble(what, error),
    };
    watched.map(translate).boxed()
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.step())
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// What is known so far.
struct Follower<'a> {
    access: &'a Access,
    namespace: &'a str,
    watched: &'a Watched,
    /// By Pod's uid and container, and by how often that was restarted.
    logs: HashMap<(String, String), HashMap<i32, Log>>,
    /// Names of the Pods seen.
    names: HashSet<String>,
    /// What was told already.
    told: HashSet<String>,
    /// Since when no container runs.
    waiting: Option<Instant>,
    problem: Option<String>,
    /// Uids of the Pods in which a container runs.
    running: HashSet<String>,
    /// Uids of the Pods in the list that comes.
    listed: HashSet<String>,
    /// What the Pod left that decides: one that succeeded, else the newest.
    left: Left,
    /// Whether that Pod succeeded, and when it was made.
    decided: (bool, Option<Time>),
    /// Since when the API server does not answer, or refuses us.
    silent: Option<Instant>,
    refused: Option<Instant>,
    /// Whether it does not know us any more.
    unknown: bool,
    /// The uid of what is followed, and whether it was in the last list.
    uid: Option<String>,
    owner_listed: bool,
    /// Events that came before it.
    early: Vec<Event>,
}

impl<'a> Follower<'a> {
    fn new(access: &'a Access, namespace: &'a str, watched: &'a Watched) -> Self {
        Self {
            access,
            namespace,
            watched,
            logs: HashMap::new(),
            names: HashSet::new(),
            told: HashSet::new(),
            waiting: Some(Instant::now()),
            problem: None,
            running: HashSet::new(),
            listed: HashSet::new(),
            left: Left::default(),
            decided: (false, None),
            silent: None,
            refused: None,
            unknown: false,
            uid: None,
            owner_listed: false,
            early: Vec::new(),
        }
    }

    /// Takes notice; gives the end, when this was it.
    fn see(&mut self, seen: Seen) -> Result<Option<Ended>> {
        // Of a list that begins nothing has come yet.
        if !matches!(seen, Seen::Trouble(..) | Seen::Listing(_)) {
            (self.silent, self.refused) = (None, None);
        }
        match seen {
            Seen::Owner(object) => {
                self.owner_listed = true;
                self.uid = object.uid();
                for event in std::mem::take(&mut self.early) {
                    self.event(&event)?;
                }
                return Ok(ended(&object, self.watched.is_build()));
            }
            Seen::OwnerGone => bail!("{} was deleted", self.watched),
            Seen::Listing(What::Owner) => self.owner_listed = false,
            Seen::Listed(What::Owner) if !self.owner_listed => bail!("{} was deleted", self.watched),
            Seen::Pod(pod) => self.pod(&pod),
            Seen::PodGone(pod) => {
                self.pod(&pod);
                let uid = pod.uid().unwrap_or_default();
                self.tell(format!("Pod {} is gone", pod.name_any()), false);
                self.gone(|of| of == uid);
            }
            Seen::Listing(What::Pods) => self.listed.clear(),
            Seen::Listed(What::Pods) => {
                let listed = std::mem::take(&mut self.listed);
                self.gone(|uid| !listed.contains(uid));
            }
            Seen::Event(event) if self.uid.is_none() => self.early.push(*event),
            Seen::Event(event) => self.event(&event)?,
            Seen::EventGone | Seen::Listing(_) | Seen::Listed(_) => {}
            Seen::Trouble(what, error) => self.trouble(what, error)?,
        }
        Ok(None)
    }

    /// A watch failed; the next try is on its way already.
    fn trouble(&mut self, what: What, error: watcher::Error) -> Result<()> {
        let (message, code) = match &error {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status))
            | watcher::Error::WatchFailed(kube::Error::Api(status))
            | watcher::Error::WatchError(status) => (status.message.clone(), status.code),
            other => (exit::chain(&anyhow!(other.to_string())), 0),
        };
        // History that the server has forgotten: all is listed again.
        if code == 410 {
            return Ok(());
        }
        self.tell(format!("watching {what}: {message}"), false);
        self.unknown |= code == 401 && self.uid.is_some();
        if what == What::Events {
            return Ok(());
        }
        let refusal = (400..500).contains(&code).then(|| refused(&message, code).context(format!("watching {what}")));
        match refusal.filter(|error| exit::code(error) == exit::REJECTED) {
            Some(refusal) => {
                // An answer, if not the one that was hoped for.
                self.silent = None;
                let passes = matches!(code, 401 | 403) && self.uid.is_some();
                let since = *self.refused.get_or_insert_with(Instant::now);
                if passes && since.elapsed() < REFUSALS { Ok(()) } else { Err(refusal) }
            }
            None if self.silent.get_or_insert_with(Instant::now).elapsed() > PATIENCE => {
                Err(anyhow!(error).context(format!("watching {what} of {}", self.watched)))
            }
            None => Ok(()),
        }
    }

    fn pod(&mut self, pod: &Pod) {
        let name = pod.name_any();
        self.names.insert(name.clone());
        self.listed.insert(pod.uid().unwrap_or_default());
        let Some(status) = &pod.status else { return };
        let unscheduled = |condition: &&k8s_openapi::api::core::v1::PodCondition| {
            condition.type_ == "PodScheduled" && condition.status == "False"
        };
        if let Some(condition) = status.conditions.iter().flatten().find(unscheduled) {
            let why = condition.message.as_deref().unwrap_or("no reason given");
            self.tell(format!("Pod {name} finds no node: {why}"), true);
        }
        let containers: Vec<_> = all_statuses(pod).collect();
        for container in &containers {
            let Some(state) = &container.state else { continue };
            if let Some(waiting) = &state.waiting {
                let reason = waiting.reason.as_deref().unwrap_or_default();
                if WAITS.contains(&reason) {
                    let message = waiting.message.as_deref().unwrap_or_default();
                    self.tell(format!("Pod {name}, container {}: {reason}: {message}", container.name), true);
                }
            }
            self.container_log(pod, container, containers.len() == 1);
        }
        let phase = status.phase.as_deref().unwrap_or_default();
        let over = phase == "Failed" || phase == "Succeeded";
        if over {
            self.pod_ended(&name, pod, phase == "Failed");
        }
        let runs = |container: &&ContainerStatus| container.state.as_ref().is_some_and(|state| state.running.is_some());
        self.set_running(pod, !over && containers.iter().any(runs));
    }

    /// Sees to it that the log of a container is read, and that of the container that it
    /// replaces.
    fn container_log(&mut self, pod: &Pod, container: &ContainerStatus, alone: bool) {
        let Some(state) = &container.state else { return };
        let (key, restarts) = ((pod.uid().unwrap_or_default(), container.name.clone()), container.restart_count);
        let place = Place {
            access: self.access.clone(),
            namespace: self.namespace.to_owned(),
            pod: pod.name_any(),
            container: container.name.clone(),
        };
        let logs = self.logs.entry(key).or_default();
        let mut log = |restarts, then: fn(&Log)| {
            then(logs.entry(restarts).or_insert_with(|| Log::start(place.clone(), alone)));
        };
        let ended_before = container.last_state.as_ref().is_some_and(|last| last.terminated.is_some());
        if ended_before && restarts > 0 && state.waiting.is_none() {
            log(restarts - 1, Log::replaced);
        }
        // A container that waits again after its end is still that one.
        if state.terminated.is_some() || ended_before && state.waiting.is_some() {
            log(restarts, Log::ended);
        } else if state.running.is_some() {
            log(restarts, |_| {});
        }
    }

    fn set_running(&mut self, pod: &Pod, runs: bool) {
        let uid = pod.uid().unwrap_or_default();
        if runs {
            self.running.insert(uid)
        } else {
            self.running.remove(&uid)
        };
        self.set_waiting();
    }

    fn set_waiting(&mut self) {
        if self.running.is_empty() {
            self.waiting.get_or_insert_with(Instant::now);
        } else {
            (self.waiting, self.problem) = (None, None);
        }
    }

    fn pod_ended(&mut self, name: &str, pod: &Pod, failed: bool) {
        let terminated = all_statuses(pod).filter_map(|container| {
            let state = container.state.as_ref()?.terminated.as_ref()?;
            Some((container, state))
        });
        let decided = match failed {
            true => terminated.clone().find(|(_, state)| state.exit_code != 0),
            false => terminated.clone().last(),
        };
        let order = (!failed, pod.creation_timestamp());
        if order >= self.decided {
            self.left = decided.map(|(_, state)| Left::of(state)).unwrap_or_default();
            self.decided = order;
        }
        if failed {
            let status = pod.status.clone().unwrap_or_default();
            let mut why = [status.reason, status.message].into_iter().flatten().collect::<Vec<_>>().join(": ");
            if let Some((container, state)) = decided {
                let reason = state.reason.as_deref().unwrap_or("Error");
                why += &format!(" container {} ended with {}, {reason}", container.name, state.exit_code);
            }
            self.tell(format!("Pod {name} failed: {}", why.trim()), false);
        }
    }

    /// Pods were deleted, or their node was lost.
    fn gone(&mut self, is: impl Fn(&str) -> bool) {
        let logs = self.logs.iter().filter(|((of, _), _)| is(of)).flat_map(|(_, logs)| logs.values());
        logs.for_each(Log::ended);
        self.running.retain(|uid| !is(uid));
        self.set_waiting();
    }

    fn event(&mut self, event: &Event) -> Result<()> {
        let Some((regarding, about)) =
            event.regarding.as_ref().and_then(|object| Some((object, object.name.as_ref()?)))
        else {
            return Ok(());
        };
        // Events outlive what they are about: one of the same name may have been before.
        let other = regarding.uid.is_some() && regarding.uid != self.uid;
        let concerns = *about == self.watched.name && !other || self.names.contains(about);
        if event.type_.as_deref() != Some("Warning") || !concerns {
            return Ok(());
        }
        let reason = event.reason.as_deref().unwrap_or_default();
        if reason == NO_SECRET {
            return Ok(());
        }
        let note = event.note.as_deref().unwrap_or_default();
        let text = format!("{about}: {reason}: {note}");
        if reason == "FailedCreate" && NEVER.iter().any(|never| note.contains(never)) {
            let help = if note.contains(NEVER[0]) { format!("; {OTHER_IMAGE}") } else { String::new() };
            let error = Rejected::new(format!("the cluster takes no Pod of {}: {note}{help}", self.watched));
            return Err(anyhow!(error).context(NotStarted(format!("{} cannot start", self.watched))));
        }
        self.tell(text, true);
        Ok(())
    }

    /// Logs what was not logged yet; `problem` is why nothing starts.
    fn tell(&mut self, text: String, problem: bool) {
        if self.told.insert(text.clone()) {
            tracing::warn!("{text}");
        }
        if problem {
            self.problem = Some(text);
        }
    }

    fn check_started(&self, timeout: Duration) -> Result<()> {
        if self.waiting.is_none_or(|since| since.elapsed() < timeout) {
            return Ok(());
        }
        let problem = self.problem.as_deref().unwrap_or("the cluster gives no reason");
        let text = format!("nothing of {} runs after {} s: {problem}", self.watched, timeout.as_secs());
        Err(NotStarted(text).into())
    }

    /// Waits for the last lines of the logs.
    async fn finish(mut self, mut ended: Ended) -> Result<Ended> {
        let logs: Vec<_> =
            std::mem::take(&mut self.logs).into_values().flat_map(HashMap::into_values).map(Log::finish).collect();
        if timeout(LAST_LINES, future::join_all(logs)).await.is_err() {
            tracing::warn!("the end of the log could not be read in {} s", LAST_LINES.as_secs());
        }
        ended.left = std::mem::take(&mut self.left);
        Ok(ended)
    }
}

/// The statuses of all containers, in the order in which they run.
fn all_statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> + Clone {
    let status = pod.status.as_ref();
    let first = status.and_then(|status| status.init_container_statuses.as_ref());
    let main = status.and_then(|status| status.container_statuses.as_ref());
    first.into_iter().chain(main).flatten()
}

/// How a Job or a build ended, if it has; objects in lists do not say what they are.
fn ended(object: &DynamicObject, is_build: bool) -> Option<Ended> {
    let status = &object.data["status"];
    let (success, reason) = if is_build {
        let reason = || {
            format!("{}: {}", status["reason"].as_str().unwrap_or("Error"), status["message"].as_str().unwrap_or(""))
        };
        match status["phase"].as_str()? {
            "Complete" => (true, String::new()),
            "Failed" | "Error" | "Cancelled" => (false, reason()),
            _ => return None,
        }
    } else {
        let conditions = status["conditions"].as_array()?;
        let of = |kind: &str| conditions.iter().find(|one| one["type"] == kind && one["status"] == "True");
        match (of("Complete"), of("Failed")) {
            (Some(_), _) => (true, String::new()),
            (None, Some(failed)) => {
                let text = |key: &str| failed[key].as_str().unwrap_or_default();
                (false, format!("{}: {}", text("reason"), text("message")))
            }
            (None, None) => return None,
        }
    };
    Some(Ended { success, reason, left: Left::default(), object: object.data.clone() })
}
