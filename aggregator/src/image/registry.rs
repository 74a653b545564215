//! A repository of a registry (OCI distribution specification). Calls are synchronous. Blobs stream in both
//! directions.

use std::cell::RefCell;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use oci_client::Reference;
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
};
use oci_spec::image::{ImageIndex, MediaType};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::retry::Retry;
use oscontainer_program::{exit, reject};
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use reqwest::{Method, StatusCode};
use tokio::sync::mpsc;

use super::connection::{Access, Connection, RegistryOptions, scope};
use super::credentials;
use super::download::Download;
use super::input::MAX_DOCUMENT;
use super::refusal::answered;
use super::upload::{Failure, Session, Upload};

/// What a manifest may be.
const ACCEPTED: [&str; 4] =
    [OCI_IMAGE_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, IMAGE_MANIFEST_LIST_MEDIA_TYPE];

/// The connections to registries; an image and the one before it share them.
pub struct Registries<'a> {
    options: &'a RegistryOptions,
    opened: RefCell<Vec<Opened>>,
}

/// A repository that was opened.
struct Opened {
    repository: String,
    push: bool,
    access: Arc<Access>,
}

/// A repository of a registry, and an image in it.
pub struct Registry {
    reference: Reference,
    access: Arc<Access>,
    retry: Retry,
}

/// Another repository of the registry, out of which it may take blobs over.
pub struct Mount {
    /// Its name.
    pub repository: String,
    /// The right to read there and to write here.
    pub access: Arc<Access>,
    /// The registry lets us not.
    refused: AtomicBool,
}

impl<'a> Registries<'a> {
    /// None yet.
    pub fn new(options: &'a RegistryOptions) -> Self {
        Self { options, opened: RefCell::default() }
    }

    /// Prepares to speak to the registry of `reference`; `push` asks for write access.
    ///
    /// # Errors
    /// When the credentials or certificates cannot be read, or the registry refuses them.
    pub fn open(&self, reference: &Reference, push: bool) -> Result<Registry> {
        let host = reference.resolve_registry();
        let credentials = credentials::find(reference, self.options.authfile.as_deref())?;
        let mut retry = Retry::new(&self.options.retry);
        let mut opened = self.opened.borrow_mut();
        let same = |known: &&Opened| {
            let connection = &known.access.connection;
            connection.registry == host && connection.credentials == credentials
        };
        // Who may write may read.
        let fits = |known: &&Opened| known.repository == reference.repository() && (known.push || !push);
        if let Some(known) = opened.iter().filter(same).find(fits) {
            return Ok(Registry { reference: reference.clone(), access: Arc::clone(&known.access), retry });
        }
        let connection = match opened.iter().find(same) {
            Some(known) => Arc::clone(&known.access.connection),
            None => Arc::new(Connection::open(host, self.options, credentials, &mut retry)?),
        };
        let scopes = vec![scope(reference, if push { "pull,push" } else { "pull" })];
        let access = Arc::new(Access::new(connection, scopes));
        let what = format!("logging in at {host}");
        let token = retry.run(&what, async || access.log_in(None).await);
        access.connection.runtime.block_on(token).context(what)?;
        let repository = reference.repository().to_owned();
        opened.push(Opened { repository, push, access: Arc::clone(&access) });
        Ok(Registry { reference: reference.clone(), access, retry })
    }
}

impl Registry {
    /// The image that is meant.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The right to use the repository.
    pub fn access(&self) -> &Arc<Access> {
        &self.access
    }

    /// All the patience that the options grant, within what is left of the deadline.
    pub fn patience(&self) -> Retry {
        self.retry.renewed()
    }

    /// The manifest or image index with `digest`; not parsed.
    ///
    /// # Errors
    /// Rejected when there is none.
    pub fn manifest(&self, digest: &Digest) -> Result<Vec<u8>> {
        let reference = self.reference.clone_with_digest(digest.to_string());
        let Some(bytes) = self.find(&reference)? else { reject!("there is no {reference}: the registry answered 404") };
        Ok(bytes)
    }

    /// The manifest or image index that `reference` names in the repository, if there is one; its digest is
    /// verified where the reference has one.
    ///
    /// # Errors
    /// When the registry does not say.
    pub fn find(&self, reference: &Reference) -> Result<Option<Vec<u8>>> {
        let name = reference.digest().or(reference.tag()).unwrap_or_default();
        let found = self.get(&format!("manifests/{name}"), &format!("reading the manifest of {reference}"))?;
        let digest = found.as_deref().map(|bytes| Digest::of(bytes).to_string());
        match (reference.digest(), digest) {
            (Some(wanted), Some(digest)) if wanted != digest => {
                reject!("the manifest {wanted} has the digest {digest}")
            }
            _ => Ok(found),
        }
    }

    /// The same for a tag.
    ///
    /// # Errors
    /// When the registry does not say.
    pub fn tagged(&self, tag: &str) -> Result<Option<Vec<u8>>> {
        self.find(&self.with_tag(tag))
    }

    /// The bytes of a blob of `size` bytes from `from` to `end`; nothing is asked for before it is read.
    pub fn blob(&self, digest: &Digest, size: u64, (from, end): (u64, u64)) -> Box<dyn Read + '_> {
        Box::new(Download::new(self, digest, size, (from, end)))
    }

    /// Whether the repository has a blob.
    ///
    /// # Errors
    /// When the registry does not say.
    pub fn has(&self, digest: &Digest) -> Result<bool> {
        let url = self.url(&format!("blobs/{digest}"))?;
        self.attempt(&format!("asking for the blob {digest}"), async || self.access.has(&url).await)
    }

    /// Prepares to take blobs over from the repository of `from` within the registry.
    ///
    /// # Errors
    /// When the registry does not answer; it may refuse.
    pub fn mount(&self, from: &Reference) -> Result<Mount> {
        let scopes = vec![scope(&self.reference, "pull,push"), scope(from, "pull")];
        let access = Arc::new(Access::new(Arc::clone(&self.access.connection), scopes));
        let what = format!("logging in at {} to take blobs over from {from}", self.access.connection.registry);
        let refused = match self.attempt(&what, async || access.log_in(None).await) {
            Err(error) if exit::code(&error) == exit::REJECTED => {
                tracing::debug!("nothing can be mounted: {error:#}");
                true
            }
            done => done.map(|()| false)?,
        };
        Ok(Mount { repository: from.repository().to_owned(), access, refused: refused.into() })
    }

    /// Uploads the blob `digest` of `size` bytes, which `write` gives to the upload, unless the registry can take it
    /// over by `mount`. What breaks goes on where the registry has it; where it has nothing of it any more, `write` is
    /// called again.
    ///
    /// # Errors
    /// Those of `write`; when the registry does not take it.
    pub fn push(
        &self,
        digest: &Digest,
        size: u64,
        mount: Option<&Mount>,
        write: &mut dyn FnMut(&mut Upload) -> Result<Digest>,
    ) -> Result<()> {
        let Connection { runtime, no_chunks, .. } = &*self.access.connection;
        let what = format!("uploading the blob {digest}");
        let (mut retry, mut furthest) = (self.patience(), 0);
        loop {
            let error = match runtime.block_on(self.begin(digest, mount)) {
                Ok(None) => return Ok(()),
                Ok(Some(session)) => {
                    let (sender, receiver) = mpsc::channel(1);
                    let mut writer = Upload::new(sender, session.chunk());
                    let upload = runtime.spawn(session.send(size, receiver));
                    let written = write(&mut writer).and_then(|found| {
                        if found != *digest {
                            reject!("what was to be uploaded has changed: its digest was {digest} and is {found}");
                        }
                        Ok(std::io::Write::flush(&mut writer)?)
                    });
                    let closed = writer.end(written.as_ref().err().map(ToString::to_string));
                    let (offset, uploaded) = runtime.block_on(upload).context("uploading")?;
                    // Only what was never reached is progress: an upload that is lost at the same place each time ends.
                    if offset > furthest {
                        furthest = offset;
                        retry.progress();
                    }
                    match (written, uploaded) {
                        (Err(error), _) if !closed => return Err(error),
                        (_, Ok(())) => return Ok(()),
                        (_, Err(Failure::NoChunks(why))) => {
                            if !no_chunks.swap(true, Ordering::Relaxed) {
                                tracing::info!("the registry does not take chunks ({why}): sending blobs whole");
                            }
                            continue;
                        }
                        (_, Err(Failure::Other(error))) => error,
                    }
                }
                Err(error) => error,
            };
            self.pause(&mut retry, &what, error)?;
            // It may have all of it, and only its answer be lost.
            if self.has(digest)? {
                return Ok(());
            }
        }
    }

    /// Begins an upload, if the blob cannot be taken over by `mount`.
    async fn begin(&self, digest: &Digest, mount: Option<&Mount>) -> Result<Option<Session>> {
        if let Some(from) = mount.filter(|from| !from.refused.load(Ordering::Relaxed)) {
            match Session::begin(self, *digest, Some(from)).await {
                Err(error) if exit::code(&error) == exit::REJECTED => {
                    tracing::debug!("nothing can be mounted from {}: {error:#}", from.repository);
                    from.refused.store(true, Ordering::Relaxed);
                }
                begun => return begun,
            }
        }
        Session::begin(self, *digest, None).await
    }

    /// The digests of what the registry says to be attached to the image with `digest`; nothing where it has no API for
    /// that, which registries say in many ways.
    ///
    /// # Errors
    /// When the registry does not answer.
    pub fn referrers(&self, digest: &Digest) -> Result<Option<Vec<String>>> {
        let bytes = match self.get(&format!("referrers/{digest}"), &format!("reading what is attached to {digest}")) {
            Err(error) if exit::code(&error) == exit::REJECTED => {
                tracing::debug!("no referrers API: {error:#}");
                return Ok(None);
            }
            found => found?,
        };
        let Some(bytes) = bytes else { return Ok(None) };
        match serde_json::from_slice::<ImageIndex>(&bytes) {
            Ok(index) => Ok(Some(index.manifests().iter().map(|m| m.digest().to_string()).collect())),
            Err(e) => reject!("what is attached to {digest} cannot be read: {e}"),
        }
    }

    /// Stores a manifest or an image index under a tag, or by its digest alone.
    ///
    /// # Errors
    /// When the registry does not take it.
    pub fn push_manifest(&self, bytes: &[u8], media_type: &MediaType, tag: Option<&str>) -> Result<()> {
        let name = tag.map_or_else(|| Digest::of(bytes).to_string(), str::to_owned);
        let url = self.url(&format!("manifests/{name}"))?;
        let Connection { stall, .. } = *self.access.connection;
        let complete =
            |request: reqwest::RequestBuilder| request.header(CONTENT_TYPE, media_type.as_ref()).body(bytes.to_vec());
        self.attempt(&format!("storing the manifest {name} of {}", self.reference), async || {
            let answer = self.access.send(Method::PUT, &url, stall, complete).await?;
            // Not every registry says where it is now.
            match answer.status().is_success() {
                true => Ok(()),
                false => Err(answered(answer, &self.access.connection).await),
            }
        })
    }

    /// The tag that is meant.
    pub fn tag(&self) -> &str {
        self.reference.tag().unwrap_or_default()
    }

    fn with_tag(&self, tag: &str) -> Reference {
        Reference::with_tag(self.reference.registry().into(), self.reference.repository().into(), tag.into())
    }

    /// The URL of `path` below the repository.
    ///
    /// # Errors
    /// When there is none.
    pub fn url(&self, path: &str) -> Result<reqwest::Url> {
        self.access.connection.url(&format!("{}/{path}", self.reference.repository()))
    }

    /// A document below the repository, if there is one.
    fn get(&self, path: &str, what: &str) -> Result<Option<Vec<u8>>> {
        let Connection { stall, .. } = *self.access.connection;
        let url = self.url(path)?;
        self.attempt(what, async || {
            let accepting = |request: reqwest::RequestBuilder| request.header(ACCEPT, ACCEPTED.join(", "));
            let answer = self.access.send(Method::GET, &url, stall, accepting).await?;
            match answer.status() {
                StatusCode::OK => Ok(Some(self.access.connection.read(answer, MAX_DOCUMENT).await?)),
                StatusCode::NOT_FOUND => Ok(None),
                _ => Err(answered(answer, &self.access.connection).await),
            }
        })
    }

    /// Calls `call` until it succeeds, fails for good, or the patience is at its end.
    ///
    /// # Errors
    /// The last one of `call`.
    pub fn attempt<T>(&self, what: &str, call: impl AsyncFnMut() -> Result<T>) -> Result<T> {
        let called = self.access.connection.runtime.block_on(self.patience().run(what, call));
        called.with_context(|| what.to_owned())
    }

    /// Waits before the next try of `what`, if there is to be one.
    ///
    /// # Errors
    /// `error`, when there is to be none.
    pub fn pause(&self, retry: &mut Retry, what: &str, error: anyhow::Error) -> Result<()> {
        self.access.connection.runtime.block_on(retry.pause(what, error)).with_context(|| what.to_owned())
    }
}
