//! `serve` with many clients, with clients that do not do their part, and over TLS.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::authority::Authority;
use e2e::proxy::Proxy;
use e2e::repo::OstreeRepo;
use e2e::{Done, Server, aggregator, ok, peak_memory, raise_file_limit, run, tool, wait_for};
use tempfile::TempDir;

fn request(server: &Server, head: &str) -> TcpStream {
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

/// A repository with an object that is larger than what the kernel keeps for a connection.
fn large(dir: &Path) -> OstreeRepo {
    let repo = OstreeRepo::new(dir, "repo");
    repo.put_noise("blob", 20 << 20, 1);
    repo.commit("a/ref", "one");
    repo
}

/// The served path of the largest object, and its content.
fn largest(repo: &OstreeRepo) -> (String, Vec<u8>) {
    let found = ok(tool("find").arg(repo.path.join("objects")).args(["-name", "*.filez", "-printf", "%s %p\n"])).stdout;
    let sized = found.lines().filter_map(|line| line.split_once(' '));
    let (_, path) = sized.max_by_key(|(size, _)| size.parse::<u64>().unwrap()).expect("there are objects");
    (path.strip_prefix(repo.path.to_str().unwrap()).unwrap().to_owned(), fs::read(path).unwrap())
}

#[test]
fn two_thousand_clients_of_a_large_object_take_little_memory() {
    raise_file_limit();
    let dir = TempDir::new().unwrap();
    let repo = large(dir.path());
    let (path, content) = largest(&repo);
    let mut command = aggregator();
    command.args(["serve", "--client-timeout=600", "--repo"]).arg(&repo.path);
    let mut server = Server::start(&mut command);
    let get = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let mut clients: Vec<_> = (0..2000).map(|_| request(&server, &get)).collect();
    // All of them are under way.
    for client in &mut clients {
        let mut head = [0; 1000];
        client.read_exact(&mut head).unwrap();
        assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    }
    let peak = peak_memory(server.child().id());
    println!("a peak of {peak} KiB");
    assert!(peak < 40 << 10, "a peak of {peak} KiB");
    // They get what they asked for.
    for mut client in clients.into_iter().step_by(500) {
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).unwrap();
        assert!(rest == content[content.len() - rest.len()..] && rest.len() + 1000 > content.len());
    }
}

#[test]
fn two_thousand_clients_that_take_nothing_of_small_objects_take_little_memory() {
    raise_file_limit();
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.put_noise("blob", 60 << 10, 1);
    repo.commit("a/ref", "one");
    let (path, content) = largest(&repo);
    let mut command = aggregator();
    command.args(["serve", "--client-timeout=600", "--repo"]).arg(&repo.path);
    let mut server = Server::start(&mut command);
    // More than the kernel takes for each.
    let get = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").repeat(10);
    let mut clients: Vec<_> = (0..2000).map(|_| request(&server, &get)).collect();
    for client in &mut clients {
        let mut head = [0; 12];
        client.read_exact(&mut head).unwrap();
        assert!(&head == b"HTTP/1.1 200", "{}", String::from_utf8_lossy(&head));
    }
    let peak = peak_memory(server.child().id());
    println!("a peak of {peak} KiB");
    assert!(peak < 40 << 10, "a peak of {peak} KiB");
    for mut client in clients.into_iter().step_by(500) {
        let mut rest = vec![0; content.len() + 1000];
        client.read_exact(&mut rest).unwrap();
        assert!(rest.windows(1000).any(|part| part == &content[content.len() - 1000..]));
    }
}

#[test]
fn clients_that_do_nothing_are_hung_up_on() {
    let dir = TempDir::new().unwrap();
    let repo = large(dir.path());
    let (path, _) = largest(&repo);
    let mut command = aggregator();
    command.args(["serve", "--client-timeout=2", "--max-connections=20", "--repo"]).arg(&repo.path);
    let mut server = Server::start(&mut command);
    let id = server.child().id();
    let open = || fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
    let idle = open();
    let heads = [
        "GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ".to_owned(),
        String::new(),
        format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"),
    ];
    let crowd: Vec<_> = (0..20).map(|number| request(&server, &heads[number % 3])).collect();
    wait_for(|| open() >= idle + 20, "all to be connected");
    // One more waits until there is room, and there is, for the others do not do their part.
    let begun = Instant::now();
    assert_eq!(ok(tool("curl").args(["-sS", "--max-time", "30", &format!("{}/healthz", server.url())])).stdout, "ok\n");
    assert!(begun.elapsed() > Duration::from_millis(300), "{:?}", begun.elapsed());
    wait_for(|| open() <= idle + 1, "all to be hung up on");
    drop(crowd);
    // A head without end is refused.
    let mut greedy = request(&server, &format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(200_000)));
    let mut answer = Vec::new();
    // The server may have closed before all was sent, and what it said be lost.
    let _ = greedy.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
}

#[test]
fn tls_with_http_2_takes_new_certificates() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.put_noise("blob", 3 << 20, 1);
    let commit = repo.commit("a/ref", "one");
    let (first, second) = (Authority::new(), Authority::new());
    let (cert, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    first.issue("mirror", &cert, &key);
    let mut command = aggregator();
    command.arg("serve").arg("--tls-cert").arg(&cert).arg("--tls-key").arg(&key).arg("--repo").arg(&repo.path);
    let server = Server::start(&mut command);
    let url = format!("https://{}", server.address);
    let get = |authority: &Authority, path: &str, out: &Path| -> Done {
        let format = "%{http_version} %{http_code}";
        run(tool("curl")
            .args(["-sS", "-w", format, "--cacert"])
            .arg(authority.ca())
            .arg("-o")
            .arg(out)
            .arg(format!("{url}{path}")))
    };
    let out = dir.path().join("out");
    let (path, content) = largest(&repo);
    assert_eq!(get(&first, &path, &out).stdout, "2 200");
    assert!(fs::read(&out).unwrap() == content);
    assert_eq!(get(&second, "/healthz", &out).code, 60, "another authority's certificate");
    // The real client.
    let mirror = OstreeRepo::new(dir.path(), "mirror");
    let ca = format!("--set=tls-ca-path={}", first.ca().display());
    ok(mirror.ostree().args(["remote", "add", "--set=gpg-verify=false", &ca, "r", &url]));
    ok(mirror.ostree().args(["pull", "--mirror", "r", "a/ref"]));
    assert_eq!(ok(mirror.ostree().args(["rev-parse", "a/ref"])).stdout.trim(), commit);
    let (new_cert, new_key) = (dir.path().join("new.crt"), dir.path().join("new.key"));
    second.issue("mirror", &new_cert, &new_key);
    fs::rename(new_key, key).unwrap();
    fs::rename(new_cert, cert).unwrap();
    wait_for(|| get(&second, "/healthz", &out).code == 0, "the new certificate");
}

/// A server of `repo` with TLS; the certificate to trust.
fn secure(dir: &Path, repo: &OstreeRepo, options: &[&str]) -> (Server, PathBuf) {
    let authority = Authority::new();
    let (cert, key, ca) = (dir.join("tls.crt"), dir.join("tls.key"), dir.join("ca.crt"));
    authority.issue("mirror", &cert, &key);
    fs::copy(authority.ca(), &ca).unwrap();
    let mut command = aggregator();
    command.arg("serve").args(options).arg("--tls-cert").arg(&cert).arg("--tls-key").arg(&key);
    (Server::start(command.arg("--repo").arg(&repo.path)), ca)
}

/// An HTTP/2 client that sends these bytes, and then nothing; killed when dropped.
struct Raw(Child);

impl Raw {
    fn start(server: &Server, bytes: &[u8]) -> Self {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-quiet", "-alpn", "h2", "-connect", &server.address]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(bytes).unwrap();
        Self(child)
    }

    fn ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A frame (RFC 9113, 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The preface, settings with this window for each stream, and so many GETs of `path`.
fn gets(path: &str, window: u32, count: u32) -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[&[0, 4][..], &window.to_be_bytes()].concat()));
    // GET, https, then :path and :authority as they are (RFC 7541, 6.1, 6.2.2, appendix A).
    let head = [&[0x82, 0x87, 0x04, path.len() as u8], path.as_bytes(), &[0x01, 1, b'x']].concat();
    // END_STREAM and END_HEADERS.
    bytes.extend((0..count).flat_map(|number| frame(1, 5, 2 * number + 1, &head)));
    bytes
}

#[test]
fn http_2_clients_that_take_nothing_are_hung_up_on() {
    let dir = TempDir::new().unwrap();
    let repo = large(dir.path());
    let (path, content) = largest(&repo);
    let (server, ca) = secure(dir.path(), &repo, &["--client-timeout=3"]);
    let begun = Instant::now();
    let silent = [Vec::new(), gets(&path, 0, 1), gets(&path, 1000, 5), gets("/healthz", 65535, 1), gets("/", 0, 0)];
    let mut silent: Vec<_> = silent.iter().map(|bytes| Raw::start(&server, bytes)).collect();
    std::thread::sleep(Duration::from_secs(2).saturating_sub(begun.elapsed()));
    let early: Vec<_> = silent.iter_mut().map(Raw::ended).collect();
    assert_eq!(early, [false; 5]);
    // Whoever takes what comes has all the time that it needs.
    let slow = Proxy::slow(&server.address, 3 << 20);
    let out = dir.path().join("out");
    let mut command = tool("curl");
    command
        .args(["-sS", "--http2", "--cacert"])
        .arg(ca)
        .arg("-o")
        .arg(&out)
        .args(["-w", "%{http_version} %{time_total}"]);
    let done = ok(command.arg(format!("{}{path}", slow.url().replace("http://", "https://"))));
    let time = done.stdout.strip_prefix("2 ").and_then(|time| time.parse::<f64>().ok());
    assert!(time.is_some_and(|time| time > 4.0), "{done:?}");
    assert!(fs::read(&out).unwrap() == content);
    wait_for(|| silent.iter_mut().all(Raw::ended), "all to be hung up on");
}

#[test]
fn http_2_clients_that_ask_for_much_and_take_nothing_get_little_memory() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.put_noise("blob", 60_000, 1);
    repo.commit("a/ref", "one");
    let (path, _) = largest(&repo);
    let (mut server, ca) = secure(dir.path(), &repo, &[]);
    let _clients: Vec<_> = (0..10).map(|_| Raw::start(&server, &gets(&path, 0, 200))).collect();
    std::thread::sleep(Duration::from_secs(2));
    let url = format!("https://{}/healthz", server.address);
    assert_eq!(ok(tool("curl").args(["-sS", "--cacert"]).arg(ca).arg(url)).stdout, "ok\n");
    let peak = peak_memory(server.child().id());
    println!("a peak of {peak} KiB");
    assert!(peak < 48 << 10, "a peak of {peak} KiB");
}

#[test]
fn a_client_of_the_unix_socket_that_takes_nothing_is_hung_up_on() {
    let dir = TempDir::new().unwrap();
    let repo = large(dir.path());
    let (path, _) = largest(&repo);
    let socket = dir.path().join("socket");
    let mut command = aggregator();
    command.args(["serve", "--client-timeout=2", "--also-listen"]).arg(&socket).arg("--repo").arg(&repo.path);
    let mut server = Server::start(&mut command);
    let id = server.child().id();
    let open = || fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
    let idle = open();
    wait_for(|| socket.exists(), "the socket");
    let idle = idle.max(open());
    let mut client = UnixStream::connect(&socket).unwrap();
    client.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
    wait_for(|| open() > idle, "it to be connected");
    wait_for(|| open() <= idle + 1, "it to be hung up on");
    let url = "http://localhost/healthz";
    assert_eq!(ok(tool("curl").args(["-sS", "--unix-socket"]).arg(&socket).arg(url)).stdout, "ok\n");
}
