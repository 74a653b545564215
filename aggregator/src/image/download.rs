//! A blob of a registry as it is read: part by part, each asked for where the one before ended or broke.

use std::io::{self, ErrorKind, Read};

use anyhow::Result;
use oci_client::client::{BlobResponse, Client};
use oci_client::manifest::OciDescriptor;
use oscontainer_artifact::digest::Digest;
use oscontainer_program::retry::Retry;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::registry::Registry;

/// Bytes of a download's first part, which has a small index and all of its block, and of its
/// largest; each part is sixteen times the one before.
const FIRST_PART: u64 = 128 << 10;
const LARGEST_PART: u64 = 256 << 20;

/// A blob that is read.
pub struct Download<'a> {
    registry: &'a Registry,
    retry: Retry,
    digest: String,
    size: u64,
    position: u64,
    part: u64,
    /// Bytes that the current part still has.
    left: u64,
    current: Option<Box<dyn Read>>,
}

impl<'a> Download<'a> {
    /// The blob `digest`, which has `size` bytes, from `position` on.
    pub fn new(registry: &'a Registry, digest: &Digest, size: u64, position: u64) -> Self {
        let (digest, retry) = (digest.to_string(), registry.patience());
        Self { registry, retry, digest, size, position, part: FIRST_PART, left: 0, current: None }
    }

    fn open(&mut self) -> Result<()> {
        let (from, length) = (self.position, self.part.min(self.size - self.position));
        let registry = self.registry;
        let layer =
            OciDescriptor { digest: self.digest.clone(), size: i64::try_from(self.size)?, ..Default::default() };
        let ask = async |client: &Client| {
            client.pull_blob_stream_partial(registry.reference(), &layer, from, Some(length)).await
        };
        let response = registry.attempt(&format!("downloading the blob {}", self.digest), ask)?;
        let read = |stream| SyncIoBridge::new_with_handle(StreamReader::new(stream), registry.runtime());
        self.part = (self.part * 16).min(LARGEST_PART);
        match response {
            BlobResponse::Partial(stream) => {
                self.left = length;
                self.current = Some(Box::new(read(stream.stream)));
            }
            // A registry without ranges sends all of it.
            BlobResponse::Full(stream) => {
                let mut reader = read(stream.stream);
                io::copy(&mut reader.by_ref().take(from), &mut io::sink())?;
                self.left = self.size - from;
                self.current = Some(Box::new(reader));
            }
        }
        Ok(())
    }
}

impl Read for Download<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.position >= self.size || buffer.is_empty() {
                return Ok(0);
            }
            if self.current.is_none() {
                self.open().map_err(io::Error::other)?;
            }
            let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
            let read = self.current.as_mut().map_or(Ok(0), |current| current.read(&mut buffer[..length]));
            match read {
                Ok(count) if count > 0 => {
                    self.position += count as u64;
                    self.left -= count as u64;
                    if self.left == 0 {
                        self.current = None;
                    }
                    self.retry.progress();
                    return Ok(count);
                }
                broken => {
                    self.current = None;
                    let error = broken.err().unwrap_or_else(|| ErrorKind::UnexpectedEof.into());
                    let what = format!("downloading the blob {}", self.digest);
                    self.registry.pause(&mut self.retry, &what, error.into()).map_err(io::Error::other)?;
                }
            }
        }
    }
}
