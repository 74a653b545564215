//! What Prometheus is told: how many requests came, how they ended, how many bytes
//! were promised.

use axum::body::Body;
use axum::http::header::CONTENT_LENGTH;
use axum::http::{Method, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// The `Content-Type` of the OpenMetrics text format, version 1.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    method: &'static str,
    status: u16,
}

/// The server's counters.
pub struct Metrics {
    registry: Registry,
    requests: Family<Request, Counter>,
    bytes: Counter,
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("oscontainer");
        let (requests, bytes) = (Family::default(), Counter::default());
        registry.register("http_requests", "Requests answered", requests.clone());
        registry.register("http_response_bytes", "Bytes in the bodies of the answers", bytes.clone());
        Self { registry, requests, bytes }
    }

    /// Counts the answer to a request.
    pub fn count(&self, method: &Method, response: &Response<Body>) {
        // Only known methods become labels: a client could invent many.
        let label = match *method {
            Method::GET => "GET",
            Method::HEAD => "HEAD",
            _ => "other",
        };
        self.requests.get_or_create(&Request { method: label, status: response.status().as_u16() }).inc();
        let length = response.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if method != Method::HEAD {
            self.bytes.inc_by(length.unwrap_or(0));
        }
    }

    /// The text that `/metrics` answers.
    ///
    /// # Errors
    /// None that can happen: it writes into memory.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
