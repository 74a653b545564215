//! Who may write: the holder of the bearer token in a file. Reads are open.
//! Another kind of guard (Kubernetes' token review) is another variant here.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::reject;
use subtle::ConstantTimeEq;

use super::reply::Refusal;

/// Who may write.
pub enum Writers {
    /// Nobody: no token was configured.
    Nobody,
    /// Who has the token in this file. The file is read anew for every write, so
    /// that a rotated secret counts at once.
    TokenFile(PathBuf),
}

impl Writers {
    /// The writers that `--token-file` names.
    ///
    /// # Errors
    /// When the file cannot be read or holds no token.
    pub fn from_option(token_file: Option<&Path>) -> Result<Self> {
        let Some(path) = token_file else {
            tracing::warn!("no --token-file is given: every write will be refused");
            return Ok(Self::Nobody);
        };
        if tokens(path)?.is_empty() {
            reject!("--token-file {} is empty: write a long random token into it", path.display());
        }
        Ok(Self::TokenFile(path.to_owned()))
    }

    /// Lets a writer pass.
    ///
    /// # Errors
    /// 401 without a token, 403 with a wrong one or where nobody may write.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Self::TokenFile(path) = self else {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "this endpoint takes no writes: it was started without --token-file",
            ));
        };
        let Some(given) = bearer(headers) else {
            return Err(Refusal::new(StatusCode::UNAUTHORIZED, "writes need the header Authorization: Bearer TOKEN")
                .header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"oscontainer\"")));
        };
        // Digests have one length, so that the time tells nothing about the token's.
        let given = Digest::of(given);
        let right =
            tokens(path)?.iter().fold(false, |right, token| right | bool::from(token.bytes().ct_eq(given.bytes())));
        if right { Ok(()) } else { Err(Refusal::new(StatusCode::FORBIDDEN, "this token may not write here")) }
    }
}

/// The digests of the tokens in the file, one a line; two, while one replaces the
/// other.
fn tokens(path: &Path) -> Result<Vec<Digest>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading --token-file {}", path.display()))?;
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| Digest::of(line.as_bytes())).collect())
}

/// The token of `Authorization: Bearer TOKEN`; the scheme in any case (RFC 9110, 11.1).
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked("Bearer ".len())?;
    let token = token.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"Bearer ") && !token.is_empty()).then_some(token)
}
