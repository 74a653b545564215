//! The endpoint as a client sees it: what is stored, the manifest in one request, and
//! the tarball as a resumable upload (draft-ietf-httpbis-resumable-upload), which is
//! begun anew after every break and then stands where it stood.

use std::io::SeekFrom;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::manifest::{MEDIA_TYPE, Manifest, Tarball};
use oscontainer_artifact::protocol::{
    INTEROP_VERSION, PARTIAL_MEDIA_TYPE, REPR_DIGEST, UPLOAD_COMPLETE, UPLOAD_INTEROP_VERSION, UPLOAD_LENGTH,
    UPLOAD_LIMIT, UPLOAD_OFFSET, digest_header, path,
};
use oscontainer_program::client::{Client, ClientOptions, success};
use oscontainer_program::progress::Progress;
use oscontainer_program::reject;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderMap, LOCATION};
use reqwest::{Body, Method, Response, StatusCode, Url};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

/// Bytes read from the tarball at a time.
const CHUNK: usize = 256 << 10;
/// Bytes of one request: each one's are durable when it is answered. The endpoint keeps what came of a request that
/// broke off, so that few large ones lose nothing and wait for the disk less often.
const PART: u64 = 256 << 20;
/// How long the endpoint may take to answer after it has everything: it syncs to a
/// disk that may be slow.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

/// The endpoint that is published to.
pub struct Remote {
    client: Client,
    options: ClientOptions,
    endpoint: Url,
}

/// An upload under way.
pub struct Upload {
    url: Url,
    /// The next byte to send.
    pub offset: u64,
    part: u64,
}

/// How far an upload is.
pub enum Step {
    /// The tarball is stored.
    Done,
    /// There is more to send.
    More(Upload),
    /// All was sent, but the endpoint found another digest, and has thrown it away.
    Mismatch(anyhow::Error),
}

impl Remote {
    /// The endpoint at `endpoint`.
    ///
    /// # Errors
    /// When the options' files cannot be used.
    pub fn new(endpoint: &Url, options: &ClientOptions) -> Result<Self> {
        Ok(Self { client: options.upload_client(endpoint)?, options: options.clone(), endpoint: endpoint.clone() })
    }

    /// The URL of a file of the artifact.
    ///
    /// # Errors
    /// When it is none.
    pub fn url(&self, manifest: &Manifest, file: &str) -> Result<Url> {
        let base = self.endpoint.as_str().split(['?', '#']).next().unwrap_or_default().trim_end_matches('/');
        let url = format!("{base}{}", path(&manifest.name, &manifest.version, file));
        Url::parse(&url).with_context(|| format!("reading the URL {url}"))
    }

    /// The digest of what is stored at `url`.
    ///
    /// # Errors
    /// As of any request.
    pub async fn stored(&self, url: &Url) -> Result<Option<String>> {
        let request = self.client.request(Method::HEAD, url)?.timeout(self.options.stall_timeout());
        let response = request.send().await.with_context(|| format!("asking {url}"))?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let response = accepted(response).await?;
        let etag = response.headers().get(ETAG).and_then(|etag| etag.to_str().ok());
        Ok(Some(etag.unwrap_or_default().trim_matches('"').to_owned()))
    }

    /// Stores the manifest: the artifact is complete then.
    ///
    /// # Errors
    /// As of any request.
    pub async fn put_manifest(&self, url: &Url, bytes: &[u8]) -> Result<()> {
        let request = self
            .client
            .request(Method::PUT, url)?
            .timeout(ANSWER_TIMEOUT)
            .header(CONTENT_TYPE, MEDIA_TYPE)
            .header(REPR_DIGEST, digest_header(&Digest::of(bytes)))
            .body(bytes.to_vec());
        let response = request.send().await.with_context(|| format!("uploading to {url}"))?;
        accepted(response).await.map(drop)
    }

    /// Begins the upload of `tarball` to `url`, or finds how far it is.
    ///
    /// # Errors
    /// As of any request.
    pub async fn begin(&self, url: &Url, tarball: &Tarball) -> Result<Step> {
        let request = self
            .client
            .request(Method::PUT, url)?
            .timeout(self.options.stall_timeout())
            .header(UPLOAD_INTEROP_VERSION, INTEROP_VERSION)
            .header(UPLOAD_COMPLETE, "?0")
            .header(UPLOAD_LENGTH, tarball.size)
            .header(REPR_DIGEST, digest_header(&tarball.digest))
            .header(CONTENT_LENGTH, 0);
        let response = request.send().await.with_context(|| format!("uploading to {url}"))?;
        let response = accepted(response).await?;
        let headers = response.headers();
        if is_complete(headers) {
            return Ok(Step::Done);
        }
        let location = headers.get(LOCATION).and_then(|location| location.to_str().ok());
        let Some(upload) = location.and_then(|location| response.url().join(location).ok()) else {
            reject!("{url} does not take resumable uploads: is this the URL of an artifact endpoint?");
        };
        // It gets the bytes; the token goes to no other host anyway.
        if upload.origin() != url.origin() {
            reject!("{url} wants the upload at another host, {upload}");
        }
        let offset = number(headers, UPLOAD_OFFSET).unwrap_or_default();
        if offset > tarball.size {
            bail!("{url} says that it has {offset} of {} bytes", tarball.size);
        }
        Ok(Step::More(Upload { url: upload, offset, part: largest_part(headers) }))
    }

    /// Sends the next part of the tarball at `path`.
    ///
    /// # Errors
    /// As of any request; the upload is to be begun anew then.
    pub async fn append(&self, upload: Upload, path: &Path, size: u64, progress: &Arc<Progress>) -> Result<Step> {
        let Upload { url, offset, part } = upload;
        let length = part.min(size - offset);
        let last = offset + length == size;
        let reading = || format!("reading {}", path.display());
        let mut file = tokio::fs::File::open(path).await.with_context(reading)?;
        file.seek(SeekFrom::Start(offset)).await.with_context(reading)?;
        let sent = Arc::new(AtomicU64::new(0));
        let (counter, shown) = (Arc::clone(&sent), Arc::clone(progress));
        let chunks = ReaderStream::with_capacity(file.take(length), CHUNK);
        let chunks = futures_util::StreamExt::inspect(chunks, move |chunk| {
            let count = chunk.as_ref().map_or(0, |bytes| bytes.len() as u64);
            counter.fetch_add(count, Ordering::Relaxed);
            shown.add(count);
        });
        let request = self
            .client
            .request(Method::PATCH, &url)?
            .header(UPLOAD_INTEROP_VERSION, INTEROP_VERSION)
            .header(CONTENT_TYPE, PARTIAL_MEDIA_TYPE)
            .header(CONTENT_LENGTH, length)
            .header(UPLOAD_OFFSET, offset)
            .header(UPLOAD_COMPLETE, if last { "?1" } else { "?0" })
            .body(Body::wrap_stream(chunks));
        let response = tokio::select! {
            response = request.send() => response.with_context(|| format!("uploading to {url}"))?,
            () = self.stalled(&sent, length) => bail!("uploading to {url}: nothing moved for a while"),
        };
        let (status, complete) = (response.status(), is_complete(response.headers()));
        let offset = number(response.headers(), UPLOAD_OFFSET);
        match (status, complete) {
            (StatusCode::UNPROCESSABLE_ENTITY, true) => {
                let error = accepted(response).await.err();
                Ok(Step::Mismatch(error.unwrap_or_else(|| anyhow!("{url} answered {status}"))))
            }
            (_, true) => accepted(response).await.map(|_| Step::Done),
            // The upload is elsewhere, or gone: another client, or its time was over.
            (StatusCode::CONFLICT, _) if offset.is_some() => bail!("{url} is at another byte"),
            (StatusCode::NOT_FOUND, _) => bail!("{url} is no upload any more"),
            _ => {
                accepted(response).await?;
                let offset = offset.filter(|offset| *offset <= size).context("the endpoint gave no Upload-Offset")?;
                Ok(Step::More(Upload { url, offset, part }))
            }
        }
    }

    /// Ends when `sent` has stood still for too long.
    async fn stalled(&self, sent: &AtomicU64, size: u64) {
        let mut last = 0;
        loop {
            tokio::time::sleep(if last == size { ANSWER_TIMEOUT } else { self.options.stall_timeout() }).await;
            let now = sent.load(Ordering::Relaxed);
            if now == last {
                return;
            }
            last = now;
        }
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

/// What to do about an artifact that is there with other content.
pub fn immutable(error: anyhow::Error) -> anyhow::Error {
    error.context("artifacts are immutable: choose another version")
}

fn is_complete(headers: &HeaderMap) -> bool {
    headers.get(UPLOAD_COMPLETE).is_some_and(|value| value.as_bytes() == b"?1")
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// The size of a part, in bytes; the endpoint, or a proxy before it, may want smaller ones.
fn largest_part(headers: &HeaderMap) -> u64 {
    let limits = headers.get(UPLOAD_LIMIT).and_then(|limits| limits.to_str().ok()).unwrap_or_default();
    let largest = limits.split(',').find_map(|limit| limit.trim().strip_prefix("max-append-size=")?.parse().ok());
    largest.filter(|size| *size > 0).unwrap_or(PART).min(PART)
}
