//! Replies that are not files: a refusal with its status and reason, JSON, HTML.

use anyhow::Error;
use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use oscontainer_program::exit;
use oscontainer_program::files::NO_CACHE;
use serde::Serialize;

use super::store::{Failure, failure};

/// Why a request is not served: a status and one line for the client.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    reason: String,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refusal {
    /// A refusal with `reason`, which says what to do about it.
    pub fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Self { status, reason: reason.into(), headers: Vec::new() }
    }

    /// The refusal with one more header.
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Nothing is there.
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, what)
    }
}

/// A failure of the store: 507 where it is full, 503 where it may pass, else 500. The whole
/// chain goes to the log, and none of the server's paths to the client.
impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let failure = failure(&error);
        match failure {
            // It is the clients' own doing.
            Failure::Interrupted(_) => tracing::info!("{}", exit::chain(&error)),
            _ => tracing::error!("{}", exit::chain(&error)),
        }
        match failure {
            Failure::Full => Self::full(),
            Failure::Passing => Self::new(StatusCode::SERVICE_UNAVAILABLE, "the store does not answer; try again")
                .header(RETRY_AFTER, HeaderValue::from_static("5")),
            Failure::Interrupted(reason) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, reason).header(RETRY_AFTER, HeaderValue::from_static("1"))
            }
            Failure::Other => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the store failed; the endpoint's log says why")
            }
        }
    }
}

impl Refusal {
    /// No space left.
    pub fn full() -> Self {
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "no space left in the store; nothing was changed")
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = text(self.status, self.reason);
        response.headers_mut().extend(self.headers);
        response
    }
}

/// Sets a header whose value was made here.
pub fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    match HeaderValue::try_from(value) {
        Ok(value) => drop(headers.insert(name, value)),
        Err(error) => tracing::error!("the header {name}: {}", exit::chain(&error.into())),
    }
}

/// One line of text.
pub fn text(status: StatusCode, line: impl Into<String>) -> Response {
    let body = line.into() + "\n";
    typed(status, "text/plain; charset=utf-8", body)
}

/// A JSON document, indented for people.
pub fn json(value: &impl Serialize) -> Response {
    match serde_json::to_string_pretty(value) {
        Ok(body) => typed(StatusCode::OK, "application/json", body + "\n"),
        Err(error) => Refusal::from(Error::from(error)).into_response(),
    }
}

/// Any text with its media type. It may change: caches ask again.
pub fn typed(status: StatusCode, content_type: &'static str, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static(NO_CACHE));
    response
}
