//! A repository of a registry (OCI distribution specification): the one place that
//! speaks to `oci-client`. Calls are synchronous. Blobs stream in both directions.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::poll_fn;
use oci_client::client::{Certificate, CertificateEncoding, Client, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
};
use oci_client::secrets::RegistryAuth;
use oci_client::{Reference, RegistryOperation};
use oci_spec::image::MediaType;
use oscontainer_artifact::digest::Digest;
use oscontainer_program::client::passing;
use oscontainer_program::reject;
use oscontainer_program::retry::{Retry, RetryOptions};
use oscontainer_program::tls::install_provider;
use reqwest::header::CONTENT_LENGTH;
use reqwest::{RequestBuilder, StatusCode, Url};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::mpsc;

use super::credentials::{self, Credentials};
use super::download::Download;
use super::refusal::{self, is_busy, is_missing, is_unauthorized, told};
use super::token;
use super::upload::{Failure, Session, Upload};

/// What a manifest may be.
const ACCEPTED: [&str; 4] =
    [OCI_IMAGE_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, IMAGE_MANIFEST_LIST_MEDIA_TYPE];
/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// What we are.
const USER_AGENT: &str = concat!("oscontainer/", env!("CARGO_PKG_VERSION"));
/// How long a transfer may stand still.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Options of commands that speak to a registry.
#[derive(Debug, Clone, Args)]
pub struct RegistryOptions {
    /// File with the registry's credentials, in podman's and docker's format
    /// [default: REGISTRY_AUTH_FILE, then where podman and docker keep them]
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_AUTHFILE")]
    authfile: Option<PathBuf>,
    /// PEM file with the certificate authorities to trust instead of the system's
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// With false, certificates are not verified, and registries without TLS are spoken to
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 1, action = clap::ArgAction::Set,
          env = "OSCONTAINER_TLS_VERIFY")]
    tls_verify: bool,
    #[command(flatten)]
    retry: RetryOptions,
}

/// The connections to registries; an image and the one before it share them.
pub struct Registries<'a> {
    options: &'a RegistryOptions,
    connections: RefCell<Vec<Arc<Connection>>>,
}

/// A connection to one registry with one set of credentials.
pub struct Connection {
    /// The registry's host and port.
    pub registry: String,
    /// Where the registry's API is: `https://HOST:PORT/v2/`.
    pub base: Url,
    /// What proves who we are.
    pub credentials: Credentials,
    runtime: Runtime,
    chunked: Client,
    /// A second client, for logging in, manifests, and blobs that go in one piece. The first one gets no
    /// credentials where none are asked for: it would ask before each request whether they are needed.
    pub whole: Client,
    /// For uploads in chunks.
    pub http: reqwest::Client,
    /// The registry takes no chunks: blobs go in one piece.
    no_chunks: AtomicBool,
}

/// A repository of a registry, and an image in it.
pub struct Registry {
    reference: Reference,
    operation: RegistryOperation,
    token: Option<String>,
    connection: Arc<Connection>,
    retry: Retry,
}

impl<'a> Registries<'a> {
    /// None yet.
    pub fn new(options: &'a RegistryOptions) -> Self {
        Self { options, connections: RefCell::default() }
    }

    /// Prepares to speak to the registry of `reference`; `push` asks for write access.
    ///
    /// # Errors
    /// When the credentials or certificates cannot be read, or the registry refuses them.
    pub fn open(&self, reference: &Reference, push: bool) -> Result<Registry> {
        let host = reference.resolve_registry();
        let credentials = credentials::find(reference, self.options.authfile.as_deref())?;
        let mut connections = self.connections.borrow_mut();
        let known = connections.iter().find(|known| known.registry == host && known.credentials == credentials);
        let connection = match known {
            Some(known) => Arc::clone(known),
            None => {
                let new = Arc::new(Connection::open(host, self.options, credentials)?);
                connections.push(Arc::clone(&new));
                new
            }
        };
        let mut retry = Retry::new(&self.options.retry);
        let operation = if push { RegistryOperation::Push } else { RegistryOperation::Pull };
        let what = format!("logging in at {host}");
        let token = retry.run(&what, async || connection.log_in(reference, operation).await);
        let token = connection.runtime.block_on(token).context(what)?;
        Ok(Registry { reference: reference.clone(), operation, token, connection, retry })
    }
}

impl Connection {
    fn open(host: &str, options: &RegistryOptions, credentials: Credentials) -> Result<Self> {
        install_provider();
        // The OCI client panics where this fails, even if it is to trust --ca-file alone.
        reqwest::Client::builder()
            .build()
            .context("this system has no CA certificates: it needs some in /etc/ssl/certs/ca-certificates.crt")?;
        let certificates = match &options.ca_file {
            Some(file) => {
                let data = std::fs::read(file).with_context(|| format!("reading --ca-file {}", file.display()))?;
                vec![Certificate { encoding: CertificateEncoding::Pem, data }]
            }
            None => Vec::new(),
        };
        let registry = host.to_owned();
        let mut http = reqwest::Client::builder()
            .danger_accept_invalid_certs(!options.tls_verify)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(STALL_TIMEOUT)
            .user_agent(USER_AGENT);
        if let Some(certificate) = certificates.first() {
            http = http.tls_certs_only(reqwest::Certificate::from_pem_bundle(&certificate.data)?);
        }
        let http = http.build().context("setting up the HTTP client")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let mut plain = false;
        if !options.tls_verify {
            let asked = runtime.block_on(async { http.get(format!("https://{registry}/v2/")).send().await });
            plain = asked.is_err_and(|error| error.is_connect());
        }
        let client = |whole: bool| {
            Client::try_from(ClientConfig {
                protocol: ClientProtocol::HttpsExcept(if plain { vec![registry.clone()] } else { Vec::new() }),
                accept_invalid_certificates: !options.tls_verify,
                use_monolithic_push: whole,
                tls_certs_only: certificates.clone(),
                // reqwest counts the time that a request's body takes; a chunk is soon sent.
                read_timeout: (!whole).then_some(STALL_TIMEOUT),
                connect_timeout: Some(CONNECT_TIMEOUT),
                user_agent: USER_AGENT,
                ..ClientConfig::default()
            })
            .map_err(|e| anyhow!(e).context("setting up the HTTP client"))
        };
        let (whole, chunked) = (client(true)?, client(false)?);
        let scheme = if plain { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{registry}/v2/")).with_context(|| format!("reading {registry}"))?;
        let no_chunks = AtomicBool::new(false);
        Ok(Self { registry, base, credentials, runtime, chunked, whole, http, no_chunks })
    }

    /// Gets what the registry gives for our credentials, where it gives such: a token for `reference`, whose time
    /// may be over soon.
    ///
    /// # Errors
    /// When the registry refuses them, or does not answer.
    pub async fn log_in(&self, reference: &Reference, operation: RegistryOperation) -> Result<Option<String>> {
        let (actions, operations) = match operation {
            RegistryOperation::Pull => ("pull", &[RegistryOperation::Pull][..]),
            RegistryOperation::Push => ("pull,push", &[RegistryOperation::Pull, RegistryOperation::Push][..]),
        };
        let token = token::exchange(self, &[scope(reference, actions)]).await?;
        for client in [&self.whole, &self.chunked] {
            match (&token, self.credentials.auth()) {
                (None, RegistryAuth::Anonymous) => {}
                (None, auth) => client.store_auth_if_needed(&self.registry, &auth).await,
                // It keeps one for each operation.
                (Some(token), _) => {
                    let auth = RegistryAuth::Bearer(token.clone());
                    for operation in operations {
                        client.auth(reference, &auth, *operation).await.map_err(|error| told(error, &self.registry))?;
                    }
                }
            }
        }
        Ok(token)
    }

    /// Takes the blob `digest` over from the repository `from` into `to`, if the registry lets us.
    async fn mount(&self, to: &Reference, from: &Reference, digest: &str) -> Result<bool> {
        let token = token::exchange(self, &[scope(to, "pull,push"), scope(from, "pull")]).await?;
        let mut url = self.url(&format!("{}/blobs/uploads/", to.repository()))?;
        url.query_pairs_mut().append_pair("mount", digest).append_pair("from", from.repository());
        let request = self.authorized(self.http.post(url.clone()), &url, token.as_deref());
        let answer = request.header(CONTENT_LENGTH, 0).send().await?;
        Ok(answer.status() == StatusCode::CREATED)
    }

    /// `request` to `url` with what proves who we are, which goes to the registry and to nobody else.
    pub fn authorized(&self, request: RequestBuilder, url: &Url, token: Option<&str>) -> RequestBuilder {
        match (token, &self.credentials) {
            _ if url.origin() != self.base.origin() => request,
            (Some(token), _) => request.bearer_auth(token),
            (None, Credentials::Password(user, password)) => request.basic_auth(user, Some(password)),
            _ => request,
        }
    }

    /// The URL of `path` below the registry's API.
    ///
    /// # Errors
    /// When there is none.
    pub fn url(&self, path: &str) -> Result<Url> {
        self.base.join(path).with_context(|| format!("reading {path}"))
    }
}

impl Registry {
    /// The image that is meant.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The connection to its registry.
    pub fn connection(&self) -> Arc<Connection> {
        Arc::clone(&self.connection)
    }

    /// The runtime that its requests are made in.
    pub fn runtime(&self) -> Handle {
        self.connection.runtime.handle().clone()
    }

    /// What the registry gave for our credentials, where it gives such; its time may be over.
    pub fn token(&self) -> Option<String> {
        self.token.clone()
    }

    /// All the patience that the options grant, within what is left of the deadline.
    pub fn patience(&self) -> Retry {
        self.retry.renewed()
    }

    /// The manifest or image index with `digest`, or the one that is meant; not parsed,
    /// but its digest is verified where one is given.
    ///
    /// # Errors
    /// Rejected when there is none.
    pub fn manifest(&self, digest: Option<&Digest>) -> Result<Vec<u8>> {
        let reference = digest.map(|digest| self.reference.clone_with_digest(digest.to_string()));
        let reference = reference.as_ref().unwrap_or(&self.reference);
        let Some(bytes) = self.find(reference)? else { reject!("there is no {reference}: the registry answered 404") };
        match reference.digest().filter(|wanted| *wanted != Digest::of(&bytes).to_string()) {
            Some(wanted) => reject!("the manifest {wanted} has the digest {}", Digest::of(&bytes)),
            None => Ok(bytes),
        }
    }

    /// The manifest or image index that `reference` names in the repository, if there is one.
    ///
    /// # Errors
    /// When the registry does not say.
    pub fn find(&self, reference: &Reference) -> Result<Option<Vec<u8>>> {
        let Connection { whole, credentials, .. } = &*self.connection;
        let auth = credentials.auth();
        let pull = async |_: &Client| match whole.pull_manifest_raw(reference, &auth, &ACCEPTED).await {
            Ok((bytes, _)) => Ok(Some(bytes.into())),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(error),
        };
        self.attempt(&format!("reading the manifest of {reference}"), pull)
    }

    /// The same for a tag.
    ///
    /// # Errors
    /// When the registry does not say.
    pub fn tagged(&self, tag: &str) -> Result<Option<Vec<u8>>> {
        self.find(&self.with_tag(tag))
    }

    /// The bytes of a blob from `from` on; nothing is asked for before it is read.
    pub fn blob(&self, digest: &Digest, size: u64, from: u64) -> Box<dyn Read + '_> {
        Box::new(Download::new(self, digest, size, from))
    }

    /// Whether the repository has a blob.
    ///
    /// # Errors
    /// When the registry does not say.
    pub fn has(&self, digest: &Digest) -> Result<bool> {
        let digest = digest.to_string();
        let ask = async |client: &Client| client.blob_exists(&self.reference, &digest).await;
        self.attempt(&format!("asking for the blob {digest}"), ask)
    }

    /// Takes a blob over from the repository of `from` within the registry, if it lets us.
    pub fn mount(&self, from: &Reference, digest: &Digest) -> bool {
        let digest = digest.to_string();
        let mount = self.connection.mount(&self.reference, from, &digest);
        self.connection.runtime.block_on(mount).unwrap_or_else(|error| {
            tracing::debug!("{digest} cannot be mounted from {from}: {error:#}");
            false
        })
    }

    /// Uploads the blob `digest` of `size` bytes, which `write` writes. What breaks goes on where the registry
    /// has it; where it has nothing of it any more, `write` is called again.
    ///
    /// # Errors
    /// Those of `write`; when the registry does not take it.
    pub fn push(
        &self,
        digest: &Digest,
        size: u64,
        write: &mut dyn FnMut(&mut dyn Write) -> Result<Digest>,
    ) -> Result<()> {
        let what = format!("uploading the blob {digest}");
        let mut retry = self.patience();
        loop {
            let (sender, receiver) = mpsc::channel(1);
            let upload = if self.connection.no_chunks.load(Ordering::Relaxed) {
                self.connection.runtime.spawn(self.send_whole(*digest, size, receiver))
            } else {
                self.connection.runtime.spawn(Session::new(self, *digest)?.send(receiver))
            };
            let mut writer = Upload::new(sender);
            let written = write(&mut writer).and_then(|found| {
                if found != *digest {
                    reject!("what was to be uploaded has changed: its digest was {digest} and is {found}");
                }
                Ok(writer.flush()?)
            });
            let closed = writer.end(written.as_ref().err().map(ToString::to_string));
            let uploaded = self.connection.runtime.block_on(upload).context("uploading")?;
            match (written, uploaded) {
                (Err(error), _) if !closed => return Err(error),
                (_, Ok(())) => return Ok(()),
                (_, Err(Failure::NoChunks(why))) if !self.connection.no_chunks.swap(true, Ordering::Relaxed) => {
                    tracing::info!("the registry does not take chunks ({why}): sending blobs whole");
                }
                (_, Err(Failure::NoChunks(why))) => return Err(anyhow!(why).context(what)),
                (_, Err(Failure::Other(error))) => self.pause(&mut retry, &what, error)?,
            }
        }
    }

    /// Sends a blob in one piece.
    fn send_whole(
        &self,
        digest: Digest,
        size: u64,
        mut pieces: mpsc::Receiver<io::Result<Bytes>>,
    ) -> impl Future<Output = Result<(), Failure>> + Send + 'static {
        let Connection { whole, registry, .. } = &*self.connection;
        let (client, reference, registry) = (whole.clone(), self.reference.clone(), registry.clone());
        async move {
            let stream = poll_fn(move |context| pieces.poll_recv(context))
                .map(|piece| piece.map_err(OciDistributionError::IoError));
            let sent = client.push_blob_stream(&reference, stream, &digest.to_string(), Some(size)).await;
            sent.map(|_| ()).map_err(|error| Failure::Other(told(error, &registry)))
        }
    }

    /// What the registry says to be attached to the image with `digest`; nothing where it cannot say.
    ///
    /// # Errors
    /// When the registry does not answer.
    pub fn referrers(&self, digest: &Digest) -> Result<Vec<String>> {
        let reference = self.reference.clone_with_digest(digest.to_string());
        let Connection { whole, .. } = &*self.connection;
        let pull = async |_: &Client| whole.pull_referrers(&reference, None).await;
        let index = self.attempt(&format!("reading what is attached to {digest}"), pull)?;
        Ok(index.manifests.into_iter().map(|manifest| manifest.digest).collect())
    }

    /// Stores a manifest or an image index under a tag, or by its digest alone.
    ///
    /// # Errors
    /// When the registry does not take it.
    pub fn push_manifest(&self, bytes: &[u8], media_type: &MediaType, tag: Option<&str>) -> Result<()> {
        let reference = match tag {
            Some(tag) => self.with_tag(tag),
            None => self.reference.clone_with_digest(Digest::of(bytes).to_string()),
        };
        let content_type: reqwest::header::HeaderValue = media_type.as_ref().parse()?;
        let push = async |client: &Client| {
            client.push_manifest_raw(&reference, bytes.to_vec(), content_type.clone()).await.map(|_| ())
        };
        self.attempt(&format!("storing the manifest of {reference}"), push)
    }

    /// The tag that is meant.
    pub fn tag(&self) -> &str {
        self.reference.tag().unwrap_or_default()
    }

    fn with_tag(&self, tag: &str) -> Reference {
        Reference::with_tag(self.reference.registry().into(), self.reference.repository().into(), tag.into())
    }

    /// Calls `call` until it succeeds, fails for good, or the patience is at its end.
    ///
    /// # Errors
    /// The last one of `call`, as people are told it.
    pub fn attempt<T>(&self, what: &str, call: impl AsyncFn(&Client) -> Result<T, OciDistributionError>) -> Result<T> {
        let Connection { runtime, chunked, registry, .. } = &*self.connection;
        let once = async || {
            let mut called = call(chunked).await;
            // The token's time may be over, and only we can get a new one.
            if self.token.is_some() && called.as_ref().is_err_and(is_unauthorized) {
                self.connection.log_in(&self.reference, self.operation).await?;
                called = call(chunked).await;
            }
            match called {
                Ok(value) => Ok(value),
                Err(error) => {
                    let busy = is_busy(&error);
                    let told = told(error, registry);
                    Err(match busy {
                        Some(url) => self.later(&url, told).await,
                        None => told,
                    })
                }
            }
        };
        let called = runtime.block_on(self.patience().run(what, once));
        called.with_context(|| what.to_owned())
    }

    /// The `error` of a registry that is busy, and how long it wants to be left alone: the OCI client keeps that to
    /// itself, so it is asked again.
    async fn later(&self, url: &str, error: anyhow::Error) -> anyhow::Error {
        let Ok(url) = Url::parse(url) else { return error };
        let request = self.connection.authorized(self.connection.http.head(url.clone()), &url, self.token.as_deref());
        match request.send().await {
            Ok(answer) if refusal::BUSY.contains(&answer.status().as_u16()) => {
                passing(format!("{error:#}"), answer.headers())
            }
            _ => error,
        }
    }

    /// Waits before the next try of `what`, if there is to be one.
    ///
    /// # Errors
    /// `error`, when there is to be none.
    pub fn pause(&self, retry: &mut Retry, what: &str, error: anyhow::Error) -> Result<()> {
        self.connection.runtime.block_on(retry.pause(what, error)).with_context(|| what.to_owned())
    }
}

/// What is asked for in a repository (distribution, "Token Scope Documentation").
fn scope(reference: &Reference, actions: &str) -> String {
    format!("repository:{}:{actions}", reference.repository())
}
