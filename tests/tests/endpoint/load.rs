//! Many clients at once, and clients that do not do their part.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use e2e::endpoint::{Endpoint, Reply, bearer, curl, file, noise};
use e2e::store::Kind;
use e2e::{on_stores, peak_memory, raise_file_limit};

fn connections(endpoint: &mut Endpoint) -> usize {
    let files = fs::read_dir(format!("/proc/{}/fd", endpoint.pid())).unwrap();
    let link = |entry: std::io::Result<fs::DirEntry>| fs::read_link(entry.unwrap().path()).unwrap_or_default();
    files.map(link).filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

fn request(endpoint: &Endpoint, head: &str) -> TcpStream {
    let mut stream = TcpStream::connect(&endpoint.server().address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

on_stores!(a_thousand_readers_and_fifty_writers_take_little_memory: directory Directory, s3 S3);

fn a_thousand_readers_and_fifty_writers_take_little_memory(kind: Kind) {
    raise_file_limit();
    // Some wait longer for their turn to read than a client may stand still.
    let mut endpoint = Endpoint::on(kind, &["--client-timeout", "600"]);
    // More than the kernel keeps for a connection.
    let tarball = noise(if kind == Kind::Directory { 10_000_000 } else { 3_000_000 }, 60);
    endpoint.store("demo", "1", &tarball);
    let get = "GET /v1/artifacts/demo/1/repo.tar HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let mut readers: Vec<_> = (0..1000).map(|_| request(&endpoint, get)).collect();
    let uploads: Vec<_> = (0..50).map(|seed| noise(3_000_000, 100 + seed)).collect();
    let mut writers: Vec<_> = uploads
        .iter()
        .enumerate()
        .map(|(version, upload)| {
            let path = file("upload", &version.to_string(), "repo.tar");
            let head = format!(
                "PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{}\r\nContent-Length: {}\r\n\r\n",
                bearer(),
                upload.len()
            );
            request(&endpoint, &head)
        })
        .collect();
    for (writer, upload) in writers.iter_mut().zip(&uploads) {
        writer.write_all(&upload[..2_000_000]).unwrap();
    }
    // All of them are under way: each reader has its head and some bytes.
    for reader in &mut readers {
        let mut head = vec![0; 600];
        reader.read_exact(&mut head).unwrap();
        assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    }
    let at_once = connections(&mut endpoint);
    assert!(at_once >= 1000, "only {at_once} at a time");
    std::thread::scope(|scope| {
        for readers in readers.chunks_mut(125) {
            scope.spawn(|| {
                let mut rest = Vec::new();
                for reader in readers {
                    rest.clear();
                    reader.read_to_end(&mut rest).unwrap();
                    assert!(rest.ends_with(&tarball[1000..]), "a reader got something else");
                }
            });
        }
        for (writer, upload) in writers.iter_mut().zip(&uploads) {
            scope.spawn(|| {
                writer.write_all(&upload[2_000_000..]).unwrap();
                let mut reply = String::new();
                writer.read_to_string(&mut reply).unwrap();
                assert!(reply.starts_with("HTTP/1.1 201"), "{reply}");
            });
        }
    });
    let peak = peak_memory(endpoint.pid());
    println!("a peak of {peak} KiB");
    assert!(peak < 256 << 10, "a peak of {peak} KiB");
}

#[test]
fn clients_that_do_nothing_are_hung_up_on() {
    let mut endpoint = Endpoint::with(&["--client-timeout", "3", "--max-connections", "300"]);
    let tarball = noise(20_000_000, 61);
    endpoint.store("demo", "1", &tarball);
    let idle = connections(&mut endpoint);
    let path = file("demo", "1", "repo.tar");
    let mut crowd: Vec<_> = (0..200).map(|_| request(&endpoint, "GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")).collect();
    crowd.extend((0..50).map(|_| request(&endpoint, "")));
    // These ask for 20 MB and take nothing of it.
    crowd.extend((0..20).map(|_| request(&endpoint, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"))));
    let put = format!(
        "PUT {} HTTP/1.1\r\nHost: x\r\n{}\r\nContent-Length: 100000\r\n\r\nabc",
        file("demo", "2", "repo.tar"),
        bearer()
    );
    let mut writer = request(&endpoint, &put);
    let deadline = Instant::now() + Duration::from_secs(30);
    while connections(&mut endpoint) <= 250 {
        assert!(Instant::now() < deadline, "only {} at a time", connections(&mut endpoint));
        std::thread::sleep(Duration::from_millis(20));
    }
    // Whoever does their part is served meanwhile.
    assert_eq!(endpoint.curl(&path, &[]).body, tarball);
    let mut reply = [0; 12];
    writer.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"HTTP/1.1 408");
    drop(writer);
    while connections(&mut endpoint) > idle {
        assert!(Instant::now() < deadline, "{} are left", connections(&mut endpoint));
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(crowd);
    // Beyond the limit one waits until there is room.
    let crowd: Vec<_> = (0..300).map(|_| request(&endpoint, "GET")).collect();
    let start = Instant::now();
    let reply = Reply::of(curl().arg(endpoint.url("/healthz")));
    assert_eq!(reply.status, 200);
    assert!(start.elapsed() > Duration::from_millis(500), "{:?}", start.elapsed());
    drop(crowd);
    assert!(!endpoint.stored().iter().any(|path| path.contains(".tmp/") || path.contains("demo/2")));
}

on_stores!(readers_that_stop_do_not_keep_others_from_the_store: directory Directory, s3 S3);

fn readers_that_stop_do_not_keep_others_from_the_store(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let tarball = noise(40_000_000, 62);
    endpoint.store("demo", "1", &tarball);
    let path = file("demo", "1", "repo.tar");
    let get = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut crowd: Vec<_> = (0..60).map(|_| request(&endpoint, &get)).collect();
    for reader in &mut crowd {
        reader.read_exact(&mut [0; 600]).unwrap();
    }
    let reply = endpoint.curl(&path, &["--max-time", "30"]);
    assert!(reply.body == tarball, "{} of {} bytes", reply.body.len(), tarball.len());
}
