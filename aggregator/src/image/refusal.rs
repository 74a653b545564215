//! What a registry's errors mean: which may pass, which stay, and what people are told of them.

use std::error::Error;
use std::io;

use anyhow::anyhow;
use oci_client::errors::{OciDistributionError, OciEnvelope, OciErrorCode};
use oscontainer_artifact::Rejected;
use oscontainer_program::client::passing;
use oscontainer_program::exit;
use reqwest::{Response, StatusCode, Url};

/// What a registry answers that has no time now.
pub const BUSY: [u16; 2] = [429, 503];

/// The address that was asked for, where the registry had no time for it.
pub fn is_busy(error: &OciDistributionError) -> Option<String> {
    match error {
        OciDistributionError::ServerError { code, url, .. } => BUSY.contains(code).then(|| url.clone()),
        OciDistributionError::RegistryError { envelope, url } => is_limit(envelope).then(|| url.clone()),
        OciDistributionError::RequestError(error) => {
            error.status().filter(|status| BUSY.contains(&status.as_u16())).and(error.url()).map(Url::to_string)
        }
        _ => None,
    }
}

fn is_limit(envelope: &OciEnvelope) -> bool {
    envelope.errors.iter().any(|error| matches!(error.code, OciErrorCode::Toomanyrequests))
}

pub fn is_unauthorized(error: &OciDistributionError) -> bool {
    match error {
        OciDistributionError::UnauthorizedError { .. } => true,
        OciDistributionError::ServerError { code, .. } => *code == 401,
        OciDistributionError::RequestError(error) => error.status() == Some(StatusCode::UNAUTHORIZED),
        _ => false,
    }
}

/// Whether a registry says that there is no such thing.
pub fn is_missing(error: &OciDistributionError) -> bool {
    match error {
        OciDistributionError::ImageManifestNotFoundError(_) => true,
        OciDistributionError::ServerError { code, .. } => *code == 404,
        OciDistributionError::RegistryError { envelope, .. } => envelope.errors.iter().any(|error| {
            matches!(error.code, OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown | OciErrorCode::NotFound)
        }),
        _ => false,
    }
}

/// The error for people; what will stay so is rejected.
pub fn told(error: OciDistributionError, registry: &str) -> anyhow::Error {
    match error {
        OciDistributionError::UnauthorizedError { url } => refused(&url, 401, "", registry),
        OciDistributionError::ServerError { code, url, message } => refused(&url, code, &message, registry),
        OciDistributionError::RequestError(error) => match error.status() {
            Some(status) => refused(error.url().map_or(registry, |url| url.as_str()), status.as_u16(), "", registry),
            _ if is_tls(&error) => {
                let hint = "--ca-file names the authorities to trust, --tls-verify=false trusts anybody";
                let reason = exit::chain(&error.into());
                Rejected::new(format!("{registry} has no TLS that is trusted: {hint}: {reason}")).into()
            }
            _ => error.into(),
        },
        OciDistributionError::RegistryError { envelope, url } if is_limit(&envelope) => {
            anyhow!("{url} answered 429: {envelope}")
        }
        OciDistributionError::IoError(error) => error.into(),
        other => Rejected::new(format!("{registry}: {other}")).into(),
    }
}

/// The error for an answer of `registry`, or of who gives tokens for it, that is none of success.
pub async fn answered(answer: Response, registry: &str) -> anyhow::Error {
    let (url, status, headers) = (answer.url().to_string(), answer.status().as_u16(), answer.headers().clone());
    // The status says enough.
    let message = answer.text().await.unwrap_or_default();
    let error = refused(&url, status, &message, registry);
    if exit::code(&error) == exit::RETRY { passing(error.to_string(), &headers) } else { error }
}

fn refused(url: &str, status: u16, message: &str, registry: &str) -> anyhow::Error {
    if [401, 403].contains(&status) {
        let hint = format!("`podman login {registry}` or --authfile gives them");
        return Rejected::new(format!("{url} answered {status}: no or wrong credentials for {registry}; {hint}"))
            .into();
    }
    let text = format!("{url} answered {status}: {}", message.trim());
    // What may pass.
    if matches!(status, 408 | 429 | 500..) { anyhow!(text) } else { Rejected::new(text).into() }
}

/// Whether a connection failed because of TLS, such as an unknown certificate: no try will help.
fn is_tls(error: &(dyn Error + 'static)) -> bool {
    // The source of an I/O error is not the error in it, but that one's source.
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    error.is::<rustls::Error>() || inner.is_some_and(|inner| is_tls(inner)) || error.source().is_some_and(is_tls)
}
