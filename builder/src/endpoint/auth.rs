//! Who may: bearer tokens, either from a file or of Kubernetes service accounts that
//! the cluster reviews. Writers may read; who else may read is open unless somebody
//! is named. Tokens are compared by their digests and never logged.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use clap::Args;
use oscontainer_artifact::digest::Digest;
use oscontainer_program::reject;
use subtle::ConstantTimeEq;

use super::metrics::Writer;
use super::reply::Refusal;
use super::review::{Account, Reviewer};

/// Options that say who may.
#[derive(Debug, Clone, Args)]
pub struct AccessOptions {
    /// File with the bearer tokens that may write, one a line, read anew when it changes
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_TOKEN_FILE", conflicts_with = "token_review_audience")]
    token_file: Option<PathBuf>,
    /// File with tokens that may read and not write; without it and --allow-read, everybody may read
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_READ_TOKEN_FILE")]
    read_token_file: Option<PathBuf>,
    /// Let the Kubernetes cluster review tokens: those of service accounts, made for this audience
    #[arg(long, value_name = "AUD", env = "OSCONTAINER_TOKEN_REVIEW_AUDIENCE", requires = "allow")]
    token_review_audience: Option<String>,
    /// Service accounts that may write
    #[arg(
        long,
        value_name = "NAMESPACE/NAME",
        env = "OSCONTAINER_ALLOW",
        value_delimiter = ',',
        requires = "token_review_audience"
    )]
    allow: Vec<Account>,
    /// Service accounts that may read and not write
    #[arg(
        long,
        value_name = "NAMESPACE/NAME",
        env = "OSCONTAINER_ALLOW_READ",
        value_delimiter = ',',
        requires = "token_review_audience"
    )]
    allow_read: Vec<Account>,
}

/// Those who may do one thing.
struct Group {
    /// The file with their tokens. It is read for every request, so that a rotated
    /// secret counts at once.
    file: Option<PathBuf>,
    accounts: Vec<Account>,
}

impl Group {
    fn is_empty(&self) -> bool {
        self.file.is_none() && self.accounts.is_empty()
    }

    /// Whether they hold the token with this digest.
    async fn has_token(&self, given: &Digest) -> Result<bool> {
        let Some(path) = &self.file else { return Ok(false) };
        // Digests have one length, so that the time tells nothing about the token's.
        let same = |token: &Digest| bool::from(token.bytes().ct_eq(given.bytes()));
        Ok(tokens(path).await?.iter().fold(false, |found, token| found | same(token)))
    }
}

/// Who may write and who may read.
pub struct Access {
    writers: Group,
    readers: Group,
    reviewer: Option<Reviewer>,
}

impl Access {
    /// Those whom the options name.
    ///
    /// # Errors
    /// When a token file cannot be read or holds no token, or there is no cluster to ask.
    pub async fn new(options: &AccessOptions) -> Result<Self> {
        for (option, path) in [("--token-file", &options.token_file), ("--read-token-file", &options.read_token_file)] {
            if let Some(path) = path
                && tokens(path).await?.is_empty()
            {
                reject!("{option} {} is empty: write a long random token into it", path.display());
            }
        }
        let reviewer = match &options.token_review_audience {
            Some(audience) => Some(Reviewer::new(audience.clone()).await?),
            None => None,
        };
        let writers = Group { file: options.token_file.clone(), accounts: options.allow.clone() };
        let readers = Group { file: options.read_token_file.clone(), accounts: options.allow_read.clone() };
        if writers.is_empty() {
            tracing::warn!("neither --token-file nor --token-review-audience is given: every write will be refused");
        }
        Ok(Self { writers, readers, reviewer })
    }

    /// Lets a writer pass, and notes who it is.
    ///
    /// # Errors
    /// 401 without a token, 403 with a wrong one or where nobody may write, 503 when the
    /// cluster does not answer.
    pub async fn write(&self, request: &Parts) -> Result<(), Refusal> {
        if self.writers.is_empty() {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "this endpoint takes no writes: it was started without --token-file or --token-review-audience",
            ));
        }
        let account = self.pass(&request.headers, &[&self.writers], "write").await?;
        if let Some(writer) = request.extensions.get::<Writer>() {
            writer.is(account.map_or_else(|| "--token-file".to_owned(), |account| account.to_string()));
        }
        Ok(())
    }

    /// Lets a reader pass.
    ///
    /// # Errors
    /// As [`Access::write`]; none where reading is open.
    pub async fn read(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        if self.readers.is_empty() {
            return Ok(());
        }
        self.pass(headers, &[&self.readers, &self.writers], "read").await.map(drop)
    }

    /// The service account that passes, or nothing for who has a token of a file.
    async fn pass(&self, headers: &HeaderMap, groups: &[&Group], what: &str) -> Result<Option<Account>, Refusal> {
        let Some(given) = bearer(headers) else {
            let reason = format!("to {what} here needs the header Authorization: Bearer TOKEN");
            return Err(Refusal::new(StatusCode::UNAUTHORIZED, reason)
                .header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"oscontainer\"")));
        };
        let digest = Digest::of(given.as_bytes());
        for group in groups {
            if group.has_token(&digest).await? {
                return Ok(None);
            }
        }
        let mut reason = format!("this token may not {what} here");
        if let Some(reviewer) = &self.reviewer {
            match reviewer.review(given, digest).await? {
                Some(account) if groups.iter().any(|group| group.accounts.contains(&account)) => {
                    return Ok(Some(account));
                }
                Some(account) => reason = format!("the service account {account} may not {what} here"),
                None => reason += ": the cluster does not know it as a service account's, made for this audience",
            }
        }
        Err(Refusal::new(StatusCode::FORBIDDEN, reason))
    }
}

/// The digests of the tokens in the file, one a line; two, while one replaces the
/// other.
async fn tokens(path: &Path) -> Result<Vec<Digest>> {
    let text =
        tokio::fs::read_to_string(path).await.with_context(|| format!("reading the tokens in {}", path.display()))?;
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| Digest::of(line.as_bytes())).collect())
}

/// The token of `Authorization: Bearer TOKEN`; the scheme in any case (RFC 9110, 11.1).
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim_ascii();
    (scheme.eq_ignore_ascii_case("Bearer") && !token.is_empty()).then_some(token)
}
