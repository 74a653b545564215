//! The client that uploads.

use std::fs;
use std::path::Path;
use std::process::Command;

use e2e::endpoint::{Endpoint, file, noise, packed};
use e2e::http::{Answer, Static};
use e2e::{Done, builder, fails, ok};
use oscontainer_artifact::digest::Digest;

fn publish(endpoint: &str, dir: &Path, token: &Path) -> Command {
    let mut command = builder();
    command.args(["publish", "--output-format", "json", "--endpoint", endpoint, "--token-file"]).arg(token).arg(dir);
    command.env("OSCONTAINER_RETRIES", "0");
    command
}

#[test]
fn publish_uploads_and_tells_where() {
    let endpoint = Endpoint::start();
    let (dir, token) = (endpoint.path("packed"), endpoint.path("token"));
    let tarball = noise(5_000_000, 16);
    packed(&dir, "1.0", &tarball);
    let bytes = fs::read(dir.join("manifest.json")).unwrap();
    let again = |url: &str| -> Done { ok(&mut publish(url, &dir, &token)) };
    let published = again(&endpoint.url("")).json();
    let expected = serde_json::json!({
        "manifestUrl": endpoint.url("/v1/artifacts/demo/1.0/manifest.json"),
        "manifestDigest": Digest::of(&bytes).to_string(),
        "commit": "07".repeat(32),
        "ref": "demo/x86_64/host",
        "version": "1.0",
    });
    assert_eq!(published, expected);
    assert_eq!(endpoint.curl(&file("demo", "1.0", "repo.tar"), &[]).body, tarball);
    // Again, and with a slash at the end: the same result, and nothing is sent.
    let puts = endpoint.log().matches("method=\"PUT\"").count();
    assert_eq!(again(&endpoint.url("/")).json(), expected);
    assert_eq!(endpoint.log().matches("method=\"PUT\"").count(), puts);

    packed(&dir, "1.0", &noise(5_000_000, 17));
    fails(&mut publish(&endpoint.url(""), &dir, &token), 3, "choose another version");
    // Something may be staged already, this or another.
    endpoint.put(&file("demo", "2", "repo.tar"), b"another");
    packed(&dir, "2", &tarball);
    endpoint.put(&file("demo", "2", "repo.tar"), &tarball);
    again(&endpoint.url(""));
    assert_eq!(endpoint.curl(&file("demo", "2", "repo.tar"), &[]).body, tarball);
}

#[test]
fn publish_says_what_is_wrong() {
    let endpoint = Endpoint::start();
    let (dir, token) = (endpoint.path("packed"), endpoint.path("token"));
    let tarball = noise(20_000_000, 18);
    packed(&dir, "1", &tarball);
    let url = endpoint.url("");

    let wrong = endpoint.file("wrong", b"not-the-token");
    let done = fails(&mut publish(&url, &dir, &wrong), 3, "answered 403");
    assert!(done.stderr.contains("--token-file") && !done.stderr.contains("not-the-token"), "{done:?}");
    let done = fails(builder().args(["publish", "--endpoint", &url]).arg(&dir), 3, "answered 401");
    assert!(done.stderr.contains("--token-file"), "{done:?}");
    fails(
        &mut publish(&format!("http://{}", e2e::free_address()), &dir, &token),
        1,
        "/v1/artifacts/demo/1/manifest.json",
    );
    fails(&mut publish(&format!("{url}/elsewhere"), &dir, &token), 3, "/elsewhere/v1/artifacts/demo/1/repo.tar");
    fails(&mut publish("ftp://host", &dir, &token), 2, "expected an http or https URL");
    fails(&mut publish(&url, &dir, &endpoint.path("absent")), 1, "absent");

    let mut cut = tarball.clone();
    cut.pop();
    let mut flipped = tarball.clone();
    flipped[1_000_000] ^= 1;
    for bad in [cut, flipped] {
        fs::write(dir.join("repo.tar"), bad).unwrap();
        fails(&mut publish(&url, &dir, &token), 3, "pack the commit again");
    }
    fs::write(dir.join("manifest.json"), "{}").unwrap();
    fails(&mut publish(&url, &dir, &token), 3, "manifest.json");
    fs::remove_file(dir.join("manifest.json")).unwrap();
    fails(&mut publish(&url, &dir, &token), 1, "manifest.json");
    assert!(!endpoint.stored().iter().any(|path| path.starts_with("artifacts/")));
}

/// An upload that begins, with nothing of it there.
const BEGUN: Answer = Answer::Head(201, "Upload-Complete: ?0\r\nUpload-Offset: 0\r\nLocation: /upload\r\n");

#[test]
fn a_redirect_leads_neither_the_token_nor_the_upload_away() {
    let (front, other) = (Static::start(), Static::start());
    let work = tempfile::tempdir().unwrap();
    let (dir, token) = (work.path().join("packed"), work.path().join("token"));
    fs::write(&token, "secret").unwrap();
    packed(&dir, "1", &noise(1000, 23));
    let path = file("demo", "1", "repo.tar");
    front.set(&path, Answer::Redirect(other.url("/elsewhere")));
    other.set("/elsewhere", BEGUN);
    fails(&mut publish(&front.url(""), &dir, &token), 3, "wants the upload at another host");
    assert_eq!(front.seen(&path)[0].headers["authorization"], "Bearer secret");
    assert!(!other.seen("/elsewhere")[0].headers.contains_key("authorization"));
    assert!(other.seen("/upload").is_empty());
}

#[test]
fn an_endpoint_that_takes_nothing_is_given_up() {
    let server = Static::start();
    let work = tempfile::tempdir().unwrap();
    let (dir, token) = (work.path().join("packed"), work.path().join("token"));
    fs::write(&token, "secret").unwrap();
    packed(&dir, "1", &noise(1000, 24));
    server.set(&file("demo", "1", "repo.tar"), BEGUN);
    server.set("/upload", Answer::Head(204, "Upload-Complete: ?0\r\nUpload-Offset: 0\r\n"));
    let mut command = publish(&server.url(""), &dir, &token);
    fails(command.env("OSCONTAINER_RETRIES", "1"), 1, "the endpoint took nothing");
    assert_eq!(server.seen("/upload").len(), 2);
}
