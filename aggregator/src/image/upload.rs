//! A blob on its way into a registry: in chunks (OCI distribution specification 1.1, "Pushing a blob in
//! chunks"), which goes on in the middle, or whole.

use std::io::{self, ErrorKind, Write};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
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
use super::registry::Registry;

/// What a blob is on its way.
const OCTETS: &str = "application/octet-stream";
/// Bytes of a chunk: most updates are one, which goes in two requests. Four are in memory at the most.
pub const CHUNK: usize = 16 << 20;
/// Bytes of a blob that goes whole, between two looks at whether it gets on.
const PIECE: usize = 256 << 10;
/// Bytes of a blob that a registry stores in a second when it is told that this was all, at the least.
const SLOWEST_STORE: u64 = 4 << 20;

/// What says that the registry has not what we think it has of an upload.
const LOST: [StatusCode; 3] = [StatusCode::NOT_FOUND, StatusCode::CONFLICT, StatusCode::RANGE_NOT_SATISFIABLE];

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
    /// Where the next request goes.
    location: Url,
    /// Bytes that the registry has.
    offset: u64,
}

impl Session {
    /// Prepares for the upload of the blob `digest` into the repository of `registry`.
    pub fn new(registry: &Registry, digest: Digest) -> Result<Self> {
        let location = registry.url("blobs/uploads/")?;
        Ok(Self { access: Arc::clone(registry.access()), digest, retry: registry.patience(), location, offset: 0 })
    }

    /// Sends what comes in `chunks`, and ends the upload.
    ///
    /// # Errors
    /// When all patience was in vain; when the sender says that there is an error.
    pub async fn send(mut self, mut chunks: mpsc::Receiver<io::Result<Bytes>>) -> Result<(), Failure> {
        self.begin().await?;
        let mut chunk = chunks.recv().await.transpose().map_err(Error::from)?.unwrap_or_default();
        while let Some(next) = chunks.recv().await.transpose().map_err(Error::from)? {
            self.send_chunk(std::mem::replace(&mut chunk, next)).await?;
        }
        // What has one chunk only goes with the end: one request less.
        if self.offset > 0 {
            self.send_chunk(std::mem::take(&mut chunk)).await?;
        }
        let length = chunk.len() as u64;
        let limit = self.access.connection.limit(length) + store_time(self.offset + length);
        let end = |request: RequestBuilder| {
            request.header(CONTENT_LENGTH, length).header(CONTENT_TYPE, OCTETS).body(chunk.clone())
        };
        let answer = self.access.send(Method::PUT, &self.end()?, limit, end).await?;
        Ok(self.expect(answer, StatusCode::CREATED).await.map(|_| ())?)
    }

    /// Sends the `size` bytes that come in `pieces` in one request.
    ///
    /// # Errors
    /// When the registry does not take them; when the sender says that there is an error.
    pub async fn send_whole(mut self, size: u64, pieces: mpsc::Receiver<io::Result<Bytes>>) -> Result<(), Failure> {
        self.begin().await?;
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
                    return Err(anyhow!("{registry} has not got on for {} s", left.as_secs()).into());
                }
            }
        };
        drop(limit);
        Ok(self.expect(answer, StatusCode::CREATED).await.map(|_| ())?)
    }

    async fn begin(&mut self) -> Result<()> {
        let begun = self.ask_for(Method::POST, StatusCode::ACCEPTED).await?;
        self.follow(&begun)
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
            let rest = chunk.slice((self.offset - start) as usize..);
            let Err(failure) = self.patch(rest).await else {
                self.retry.progress();
                continue;
            };
            let Failure::Other(error) = failure else { return Err(failure) };
            self.retry.pause(&format!("uploading the blob {}", self.digest), error).await?;
            self.offset = match self.ask().await {
                Ok(found) if (start..=end).contains(&found) => found,
                Ok(found) => {
                    return Err(anyhow!("the registry has {found} bytes of an upload that is at {start}").into());
                }
                // It has dropped the upload: docker-registry does, when it has more than the Location says.
                Err(error) if exit::code(&error) == exit::REJECTED => {
                    return Err(anyhow!("the upload has to begin anew: {error:#}").into());
                }
                Err(error) => return Err(error.into()),
            };
        }
        Ok(())
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
        if status == StatusCode::METHOD_NOT_ALLOWED || status.is_success() && status != StatusCode::ACCEPTED {
            return Err(Failure::NoChunks(format!("it answered {status}")));
        } else if LOST.contains(&status) {
            return Err(anyhow!("{} answered {status}", self.location).into());
        }
        let answer = self.expect(answer, StatusCode::ACCEPTED).await?;
        self.follow(&answer)?;
        self.offset = start + length;
        Ok(())
    }

    /// How many bytes the registry has.
    async fn ask(&mut self) -> Result<u64> {
        let answer = self.ask_for(Method::GET, StatusCode::NO_CONTENT).await?;
        let last =
            answer.headers().get(RANGE).and_then(|range| range.to_str().ok()?.split('-').next_back()?.parse().ok());
        let found = match last.context("the registry does not say how much it has of an upload")? {
            // So it is also told where there is nothing yet.
            0 => 0,
            last => u64::saturating_add(last, 1),
        };
        self.follow(&answer)?;
        Ok(found)
    }

    /// Sends a request without a body and requires the `expected` status.
    async fn ask_for(&self, method: Method, expected: StatusCode) -> Result<Response> {
        let limit = self.access.connection.stall;
        let posts = method == Method::POST;
        let empty = |request: RequestBuilder| if posts { request.header(CONTENT_LENGTH, 0) } else { request };
        let answer = self.access.send(method, &self.location, limit, empty).await?;
        self.expect(answer, expected).await
    }

    async fn expect(&self, answer: Response, expected: StatusCode) -> Result<Response> {
        if answer.status() == expected { Ok(answer) } else { Err(answered(answer, &self.access.connection).await) }
    }

    /// Takes the place for the next request from an answer.
    fn follow(&mut self, answer: &Response) -> Result<()> {
        let location = answer.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let location = location.context("the registry does not say where an upload goes")?;
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
    /// The upload ended early; its own error says why.
    closed: bool,
}

impl Upload {
    /// Writes into what `sender` leads to.
    pub fn new(sender: mpsc::Sender<io::Result<Bytes>>) -> Self {
        Self { sender, chunk: Vec::new(), closed: false }
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
        let taken = bytes.len().min(CHUNK - self.chunk.len());
        if self.chunk.capacity() == 0 {
            self.chunk.reserve_exact(CHUNK);
        }
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        let chunk = std::mem::take(&mut self.chunk);
        if chunk.is_empty() { Ok(()) } else { self.send(chunk.into()) }
    }
}
