//! `publish`: uploads an artifact, first the tarball, then the manifest that makes
//! it visible. What is there already is not sent again, and a transfer that fails
//! on the way is tried again.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use futures_util::StreamExt;
use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::{Digest, Hasher};
use oscontainer_artifact::manifest::{FILE, MEDIA_TYPE, Manifest, TARBALL_FILE, TARBALL_MEDIA_TYPE};
use oscontainer_artifact::protocol::{REPR_DIGEST, digest_header, path};
use oscontainer_program::client::{ClientOptions, STALL_TIMEOUT, success};
use oscontainer_program::exit::{self, Usage};
use oscontainer_program::options::Global;
use oscontainer_program::progress::Progress;
use oscontainer_program::reject;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG};
use reqwest::{Body, Client, Response, StatusCode, Url};
use serde::Serialize;
use tokio_util::io::ReaderStream;

/// How often a transfer is tried.
const TRIES: u32 = 3;
/// How long to wait after the first failure; twice as long after the second.
const BACKOFF: Duration = Duration::from_secs(1);
/// Bytes read from the tarball at a time.
const CHUNK: usize = 256 << 10;
/// How long the endpoint may take to answer after it has everything: it syncs
/// gigabytes to a disk that may be slow.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

/// Options of `publish`.
#[derive(Debug, Clone, Args)]
pub struct PublishArgs {
    /// Directory with manifest.json and repo.tar, as pack writes it
    dir: PathBuf,
    /// URL of the artifact endpoint
    #[arg(long, value_name = "URL", env = "OSCONTAINER_ENDPOINT")]
    endpoint: Url,
    #[command(flatten)]
    client: ClientOptions,
}

/// What was published.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Published {
    /// Where the manifest is.
    pub manifest_url: String,
    /// The digest of the artifact: the manifest's sha256.
    pub manifest_digest: String,
    /// The OSTree commit in it.
    pub commit: String,
    /// The ref that names the commit.
    #[serde(rename = "ref")]
    pub ref_name: String,
    /// The artifact's version.
    pub version: String,
    /// Whether the endpoint had it not before.
    #[serde(skip)]
    pub changed: bool,
}

/// Uploads an artifact and prints where it is.
pub fn main(args: PublishArgs, global: &Global) -> Result<()> {
    let published = publish(&args.dir, &args.endpoint, &args.client)?;
    global.print(&published)
}

/// Uploads the artifact in `dir` to `endpoint`, after it was checked.
///
/// # Errors
/// [`Rejected`] when the files contradict each other, or the endpoint will never
/// take them; other errors are worth a retry.
pub fn publish(dir: &Path, endpoint: &Url, client: &ClientOptions) -> Result<Published> {
    if !matches!(endpoint.scheme(), "http" | "https") {
        return Err(Usage(format!("--endpoint {endpoint}: expected an http or https URL")).into());
    }
    let local = Local::read(dir)?;
    let remote = Remote { client: client.upload_client(endpoint)?, endpoint: endpoint.clone() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(remote.publish(&local))
}

/// An artifact on disk whose tarball is what its manifest says.
struct Local {
    manifest: Manifest,
    bytes: Vec<u8>,
    tarball: PathBuf,
}

impl Local {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let manifest = Manifest::parse(&bytes).with_context(|| format!("reading {}", path.display()))?;
        let tarball = dir.join(TARBALL_FILE);
        let (size, digest) = measure(&tarball).with_context(|| format!("reading {}", tarball.display()))?;
        if (size, digest) != (manifest.tarball.size, manifest.tarball.digest) {
            reject!(
                "{} has {size} bytes and {digest}, but {} says {} bytes and {}: pack the commit again",
                tarball.display(),
                path.display(),
                manifest.tarball.size,
                manifest.tarball.digest
            );
        }
        Ok(Self { manifest, bytes, tarball })
    }
}

fn measure(path: &Path) -> Result<(u64, Digest)> {
    let mut file = File::open(path)?;
    let (mut hasher, mut size) = (Hasher::new(), 0);
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((size, hasher.digest())),
            count => {
                hasher.update(&buffer[..count]);
                size += count as u64;
            }
        }
    }
}

/// The endpoint that is published to.
struct Remote {
    client: Client,
    endpoint: Url,
}

impl Remote {
    async fn publish(&self, local: &Local) -> Result<Published> {
        let digest = Digest::of(&local.bytes);
        let manifest_url = self.url(&local.manifest, FILE)?;
        let changed = match retried("asking for the manifest", async || self.stored(&manifest_url).await).await? {
            Some(stored) if stored == digest.to_string() => {
                tracing::info!("{manifest_url} is there already, with the same digest");
                false
            }
            Some(stored) => {
                let conflict = format!("{manifest_url} is there already, with {stored} instead of {digest}");
                return Err(immutable(Rejected::new(conflict).into()));
            }
            None => {
                retried("uploading the tarball", async || self.put_tarball(local).await).await?;
                retried("uploading the manifest", async || self.put_manifest(&manifest_url, &local.bytes).await)
                    .await?;
                true
            }
        };
        let manifest = &local.manifest;
        Ok(Published {
            manifest_url: manifest_url.to_string(),
            manifest_digest: digest.to_string(),
            commit: manifest.commit.to_string(),
            ref_name: manifest.ref_name.clone(),
            version: manifest.version.to_string(),
            changed,
        })
    }

    fn url(&self, manifest: &Manifest, file: &str) -> Result<Url> {
        let base = self.endpoint.as_str().split(['?', '#']).next().unwrap_or_default().trim_end_matches('/');
        let url = format!("{base}{}", path(&manifest.name, &manifest.version, file));
        Url::parse(&url).with_context(|| format!("reading the URL {url}"))
    }

    /// The digest of what is stored at `url`.
    async fn stored(&self, url: &Url) -> Result<Option<String>> {
        let request = self.client.head(url.clone()).timeout(STALL_TIMEOUT);
        let response = request.send().await.with_context(|| format!("asking {url}"))?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let response = accepted(response).await?;
        let etag = response.headers().get(ETAG).and_then(|etag| etag.to_str().ok());
        Ok(Some(etag.unwrap_or_default().trim_matches('"').to_owned()))
    }

    async fn put_tarball(&self, local: &Local) -> Result<()> {
        let url = self.url(&local.manifest, TARBALL_FILE)?;
        let size = local.manifest.tarball.size;
        let file = tokio::fs::File::open(&local.tarball)
            .await
            .with_context(|| format!("reading {}", local.tarball.display()))?;
        let progress = Progress::bytes(format!("uploading {TARBALL_FILE}"), Some(size));
        let sent = Arc::new(AtomicU64::new(0));
        let counter = sent.clone();
        let chunks = ReaderStream::with_capacity(file, CHUNK).inspect(move |chunk| {
            let count = chunk.as_ref().map_or(0, |bytes| bytes.len() as u64);
            counter.fetch_add(count, Ordering::Relaxed);
            progress.add(count);
        });
        let request = self
            .client
            .put(url.clone())
            .header(CONTENT_TYPE, TARBALL_MEDIA_TYPE)
            .header(CONTENT_LENGTH, size)
            .header(REPR_DIGEST, digest_header(&local.manifest.tarball.digest))
            .body(Body::wrap_stream(chunks));
        let response = tokio::select! {
            response = request.send() => response.with_context(|| format!("uploading to {url}"))?,
            () = stalled(&sent, size) => bail!("uploading to {url}: nothing moved for a while"),
        };
        accepted(response).await.map(drop)
    }

    async fn put_manifest(&self, url: &Url, bytes: &[u8]) -> Result<()> {
        let request = self
            .client
            .put(url.clone())
            .timeout(ANSWER_TIMEOUT)
            .header(CONTENT_TYPE, MEDIA_TYPE)
            .header(REPR_DIGEST, digest_header(&Digest::of(bytes)))
            .body(bytes.to_vec());
        let response = request.send().await.with_context(|| format!("uploading to {url}"))?;
        accepted(response).await.map(drop)
    }
}

/// Ends when `sent` has stood still for too long.
async fn stalled(sent: &AtomicU64, size: u64) {
    let mut last = 0;
    loop {
        tokio::time::sleep(if last == size { ANSWER_TIMEOUT } else { STALL_TIMEOUT }).await;
        let now = sent.load(Ordering::Relaxed);
        if now == last {
            return;
        }
        last = now;
    }
}

/// A response that is a success, or an error that says what to do.
async fn accepted(response: Response) -> Result<Response> {
    let status = response.status();
    let result = success(response).await;
    match status {
        StatusCode::CONFLICT => result.map_err(immutable),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => result.context("the endpoint wants another --token-file"),
        _ => result,
    }
}

fn immutable(error: anyhow::Error) -> anyhow::Error {
    error.context("artifacts are immutable: choose another version")
}

/// Runs `work` until it succeeds, fails for good, or has failed often enough.
async fn retried<T>(what: &str, work: impl AsyncFn() -> Result<T>) -> Result<T> {
    let mut tries = 1;
    loop {
        match work().await {
            Err(error) if tries < TRIES && exit::code(&error) == exit::RETRY => {
                let pause = BACKOFF * tries;
                tracing::warn!("{what} failed, next try in {} s: {}", pause.as_secs(), exit::chain(&error));
                tokio::time::sleep(pause).await;
                tries += 1;
            }
            result => return result,
        }
    }
}
