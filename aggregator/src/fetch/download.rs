//! The tarball's bytes from a server, in one stream whatever happens to the connections:
//! a window of pieces that are received at the same time and handed out in their order.
//! The digest that the caller pins covers the sum of the parts, so that nothing is checked
//! about them here.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;

use anyhow::{Result, bail};
use bytes::Bytes;
use oscontainer_program::retry::Retry;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::piece::{self, Origin, Piece, Span};

/// A download under way, read by a thread outside of the runtime.
pub struct Download {
    runtime: Handle,
    stop: CancellationToken,
    origin: Arc<Origin>,
    retry: Retry,
    /// How many pieces are received at the same time.
    connections: usize,
    /// How much of the file was handed out, or was here before.
    offset: u64,
    /// Up to where pieces were begun.
    begun: u64,
    /// What is received, in order.
    pieces: VecDeque<Piece>,
    tasks: JoinSet<()>,
    chunk: Bytes,
}

impl Download {
    /// A download of `origin` from `offset` on, over so many connections. It connects when
    /// it is read.
    pub fn new(origin: Origin, retry: Retry, connections: usize, offset: u64, stop: CancellationToken) -> Self {
        Self {
            runtime: Handle::current(),
            stop,
            origin: Arc::new(origin),
            retry,
            connections,
            offset,
            begun: offset,
            pieces: VecDeque::new(),
            tasks: JoinSet::new(),
            chunk: Bytes::new(),
        }
    }

    /// The next bytes; none at the end.
    async fn next(&mut self) -> Result<Bytes> {
        if self.begun == self.offset && self.pieces.is_empty() {
            // The first one alone shows whether the server knows ranges.
            self.begin(self.connections == 1 || self.origin.size - self.offset <= piece::LENGTH);
        }
        while let Some(piece) = self.pieces.front_mut() {
            match piece.next().await {
                Some(chunk) => {
                    let chunk = chunk?;
                    self.offset += chunk.len() as u64;
                    while self.pieces.len() < self.connections && self.begun < self.origin.size {
                        self.begin(false);
                    }
                    return Ok(chunk);
                }
                None if self.offset >= piece.span.end => drop(self.pieces.pop_front()),
                None => {
                    tracing::info!("the server gives no more than one connection: the download goes on with that");
                    self.tasks.abort_all();
                    self.pieces.clear();
                    self.begun = self.offset;
                    self.begin(true);
                }
            }
        }
        Ok(Bytes::new())
    }

    /// Begins to receive what comes next.
    fn begin(&mut self, alone: bool) {
        let (start, size) = (self.begun, self.origin.size);
        if start >= size {
            return;
        }
        let span = Span { start, end: if alone { size } else { size.min(start + piece::LENGTH) }, alone };
        while self.tasks.try_join_next().is_some() {}
        self.pieces.push_back(Piece::start(&mut self.tasks, Arc::clone(&self.origin), self.retry.renewed(), span));
        self.begun = span.end;
    }
}

impl Read for Download {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.chunk.is_empty() {
            let (runtime, stop) = (self.runtime.clone(), self.stop.clone());
            let next = runtime.block_on(async {
                tokio::select! {
                    () = stop.cancelled() => bail!("stopped by a signal"),
                    next = self.next() => next,
                }
            });
            // Below a context, the error's own kind (rejected or not) stays in the chain.
            let downloading = |error: anyhow::Error| error.context(format!("downloading {}", self.origin.url));
            self.chunk = next.map_err(|error| io::Error::other(downloading(error)))?;
        }
        let count = buffer.len().min(self.chunk.len());
        buffer[..count].copy_from_slice(&self.chunk.split_to(count));
        Ok(count)
    }
}
