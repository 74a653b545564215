//! A blob on its way into a registry, in chunks (OCI distribution specification 1.1, "Pushing
//! a blob in chunks"). `oci-client` cannot go on in the middle, so the few requests of an
//! upload are made here; who we are it still finds out.

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;

use anyhow::{Context, Error, Result, anyhow};
use bytes::Bytes;
use oci_client::{Reference, RegistryOperation};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::exit;
use oscontainer_program::retry::Retry;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::mpsc;

use super::refusal::{answered, told};
use super::registry::{Connection, Registry};

/// What a blob is on its way.
const OCTETS: &str = "application/octet-stream";
/// Bytes of a chunk: most updates are one, which goes in two requests. Four are in memory at the most.
const CHUNK: usize = 16 << 20;

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
    connection: Arc<Connection>,
    reference: Reference,
    digest: Digest,
    retry: Retry,
    token: Option<String>,
    /// Where the next request goes.
    location: Url,
    /// Bytes that the registry has.
    offset: u64,
}

impl Session {
    /// Prepares for the upload of the blob `digest` into the repository of `registry`.
    pub fn new(registry: &Registry, digest: Digest) -> Result<Self> {
        let (connection, reference) = (registry.connection(), registry.reference().clone());
        let location = connection.url(&format!("{}/blobs/uploads/", reference.repository()))?;
        let retry = registry.patience();
        Ok(Self { connection, reference, digest, retry, token: registry.token(), location, offset: 0 })
    }

    /// Sends what comes in `chunks`, and ends the upload.
    ///
    /// # Errors
    /// When all patience was in vain; when the sender says that there is an error.
    pub async fn send(mut self, mut chunks: mpsc::Receiver<io::Result<Bytes>>) -> Result<(), Failure> {
        let begin = |own: &Self| own.request(Method::POST, &own.location).header(CONTENT_LENGTH, 0);
        let begun = self.answer(begin, StatusCode::ACCEPTED).await?;
        self.follow(&begun)?;
        let mut chunk = chunks.recv().await.transpose().map_err(Error::from)?.unwrap_or_default();
        while let Some(next) = chunks.recv().await.transpose().map_err(Error::from)? {
            self.send_chunk(std::mem::replace(&mut chunk, next)).await?;
        }
        // What has one chunk only goes with the end: one request less.
        if self.offset > 0 {
            self.send_chunk(std::mem::take(&mut chunk)).await?;
        }
        let mut location = self.location.clone();
        location.query_pairs_mut().append_pair("digest", &self.digest.to_string());
        let end = |own: &Self| {
            let request = own.request(Method::PUT, &location).header(CONTENT_LENGTH, chunk.len());
            request.header(CONTENT_TYPE, OCTETS).body(chunk.clone())
        };
        self.answer(end, StatusCode::CREATED).await?;
        Ok(())
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
        let request = self
            .request(Method::PATCH, &self.location)
            .header(CONTENT_RANGE, format!("{start}-{}", start + length - 1))
            .header(CONTENT_LENGTH, length)
            .header(CONTENT_TYPE, OCTETS)
            .body(bytes);
        let answer = request.send().await.map_err(|error| self.told(error))?;
        let status = answer.status();
        if status == StatusCode::UNAUTHORIZED {
            // The token's time may be over.
            self.log_in().await?;
        } else if status == StatusCode::METHOD_NOT_ALLOWED || status.is_success() && status != StatusCode::ACCEPTED {
            return Err(Failure::NoChunks(format!("it answered {status}")));
        } else if status == StatusCode::ACCEPTED {
            self.follow(&answer)?;
            self.offset = start + length;
            return Ok(());
        } else if LOST.contains(&status) {
            return Err(anyhow!("{} answered {status}", self.location).into());
        }
        Err(self.answered(answer).await.into())
    }

    /// How many bytes the registry has.
    async fn ask(&mut self) -> Result<u64> {
        let ask = |own: &Self| own.request(Method::GET, &own.location);
        let answer = self.answer(ask, StatusCode::NO_CONTENT).await?;
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

    async fn log_in(&mut self) -> Result<()> {
        self.token = self.connection.log_in(&self.reference, RegistryOperation::Push).await?;
        Ok(())
    }

    fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        let request = self.connection.http.request(method, url.clone());
        self.connection.authorized(request, url, self.token.as_deref())
    }

    /// Sends a request and requires the `expected` status; once more, if the token's time was over.
    async fn answer(&mut self, request: impl Fn(&Self) -> RequestBuilder, expected: StatusCode) -> Result<Response> {
        let mut answer = request(self).send().await.map_err(|error| self.told(error))?;
        if answer.status() == StatusCode::UNAUTHORIZED && self.token.is_some() {
            self.log_in().await?;
            answer = request(self).send().await.map_err(|error| self.told(error))?;
        }
        if answer.status() == expected { Ok(answer) } else { Err(self.answered(answer).await) }
    }

    async fn answered(&self, answer: Response) -> Error {
        answered(answer, &self.connection.registry).await
    }

    fn told(&self, error: reqwest::Error) -> Error {
        told(error.into(), &self.connection.registry)
    }

    /// Takes the place for the next request from an answer.
    fn follow(&mut self, answer: &Response) -> Result<()> {
        let location = answer.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let location = location.context("the registry does not say where an upload goes")?;
        self.location = answer.url().join(location).with_context(|| format!("reading the Location {location}"))?;
        Ok(())
    }
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
        Self { sender, chunk: Vec::with_capacity(CHUNK), closed: false }
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
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.chunk.is_empty() {
            let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK));
            if self.sender.blocking_send(Ok(chunk.into())).is_err() {
                self.closed = true;
                return Err(io::Error::new(ErrorKind::BrokenPipe, "the upload ended early"));
            }
        }
        Ok(())
    }
}
