//! The connection to a registry: its address, who we are there, and tokens for its repositories. Every request to
//! it is sent here, so that limits, redirects and credentials are the same for all of them. (`oci-client` has
//! names, media types and the registries' errors; its requests wait for ever, hold answers of any size in memory,
//! follow redirects to less safe places and cannot go on in the middle of an upload.)

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use clap::Args;
use oci_client::Reference;
use oscontainer_artifact::Rejected;
use oscontainer_program::client::authorities;
use oscontainer_program::reject;
use oscontainer_program::retry::{Retry, RetryOptions};
use oscontainer_program::tls::install_provider;
use reqwest::{Client, ClientBuilder, Method, RequestBuilder, Response, StatusCode, Url, redirect};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, OnceCell};
use tokio::time::timeout;

use super::credentials::Credentials;
use super::refusal::{answered, is_not_tls, told};
use super::token::{self, Issuer};

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How many redirects are followed.
const MAX_REDIRECTS: usize = 10;
/// What we are.
const USER_AGENT: &str = concat!("oscontainer/", env!("CARGO_PKG_VERSION"));
/// Bytes of a request's body that are sent in a second, at the least.
const SLOWEST: u64 = 64 << 10;

/// Options of commands that speak to a registry.
#[derive(Debug, Clone, Args)]
pub struct RegistryOptions {
    /// File with the registry's credentials, in podman's and docker's format
    /// [default: REGISTRY_AUTH_FILE, then where podman and docker keep them]
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_AUTHFILE")]
    pub authfile: Option<PathBuf>,
    /// PEM file with the certificate authorities to trust instead of the system's
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// With false, certificates are not verified, and registries that answer without TLS are spoken to
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 1, action = clap::ArgAction::Set,
          env = "OSCONTAINER_TLS_VERIFY")]
    tls_verify: bool,
    /// Seconds without a byte from a registry after which a connection counts as broken
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..),
          env = "OSCONTAINER_STALL_TIMEOUT")]
    stall_timeout: u64,
    #[command(flatten)]
    pub retry: RetryOptions,
}

/// A connection to one registry with one set of credentials.
pub struct Connection {
    /// The registry's host and port.
    pub registry: String,
    /// Where the registry's API is: `https://HOST:PORT/v2/`.
    pub base: Url,
    /// What proves who we are.
    pub credentials: Credentials,
    /// What requests are made in.
    pub runtime: Runtime,
    /// How long a transfer may stand still.
    pub stall: Duration,
    /// The registry takes no chunks: blobs go in one piece.
    pub no_chunks: AtomicBool,
    options: RegistryOptions,
    http: Client,
    /// Who issues tokens, as the API's base says.
    issuer: OnceCell<Option<Issuer>>,
    /// The same, as it says to a request that has none.
    challenger: OnceLock<Issuer>,
}

impl Connection {
    /// Prepares to speak to the registry `host`. Where it need not have TLS, it is asked whether it has.
    ///
    /// # Errors
    /// When certificates cannot be read; when it is asked, and does not answer.
    pub fn open(host: &str, options: &RegistryOptions, credentials: Credentials, retry: &mut Retry) -> Result<Self> {
        install_provider();
        let base = |scheme| Url::parse(&format!("{scheme}://{host}/v2/")).with_context(|| format!("reading {host}"));
        let mut connection = Self {
            registry: host.to_owned(),
            base: base("https")?,
            credentials,
            runtime: tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?,
            stall: Duration::from_secs(options.stall_timeout),
            no_chunks: AtomicBool::new(false),
            options: options.clone(),
            http: build(options, redirect::Policy::custom(safe))?,
            issuer: OnceCell::new(),
            challenger: OnceLock::new(),
        };
        if !options.tls_verify {
            let what = format!("asking {host} for TLS");
            let asked = retry.run(&what, async || connection.has_tls().await);
            if !connection.runtime.block_on(asked).context(what)? {
                connection.base = base("http")?;
            }
        }
        Ok(connection)
    }

    /// Whether the registry speaks TLS. Only what is something else is none: who is silent or away now may have it.
    async fn has_tls(&self) -> Result<bool> {
        match self.answer(self.request(Method::GET, &self.base), self.stall).await? {
            Err(error) if is_not_tls(&error) => Ok(false),
            answer => answer.map(|_| true).map_err(|error| told(error, &self.registry)),
        }
    }

    /// The URL of `path` below the registry's API.
    ///
    /// # Errors
    /// When there is none.
    pub fn url(&self, path: &str) -> Result<Url> {
        self.base.join(path).with_context(|| format!("reading {path}"))
    }

    /// A request that proves nothing.
    pub fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        self.http.request(method, url.clone())
    }

    /// A request with a secret in its body, which no redirect may take elsewhere.
    ///
    /// # Errors
    /// When certificates cannot be read.
    pub fn secret(&self, method: Method, url: &Url) -> Result<RequestBuilder> {
        Ok(build(&self.options, redirect::Policy::none())?.request(method, url.clone()))
    }

    /// Sends a request; the answer has to begin within `limit`.
    ///
    /// # Errors
    /// When there is none.
    pub async fn send(&self, request: RequestBuilder, limit: Duration) -> Result<Response> {
        self.answer(request, limit).await?.map_err(|error| told(error, &self.registry))
    }

    async fn answer(&self, request: RequestBuilder, limit: Duration) -> Result<reqwest::Result<Response>> {
        let answer = timeout(limit, request.send()).await;
        answer.map_err(|_| anyhow!("{} has not answered for {} s", self.registry, limit.as_secs()))
    }

    /// How long to wait for the answer to a request whose body has so many `bytes`.
    pub fn limit(&self, bytes: u64) -> Duration {
        self.stall + Duration::from_secs(bytes / SLOWEST)
    }

    /// The next bytes of an answer; nothing at its end.
    ///
    /// # Errors
    /// When they do not come.
    pub async fn more(&self, answer: &mut Response) -> Result<Option<Bytes>> {
        match timeout(self.stall, answer.chunk()).await {
            Ok(bytes) => bytes.map_err(|error| told(error, &self.registry)),
            Err(_) => bail!("{} has sent nothing for {} s", self.registry, self.stall.as_secs()),
        }
    }

    /// All of an answer that has `most` bytes at the most.
    ///
    /// # Errors
    /// Rejected when it is larger; when it does not come.
    pub async fn read(&self, mut answer: Response, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while let Some(more) = self.more(&mut answer).await? {
            if (bytes.len() + more.len()) as u64 > most {
                reject!("{} answered with more than the limit of {most} bytes", answer.url());
            }
            bytes.extend_from_slice(&more);
        }
        Ok(bytes)
    }

    /// Who issues tokens for the registry, if it wants any; it is asked once. Some want none but for what they then
    /// [say](Self::is_challenge).
    ///
    /// # Errors
    /// When it does not say.
    pub async fn issuer(&self) -> Result<Option<&Issuer>> {
        match self.challenger.get() {
            Some(issuer) => Ok(Some(issuer)),
            None => Ok(self.issuer.get_or_try_init(|| token::issuer(self)).await?.as_ref()),
        }
    }

    /// Whether with `answer` the registry wants a token; who issues it is remembered.
    ///
    /// # Errors
    /// Rejected when it is somebody less safe.
    fn is_challenge(&self, answer: &Response) -> Result<bool> {
        if answer.status() != StatusCode::UNAUTHORIZED || answer.url().origin() != self.base.origin() {
            return Ok(false);
        }
        let Some(issuer) = token::challenge(&self.base, answer)? else { return Ok(false) };
        self.challenger.get_or_init(|| issuer);
        Ok(true)
    }

    /// `request` to `url` with what proves who we are, which goes to the registry and to nobody else.
    fn authorized(&self, request: RequestBuilder, url: &Url, token: Option<&str>) -> RequestBuilder {
        match (token, &self.credentials) {
            _ if url.origin() != self.base.origin() => request,
            (Some(token), _) => request.bearer_auth(token),
            (None, Credentials::Password(user, password)) => request.basic_auth(user, Some(password)),
            _ => request,
        }
    }
}

/// Whether a redirect, or what else a registry says, leads from TLS to something less safe.
pub fn is_less_safe(from: &Url, to: &Url) -> bool {
    from.scheme() == "https" && to.scheme() != "https"
}

fn safe(attempt: redirect::Attempt<'_>) -> redirect::Action {
    if attempt.previous().last().is_some_and(|from| is_less_safe(from, attempt.url())) {
        let to = attempt.url().to_string();
        attempt.error(Rejected::new(format!("a redirect leads from https to {to}, which is less safe")))
    } else if attempt.previous().len() > MAX_REDIRECTS {
        attempt.error(Rejected::new(format!("more than {MAX_REDIRECTS} redirects")))
    } else {
        attempt.follow()
    }
}

fn build(options: &RegistryOptions, redirects: redirect::Policy) -> Result<Client> {
    let builder = ClientBuilder::new().connect_timeout(CONNECT_TIMEOUT).user_agent(USER_AGENT).redirect(redirects);
    let (builder, hint) = match &options.ca_file {
        Some(file) => (builder.tls_certs_only(authorities("--ca-file", file)?), "setting up the HTTP client"),
        None if options.tls_verify => (
            builder,
            "this system has no CA certificates: it needs some in /etc/ssl/certs/ca-certificates.crt, or --ca-file",
        ),
        // Nothing is verified, and to read the system's takes longer than to connect.
        None => (builder.tls_certs_only([]), "setting up the HTTP client"),
    };
    builder.danger_accept_invalid_certs(!options.tls_verify).build().context(hint)
}

/// The right to use a repository: tokens for it, renewed when their time is over.
pub struct Access {
    /// The connection to its registry.
    pub connection: Arc<Connection>,
    scopes: Vec<String>,
    token: RwLock<Option<Arc<str>>>,
    renewing: Mutex<()>,
}

impl Access {
    /// Nothing is asked for before the first token is [renewed](Self::log_in).
    pub fn new(connection: Arc<Connection>, scopes: Vec<String>) -> Self {
        Self { connection, scopes, token: RwLock::default(), renewing: Mutex::default() }
    }

    /// Gets a token, where the registry gives such, in place of `old`; unless another got one meanwhile.
    ///
    /// # Errors
    /// When the registry refuses our credentials, or does not answer.
    pub async fn log_in(&self, old: Option<&str>) -> Result<()> {
        let _one = self.renewing.lock().await;
        if self.token().as_deref() == old {
            let new = token::exchange(&self.connection, &self.scopes).await?;
            *self.token.write().unwrap_or_else(PoisonError::into_inner) = new.map(Into::into);
        }
        Ok(())
    }

    /// What the registry gave for our credentials, where it gives such; its time may be over.
    pub fn token(&self) -> Option<Arc<str>> {
        self.token.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends what `complete` makes of a request, within `limit`; once more, if it wants another token.
    ///
    /// # Errors
    /// When there is no answer; refusals are answers.
    pub async fn send(
        &self,
        method: Method,
        url: &Url,
        limit: Duration,
        complete: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response> {
        let Self { connection, .. } = self;
        let ask = async |token: Option<&str>| {
            let request = complete(connection.request(method.clone(), url));
            connection.send(connection.authorized(request, url, token), limit).await
        };
        let token = self.token();
        let answer = ask(token.as_deref()).await?;
        if !self.wants_another(token.as_deref(), &method, &answer)? {
            return Ok(answer);
        }
        self.log_in(token.as_deref()).await?;
        ask(self.token().as_deref()).await
    }

    /// Whether the registry has the blob that is to be at `url`.
    ///
    /// # Errors
    /// When it does not say.
    pub async fn has(&self, url: &Url) -> Result<bool> {
        let answer = self.send(Method::HEAD, url, self.connection.stall, |request| request).await?;
        match answer.status() {
            StatusCode::NOT_FOUND => Ok(false),
            status if status.is_success() => Ok(true),
            _ => Err(answered(answer, &self.connection).await),
        }
    }

    /// Sends a request that cannot be made again; the caller looks after the time that it takes.
    ///
    /// # Errors
    /// When there is no answer; refusals are answers.
    pub async fn send_once(&self, request: RequestBuilder, url: &Url) -> Result<Response> {
        let token = self.token();
        let answer = self.connection.authorized(request, url, token.as_deref()).send().await;
        let answer = answer.map_err(|error| told(error, &self.connection.registry))?;
        if self.wants_another(token.as_deref(), &Method::PUT, &answer)? {
            self.log_in(token.as_deref()).await?;
            bail!("{url} answered {}: it wants another token", answer.status());
        }
        Ok(answer)
    }

    /// Whether an answer may say that another token than `old` would do: the first one, or one whose time is not over.
    /// Some registries only find that a stranger may not write.
    fn wants_another(&self, old: Option<&str>, method: &Method, answer: &Response) -> Result<bool> {
        let reads = [Method::GET, Method::HEAD].contains(method);
        match (old, answer.status()) {
            (None, _) => self.connection.is_challenge(answer),
            (Some(_), StatusCode::UNAUTHORIZED) => Ok(true),
            (Some(_), status) => Ok(status == StatusCode::FORBIDDEN && !reads),
        }
    }
}

/// What is asked for in a repository (distribution, "Token Scope Documentation").
pub fn scope(reference: &Reference, actions: &str) -> String {
    format!("repository:{}:{actions}", reference.repository())
}
