//! A static HTTP/1.1 server that can misbehave: cut connections, or send less
//! than there is.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// How a path is answered.
#[derive(Clone)]
pub enum Answer {
    /// 200 with these bytes.
    Bytes(Arc<Vec<u8>>),
    /// The length of all bytes, but the connection ends after the given number.
    Cut(Arc<Vec<u8>>, usize),
    /// 307 to another path.
    Redirect(String),
    /// The given status.
    Status(u16),
}

/// The server; it runs until the test's process ends.
#[derive(Clone)]
pub struct Static {
    answers: Arc<Mutex<HashMap<String, Answer>>>,
    address: String,
}

impl Static {
    /// Starts one on a free port.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let server = Self { answers: Arc::default(), address };
        let answers = Arc::clone(&server.answers);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answers = Arc::clone(&answers);
                // A client that goes away is part of the tests.
                thread::spawn(move || serve(stream, &answers).ok());
            }
        });
        server
    }

    /// Sets the answer for `path`, which starts with a slash.
    pub fn set(&self, path: &str, answer: Answer) {
        self.answers.lock().expect("no test panics with it").insert(path.to_owned(), answer);
    }

    /// `http://127.0.0.1:PORT` and `path`.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

fn serve(mut stream: TcpStream, answers: &Mutex<HashMap<String, Answer>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut header = String::new();
        while reader.read_line(&mut header)? > 2 {
            header.clear();
        }
        let path = request.split(' ').nth(1).unwrap_or("/");
        let answer = answers.lock().expect("no test panics with it").get(path).cloned();
        let head = |status, length: usize, more: &str| {
            format!("HTTP/1.1 {status} x\r\nContent-Length: {length}\r\n{more}\r\n")
        };
        match answer.unwrap_or(Answer::Status(404)) {
            Answer::Bytes(bytes) => {
                stream.write_all(head(200, bytes.len(), "").as_bytes())?;
                stream.write_all(&bytes)?;
            }
            Answer::Cut(bytes, end) => {
                stream.write_all(head(200, bytes.len(), "").as_bytes())?;
                stream.write_all(&bytes[..end])?;
                return stream.shutdown(std::net::Shutdown::Both);
            }
            Answer::Redirect(to) => {
                stream.write_all(head(307, 0, &format!("Location: {to}\r\n")).as_bytes())?;
            }
            Answer::Status(status) => stream.write_all(head(status, 0, "").as_bytes())?,
        }
    }
}
