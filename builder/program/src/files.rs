//! A file as an HTTP response: a strong ETag that the caller knows from the
//! content, Range with If-Range, If-None-Match, HEAD. `Last-Modified` is never
//! sent: file times are all 0 here, and a node with a cached summary would get
//! 304 for ever.

use std::io::SeekFrom;
use std::ops::Bound;

use axum::body::Body;
use axum::http::header::{ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use headers::{ETag, HeaderMapExt, IfNoneMatch, IfRange, Range};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

/// Bytes read from disk at a time.
const CHUNK: usize = 256 << 10;

/// What is known of a file before it is sent.
pub struct Served {
    /// The open file, read from its start.
    pub file: File,
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
/// When the file cannot be read.
pub async fn respond(mut served: Served, method: &Method, request: &HeaderMap) -> std::io::Result<Response<Body>> {
    let etag: ETag = format!("\"{}\"", served.etag).parse().map_err(std::io::Error::other)?;
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(ETAG, HeaderValue::try_from(format!("\"{}\"", served.etag)).map_err(std::io::Error::other)?);
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
            headers.insert(CONTENT_RANGE, HeaderValue::try_from(value).map_err(std::io::Error::other)?);
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            (start, end - start + 1)
        }
        Some(Requested::Outside) => {
            let value = format!("bytes */{}", served.size);
            headers.insert(CONTENT_RANGE, HeaderValue::try_from(value).map_err(std::io::Error::other)?);
            *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
            return Ok(response);
        }
    };
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    if method != Method::HEAD {
        served.file.seek(SeekFrom::Start(start)).await?;
        let part = served.file.take(length);
        *response.body_mut() = Body::from_stream(ReaderStream::with_capacity(part, CHUNK.min(length as usize + 1)));
    }
    Ok(response)
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
