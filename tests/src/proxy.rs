//! A TCP proxy in between that cuts each connection after a number of bytes, or lets them
//! through slowly; and an HTTP proxy that is asked for tunnels.

use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// The proxy; it runs until the test's process ends.
#[derive(Clone)]
pub struct Proxy {
    address: String,
    target: Arc<Mutex<String>>,
    passed: Arc<AtomicU64>,
}

impl Proxy {
    /// Starts one to `target` (`HOST:PORT`); `limit` says for each connection how many
    /// bytes it may carry, in both directions together.
    pub fn start(target: &str, limit: impl FnMut() -> u64 + Send + 'static) -> Self {
        Self::with(target, limit, None)
    }

    /// Starts one to `target` (`HOST:PORT`) whose connections carry so many bytes a second each
    /// way, however many there are.
    pub fn slow(target: &str, rate: u32) -> Self {
        Self::with(target, || u64::MAX, Some(rate))
    }

    fn with(target: &str, mut limit: impl FnMut() -> u64 + Send + 'static, rate: Option<u32>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let proxy = Self { address, target: Arc::new(Mutex::new(target.to_owned())), passed: Arc::default() };
        let (target, passed) = (Arc::clone(&proxy.target), Arc::clone(&proxy.passed));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let target = target.lock().unwrap().clone();
                // A server that is down now is part of the tests.
                let Ok(server) = TcpStream::connect(target) else { continue };
                let left = Arc::new(Mutex::new(limit()));
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let (left, passed) = (Arc::clone(&left), Arc::clone(&passed));
                    thread::spawn(move || pass((from, to), &left, &passed, rate));
                }
            }
        });
        proxy
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Leads new connections elsewhere.
    pub fn lead_to(&self, target: &str) {
        target.clone_into(&mut self.target.lock().unwrap());
    }

    /// How many bytes it carried.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

/// An HTTP proxy all of whose tunnels lead to one server, whatever name is asked for; it runs until
/// the test's process ends.
#[derive(Clone)]
pub struct Tunnels {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Tunnels {
    /// Starts one that leads to `target` (`HOST:PORT`).
    pub fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let tunnels = Self { address, asked: Arc::default() };
        let (target, asked) = (target.to_owned(), Arc::clone(&tunnels.asked));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (target, asked) = (target.clone(), Arc::clone(&asked));
                // A client that goes away is part of the tests.
                thread::spawn(move || tunnel(client, &target, &asked));
            }
        });
        tunnels
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What was asked for: `HOST:PORT`, and the credentials after a space, where there were any.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn tunnel(mut client: TcpStream, target: &str, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
    // Nobody sends more before the answer.
    let head = crate::http::request_head(&mut BufReader::new(client.try_clone()?))?;
    let Some((line, headers)) = head else { return Ok(()) };
    let name = line.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next());
    let Some(name) = name else { return client.write_all(b"HTTP/1.1 405 x\r\n\r\n") };
    let credentials = headers.get("proxy-authorization").map_or("", String::as_str);
    asked.lock().unwrap().push(format!("{name} {credentials}").trim_end().to_owned());
    let server = TcpStream::connect(target)?;
    client.write_all(b"HTTP/1.1 200 x\r\n\r\n")?;
    for (from, to) in [(&client, &server), (&server, &client)] {
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        thread::spawn(move || pass((from, to), &Mutex::new(u64::MAX), &AtomicU64::new(0), None));
    }
    Ok(())
}

fn pass((mut from, mut to): (TcpStream, TcpStream), left: &Mutex<u64>, passed: &AtomicU64, rate: Option<u32>) {
    let mut buffer = vec![0; 16 << 10];
    let (start, mut carried) = (Instant::now(), 0);
    while let Ok(count) = from.read(&mut buffer) {
        let allowed = {
            let mut left = left.lock().unwrap();
            let allowed = (*left).min(count as u64);
            *left -= allowed;
            allowed as usize
        };
        let written = to.write_all(&buffer[..allowed]).is_ok();
        passed.fetch_add(allowed as u64, Ordering::Relaxed);
        if count == 0 || allowed < count || !written {
            break;
        }
        carried += allowed;
        if let Some(rate) = rate {
            let due = Duration::from_secs_f64(carried as f64 / f64::from(rate));
            thread::sleep(due.saturating_sub(start.elapsed()));
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
