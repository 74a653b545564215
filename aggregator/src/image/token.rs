//! Tokens for a registry: who issues them gives some for a password or an identity token, which is what
//! `docker login` keeps for registries that know no passwords (distribution, "Token Authentication
//! Specification" and "OAuth2 Token Authentication").

use anyhow::{Context, Result};
use http_auth::parser::ChallengeParser;
use oscontainer_program::reject;
use reqwest::header::{CONTENT_TYPE, WWW_AUTHENTICATE};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;

use super::connection::{Connection, is_less_safe};
use super::credentials::Credentials;
use super::refusal::answered;

/// Who we are for those who issue tokens.
const CLIENT: &str = "oscontainer";
/// The largest answer with a token that is read, in bytes; real ones have a few thousand.
const MAX_ANSWER: u64 = 1 << 20;

/// Who issues tokens for a registry.
pub struct Issuer {
    realm: Url,
    service: String,
}

/// What the issuer gives; some give both, and they are the same.
#[derive(Deserialize)]
struct Issued {
    token: Option<String>,
    access_token: Option<String>,
}

/// Asks a registry who issues tokens for it; nothing where it wants none.
///
/// # Errors
/// When it does not answer as the specifications say.
pub async fn issuer(connection: &Connection) -> Result<Option<Issuer>> {
    let Connection { registry, base, credentials, stall, .. } = connection;
    let asked = connection.send(connection.request(Method::GET, base), *stall).await?;
    if asked.status() != StatusCode::UNAUTHORIZED {
        let fine = asked.status().is_success();
        return if fine { Ok(None) } else { Err(answered(asked, connection).await) };
    }
    let issuer = challenge(base, &asked)?;
    if issuer.is_none() && matches!(credentials, Credentials::Identity(_)) {
        let said = challenges(&asked).collect::<Vec<_>>().join(", ");
        reject!("{registry} does not say who issues tokens for it, so the identity token is of no use: {said:?}");
    }
    Ok(issuer)
}

/// Who issues the tokens that an `answer` of the registry at `base` wants, if it wants any; a password that it may want
/// instead is of no matter then.
///
/// # Errors
/// Rejected when it is somebody less safe.
pub fn challenge(base: &Url, answer: &Response) -> Result<Option<Issuer>> {
    let Some((realm, service)) = challenges(answer).find_map(bearer) else { return Ok(None) };
    let realm = base.join(&realm).with_context(|| format!("reading the realm {realm}"))?;
    if is_less_safe(base, &realm) {
        reject!("{} wants its tokens to be asked for at {realm}, which is less safe", base.authority());
    }
    Ok(Some(Issuer { realm, service }))
}

fn challenges(answer: &Response) -> impl Iterator<Item = &str> {
    answer.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok())
}

/// Gets a token for `scopes`, `repository:NAME:ACTIONS`; nothing where the registry wants none.
///
/// # Errors
/// When the issuer refuses the credentials, or does not answer as the specifications say.
pub async fn exchange(connection: &Connection, scopes: &[String]) -> Result<Option<String>> {
    let Some(Issuer { realm, service }) = connection.issuer().await? else { return Ok(None) };
    let request = match &connection.credentials {
        Credentials::Identity(identity) => {
            let mut form = Url::parse("form:")?;
            form.query_pairs_mut()
                .append_pair("grant_type", "refresh_token")
                .append_pair("service", service)
                .append_pair("client_id", CLIENT)
                .append_pair("scope", &scopes.join(" "))
                .append_pair("refresh_token", identity);
            let form = form.query().unwrap_or_default().to_owned();
            let request = connection.secret(Method::POST, realm)?;
            request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
        }
        Credentials::Password(..) | Credentials::None => {
            let mut realm = realm.clone();
            realm.query_pairs_mut().append_pair("service", service).extend_pairs(scopes.iter().map(|s| ("scope", s)));
            let request = connection.request(Method::GET, &realm);
            match &connection.credentials {
                Credentials::Password(user, password) => request.basic_auth(user, Some(password)),
                _ => request,
            }
        }
    };
    let answer = connection.send(request, connection.stall).await?;
    if answer.status() != StatusCode::OK {
        return Err(answered(answer, connection).await);
    }
    let bytes = connection.read(answer, MAX_ANSWER).await?;
    let issued = serde_json::from_slice::<Issued>(&bytes).ok().and_then(|issued| issued.token.or(issued.access_token));
    match issued.filter(|token| !token.is_empty()) {
        Some(token) => Ok(Some(token)),
        None => reject!("{} issued no token for {}", realm.origin().ascii_serialization(), connection.registry),
    }
}

/// Realm and service of a `Bearer` challenge.
fn bearer(header: &str) -> Option<(String, String)> {
    let challenge = ChallengeParser::new(header).flatten().find(|c| c.scheme.eq_ignore_ascii_case("Bearer"))?;
    let value = |name: &str| {
        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped())
    };
    Some((value("realm")?, value("service").unwrap_or_default()))
}
