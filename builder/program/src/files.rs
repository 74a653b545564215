//! A file as an HTTP response: a strong ETag that the caller knows from the
//! content, Range with If-Range, If-Match, If-None-Match, HEAD. `Last-Modified` is never
//! sent: file times are all 0 here, and a node with a cached summary would get
//! 304 for ever.

use std::io::{self, ErrorKind, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, RANGE,
};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use futures_util::{Stream, TryStreamExt};
use headers::{ETag, HeaderMapExt, IfMatch, IfNoneMatch};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use tokio::fs::File;
use tokio::sync::oneshot;

use crate::buffer::Buffer;

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

/// The response to a GET or HEAD with `request`'s headers: 200, 206, 304, 412 or 416.
///
/// # Errors
/// When the ETag is none.
pub fn respond<C: Content>(served: Served<C>, method: &Method, request: &HeaderMap) -> io::Result<Response<Body>> {
    let etag: ETag = format!("\"{}\"", served.etag).parse().map_err(io::Error::other)?;
    let validator = HeaderValue::try_from(format!("\"{}\"", served.etag)).map_err(io::Error::other)?;
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(ETAG, validator.clone());
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(served.cache_control));
    if request.typed_get::<IfMatch>().is_some_and(|condition| !condition.precondition_passes(&etag)) {
        *response.status_mut() = StatusCode::PRECONDITION_FAILED;
        return Ok(response);
    }
    if request.typed_get::<IfNoneMatch>().is_some_and(|condition| !condition.precondition_passes(&etag)) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(served.content_type));
    // A date says nothing here, and what cannot be read is another validator than ours (RFC 9110, 13.1.5).
    let current = request.get(IF_RANGE).is_none_or(|condition| *condition == validator);
    let range = request.get(RANGE).filter(|_| current && method == Method::GET);
    let range = range.and_then(|range| range.to_str().ok()).unwrap_or_default();
    let (start, length) = match requested(range, served.size) {
        Requested::Whole => (0, served.size),
        Requested::Part { start, end } => {
            let value = format!("bytes {start}-{end}/{}", served.size);
            headers.insert(CONTENT_RANGE, HeaderValue::try_from(value).map_err(io::Error::other)?);
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            (start, end - start + 1)
        }
        Requested::Outside => {
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
    let sending = Sending { file: Arc::new(file), position: start, end: start + length, sent: None };
    futures_util::stream::try_unfold(sending, Sending::next)
}

/// A file that is being sent. Of each, one chunk is in memory: no more is read before that has been sent.
struct Sending {
    file: Arc<std::fs::File>,
    position: u64,
    end: u64,
    /// Gives the chunk's memory back.
    sent: Option<oneshot::Receiver<Buffer>>,
}

impl Sending {
    async fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        if self.position == self.end {
            return Ok(None);
        }
        let last = match self.sent.take() {
            Some(sent) => sent.await.ok(),
            None => None,
        };
        let mut buffer = Buffer::up_to(self.end - self.position, last);
        // What the system has in memory is read here and now; only for a disk another thread waits. Where nobody can
        // know (overlayfs), a little is waited for: mostly it was read ahead.
        let at_once = preadv2(&*self.file, &mut [IoSliceMut::new(&mut buffer)], self.position, ReadWriteFlags::NOWAIT);
        let count = match at_once {
            Ok(count) => count,
            Err(Errno::OPNOTSUPP) if buffer.is_small() => self.file.read_at(&mut buffer, self.position)?,
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
        Ok(Some((Bytes::from_owner(Chunk { buffer: Some(buffer), back: Some(back) }), self)))
    }
}

/// A part of a file on its way to a client; dropped, it has been sent.
struct Chunk {
    /// There until then.
    buffer: Option<Buffer>,
    back: Option<oneshot::Sender<Buffer>>,
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_deref().unwrap_or_default()
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        if let (Some(back), Some(buffer)) = (self.back.take(), self.buffer.take()) {
            // After the last chunk nobody waits for it.
            let _ = back.send(buffer);
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

/// One range is answered with that part; several at once, and what is none, with the whole file,
/// as RFC 9110, 14.2 allows.
fn requested(range: &str, size: u64) -> Requested {
    let spec = range.split_once('=').filter(|(unit, _)| unit.eq_ignore_ascii_case("bytes"));
    let Some((first, last)) = spec.and_then(|(_, spec)| spec.trim().split_once('-')) else { return Requested::Whole };
    let place = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // No file is as long as a number that is too large.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let (start, end) = match (place(first), place(last)) {
        // The last bytes, or all where there are not so many.
        (None, Some(count)) if first.is_empty() && count > 0 => (size.saturating_sub(count), u64::MAX),
        (None, Some(0)) if first.is_empty() => return Requested::Outside,
        (Some(start), None) if last.is_empty() => (start, u64::MAX),
        (Some(start), Some(end)) if start <= end => (start, end),
        _ => return Requested::Whole,
    };
    if start < size { Requested::Part { start, end: end.min(size - 1) } } else { Requested::Outside }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_a_part_or_nothing_at_all() {
        let answer = |range: &str| match requested(range, 10_000) {
            Requested::Whole => "whole".to_owned(),
            Requested::Outside => "outside".to_owned(),
            Requested::Part { start, end } => format!("{start}-{end}"),
        };
        for (range, expected) in [
            ("bytes=0-0", "0-0"),
            ("bytes=5-", "5-9999"),
            ("Bytes= 5-9", "5-9"),
            ("bytes=9999-20000", "9999-9999"),
            ("bytes=-1", "9999-9999"),
            ("bytes=-20000", "0-9999"),
            ("bytes=-99999999999999999999999", "0-9999"),
            ("bytes=-0", "outside"),
            ("bytes=10000-", "outside"),
            ("bytes=99999999999999999999999-", "outside"),
            ("bytes=9-5", "whole"),
            ("bytes=0-1,5-6", "whole"),
            ("bytes=x-", "whole"),
            ("bytes=+1-2", "whole"),
            ("bytes=-", "whole"),
            ("lines=1-2", "whole"),
            ("", "whole"),
        ] {
            assert_eq!(answer(range), expected, "{range}");
        }
        assert!(matches!(requested("bytes=-5", 0), Requested::Outside));
    }
}
