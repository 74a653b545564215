//! Resumable uploads (draft-ietf-httpbis-resumable-upload), in the form that needs no
//! interim responses: an empty creation request, then PATCH in parts. An upload is
//! named by what it will be, so that a client that lost everything finds it again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use axum::body::{Body, HttpBody};
use axum::http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, LOCATION};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::manifest::TARBALL_FILE;
use oscontainer_artifact::protocol::{
    PARTIAL_MEDIA_TYPE, REPR_DIGEST, UPLOAD_COMPLETE, UPLOAD_LENGTH, UPLOAD_LIMIT, UPLOAD_OFFSET,
};
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::reply::{Refusal, insert};
use super::routes::{FileName, Shared, blocking};
use super::store::{Appending, Found, Hashed, Id, Partial, Store, file_name};
use super::upload::{
    End, Incoming, Target, claimed, conflict, content_length, linger, refuse, reply, too_large, unprocessable,
};

/// How soon a client may come again whose request another one has ended.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// An upload: a version's tarball by its digest.
pub type Key = (Id, Digest);

/// Who works on which upload. A new request ends the one before it: its client has
/// given up on that, though the connection may not know yet.
#[derive(Default)]
pub struct Turns(Mutex<HashMap<Key, Slot>>);

#[derive(Default)]
struct Slot {
    /// What is hashed of it; locked by who works on it.
    hashed: Arc<tokio::sync::Mutex<Option<Hashed>>>,
    current: CancellationToken,
}

/// The right to work on an upload.
struct Turn {
    hashed: OwnedMutexGuard<Option<Hashed>>,
    ended: CancellationToken,
}

impl Turns {
    /// Ends the request that works on it, waits until it has, and takes its place.
    async fn take(&self, key: &Key) -> Turn {
        let ended = CancellationToken::new();
        let hashed = {
            let mut slots = self.slots();
            let slot = slots.entry(key.clone()).or_default();
            std::mem::replace(&mut slot.current, ended.clone()).cancel();
            Arc::clone(&slot.hashed)
        };
        Turn { hashed: hashed.lock_owned().await, ended }
    }

    /// Ends all requests that work on uploads of a version, and waits until they have.
    async fn take_all(&self, id: &Id) -> Vec<(Key, Turn)> {
        let mut keys: Vec<_> = self.slots().keys().filter(|(other, _)| other == id).cloned().collect();
        // In one order: of two who do this at the same time neither waits for the other for ever.
        keys.sort_by_key(|(_, digest)| *digest);
        let mut turns = Vec::new();
        for key in keys {
            let turn = self.take(&key).await;
            turns.push((key, turn));
        }
        turns
    }

    /// The right to work on it if nobody does.
    fn take_idle(&self, key: &Key) -> Option<Turn> {
        let mut slots = self.slots();
        let slot = slots.entry(key.clone()).or_default();
        let hashed = Arc::clone(&slot.hashed).try_lock_owned().ok()?;
        Some(Turn { hashed, ended: slot.current.clone() })
    }

    /// Forgets an upload that is over, unless somebody waits for it.
    fn forget(&self, key: &Key, turn: Turn) {
        let mut slots = self.slots();
        drop(turn);
        if slots.get(key).is_some_and(|slot| Arc::strong_count(&slot.hashed) == 1) {
            slots.remove(key);
        }
    }

    /// Forgets what requests left behind that came to nothing.
    fn tidy(&self) {
        let idle = |slot: &Slot| Arc::strong_count(&slot.hashed) == 1;
        let empty = |slot: &Slot| slot.hashed.try_lock().is_ok_and(|hashed| hashed.is_none());
        self.slots().retain(|_, slot| !(idle(slot) && empty(slot)));
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Key, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a PUT begins a resumable upload: it says that it is not complete.
pub fn begins(headers: &HeaderMap) -> bool {
    boolean(headers, UPLOAD_COMPLETE) == Some(false)
}

/// Begins an upload, or finds the one that was begun.
pub async fn create(shared: Shared, target: Target, headers: HeaderMap, body: Body) -> Response {
    if !body.is_end_stream() {
        let refusal = bad("a request that begins a resumable upload carries no bytes: they come with PATCH");
        return refuse(refusal, body, &headers);
    }
    created(&shared, target, &headers).await.unwrap_or_else(IntoResponse::into_response)
}

async fn created(shared: &Shared, target: Target, headers: &HeaderMap) -> Result<Response, Refusal> {
    if target.file != FileName::Tarball {
        return Err(bad("a manifest is small: send it whole, without Upload-Complete"));
    }
    let Some(digest) = claimed(headers)? else {
        return Err(bad("a resumable upload needs Repr-Digest: it is known by its digest"));
    };
    let Some(length) = integer(headers, UPLOAD_LENGTH) else {
        return Err(bad("a resumable upload needs Upload-Length"));
    };
    if length > shared.limits.max_size {
        return Err(limited(shared, too_large(shared.limits.max_size)));
    }
    let key = (target.id, digest);
    let turn = shared.turns.take(&key).await;
    let (id, digest) = key.clone();
    let (found, free) =
        blocking(shared, move |store| Ok((store.begin_upload(&id, &digest, length)?, store.disk_free()?))).await?;
    let (id, digest) = &key;
    let response = match found {
        Found::Conflict(stored) => Err(conflict(&Target { id: id.clone(), file: FileName::Tarball }, stored)),
        Found::Nothing => Err(Refusal::full()),
        Found::Whole(size) if size != length => Err(inconsistent(size)),
        Found::Whole(size) => Ok(state(shared, StatusCode::OK, size, size, true)),
        Found::Partial(partial) if partial.length != length => Err(inconsistent(partial.length)),
        Found::Partial(partial) if partial.length - partial.offset.min(partial.length) > free => Err(Refusal::full()),
        Found::Partial(partial) => {
            let status = if partial.offset == 0 { StatusCode::CREATED } else { StatusCode::OK };
            let mut response = state(shared, status, partial.offset, partial.length, false);
            // From .../artifacts/NAME/VERSION/repo.tar, wherever the endpoint is mounted.
            let location = format!("../../../uploads/{}/{}/{}", id.name, id.version, file_name(digest));
            insert(response.headers_mut(), LOCATION, &location);
            Ok(response)
        }
    };
    if !matches!(&response, Ok(response) if response.headers().contains_key(LOCATION)) {
        shared.turns.forget(&key, turn);
    }
    response
}

/// How far an upload is.
pub async fn offset(shared: &Shared, key: Key) -> Result<Response, Refusal> {
    let turn = shared.turns.take(&key).await;
    let (id, digest) = key.clone();
    let response = match blocking(shared, move |store| store.find_upload(&id, &digest)).await? {
        Found::Partial(partial) => {
            return Ok(state(shared, StatusCode::NO_CONTENT, partial.offset, partial.length, false));
        }
        Found::Whole(size) => Ok(state(shared, StatusCode::NO_CONTENT, size, size, true)),
        Found::Nothing | Found::Conflict(_) => Err(no_upload()),
    };
    shared.turns.forget(&key, turn);
    response
}

/// Gives an upload up.
pub async fn cancel(shared: &Shared, key: Key) -> Result<Response, Refusal> {
    let turn = shared.turns.take(&key).await;
    let (id, digest) = key.clone();
    let cancelled = blocking(shared, move |store| store.cancel_upload(&id, &digest)).await;
    shared.turns.forget(&key, turn);
    if cancelled? { Ok(StatusCode::NO_CONTENT.into_response()) } else { Err(no_upload()) }
}

/// Removes a version, and ends the uploads to it; whether there was anything.
///
/// # Errors
/// When the store fails.
pub async fn delete(shared: &Shared, id: &Id) -> Result<bool, Refusal> {
    let turns = shared.turns.take_all(id).await;
    let deleted = id.clone();
    let deleted = blocking(shared, move |store| store.delete(&deleted)).await;
    for (key, turn) in turns {
        shared.turns.forget(&key, turn);
    }
    deleted
}

/// What a client may know before it begins.
pub fn options(shared: &Shared) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    insert(response.headers_mut(), HeaderName::from_static("accept-patch"), PARTIAL_MEDIA_TYPE);
    insert(response.headers_mut(), HeaderName::from_static(UPLOAD_LIMIT), &limits(shared));
    insert(response.headers_mut(), ALLOW, "GET, HEAD, PUT, OPTIONS");
    response
}

/// Adds the request's body to an upload. What came is put away even where nobody waits for the
/// answer any more.
pub async fn append(shared: Shared, key: Key, headers: HeaderMap, body: Body) -> Response {
    let appending = tokio::spawn(appended(shared, key, headers, body));
    appending.await.unwrap_or_else(|error| Refusal::from(anyhow::Error::from(error)).into_response())
}

async fn appended(shared: Shared, key: Key, headers: HeaderMap, body: Body) -> Response {
    let prepared = match prepare(&shared, &key, &headers).await {
        Ok(prepared) => prepared,
        Err(refusal) => return refuse(refusal, body, &headers),
    };
    let left = prepared.work.upload.length - prepared.work.upload.offset();
    let mut incoming = Incoming::new(body.into_data_stream(), left, shared.clone());
    match added(&shared, &key, prepared, &mut incoming).await {
        Ok(response) => response,
        Err(refusal) => {
            linger(incoming.stream);
            refusal.into_response()
        }
    }
}

/// A request that may add.
struct Prepared {
    work: Work,
    complete: bool,
    ended: CancellationToken,
}

/// The file and the right to add to it. They go together, also where the request is
/// dropped while a blocking thread writes.
struct Work {
    upload: Appending,
    hashed: OwnedMutexGuard<Option<Hashed>>,
}

impl Work {
    /// Leaves what came for the next request, durably; gives the offset.
    fn leave(mut self) -> Result<u64> {
        self.upload.sync()?;
        let offset = self.upload.offset();
        *self.hashed = Some(self.upload.hashed());
        Ok(offset)
    }
}

async fn prepare(shared: &Shared, key: &Key, headers: &HeaderMap) -> Result<Prepared, Refusal> {
    if headers.get(CONTENT_TYPE).is_none_or(|value| value != PARTIAL_MEDIA_TYPE) {
        let text = format!("an upload is added to with Content-Type: {PARTIAL_MEDIA_TYPE}");
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text));
    }
    let (Some(offset), Some(complete)) = (integer(headers, UPLOAD_OFFSET), boolean(headers, UPLOAD_COMPLETE)) else {
        return Err(bad("adding to an upload needs Upload-Offset and Upload-Complete"));
    };
    let Turn { mut hashed, ended } = shared.turns.take(key).await;
    let (id, digest) = key.clone();
    let (found, free) =
        blocking(shared, move |store| Ok((store.find_upload(&id, &digest)?, store.disk_free()?))).await?;
    let partial: Partial = match found {
        Found::Partial(partial) => partial,
        Found::Whole(_) => return Err(bad("this upload is complete already")),
        Found::Nothing | Found::Conflict(_) => return Err(no_upload()),
    };
    if partial.offset != offset {
        let text = format!("the upload is at byte {}, not at {offset}", partial.offset);
        let refusal = Refusal::new(StatusCode::CONFLICT, text);
        return Err(refusal.header(HeaderName::from_static(UPLOAD_OFFSET), HeaderValue::from(partial.offset)));
    }
    if let Some(size) = content_length(headers) {
        let end = offset.saturating_add(size);
        if end > partial.length || (complete && end != partial.length) {
            return Err(inconsistent(partial.length));
        }
        if size > free {
            return Err(Refusal::full());
        }
    }
    let known = hashed.take();
    let (id, digest) = key.clone();
    let upload = blocking(shared, move |store| store.append(&id, &digest, partial, known)).await?;
    Ok(Prepared { work: Work { upload, hashed }, complete, ended })
}

async fn added(shared: &Shared, key: &Key, prepared: Prepared, incoming: &mut Incoming) -> Result<Response, Refusal> {
    let Prepared { work, complete, ended } = prepared;
    let ended = async {
        ended.cancelled().await;
        superseded()
    };
    let (work, end) = incoming.write_to(work, |work, batch| work.upload.write(batch), ended).await?;
    if incoming.exceeded {
        // The draft wants it gone (Upload Append, Server Behavior).
        let (id, digest) = key.clone();
        blocking(shared, move |store| {
            drop(work);
            store.cancel_upload(&id, &digest)
        })
        .await?;
        return Err(bad("more bytes came than the upload may have: it is given up"));
    }
    if let End::Broke(refusal) = end {
        let offset = blocking(shared, move |_| work.leave()).await?;
        tracing::info!("{} {}: the upload stands at byte {offset}", key.0.name, key.0.version);
        return Err(refusal);
    }
    let length = work.upload.length;
    if !complete {
        let offset = blocking(shared, move |_| work.leave()).await?;
        return Ok(state(shared, StatusCode::NO_CONTENT, offset, length, false));
    }
    if work.upload.offset() != length {
        blocking(shared, move |_| work.leave()).await?;
        return Err(inconsistent(length));
    }
    let (id, digest) = key.clone();
    let outcome = blocking(shared, move |store| {
        let Work { upload, hashed } = work;
        let outcome = store.finish_upload(&id, &digest, upload)?;
        drop(hashed);
        Ok(outcome)
    });
    let target = Target { id: key.0.clone(), file: FileName::Tarball };
    let mut response = match outcome.await? {
        Some(outcome) => reply(&target, outcome, key.1)?,
        None => {
            let text = format!("what came in has not the digest {} that {REPR_DIGEST} said", key.1);
            unprocessable(text).into_response()
        }
    };
    insert(response.headers_mut(), HeaderName::from_static(UPLOAD_COMPLETE), "?1");
    if let Some(turn) = shared.turns.take_idle(key) {
        shared.turns.forget(key, turn);
    }
    Ok(response)
}

/// Removes the uploads, and the tarballs without a manifest, that nobody has touched
/// for too long.
pub async fn remove_stale(shared: &Shared) {
    let expiry = shared.limits.upload_expiry;
    // What fails is in the log, and in the way of nothing else.
    let _ = blocking(shared, move |store| store.expire_staged(expiry)).await;
    for key in blocking(shared, Store::uploads).await.unwrap_or_default() {
        // How old it is counts only as long as nobody can add to it.
        let Some(turn) = shared.turns.take_idle(&key) else { continue };
        let (id, digest) = key.clone();
        if let Ok(true) = blocking(shared, move |store| store.expire_upload(&id, &digest, expiry)).await {
            tracing::info!("{} {}: removed an upload that did not go on: {}", key.0.name, key.0.version, key.1);
            shared.turns.forget(&key, turn);
        }
    }
    shared.turns.tidy();
}

/// How far an upload is, as a response.
fn state(shared: &Shared, status: StatusCode, offset: u64, length: u64, complete: bool) -> Response {
    let mut response = status.into_response();
    let headers = [
        (UPLOAD_OFFSET, offset.to_string()),
        (UPLOAD_LENGTH, length.to_string()),
        (UPLOAD_COMPLETE, if complete { "?1" } else { "?0" }.to_owned()),
        (UPLOAD_LIMIT, limits(shared)),
    ];
    for (name, value) in headers {
        insert(response.headers_mut(), HeaderName::from_static(name), &value);
    }
    insert(response.headers_mut(), CACHE_CONTROL, "no-store");
    response
}

fn limits(shared: &Shared) -> String {
    format!("max-size={}, max-age={}", shared.limits.max_size, shared.limits.upload_expiry.as_secs())
}

fn limited(shared: &Shared, refusal: Refusal) -> Refusal {
    match HeaderValue::try_from(limits(shared)) {
        Ok(value) => refusal.header(HeaderName::from_static(UPLOAD_LIMIT), value),
        Err(_) => refusal,
    }
}

/// A header that is a Boolean (RFC 9651, 3.3.6); anything else counts as absent.
fn boolean(headers: &HeaderMap, name: &str) -> Option<bool> {
    match headers.get(name)?.as_bytes().trim_ascii() {
        b"?1" => Some(true),
        b"?0" => Some(false),
        _ => None,
    }
}

/// A header that is an Integer of at most 15 digits, not negative (RFC 9651, 3.3.1).
fn integer(headers: &HeaderMap, name: &str) -> Option<u64> {
    let text = headers.get(name)?.to_str().ok()?.trim();
    (text.len() <= 15 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

fn bad(reason: &str) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, reason)
}

fn inconsistent(length: u64) -> Refusal {
    bad(&format!("the {TARBALL_FILE} of this digest has {length} bytes: that does not agree with this request"))
}

fn no_upload() -> Refusal {
    Refusal::not_found("there is no such upload: it was never begun, or given up; begin it with PUT")
}

fn superseded() -> Refusal {
    let text = "another request for this upload came; what was sent until then is kept";
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text).header(axum::http::header::RETRY_AFTER, RETRY_AFTER)
}
