//! What is stored, when it becomes visible, and that nothing is lost or changed.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use e2e::endpoint::{Endpoint, bearer, curl, file, manifest, noise};
use e2e::store::Kind;
use e2e::{ok, on_each_store, tool};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::manifest::{MEDIA_TYPE, TARBALL_MEDIA_TYPE};
use oscontainer_artifact::protocol::digest_header;

on_each_store!(
    an_artifact_is_invisible_until_its_manifest_is_stored,
    ranges_and_conditions_go_by_the_digest,
    a_complete_version_never_changes,
    a_job_that_died_after_its_tarball_does_not_block_the_next,
    uploads_at_the_same_time_do_not_disturb_each_other,
    versions_are_listed_newest_first_and_latest_leads_to_the_newest,
);

fn an_artifact_is_invisible_until_its_manifest_is_stored(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let (tar, json) = (file("demo", "1.0", "repo.tar"), file("demo", "1.0", "manifest.json"));
    let tarball = noise(3_000_000, 1);
    let bytes = manifest("demo", "1.0", &tarball);

    assert_eq!(endpoint.put(&tar, &tarball).status, 201);
    assert_eq!(endpoint.put(&tar, &tarball).status, 200);
    for path in [&tar, &json, "/v1/artifacts/demo/", "/v1/artifacts/demo/latest/repo.tar"] {
        assert_eq!(endpoint.curl(path, &[]).status, 404, "{path}");
    }
    assert_eq!(endpoint.curl("/v1/artifacts/", &[]).json(), serde_json::json!({"names": []}));

    let stored = endpoint.put(&json, &bytes);
    assert_eq!((stored.status, stored.text()), (201, format!("{}\n", Digest::of(&bytes))));
    assert_eq!(endpoint.put(&json, &bytes).status, 200);
    assert_eq!(endpoint.put(&tar, &tarball).status, 200);
    for (path, content, kind) in [(&tar, &tarball, TARBALL_MEDIA_TYPE), (&json, &bytes, MEDIA_TYPE)] {
        let digest = Digest::of(content);
        let reply = endpoint.curl(path, &[]);
        assert_eq!((reply.status, &reply.body), (200, content));
        assert_eq!(reply.header("etag"), Some(format!("\"{digest}\"").as_str()));
        assert_eq!(reply.header("repr-digest"), Some(digest_header(&digest).as_str()));
        assert_eq!(reply.header("content-type"), Some(kind));
        assert_eq!(reply.header("content-length"), Some(content.len().to_string().as_str()));
        assert_eq!(reply.header("last-modified"), None);
        let head = endpoint.curl(path, &["-I"]);
        assert_eq!((head.status, head.header("etag")), (200, reply.header("etag")));
        assert_eq!(head.header("content-length"), reply.header("content-length"));
    }
}

fn ranges_and_conditions_go_by_the_digest(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let tarball = noise(10_000, 2);
    endpoint.store("demo", "1", &tarball);
    let path = file("demo", "1", "repo.tar");
    let etag = format!("\"{}\"", Digest::of(&tarball));

    let part = endpoint.curl(&path, &["-r", "100-199"]);
    assert_eq!((part.status, &part.body[..]), (206, &tarball[100..200]));
    assert_eq!(part.header("content-range"), Some("bytes 100-199/10000"));
    let tail = endpoint.curl(&path, &["-r", "9990-"]);
    assert_eq!((tail.status, &tail.body[..]), (206, &tarball[9990..]));
    let suffix = endpoint.curl(&path, &["-r", "-10"]);
    assert_eq!((suffix.status, &suffix.body[..]), (206, &tarball[9990..]));
    let longer = endpoint.curl(&path, &["-r", "-20000"]);
    assert_eq!((longer.status, &longer.body), (206, &tarball));
    assert_eq!(longer.header("content-range"), Some("bytes 0-9999/10000"));
    let outside = endpoint.curl(&path, &["-r", "10000-"]);
    assert_eq!((outside.status, outside.header("content-range")), (416, Some("bytes */10000")));

    let same = endpoint.curl(&path, &["-r", "0-9", "-H", &format!("If-Range: {etag}")]);
    assert_eq!((same.status, &same.body[..]), (206, &tarball[..10]));
    for other in ["\"sha256:00\"", "W/\"x\"", "nothing that is known", "Sun, 06 Nov 1994 08:49:37 GMT"] {
        let other = endpoint.curl(&path, &["-r", "0-9", "-H", &format!("If-Range: {other}")]);
        assert_eq!((other.status, &other.body), (200, &tarball));
    }
    let fresh = endpoint.curl(&path, &["-H", &format!("If-None-Match: {etag}")]);
    assert_eq!((fresh.status, fresh.body.len(), fresh.header("etag")), (304, 0, Some(etag.as_str())));
    assert_eq!(endpoint.curl(&path, &["-H", "If-None-Match: \"x\""]).status, 200);

    // A download by hand that broke off goes on, and is what the manifest says.
    let dir = endpoint.path("by-hand");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("repo.tar"), &tarball[..1234]).unwrap();
    ok(curl().current_dir(&dir).args(["-fLO", "-C", "-"]).arg(endpoint.url(&path)));
    ok(curl().current_dir(&dir).arg("-fLO").arg(endpoint.url(&file("demo", "latest", "manifest.json"))));
    let sums = format!(
        "{}  repo.tar\n{}  manifest.json\n",
        Digest::of(&tarball).hex(),
        Digest::of(&manifest("demo", "1", &tarball)).hex()
    );
    fs::write(dir.join("sums"), sums).unwrap();
    ok(tool("sha256sum").current_dir(&dir).args(["-c", "sums"]));
}

fn a_complete_version_never_changes(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let tarball = noise(5_000, 3);
    let bytes = endpoint.store("demo", "1", &tarball);
    let (tar, json) = (file("demo", "1", "repo.tar"), file("demo", "1", "manifest.json"));

    for other in [noise(5_000, 4), noise(6_000, 4)] {
        let reply = endpoint.put(&tar, &other);
        assert_eq!(reply.status, 409, "{reply:?}");
        assert!(reply.text().contains("choose another version"), "{reply:?}");
        assert_eq!(endpoint.put(&json, &manifest("demo", "1", &other)).status, 409);
    }
    assert_eq!(endpoint.put(&json, b"not a manifest").status, 409);
    assert_eq!(endpoint.curl(&json, &[]).body, bytes);
    assert_eq!(endpoint.curl(&tar, &[]).body, tarball);
}

fn a_job_that_died_after_its_tarball_does_not_block_the_next(kind: Kind) {
    let mut endpoint = Endpoint::on(kind, &[]);
    let (first, second) = (noise(5_000, 5), noise(5_000, 6));
    let tar = file("demo", "1", "repo.tar");
    assert_eq!(endpoint.put(&tar, &first).status, 201);
    endpoint.restart();
    assert_eq!(endpoint.put(&tar, &second).status, 201);
    assert_eq!(endpoint.put(&tar, &first).status, 200);
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest("demo", "1", &second)).status, 201);
    assert_eq!(endpoint.curl(&tar, &[]).body, second);
    let files = endpoint.stored();
    assert!(!files.iter().any(|path| path.contains(&Digest::of(&first).hex())), "{files:?}");
    assert_eq!(endpoint.put(&tar, &first).status, 409);
    endpoint.restart();
    assert_eq!(endpoint.curl(&tar, &[]).body, second);
}

fn uploads_at_the_same_time_do_not_disturb_each_other(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let same = noise(4_000_000, 12);
    let different: Vec<_> = (0..4).map(|seed| noise(4_000_000, 100 + seed)).collect();
    let path = file("demo", "1", "repo.tar");
    let statuses = |bodies: Vec<(&str, &[u8])>| {
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                bodies.iter().map(|(path, body)| scope.spawn(|| endpoint.put(path, body).status)).collect();
            let mut statuses: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            statuses.sort_unstable();
            statuses
        })
    };
    assert_eq!(statuses(vec![(&path, &same[..]); 4]), [200, 200, 200, 201]);
    assert_eq!(statuses(different.iter().map(|body| (path.as_str(), &body[..])).collect()), [201; 4]);

    // Whichever manifest comes first wins; the others learn that they lost.
    let manifests: Vec<_> = different.iter().map(|body| manifest("demo", "1", body)).collect();
    let json = file("demo", "1", "manifest.json");
    let result = statuses(manifests.iter().map(|body| (json.as_str(), &body[..])).collect());
    assert_eq!(result, [201, 409, 409, 409]);
    let won = manifests.iter().position(|bytes| *bytes == endpoint.curl(&json, &[]).body).unwrap();
    assert_eq!(endpoint.curl(&path, &[]).body, different[won]);
    assert_eq!(statuses(vec![(&json, &manifests[won][..]); 4]), [200; 4]);

    endpoint.put(&file("demo", "2", "repo.tar"), &same);
    let bytes = manifest("demo", "2", &same);
    assert_eq!(statuses(vec![(&file("demo", "2", "manifest.json"), &bytes[..]); 4]), [200, 200, 200, 201]);
}

#[test]
fn a_kill_in_the_middle_leaves_nothing_behind() {
    let mut endpoint = Endpoint::start();
    let kept = noise(1_000_000, 13);
    endpoint.store("demo", "1", &kept);
    let before = endpoint.stored();
    let tarball = noise(8_000_000, 14);
    let path = file("demo", "2", "repo.tar");
    let upload = endpoint.file("upload", &tarball);
    let mut client = curl();
    client.args(["--limit-rate", "2M", "-H", &bearer(), "-T"]).arg(upload).arg(endpoint.url(&path));
    let mut client = client.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let under_way = |endpoint: &Endpoint| {
        let tmp = fs::read_dir(endpoint.path("store/.tmp")).unwrap();
        tmp.map(|entry| entry.unwrap().metadata().unwrap().len()).sum::<u64>() > 1_000_000
    };
    while !under_way(&endpoint) {
        assert!(Instant::now() < deadline, "the upload did not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    endpoint.kill();
    assert!(!client.wait().unwrap().success());
    assert_ne!(endpoint.stored(), before, "the upload was under way");
    endpoint.restart();
    assert_eq!(endpoint.stored(), before);
    assert_eq!(endpoint.curl(&path, &[]).status, 404);
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body, kept);

    // After the tarball and before the manifest: it is still there to be picked.
    assert_eq!(endpoint.put(&path, &tarball).status, 201);
    endpoint.restart();
    assert_eq!(endpoint.put(&file("demo", "2", "manifest.json"), &manifest("demo", "2", &tarball)).status, 201);
    assert_eq!(endpoint.curl(&path, &[]).body, tarball);

    // A client that dies leaves nothing either.
    let before = endpoint.stored();
    let mut stream = TcpStream::connect(&endpoint.server().address).unwrap();
    let head = format!(
        "PUT /v1/artifacts/demo/3/repo.tar HTTP/1.1\r\nHost: x\r\n{}\r\nContent-Length: 5000000\r\n\r\n",
        bearer()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&tarball[..3_000_000]).unwrap();
    while !under_way(&endpoint) {
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(stream);
    while endpoint.stored() != before {
        assert!(Instant::now() < deadline + Duration::from_secs(20), "{:?}", endpoint.stored());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn versions_are_listed_newest_first_and_latest_leads_to_the_newest(kind: Kind) {
    let mut endpoint = Endpoint::on(kind, &[]);
    for version in ["2.0", "10", "1.0"] {
        endpoint.store("demo", version, version.as_bytes());
    }
    endpoint.store("another", "1", b"x");
    endpoint.put(&file("demo", "staged", "repo.tar"), b"y");
    endpoint.restart();
    assert_eq!(endpoint.curl("/v1/artifacts/", &[]).json(), serde_json::json!({"names": ["another", "demo"]}));
    let list = endpoint.curl("/v1/artifacts/demo/", &[]).json();
    assert_eq!(list["name"], "demo");
    let versions = list["versions"].as_array().unwrap();
    let order: Vec<_> = versions.iter().map(|version| version["version"].as_str().unwrap()).collect();
    assert_eq!(order, ["1.0", "10", "2.0"]);
    let newest = &versions[0];
    assert_eq!(newest["manifestDigest"], Digest::of(&manifest("demo", "1.0", b"1.0")).to_string());
    assert_eq!(newest["commit"], "07".repeat(32));
    assert_eq!(newest["ref"], "demo/x86_64/host");
    assert_eq!(newest["size"], 3);
    let stored = newest["stored"].as_str().unwrap();
    assert!(stored.len() == 20 && stored.starts_with("20") && stored.ends_with('Z'), "{stored}");

    for name in ["repo.tar", "manifest.json"] {
        let reply = endpoint.curl(&file("demo", "latest", name), &[]);
        let location = format!("../1.0/{name}");
        assert_eq!((reply.status, reply.header("location")), (307, Some(location.as_str())));
        assert_eq!(reply.header("cache-control"), Some("no-cache"));
    }
    assert_eq!(endpoint.curl(&file("demo", "latest", "repo.tar"), &["-L"]).body, b"1.0");

    let delete = |path: &str| endpoint.curl(path, &["-X", "DELETE", "-H", &bearer()]).status;
    assert_eq!(delete("/v1/artifacts/demo/1.0"), 204);
    assert_eq!(delete("/v1/artifacts/demo/1.0"), 404);
    assert_eq!(endpoint.curl(&file("demo", "1.0", "repo.tar"), &[]).status, 404);
    assert_eq!(endpoint.curl(&file("demo", "latest", "repo.tar"), &["-L"]).body, b"10");
    assert_eq!(delete("/v1/artifacts/demo/staged"), 204);
    assert_eq!(delete("/v1/artifacts/another/1"), 204);
    assert_eq!(endpoint.curl("/v1/artifacts/another/", &[]).status, 404);
    assert_eq!(endpoint.curl("/v1/artifacts/", &[]).json(), serde_json::json!({"names": ["demo"]}));
    // A deleted version may be made anew, and is the newest then.
    endpoint.store("demo", "1.0", b"anew");
    assert_eq!(endpoint.curl(&file("demo", "latest", "repo.tar"), &["-L"]).body, b"anew");
}
