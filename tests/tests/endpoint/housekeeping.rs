//! What the endpoint removes, what it never removes, and what it mends.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use e2e::endpoint::{Endpoint, bearer, file, manifest, noise};
use e2e::store::Kind;
use e2e::{fails, on_each_object_store, on_each_store, peak_memory, wait_for};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::protocol::digest_header;

/// The versions of demo, newest first.
fn versions(endpoint: &Endpoint) -> Vec<String> {
    let list = endpoint.curl("/v1/artifacts/demo/", &[]).json();
    let versions = list["versions"].as_array().unwrap();
    versions.iter().map(|version| version["version"].as_str().unwrap().to_owned()).collect()
}

#[track_caller]
fn becomes(endpoint: &Endpoint, expected: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while versions(endpoint) != expected {
        assert!(Instant::now() < deadline, "{:?} instead of {expected:?}\n{}", versions(endpoint), endpoint.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn restart_with(endpoint: &mut Endpoint, options: &[&str]) {
    endpoint.kill();
    let mut command = endpoint.command();
    command.arg("--token-file").arg(endpoint.path("token")).args(options);
    endpoint.run(command);
}

#[test]
fn surplus_versions_go_but_not_the_newest_nor_one_that_is_read() {
    let mut endpoint = Endpoint::with(&["--keep", "2"]);
    let tarball = noise(8_000_000, 50);
    endpoint.store("other", "1", b"x");
    for version in ["1", "2", "3", "4"] {
        endpoint.store("demo", version, version.as_bytes());
    }
    becomes(&endpoint, &["4", "3"]);
    assert!(!endpoint.stored().iter().any(|path| path.contains("demo/1/")), "{:?}", endpoint.stored());
    assert_eq!(endpoint.curl(&file("other", "1", "repo.tar"), &[]).status, 200);

    // Somebody reads version 5, slowly, while newer ones come.
    endpoint.store("demo", "5", &tarball);
    let mut slow = TcpStream::connect(&endpoint.server().address).unwrap();
    slow.write_all(b"GET /v1/artifacts/demo/5/repo.tar HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    slow.read_exact(&mut [0; 1000]).unwrap();
    for version in ["6", "7", "8"] {
        endpoint.store("demo", version, version.as_bytes());
    }
    becomes(&endpoint, &["8", "7", "5"]);
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).unwrap();
    assert!(rest.ends_with(&tarball[tarball.len() / 2..]), "it was read to its end");

    // By age: records say when; the newest stays, however old it is.
    endpoint.kill();
    for (version, days) in [("8", 30), ("7", 31), ("5", 32)] {
        let path = endpoint.path(&format!("store/artifacts/demo/{version}/version.json"));
        let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        record["stored"] = (record["stored"].as_u64().unwrap() - days * 86_400_000_000_000).into();
        fs::write(&path, record.to_string()).unwrap();
    }
    restart_with(&mut endpoint, &["--keep-days", "40"]);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(versions(&endpoint), ["8", "7", "5"]);
    restart_with(&mut endpoint, &["--keep-days", "7", "--keep", "2"]);
    becomes(&endpoint, &["8", "7"]);
    restart_with(&mut endpoint, &["--keep-days", "7"]);
    becomes(&endpoint, &["8"]);
    assert_eq!(endpoint.curl(&file("demo", "8", "repo.tar"), &[]).body, b"8");
}

on_each_store!(a_quota_holds_also_for_what_is_promised, a_full_quota_is_in_the_way_of_no_manifest);

fn a_full_quota_is_in_the_way_of_no_manifest(kind: Kind) {
    let endpoint = Endpoint::on(kind, &["--quota", "1MiB"]);
    let tar = file("demo", "1", "repo.tar");
    let put = |head: &str, bytes: &[u8]| {
        let mut stream = TcpStream::connect(&endpoint.server().address).unwrap();
        let head = format!("PUT {tar} HTTP/1.1\r\nHost: x\r\n{}\r\n{head}\r\n\r\n", bearer());
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    // What says its length has its room as long as it is under way.
    let promised = put("Content-Length: 600000", &[0; 1000]);
    endpoint.received(1000);
    let tarball = noise(if kind == Kind::Directory { 1 << 20 } else { 1_000_000 }, 80);
    assert_eq!(endpoint.put(&tar, &tarball).status, 507);
    drop(promised);
    wait_for(|| endpoint.put(&tar, &tarball).status == 201, "the room to be free again");
    // The same is here already; one without a length finds no room, and takes none.
    let digest = format!("Repr-Digest: {}", digest_header(&Digest::of(&tarball)));
    assert_eq!(endpoint.put_with(&tar, &tarball, &["-H", &digest]).status, 200);
    assert_eq!(endpoint.put_with(&tar, &tarball, &["-H", &digest, "-H", "Transfer-Encoding: chunked"]).status, 200);
    let _endless = put("Transfer-Encoding: chunked", b"400\r\n");
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest("demo", "1", &tarball)).status, 201);
    let metrics = endpoint.curl("/metrics", &[]).text();
    assert!(metrics.contains("oscontainer_endpoint_quota_bytes{} 1048576\n"), "{metrics}");
    assert!(metrics.contains("oscontainer_endpoint_free_bytes{} ") && metrics.contains("_staged_bytes "), "{metrics}");
}

fn a_quota_holds_also_for_what_is_promised(kind: Kind) {
    let endpoint = Endpoint::on(kind, &["--quota", "1MiB"]);
    let tarball = noise(600_000, 51);
    endpoint.store("demo", "1", &tarball);
    let (more, small) = (noise(600_000, 52), noise(300_000, 53));
    let path = file("demo", "2", "repo.tar");
    let before = endpoint.stored();
    for arguments in [&[][..], &["-H", "Transfer-Encoding: chunked"]] {
        let reply = endpoint.put_with(&path, &more, arguments);
        assert_eq!(reply.status, 507, "{reply:?}");
    }
    assert_eq!(endpoint.stored(), before);
    let begin = |version: &str, bytes: &[u8]| {
        let (length, auth) = (format!("Upload-Length: {}", bytes.len()), bearer());
        let digest = format!("Repr-Digest: {}", digest_header(&Digest::of(bytes)));
        let arguments = ["-X", "PUT", "-H", "Upload-Complete: ?0", "-H", &length, "-H", &digest, "-H", &auth];
        endpoint.curl(&file("demo", version, "repo.tar"), &arguments).status
    };
    assert_eq!(begin("2", &more), 507);
    // Of several at the same time only as many begin as there is room for.
    let statuses: Vec<_> = std::thread::scope(|scope| {
        let begun: Vec<_> = (0..6)
            .map(|number| {
                let begin = &begin;
                scope.spawn(move || begin(&format!("at-once-{number}"), &noise(300_000, 70 + number)))
            })
            .collect();
        begun.into_iter().map(|begun| begun.join().unwrap()).collect()
    });
    assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 1, "{statuses:?}");
    let number = statuses.iter().position(|status| *status == 201).unwrap() as u64;
    let digest = Digest::of(&noise(300_000, 70 + number)).hex();
    let upload = format!("/v1/uploads/demo/at-once-{number}/sha256-{digest}");
    assert_eq!(endpoint.curl(&upload, &["-X", "DELETE", "-H", &bearer()]).status, 204);
    assert_eq!(begin("2", &small), 201);
    assert_eq!(begin("2", &small), 201, "what was begun has its room");
    assert_eq!(endpoint.put(&path, &noise(300_000, 54)).status, 507);
    let upload = format!("/v1/uploads/demo/2/sha256-{}", Digest::of(&small).hex());
    assert_eq!(endpoint.curl(&upload, &["-X", "DELETE", "-H", &bearer()]).status, 204);
    endpoint.store("demo", "2", &small);
    // The same again needs no room.
    assert_eq!(endpoint.put(&file("demo", "1", "repo.tar"), &tarball).status, 200);
}

#[test]
fn a_damaged_version_is_taken_out_and_can_be_published_again() {
    let mut endpoint = Endpoint::start();
    let (tarball, sound) = (noise(50_000, 55), noise(50_000, 56));
    let bytes = endpoint.store("demo", "1", &tarball);
    endpoint.store("demo", "2", &sound);
    endpoint.store("demo", "3", b"x");
    endpoint.kill();
    let stored = endpoint.path(&format!("store/artifacts/demo/1/sha256-{}", Digest::of(&tarball).hex()));
    fs::write(&stored, &tarball[..100]).unwrap();
    fs::write(endpoint.path("store/artifacts/demo/3/version.json"), "{").unwrap();
    endpoint.restart();
    assert_eq!(versions(&endpoint), ["2"]);
    assert!(endpoint.log().contains("demo 1 is damaged and not served; publish it again"), "{}", endpoint.log());
    assert!(endpoint.log().contains("demo 3 is damaged"), "{}", endpoint.log());
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).status, 404);
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest("demo", "1", &tarball)).status, 422);
    assert_eq!(endpoint.store("demo", "1", &tarball), bytes);
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body, tarball);
    assert_eq!(endpoint.put(&file("demo", "3", "manifest.json"), &manifest("demo", "3", b"x")).status, 201);
    endpoint.restart();
    assert_eq!(versions(&endpoint), ["3", "1", "2"]);
}

#[test]
fn a_file_that_cannot_be_looked_at_is_not_taken_for_damaged() {
    let mut endpoint = Endpoint::start();
    endpoint.store("demo", "1", b"x");
    endpoint.kill();
    let stored = endpoint.path(&format!("store/artifacts/demo/1/sha256-{}", Digest::of(b"x").hex()));
    let aside = endpoint.path("aside");
    fs::rename(&stored, &aside).unwrap();
    // It leads to itself: stat(2) fails, and not with ENOENT.
    std::os::unix::fs::symlink(&stored, &stored).unwrap();
    let mut command = endpoint.command();
    fails(command.args(["--listen", &e2e::free_address()]), 1, "looking at");
    fs::rename(&aside, &stored).unwrap();
    endpoint.restart();
    assert_eq!(versions(&endpoint), ["1"]);
}

#[test]
fn nothing_is_kept_of_names_that_are_not_there() {
    let mut endpoint = Endpoint::start();
    let mut client = TcpStream::connect(&endpoint.server().address).unwrap();
    let mut reader = std::io::BufReader::new(client.try_clone().unwrap());
    let mut ask = |numbers: std::ops::Range<u32>| {
        for start in numbers.step_by(500) {
            let head = |number| format!("HEAD /v1/artifacts/demo/{number}/repo.tar HTTP/1.1\r\nHost: x\r\n\r\n");
            let batch: String = (start..start + 500).map(head).collect();
            client.write_all(batch.as_bytes()).unwrap();
            for _ in 0..500 {
                let (status, _) = e2e::http::request_head(&mut reader).unwrap().unwrap();
                assert!(status.starts_with("HTTP/1.1 404"), "{status}");
            }
        }
    };
    ask(0..5000);
    let before = peak_memory(endpoint.pid());
    ask(5000..35000);
    let grown = peak_memory(endpoint.pid()) - before;
    assert!(grown < 4 << 10, "{grown} KiB for 30,000 requests");
}

#[test]
fn a_restart_of_the_machine_has_the_newest_digests_checked() {
    let mut endpoint = Endpoint::start();
    let (tarball, staged) = (noise(50_000, 57), noise(60_000, 58));
    for version in ["1", "2"] {
        endpoint.store("demo", version, &tarball);
    }
    endpoint.store("demo", "old", &tarball);
    endpoint.put(&file("demo", "staged", "repo.tar"), &staged);
    endpoint.kill();
    let path = |version: &str, content: &[u8]| {
        endpoint.path(&format!("store/artifacts/demo/{version}/sha256-{}", Digest::of(content).hex()))
    };
    let record = endpoint.path("store/artifacts/demo/old/version.json");
    let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    old["stored"] = (old["stored"].as_u64().unwrap() - 3_600_000_000_000).into();
    fs::write(&record, old.to_string()).unwrap();
    for (path, content) in
        [(path("1", &tarball), &tarball), (path("old", &tarball), &tarball), (path("staged", &staged), &staged)]
    {
        let mut torn = content.clone();
        torn[10_000..14_096].fill(0);
        fs::write(path, torn).unwrap();
    }
    // Not after a kill, which the kernel's own memory survives.
    endpoint.restart();
    assert_eq!(versions(&endpoint), ["2", "1", "old"]);
    endpoint.kill();
    fs::write(endpoint.path("store/.lock"), "another boot").unwrap();
    endpoint.restart();
    assert_eq!(versions(&endpoint), ["2", "old"], "what was stored long before is not read");
    let log = endpoint.log();
    assert!(log.contains("demo 1 is damaged and not served") && log.contains("has another digest"), "{log}");
    assert_eq!(
        endpoint.put(&file("demo", "staged", "manifest.json"), &manifest("demo", "staged", &staged)).status,
        422
    );
    endpoint.store("demo", "1", &tarball);
}

/// Two terabytes in two thousand versions, after a restart of the machine: what was stored long
/// before is looked at, not read.
#[test]
fn a_large_store_is_ready_soon() {
    let mut endpoint = Endpoint::start();
    let bytes = endpoint.store("demo", "0", b"x");
    endpoint.kill();
    let artifacts = endpoint.path("store/artifacts");
    let record = fs::read(artifacts.join("demo/0/version.json")).unwrap();
    let mut record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    let newest = record["stored"].as_u64().unwrap();
    for version in 1..=2000_u64 {
        let dir = artifacts.join(format!("large-{}/{version}", version % 20));
        fs::create_dir_all(&dir).unwrap();
        let tarball = fs::File::create(dir.join(format!("sha256-{}", Digest::of(b"x").hex()))).unwrap();
        tarball.set_len(1 << 30).unwrap();
        fs::write(dir.join(format!("sha256-{}", Digest::of(&bytes).hex())), &bytes).unwrap();
        record["size"] = (1_u64 << 30).into();
        record["stored"] = (newest - version * 3_600_000_000_000).into();
        fs::write(dir.join("version.json"), record.to_string()).unwrap();
    }
    fs::write(endpoint.path("store/.lock"), "another boot").unwrap();
    let start = Instant::now();
    endpoint.restart();
    assert_eq!(endpoint.curl("/readyz", &[]).status, 200);
    println!("ready after {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(20), "ready after {:?}", start.elapsed());
    let list = endpoint.curl("/v1/artifacts/large-7/", &[]).json();
    assert_eq!(list["versions"].as_array().unwrap().len(), 100);
    assert!(!endpoint.log().contains("damaged"), "{}", endpoint.log());
}

on_each_object_store!(a_version_whose_objects_are_gone_is_taken_out, a_tarball_whose_objects_are_gone_is_not_here);

fn a_tarball_whose_objects_are_gone_is_not_here(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let tarball = noise(50_000, 81);
    let (tar, json) = (file("demo", "1", "repo.tar"), file("demo", "1", "manifest.json"));
    let bytes = manifest("demo", "1", &tarball);
    for (beginning, end, damage) in [("segments/", "", &b"short"[..]), ("artifacts/", ".index", b"{")] {
        assert_eq!(endpoint.put(&tar, &tarball).status, 201);
        let files = endpoint.stored();
        let spoilt = files.iter().find(|path| path.starts_with(beginning) && path.ends_with(end)).unwrap();
        endpoint.place.overwrite(spoilt, damage);
        assert_eq!(endpoint.put(&json, &bytes).status, 422);
        assert_eq!(endpoint.put(&tar, &tarball).status, 201, "it is not taken for the same");
        assert_eq!(endpoint.put(&json, &bytes).status, 201);
        assert!(endpoint.curl(&tar, &[]).body == tarball);
        assert_eq!(endpoint.curl("/v1/artifacts/demo/1", &["-X", "DELETE", "-H", &bearer()]).status, 204);
        assert_eq!(endpoint.stored(), [""; 0]);
    }
}

fn a_version_whose_objects_are_gone_is_taken_out(kind: Kind) {
    let mut endpoint = Endpoint::on(kind, &[]);
    let tarball = noise(50_000, 59);
    for version in ["1", "2", "3"] {
        endpoint.store("demo", version, &tarball);
    }
    endpoint.kill();
    let files = endpoint.stored();
    let segment = files.iter().find(|path| path.starts_with("segments/demo/1/")).unwrap();
    endpoint.place.overwrite(segment, b"short");
    let index = files.iter().find(|path| path.starts_with("artifacts/demo/3/") && path.ends_with(".index")).unwrap();
    endpoint.place.overwrite(index, b"{");
    endpoint.restart();
    assert_eq!(versions(&endpoint), ["2"]);
    for damaged in ["demo 1 is damaged and not served", "demo 3 is damaged and not served"] {
        assert!(endpoint.log().contains(damaged), "{}", endpoint.log());
    }
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).status, 404);
    endpoint.store("demo", "1", &tarball);
    endpoint.store("demo", "3", &tarball);
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body, tarball);
}
