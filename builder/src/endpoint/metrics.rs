//! What an operator sees: counters for Prometheus, and one line in the log for
//! each request, when its response has been sent.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use anyhow::{Context, Result};
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt;
use oscontainer_program::server::Peer;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::housekeeping::Reading;
use super::store::Usage;

/// The media type of [`Metrics::encode`] (OpenMetrics 1.0).
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The endpoint's counters.
pub struct Metrics {
    registry: Registry,
    requests: Family<Labels, Counter>,
    errors: Family<OfKind, Counter>,
    durations: Family<OfMethod, Histogram, fn() -> Histogram>,
    /// Bytes of uploads that were read.
    pub received: Counter,
    sent: Counter,
    versions: Gauge,
    stored: Gauge,
    staged: Gauge,
    /// Each has no value where there is no such limit.
    quota: Family<Whole, Gauge>,
    free: Family<Whole, Gauge>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    method: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfMethod {
    method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

/// No label: of the whole store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Whole {}

/// What kind of error an answer with this status is.
fn kind(status: StatusCode) -> Option<&'static str> {
    let kind = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "access",
        StatusCode::NOT_FOUND => "not-found",
        StatusCode::REQUEST_TIMEOUT => "client-stalled",
        StatusCode::CONFLICT => "conflict",
        StatusCode::PAYLOAD_TOO_LARGE => "too-large",
        StatusCode::UNPROCESSABLE_ENTITY => "mismatch",
        StatusCode::TOO_MANY_REQUESTS => "rate",
        StatusCode::SERVICE_UNAVAILABLE => "unavailable",
        StatusCode::INSUFFICIENT_STORAGE => "full",
        status if status.is_client_error() => "request",
        status if status.is_server_error() => "internal",
        _ => return None,
    };
    Some(kind)
}

/// From 5 ms, a small file, to 80 minutes, a large one over a slow line.
fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.005, 4.0, 11))
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("oscontainer_endpoint"),
            requests: Family::default(),
            errors: Family::default(),
            durations: Family::new_with_constructor(durations),
            received: Counter::default(),
            sent: Counter::default(),
            versions: Gauge::default(),
            stored: Gauge::default(),
            staged: Gauge::default(),
            quota: Family::default(),
            free: Family::default(),
        };
        let registry = &mut metrics.registry;
        registry.register("requests", "Requests answered", metrics.requests.clone());
        let text = "Requests that were refused or failed, and answers that broke off";
        registry.register("errors", text, metrics.errors.clone());
        let text = "Time from a request's head to the end of the response";
        registry.register_with_unit("request_duration", text, Unit::Seconds, metrics.durations.clone());
        let bytes = Unit::Bytes;
        registry.register_with_unit("received", "Bytes of uploads read", bytes.clone(), metrics.received.clone());
        registry.register_with_unit("sent", "Bytes of responses' content sent", bytes.clone(), metrics.sent.clone());
        registry.register("versions", "Complete versions in the store", metrics.versions.clone());
        let mut gauge = |name: &str, text: &str, gauge: Gauge| {
            registry.register_with_unit(name, text, bytes.clone(), gauge);
        };
        gauge("stored", "Bytes of complete versions in the store", metrics.stored.clone());
        let text = "Bytes of uploads and of tarballs that wait for their manifest, with those that were promised";
        gauge("staged", text, metrics.staged.clone());
        registry.register_with_unit("quota", "Bytes that may be stored", bytes.clone(), metrics.quota.clone());
        let text = "Bytes that are free, of the disk and of the quota";
        registry.register_with_unit("free", text, bytes, metrics.free.clone());
        metrics
    }

    fn error(&self, kind: &'static str) {
        self.errors.get_or_create(&OfKind { kind }).inc();
    }

    /// The text for Prometheus, with what the store holds.
    ///
    /// # Errors
    /// When the library cannot write to a string.
    pub fn encode(&self, usage: &Usage) -> Result<String> {
        let set = |gauge: &Gauge, value: u64| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        set(&self.versions, usage.versions);
        set(&self.stored, usage.stored);
        set(&self.staged, usage.staged);
        for (gauge, value) in [(&self.quota, usage.quota), (&self.free, usage.free)] {
            if let Some(value) = value {
                set(&gauge.get_or_create(&Whole {}), value);
            }
        }
        let mut text = String::new();
        encode(&mut text, &self.registry).context("writing the metrics")?;
        Ok(text)
    }
}

/// Who makes a request that writes, as soon as that is known; an extension of the request.
#[derive(Debug, Clone, Default)]
pub struct Writer(Arc<OnceLock<String>>);

impl Writer {
    /// It is this service account, or what its token comes from.
    pub fn is(&self, name: String) {
        // Asked twice, it is the same.
        let _ = self.0.set(name);
    }
}

/// Counts and logs a request. Headers are never logged: one of them is the token.
pub async fn observe(State(metrics): State<Arc<Metrics>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let (client, writer) = (request.extensions().get().map(|Peer(client)| *client), Writer::default());
    request.extensions_mut().insert(writer.clone());
    let response = next.run(request).await;
    let status = response.status().as_u16();
    metrics.requests.get_or_create(&Labels { method: label(&method), status }).inc();
    if let Some(kind) = kind(response.status()) {
        metrics.error(kind);
    }
    let (mut parts, body) = response.into_parts();
    let reading = parts.extensions.remove::<Reading>();
    let mut line = Line {
        metrics,
        method,
        uri,
        client,
        writer,
        status,
        started,
        sent: 0,
        whole: false,
        failed: false,
        _reading: reading,
    };
    // Wrapped into a stream, the body's length is not known any more.
    if let Some(length) = body.size_hint().exact().filter(|_| !parts.headers.contains_key(CONTENT_LENGTH)) {
        parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    if line.method == Method::HEAD || body.is_end_stream() {
        line.whole = true;
        return Response::from_parts(parts, body);
    }
    // The body is not asked for its end once it has given as many bytes as it said.
    let length = parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let chunks = body.into_data_stream().map(Some).chain(futures_util::stream::iter([None]));
    let counted = chunks.filter_map(move |chunk| {
        match &chunk {
            Some(Ok(bytes)) => {
                line.sent += bytes.len() as u64;
                line.whole = length == Some(line.sent);
            }
            Some(Err(error)) => {
                tracing::error!("{}: {error}", line.uri.path());
                line.metrics.error("sending");
                line.failed = true;
            }
            None => line.whole = true,
        }
        std::future::ready(chunk)
    });
    Response::from_parts(parts, Body::from_stream(counted))
}

/// The access log's line, written when the response's body is done or dropped.
struct Line {
    metrics: Arc<Metrics>,
    method: Method,
    uri: Uri,
    /// Where it came from; a socket has no address.
    client: Option<IpAddr>,
    writer: Writer,
    status: u16,
    started: Instant,
    sent: u64,
    whole: bool,
    /// Whether it broke off on our side.
    failed: bool,
    /// What is being read until the body is sent.
    _reading: Option<Reading>,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.metrics.sent.inc_by(self.sent);
        let duration = self.metrics.durations.get_or_create(&OfMethod { method: label(&self.method) }).clone();
        duration.observe(self.started.elapsed().as_secs_f64());
        let milliseconds = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (method, path, status, sent) = (label(&self.method), self.uri.path(), self.status, self.sent);
        let client = self.client.map(tracing::field::display);
        let writer = self.writer.0.get().map(tracing::field::display);
        let end = if self.whole {
            ""
        } else if self.failed {
            ": the answer broke off"
        } else {
            self.metrics.error("client-left");
            ": the client left early"
        };
        tracing::info!(method, path, status, sent, milliseconds, client, writer, "request{end}");
    }
}

/// A method as a label: clients may send any word, and each would be a time series.
fn label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}
