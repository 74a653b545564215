//! PUT: what can be refused from the headers is refused before the body is read;
//! a body is hashed and written while it comes in, a quarter of a mebibyte at a time, on a
//! blocking thread that is held only while there is something to write.

use std::future::pending;
use std::pin::{Pin, pin};
use std::time::Duration;

use anyhow::Result;
use axum::body::{Body, BodyDataStream};
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, EXPECT};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::manifest::{MAX_SIZE, Manifest};
use oscontainer_artifact::protocol::{CONTENT_DIGEST, REPR_DIGEST, digest_header, parse_digest_header};

use super::reply::{Refusal, insert, text};
use super::routes::{FileName, Shared, blocking};
use super::store::{Found, Id, Outcome, Received, Upload};

/// How much is hashed, and how much is written at a time, in bytes; as much again comes in meanwhile.
const BATCH: usize = 256 << 10;
/// How much of a refused body is read and thrown away, in bytes, and how long: a
/// connection that is closed under a sending client may lose the reply.
const LINGER: u64 = 1 << 30;
/// See [`LINGER`].
const LINGER_TIME: Duration = Duration::from_secs(10);

/// A file of a version to be stored.
pub struct Target {
    /// The version.
    pub id: Id,
    /// Which of its files.
    pub file: FileName,
}

/// The response to a PUT whose writer was let in.
pub async fn put(shared: Shared, target: Target, headers: HeaderMap, body: Body) -> Response {
    match admit(&shared, &target, &headers).await {
        Ok(admitted) => {
            let scarce = admitted.limit < admitted.largest;
            let mut incoming = Incoming::new(body.into_data_stream(), admitted.limit, shared.clone());
            match store(&shared, target, admitted, &mut incoming).await {
                Ok(response) => response,
                Err(refusal) => {
                    let refusal = if incoming.exceeded && scarce { Refusal::full() } else { refusal };
                    linger(incoming.stream);
                    refusal.into_response()
                }
            }
        }
        Err(refusal) => refuse(refusal, body, &headers),
    }
}

/// Refuses a request whose body was not read.
pub fn refuse(refusal: Refusal, body: Body, headers: &HeaderMap) -> Response {
    // A client that waits for `100 Continue` sends nothing, and reading would invite it to.
    if !headers.contains_key(EXPECT) {
        linger(body.into_data_stream());
    }
    refusal.into_response()
}

/// What the headers and the store say before the body is read.
struct Admitted {
    /// The largest file that may be sent, in bytes.
    largest: u64,
    /// The same with regard to the room that there is.
    limit: u64,
    length: Option<u64>,
    claimed: Option<Digest>,
    /// What the version has under this name, if it is complete.
    stored: Option<Digest>,
    /// Where a tarball goes.
    upload: Upload,
}

async fn admit(shared: &Shared, target: &Target, headers: &HeaderMap) -> Result<Admitted, Refusal> {
    if headers.contains_key(CONTENT_RANGE) {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "a PUT with Content-Range is not understood"));
    }
    if headers.get(CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
        return Err(Refusal::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "send the file as it is, without Content-Encoding",
        ));
    }
    let claimed = claimed(headers)?;
    let largest = match target.file {
        FileName::Manifest => MAX_SIZE,
        FileName::Tarball => shared.limits.max_size,
    };
    let length = content_length(headers);
    if length.is_some_and(|length| length > largest) {
        return Err(too_large(largest));
    }
    let id = target.id.clone();
    let complete = blocking(shared, move |store| store.record(&id)).await?;
    let stored = complete.as_ref().map(|record| target.file.of(record));
    if let Some((digest, size)) = stored
        && (claimed.is_some_and(|claimed| claimed != digest) || length.is_some_and(|length| length != size))
    {
        return Err(conflict(target, digest));
    }
    let (upload, limit) = match (target.file, stored) {
        (FileName::Tarball, None) => room(shared, &target.id, claimed, length).await?.ok_or_else(Refusal::full)?,
        // A manifest is small, and what makes a version complete must not want for room.
        (FileName::Manifest, _) | (_, Some(_)) => (Upload::discard(), largest),
    };
    let (limit, stored) = (limit.min(largest), stored.map(|(digest, _)| digest));
    Ok(Admitted { largest, limit, length, claimed, stored, upload })
}

/// Where a tarball goes, and how much of it; what is here already needs no room. `None` where there is none.
async fn room(
    shared: &Shared,
    id: &Id,
    claimed: Option<Digest>,
    length: Option<u64>,
) -> Result<Option<(Upload, u64)>, Refusal> {
    let id = id.clone();
    blocking(shared, move |store| {
        if let Some(claimed) = claimed
            && let Found::Whole(_) = store.find_upload(&id, &claimed)?
        {
            return Ok(Some((Upload::discard(), u64::MAX)));
        }
        store.receive(&id, length)
    })
    .await
}

async fn store(
    shared: &Shared,
    target: Target,
    admitted: Admitted,
    incoming: &mut Incoming,
) -> Result<Response, Refusal> {
    let Target { id, file } = &target;
    let (outcome, digest) = match file {
        FileName::Tarball => {
            let received = receive(shared, admitted, incoming).await?;
            let (digest, id) = (received.digest, id.clone());
            (blocking(shared, move |store| store.stage(&id, received)).await?, digest)
        }
        FileName::Manifest => {
            let bytes = collect(incoming).await?;
            let digest = Digest::of(&bytes);
            matches_claim(admitted.claimed, digest)?;
            if let Some(stored) = admitted.stored {
                let outcome = if stored == digest { Outcome::Same } else { Outcome::Conflict(stored) };
                return reply(&target, outcome, digest);
            }
            let manifest = Manifest::parse(&bytes).map_err(|rejected| unprocessable(rejected.to_string()))?;
            if (&manifest.name, &manifest.version) != (&id.name, &id.version) {
                return Err(unprocessable(format!(
                    "the manifest is of {} {}, the path says {} {}",
                    manifest.name, manifest.version, id.name, id.version
                )));
            }
            let tarball = manifest.tarball.clone();
            let outcome = blocking(shared, move |store| store.commit(&manifest, &bytes)).await?;
            if outcome == Outcome::NoTarball {
                return Err(unprocessable(format!(
                    "the manifest's tarball is missing: upload the {} with {} bytes and {} first",
                    tarball.path, tarball.size, tarball.digest
                )));
            }
            shared.changed.notify_one();
            (outcome, digest)
        }
    };
    reply(&target, outcome, digest)
}

/// The response to an upload that came in whole.
///
/// # Errors
/// The refusal that the outcome is.
pub fn reply(target: &Target, outcome: Outcome, digest: Digest) -> Result<Response, Refusal> {
    let status = match outcome {
        Outcome::Created => StatusCode::CREATED,
        Outcome::Same => StatusCode::OK,
        Outcome::Conflict(stored) => return Err(conflict(target, stored)),
        Outcome::NoTarball => return Err(unprocessable("the manifest's tarball is missing".to_owned())),
    };
    let Target { id, file } = target;
    tracing::info!(
        "{} {}: {} {digest} {}",
        id.name,
        id.version,
        file.as_str(),
        match outcome {
            Outcome::Created => "stored",
            _ => "was stored before",
        }
    );
    let mut response = text(status, digest.to_string());
    let headers = response.headers_mut();
    headers.remove(CONTENT_TYPE);
    insert(headers, ETAG, &format!("\"{digest}\""));
    insert(headers, HeaderName::from_static(REPR_DIGEST), &digest_header(&digest));
    Ok(response)
}

/// Takes a tarball in.
async fn receive(shared: &Shared, admitted: Admitted, incoming: &mut Incoming) -> Result<Received, Refusal> {
    let (upload, end) = incoming.write_to(admitted.upload, |upload, batch| upload.write(batch), pending()).await?;
    if let End::Broke(refusal) = end {
        // That waits for the disk too.
        blocking(shared, move |_| {
            drop(upload);
            Ok(())
        })
        .await?;
        return Err(refusal);
    }
    let received = blocking(shared, move |_| upload.finish()).await?;
    matches_claim(admitted.claimed, received.digest)?;
    if admitted.length.is_some_and(|length| length != received.size) {
        return Err(broke_off());
    }
    Ok(received)
}

async fn collect(incoming: &mut Incoming) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    while let Some(chunk) = incoming.next().await? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// A request's body with its limits.
pub struct Incoming {
    /// What has not been read.
    pub stream: BodyDataStream,
    /// The largest body, in bytes.
    limit: u64,
    /// How much of it may still come.
    left: u64,
    /// Whether more came than may.
    pub exceeded: bool,
    /// What came for the next batch.
    waiting: Vec<Bytes>,
    shared: Shared,
}

/// What follows a batch.
pub enum End {
    /// Another one.
    More,
    /// Nothing: it was the last one.
    Done,
    /// Nothing, for this reason.
    Broke(Refusal),
}

impl Incoming {
    /// A body of at most `limit` bytes.
    pub fn new(stream: BodyDataStream, limit: u64, shared: Shared) -> Self {
        Self { stream, limit, left: limit, exceeded: false, waiting: Vec::new(), shared }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Refusal> {
        let next = tokio::time::timeout(self.shared.limits.client_timeout, self.stream.next()).await;
        let chunk = match next {
            Ok(None) => return Ok(None),
            Ok(Some(Ok(chunk))) => chunk,
            Ok(Some(Err(error))) => {
                tracing::info!("an upload broke off: {error}");
                return Err(broke_off());
            }
            Err(_) => {
                let text = format!("nothing came for {} seconds", self.shared.limits.client_timeout.as_secs());
                return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, text));
            }
        };
        self.shared.metrics.received.inc_by(chunk.len() as u64);
        match self.left.checked_sub(chunk.len() as u64) {
            Some(left) => self.left = left,
            None => {
                self.exceeded = true;
                return Err(too_large(self.limit));
            }
        }
        Ok(Some(chunk))
    }

    /// Gives all that comes to `write`, each batch while the next one comes in, until the body ends or
    /// `stop` does; what came until then is written too.
    ///
    /// # Errors
    /// Those of `write`.
    pub async fn write_to<T: Send + 'static>(
        &mut self,
        mut target: T,
        write: fn(&mut T, &[Bytes]) -> Result<()>,
        stop: impl Future<Output = Refusal>,
    ) -> Result<(T, End), Refusal> {
        let shared = self.shared.clone();
        let mut stop = pin!(stop);
        let (mut batch, mut end) = self.batch(stop.as_mut()).await;
        loop {
            let writing = blocking(&shared, move |_| write(&mut target, &batch).map(|()| target));
            if !matches!(end, End::More) {
                return Ok((writing.await?, end));
            }
            let (written, next) = tokio::join!(writing, self.batch(stop.as_mut()));
            target = written?;
            (batch, end) = next;
        }
    }

    /// The next chunks, [`BATCH`] bytes or a little more, and what follows them.
    async fn batch(&mut self, stop: Pin<&mut impl Future<Output = Refusal>>) -> (Vec<Bytes>, End) {
        let end = tokio::select! {
            end = self.fill() => end,
            refusal = stop => End::Broke(refusal),
        };
        (std::mem::take(&mut self.waiting), end)
    }

    /// Waits for [`BATCH`] bytes, and says what follows them.
    async fn fill(&mut self) -> End {
        loop {
            if self.waiting.iter().map(Bytes::len).sum::<usize>() >= BATCH {
                return End::More;
            }
            match self.next().await {
                Ok(Some(chunk)) => self.waiting.push(chunk),
                Ok(None) => return End::Done,
                Err(refusal) => return End::Broke(refusal),
            }
        }
    }
}

/// The body's length, where the client says it. hyper has seen to it that it is a
/// number that agrees with the body.
pub fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads on for a while so that the client gets to read the reply.
pub fn linger(mut body: BodyDataStream) {
    tokio::spawn(async move {
        let drain = async {
            let mut read = 0;
            while let Some(Ok(chunk)) = body.next().await {
                read += chunk.len() as u64;
                if read > LINGER {
                    break;
                }
            }
        };
        // Either way the body is dropped, and with it the connection.
        let _ = tokio::time::timeout(LINGER_TIME, drain).await;
    });
}

/// The digest that the client says its file has.
///
/// # Errors
/// 400 where a header is malformed, 422 where two contradict each other.
pub fn claimed(headers: &HeaderMap) -> Result<Option<Digest>, Refusal> {
    let mut claimed = None;
    for value in [REPR_DIGEST, CONTENT_DIGEST].iter().flat_map(|name| headers.get_all(*name)) {
        let bad = |reason: String| Refusal::new(StatusCode::BAD_REQUEST, reason);
        let text = value.to_str().map_err(|_| bad("a digest header is not ASCII".to_owned()))?;
        let Some(digest) = parse_digest_header(text).map_err(|rejected| bad(rejected.to_string()))? else { continue };
        if claimed.is_some_and(|claimed| claimed != digest) {
            return Err(unprocessable("the digest headers contradict each other".to_owned()));
        }
        claimed = Some(digest);
    }
    Ok(claimed)
}

fn matches_claim(claimed: Option<Digest>, digest: Digest) -> Result<(), Refusal> {
    match claimed {
        Some(claimed) if claimed != digest => {
            Err(unprocessable(format!("what came in has {digest}, its digest header says {claimed}")))
        }
        _ => Ok(()),
    }
}

/// The version is complete with `stored`.
pub fn conflict(target: &Target, stored: Digest) -> Refusal {
    let Target { id, file } = target;
    let text = format!(
        "{} {} is complete with another {}, {stored}: artifacts are immutable, choose another version",
        id.name,
        id.version,
        file.as_str()
    );
    Refusal::new(StatusCode::CONFLICT, text)
}

/// The file is too large.
pub fn too_large(limit: u64) -> Refusal {
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the file is larger than the limit of {limit} bytes"))
}

/// The file is not what it should be.
pub fn unprocessable(reason: String) -> Refusal {
    Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, reason)
}

fn broke_off() -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "the upload broke off; nothing was stored")
}
