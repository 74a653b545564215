//! One connection, with TLS: requests in, responses out.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::authority::Authority;

/// A connection that is read in lines.
pub type Connection = BufReader<StreamOwned<ServerConnection, TcpStream>>;

/// A server's certificate of `authority`.
pub fn tls(authority: &Authority) -> Arc<ServerConfig> {
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    authority.issue("kubernetes.default.svc", &cert, &key);
    let chain = CertificateDer::pem_file_iter(&cert).unwrap().map(Result::unwrap).collect();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(config.with_no_client_auth().with_single_cert(chain, PrivateKeyDer::from_pem_file(&key).unwrap()).unwrap())
}

/// A connection that was accepted.
pub fn open(stream: TcpStream, tls: Arc<ServerConfig>) -> io::Result<Connection> {
    let server = ServerConnection::new(tls).map_err(io::Error::other)?;
    Ok(BufReader::new(StreamOwned::new(server, stream)))
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// `GET`.
    pub method: String,
    /// `/api/v1/…`, without what follows the question mark.
    pub path: String,
    /// What follows it, decoded.
    pub query: HashMap<String, String>,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    /// The whole body.
    pub body: Vec<u8>,
}

/// The next request; `None` at the connection's end.
pub fn request(connection: &mut Connection) -> io::Result<Option<Request>> {
    let Some((line, headers)) = crate::http::request_head(connection)? else { return Ok(None) };
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let query = pairs.map(|(key, value)| (decoded(key), decoded(value))).collect();
    let mut body = Vec::new();
    if headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked") {
        return Err(io::Error::other("requests in chunks are not understood"));
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    connection.take(length).read_to_end(&mut body)?;
    Ok(Some(Request { method, path: path.to_owned(), query, headers, body }))
}

/// `application/x-www-form-urlencoded`.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut place) = (Vec::new(), 0);
    while place < bytes.len() {
        match bytes[place] {
            b'%' => {
                out.push(u8::from_str_radix(&text[place + 1..place + 3], 16).unwrap());
                place += 2;
            }
            b'+' => out.push(b' '),
            other => out.push(other),
        }
        place += 1;
    }
    String::from_utf8(out).unwrap()
}

/// A whole response.
pub fn respond(connection: &mut Connection, status: u16, body: &[u8]) -> io::Result<()> {
    let out = connection.get_mut();
    let head =
        format!("HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    out.write_all(&[head.as_bytes(), body].concat())?;
    out.flush()
}

/// The head of a response in chunks.
pub fn begin(connection: &mut Connection) -> io::Result<()> {
    let out = connection.get_mut();
    out.write_all(b"HTTP/1.1 200 x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    out.flush()
}

/// A chunk; an empty one is the end.
pub fn chunk(connection: &mut Connection, bytes: &[u8]) -> io::Result<()> {
    let out = connection.get_mut();
    out.write_all(&[format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat())?;
    out.flush()
}
