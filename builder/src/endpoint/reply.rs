//! Replies that are not files: a refusal with its status and reason, JSON, HTML.

use std::io::{self, ErrorKind};

use anyhow::Error;
use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use oscontainer_program::exit;
use oscontainer_program::files::NO_CACHE;
use serde::Serialize;

/// Why a request is not served: a status and one line for the client.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    reason: String,
    headers: HeaderMap,
}

impl Refusal {
    /// A refusal with `reason`, which says what to do about it.
    pub fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Self { status, reason: reason.into(), headers: HeaderMap::new() }
    }

    /// The refusal with one more header.
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// Nothing is there.
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, what)
    }
}

/// A failure of the store: 507 where it is full, else 500. The whole chain goes to
/// the log, and none of the server's paths to the client.
impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        tracing::error!("{}", exit::chain(&error));
        let full = |e: &io::Error| {
            matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
        };
        if error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(full)) {
            Self::full()
        } else {
            Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the store failed; the endpoint's log says why")
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
