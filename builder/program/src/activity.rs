//! What moves on a connection whose client cannot be judged by the bytes that the kernel sees: in HTTP/2 they may be
//! pings, and a unix socket has no timeout. Such a connection ends when nothing of an answer was taken for too long
//! and nothing is owed to its client.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::service::Service;
use hyper::{Request, Response};
use tokio::time::Instant;

/// What is known of a connection.
pub struct Activity {
    /// Requests that have no answer yet.
    asked: AtomicUsize,
    /// Answers that are being given.
    answers: Mutex<Vec<Weak<Answer>>>,
    /// When something was given, or sent, last.
    last: Mutex<Instant>,
}

/// An answer that is being given; its parts that are not sent yet hold it too.
struct Answer {
    /// Whether its next part is awaited.
    awaited: AtomicBool,
}

impl Activity {
    /// A connection that begins now.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { asked: AtomicUsize::new(0), answers: Mutex::default(), last: Mutex::new(Instant::now()) })
    }

    /// Ends when the client has let `timeout` pass: it asked for nothing, and took nothing of what it asked for.
    pub async fn ends(&self, timeout: Duration) {
        loop {
            let due = self.last() + timeout;
            if Instant::now() < due {
                tokio::time::sleep_until(due).await;
            } else if self.owes() {
                tokio::time::sleep(timeout).await;
            } else {
                return;
            }
        }
    }

    /// Whether the client waits for something, and not the other way round.
    fn owes(&self) -> bool {
        // A part that is not sent yet is for the client to take, and files are read on only when it has been.
        let owed = |answer: &Weak<Answer>| {
            let sent = answer.strong_count() == 1;
            answer.upgrade().is_some_and(|answer| sent && answer.awaited.load(Ordering::Acquire))
        };
        self.asked.load(Ordering::Acquire) > 0 || lock(&self.answers).iter().any(owed)
    }

    fn begins(&self) -> Arc<Answer> {
        let answer = Arc::new(Answer { awaited: AtomicBool::new(false) });
        let mut answers = lock(&self.answers);
        answers.retain(|answer| answer.strong_count() > 0);
        answers.push(Arc::downgrade(&answer));
        answer
    }

    fn moved(&self) {
        *lock(&self.last) = Instant::now();
    }

    fn last(&self) -> Instant {
        *lock(&self.last)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request that has no answer yet.
struct Asked(Arc<Activity>);

impl Asked {
    fn begin(activity: &Arc<Activity>) -> Self {
        activity.asked.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(activity))
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.moved();
        self.0.asked.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A service that notes what moves.
#[derive(Clone)]
pub struct Watched<S> {
    service: S,
    activity: Arc<Activity>,
}

impl<S> Watched<S> {
    /// `service` for the connection of this activity.
    pub fn new(service: S, activity: Arc<Activity>) -> Self {
        Self { service, activity }
    }
}

impl<S> Service<Request<Incoming>> for Watched<S>
where
    S: Service<Request<Incoming>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let activity = Arc::clone(&self.activity);
        // Whoever reads the request's body sees to it that it comes.
        let asked = Asked::begin(&activity);
        let answering = self.service.call(request);
        Box::pin(async move {
            let response = answering.await?;
            let answer = activity.begins();
            drop(asked);
            Ok(response.map(|body| Body::new(Taken { body, activity, answer })))
        })
    }
}

/// An answer's body.
struct Taken {
    body: Body,
    activity: Arc<Activity>,
    answer: Arc<Answer>,
}

impl HttpBody for Taken {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        self.answer.awaited.store(polled.is_pending(), Ordering::Release);
        if polled.is_ready() {
            self.activity.moved();
        }
        let part = |bytes| {
            let (answer, activity) = (Arc::clone(&self.answer), Arc::clone(&self.activity));
            Bytes::from_owner(Part { bytes, activity, _answer: answer })
        };
        polled.map_ok(|frame| frame.map_data(part))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.answer.awaited.store(false, Ordering::Release);
    }
}

/// A part of an answer on its way to the client; dropped, it has been sent.
struct Part {
    bytes: Bytes,
    activity: Arc<Activity>,
    _answer: Arc<Answer>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.activity.moved();
    }
}
