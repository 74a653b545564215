//! `submit`: a treefile on this machine is composed in the cluster. Makes the Job and its
//! ConfigMaps, follows it, starts the aggregation and follows that.

use std::io::{IsTerminal, Write, stderr, stdin, stdout};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use oscontainer_program::exit::Usage;
use oscontainer_program::options::Global;
use oscontainer_program::{exit, reject};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::bundle::Bundle;
use super::follow::{self, Ended, Left, NotStarted, Watched};
use super::template::{self, Changes};
use super::trigger::{self, Started, Target};
use super::{Access, SILENCE, patiently, told};
use crate::publish::Published;
use crate::treefile::Machine;

/// How long an interruption waits for what is being made.
const ARRIVAL: Duration = Duration::from_secs(10);

/// What `submit` takes.
#[derive(Debug, Clone, Args)]
pub struct SubmitArgs {
    /// The treefile, YAML or JSON; all that it includes goes with it, and the .repo files beside it
    #[arg(env = "OSCONTAINER_TREEFILE")]
    treefile: PathBuf,
    /// The kubeconfig's context [default: the current one]
    #[arg(long, value_name = "NAME", env = "OSCONTAINER_CONTEXT")]
    context: Option<String>,
    /// Where the Job goes [default: the context's namespace, or the manifest's]
    #[arg(short, long, value_name = "NAMESPACE", env = "OSCONTAINER_NAMESPACE")]
    namespace: Option<String>,
    /// A manifest with another Job than the built-in one of manifests/80-compose.yaml, such as userns/'s
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_TEMPLATE")]
    template: Option<PathBuf>,
    /// The artifact endpoint's URL as the Job sees it [default: the manifest's]
    #[arg(long, value_name = "URL", env = "OSCONTAINER_ENDPOINT")]
    endpoint: Option<String>,
    /// The builder's image [default: the manifest's]
    #[arg(long, value_name = "IMAGE", env = "OSCONTAINER_BUILDER_IMAGE")]
    image: Option<String>,
    /// The nodes' architecture, such as aarch64: conditions in treefiles ask for it [default: this machine's]
    #[arg(long, value_name = "ARCH", env = "OSCONTAINER_ARCH")]
    arch: Option<String>,
    /// Aggregate the artifact: `job` (of the CronJob `aggregate`), cronjob/NAME, or buildconfig/NAME (OpenShift)
    #[arg(long, value_name = "HOW", value_parser = aggregate, env = "OSCONTAINER_AGGREGATE")]
    aggregate: Option<Target>,
    /// Where that is
    #[arg(long, value_name = "NAMESPACE", default_value = "oscontainer", env = "OSCONTAINER_AGGREGATE_NAMESPACE")]
    aggregate_namespace: String,
    /// Seconds after which a Pod that does not start is given up
    #[arg(long, value_name = "SECONDS", default_value_t = 900, env = "OSCONTAINER_START_TIMEOUT")]
    start_timeout: u64,
    /// Seconds after which a connection to the API server on which nothing comes counts as broken
    #[arg(long, value_name = "SECONDS", default_value_t = SILENCE, value_parser = clap::value_parser!(u32).range(1..),
        env = "OSCONTAINER_ANSWER_TIMEOUT")]
    answer_timeout: u32,
    /// Leave the Job in the cluster when this is interrupted or nothing starts
    #[arg(long, env = "OSCONTAINER_KEEP")]
    keep: bool,
    /// Print what would be made, and make nothing; `server` lets the cluster check it first
    #[arg(long, value_enum, value_name = "WHO")]
    dry_run: Option<DryRun>,
    /// How --dry-run prints
    #[arg(short, long, value_enum, requires = "dry_run", default_value_t = Format::Yaml)]
    output: Format,
    /// More options for the Job's `run`, after `--`, such as -- --force-nocache
    #[arg(last = true)]
    run_options: Vec<String>,
}

/// Who checks what would be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DryRun {
    /// Nobody: no cluster is asked.
    Client,
    /// The API server.
    Server,
}

/// How objects are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// YAML documents.
    Yaml,
    /// One JSON List.
    Json,
}

/// What `submit` prints.
#[derive(Debug, Serialize)]
struct Submitted {
    /// The Job.
    job: String,
    /// What the Job's `run` said: its keys.
    #[serde(flatten)]
    result: Map<String, Value>,
    /// The final image's digest, where it was aggregated.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    /// Where the image is, if the aggregation says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
}

fn aggregate(text: &str) -> Result<Target, String> {
    match text {
        "job" => Ok(Target::CronJob("aggregate".to_owned())),
        other => other.parse().map_err(|error| format!("{error}, or job")),
    }
}

/// The objects that are made.
struct Objects {
    job: Job,
    config_maps: Vec<ConfigMap>,
}

/// Submits.
///
/// # Errors
/// As the treefile's; as the Job's own; when the cluster refuses or nothing starts.
pub fn main(args: SubmitArgs, global: &Global) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    let submitted = runtime.block_on(submit(&args, global));
    // Nobody waits for an answer that does not come.
    runtime.shutdown_background();
    submitted
}

async fn submit(args: &SubmitArgs, global: &Global) -> Result<()> {
    let machine = Machine { basearch: args.arch.clone().unwrap_or(Machine::host().basearch), releasever: None };
    let bundle = Bundle::read(&args.treefile, &machine)?;
    if args.dry_run == Some(DryRun::Client) {
        let objects = objects(args, &bundle, None)?;
        return print(args.output, &[to_values(&objects.config_maps)?, to_values(&[objects.job])?].concat());
    }
    let access = Access::new(args.context.as_deref(), args.answer_timeout).await?;
    let client = access.client();
    // kubectl's own default, where nobody has chosen one.
    let chosen = Some(client.default_namespace()).filter(|name| *name != "default");
    let objects = objects(args, &bundle, chosen)?;
    if args.dry_run == Some(DryRun::Server) {
        let parameters = PostParams { dry_run: true, ..PostParams::default() };
        let made = create(&client, objects, &parameters).await?;
        return print(args.output, &[to_values(&made.config_maps)?, to_values(&[made.job])?].concat());
    }
    global.print(&run(args, &access, objects).await?)
}

/// The objects for this treefile, with a name of their own.
fn objects(args: &SubmitArgs, bundle: &Bundle, chosen: Option<&str>) -> Result<Objects> {
    let template = template::read(args.template.as_deref())?;
    let namespace = args.namespace.as_deref().or(chosen).map(str::to_owned).or_else(|| template.namespace());
    let Some(namespace) = namespace else {
        return Err(Usage("the template names no namespace: give --namespace".into()).into());
    };
    let name = format!("compose-{}", super::suffix());
    let (config_maps, volume) = bundle.config_maps(&format!("{name}-treefile"), &namespace);
    let changes = Changes {
        name: &name,
        namespace: &namespace,
        treefile: &bundle.treefile,
        volume,
        endpoint: args.endpoint.as_deref(),
        image: args.image.as_deref(),
        arguments: &args.run_options,
    };
    Ok(Objects { job: template::apply(template, changes)?, config_maps })
}

/// Makes the Job, then the ConfigMaps, which belong to it: whatever happens between, the
/// Job's end takes all with it.
async fn create(client: &Client, objects: Objects, parameters: &PostParams) -> Result<Objects> {
    let namespace = objects.job.namespace().unwrap_or_default();
    let jobs: Api<Job> = Api::namespaced(client.clone(), &namespace);
    let job = match jobs.create(parameters, &objects.job).await {
        Ok(job) => job,
        Err(error) => {
            // An answer that got lost is none: the Job may be there.
            if !matches!(error, kube::Error::Api(_) | kube::Error::Auth(_)) && !parameters.dry_run {
                delete(&jobs, &objects.job.name_any()).await;
            }
            return Err(told(error)).context("making the Job");
        }
    };
    let owner = OwnerReference {
        api_version: "batch/v1".to_owned(),
        kind: "Job".to_owned(),
        name: job.name_any(),
        uid: job.uid().unwrap_or_default(),
        ..OwnerReference::default()
    };
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
    let mut config_maps = Vec::new();
    for mut config_map in objects.config_maps {
        config_map.metadata.owner_references = Some(vec![owner.clone()]);
        let made = patiently(async || match api.create(parameters, &config_map).await {
            // Nobody else has its name: an answer got lost.
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(config_map.clone()),
            made => made,
        });
        match made.await {
            Ok(made) => config_maps.push(made),
            Err(error) => {
                if !parameters.dry_run {
                    delete(&jobs, &job.name_any()).await;
                }
                return Err(told(error)).with_context(|| format!("making the ConfigMap {}", config_map.name_any()));
            }
        }
    }
    Ok(Objects { job, config_maps })
}

/// Deletes the Job and all that belongs to it.
async fn delete(jobs: &Api<Job>, name: &str) {
    match jobs.delete(name, &DeleteParams::background()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Ok(_) => tracing::info!("deleted the Job {name}, its Pods and its ConfigMaps"),
        Err(error) => tracing::warn!("deleting the Job {name}: {}", exit::chain(&told(error))),
    }
}

/// Makes the objects, follows them to their end, and cleans up after an interruption.
async fn run(args: &SubmitArgs, access: &Access, objects: Objects) -> Result<Submitted> {
    // Before anything is made: a signal must find somebody.
    let mut signals = Signals::new()?;
    let mut started = vec![(objects.job.namespace().unwrap_or_default(), Watched::job(objects.job.name_any()))];
    let (client, parameters) = (access.client(), PostParams::default());
    let mut creating = std::pin::pin!(create(&client, objects, &parameters));
    let made = tokio::select! {
        made = &mut creating => made,
        signal = signals.next() => {
            // What is on its way arrives first: else it would come after its deletion.
            let _ = tokio::time::timeout(ARRIVAL, creating).await;
            Err(Interrupted(signal).into())
        }
    };
    let ended = match made {
        Ok(made) => tokio::select! {
            ended = follow_all(args, access, &made, &mut started) => ended,
            signal = signals.next() => Err(Interrupted(signal).into()),
        },
        Err(error) => Err(error),
    };
    let Err(error) = &ended else { return ended };
    let interrupted = error.downcast_ref::<Interrupted>();
    if interrupted.is_some() || error.downcast_ref::<NotStarted>().is_some() {
        clean(args, access, &started, interrupted, &mut signals).await;
    }
    ended
}

/// Deletes the Jobs that were made and cancels the build, unless they are to be kept.
async fn clean(
    args: &SubmitArgs,
    access: &Access,
    started: &[(String, Watched)],
    interrupted: Option<&Interrupted>,
    signals: &mut Signals,
) {
    let asked = interrupted.is_some_and(|by| by.0 == SignalKind::interrupt()) && stdin().is_terminal();
    if args.keep || asked && !delete_wanted(signals).await {
        for (namespace, watched) in started {
            let (kind, name) = (watched.resource.kind.to_ascii_lowercase(), &watched.name);
            let by = if watched.is_build() { "oc" } else { "kubectl" };
            tracing::info!("the {watched} in {namespace} goes on: {by} logs -f -n {namespace} {kind}/{name}");
        }
        return;
    }
    for (namespace, watched) in started {
        if watched.is_build() {
            cancel(access, namespace, watched).await;
        } else {
            delete(&access.api(namespace), &watched.name).await;
        }
    }
}

/// Cancels a build as `oc cancel-build` does: its controller stops it and keeps the log.
async fn cancel(access: &Access, namespace: &str, build: &Watched) {
    let api: Api<DynamicObject> = Api::namespaced_with(access.client(), namespace, &build.resource);
    let cancelled = serde_json::json!({"status": {"cancelled": true}});
    match api.patch(&build.name, &PatchParams::default(), &Patch::Merge(cancelled)).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Ok(_) => tracing::info!("cancelled the {build}"),
        Err(error) => {
            tracing::warn!("the {build} in {namespace} goes on: cancelling it: {}", exit::chain(&told(error)));
        }
    }
}

/// Asks on the terminal. A second Ctrl-C is a no.
async fn delete_wanted(signals: &mut Signals) -> bool {
    let _ = write!(stderr(), "Delete the Job and what belongs to it? [Y/n] ");
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        // At the end of the input nobody says no.
        let _ = stdin().read_line(&mut line);
        line
    });
    tokio::select! {
        answer = answer => !answer.unwrap_or_default().trim().to_ascii_lowercase().starts_with('n'),
        _ = signals.next() => false,
    }
}

/// Ctrl-C, or SIGTERM.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted(SignalKind);

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("listening for signals");
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
        }
    }
}

/// Follows the Job, then the aggregation; `started` gets that too, if it was not there before.
async fn follow_all(
    args: &SubmitArgs,
    access: &Access,
    made: &Objects,
    started: &mut Vec<(String, Watched)>,
) -> Result<Submitted> {
    let (name, namespace) = (made.job.name_any(), made.job.namespace().unwrap_or_default());
    tracing::info!("made the Job {name} in {namespace}, with {} ConfigMaps", made.config_maps.len());
    let timeout = Duration::from_secs(args.start_timeout);
    let watched = Watched::job(name);
    let ended = succeeded(&watched, follow::follow(access, &namespace, &watched, timeout).await?)?;
    let published: Published = match serde_json::from_value(ended.left.message.clone()) {
        Ok(published) => published,
        Err(error) => bail!("{watched} left no result as its termination message: {error}"),
    };
    let result = ended.left.message.as_object().cloned().unwrap_or_default();
    let mut submitted = Submitted { job: watched.name, result, digest: None, image: None };
    if let Some(target) = &args.aggregate {
        let namespace = &args.aggregate_namespace;
        let composed = (&published, made.job.metadata.uid.as_deref());
        let watched = match trigger::start(&access.client(), namespace, target, composed).await? {
            Started::Follow(watched) => watched,
            Started::Before(there) => {
                submitted.digest = Some(there.digest);
                submitted.image = Some(there.image);
                return Ok(submitted);
            }
        };
        if !watched.before {
            started.push((namespace.clone(), watched.clone()));
        }
        let ended = succeeded(&watched, follow::follow(access, namespace, &watched, timeout).await?)?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let status = &ended.object["status"];
        submitted.digest = text(&ended.left.message["digest"]).or_else(|| text(&status["output"]["to"]["imageDigest"]));
        submitted.image = text(&ended.left.message["image"]).or_else(|| text(&status["outputDockerImageReference"]));
    }
    Ok(submitted)
}

/// What ended well; else its own error, with its own exit code.
fn succeeded(watched: &Watched, ended: Ended) -> Result<Ended> {
    if ended.success {
        return Ok(ended);
    }
    let Left { message, text, code } = &ended.left;
    let error = match (message["error"].as_str(), text.as_str()) {
        (Some(error), _) => error,
        (None, "") => "it left no termination message; its log says more",
        (None, text) => text,
    };
    let text = format!("{watched} failed, {}: {error}", ended.reason);
    // A build's containers are not ours: their codes mean something else.
    let code = code.filter(|_| !watched.is_build());
    match message["exitCode"].as_i64().or(code.map(i64::from)) {
        Some(3) => reject!("{text}"),
        Some(2) => Err(Usage(text).into()),
        _ => bail!(text),
    }
}

/// The objects as the API takes them.
fn to_values(objects: &[impl Serialize]) -> Result<Vec<Value>> {
    objects.iter().map(|object| serde_json::to_value(object).context("writing an object")).collect()
}

fn print(format: Format, objects: &[Value]) -> Result<()> {
    let mut out = stdout().lock();
    let printed = match format {
        Format::Yaml => objects.iter().try_for_each(|object| {
            let yaml = serde_yaml::to_string(object).map_err(std::io::Error::other)?;
            write!(out, "---\n{yaml}")
        }),
        Format::Json => {
            writeln!(out, "{:#}", serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects}))
        }
    };
    printed.context("writing to stdout")
}
