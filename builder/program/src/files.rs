//! A file as an HTTP response: a strong ETag that the caller knows from the
//! content, Range with If-Range, If-None-Match, HEAD. `Last-Modified` is never
//! sent: file times are all 0 here, and a node with a cached summary would get
//! 304 for ever.

use std::io::{self, ErrorKind, IoSliceMut};
use std::ops::Bound;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::{Body, Bytes};
use axum::http::header::{ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use futures_util::{Stream, TryStreamExt};
use headers::{ETag, HeaderMapExt, IfNoneMatch, IfRange, Range};
use rustix::io::{ReadWriteFlags, preadv2};
use tokio::fs::File;
use tokio::sync::oneshot;

/// Bytes that all who are sent a file have in memory together, as long as each gets [`CHUNK`]'s least.
const BUDGET: u64 = 2 << 20;
/// The least and the most bytes that are read at a time, powers of two.
const CHUNK: (u64, u64) = (2 << 10, 128 << 10);

/// Bytes that are in memory.
static HELD: AtomicU64 = AtomicU64::new(0);

/// Where a file's bytes come from.
pub trait Content {
    /// `length` bytes from `start` on.
    fn stream(self, start: u64, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static;
}

impl Content for File {
    fn stream(self, start: u64, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        let opened = async move { Ok::<_, io::Error>(chunks(self.into_std().await, start, length)) };
        futures_util::stream::once(opened).try_flatten()
    }
}

/// What is known of a file before it is sent.
pub struct Served<C = File> {
    /// The open file.
    pub file: C,
    /// Bytes.
    pub size: u64,
    /// The text of a strong ETag, without quotes; it changes with every byte.
    pub etag: String,
    /// The `Content-Type`.
    pub content_type: &'static str,
    /// The `Cache-Control`.
    pub cache_control: &'static str,
}

/// `Cache-Control` of what its name pins for ever.
pub const IMMUTABLE: &str = "public, max-age=31536000, immutable";
/// `Cache-Control` of what may change: every use asks for it again.
pub const NO_CACHE: &str = "no-cache";

/// The response to a GET or HEAD with `request`'s headers: 200, 206, 304 or 416.
///
/// # Errors
/// When the ETag is none.
pub fn respond<C: Content>(served: Served<C>, method: &Method, request: &HeaderMap) -> io::Result<Response<Body>> {
    let etag: ETag = format!("\"{}\"", served.etag).parse().map_err(io::Error::other)?;
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(ETAG, HeaderValue::try_from(format!("\"{}\"", served.etag)).map_err(io::Error::other)?);
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(served.cache_control));
    if request.typed_get::<IfNoneMatch>().is_some_and(|condition| !condition.precondition_passes(&etag)) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(served.content_type));
    let current = request.typed_get::<IfRange>().is_none_or(|condition| !condition.is_modified(Some(&etag), None));
    let range = request.typed_get::<Range>().filter(|_| current && method == Method::GET);
    let (start, length) = match range.map(|range| requested(&range, served.size)) {
        None | Some(Requested::Whole) => (0, served.size),
        Some(Requested::Part { start, end }) => {
            let value = format!("bytes {start}-{end}/{}", served.size);
            headers.insert(CONTENT_RANGE, HeaderValue::try_from(value).map_err(io::Error::other)?);
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            (start, end - start + 1)
        }
        Some(Requested::Outside) => {
            let value = format!("bytes */{}", served.size);
            headers.insert(CONTENT_RANGE, HeaderValue::try_from(value).map_err(io::Error::other)?);
            *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
            return Ok(response);
        }
    };
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    if method != Method::HEAD {
        *response.body_mut() = Body::from_stream(served.file.stream(start, length));
    }
    Ok(response)
}

/// `length` bytes of `file` from `start` on.
fn chunks(file: std::fs::File, start: u64, length: u64) -> impl Stream<Item = io::Result<Bytes>> {
    let sending = Sending { file: Arc::new(file), position: start, end: start + length, held: 0, sent: None };
    futures_util::stream::try_unfold(sending, Sending::next)
}

/// A file that is being sent. Of each, one chunk is in memory: no more is read before that has been sent.
struct Sending {
    file: Arc<std::fs::File>,
    position: u64,
    end: u64,
    /// Bytes of its chunk.
    held: u64,
    /// Gives the chunk's memory back.
    sent: Option<oneshot::Receiver<Vec<u8>>>,
}

impl Sending {
    async fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        if self.position == self.end {
            return Ok(None);
        }
        let mut buffer = match self.sent.take() {
            Some(sent) => sent.await.unwrap_or_default(),
            None => Vec::new(),
        };
        let size = self.share();
        if buffer.capacity() == size {
            buffer.resize(size, 0);
        } else {
            drop(buffer);
            buffer = vec![0; size];
        }
        // What the system has in memory is read here and now; only for a disk another thread waits.
        let at_once = preadv2(&*self.file, &mut [IoSliceMut::new(&mut buffer)], self.position, ReadWriteFlags::NOWAIT);
        let count = match at_once {
            Ok(count) => count,
            Err(_) => {
                let (file, position) = (Arc::clone(&self.file), self.position);
                let read = tokio::task::spawn_blocking(move || {
                    let count = file.read_at(&mut buffer, position)?;
                    Ok::<_, io::Error>((buffer, count))
                });
                let (filled, count) = read.await.map_err(io::Error::other)??;
                buffer = filled;
                count
            }
        };
        if count == 0 {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the file has become shorter"));
        }
        buffer.truncate(count);
        self.position += count as u64;
        let (back, sent) = oneshot::channel();
        self.sent = Some(sent);
        Ok(Some((Bytes::from_owner(Chunk { buffer, back: Some(back) }), self)))
    }

    /// How much to read now: a few who are sent files get much, for speed, and a thousand little each. It is a
    /// power of two before the end, so that it seldom changes.
    fn share(&mut self) -> usize {
        let others = HELD.load(Ordering::Relaxed).saturating_sub(self.held);
        let share = 1 << (BUDGET.saturating_sub(others) / 4).clamp(CHUNK.0, CHUNK.1).ilog2();
        let share = (self.end - self.position).min(share);
        HELD.fetch_add(share, Ordering::Relaxed);
        HELD.fetch_sub(self.held, Ordering::Relaxed);
        self.held = share;
        share as usize
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        HELD.fetch_sub(self.held, Ordering::Relaxed);
    }
}

/// A part of a file on its way to a client; dropped, it has been sent.
struct Chunk {
    buffer: Vec<u8>,
    back: Option<oneshot::Sender<Vec<u8>>>,
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            // After the last chunk nobody waits for it.
            let _ = back.send(std::mem::take(&mut self.buffer));
        }
    }
}

enum Requested {
    Whole,
    /// Both ends inclusive.
    Part {
        start: u64,
        end: u64,
    },
    Outside,
}

/// One range is answered with that part; several at once with the whole file,
/// as RFC 9110, 14.2 allows.
fn requested(range: &Range, size: u64) -> Requested {
    let mut satisfiable = range.satisfiable_ranges(size);
    let Some(first) = satisfiable.next() else { return Requested::Outside };
    if satisfiable.next().is_some() {
        return Requested::Whole;
    }
    let start = match first.0 {
        Bound::Included(start) => start,
        Bound::Excluded(start) => start + 1,
        Bound::Unbounded => 0,
    };
    let end = match first.1 {
        Bound::Included(end) => end.min(size.saturating_sub(1)),
        Bound::Excluded(end) => end.min(size).saturating_sub(1),
        Bound::Unbounded => size.saturating_sub(1),
    };
    if start > end || start >= size { Requested::Outside } else { Requested::Part { start, end } }
}
