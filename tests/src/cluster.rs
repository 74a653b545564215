//! A stand-in for a Kubernetes API server that reviews tokens, as strict as the API's
//! reference (TokenReview v1): a request that is not as it says is refused, and noted.

use std::collections::HashMap;
use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Value, json};

/// The token of the endpoint itself, which the API server wants to see.
const OWN_TOKEN: &str = "the-endpoints-own-token";

/// A token in the form of a service account's, told from others by its `name`, that says of itself that it is for
/// `audiences` and good until `expires`, in seconds since 1970.
pub fn token(name: &str, audiences: &[&str], expires: u64) -> String {
    let part = |value: Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({"aud": audiences, "exp": expires, "iss": "https://kubernetes.default.svc"});
    format!("{}.{}.{}", part(json!({"alg": "RS256"})), part(claims), BASE64_URL_SAFE_NO_PAD.encode(name))
}

/// The server; it runs until the test's process ends.
#[derive(Clone)]
pub struct Cluster {
    state: Arc<Mutex<State>>,
    address: String,
}

#[derive(Default)]
struct State {
    /// By token: the user, and the audiences that it was made for.
    users: HashMap<String, (String, Vec<String>)>,
    /// Whether the server knows what an audience is.
    audiences: bool,
    down: bool,
    reviews: usize,
    wrong: Vec<String>,
}

impl Cluster {
    /// Starts one on a free port.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let state = Arc::new(Mutex::new(State { audiences: true, ..State::default() }));
        let server = Self { state: Arc::clone(&state), address };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&state);
                // A client that goes away is part of the tests.
                thread::spawn(move || serve(stream, &state).ok());
            }
        });
        server
    }

    /// Writes a kubeconfig that leads here.
    pub fn write_kubeconfig(&self, path: &Path) {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "endpoint", "user": {"token": OWN_TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "endpoint"}}],
        });
        std::fs::write(path, config.to_string()).expect("a kubeconfig can be written");
    }

    /// Lets `token` be `user`'s, made for `audiences`.
    pub fn know(&self, token: &str, user: &str, audiences: &[&str]) {
        let audiences = audiences.iter().map(ToString::to_string).collect();
        self.state.lock().unwrap().users.insert(token.to_owned(), (user.to_owned(), audiences));
    }

    /// An old API server that says nothing of audiences.
    pub fn forget_audiences(&self) {
        self.state.lock().unwrap().audiences = false;
    }

    /// Whether it answers with 500.
    pub fn set_down(&self, down: bool) {
        self.state.lock().unwrap().down = down;
    }

    /// How many reviews there were.
    pub fn reviews(&self) -> usize {
        self.state.lock().unwrap().reviews
    }

    /// What was wrong with the requests that came.
    pub fn wrong(&self) -> Vec<String> {
        self.state.lock().unwrap().wrong.clone()
    }
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let Some((request, headers)) = crate::http::request_head(&mut reader)? else { return Ok(()) };
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let mut state = state.lock().unwrap();
        let (status, answer) = match checked(&request, &headers, &body) {
            Err(why) => {
                state.wrong.push(why.clone());
                (400, json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": why, "code": 400}))
            }
            Ok(_) if state.down => (
                500,
                json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "down", "code": 500}),
            ),
            Ok(review) => {
                state.reviews += 1;
                (201, answer(&state, review))
            }
        };
        drop(state);
        let answer = answer.to_string();
        let head = "Content-Type: application/json\r\nContent-Length";
        write!(stream, "HTTP/1.1 {status} x\r\n{head}: {}\r\n\r\n{answer}", answer.len())?;
    }
}

/// The review in a request, if it is as the API's reference says.
fn checked(request: &str, headers: &HashMap<String, String>, body: &[u8]) -> Result<Value, String> {
    let mut words = request.split_whitespace();
    let target = words.nth(1).unwrap_or_default();
    let path = target.trim_end_matches(['?', '&']);
    if !request.starts_with("POST ") || path != "/apis/authentication.k8s.io/v1/tokenreviews" {
        return Err(format!("unexpected request: {request:?}"));
    }
    let header = |name: &str| headers.get(name).map_or("", String::as_str);
    if header("authorization") != format!("Bearer {OWN_TOKEN}") {
        return Err("the endpoint does not say who it is".to_owned());
    }
    if header("content-type") != "application/json" {
        return Err(format!("content-type {:?}", header("content-type")));
    }
    let review: Value = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    if (&review["apiVersion"], &review["kind"]) != (&json!("authentication.k8s.io/v1"), &json!("TokenReview")) {
        return Err(format!("not a TokenReview: {review}"));
    }
    let audiences = review["spec"]["audiences"].as_array().map_or(0, Vec::len);
    if review["spec"]["token"].as_str().is_none_or(str::is_empty) || audiences == 0 {
        return Err(format!("a TokenReview without token or audiences: {review}"));
    }
    Ok(review)
}

/// The review with its status, as an API server fills it in.
fn answer(state: &State, mut review: Value) -> Value {
    let wanted: Vec<_> = review["spec"]["audiences"].as_array().into_iter().flatten().cloned().collect();
    let user = review["spec"]["token"].as_str().and_then(|token| state.users.get(token));
    review["status"] = match user {
        None => json!({"authenticated": false, "user": {}, "error": "invalid bearer token"}),
        Some((name, audiences)) => {
            let both: Vec<_> = wanted
                .into_iter()
                .filter(|audience| {
                    audience.as_str().is_some_and(|audience| audiences.iter().any(|known| known == audience))
                })
                .collect();
            if !state.audiences {
                json!({"authenticated": true, "user": {"username": name, "uid": "1"}})
            } else if both.is_empty() {
                json!({"authenticated": false, "user": {}, "error": "token audiences do not match"})
            } else {
                json!({"authenticated": true, "user": {"username": name, "uid": "1"}, "audiences": both})
            }
        }
    };
    review
}
