//! Who issues tokens for a registry, as docker's specifications have it (distribution, "Token
//! Authentication Specification" and "OAuth2 Token Authentication"): for a password by GET, for an
//! identity token by POST. What the specifications require of a request it requires; the tokens are
//! JSON Web Tokens that the real registry verifies.

use std::collections::HashMap;
use std::fs;
use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use percent_encoding::percent_decode_str;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

use crate::http::request_head;
use crate::registry::{PASSWORD, USER};
use crate::{ok, tool};

/// The identity token that is known.
pub const IDENTITY: &str = "an/identity+token=&";
/// The registry's name for the issuer, and the issuer's own.
const SERVICE: &str = "the test's registry";
const ISSUER: &str = "the test's issuer";

/// An issuer on loopback; it runs until the test's process ends.
#[derive(Clone)]
pub struct Issuer {
    address: String,
    certificate: PathBuf,
    state: Arc<State>,
}

struct State {
    key: EcdsaKeyPair,
    chain: String,
    issued: Mutex<Vec<String>>,
}

impl Issuer {
    /// Starts one with its key in `dir`.
    pub fn start(dir: &Path) -> Self {
        let (key, certificate) = (dir.join("issuer.key"), dir.join("issuer.crt"));
        ok(tool("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=issuer", "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&certificate));
        let der = dir.join("issuer.der");
        ok(tool("openssl")
            .args(["pkcs8", "-topk8", "-nocrypt", "-outform", "DER", "-in"])
            .arg(&key)
            .arg("-out")
            .arg(&der));
        let key = fs::read(&der).expect("openssl wrote it");
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key, &SystemRandom::new());
        ok(tool("openssl").args(["x509", "-outform", "DER", "-in"]).arg(&certificate).arg("-out").arg(&der));
        let chain = BASE64_STANDARD.encode(fs::read(&der).expect("openssl wrote it"));
        let state = State { key: key.expect("openssl makes such keys"), chain, issued: Mutex::default() };
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let issuer = Self { address, certificate, state: Arc::new(state) };
        let state = Arc::clone(&issuer.state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&state);
                thread::spawn(move || serve(stream, &state).ok());
            }
        });
        issuer
    }

    /// What the registry's configuration says of it.
    pub fn auth(&self) -> String {
        let (address, certificate) = (&self.address, self.certificate.display());
        format!(
            "auth: {{token: {{realm: \"http://{address}/token\", service: \"{SERVICE}\", issuer: \"{ISSUER}\", \
             rootcertbundle: {certificate}}}}}\n"
        )
    }

    /// The scopes for which tokens were issued since the last call, each with its grant.
    pub fn issued(&self) -> Vec<String> {
        std::mem::take(&mut *self.state.issued.lock().expect("no test panics with it"))
    }
}

fn serve(mut stream: TcpStream, state: &State) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let Some((request, headers)) = request_head(&mut reader)? else { return Ok(()) };
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap_or(0));
    let mut body = String::new();
    reader.take(length).read_to_string(&mut body)?;
    let (status, answer) = match answer(state, &request, &headers, &body) {
        Ok(answer) => (200, answer),
        Err((status, reason)) => (status, json!({"error": reason})),
    };
    let answer = answer.to_string();
    let head = format!("Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close", answer.len());
    stream.write_all(format!("HTTP/1.1 {status} x\r\n{head}\r\n\r\n{answer}").as_bytes())
}

fn answer(
    state: &State,
    request: &str,
    headers: &HashMap<String, String>,
    body: &str,
) -> Result<Value, (u16, &'static str)> {
    let target = request.split(' ').nth(1).unwrap_or_default();
    let header = |name: &str| headers.get(name).map_or("", String::as_str);
    if request.starts_with("POST /token ") {
        if header("content-type") != "application/x-www-form-urlencoded" {
            return Err((400, "invalid_request"));
        }
        let form = fields(body);
        let field = |name: &str| form.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str());
        if field("grant_type") != "refresh_token" || field("client_id").is_empty() || field("service") != SERVICE {
            return Err((400, "invalid_request"));
        }
        if field("refresh_token") != IDENTITY {
            return Err((401, "invalid_grant"));
        }
        let token = state.token("refresh_token", field("scope"))?;
        return Ok(
            json!({"access_token": token, "scope": field("scope"), "expires_in": 300, "refresh_token": IDENTITY}),
        );
    }
    let query = target.strip_prefix("/token?").filter(|_| request.starts_with("GET ")).ok_or((404, "not_found"))?;
    let expected = format!("Basic {}", BASE64_STANDARD.encode(format!("{USER}:{PASSWORD}")));
    if header("authorization") != expected {
        return Err((401, "unauthorized"));
    }
    let query = fields(query);
    let all = |name: &str| -> Vec<&str> {
        query.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str()).collect()
    };
    if all("service") != [SERVICE] {
        return Err((400, "invalid_request"));
    }
    let token = state.token("password", &all("scope").join(" "))?;
    Ok(json!({"token": token, "expires_in": 300}))
}

fn fields(form: &str) -> Vec<(String, String)> {
    let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    form.split('&').filter_map(|pair| pair.split_once('=')).map(|(key, value)| (decode(key), decode(value))).collect()
}

impl State {
    /// A token for scopes `repository:NAME:ACTIONS` with spaces between them.
    fn token(&self, grant: &str, scopes: &str) -> Result<String, (u16, &'static str)> {
        let mut access = Vec::new();
        for scope in scopes.split(' ') {
            let parts: Vec<&str> = scope.split(':').collect();
            let ["repository", name, actions] = parts[..] else { return Err((400, "invalid_scope")) };
            let actions: Vec<&str> = actions.split(',').collect();
            access.push(json!({"type": "repository", "name": name, "actions": actions}));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let part = |value: Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let header = part(json!({"typ": "JWT", "alg": "ES256", "x5c": [self.chain]}));
        let claims = part(json!({
            "iss": ISSUER, "sub": USER, "aud": SERVICE, "exp": now + 300, "nbf": now - 10, "iat": now, "jti": "1",
            "access": access,
        }));
        let signed = format!("{header}.{claims}");
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes()).map_err(|_| (500, "signing"))?;
        self.issued.lock().expect("no test panics with it").push(format!("{grant} {scopes}"));
        Ok(format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature)))
    }
}
