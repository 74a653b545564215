//! Asks the Kubernetes API whose a token is (TokenReview, authentication.k8s.io/v1).
//! Answers are kept for a short while; what is kept is named by the token's digest. What the token says of
//! itself is enough to refuse it without a question, and never enough to take it.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client, Config};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::{exit, tls};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::reply::Refusal;

/// How long a service account's token is believed without asking again.
const KEEP: Duration = Duration::from_secs(60);
/// How long a refused token is refused without asking again: its account may just
/// have been made.
const KEEP_REFUSED: Duration = Duration::from_secs(10);
/// How many acceptances are kept, and how many refusals: these cannot displace those.
const KEPT: usize = 4096;
/// How far clocks may be apart.
const SKEW: Duration = Duration::from_secs(60);
/// How many questions are asked at a time: anybody can send a new token.
const ASKED: usize = 8;
/// And how many of tokens that say nothing of themselves, as garbage does: these must not keep service accounts out.
const ASKED_OPAQUE: usize = 2;
/// How long the cluster may take, with the wait for one's turn.
const TIMEOUT: Duration = Duration::from_secs(15);
/// What the name of a service account's user starts with (Kubernetes, "Authenticating").
const USER_PREFIX: &str = "system:serviceaccount:";

/// A Kubernetes service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    namespace: String,
    name: String,
}

impl FromStr for Account {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let valid = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
        };
        match text.split_once('/') {
            Some((namespace, name)) if valid(namespace) && valid(name) => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err("expected NAMESPACE/NAME of a service account".to_owned()),
        }
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Who asks the cluster.
pub struct Reviewer {
    api: Api<TokenReview>,
    audience: String,
    asking: Semaphore,
    asking_opaque: Semaphore,
    accepted: Kept<Account>,
    refused: Kept<()>,
}

/// Answers by the token's digest, each until some time.
struct Kept<T>(Mutex<HashMap<Digest, (T, Instant)>>);

impl<T: Clone> Kept<T> {
    fn new() -> Self {
        Self(Mutex::default())
    }

    fn get(&self, digest: &Digest) -> Option<T> {
        self.answers().get(digest).filter(|(_, until)| *until > Instant::now()).map(|(answer, _)| answer.clone())
    }

    fn keep(&self, digest: Digest, answer: T, lifetime: Duration) {
        let (mut answers, now) = (self.answers(), Instant::now());
        if answers.len() >= KEPT {
            answers.retain(|_, (_, until)| *until > now);
            if answers.len() >= KEPT {
                answers.clear();
            }
        }
        answers.insert(digest, (answer, now + lifetime));
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<Digest, (T, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a token says of itself (RFC 7519, 4.1), which anybody can write.
#[derive(Deserialize)]
struct Claims {
    aud: Option<Audiences>,
    /// Seconds since 1970, maybe with a fraction.
    exp: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Many(Vec<String>),
}

impl Claims {
    /// What a JSON Web Token in its compact form says (RFC 7515, 7.1).
    fn of(token: &str) -> Option<Self> {
        let mut parts = token.split('.');
        let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return None;
        };
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?).ok()
    }

    /// Whether the cluster may take it for this audience.
    fn may_pass(&self, audience: &str) -> bool {
        let ours = match &self.aud {
            Some(Audiences::One(one)) => one == audience,
            Some(Audiences::Many(many)) => many.iter().any(|one| one == audience),
            None => false,
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        ours && self.exp.is_none_or(|exp| exp + SKEW.as_secs_f64() > now.as_secs_f64())
    }
}

impl Reviewer {
    /// One that asks the cluster of the kubeconfig, or the one that this pod runs in.
    ///
    /// # Errors
    /// When there is neither, or their files cannot be used.
    pub async fn new(audience: String) -> Result<Self> {
        tls::install_provider();
        let config = Config::infer().await.context(
            "finding the cluster for --token-review-audience: neither a kubeconfig nor a pod's service account",
        )?;
        let client = Client::try_from(config).context("setting up the client of the Kubernetes API")?;
        let (asking, asking_opaque) = (Semaphore::new(ASKED), Semaphore::new(ASKED_OPAQUE));
        let (accepted, refused) = (Kept::new(), Kept::new());
        Ok(Self { api: Api::all(client), audience, asking, asking_opaque, accepted, refused })
    }

    /// The service account whose token this is; `None` where the cluster does not
    /// vouch for it and our audience.
    ///
    /// # Errors
    /// 503 when the cluster does not answer, or refuses to.
    pub async fn review(&self, token: &str, digest: Digest) -> Result<Option<Account>, Refusal> {
        if let Some(account) = self.lookup(&digest) {
            return Ok(account);
        }
        let asking = match Claims::of(token) {
            Some(claims) if !claims.may_pass(&self.audience) => return Ok(None),
            Some(_) => &self.asking,
            None => &self.asking_opaque,
        };
        let asked = tokio::time::timeout(TIMEOUT, async {
            let _turn = asking.acquire().await.context("waiting for a turn")?;
            // Somebody with the same token may have asked meanwhile.
            match self.lookup(&digest) {
                Some(account) => Ok(account),
                None => self.ask(token, digest).await,
            }
        });
        asked.await.context("no answer in time").flatten().map_err(|error| {
            tracing::error!("reviewing a token: {}", exit::chain(&error));
            Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the cluster does not review tokens now; try again later")
                .header(RETRY_AFTER, HeaderValue::from_static("5"))
        })
    }

    async fn ask(&self, token: &str, digest: Digest) -> Result<Option<Account>> {
        let review = TokenReview {
            spec: TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![self.audience.clone()]) },
            ..TokenReview::default()
        };
        let answer = self.api.create(&PostParams::default(), &review).await.context("asking for a TokenReview")?;
        let status = answer.status.context("the TokenReview came back without a status")?;
        // An API server without audiences would accept a token that was made for another:
        // then status.audiences does not name ours.
        let ours = status.audiences.is_some_and(|audiences| audiences.contains(&self.audience));
        let user = status.user.and_then(|user| user.username).unwrap_or_default();
        let account: Option<Account> =
            user.strip_prefix(USER_PREFIX).and_then(|rest| rest.replacen(':', "/", 1).parse().ok());
        let account = account.filter(|_| ours && status.authenticated == Some(true));
        match &account {
            Some(account) => self.accepted.keep(digest, account.clone(), KEEP),
            None => self.refused.keep(digest, (), KEEP_REFUSED),
        }
        Ok(account)
    }

    /// What the cluster said of this token lately.
    fn lookup(&self, digest: &Digest) -> Option<Option<Account>> {
        self.accepted.get(digest).map(Some).or_else(|| self.refused.get(digest).map(|()| None))
    }
}
