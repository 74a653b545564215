//! A blob of a registry as it is read: part by part, each asked for where the one before ended or broke.

use std::io::{self, ErrorKind, Read};

use anyhow::Result;
use bytes::{Buf, Bytes};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::retry::Retry;
use reqwest::header::RANGE;
use reqwest::{Method, Response, StatusCode, Url};

use super::refusal::answered;
use super::registry::Registry;

/// Bytes of a download's first part, which has a small index and all of its block, and of its
/// largest; each part is sixteen times the one before.
const FIRST_PART: u64 = 128 << 10;
const LARGEST_PART: u64 = 256 << 20;

/// A blob that is read.
pub struct Download<'a> {
    registry: &'a Registry,
    retry: Retry,
    digest: Digest,
    position: u64,
    /// Where to stop.
    end: u64,
    part: u64,
    current: Option<Part>,
}

/// A part that comes.
struct Part {
    answer: Response,
    /// Bytes that have come and are not read yet.
    bytes: Bytes,
    /// Bytes that are still to be read, with these.
    left: u64,
    /// Bytes before the part, from a registry without ranges.
    before: u64,
}

impl<'a> Download<'a> {
    /// The blob `digest`, which has `size` bytes, between two places in it.
    pub fn new(registry: &'a Registry, digest: &Digest, size: u64, (from, end): (u64, u64)) -> Self {
        let retry = registry.patience();
        let (digest, end) = (*digest, end.min(size));
        Self { registry, retry, digest, position: from, end, part: FIRST_PART, current: None }
    }

    fn open(&mut self) -> Result<Part> {
        let (from, length) = (self.position, self.part.min(self.end - self.position));
        let access = self.registry.access();
        let url = self.registry.url(&format!("blobs/{}", self.digest))?;
        let range = format!("bytes={from}-{}", from + length - 1);
        let answer = self.registry.attempt(&self.what(), async || ask(access, &url, &range).await)?;
        self.part = (self.part * 16).min(LARGEST_PART);
        let partial = answer.status() == StatusCode::PARTIAL_CONTENT;
        // A registry without ranges sends all of it.
        let (left, before) = if partial { (length, 0) } else { (self.end - from, from) };
        Ok(Part { answer, bytes: Bytes::new(), left, before })
    }

    fn what(&self) -> String {
        format!("downloading the blob {}", self.digest)
    }
}

async fn ask(access: &super::connection::Access, url: &Url, range: &str) -> Result<Response> {
    let connection = &access.connection;
    let answer = access.send(Method::GET, url, connection.stall, |request| request.header(RANGE, range)).await?;
    match answer.status() {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(answer),
        _ => Err(answered(answer, connection).await),
    }
}

impl Part {
    fn read(&mut self, buffer: &mut [u8], registry: &Registry) -> Result<usize> {
        let connection = &registry.access().connection;
        while self.bytes.is_empty() {
            match connection.runtime.block_on(connection.more(&mut self.answer))? {
                Some(bytes) => self.bytes = bytes,
                None => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
            }
            let skipped = self.before.min(self.bytes.len() as u64);
            self.bytes.advance(skipped as usize);
            self.before -= skipped;
        }
        let count = self.bytes.len().min(buffer.len()).min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.bytes.copy_to_slice(&mut buffer[..count]);
        self.left -= count as u64;
        Ok(count)
    }
}

impl Read for Download<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.position >= self.end || buffer.is_empty() {
                return Ok(0);
            }
            let mut part = match self.current.take() {
                Some(part) => part,
                None => self.open().map_err(io::Error::other)?,
            };
            match part.read(buffer, self.registry) {
                Ok(count) => {
                    self.position += count as u64;
                    if part.left > 0 {
                        self.current = Some(part);
                    }
                    self.retry.progress();
                    return Ok(count);
                }
                Err(error) => {
                    let what = self.what();
                    self.registry.pause(&mut self.retry, &what, error).map_err(io::Error::other)?;
                }
            }
        }
    }
}
