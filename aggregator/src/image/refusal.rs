//! What a registry's errors mean: which may pass, which stay, and what people are told of them.

use std::error::Error;
use std::io;

use anyhow::anyhow;
use oci_client::errors::{OciEnvelope, OciErrorCode};
use oscontainer_artifact::Rejected;
use oscontainer_program::client::passing;
use oscontainer_program::exit;
use reqwest::{Response, StatusCode};
use rustls::InvalidMessage;

use super::connection::Connection;

/// How much of what a registry says of an error is read, and how much of it is shown, in bytes.
const MAX_ANSWER: u64 = 64 << 10;
const MAX_REASON: usize = 512;

/// The error of a request that got no answer, for people; what will stay so is rejected.
pub fn told(error: reqwest::Error, registry: &str) -> anyhow::Error {
    if tls(&error).is_none() {
        return error.into();
    }
    let hint = "--ca-file names the authorities to trust, --tls-verify=false trusts anybody";
    let reason = exit::chain(&error.into());
    Rejected::new(format!("{registry} has no TLS that is trusted: {hint}: {reason}")).into()
}

/// The error for an answer of a registry, or of who gives tokens for it, that is none of success.
pub async fn answered(answer: Response, connection: &Connection) -> anyhow::Error {
    let (url, mut status, headers) = (answer.url().to_string(), answer.status(), answer.headers().clone());
    // The status says enough.
    let bytes = connection.read(answer, MAX_ANSWER).await.unwrap_or_default();
    let mut reason = String::from_utf8_lossy(&bytes).into_owned();
    if let Ok(envelope) = serde_json::from_slice::<OciEnvelope>(&bytes) {
        // Some say it under another status.
        if envelope.errors.iter().any(|error| matches!(error.code, OciErrorCode::Toomanyrequests)) {
            status = StatusCode::TOO_MANY_REQUESTS;
        }
        reason = envelope.to_string();
    }
    reason.truncate(reason.floor_char_boundary(MAX_REASON));
    let error = refused(&url, status.as_u16(), &reason, &connection.registry);
    if exit::code(&error) == exit::RETRY { passing(error.to_string(), &headers) } else { error }
}

fn refused(url: &str, status: u16, message: &str, registry: &str) -> anyhow::Error {
    if [401, 403].contains(&status) {
        let hint = format!("`podman login {registry}` or --authfile gives them");
        return Rejected::new(format!("{url} answered {status}: no or wrong credentials for {registry}; {hint}"))
            .into();
    }
    let text = format!("{url} answered {status}: {}", message.trim());
    // What may pass; 501 is said of what the registry will never do.
    if matches!(status, 408 | 429 | 500 | 502..) { anyhow!(text) } else { Rejected::new(text).into() }
}

/// Whether a connection failed because the other side speaks something else than TLS.
pub fn is_not_tls(error: &reqwest::Error) -> bool {
    matches!(tls(error), Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)))
}

/// Why TLS let a connection fail, such as an unknown certificate, if it did: no try will help.
fn tls<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    // The source of an I/O error is not the error in it, but that one's source.
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let found = error.downcast_ref().or_else(|| inner.and_then(|inner| tls(inner)));
    found.or_else(|| error.source().and_then(tls))
}
