//! A static HTTP/1.1 server that can misbehave: cut connections, stall, send less
//! than there is, or know no ranges. It notes what it was asked.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// How a request for a path is answered.
#[derive(Clone)]
pub enum Answer {
    /// 200 with these bytes.
    Bytes(Arc<Vec<u8>>),
    /// 200 with these bytes and no length: the end of the connection is their end.
    Unsized(Arc<Vec<u8>>),
    /// The length of all bytes, but the connection ends after the given number.
    Cut(Arc<Vec<u8>>, usize),
    /// The length of all bytes, but after the given number nothing comes any more.
    Stall(Arc<Vec<u8>>, usize),
    /// These bytes under this ETag, with Range and If-Range; each response ends after
    /// the given number of bytes.
    Ranged(Arc<Vec<u8>>, &'static str, usize),
    /// The same, but after the given number of bytes nothing comes any more.
    Stalling(Arc<Vec<u8>>, &'static str, usize),
    /// 307 to another path or URL.
    Redirect(String),
    /// The given status.
    Status(u16),
    /// 503 with `Retry-After`.
    Busy(&'static str),
    /// The given status and these header lines, each with its end.
    Head(u16, &'static str),
    /// The given status and a body without end.
    Endless(u16),
}

/// What a client asked for.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The path, or with a proxy the URL.
    pub target: String,
    /// The headers by their lower-case names.
    pub headers: HashMap<String, String>,
}

/// The server; it runs until the test's process ends.
#[derive(Clone)]
pub struct Static {
    state: Arc<Mutex<State>>,
    address: String,
}

#[derive(Default)]
struct State {
    answers: HashMap<String, VecDeque<Answer>>,
    seen: Vec<Seen>,
}

impl Static {
    /// Starts one on a free port.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let server = Self { state: Arc::default(), address };
        let state = Arc::clone(&server.state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&state);
                // A client that goes away is part of the tests.
                thread::spawn(move || serve(stream, &state).ok());
            }
        });
        server
    }

    /// Sets the answer for `path`, which starts with a slash.
    pub fn set(&self, path: &str, answer: Answer) {
        self.set_all(path, [answer]);
    }

    /// Sets the answers for `path`: one for each request, the last one for all that follow.
    pub fn set_all(&self, path: &str, answers: impl Into<VecDeque<Answer>>) {
        self.state.lock().expect("no test panics with it").answers.insert(path.to_owned(), answers.into());
    }

    /// The requests for `target` so far.
    pub fn seen(&self, target: &str) -> Vec<Seen> {
        let state = self.state.lock().expect("no test panics with it");
        state.seen.iter().filter(|seen| seen.target == target).cloned().collect()
    }

    /// `http://127.0.0.1:PORT` and `path`.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

/// The first line and the headers of the next request, their names in lower case; `None`
/// at the connection's end.
///
/// # Errors
/// When the connection breaks.
pub fn request_head(reader: &mut impl BufRead) -> std::io::Result<Option<(String, HashMap<String, String>)>> {
    let mut request = String::new();
    if reader.read_line(&mut request)? == 0 {
        return Ok(None);
    }
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    Ok(Some((request, headers)))
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let Some((request, headers)) = request_head(&mut reader)? else { return Ok(()) };
        let target = request.split(' ').nth(1).unwrap_or("/").to_owned();
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink())?;
        let answer = {
            let mut state = state.lock().expect("no test panics with it");
            state.seen.push(Seen { target: target.clone(), headers: headers.clone() });
            let answers = state.answers.get_mut(&target);
            answers.and_then(|answers| if answers.len() > 1 { answers.pop_front() } else { answers.front().cloned() })
        };
        let head = |status, length: usize, more: &str| {
            format!("HTTP/1.1 {status} x\r\nContent-Length: {length}\r\n{more}\r\n")
        };
        let answer = answer.unwrap_or(Answer::Status(404));
        let stalls = matches!(answer, Answer::Stalling(..));
        match answer {
            Answer::Bytes(bytes) => {
                stream.write_all(head(200, bytes.len(), "").as_bytes())?;
                stream.write_all(&bytes)?;
            }
            Answer::Unsized(bytes) => {
                stream.write_all(b"HTTP/1.1 200 x\r\nConnection: close\r\n\r\n")?;
                stream.write_all(&bytes)?;
                return stream.shutdown(Shutdown::Both);
            }
            Answer::Cut(bytes, end) => {
                stream.write_all(head(200, bytes.len(), "").as_bytes())?;
                stream.write_all(&bytes[..end])?;
                return stream.shutdown(Shutdown::Both);
            }
            Answer::Stall(bytes, end) => {
                stream.write_all(head(200, bytes.len(), "").as_bytes())?;
                stream.write_all(&bytes[..end])?;
                thread::sleep(Duration::from_secs(60));
            }
            Answer::Ranged(bytes, etag, limit) | Answer::Stalling(bytes, etag, limit) => {
                let current = headers.get("if-range").is_none_or(|wanted| wanted == etag);
                let range = headers.get("range").filter(|_| current);
                let range = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
                let start = range.and_then(|(start, _)| start.parse().ok()).unwrap_or(0);
                let last = range.and_then(|(_, last)| last.parse().ok()).unwrap_or(bytes.len() - 1);
                let part = &bytes[start..=last];
                let more = match range {
                    Some(_) => format!("Content-Range: bytes {start}-{last}/{}\r\nETag: {etag}\r\n", bytes.len()),
                    None => format!("ETag: {etag}\r\n"),
                };
                stream.write_all(head(if range.is_some() { 206 } else { 200 }, part.len(), &more).as_bytes())?;
                stream.write_all(&part[..limit.min(part.len())])?;
                if limit < part.len() {
                    if stalls {
                        thread::sleep(Duration::from_secs(60));
                    }
                    return stream.shutdown(Shutdown::Both);
                }
            }
            Answer::Redirect(to) => {
                stream.write_all(head(307, 0, &format!("Location: {to}\r\n")).as_bytes())?;
            }
            Answer::Status(status) => stream.write_all(head(status, 0, "").as_bytes())?,
            Answer::Head(status, lines) => stream.write_all(head(status, 0, lines).as_bytes())?,
            Answer::Endless(status) => {
                stream.write_all(format!("HTTP/1.1 {status} x\r\nConnection: close\r\n\r\n").as_bytes())?;
                loop {
                    stream.write_all(&[b'x'; 64 << 10])?;
                }
            }
            Answer::Busy(after) => {
                stream.write_all(head(503, 0, &format!("Retry-After: {after}\r\n")).as_bytes())?;
            }
        }
    }
}
