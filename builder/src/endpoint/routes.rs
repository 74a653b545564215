//! The endpoint's routes, as docs/artifact.md lists them. Names in a path are
//! checked by the protocol's grammar before anything else sees them.

use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::header::{CONTENT_SECURITY_POLICY, LOCATION};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, head};
use futures_util::TryStreamExt;
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::manifest::{FILE, MEDIA_TYPE, Manifest, TARBALL_FILE, TARBALL_MEDIA_TYPE};
use oscontainer_artifact::protocol::{LATEST, Name, REPR_DIGEST, digest_header};
use oscontainer_program::files::{Content, NO_CACHE, Served, respond};
use oscontainer_program::page::origin;
use oscontainer_program::server::Peer;
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tokio::sync::Notify;

use super::auth::Access;
use super::compare;
use super::fresh::Fresh;
use super::housekeeping::{Housekeeping, KeepOptions, Readers};
use super::metrics::{self, Metrics};
use super::page;
use super::rate::Rates;
use super::reply::{Refusal, insert, json, text, typed};
use super::resume::{self, Key, Turns};
use super::store::{Id, Record, Store, Usage, digest_of};
use super::upload::{self, Target};

/// How long the store may take to answer a probe, and how long its answer holds.
const PROBE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(1));
/// How long the gauges hold: each costs a listing of the whole store.
const GAUGES: Duration = Duration::from_secs(10);

/// What all requests share.
#[derive(Clone)]
pub struct Shared(Arc<Inner>);

/// The inside of [`Shared`].
pub struct Inner {
    store: Arc<Store>,
    access: Access,
    rates: Rates,
    /// What uploads may take.
    pub limits: Limits,
    /// Who works on which resumable upload.
    pub turns: Turns,
    /// Which versions are being read.
    pub readers: Arc<Readers>,
    /// Told whenever a version was stored.
    pub changed: Notify,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// Whether the store answers.
    answers: Fresh<bool>,
    /// How much it has; `None` where it did not say.
    usage: Fresh<Option<Usage>>,
}

/// What uploads may take.
pub struct Limits {
    /// The largest tarball, in bytes.
    pub max_size: u64,
    /// How long what is not finished is kept.
    pub upload_expiry: Duration,
    /// How long a client may send nothing.
    pub client_timeout: Duration,
    /// Requests a second of one client.
    pub client_rate: Option<NonZeroU32>,
    /// Which versions are kept.
    pub keep: KeepOptions,
}

impl std::ops::Deref for Shared {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

/// One of an artifact's two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileName {
    /// `manifest.json`.
    Manifest,
    /// `repo.tar`.
    Tarball,
}

impl FileName {
    /// The name in a path.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Manifest => FILE,
            Self::Tarball => TARBALL_FILE,
        }
    }

    /// The digest and size of this file of a complete version.
    pub fn of(self, record: &Record) -> (Digest, u64) {
        match self {
            Self::Manifest => (record.manifest_digest, record.manifest_size),
            Self::Tarball => (record.digest, record.size),
        }
    }

    fn content_type(self) -> &'static str {
        match self {
            Self::Manifest => MEDIA_TYPE,
            Self::Tarball => TARBALL_MEDIA_TYPE,
        }
    }
}

impl FromStr for FileName {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        match text {
            FILE => Ok(Self::Manifest),
            TARBALL_FILE => Ok(Self::Tarball),
            _ => Err(Refusal::not_found(format!("an artifact has {FILE} and {TARBALL_FILE} and no other file"))),
        }
    }
}

/// Runs `work` on a blocking thread: the one place where a request reaches the disk.
///
/// # Errors
/// As `work`'s, as a refusal.
pub async fn blocking<T: Send + 'static>(
    shared: &Shared,
    work: impl FnOnce(&Store) -> Result<T> + Send + 'static,
) -> Result<T, Refusal> {
    let shared = shared.clone();
    let done = tokio::task::spawn_blocking(move || work(&shared.store)).await;
    Ok(done.context("working on the store")??)
}

/// The endpoint as a router, and what looks after what is left unfinished. They are made
/// within the runtime.
pub fn router(store: Arc<Store>, access: Access, limits: Limits) -> (Router, Housekeeping) {
    let metrics = Arc::new(Metrics::new());
    let shared = Shared(Arc::new(Inner {
        store,
        access,
        rates: Rates::new(limits.client_rate),
        limits,
        turns: Turns::default(),
        readers: Arc::default(),
        changed: Notify::new(),
        metrics: metrics.clone(),
        answers: Fresh::new(PROBE.1),
        usage: Fresh::new(GAUGES),
    }));
    let housekeeping = Housekeeping::start(shared.clone());
    let guarded = Router::new()
        .route("/", get(front_page))
        .route("/compare/{name}/{from}/{to}", get(compared))
        .route("/compare/{name}", get(choose))
        .route("/v1/artifacts/", get(names))
        .route("/v1/artifacts/{name}/", get(versions))
        .route("/v1/artifacts/{name}/{version}", delete(remove))
        .route("/v1/artifacts/{name}/{version}/{file}", get(download).put(put).options(upload_options))
        .route("/v1/uploads/{name}/{version}/{upload}", head(upload_state).patch(upload_append).delete(upload_cancel))
        .route_layer(from_fn_with_state(shared.clone(), guard_reads))
        .layer(from_fn_with_state(shared.clone(), guard_rate));
    let router = Router::new()
        .merge(guarded)
        .route("/healthz", get(|| async { text(StatusCode::OK, "ok") }))
        .route("/readyz", get(ready))
        .route("/metrics", get(counters))
        .fallback(nothing)
        .method_not_allowed_fallback(|| async {
            Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
        })
        .layer(from_fn_with_state(metrics, metrics::observe))
        .with_state(shared);
    (router, housekeeping)
}

/// Reads on like a refused upload: it may have gone to a wrong URL.
async fn nothing(request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let refusal = Refusal::not_found("nothing is here; artifacts are below /v1/artifacts/");
    upload::refuse(refusal, body, &parts.headers)
}

/// Lets readers pass. Writes are looked at where they are handled, with their bodies.
async fn guard_reads(State(shared): State<Shared>, request: Request, next: Next) -> Result<Response, Refusal> {
    if [Method::GET, Method::HEAD].contains(request.method()) {
        shared.access.read(request.headers()).await?;
    }
    Ok(next.run(request).await)
}

/// Lets clients pass that do not come too often.
async fn guard_rate(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let Some(Peer(client)) = request.extensions().get().copied() else { return next.run(request).await };
    match shared.rates.pass(client) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            let (parts, body) = request.into_parts();
            upload::refuse(refusal, body, &parts.headers)
        }
    }
}

async fn front_page(State(shared): State<Shared>, headers: HeaderMap) -> Result<Response, Refusal> {
    let artifacts = blocking(&shared, Store::all).await?;
    Ok(html(page::render(&artifacts, &origin(&headers))))
}

fn html(page: String) -> Response {
    let mut response = typed(StatusCode::OK, "text/html; charset=utf-8", page);
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(page::POLICY));
    response
}

/// The package differences between two versions, as a page.
async fn compared(
    State(shared): State<Shared>,
    Path((name, from, to)): Path<(String, String, String)>,
) -> Result<Response, Refusal> {
    let name: Name = name.parse().map_err(|_| unknown(&name))?;
    let (mut manifests, versions) = (Vec::new(), complete_versions(&shared, &name).await?);
    for version in [from, to] {
        let missing = || Refusal::not_found(format!("{name} has no complete version {version:?}"));
        let record = versions.iter().find(|(known, _)| known.as_str() == version).map(|(_, record)| record.clone());
        let record = record.ok_or_else(missing)?;
        let id = Id { name: name.clone(), version: version.parse().map_err(|_| missing())? };
        let opened = blocking(&shared, move |store| store.manifest(&id, &record.manifest_digest)).await?;
        let opened = opened.ok_or_else(missing)?;
        let bytes = opened.source.stream(0, opened.size).try_fold(Vec::new(), async |mut bytes, chunk| {
            bytes.extend_from_slice(&chunk);
            Ok(bytes)
        });
        manifests.push(Manifest::parse(&bytes.await.context("reading a manifest")?).map_err(anyhow::Error::from)?);
    }
    let known: Vec<_> = versions.into_iter().map(|(version, _)| version).collect();
    Ok(html(compare::render(&manifests[0], &manifests[1], &known)))
}

/// The complete versions of an artifact, newest first; there is one at least.
async fn complete_versions(shared: &Shared, name: &Name) -> Result<Vec<(Name, Record)>, Refusal> {
    let wanted = name.clone();
    let versions = blocking(shared, move |store| store.versions(&wanted)).await?;
    if versions.is_empty() { Err(unknown(name.as_str())) } else { Ok(versions) }
}

/// What the form on a page asks for leads to the page of two versions.
async fn choose(State(shared): State<Shared>, Path(name): Path<String>, uri: Uri) -> Result<Response, Refusal> {
    let name: Name = name.parse().map_err(|_| unknown(&name))?;
    let versions = complete_versions(&shared, &name).await?;
    let asked = |key: &str| {
        let query = uri.query().unwrap_or_default().split('&');
        let value = query.filter_map(|pair| pair.split_once('=')).find(|(name, _)| *name == key)?.1;
        // A form writes a space as a plus sign, and a plus sign as %2B.
        let value = percent_decode_str(value).decode_utf8().ok()?;
        versions.iter().find(|(version, _)| version.as_str() == value).map(|(version, _)| version)
    };
    let (Some(from), Some(to)) = (asked("from"), asked("to")) else {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "give two versions: ?from=VERSION&to=VERSION"));
    };
    Ok(redirect(&format!("{name}/{from}/{to}"), to))
}

async fn ready(State(shared): State<Shared>) -> Response {
    let asking = shared.clone();
    let answers = shared.answers.get(async move { blocking(&asking, Store::check).await.is_ok() });
    match tokio::time::timeout(PROBE.0, answers).await {
        Ok(Some(true)) => text(StatusCode::OK, "ready"),
        _ => text(StatusCode::SERVICE_UNAVAILABLE, "the store does not answer; the endpoint's log says why"),
    }
}

async fn counters(State(shared): State<Shared>) -> Result<Response, Refusal> {
    let asking = shared.clone();
    let usage = shared.usage.get(async move { blocking(&asking, Store::usage).await.ok() }).await.flatten();
    let text = shared.metrics.encode(&usage.context("asking the store how much it has")?)?;
    Ok(typed(StatusCode::OK, metrics::CONTENT_TYPE, text))
}

#[derive(Serialize)]
struct Names {
    names: Vec<Name>,
}

async fn names(State(shared): State<Shared>) -> Result<Response, Refusal> {
    let artifacts = blocking(&shared, Store::all).await?;
    Ok(json(&Names { names: artifacts.into_iter().map(|(name, _)| name).collect() }))
}

#[derive(Serialize)]
struct Versions {
    name: Name,
    versions: Vec<Version>,
}

/// One version in a listing.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    version: Name,
    manifest_digest: Digest,
    architecture: String,
    #[serde(rename = "ref")]
    ref_name: String,
    commit: String,
    digest: Digest,
    size: u64,
    stored: String,
}

async fn versions(State(shared): State<Shared>, Path(name): Path<String>) -> Result<Response, Refusal> {
    let name: Name = name.parse().map_err(|_| unknown(&name))?;
    let records = complete_versions(&shared, &name).await?;
    let versions = records.into_iter().map(|(version, record)| Version {
        version,
        stored: record.stored_utc(),
        manifest_digest: record.manifest_digest,
        architecture: record.architecture,
        ref_name: record.ref_name,
        commit: record.commit.to_string(),
        digest: record.digest,
        size: record.size,
    });
    Ok(json(&Versions { name, versions: versions.collect() }))
}

async fn download(
    State(shared): State<Shared>,
    Path((name, version, file)): Path<(String, String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let file: FileName = file.parse()?;
    let name: Name = name.parse().map_err(|_| unknown(&name))?;
    if version == LATEST {
        return latest(&shared, name, file).await;
    }
    let missing = format!("{name} has no complete version {version:?}");
    let Ok(version) = version.parse() else { return Err(Refusal::not_found(missing)) };
    let id = Id { name, version };
    let Some(reading) = shared.readers.begin(id.clone()) else { return Err(Refusal::not_found(missing)) };
    let opened = blocking(&shared, move |store| {
        let Some(record) = store.record(&id)? else { return Ok(None) };
        let opened = match file {
            FileName::Manifest => store.manifest(&id, &record.manifest_digest)?,
            FileName::Tarball => store.tarball(&id, &record.digest)?,
        };
        Ok(opened.map(|opened| (record, opened)))
    });
    let Some((record, opened)) = opened.await? else { return Err(Refusal::not_found(missing)) };
    let (digest, size) = file.of(&record);
    let served = Served {
        file: opened.source,
        size,
        etag: digest.to_string(),
        content_type: file.content_type(),
        // A version that was deleted may be made anew, so that caches have to ask.
        cache_control: NO_CACHE,
    };
    let mut response = respond(served, &method, &headers).context("answering with a file")?;
    let value = HeaderValue::try_from(digest_header(&digest)).context("writing a header")?;
    response.headers_mut().insert(REPR_DIGEST, value);
    reading.sends();
    response.extensions_mut().insert(reading);
    Ok(response)
}

async fn latest(shared: &Shared, name: Name, file: FileName) -> Result<Response, Refusal> {
    let versions = complete_versions(shared, &name).await?;
    let (version, _) = &versions[0];
    // From .../NAME/latest/FILE, wherever the endpoint is mounted.
    Ok(redirect(&format!("../{version}/{}", file.as_str()), version))
}

/// To another version, by a relative URL.
fn redirect(location: &str, version: &Name) -> Response {
    let mut response = text(StatusCode::TEMPORARY_REDIRECT, version.as_str());
    insert(response.headers_mut(), LOCATION, location);
    response
}

async fn put(
    State(shared): State<Shared>,
    Path((name, version, file)): Path<(String, String, String)>,
    request: Request,
) -> Response {
    let (parts, body): (_, Body) = request.into_parts();
    let target = shared.access.write(&parts).await.and_then(|()| {
        let file = file.parse()?;
        Ok(Target { id: id(&name, &version)?, file })
    });
    match target {
        Ok(target) if resume::begins(&parts.headers) => resume::create(shared, target, parts.headers, body).await,
        Ok(target) => upload::put(shared, target, parts.headers, body).await,
        Err(refusal) => upload::refuse(refusal, body, &parts.headers),
    }
}

async fn upload_options(State(shared): State<Shared>) -> Response {
    resume::options(&shared)
}

async fn upload_state(
    State(shared): State<Shared>,
    Path(path): Path<(String, String, String)>,
    request: Parts,
) -> Result<Response, Refusal> {
    shared.access.write(&request).await?;
    resume::offset(&shared, key(path)?).await
}

async fn upload_append(
    State(shared): State<Shared>,
    Path(path): Path<(String, String, String)>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    match shared.access.write(&parts).await.and_then(|()| key(path)) {
        Ok(key) => resume::append(shared, key, parts.headers, body).await,
        Err(refusal) => upload::refuse(refusal, body, &parts.headers),
    }
}

async fn upload_cancel(
    State(shared): State<Shared>,
    Path(path): Path<(String, String, String)>,
    request: Parts,
) -> Result<Response, Refusal> {
    shared.access.write(&request).await?;
    resume::cancel(&shared, key(path)?).await
}

/// The upload that a path names: NAME, VERSION and `sha256-HEX`.
fn key((name, version, upload): (String, String, String)) -> Result<Key, Refusal> {
    let digest =
        digest_of(&upload).ok_or_else(|| Refusal::not_found("an upload's name is sha256- and 64 hex digits"))?;
    Ok((id(&name, &version)?, digest))
}

async fn remove(
    State(shared): State<Shared>,
    Path((name, version)): Path<(String, String)>,
    request: Parts,
) -> Result<Response, Refusal> {
    shared.access.write(&request).await?;
    let id = id(&name, &version)?;
    if !resume::delete(&shared, &id).await? {
        return Err(Refusal::not_found(format!("{} has no version {}", id.name, id.version)));
    }
    tracing::info!("{} {}: deleted", id.name, id.version);
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The version that a write's path names.
fn id(name: &str, version: &str) -> Result<Id, Refusal> {
    let bad = |rejected: oscontainer_artifact::Rejected| Refusal::new(StatusCode::BAD_REQUEST, rejected.to_string());
    Ok(Id { name: name.parse().map_err(bad)?, version: version.parse().map_err(bad)? })
}

fn unknown(name: &str) -> Refusal {
    Refusal::not_found(format!("no artifact {name:?} is here"))
}
