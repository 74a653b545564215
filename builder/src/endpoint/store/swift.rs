//! What OpenDAL's Swift service lacks: it takes a token and keeps it. So its requests pass
//! through here, where they get the account's current token, and a new one if that has
//! expired. Tokens come from Keystone (version 3, a password or an application credential) or
//! from TempAuth (version 1), by the variables that Swift's own clients read.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use axum::http::{self, Request};
use opendal::services::Swift;
use opendal::{Buffer, ErrorKind, HttpBody, HttpTransport, OperationContext, Operator};
use oscontainer_artifact::Rejected;
use oscontainer_program::client::success;
use oscontainer_program::exit::{self, Usage};
use reqwest::header::{HeaderName, HeaderValue};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::{Mutex, MutexGuard};

use super::location::{Place, first_of};

const AUTH_TOKEN: HeaderName = HeaderName::from_static("x-auth-token");

/// How long a login may take.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(15);
/// How long is waited before the first login is tried again, each time.
const LOGIN_PAUSES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(9)];

/// An account, and how to get in.
#[derive(Clone)]
pub struct Account(Arc<Inner>);

struct Inner {
    client: Client,
    login: Login,
    storage_url: String,
    token: Mutex<HeaderValue>,
}

/// How tokens are got.
enum Login {
    /// TempAuth: one GET with user and key.
    V1 { url: String, user: String, key: String },
    /// Keystone: the body of a POST to this URL; then the catalog is searched.
    V3 { url: String, body: Value, region: Option<String>, interface: String },
    /// A token that cannot be renewed.
    Fixed { token: String },
}

/// What a login gives.
struct Session {
    token: HeaderValue,
    storage_url: String,
}

impl Account {
    /// The account that the environment names; it is logged in to.
    ///
    /// # Errors
    /// [`Usage`] where a variable is missing; when the login fails.
    pub fn from_environment(client: Client) -> Result<Self> {
        let login = Login::from_environment()?;
        let session = tokio::runtime::Handle::current().block_on(login.first_session(&client))?;
        let storage_url = first_of(&["OS_STORAGE_URL"]).unwrap_or(session.storage_url);
        Ok(Self(Arc::new(Inner { client, login, storage_url, token: Mutex::new(session.token) })))
    }

    /// An operator on a container of the account.
    ///
    /// # Errors
    /// When the container's name or the storage URL is none.
    pub fn operator(&self, place: &Place, inner: impl HttpTransport) -> Result<Operator> {
        let transport = Transport { account: self.clone(), inner };
        let builder = Swift::default().endpoint(&self.0.storage_url).container(&place.bucket).root(&place.prefix);
        let context = OperationContext::new().with_http_transport(opendal::HttpTransporter::new(transport));
        Ok(Operator::new(builder).context("using Swift")?.with_context(context))
    }

    /// A token in place of the one that was refused. Of many requests that were refused at the
    /// same time one logs in.
    async fn renew(&self, refused: &HeaderValue) -> Result<HeaderValue> {
        let mut token: MutexGuard<'_, HeaderValue> = self.0.token.lock().await;
        if *token == *refused {
            tracing::debug!("Swift's token has expired: getting another");
            *token = self.0.login.session(&self.0.client).await?.token;
        }
        Ok(token.clone())
    }
}

/// Requests to the account's storage.
struct Transport<T> {
    account: Account,
    inner: T,
}

impl<T: HttpTransport> HttpTransport for Transport<T> {
    async fn fetch(&self, mut request: Request<Buffer>) -> opendal::Result<http::Response<HttpBody>> {
        let token = self.account.0.token.lock().await.clone();
        request.headers_mut().insert(AUTH_TOKEN, token.clone());
        let response = self.inner.fetch(request.clone()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let failed =
            |error| opendal::Error::new(ErrorKind::Unexpected, "logging in to Swift").set_source(error).set_temporary();
        request.headers_mut().insert(AUTH_TOKEN, self.account.renew(&token).await.map_err(failed)?);
        self.inner.fetch(request).await
    }
}

impl Login {
    /// What the variables of Swift's and OpenStack's clients say.
    fn from_environment() -> Result<Self> {
        if let (Some(token), Some(_)) = (first_of(&["OS_AUTH_TOKEN"]), first_of(&["OS_STORAGE_URL"])) {
            return Ok(Self::Fixed { token });
        }
        let url = required(&["OS_AUTH_URL", "ST_AUTH"])?;
        let version = first_of(&["ST_AUTH_VERSION", "OS_AUTH_VERSION", "OS_IDENTITY_API_VERSION"]);
        let v1 = match version.as_deref() {
            Some(version) => version.starts_with('1'),
            None => first_of(&["ST_AUTH"]).is_some(),
        };
        if v1 {
            let user = required(&["ST_USER", "OS_USERNAME"])?;
            return Ok(Self::V1 { url, user, key: required(&["ST_KEY", "OS_PASSWORD"])? });
        }
        if version.as_deref().is_some_and(|version| !version.starts_with('3')) {
            return Err(Usage("OS_IDENTITY_API_VERSION: only 1 (TempAuth) and 3 are known".to_owned()).into());
        }
        let base = url.trim_end_matches('/');
        let base = if base.ends_with("/v3") { base.to_owned() } else { format!("{base}/v3") };
        Ok(Self::V3 {
            url: format!("{base}/auth/tokens"),
            body: json!({ "auth": authentication()? }),
            region: first_of(&["OS_REGION_NAME"]),
            interface: first_of(&["OS_INTERFACE", "OS_ENDPOINT_TYPE"])
                .map_or_else(|| "public".to_owned(), |interface| interface.trim_end_matches("URL").to_owned()),
        })
    }

    /// A session, also where what is to be logged in to comes up only now.
    async fn first_session(&self, client: &Client) -> Result<Session> {
        for pause in LOGIN_PAUSES {
            match self.session(client).await {
                Err(error) if exit::code(&error) == exit::RETRY => {
                    tracing::warn!("next try in {} s: {}", pause.as_secs(), exit::chain(&error));
                    tokio::time::sleep(pause).await;
                }
                done => return done,
            }
        }
        self.session(client).await
    }

    async fn session(&self, client: &Client) -> Result<Session> {
        let session = tokio::time::timeout(LOGIN_TIMEOUT, self.ask(client)).await;
        session.context("no answer in time").flatten().context("logging in to Swift")
    }

    async fn ask(&self, client: &Client) -> Result<Session> {
        match self {
            Self::Fixed { token } => Ok(Session { token: secret(token)?, storage_url: String::new() }),
            Self::V1 { url, user, key } => {
                let request = client.get(url).header("X-Auth-User", user).header("X-Auth-Key", secret(key)?);
                let response = answered(request).await?;
                let storage_url = header(&response, "x-storage-url")?.to_str().context("reading X-Storage-Url")?;
                let (storage_url, mut token) = (storage_url.to_owned(), header(&response, "x-auth-token")?.clone());
                token.set_sensitive(true);
                Ok(Session { token, storage_url })
            }
            Self::V3 { url, body, region, interface } => {
                let request = client.post(url).header("Content-Type", "application/json").body(body.to_string());
                let response = answered(request).await?;
                let mut token = header(&response, "x-subject-token")?.clone();
                token.set_sensitive(true);
                let bytes = response.bytes().await.with_context(|| format!("reading the answer of {url}"))?;
                let answer: Answer =
                    serde_json::from_slice(&bytes).with_context(|| format!("reading the answer of {url}"))?;
                let storage_url = answer.object_store(interface, region.as_deref());
                if storage_url.is_none() && first_of(&["OS_STORAGE_URL"]).is_none() {
                    bail!("{url} knows no {interface} object store: look at OS_REGION_NAME and OS_INTERFACE");
                }
                Ok(Session { token, storage_url: storage_url.unwrap_or_default() })
            }
        }
    }
}

/// Keystone's `auth` object: who, and for which project
/// (the Identity API, "Authentication and token management").
fn authentication() -> Result<Value> {
    let id = first_of(&["OS_APPLICATION_CREDENTIAL_ID"]);
    let name = first_of(&["OS_APPLICATION_CREDENTIAL_NAME"]);
    if id.is_some() || name.is_some() {
        let secret = required(&["OS_APPLICATION_CREDENTIAL_SECRET"])?;
        let credential = match (id, name) {
            (Some(id), _) => json!({ "id": id, "secret": secret }),
            (None, name) => json!({ "name": name, "secret": secret, "user": user()? }),
        };
        return Ok(
            json!({ "identity": { "methods": ["application_credential"], "application_credential": credential } }),
        );
    }
    let mut user = user()?;
    user.insert("password".to_owned(), required(&["OS_PASSWORD"])?.into());
    let identity = json!({ "methods": ["password"], "password": { "user": user } });
    let project = match first_of(&["OS_PROJECT_ID", "OS_TENANT_ID"]) {
        Some(id) => json!({ "id": id }),
        None => {
            let name = required(&["OS_PROJECT_NAME", "OS_TENANT_NAME"])?;
            json!({ "name": name, "domain": domain("OS_PROJECT_DOMAIN_ID", "OS_PROJECT_DOMAIN_NAME") })
        }
    };
    Ok(json!({ "identity": identity, "scope": { "project": project } }))
}

fn user() -> Result<Map<String, Value>> {
    let mut user = Map::new();
    if let Some(id) = first_of(&["OS_USER_ID"]) {
        user.insert("id".to_owned(), id.into());
    } else {
        user.insert("name".to_owned(), required(&["OS_USERNAME"])?.into());
        user.insert("domain".to_owned(), domain("OS_USER_DOMAIN_ID", "OS_USER_DOMAIN_NAME"));
    }
    Ok(user)
}

fn domain(id: &str, name: &str) -> Value {
    match (first_of(&[id, "OS_DEFAULT_DOMAIN_ID"]), first_of(&[name, "OS_DEFAULT_DOMAIN_NAME"])) {
        (None, Some(name)) => json!({ "name": name }),
        (id, _) => json!({ "id": id.unwrap_or_else(|| "default".to_owned()) }),
    }
}

/// The part of Keystone's answer that is needed here.
#[derive(Deserialize)]
struct Answer {
    token: Token,
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    catalog: Vec<Service>,
}

#[derive(Deserialize)]
struct Service {
    #[serde(rename = "type")]
    kind: String,
    endpoints: Vec<ServiceEndpoint>,
}

#[derive(Deserialize)]
struct ServiceEndpoint {
    interface: String,
    region: Option<String>,
    url: String,
}

impl Answer {
    fn object_store(self, interface: &str, region: Option<&str>) -> Option<String> {
        let stores = self.token.catalog.into_iter().filter(|service| service.kind == "object-store");
        let mut endpoints = stores.flat_map(|service| service.endpoints);
        let wanted = |endpoint: &ServiceEndpoint| {
            endpoint.interface == interface && region.is_none_or(|region| endpoint.region.as_deref() == Some(region))
        };
        endpoints.find(wanted).map(|endpoint| endpoint.url)
    }
}

async fn answered(request: reqwest::RequestBuilder) -> Result<Response> {
    let response = success(request.send().await.context("asking for a token")?).await?;
    ensure!(!response.status().is_redirection(), "{} leads elsewhere", response.url());
    Ok(response)
}

fn header<'a>(response: &'a Response, name: &str) -> Result<&'a HeaderValue> {
    response.headers().get(name).with_context(|| format!("{} gave no {name}", response.url()))
}

fn secret(text: &str) -> Result<HeaderValue> {
    let mut value =
        HeaderValue::try_from(text).map_err(|_| Rejected::new("a key or token for Swift is no header value"))?;
    value.set_sensitive(true);
    Ok(value)
}

fn required(names: &[&str]) -> Result<String> {
    let found = first_of(names);
    let text = || format!("a swift:// store needs {} in the environment", names.join(" or "));
    found.ok_or_else(|| Usage(text()).into())
}
