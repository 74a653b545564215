//! A piece of the tarball, received by a task of its own: after a break it goes on with Range
//! and If-Range, as long as its patience lasts, and never keeps more than [`LENGTH`] bytes
//! that nobody has taken yet.

use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use headers::{ContentRange, HeaderMapExt};
use oscontainer_program::client::{self, Client};
use oscontainer_program::reject;
use oscontainer_program::retry::Retry;
use reqwest::header::{ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE};
use reqwest::{Response, StatusCode, Url};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinSet;

/// Bytes of a piece, where there are several: long enough that the time between two requests
/// does not count, and what all connections have in memory is still little.
pub const LENGTH: u64 = 8 << 20;

/// The tarball at its server.
pub struct Origin {
    client: Client,
    pub url: Url,
    /// Bytes of the whole file.
    pub size: u64,
    /// The strong validator that the server sent at first.
    etag: OnceLock<HeaderValue>,
}

impl Origin {
    pub fn new(client: Client, url: Url, size: u64) -> Self {
        Self { client, url, size, etag: OnceLock::new() }
    }
}

/// What a piece covers.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    pub start: u64,
    /// The place after its last byte.
    pub end: u64,
    /// Whether it is all that is asked for, up to the end of the file. Then a server that knows
    /// no ranges will do.
    pub alone: bool,
}

/// A piece that is being received.
pub struct Piece {
    pub span: Span,
    chunks: UnboundedReceiver<Result<Bytes>>,
    room: Arc<Semaphore>,
}

impl Piece {
    /// Starts to receive it, by a task among `tasks`.
    pub fn start(tasks: &mut JoinSet<()>, origin: Arc<Origin>, retry: Retry, span: Span) -> Self {
        let room = Arc::new(Semaphore::new(LENGTH as usize));
        let (sender, chunks) = mpsc::unbounded_channel();
        let received = Received { chunks: sender, room: Arc::clone(&room) };
        tasks.spawn(async move {
            if let Err(error) = receive(&origin, retry, span, &received).await {
                received.send(Err(error)).await;
            }
        });
        Self { span, chunks, room }
    }

    /// The next bytes; none at its end, or where the server wants no more than one connection.
    ///
    /// # Errors
    /// When the patience is at its end, or the server has something else.
    pub async fn next(&mut self) -> Option<Result<Bytes>> {
        let next = self.chunks.recv().await;
        if let Some(Ok(chunk)) = &next {
            self.room.add_permits(chunk.len());
        }
        next
    }
}

/// Where a task puts what it received.
struct Received {
    chunks: UnboundedSender<Result<Bytes>>,
    room: Arc<Semaphore>,
}

impl Received {
    /// Waits until there is room. Nobody may want it any more: then the task is about to end.
    async fn send(&self, chunk: Result<Bytes>) {
        let length = chunk.as_ref().map_or(0, Bytes::len);
        let permits = u32::try_from(length).unwrap_or(u32::MAX).min(LENGTH as u32);
        if let Ok(room) = self.room.acquire_many(permits).await {
            room.forget();
        }
        // The receiver is gone where the piece was dropped.
        drop(self.chunks.send(chunk));
    }
}

/// A server that takes no more requests now; it may take fewer at the same time.
#[derive(Debug, thiserror::Error)]
#[error("the server is busy")]
struct Busy;

/// Receives all of a piece; ends early where the server wants no more than one connection.
async fn receive(origin: &Origin, mut retry: Retry, span: Span, received: &Received) -> Result<()> {
    let mut offset = span.start;
    let mut response = None;
    while offset < span.end {
        match retry.bounded(next(origin, span, offset, &mut response)).await {
            Ok(Some(chunk)) => {
                retry.progress();
                offset += chunk.len() as u64;
                received.send(Ok(chunk)).await;
            }
            Ok(None) => return Ok(()),
            Err(error) => {
                response = None;
                let busy = error.downcast_ref::<Busy>().is_some();
                retry.pause("the download", error).await?;
                if busy && !span.alone {
                    return Ok(());
                }
            }
        }
    }
    // Does the server send more than there should be?
    if let Some(mut response) = response.filter(|_| span.alone)
        && let Ok(Some(chunk)) = response.chunk().await
    {
        received.send(Ok(chunk)).await;
    }
    Ok(())
}

/// The next bytes from the connection, which is made where there is none; `None` where the server
/// wants no more than one.
async fn next(origin: &Origin, span: Span, offset: u64, current: &mut Option<Response>) -> Result<Option<Bytes>> {
    let (response, mut skip) = match current.take() {
        Some(response) => (response, 0),
        None => match connect(origin, span, offset).await? {
            Some(connected) => connected,
            None => return Ok(None),
        },
    };
    let response = current.insert(response);
    if let Some(etag) = strong_etag(response.headers()) {
        origin.etag.get_or_init(|| etag);
    }
    loop {
        let Some(mut chunk) = response.chunk().await? else {
            bail!("the server ended the tarball before its {} bytes were there", origin.size);
        };
        let skipped = skip.min(chunk.len() as u64);
        skip -= skipped;
        let mut rest = chunk.split_off(skipped as usize);
        if !span.alone {
            rest.truncate(usize::try_from(span.end - offset).unwrap_or(usize::MAX));
        }
        if !rest.is_empty() {
            return Ok(Some(rest));
        }
    }
}

/// A response, and how many bytes of it to skip to come to the place; `None` where a piece of
/// many is not to be had.
async fn connect(origin: &Origin, span: Span, offset: u64) -> Result<Option<(Response, u64)>> {
    let Origin { client, url, size, etag } = origin;
    let mut request = client.get(url)?;
    if !span.alone {
        request = request.header(RANGE, format!("bytes={offset}-{}", span.end - 1));
    } else if offset > 0 {
        request = request.header(RANGE, format!("bytes={offset}-"));
    }
    if let Some(etag) = etag.get().filter(|_| offset > 0) {
        request = request.header(IF_RANGE, etag);
    }
    let response = request.send().await.context("connecting")?;
    let status = response.status();
    if !span.alone && status == StatusCode::OK {
        return Ok(None);
    }
    if status == StatusCode::RANGE_NOT_SATISFIABLE {
        reject!("{url} has less than the {size} bytes that the manifest says");
    }
    let busy = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&status);
    let response = client::success(response).await;
    let response = if busy { response.context(Busy)? } else { response? };
    if status == StatusCode::PARTIAL_CONTENT {
        let range = response.headers().typed_get::<ContentRange>();
        let range = range.ok_or_else(|| anyhow!("{url} answered 206 without a Content-Range"))?;
        if range.bytes_len().is_some_and(|length| length != *size) {
            reject!("{url} has {} bytes, the manifest says {size}", range.bytes_len().unwrap_or_default());
        }
        let asked = offset > 0 || !span.alone;
        if !asked || range.bytes_range().is_none_or(|(start, _)| start != offset) {
            bail!("{url} answered with another range than bytes {offset} and on");
        }
        if span.alone || offset > span.start {
            tracing::info!("the download goes on at byte {offset} of {size}");
        }
        return Ok(Some((response, 0)));
    }
    if let Some(length) = response.content_length().filter(|length| length != size) {
        reject!("{url} has {length} bytes, the manifest says {size}");
    }
    if offset > 0 {
        tracing::info!("the server knows no ranges, or has another file now: the download starts again");
    }
    Ok(Some((response, offset)))
}

/// The `ETag`, if it is one that If-Range takes (RFC 9110, 13.1.5).
fn strong_etag(headers: &HeaderMap) -> Option<HeaderValue> {
    headers.get(ETAG).filter(|etag| etag.as_bytes().starts_with(b"\"")).cloned()
}
