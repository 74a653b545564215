//! What an operator sees: health, metrics, the page, and how it starts.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use e2e::endpoint::{Endpoint, bearer, file, noise};
use e2e::{Server, builder, fails, ok, tool, wait_for};
use oscontainer_artifact::digest::Digest;

#[test]
fn an_operator_sees_health_metrics_and_a_page() {
    let endpoint = Endpoint::start();
    assert_eq!(endpoint.curl("/healthz", &[]).status, 200);
    assert_eq!(endpoint.curl("/readyz", &[]).status, 200);
    let empty = endpoint.curl("/", &[]).text();
    assert!(empty.contains("Nothing is stored here yet"), "{empty}");
    let tarball = noise(1_000_000, 15);
    let bytes = endpoint.store("demo", "1.0+a", &tarball);
    endpoint.curl(&file("demo", "1.0+a", "repo.tar"), &[]);
    endpoint.curl(&file("demo", "2", "repo.tar"), &["-I"]);

    let metrics = endpoint.curl("/metrics", &[]).text();
    for line in [
        "oscontainer_endpoint_requests_total{method=\"PUT\",status=\"201\"} 2".to_owned(),
        "oscontainer_endpoint_requests_total{method=\"HEAD\",status=\"404\"} 1".to_owned(),
        "oscontainer_endpoint_errors_total{kind=\"not-found\"} 1".to_owned(),
        "oscontainer_endpoint_request_duration_seconds_count{method=\"PUT\"} 2".to_owned(),
        "oscontainer_endpoint_versions 1".to_owned(),
        format!("oscontainer_endpoint_received_bytes_total {}", tarball.len() + bytes.len()),
        format!("oscontainer_endpoint_stored_bytes {}", tarball.len() + bytes.len()),
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is missing in\n{metrics}");
    }
    let sent = metrics.lines().find_map(|line| line.strip_prefix("oscontainer_endpoint_sent_bytes_total "));
    assert!(sent.unwrap().parse::<usize>().unwrap() >= tarball.len(), "{metrics}");

    let page = endpoint.curl("/", &[]);
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.header("content-security-policy").is_some_and(|policy| policy.contains("default-src 'none'")));
    let html = page.text();
    let digest = Digest::of(&bytes).to_string();
    for text in
        ["1.0+a", &digest, "prefers-color-scheme: dark", "demo/x86_64/host", &endpoint.url("/v1/artifacts/demo")]
    {
        assert!(html.contains(text), "{text} is missing in\n{html}");
    }
    assert!(!html.contains("<script"), "{html}");
    for host in ["<b>x", "x\"y", "x;reboot", "$(x)"] {
        let html = endpoint.curl("/", &["-H", &format!("X-Forwarded-Host: {host}")]).text();
        assert!(!html.contains(host) && html.contains("http://HOST:8080/v1"), "{html}");
    }
    let secure = endpoint.curl("/", &["-H", "X-Forwarded-Proto: https", "-H", "X-Forwarded-Host: a.example"]).text();
    assert!(secure.contains("https://a.example/v1/artifacts/demo/1.0+a/manifest.json"), "{secure}");

    // The commands on the page do what they say.
    let start = html.find("curl -fLO").unwrap();
    let command = &html[start..start + html[start..].find("</pre>").unwrap()];
    let script = command.replace("&lt;", "<").replace("&#39;", "'").replace("&amp;", "&");
    let dir = endpoint.path("copied");
    fs::create_dir(&dir).unwrap();
    let done = ok(tool("bash").current_dir(&dir).args(["-ec", &script]));
    assert!(done.stdout.contains("repo.tar: OK") && done.stdout.contains("manifest.json: OK"), "{done:?}");

    fs::rename(endpoint.path("store/artifacts"), endpoint.path("gone")).unwrap();
    wait_for(|| endpoint.curl("/readyz", &[]).status == 503, "the store to be missed");
    assert_eq!(endpoint.curl("/healthz", &[]).status, 200);
    let log = endpoint.log();
    assert!(log.contains("client=127.0.0.1 writer=--token-file"), "{log}");
}

#[test]
fn a_stop_lets_transfers_end() {
    let mut endpoint = Endpoint::start();
    let tarball = noise(20_000_000, 70);
    endpoint.store("demo", "1", &tarball);
    let connect = |head: String| {
        let mut stream = TcpStream::connect(&endpoint.server().address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    let mut reader = connect(format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", file("demo", "1", "repo.tar")));
    let (path, upload) = (file("demo", "2", "repo.tar"), noise(1_000_000, 71));
    let mut writer =
        connect(format!("PUT {path} HTTP/1.1\r\nHost: x\r\n{}\r\nContent-Length: {}\r\n\r\n", bearer(), upload.len()));
    writer.write_all(&upload[..500_000]).unwrap();
    reader.read_exact(&mut [0; 1000]).unwrap();
    // One that only waits does not hold it up.
    let mut idle = connect("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n".to_owned());
    idle.read_exact(&mut [0; 15]).unwrap();
    ok(tool("kill").args(["-s", "TERM", &endpoint.pid().to_string()]));
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(&endpoint.server().address).is_ok() {
        assert!(Instant::now() < deadline, "it still listens");
        std::thread::sleep(Duration::from_millis(20));
    }
    writer.write_all(&upload[500_000..]).unwrap();
    let mut reply = String::new();
    writer.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 201"), "{reply}");
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert!(rest.ends_with(&tarball[1000..]), "the reader got all of it");
    let mut after = Vec::new();
    idle.read_to_end(&mut after).unwrap();
    assert!(endpoint.wait().success());
}

#[test]
fn a_store_has_one_endpoint_and_a_known_kind() {
    let endpoint = Endpoint::start();
    let address = e2e::free_address();
    fails(endpoint.command().args(["--listen", &address]), 1, "is in use");
    for uri in ["ftp://bucket/x", "s3:///x", "swift://", "s3://key@bucket"] {
        let done = fails(builder().args(["endpoint", "--listen", &address, "--store", uri]), 2, ": expected ");
        assert!(done.stderr.contains(uri), "{done:?}");
    }
    fails(builder().args(["endpoint", "--listen", &address, "--store", "file://host/x"]), 2, "file:///absolute/path");
    fs::write(endpoint.path("empty"), "\n").unwrap();
    let other = endpoint.path("other");
    fails(
        builder()
            .args(["endpoint", "--listen", &address, "--store"])
            .arg(&other)
            .arg("--token-file")
            .arg(endpoint.path("empty")),
        3,
        "is empty",
    );
    // The environment does what the options do, and file:// is a directory.
    let token = endpoint.path("token");
    let _server = Server::start(
        builder()
            .arg("endpoint")
            .env("OSCONTAINER_STORE", format!("file://{}", other.display()))
            .env("OSCONTAINER_TOKEN_FILE", token)
            .env("OSCONTAINER_MAX_SIZE", "1GiB")
            .stderr(Stdio::null()),
    );
    assert!(other.join("artifacts").is_dir());
}

/// The manifests say `[::]`.
#[test]
fn a_machine_without_ipv6_is_served_on_ipv4() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = builder();
    command.arg("endpoint").arg("--store").arg(dir.path().join("store"));
    command.env("OSCONTAINER_TOKEN_FILE", dir.path().join("token"));
    fs::write(dir.path().join("token"), "a-long-and-secret-token-4711\n").unwrap();
    let server = Server::start_on("[::]", &mut e2e::ipv4::only(dir.path(), &command));
    let mut curl = tool("curl");
    assert_eq!(ok(curl.args(["-sSf", &format!("{}/healthz", server.url())])).code, 0);
}
