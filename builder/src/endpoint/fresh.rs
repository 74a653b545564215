//! What many ask and one answer will do for: whether the store answers, and how much it holds. Only one question is
//! under way at a time, however many ask and however long it takes, and its answer holds for some seconds.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// An answer that comes, with when it did.
type Answer<T> = watch::Receiver<Option<(Instant, T)>>;

/// The last answer.
pub struct Fresh<T> {
    /// How long it holds.
    age: Duration,
    last: Mutex<Option<Answer<T>>>,
}

impl<T: Clone + Send + Sync + 'static> Fresh<T> {
    /// One whose answers hold for `age`.
    pub fn new(age: Duration) -> Self {
        Self { age, last: Mutex::default() }
    }

    /// The last answer, or that of `question` where there is none that holds; `None` where it panicked.
    pub async fn get(&self, question: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let mut answer = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            match last.as_ref().filter(|answer| self.holds(answer)) {
                Some(answer) => answer.clone(),
                None => last.insert(ask(question)).clone(),
            }
        };
        let answered = answer.wait_for(Option::is_some).await.ok()?;
        answered.as_ref().map(|(_, answer)| answer.clone())
    }

    /// Whether it is young enough, or still to come.
    fn holds(&self, answer: &Answer<T>) -> bool {
        match &*answer.borrow() {
            Some((at, _)) => at.elapsed() < self.age,
            None => answer.has_changed().is_ok(),
        }
    }
}

fn ask<T: Send + Sync + 'static>(question: impl Future<Output = T> + Send + 'static) -> Answer<T> {
    let (sender, receiver) = watch::channel(None);
    tokio::spawn(async move {
        let answer = question.await;
        sender.send_replace(Some((Instant::now(), answer)));
    });
    receiver
}
