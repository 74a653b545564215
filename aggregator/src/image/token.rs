//! Tokens for a registry: who issues them gives some for a password or an identity token, which is what
//! `docker login` keeps for registries that know no passwords (distribution, "Token Authentication
//! Specification" and "OAuth2 Token Authentication"). The OCI client knows passwords only, and one
//! repository at a time, so the two requests are made here.

use anyhow::{Context, Result};
use http_auth::parser::ChallengeParser;
use oscontainer_program::reject;
use reqwest::header::{CONTENT_TYPE, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use super::credentials::Credentials;
use super::refusal::{answered, told};
use super::registry::Connection;

/// Who we are for those who issue tokens.
const CLIENT: &str = "oscontainer";

/// What the issuer gives; some give both, and they are the same.
#[derive(Deserialize)]
struct Issued {
    token: Option<String>,
    access_token: Option<String>,
}

/// Gets a token for `scopes`, `repository:NAME:ACTIONS`; nothing where the registry wants none.
///
/// # Errors
/// When the issuer refuses the credentials, or does not answer as the specifications say.
pub async fn exchange(connection: &Connection, scopes: &[String]) -> Result<Option<String>> {
    let Connection { registry, credentials, http, .. } = connection;
    let failed = |error: reqwest::Error| told(error.into(), registry);
    let asked = http.get(connection.base.clone()).send().await.map_err(failed)?;
    if asked.status() != StatusCode::UNAUTHORIZED {
        let fine = asked.status().is_success();
        return if fine { Ok(None) } else { Err(answered(asked, registry).await) };
    }
    let challenge = asked.headers().get(WWW_AUTHENTICATE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let Some((realm, service)) = issuer(challenge) else {
        if matches!(credentials, Credentials::Identity(_)) {
            reject!(
                "{registry} does not say who issues tokens for it, so the identity token is of no use: {challenge:?}"
            );
        }
        return Ok(None);
    };
    let mut realm = connection.base.join(&realm).with_context(|| format!("reading the realm {realm}"))?;
    if connection.base.scheme() == "https" && realm.scheme() != "https" {
        reject!("{registry} wants its tokens to be asked for at {realm}, which is less safe");
    }
    let request = match credentials {
        Credentials::Identity(identity) => {
            let mut form = Url::parse("form:")?;
            form.query_pairs_mut()
                .append_pair("grant_type", "refresh_token")
                .append_pair("service", &service)
                .append_pair("client_id", CLIENT)
                .append_pair("scope", &scopes.join(" "))
                .append_pair("refresh_token", identity);
            let form = form.query().unwrap_or_default().to_owned();
            http.post(realm).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
        }
        Credentials::Password(..) | Credentials::None => {
            realm.query_pairs_mut().append_pair("service", &service).extend_pairs(scopes.iter().map(|s| ("scope", s)));
            let request = http.get(realm);
            match credentials {
                Credentials::Password(user, password) => request.basic_auth(user, Some(password)),
                _ => request,
            }
        }
    };
    let answer = request.send().await.map_err(failed)?;
    if answer.status() != StatusCode::OK {
        return Err(answered(answer, registry).await);
    }
    let (url, text) = (answer.url().clone(), answer.text().await.map_err(failed)?);
    let issued = serde_json::from_str::<Issued>(&text).ok().and_then(|issued| issued.token.or(issued.access_token));
    match issued.filter(|token| !token.is_empty()) {
        Some(token) => Ok(Some(token)),
        None => reject!("{} issued no token for {registry}", url.origin().ascii_serialization()),
    }
}

/// Realm and service of a `Bearer` challenge.
fn issuer(header: &str) -> Option<(String, String)> {
    let challenge = ChallengeParser::new(header).flatten().find(|c| c.scheme.eq_ignore_ascii_case("Bearer"))?;
    let value = |name: &str| {
        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped())
    };
    Some((value("realm")?, value("service").unwrap_or_default()))
}
