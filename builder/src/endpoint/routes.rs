//! The endpoint's routes, as docs/artifact.md lists them. Names in a path are
//! checked by the protocol's grammar before anything else sees them.

use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::header::{CACHE_CONTROL, LOCATION};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::manifest::{FILE, MEDIA_TYPE, TARBALL_FILE, TARBALL_MEDIA_TYPE};
use oscontainer_artifact::protocol::{LATEST, Name, REPR_DIGEST, digest_header, path};
use oscontainer_program::files::{NO_CACHE, Served, respond};
use serde::Serialize;

use super::auth::Writers;
use super::metrics::{self, Metrics};
use super::reply::{Refusal, json, text, typed};
use super::store::{Id, Record, Store};
use super::upload::{self, Target};
use super::{page, timestamp};

/// What all requests share.
#[derive(Clone)]
pub struct Shared(Arc<Inner>);

/// The inside of [`Shared`].
pub struct Inner {
    store: Store,
    writers: Writers,
    /// The largest tarball, in bytes.
    pub max_size: u64,
    /// The counters.
    pub metrics: Arc<Metrics>,
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

/// The endpoint as a router.
pub fn router(store: Store, writers: Writers, max_size: u64) -> Router {
    let metrics = Arc::new(Metrics::new());
    let shared = Shared(Arc::new(Inner { store, writers, max_size, metrics: metrics.clone() }));
    Router::new()
        .route("/", get(front_page))
        .route("/healthz", get(|| async { text(StatusCode::OK, "ok") }))
        .route("/readyz", get(ready))
        .route("/metrics", get(counters))
        .route("/v1/artifacts/", get(names))
        .route("/v1/artifacts/{name}/", get(versions))
        .route("/v1/artifacts/{name}/{version}", delete(remove))
        .route("/v1/artifacts/{name}/{version}/{file}", get(download).put(put))
        .fallback(|| async { Refusal::not_found("nothing is here; artifacts are below /v1/artifacts/") })
        .method_not_allowed_fallback(|| async {
            Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
        })
        .layer(from_fn_with_state(metrics, metrics::observe))
        .with_state(shared)
}

async fn front_page(State(shared): State<Shared>, headers: HeaderMap) -> Result<Response, Refusal> {
    let artifacts = blocking(&shared, all).await?;
    let mut response =
        typed(StatusCode::OK, "text/html; charset=utf-8", page::render(&artifacts, &page::base(&headers)));
    response.headers_mut().insert("content-security-policy", HeaderValue::from_static(page::POLICY));
    Ok(response)
}

/// All complete versions of all artifacts.
fn all(store: &Store) -> Result<Vec<(Name, Vec<(Name, Record)>)>> {
    store.complete_names()?.into_iter().map(|name| store.versions(&name).map(|versions| (name, versions))).collect()
}

async fn ready(State(shared): State<Shared>) -> Response {
    match blocking(&shared, |store| store.check().context("checking the store")).await {
        Ok(()) => text(StatusCode::OK, "ready"),
        Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, "the store does not answer; the endpoint's log says why"),
    }
}

async fn counters(State(shared): State<Shared>) -> Result<Response, Refusal> {
    let artifacts = blocking(&shared, all).await?;
    let records = || artifacts.iter().flat_map(|(_, versions)| versions);
    let bytes = records().map(|(_, record)| record.size + record.manifest_size).sum();
    let text = shared.metrics.encode(records().count() as u64, bytes)?;
    Ok(typed(StatusCode::OK, metrics::CONTENT_TYPE, text))
}

#[derive(Serialize)]
struct Names {
    names: Vec<Name>,
}

async fn names(State(shared): State<Shared>) -> Result<Response, Refusal> {
    Ok(json(&Names { names: blocking(&shared, Store::complete_names).await? }))
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
    let wanted = name.clone();
    let records = blocking(&shared, move |store| store.versions(&wanted)).await?;
    if records.is_empty() {
        return Err(unknown(name.as_str()));
    }
    let versions = records.into_iter().map(|(version, record)| Version {
        version,
        manifest_digest: record.manifest_digest,
        architecture: record.architecture,
        ref_name: record.ref_name,
        commit: record.commit.to_string(),
        digest: record.digest,
        size: record.size,
        stored: timestamp::rfc3339(record.stored),
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
    let opened = blocking(&shared, move |store| {
        let Some(record) = store.record(&id)? else { return Ok(None) };
        let opened = store.open_file(&id, &file.of(&record).0)?;
        Ok(opened.map(|opened| (record, opened)))
    });
    let Some((record, opened)) = opened.await? else { return Err(Refusal::not_found(missing)) };
    let (digest, size) = file.of(&record);
    let served = Served {
        file: tokio::fs::File::from_std(opened),
        size,
        etag: digest.to_string(),
        content_type: file.content_type(),
        // A version that was deleted may be made anew, so that caches have to ask.
        cache_control: NO_CACHE,
    };
    let mut response = respond(served, &method, &headers).await.context("reading a file of the store")?;
    let value = HeaderValue::try_from(digest_header(&digest)).context("writing a header")?;
    response.headers_mut().insert(REPR_DIGEST, value);
    Ok(response)
}

async fn latest(shared: &Shared, name: Name, file: FileName) -> Result<Response, Refusal> {
    let wanted = name.clone();
    let versions = blocking(shared, move |store| store.versions(&wanted)).await?;
    let Some((version, _)) = versions.first() else { return Err(unknown(name.as_str())) };
    let location = HeaderValue::try_from(path(&name, version, file.as_str())).context("writing a header")?;
    let mut response = text(StatusCode::TEMPORARY_REDIRECT, version.as_str());
    response.headers_mut().insert(LOCATION, location);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static(NO_CACHE));
    Ok(response)
}

async fn put(
    State(shared): State<Shared>,
    Path((name, version, file)): Path<(String, String, String)>,
    request: Request,
) -> Response {
    let (parts, body): (_, Body) = request.into_parts();
    let target = shared.writers.check(&parts.headers).and_then(|()| {
        let file = file.parse()?;
        Ok(Target { id: id(&name, &version)?, file })
    });
    match target {
        Ok(target) => upload::put(shared, target, parts.headers, body).await,
        Err(refusal) => upload::refuse(refusal, body, &parts.headers),
    }
}

async fn remove(
    State(shared): State<Shared>,
    Path((name, version)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    shared.writers.check(&headers)?;
    let id = id(&name, &version)?;
    let deleted = id.clone();
    if !blocking(&shared, move |store| store.delete(&deleted)).await? {
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
