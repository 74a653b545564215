//! What only object stores do: they fail now and then, several endpoints may share one, tokens
//! expire.

use std::fs::{self, File};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use e2e::endpoint::{Endpoint, Reply, bearer, curl, file, manifest, noise, packed};
use e2e::registry::{Door, Trouble};
use e2e::store::{Kind, VARIABLES, application_credential};
use e2e::{Server, builder, fails, ok, on_each_object_store, tool, wait_for};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::protocol::digest_header;

/// Starts an endpoint on the same store as `endpoint`, with the same token.
fn beside(endpoint: &Endpoint) -> Server {
    let mut command = endpoint.command();
    command.arg("--token-file").arg(endpoint.path("token")).stderr(Stdio::null());
    Server::start(&mut command)
}

on_each_object_store!(fails_every_tenth_call);

/// A store that fails every tenth call: before it did anything, after it did and before it
/// answered, or in the middle of a request or an answer.
fn fails_every_tenth_call(kind: Kind) {
    let mut endpoint = Endpoint::on(kind, &[]);
    endpoint.kill();
    let door = Door::before(endpoint.place.address());
    endpoint.place = endpoint.place.through(&door.address);
    let mut calls = 0;
    door.set(move |_| {
        calls += 1;
        match calls {
            call if call % 10 != 0 => Trouble::None,
            call if call % 40 == 0 => Trouble::Status(503),
            call if call % 40 == 10 => Trouble::CutAnswer(0),
            call if call % 40 == 20 => Trouble::CutRequest(1000),
            _ => Trouble::CutAnswer(500),
        }
    });
    endpoint.restart();
    let dir = endpoint.path("packed");
    for version in 1..=5_u64 {
        let (version, tarball) = (version.to_string(), noise(20_000_000, 500 + version));
        packed(&dir, &version, &tarball);
        let mut publish = builder();
        publish.args(["publish", "--endpoint", &endpoint.url(""), "--token-file"]).arg(endpoint.path("token"));
        ok(publish.arg(&dir));
        assert!(endpoint.curl(&file("demo", &version, "repo.tar"), &[]).body == tarball, "version {version}");
        assert_eq!(endpoint.put(&file("demo", &version, "repo.tar"), b"another").status, 409);
    }
    let list = endpoint.curl("/v1/artifacts/demo/", &[]).json();
    assert_eq!(list["versions"].as_array().unwrap().len(), 5);
    for version in ["1", "2", "3", "4", "5"] {
        let path = format!("/v1/artifacts/demo/{version}");
        assert_eq!(endpoint.curl(&path, &["-X", "DELETE", "-H", &bearer()]).status, 204);
    }
    let left = endpoint.stored();
    assert!(!left.iter().any(|path| path.starts_with("artifacts/")), "{left:?}");
    // What does not answer at all is not ready, and says that it may pass.
    door.set(|_| Trouble::Status(503));
    assert_eq!(endpoint.curl("/readyz", &[]).status, 503);
    assert_eq!(endpoint.curl("/healthz", &[]).status, 200);
    door.set(|_| Trouble::None);
    wait_for(|| endpoint.curl("/readyz", &[]).status == 200, "the store to answer again");
    // Nor is one that is gone, or that takes the question and says nothing, however often it is asked.
    door.set(|_| Trouble::Status(404));
    wait_for(|| endpoint.curl("/readyz", &[]).status == 503, "the store to be missed");
    door.seen();
    door.set(|_| Trouble::Silence);
    let asked: Vec<_> = std::thread::scope(|scope| {
        let probes: Vec<_> = (0..20).map(|_| scope.spawn(|| endpoint.curl("/readyz", &[]).status)).collect();
        probes.into_iter().map(|probe| probe.join().unwrap()).collect()
    });
    assert!(asked.iter().all(|status| *status == 503), "{asked:?}");
    let questions = door.seen().iter().filter(|request| !request.contains("lock")).count();
    assert!(questions < 10, "{questions} questions for {} probes", asked.len());
}

/// Whoever cannot renew the lock stops to write before somebody else may take it.
#[test]
fn an_endpoint_that_is_late_with_its_lock_stores_nothing() {
    let mut endpoint = Endpoint::on(Kind::Swift, &[]);
    endpoint.kill();
    let door = Door::before(endpoint.place.address());
    endpoint.place = endpoint.place.through(&door.address);
    endpoint.restart();
    let tarball = noise(1000, 640);
    assert_eq!(endpoint.put(&file("demo", "1", "repo.tar"), &tarball).status, 201);
    let write = || endpoint.put(&file("demo", "1", "manifest.json"), &manifest("demo", "1", &tarball)).status;
    door.set(|request| if request.ends_with("/lock") { Trouble::Silence } else { Trouble::None });
    wait_for(|| endpoint.curl("/readyz", &[]).status == 503, "the lock to be late");
    assert_eq!(write(), 503);
    assert_eq!(endpoint.curl("/v1/artifacts/demo/1", &["-X", "DELETE", "-H", &bearer()]).status, 503);
    assert!(!endpoint.stored().iter().any(|path| path.ends_with("version.json")), "{:?}", endpoint.stored());
    door.set(|_| Trouble::None);
    wait_for(|| write() == 201, "the lock to be held again");
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body, tarball);
}

#[test]
fn a_stop_comes_through_before_the_store_is_open() {
    let mut endpoint = Endpoint::start();
    endpoint.kill();
    let log = endpoint.path("log");
    let mut command = builder();
    command.args(["endpoint", "--listen", &e2e::free_address(), "--store", "swift://x"]);
    command.envs([("ST_AUTH", "http://127.0.0.1:1/auth/v1.0"), ("ST_USER", "a:b"), ("ST_KEY", "c")]);
    let mut child = command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    wait_for(|| endpoint.log().contains("next try in"), "the login to fail");
    ok(tool("kill").args(["-s", "TERM", &child.id().to_string()]));
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(endpoint.log().contains("stopped by a signal"), "{}", endpoint.log());
}

/// One manifest wins, and an upload goes on at the other endpoint.
#[test]
fn two_endpoints_share_a_store_that_creates_conditionally() {
    let endpoint = Endpoint::on(Kind::S3, &[]);
    let other = beside(&endpoint);
    let tarballs: Vec<_> = (0..4).map(|seed| noise(1_000_000, 600 + seed)).collect();
    let (tar, json) = (file("demo", "1", "repo.tar"), file("demo", "1", "manifest.json"));
    for tarball in &tarballs {
        assert_eq!(endpoint.put(&tar, tarball).status, 201);
    }
    let put = |url: &str, path: &str, bytes: &[u8], more: &[&str]| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Reply::of(curl().args(["-H", &bearer(), "-T"]).arg(file.path()).args(more).arg(format!("{url}{path}")))
    };
    let urls = [endpoint.url(""), other.url()];
    let mut statuses: Vec<_> = std::thread::scope(|scope| {
        let racers: Vec<_> = tarballs
            .iter()
            .zip(urls.iter().cycle())
            .map(|(tarball, url)| scope.spawn(|| put(url, &json, &manifest("demo", "1", tarball), &[]).status))
            .collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409, 409, 409]);
    let won = endpoint.curl(&json, &[]).body;
    for url in &urls {
        assert_eq!(Reply::of(curl().arg(format!("{url}{json}"))).body, won);
        let body = Reply::of(curl().arg(format!("{url}{tar}"))).body;
        assert!(tarballs.contains(&body) && manifest("demo", "1", &body) == won, "{url}");
    }

    let tarball = noise(3_000_000, 610);
    let digest = Digest::of(&tarball);
    let begin = |url: &str| {
        let (length, digest) =
            (format!("Upload-Length: {}", tarball.len()), format!("Repr-Digest: {}", digest_header(&digest)));
        let arguments = ["-X", "PUT", "-H", "Upload-Complete: ?0", "-H", &length, "-H", &digest, "-H", &bearer()];
        let reply = Reply::of(curl().args(arguments).arg(format!("{url}{}", file("demo", "2", "repo.tar"))));
        reply.header("upload-offset").unwrap().parse::<usize>().unwrap()
    };
    let patch = |url: &str, from: usize, to: usize| {
        let (offset, complete) =
            (format!("Upload-Offset: {from}"), format!("Upload-Complete: ?{}", u8::from(to == tarball.len())));
        let more = ["-X", "PATCH", "-H", "Content-Type: application/partial-upload", "-H", &offset, "-H", &complete];
        put(url, &format!("/v1/uploads/demo/2/sha256-{}", digest.hex()), &tarball[from..to], &more).status
    };
    assert_eq!(begin(&urls[0]), 0);
    assert_eq!(patch(&urls[0], 0, 1_000_000), 204);
    assert_eq!(begin(&urls[1]), 1_000_000);
    assert_eq!(patch(&urls[1], 1_000_000, 2_000_000), 204);
    assert_eq!(patch(&urls[0], 2_000_000, 3_000_000), 201);
    assert_eq!(put(&urls[1], &file("demo", "2", "manifest.json"), &manifest("demo", "2", &tarball), &[]).status, 201);
    assert!(endpoint.curl(&file("demo", "2", "repo.tar"), &[]).body == tarball);
    assert!(!endpoint.log().contains("only one replica"), "{}", endpoint.log());
}

#[test]
fn a_store_that_cannot_create_conditionally_has_one_endpoint() {
    let mut endpoint = Endpoint::on(Kind::Swift, &[]);
    assert!(endpoint.log().contains("only one replica of the endpoint may run on it"), "{}", endpoint.log());
    let tarballs: Vec<_> = (0..4).map(|seed| noise(100_000, 620 + seed)).collect();
    for tarball in &tarballs {
        assert_eq!(endpoint.put(&file("demo", "1", "repo.tar"), tarball).status, 201);
    }
    let mut statuses: Vec<_> = std::thread::scope(|scope| {
        let put =
            |tarball: &Vec<u8>| endpoint.put(&file("demo", "1", "manifest.json"), &manifest("demo", "1", tarball));
        let racers: Vec<_> = tarballs.iter().map(|tarball| scope.spawn(move || put(tarball).status)).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409, 409, 409]);
    let log = endpoint.path("second");
    let mut second = endpoint.command();
    second.args(["--listen", &e2e::free_address()]).stderr(std::fs::File::create(&log).unwrap());
    let mut second = second.spawn().unwrap();
    wait_for(|| std::fs::read_to_string(&log).unwrap().contains("waiting to see"), "the second endpoint");
    // After a kill there is nobody to wait for, though the lock is there.
    endpoint.restart();
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).status, 200);
    let ended = second.wait().unwrap().code();
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(ended == Some(1) && log.contains("is in use: the endpoint on"), "{ended:?} {log}");
    // A stop gives the lock back.
    ok(tool("kill").args(["-s", "TERM", &endpoint.pid().to_string()]));
    assert!(endpoint.wait().success());
    endpoint.restart();
    assert!(!endpoint.log().contains("waiting to see"), "{}", endpoint.log());
}

#[test]
fn keystone_gives_tokens_for_a_password_or_an_application_credential() {
    let mut endpoint = Endpoint::on(Kind::Keystone, &[]);
    let tarball = noise(3_000_000, 630);
    let bytes = endpoint.store("demo", "1", &tarball);
    // Its token has expired by then.
    std::thread::sleep(Duration::from_secs(11));
    assert!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body == tarball);
    assert_eq!(endpoint.store("demo", "2", &tarball).len(), bytes.len());
    let credential = application_credential();
    endpoint.kill();
    let mut command = endpoint.command();
    for name in ["OS_USERNAME", "OS_PASSWORD", "OS_PROJECT_NAME", "OS_USER_DOMAIN_NAME", "OS_PROJECT_DOMAIN_ID"] {
        command.env_remove(name);
    }
    command.env("OS_AUTH_TYPE", "v3applicationcredential");
    command.env("OS_APPLICATION_CREDENTIAL_ID", credential["id"].as_str().unwrap());
    command.env("OS_APPLICATION_CREDENTIAL_SECRET", credential["secret"].as_str().unwrap());
    command.arg("--token-file").arg(endpoint.path("token"));
    endpoint.run(command);
    std::thread::sleep(Duration::from_secs(11));
    endpoint.store("demo", "3", &tarball);
    assert!(endpoint.curl(&file("demo", "3", "repo.tar"), &[]).body == tarball);
    let log = endpoint.log();
    assert!(!log.contains("ERROR") && !log.contains("application-secret"), "{log}");
}

#[test]
fn what_is_missing_for_a_store_is_named() {
    let listen = e2e::free_address();
    let start = |uri: &str, variables: &[(&str, &str)]| {
        let mut command = builder();
        for (name, _) in std::env::vars_os() {
            if VARIABLES.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.args(["endpoint", "--listen", &listen, "--store", uri]).envs(variables.iter().copied());
        command
    };
    fails(&mut start("swift://x", &[]), 2, "OS_AUTH_URL");
    fails(&mut start("swift://x", &[("OS_AUTH_URL", "http://127.0.0.1:1")]), 2, "OS_USERNAME");
    fails(&mut start("swift://x", &[("OS_AUTH_URL", "http://x"), ("OS_IDENTITY_API_VERSION", "2")]), 2, "only 1");
    let v1 = [("ST_AUTH", "http://127.0.0.1:1/auth/v1.0"), ("ST_USER", "a:b"), ("ST_KEY", "secret-4711")];
    let done = fails(&mut start("swift://x", &v1), 1, "logging in to Swift");
    assert!(!done.stderr.contains("4711"), "{done:?}");
    let ca = [("AWS_CA_BUNDLE", "/nonexistent.pem")];
    fails(&mut start("s3://x", &ca), 1, "AWS_CA_BUNDLE /nonexistent.pem");
    fails(&mut start("s3://x", &[("AWS_CA_BUNDLE", "/dev/null")]), 3, "AWS_CA_BUNDLE /dev/null holds no certificate");
}

/// A Keystone that takes connections and says nothing does not hold up the start for ever, nor a stop at all.
#[test]
fn a_silent_login_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut command = builder();
    command.args(["endpoint", "--listen", &e2e::free_address(), "--store", "swift://x"]);
    command.env("ST_AUTH", format!("http://{}/auth/v1.0", silent.local_addr().unwrap()));
    command.env("ST_USER", "a:b").env("ST_KEY", "c").stderr(File::create(&log).unwrap());
    let mut endpoint = command.spawn().unwrap();
    let said = || fs::read_to_string(&log).unwrap();
    wait_for(|| said().contains("next try in 1 s: logging in to Swift: no answer in time"), "the first try to end");
    ok(tool("kill").args(["-s", "TERM", &endpoint.id().to_string()]));
    let begun = Instant::now();
    assert!(!endpoint.wait().unwrap().success(), "{}", said());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
