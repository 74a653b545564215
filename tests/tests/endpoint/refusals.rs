//! What is refused, and that it changes nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use e2e::endpoint::{Endpoint, bearer, file, manifest, noise};
use e2e::store::Kind;
use e2e::{ok, on_each_store, tool};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::protocol::digest_header;

on_each_store!(files_that_contradict_their_digests_are_refused, paths_are_taken_by_the_grammar_only);

fn files_that_contradict_their_digests_are_refused(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let (tar, json) = (file("demo", "1", "repo.tar"), file("demo", "1", "manifest.json"));
    let tarball = noise(1_500_000, 8);
    let other = digest_header(&Digest::of(b"other"));
    for header in ["Repr-Digest", "Content-Digest"] {
        let reply = endpoint.put_with(&tar, &tarball, &["-H", &format!("{header}: {other}")]);
        assert_eq!(reply.status, 422, "{reply:?}");
        let reply = endpoint.put_with(&tar, &tarball, &["-H", &format!("{header}: sha-256=:AAAA:")]);
        assert_eq!(reply.status, 400, "{reply:?}");
    }
    assert_eq!(endpoint.put(&json, &manifest("demo", "1", &tarball)).status, 422, "the tarball is missing");
    let right = format!("Repr-Digest: sha-512=:AAAA:, {}", digest_header(&Digest::of(&tarball)));
    assert_eq!(endpoint.put_with(&tar, &tarball, &["-H", &right]).status, 201);
    assert_eq!(endpoint.put_with(&tar, &tarball, &["-H", "Content-Encoding: gzip"]).status, 415);
    assert_eq!(endpoint.put_with(&tar, &tarball, &["-H", "Content-Range: bytes 0-1/2"]).status, 400);

    let good = String::from_utf8(manifest("demo", "1", &tarball)).unwrap();
    let size = format!("\"size\": {}", tarball.len());
    for (bad, why) in [
        (good.replace(&size, "\"size\": 1"), "missing"),
        (good.replace(&Digest::of(&tarball).hex(), &Digest::of(b"other").hex()), "missing"),
        (good.replace("\"name\": \"demo\"", "\"name\": \"other\""), "the path says demo 1"),
        (good.replace("\"version\": \"1\",\n  \"arch", "\"version\": \"2\",\n  \"arch"), "the path says demo 1"),
        (good.replace("\"schemaVersion\": 1", "\"schemaVersion\": 2"), "schemaVersion"),
        (good.replace("\"annotations\"", "\"surprise\""), "surprise"),
        ("{".to_owned(), "not valid"),
        (String::new(), "not valid"),
    ] {
        assert_ne!(bad, good);
        let reply = endpoint.put(&json, bad.as_bytes());
        assert_eq!(reply.status, 422, "{reply:?}");
        assert!(reply.text().contains(why), "{why}: {reply:?}");
    }
    let claim = format!("Repr-Digest: {other}");
    assert_eq!(endpoint.put_with(&json, good.as_bytes(), &["-H", &claim]).status, 422);
    assert_eq!(endpoint.put(&json, good.as_bytes()).status, 201);
}

#[test]
fn what_is_too_large_or_does_not_fit_changes_nothing() {
    let endpoint = Endpoint::with(&["--max-size", "64KiB"]);
    let path = file("demo", "1", "repo.tar");
    let large = noise((64 << 10) + 1, 9);
    for arguments in [&[][..], &["-H", "Transfer-Encoding: chunked"], &["-H", "Expect:"]] {
        let reply = endpoint.put_with(&path, &large, arguments);
        assert_eq!(reply.status, 413, "{arguments:?} {reply:?}");
        assert!(reply.text().contains("65536"), "{reply:?}");
        let reply = endpoint.put_with(&file("demo", "1", "manifest.json"), &large, arguments);
        assert_eq!(reply.status, 413, "{arguments:?} {reply:?}");
    }
    assert_eq!(endpoint.put(&path, &large[..64 << 10]).status, 201);

    // A limit on the size of files stands for a full disk.
    let mut endpoint = Endpoint::start();
    let kept = noise(100_000, 10);
    endpoint.store("demo", "1", &kept);
    endpoint.kill();
    let inner = endpoint.command();
    let mut command = tool("bash");
    command.args(["-c", "trap '' XFSZ; ulimit -f 256; exec \"$@\"", "bash"]).arg(inner.get_program());
    command.args(inner.get_args()).arg("--token-file").arg(endpoint.path("token"));
    endpoint.run(command);
    let before = endpoint.stored();
    for version in ["1", "2"] {
        let reply = endpoint.put(&file("demo", version, "repo.tar"), &noise(2_000_000, 11));
        assert_eq!(reply.status, if version == "1" { 409 } else { 507 }, "{reply:?}");
    }
    assert_eq!(endpoint.stored(), before);
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body, kept);
    // More than any disk has is refused before the body is sent.
    let huge = format!("Content-Length: {}", 60_u64 << 30);
    let free = ok(tool("stat").args(["-f", "-c", "%a %S"]).arg(endpoint.dir())).stdout;
    let free: Vec<u64> = free.split_whitespace().map(|part| part.parse().unwrap()).collect();
    if free[0] * free[1] < 60 << 30 {
        assert_eq!(endpoint.put_with(&file("demo", "3", "repo.tar"), b"", &["-H", &huge]).status, 507);
    }
}

fn paths_are_taken_by_the_grammar_only(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    endpoint.store("demo", "1", b"x");
    let long = "x".repeat(129);
    for (name, version) in [
        ("..", "1"),
        ("demo", ".."),
        ("%2e%2e", "1"),
        ("demo", "%2e%2e"),
        ("demo", "a%2fb"),
        ("demo", "..%2f..%2fx"),
        ("demo", "a%00b"),
        ("demo", "a%20b"),
        ("demo", "%ff"),
        (".tmp", "1"),
        ("-x", "1"),
        ("latest", "1"),
        ("demo", &long),
        ("%C3%A4", "1"),
    ] {
        let path = file(name, version, "repo.tar");
        let put = endpoint.put(&path, b"x").status;
        assert!([400, 404].contains(&put), "{path}: {put}");
        let got = endpoint.curl(&path, &[]).status;
        assert!([400, 404].contains(&got), "{path}: {got}");
    }
    assert_eq!(endpoint.put(&file("demo", "latest", "repo.tar"), b"x").status, 400);
    for other in ["other.json", "version.json", "repo.tar/", "%2e%2e%2fversion.json", ""] {
        let path = file("demo", "1", other);
        assert_eq!(endpoint.curl(&path, &["--path-as-is"]).status, 404, "{path}");
        assert_eq!(endpoint.put_with(&path, b"x", &["-X", "PUT", "--path-as-is"]).status, 404, "{path}");
    }
    for (path, method) in [
        ("/v1/artifacts/", "PUT"),
        ("/v1/artifacts/demo/", "DELETE"),
        ("/v1/artifacts/demo/1", "GET"),
        ("/v1/artifacts/demo/1/repo.tar", "POST"),
        ("/v1/artifacts/demo/1/repo.tar", "DELETE"),
        ("/healthz", "POST"),
    ] {
        let reply = endpoint.curl(path, &["-X", method, "-H", &bearer()]);
        assert_eq!(reply.status, 405, "{method} {path}");
        assert!(reply.header("allow").is_some(), "{reply:?}");
    }
    let files = endpoint.stored();
    assert!(files.iter().all(|path| path.contains("/demo/1/")), "{files:?}");
}

#[test]
fn requests_that_are_no_http_do_no_harm() {
    let endpoint = Endpoint::start();
    let address = &endpoint.server().address;
    let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(1 << 20));
    for request in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        &long,
        "PUT /v1/artifacts/demo/1/repo.tar HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // The endpoint may hang up before it has read everything.
        let _ = stream.write_all(request.as_bytes());
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
        let status = String::from_utf8_lossy(&reply[..reply.len().min(12)]).into_owned();
        assert!(status.is_empty() || status.starts_with("HTTP/1.1 4"), "{status}");
    }
    assert_eq!(endpoint.curl("/healthz", &[]).status, 200);
}
