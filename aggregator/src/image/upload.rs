//! A blob on its way into a registry: in chunks (OCI distribution specification 1.1, "Pushing a blob in
//! chunks"), which goes on in the middle, or whole.

use std::io::{self, ErrorKind, Write};
use std::ops::RangeInclusive;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};
use bytes::Bytes;
use futures_util::stream::unfold;
use oscontainer_artifact::digest::Digest;
use oscontainer_program::retry::Retry;
use oscontainer_program::{exit, reject};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Body, Method, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use super::connection::{Access, is_less_safe};
use super::refusal::answered;
use super::registry::{Mount, Registry};

/// What a blob is on its way.
const OCTETS: &str = "application/octet-stream";
/// Bytes of a chunk, if the registry wants no larger ones: most updates are one, which goes in two requests. Four are
/// in memory at the most.
pub const CHUNK: usize = 16 << 20;
/// Bytes of a blob that goes whole, between two looks at whether it gets on.
const PIECE: usize = 256 << 10;
/// Bytes of a blob that a registry stores in a second when it is told that this was all, at the least.
const SLOWEST_STORE: u64 = 4 << 20;

/// The largest chunk that a registry may ask for (OCI-Chunk-Min-Length); who wants more gets blobs whole.
const LARGEST_CHUNK: usize = 64 << 20;

/// What says that the registry has not what we think it has of an upload.
const LOST: [StatusCode; 3] = [StatusCode::NOT_FOUND, StatusCode::CONFLICT, StatusCode::RANGE_NOT_SATISFIABLE];
/// What says of a first chunk that the registry takes no such chunks: it knows none (Google's), or only small ones
/// (GitHub's answers 416 to more than 4 MiB).
const NO_CHUNKS: [StatusCode; 7] = [
    StatusCode::BAD_REQUEST,
    StatusCode::NOT_FOUND,
    StatusCode::METHOD_NOT_ALLOWED,
    StatusCode::PAYLOAD_TOO_LARGE,
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
    StatusCode::RANGE_NOT_SATISFIABLE,
    StatusCode::NOT_IMPLEMENTED,
];

/// Why an upload failed.
pub enum Failure {
    /// The registry takes no chunks, and this is what it said.
    NoChunks(String),
    /// Something else; whether another try helps is in the error.
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// One upload of one blob.
pub struct Session {
    access: Arc<Access>,
    digest: Digest,
    retry: Retry,
    /// Where the blob is once the registry has it.
    blob: Url,
    /// Where the next request goes.
    location: Url,
    /// Bytes that the registry has.
    offset: u64,
    /// Bytes of a chunk; the blob goes whole where there are to be none.
    chunk: Option<usize>,
}

impl Session {
    /// Begins the upload of the blob `digest` into the repository of `registry`; nothing is left to upload where it
    /// could be taken over by `mount`.
    ///
    /// # Errors
    /// When the registry does not take it.
    pub async fn begin(registry: &Registry, digest: Digest, mount: Option<&Mount>) -> Result<Option<Self>> {
        let mut location = registry.url("blobs/uploads/")?;
        let mut access = registry.access();
        if let Some(from) = mount {
            location.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", &from.repository);
            access = &from.access;
        }
        let (access, blob) = (Arc::clone(access), registry.url(&format!("blobs/{digest}"))?);
        let (retry, chunk) = (registry.patience(), None);
        let mut session = Self { access, digest, retry, blob, location, offset: 0, chunk };
        let answer = session.ask_for(Method::POST).await?;
        if mount.is_some() && answer.status() == StatusCode::CREATED {
            return Ok(None);
        }
        let answer = session.expect(answer, StatusCode::ACCEPTED).await?;
        session.follow(&answer)?;
        let least = answer.headers().get("OCI-Chunk-Min-Length").and_then(|least| least.to_str().ok()?.parse().ok());
        let takes_chunks = !session.access.connection.no_chunks.load(Ordering::Relaxed);
        session.chunk = Some(CHUNK.max(least.unwrap_or(0))).filter(|chunk| takes_chunks && *chunk <= LARGEST_CHUNK);
        Ok(Some(session))
    }

    /// In how many bytes the blob is to come.
    pub fn chunk(&self) -> usize {
        self.chunk.unwrap_or(CHUNK)
    }

    /// Sends the `size` bytes that come in `chunks`, and ends the upload. Says too how many bytes the registry had.
    ///
    /// # Errors
    /// When all patience was in vain; when the sender says that there is an error.
    pub async fn send(mut self, size: u64, chunks: mpsc::Receiver<io::Result<Bytes>>) -> (u64, Result<(), Failure>) {
        let sent = match self.chunk {
            Some(_) => self.send_chunks(chunks).await,
            None => self.send_whole(size, chunks).await.map_err(Failure::Other),
        };
        (self.offset, sent)
    }

    async fn send_chunks(&mut self, mut chunks: mpsc::Receiver<io::Result<Bytes>>) -> Result<(), Failure> {
        let mut chunk = chunks.recv().await.transpose().map_err(Error::from)?.unwrap_or_default();
        while let Some(next) = chunks.recv().await.transpose().map_err(Error::from)? {
            self.send_chunk(std::mem::replace(&mut chunk, next)).await?;
        }
        self.finish(chunk).await
    }

    /// Sends the `size` bytes that come in `pieces` in one request.
    async fn send_whole(&self, size: u64, pieces: mpsc::Receiver<io::Result<Bytes>>) -> Result<()> {
        let stall = self.access.connection.stall;
        // How long the registry may take for the next step. Each change begins anew.
        let (limit, mut limits) = watch::channel(stall);
        let steps = (pieces, Bytes::new(), limit.clone());
        let body = unfold(steps, move |(mut pieces, mut bytes, limit)| async move {
            if bytes.is_empty() {
                // It waits for us.
                limit.send_replace(Duration::MAX);
                match pieces.recv().await {
                    Some(Ok(more)) => bytes = more,
                    Some(Err(error)) => return Some((Err(error), (pieces, bytes, limit))),
                    None => {
                        limit.send_replace(stall + store_time(size));
                        return None;
                    }
                }
            }
            let piece = bytes.split_to(bytes.len().min(PIECE));
            limit.send_replace(stall);
            Some((Ok(piece), (pieces, bytes, limit)))
        });
        let end = self.end()?;
        let request = self.access.connection.request(Method::PUT, &end);
        let request = request.header(CONTENT_LENGTH, size).header(CONTENT_TYPE, OCTETS).body(Body::wrap_stream(body));
        let mut answer = pin!(self.access.send_once(request, &end));
        let answer = loop {
            let left = *limits.borrow_and_update();
            tokio::select! {
                answer = &mut answer => break answer?,
                _ = limits.changed() => {}
                () = sleep(left) => {
                    let registry = &self.access.connection.registry;
                    bail!("{registry} has not got on for {} s", left.as_secs());
                }
            }
        };
        drop(limit);
        self.expect_more(answer, StatusCode::CREATED).await.map(|_| ())
    }

    /// Where the upload ends.
    fn end(&self) -> Result<Url> {
        let mut location = self.location.clone();
        location.query_pairs_mut().append_pair("digest", &self.digest.to_string());
        Ok(location)
    }

    /// Sends a chunk until the registry has all of it.
    async fn send_chunk(&mut self, chunk: Bytes) -> Result<(), Failure> {
        let start = self.offset;
        let end = start + chunk.len() as u64;
        while self.offset < end {
            match self.patch(chunk.slice((self.offset - start) as usize..)).await {
                Ok(()) => self.retry.progress(),
                Err(Failure::Other(error)) => {
                    self.recover(error, start..=end, false).await?;
                }
                Err(no_chunks) => return Err(no_chunks),
            }
        }
        Ok(())
    }

    /// Sends the last chunk, and that it is the last, until the registry has the blob.
    async fn finish(&mut self, chunk: Bytes) -> Result<(), Failure> {
        let start = self.offset;
        let end = start + chunk.len() as u64;
        loop {
            let mut rest = chunk.slice((self.offset - start) as usize..);
            // What has one chunk only goes with the end: one request less.
            if self.offset > 0 {
                self.send_chunk(std::mem::take(&mut rest)).await?;
            }
            let Err(error) = self.put(rest).await else { return Ok(()) };
            if !self.recover(error, start..=end, true).await? {
                return Ok(());
            }
        }
    }

    /// Sends what may be a part of a chunk.
    async fn patch(&mut self, bytes: Bytes) -> Result<(), Failure> {
        let (start, length) = (self.offset, bytes.len() as u64);
        let complete = |request: RequestBuilder| {
            request
                .header(CONTENT_RANGE, format!("{start}-{}", start + length - 1))
                .header(CONTENT_LENGTH, length)
                .header(CONTENT_TYPE, OCTETS)
                .body(bytes.clone())
        };
        let limit = self.access.connection.limit(length);
        let answer = self.access.send(Method::PATCH, &self.location, limit, complete).await?;
        let status = answer.status();
        let other = status.is_success() && status != StatusCode::ACCEPTED;
        if start == 0 && (other || NO_CHUNKS.contains(&status)) {
            return Err(Failure::NoChunks(format!("it answered {status}")));
        }
        let answer = self.expect_more(answer, StatusCode::ACCEPTED).await?;
        self.follow(&answer)?;
        self.offset = start + length;
        Ok(())
    }

    /// Sends that with `bytes` the blob is complete.
    async fn put(&self, bytes: Bytes) -> Result<()> {
        let length = bytes.len() as u64;
        let limit = self.access.connection.limit(length) + store_time(self.offset + length);
        let complete = |request: RequestBuilder| {
            request.header(CONTENT_LENGTH, length).header(CONTENT_TYPE, OCTETS).body(bytes.clone())
        };
        let answer = self.access.send(Method::PUT, &self.end()?, limit, complete).await?;
        self.expect_more(answer, StatusCode::CREATED).await.map(|_| ())
    }

    /// After `error` finds out how much the registry has, which must be in `possible`. Gives whether the upload is to
    /// go on: one that had `ended` may be a blob by now.
    async fn recover(&mut self, mut error: Error, possible: RangeInclusive<u64>, ended: bool) -> Result<bool> {
        let what = format!("uploading the blob {}", self.digest);
        loop {
            self.retry.pause(&what, error).await?;
            error = match self.look(ended).await {
                Ok(None) => return Ok(false),
                Ok(Some(found)) if possible.contains(&found) => {
                    self.offset = found;
                    return Ok(true);
                }
                Ok(Some(found)) => {
                    bail!("the registry has {found} bytes of an upload that is at {}", possible.start());
                }
                // It has dropped the upload: docker-registry does, when it has more than the Location says.
                Err(error) if exit::code(&error) == exit::REJECTED => {
                    bail!("the upload has to begin anew: {error:#}");
                }
                Err(error) => error,
            }
        }
    }

    /// How many bytes the registry has of the upload; nothing where it had `ended` and is a blob.
    async fn look(&mut self, ended: bool) -> Result<Option<u64>> {
        if ended && self.access.has(&self.blob).await? {
            return Ok(None);
        }
        let answer = self.ask_for(Method::GET).await?;
        let answer = self.expect(answer, StatusCode::NO_CONTENT).await?;
        let last =
            answer.headers().get(RANGE).and_then(|range| range.to_str().ok()?.split('-').next_back()?.parse().ok());
        let found = match last.context("the registry does not say how much it has of an upload")? {
            // So it is also told where there is nothing yet.
            0 => 0,
            last => u64::saturating_add(last, 1),
        };
        self.follow(&answer)?;
        Ok(Some(found))
    }

    /// Sends a request without a body.
    async fn ask_for(&self, method: Method) -> Result<Response> {
        let limit = self.access.connection.stall;
        let posts = method == Method::POST;
        let empty = |request: RequestBuilder| if posts { request.header(CONTENT_LENGTH, 0) } else { request };
        self.access.send(method, &self.location, limit, empty).await
    }

    async fn expect(&self, answer: Response, expected: StatusCode) -> Result<Response> {
        if answer.status() == expected { Ok(answer) } else { Err(answered(answer, &self.access.connection).await) }
    }

    /// The same of an upload that has begun: another try may help where the registry has lost it.
    async fn expect_more(&self, answer: Response, expected: StatusCode) -> Result<Response> {
        if LOST.contains(&answer.status()) {
            bail!("{} answered {}", self.location, answer.status());
        }
        self.expect(answer, expected).await
    }

    /// Takes the place for the next request from an answer.
    fn follow(&mut self, answer: &Response) -> Result<()> {
        let location = answer.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let Some(location) = location else { reject!("the registry does not say where an upload goes") };
        let location = answer.url().join(location).with_context(|| format!("reading the Location {location}"))?;
        if is_less_safe(&self.access.connection.base, &location) {
            reject!("the registry wants the blob {} at {location}, which is less safe", self.digest);
        }
        self.location = location;
        Ok(())
    }
}

/// How long a registry may take to store a blob that it has all of.
fn store_time(size: u64) -> Duration {
    Duration::from_secs(size / SLOWEST_STORE)
}

/// Hands what is written to an upload, in chunks.
pub struct Upload {
    sender: mpsc::Sender<io::Result<Bytes>>,
    chunk: Vec<u8>,
    /// Bytes of a chunk.
    size: usize,
    /// The upload ended early; its own error says why.
    closed: bool,
}

impl Upload {
    /// Writes chunks of `size` bytes into what `sender` leads to.
    pub fn new(sender: mpsc::Sender<io::Result<Bytes>>, size: usize) -> Self {
        Self { sender, chunk: Vec::new(), size, closed: false }
    }

    /// Sends a chunk that is in memory already.
    ///
    /// # Errors
    /// When the upload has ended.
    pub fn send(&mut self, chunk: Bytes) -> io::Result<()> {
        if self.sender.blocking_send(Ok(chunk)).is_err() {
            self.closed = true;
            return Err(io::Error::new(ErrorKind::BrokenPipe, "the upload ended early"));
        }
        Ok(())
    }

    /// Nothing more comes. After a `failure` the upload must not look like one that is
    /// complete. Gives whether the upload had ended before.
    pub fn end(self, failure: Option<String>) -> bool {
        if let Some(failure) = failure {
            // Who has gone does not wait for it.
            let _ = self.sender.blocking_send(Err(io::Error::other(failure)));
        }
        self.closed
    }
}

impl Write for Upload {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.size - self.chunk.len());
        if self.chunk.capacity() == 0 {
            self.chunk.reserve_exact(self.size);
        }
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == self.size {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        let chunk = std::mem::take(&mut self.chunk);
        if chunk.is_empty() { Ok(()) } else { self.send(chunk.into()) }
    }
}
