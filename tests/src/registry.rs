//! Debian's docker-registry, and a door before it that misbehaves.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::issuer::Issuer;
use crate::{free_address, ok, run, tool, wait_for};

/// Who may use a registry with a password.
pub const USER: &str = "user";
/// With this password.
pub const PASSWORD: &str = "secret";
/// `htpasswd -B` of the two.
const HTPASSWD: &str = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

/// What a registry asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing, over plain HTTP.
    Plain,
    /// A password, over plain HTTP.
    Password,
    /// A password, over TLS.
    Tls,
}

/// A registry on loopback; dropped, it is killed.
pub struct Registry {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub address: String,
    /// The certificate authority to trust, a PEM file.
    pub ca: PathBuf,
    store: PathBuf,
}

impl Registry {
    /// Starts one that keeps all it has below `dir`.
    #[track_caller]
    pub fn start(dir: &Path, access: Access) -> Self {
        Self::with(dir, access, "")
    }

    /// Starts one over plain HTTP that wants tokens of `issuer`.
    #[track_caller]
    pub fn with_tokens(dir: &Path, issuer: &Issuer) -> Self {
        Self::with(dir, Access::Plain, &issuer.auth())
    }

    fn with(dir: &Path, access: Access, more: &str) -> Self {
        let dir = dir.join(format!("registry-{}", access as u8));
        let (store, config, passwords, ca) =
            (dir.join("store"), dir.join("config.yml"), dir.join("htpasswd"), dir.join("cert.pem"));
        fs::create_dir_all(&store).expect("the test's directory can be written");
        fs::write(&passwords, HTPASSWD).expect("the test's directory can be written");
        let address = free_address();
        let mut text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: \"{address}\"\n",
            store.display()
        );
        let scheme = if access == Access::Tls {
            let key = dir.join("key.pem");
            ok(tool("openssl")
                .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
                .args(["-subj", "/CN=registry", "-addext", "subjectAltName=IP:127.0.0.1"])
                .args(["-addext", "basicConstraints=critical,CA:FALSE"])
                .arg("-keyout")
                .arg(&key)
                .arg("-out")
                .arg(&ca));
            text += &format!("  tls: {{certificate: {}, key: {}}}\n", ca.display(), key.display());
            "https"
        } else {
            "http"
        };
        if access != Access::Plain {
            text += &format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", passwords.display());
        }
        fs::write(&config, text + more).expect("the test's directory can be written");
        let child = tool("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        let registry = Self { child, address, ca, store };
        let url = format!("{scheme}://{}/v2/", registry.address);
        wait_for(|| run(tool("curl").args(["-sk", "-o", "/dev/null", &url])).code == 0, "the registry to answer");
        registry
    }

    /// `docker://ADDRESS/NAME`.
    pub fn image(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.address)
    }

    /// The file of a blob, `sha256:…`.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("sha256 is used");
        self.store.join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended already; that is what the drop wants.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a [`Door`] does with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// Passes it on.
    None,
    /// Answers with this status itself.
    Status(u16),
    /// Answers 429 itself, and wants to be left alone for so many seconds.
    Busy(u32),
    /// Answers 200 with this image index itself.
    Answer(String),
    /// Answers with this, head and body, itself.
    Says(String),
    /// Takes the request and does not answer.
    Silence,
    /// Passes on so many bytes of the answer and closes.
    CutAnswer(usize),
    /// Takes so many bytes of the request's body and closes.
    CutRequest(usize),
    /// Passes it on, and puts this header before those of the answer.
    Adds(String),
    /// Passes this request, `METHOD PATH`, on instead.
    Instead(String),
}

/// An HTTP proxy before a registry, one request for each connection: it notes the requests
/// and does to them what a test says.
#[derive(Clone)]
pub struct Door {
    /// `127.0.0.1:PORT`.
    pub address: String,
    seen: Arc<Mutex<Vec<String>>>,
    rule: Arc<Mutex<Rule>>,
}

/// What happens to a request: its first line and how many like it came before decide.
type Rule = Box<dyn FnMut(&str) -> Trouble + Send>;

impl Door {
    /// Opens one before the registry at `backend`; it runs until the test's process ends.
    pub fn before(backend: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let door = Self { address, seen: Arc::default(), rule: Arc::new(Mutex::new(Box::new(|_| Trouble::None))) };
        let (through, backend) = (door.clone(), backend.to_owned());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (through, backend) = (through.clone(), backend.clone());
                // A client or a registry that goes away is part of the tests.
                thread::spawn(move || through.pass(stream, &backend).ok());
            }
        });
        door
    }

    /// From now on `rule` says what happens.
    pub fn set(&self, rule: impl FnMut(&str) -> Trouble + Send + 'static) {
        *self.rule.lock().expect("no test panics with it") = Box::new(rule);
    }

    /// The requests since the last call: `METHOD PATH`.
    pub fn seen(&self) -> Vec<String> {
        std::mem::take(&mut *self.seen.lock().expect("no test panics with it"))
    }

    fn pass(&self, mut client: TcpStream, backend: &str) -> std::io::Result<()> {
        let mut reader = BufReader::new(client.try_clone()?);
        let mut line = Vec::new();
        reader.read_until(b'\n', &mut line)?;
        // As servers without TLS answer who speaks it.
        let Ok(line) = String::from_utf8(line) else {
            return client.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        };
        let mut head = String::new();
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let lower = header.to_ascii_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().map_err(std::io::Error::other)?;
            }
            if header.trim().is_empty() {
                break;
            }
            if !lower.starts_with("connection:") {
                head += &header;
            }
        }
        head += "Connection: close\r\n\r\n";
        let request = line.rsplit_once(' ').map_or(line.as_str(), |(request, _)| request).to_owned();
        self.seen.lock().expect("no test panics with it").push(request.clone());
        let trouble = (self.rule.lock().expect("no test panics with it"))(&request);
        let mut body = reader.take(length);
        match trouble {
            Trouble::Status(status) => {
                std::io::copy(&mut body, &mut std::io::sink())?;
                let answer = format!("HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                return client.write_all(answer.as_bytes());
            }
            Trouble::Busy(seconds) => {
                std::io::copy(&mut body, &mut std::io::sink())?;
                let head = format!("Content-Length: 0\r\nRetry-After: {seconds}\r\nConnection: close");
                return client.write_all(format!("HTTP/1.1 429 x\r\n{head}\r\n\r\n").as_bytes());
            }
            Trouble::Answer(text) => {
                std::io::copy(&mut body, &mut std::io::sink())?;
                let (kind, length) = ("application/vnd.oci.image.index.v1+json", text.len());
                let head = format!("Content-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close");
                return client.write_all(format!("HTTP/1.1 200 x\r\n{head}\r\n\r\n{text}").as_bytes());
            }
            Trouble::Says(answer) => {
                std::io::copy(&mut body, &mut std::io::sink())?;
                return client.write_all(answer.as_bytes());
            }
            Trouble::Silence => {
                std::io::copy(&mut body, &mut std::io::sink())?;
                // To the end of the client's patience.
                return client.read(&mut [0]).map(|_| ());
            }
            Trouble::CutRequest(bytes) => {
                std::io::copy(&mut body.take(bytes as u64), &mut std::io::sink())?;
                return client.shutdown(std::net::Shutdown::Both);
            }
            Trouble::None | Trouble::CutAnswer(_) | Trouble::Adds(_) | Trouble::Instead(_) => {}
        }
        let mut registry = TcpStream::connect(backend)?;
        let line = if let Trouble::Instead(request) = &trouble { format!("{request} HTTP/1.1\r\n") } else { line };
        registry.write_all(format!("{line}{head}").as_bytes())?;
        std::io::copy(&mut body, &mut registry)?;
        let limit = if let Trouble::CutAnswer(bytes) = trouble { bytes as u64 } else { u64::MAX };
        let mut answer = BufReader::new(registry).take(limit);
        if let Trouble::Adds(header) = &trouble {
            let mut status = String::new();
            answer.read_line(&mut status)?;
            client.write_all(format!("{status}{header}\r\n").as_bytes())?;
        }
        std::io::copy(&mut answer, &mut client)?;
        client.shutdown(std::net::Shutdown::Both)
    }
}
