//! `serve`: the oscontainer's entry point, a repository over HTTP. Validators come
//! from content, never from file times, for those are all 0 in an image: a node with a
//! cached summary would get 304 for ever.

mod metrics;
mod page;
mod path;
mod tree;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_MATCH,
    IF_NONE_MATCH, IF_RANGE, RANGE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use bytes::Bytes;
use clap::Args;
use oscontainer_program::buffer::Buffer;
use oscontainer_program::files::{self, NO_CACHE};
use oscontainer_program::options::Global;
use oscontainer_program::page::POLICY;
use oscontainer_program::server::{self, ServerOptions};

use metrics::Metrics;
use page::Page;
use tree::Tree;

/// What makes a request more than one for the whole file.
const CONDITIONS: [HeaderName; 4] = [IF_MATCH, IF_NONE_MATCH, IF_RANGE, RANGE];
/// The `Content-Type` of short answers.
const TEXT: &str = "text/plain; charset=utf-8";

/// Options of `serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// OSTree repository to serve
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_REPO", default_value = "/srv/repo")]
    repo: PathBuf,
    /// The image's directory of layer indexes: which commit was before another
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_LAYER_INDEX", default_value = "/usr/share/oscontainer/layers")]
    layer_index: PathBuf,
    /// Address and port to listen on; port 0 takes a free one and logs it
    #[arg(long, value_name = "ADDR", env = "OSCONTAINER_LISTEN", default_value = "[::]:8080")]
    listen: SocketAddr,
    #[command(flatten)]
    server: ServerOptions,
}

struct Site {
    tree: Tree,
    page: Page,
    metrics: Metrics,
}

/// Serves until it is told to stop.
///
/// # Errors
/// When the repository cannot be read or the address not be bound.
pub fn main(args: ServeArgs, _global: &Global) -> Result<()> {
    let site =
        Site { tree: Tree::open(&args.repo)?, page: Page::new(&args.repo, &args.layer_index), metrics: Metrics::new() };
    let router = Router::new().fallback(handle).with_state(Arc::new(site));
    server::serve_per_core(args.listen, router, &args.server)
}

async fn handle(State(site): State<Arc<Site>>, request: Request) -> Response<Body> {
    let (request, _body) = request.into_parts();
    let mut response = answer(&site, &request).await;
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if request.method == Method::HEAD {
        *response.body_mut() = Body::empty();
    }
    site.metrics.count(&request.method, &response);
    response
}

async fn answer(site: &Arc<Site>, request: &Parts) -> Response<Body> {
    if ![Method::GET, Method::HEAD].contains(&request.method) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n".into());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri.path() {
        "/" => page(site, request.headers.clone()).await,
        "/healthz" => text(StatusCode::OK, TEXT, "ok\n".into()),
        "/metrics" => match site.metrics.text() {
            Ok(metrics) => text(StatusCode::OK, metrics::CONTENT_TYPE, metrics),
            Err(e) => failed("/metrics", &e.to_string()),
        },
        path => file(site, path, request).await,
    }
}

async fn file(site: &Arc<Site>, path: &str, request: &Parts) -> Response<Body> {
    let entry = match path.contains('%') {
        false => path::entry(path),
        true => percent_encoding::percent_decode_str(path).decode_utf8().ok().and_then(|path| path::entry(&path)),
    };
    let Some(entry) = entry else { return not_found() };
    // Most requests are for these: handing each to another thread would cost more than it takes.
    if request.method == Method::GET && !CONDITIONS.iter().any(|name| request.headers.contains_key(name)) {
        match site.tree.small(&entry) {
            Ok(Some((bytes, etag))) => return small(&entry, bytes, &etag),
            Ok(None) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => return not_found(),
            Err(e) => return failed(path, &e.to_string()),
        }
    }
    // Only what has no name by its content is read for its ETag.
    let found = if entry.object.is_some() {
        site.tree.get(&entry)
    } else {
        let site = Arc::clone(site);
        tokio::task::spawn_blocking(move || site.tree.get(&entry)).await.unwrap_or_else(|e| Err(e.into()))
    };
    let served = match found {
        Ok(served) => served,
        Err(e) if e.kind() == ErrorKind::NotFound => return not_found(),
        Err(e) => return failed(path, &e.to_string()),
    };
    match files::respond(served, &request.method, &request.headers) {
        Ok(response) => response,
        Err(e) => failed(path, &e.to_string()),
    }
}

/// A small object, whole.
fn small(entry: &path::Entry, bytes: Buffer, etag: &str) -> Response<Body> {
    let length = bytes.len();
    let mut response = Response::new(Body::from(Bytes::from_owner(bytes)));
    let headers = response.headers_mut();
    // Of hex digits, a dot, a type and a number.
    if let Ok(etag) = HeaderValue::try_from(format!("\"{etag}\"")) {
        headers.insert(ETAG, etag);
    }
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(entry.cache_control));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(entry.content_type));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

async fn page(site: &Arc<Site>, headers: HeaderMap) -> Response<Body> {
    let site = Arc::clone(site);
    match tokio::task::spawn_blocking(move || site.page.html(&headers)).await {
        Ok(Ok(html)) => {
            let mut response = text(StatusCode::OK, "text/html; charset=utf-8", html);
            response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
            response
        }
        Ok(Err(e)) => failed("/", &oscontainer_program::exit::chain(&e)),
        Err(e) => failed("/", &e.to_string()),
    }
}

fn not_found() -> Response<Body> {
    text(StatusCode::NOT_FOUND, TEXT, "not found\n".into())
}

/// The reason goes to the log; a stranger learns nothing of the machine.
fn failed(path: &str, reason: &str) -> Response<Body> {
    tracing::warn!("answering {path}: {reason}");
    text(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "this server cannot read its repository; its log says why\n".into())
}

fn text(status: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    let length = body.len();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(NO_CACHE));
    response
}
