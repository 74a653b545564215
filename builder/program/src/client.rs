//! The HTTP client of `publish` and `fetch`: a bearer token from a file, one more
//! certificate authority, redirects that never lead to a less safe scheme.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use oscontainer_artifact::Rejected;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Certificate, ClientBuilder, Identity, Method, RequestBuilder, Response, StatusCode, Url, redirect};

use crate::retry::RetryOptions;
use crate::tls;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How many redirects are followed.
const MAX_REDIRECTS: usize = 10;
/// How much of an error response's body is read and shown, in bytes, and how long that may take.
const MAX_REASON: usize = 512;
const REASON_TIMEOUT: Duration = Duration::from_secs(10);

/// Options of every command that speaks to an artifact endpoint.
#[derive(Debug, Clone, Args)]
pub struct ClientOptions {
    /// File with the bearer token for the endpoint
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// PEM file with the certificate authorities to trust instead of the system's
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_CA_FILE")]
    pub ca_file: Option<PathBuf>,
    /// PEM file with the certificate to show to an endpoint that asks for one
    #[arg(long, value_name = "FILE", requires = "client_key", env = "OSCONTAINER_CLIENT_CERT")]
    client_cert: Option<PathBuf>,
    /// PEM file with that certificate's private key
    #[arg(long, value_name = "FILE", requires = "client_cert", env = "OSCONTAINER_CLIENT_KEY")]
    client_key: Option<PathBuf>,
    /// Seconds without a byte after which a connection counts as broken
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..),
        env = "OSCONTAINER_STALL_TIMEOUT")]
    stall_timeout: u64,
    /// How patient the transfers are
    #[command(flatten)]
    pub retry: RetryOptions,
}

impl ClientOptions {
    /// A client for downloads from `url`. It speaks HTTP/1.1, for in HTTP/2 requests at the same
    /// time share one connection.
    ///
    /// # Errors
    /// When a file cannot be read or is not what it should be.
    pub fn client(&self, url: &Url) -> Result<Client> {
        self.build(url, |builder| builder.http1_only().read_timeout(self.stall_timeout()))
    }

    /// A client for uploads to `url`: without the stall timeout, for reqwest counts
    /// the time that a request's body takes as waiting for the response. Its user
    /// looks after uploads that stand still.
    ///
    /// # Errors
    /// As for [`ClientOptions::client`].
    pub fn upload_client(&self, url: &Url) -> Result<Client> {
        self.build(url, |builder| builder)
    }

    /// The `Authorization` of a request, from the file as it is now.
    fn authorization(&self) -> Result<Option<HeaderValue>> {
        let Some(file) = &self.token_file else { return Ok(None) };
        let token =
            std::fs::read_to_string(file).with_context(|| format!("reading --token-file {}", file.display()))?;
        let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
            .map_err(|_| Rejected::new(format!("--token-file {} holds no bearer token", file.display())))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// How long a transfer may stand still.
    pub fn stall_timeout(&self) -> Duration {
        Duration::from_secs(self.stall_timeout)
    }

    fn build(&self, url: &Url, limit: impl Fn(ClientBuilder) -> ClientBuilder) -> Result<Client> {
        tls::install_provider();
        // A file that is not there is not worth a retry.
        self.authorization()?;
        let build = |builder: ClientBuilder| limit(builder).build().context("setting up the HTTP client");
        let http = match &self.ca_file {
            Some(file) => build(self.builder()?.tls_certs_only(authorities("--ca-file", file)?))?,
            // A scratch image has no system certificates, and plain HTTP needs none.
            None if url.scheme() == "http" => {
                build(self.builder()?).or_else(|_| build(self.builder()?.tls_certs_only([])))?
            }
            None => build(self.builder()?)?,
        };
        Ok(Client { http, options: self.clone(), home: url.clone() })
    }

    fn builder(&self) -> Result<ClientBuilder> {
        let mut builder = reqwest::Client::builder()
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
        if let (Some(cert), Some(key)) = (&self.client_cert, &self.client_key) {
            let read = |option: &str, file: &Path| {
                std::fs::read(file).with_context(|| format!("reading {option} {}", file.display()))
            };
            let pem = [read("--client-cert", cert)?, read("--client-key", key)?].join(&b'\n');
            let identity = Identity::from_pem(&pem)
                .map_err(|e| Rejected::new(format!("--client-cert {}: {e}", cert.display())))?;
            builder = builder.identity(identity);
        }
        Ok(builder)
    }
}

/// An HTTP client that shows the token to the host that the user named, and to no other.
pub struct Client {
    http: reqwest::Client,
    options: ClientOptions,
    /// A URL of that host.
    home: Url,
}

impl Client {
    /// A request, with the token as it is in its file now where `url` is of the client's own host: a service
    /// account's is replaced every hour, and a transfer may take longer. A redirect to another host loses it
    /// (reqwest sees to that).
    ///
    /// # Errors
    /// When the file cannot be read or holds no token.
    pub fn request(&self, method: Method, url: &Url) -> Result<RequestBuilder> {
        let mut request = self.http.request(method, url.clone());
        if url.origin() == self.home.origin()
            && let Some(value) = self.options.authorization()?
        {
            request = request.header(AUTHORIZATION, value);
        }
        Ok(request)
    }

    /// A GET, as [`Client::request`].
    ///
    /// # Errors
    /// As for [`Client::request`].
    pub fn get(&self, url: &Url) -> Result<RequestBuilder> {
        self.request(Method::GET, url)
    }
}

/// The certificate authorities in a PEM file that `option` names.
///
/// # Errors
/// When it cannot be read; [`Rejected`] when it holds something else, or nothing.
pub fn authorities(option: &str, file: &Path) -> Result<Vec<Certificate>> {
    let pem = std::fs::read(file).with_context(|| format!("reading {option} {}", file.display()))?;
    tls::roots(option, file, &pem)?;
    let certificates = Certificate::from_pem_bundle(&pem);
    Ok(certificates.map_err(|e| Rejected::new(format!("{option} {}: {e}", file.display())))?)
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
    let headers = response.headers().clone();
    let body = reason(response).await;
    let reason = match body.trim() {
        "" => status.canonical_reason().unwrap_or("no reason given"),
        reason => reason,
    };
    let text = format!("{url} answered {}: {reason}", status.as_u16());
    let may_pass = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
    if status.is_client_error() && !may_pass.contains(&status) {
        return Err(Rejected::new(text).into());
    }
    Err(passing(text, &headers))
}

/// The beginning of an answer's body, as far as it came.
async fn reason(mut response: Response) -> String {
    let mut body = Vec::new();
    let read = async {
        while body.len() < MAX_REASON
            && let Ok(Some(chunk)) = response.chunk().await
        {
            body.extend_from_slice(&chunk);
        }
    };
    // What came until then says something too.
    let _ = tokio::time::timeout(REASON_TIMEOUT, read).await;
    body.truncate(MAX_REASON);
    String::from_utf8_lossy(&body).into_owned()
}

/// The error `text` of an answer that another try may not get: not before the time that its `headers` ask for.
pub fn passing(text: String, headers: &HeaderMap) -> anyhow::Error {
    match headers.get(RETRY_AFTER).and_then(|value| wait(value.to_str().ok()?)) {
        Some(after) => Later { text, after }.into(),
        None => anyhow!(text),
    }
}

/// A server that asks to come again, not before some time.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
struct Later {
    text: String,
    after: Duration,
}

/// How long the server that gave this error wants to be left alone.
pub fn retry_after(error: &anyhow::Error) -> Option<Duration> {
    error.chain().find_map(|cause| cause.downcast_ref::<Later>()).map(|later| later.after)
}

/// The value of `Retry-After`: seconds, or a date (RFC 9110, 10.2.3).
fn wait(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = jiff::fmt::rfc2822::parse(value).ok()?.timestamp().as_second();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
    Some(Duration::from_secs(u64::try_from(until).ok()?.saturating_sub(now)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(wait("120"), Some(Duration::from_secs(120)));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let far = wait("Fri, 01 Jan 2100 00:00:00 GMT").unwrap();
        assert!(far > Duration::from_secs(1_000_000_000), "{far:?}");
        for bad in ["", "-1", "soon", "1.5"] {
            assert_eq!(wait(bad), None, "{bad}");
        }
    }
}
