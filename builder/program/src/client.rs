//! The HTTP client of `publish` and `fetch`: a bearer token from a file, one more
//! certificate authority, redirects that never lead to a less safe scheme.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use oscontainer_artifact::Rejected;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Certificate, Client, ClientBuilder, Response, StatusCode, Url, redirect};

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a transfer may stand still.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How many redirects are followed.
const MAX_REDIRECTS: usize = 10;
/// How much of an error response's body is shown, in bytes.
const MAX_REASON: usize = 512;

/// Options of every command that speaks to an artifact endpoint.
#[derive(Debug, Clone, Args)]
pub struct ClientOptions {
    /// File with the bearer token for the endpoint
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// PEM file with the certificate authorities to trust instead of the system's
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_CA_FILE")]
    pub ca_file: Option<PathBuf>,
}

impl ClientOptions {
    /// A client for `url`. reqwest drops the token itself on a redirect to
    /// another host.
    ///
    /// # Errors
    /// When a file cannot be read or is not what it should be.
    pub fn client(&self, url: &Url) -> Result<Client> {
        self.builder(url)?.read_timeout(STALL_TIMEOUT).build().context("setting up the HTTP client")
    }

    /// A client for uploads to `url`: without the stall timeout, for reqwest counts
    /// the time that a request's body takes as waiting for the response. Its user
    /// looks after uploads that stand still.
    ///
    /// # Errors
    /// As for [`ClientOptions::client`].
    pub fn upload_client(&self, url: &Url) -> Result<Client> {
        self.builder(url)?.build().context("setting up the HTTP client")
    }

    fn builder(&self, url: &Url) -> Result<ClientBuilder> {
        // Only the first call installs; a second one finds the same provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = Client::builder()
            .user_agent(concat!("oscontainer/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(redirect::Policy::custom(|attempt| {
                let downgraded = attempt.previous().last().is_some_and(|from| from.scheme() == "https")
                    && attempt.url().scheme() != "https";
                if downgraded {
                    attempt.error(Rejected::new("a redirect leads from https to a less safe scheme"))
                } else if attempt.previous().len() > MAX_REDIRECTS {
                    attempt.error(Rejected::new(format!("more than {MAX_REDIRECTS} redirects")))
                } else {
                    attempt.follow()
                }
            }));
        if let Some(file) = &self.ca_file {
            let pem = std::fs::read(file).with_context(|| format!("reading --ca-file {}", file.display()))?;
            let certificates = Certificate::from_pem_bundle(&pem)
                .map_err(|e| Rejected::new(format!("--ca-file {}: {e}", file.display())))?;
            builder = builder.tls_certs_only(certificates);
        } else if url.scheme() == "http" {
            // A scratch image has no system certificates, and plain HTTP needs none.
            builder = builder.tls_certs_only([]);
        }
        if let Some(file) = &self.token_file {
            let token =
                std::fs::read_to_string(file).with_context(|| format!("reading --token-file {}", file.display()))?;
            let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
                .map_err(|_| Rejected::new(format!("--token-file {} holds no bearer token", file.display())))?;
            value.set_sensitive(true);
            builder = builder.default_headers(HeaderMap::from_iter([(AUTHORIZATION, value)]));
        }
        Ok(builder)
    }
}

/// Passes a successful response on, and turns any other into an error that names
/// the URL, the status and the server's reason. A 4xx that will stay so is
/// [`Rejected`]; 408, 429 and 5xx are worth a retry.
///
/// # Errors
/// As said.
pub async fn success(response: Response) -> Result<Response> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let url = response.url().clone();
    let mut body = response.text().await.unwrap_or_default();
    body.truncate(body.floor_char_boundary(MAX_REASON));
    let reason = match body.trim() {
        "" => status.canonical_reason().unwrap_or("no reason given"),
        reason => reason,
    };
    let text = format!("{url} answered {}: {reason}", status.as_u16());
    let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
    if status.is_client_error() && !passing.contains(&status) {
        return Err(Rejected::new(text).into());
    }
    bail!(text)
}
