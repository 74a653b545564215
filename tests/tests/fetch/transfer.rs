//! What a download does with connections that break and servers that misbehave.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use e2e::artifacts::{Artifact, Served, commit};
use e2e::authority::Authority;
use e2e::endpoint::{Endpoint, file};
use e2e::http::{Answer, Static};
use e2e::proxy::Proxy;
use e2e::{fails, ok, run, tool};

use crate::{Random, Scene, names, ostree};

/// An artifact at `/a`, and its tarball.
pub struct Offer {
    pub served: Served,
    pub tarball: Arc<Vec<u8>>,
}

fn serve(scene: &Scene) -> Offer {
    let artifact = scene.artifact();
    Offer { served: artifact.serve(&scene.server, "/a"), tarball: Arc::new(artifact.tarball()) }
}

#[track_caller]
pub fn arrives(scene: &Scene, command: &mut Command) {
    ok(command);
    let repo = scene.path("out/repo");
    ostree(&repo, &["fsck"]);
    assert_eq!(names(&scene.path("out")), ["repo"]);
    fs::remove_dir_all(repo).unwrap();
}

/// The byte that each request for the tarball wanted first.
pub fn starts(server: &Static) -> Vec<usize> {
    let start = |range: &String| range.strip_prefix("bytes=").unwrap().split_once('-').unwrap().0.parse().unwrap();
    server.seen("/a/repo.tar").iter().map(|seen| seen.headers.get("range").map_or(0, start)).collect()
}

#[test]
fn a_download_goes_on_after_every_break() {
    let scene = Scene::new();
    let Offer { served, tarball } = serve(&scene);
    let part = tarball.len() / 9;
    scene.server.set("/a/repo.tar", Answer::Ranged(tarball.clone(), "\"v1\"", part));
    arrives(&scene, scene.fetch(&served).args(["--retries", "1"]));
    let expected: Vec<_> = (0..tarball.len()).step_by(part).collect();
    assert_eq!(starts(&scene.server), expected, "nothing came twice");
    for seen in scene.server.seen("/a/repo.tar").iter().skip(1) {
        assert_eq!(seen.headers["if-range"], "\"v1\"");
    }
    // What another file has under that name now is not taken for the rest of this one.
    let mut other = tarball.to_vec();
    other[part + 1] ^= 1;
    let other = Answer::Ranged(Arc::new(other), "\"v2\"", usize::MAX);
    scene.server.set_all("/a/repo.tar", [Answer::Ranged(tarball.clone(), "\"v1\"", part), other]);
    fails(scene.fetch(&served).args(["--retries", "1"]), 3, "/a/manifest.json");
    assert_eq!(names(&scene.path("out")), [""; 0]);
}

#[test]
fn a_server_without_ranges_or_lengths_will_do() {
    let scene = Scene::new();
    let Offer { served, tarball } = serve(&scene);
    let cut = |end| Answer::Cut(tarball.clone(), end);
    let half = tarball.len() / 2;
    scene.server.set_all("/a/repo.tar", [cut(half), cut(half + 1), cut(100), Answer::Bytes(tarball.clone())]);
    arrives(&scene, scene.fetch(&served).args(["--retries", "2"]));
    scene.server.set("/a/repo.tar", cut(half));
    fails(scene.fetch(&served).args(["--retries", "1"]), 1, "/a/repo.tar");

    scene.server.set("/a/repo.tar", Answer::Unsized(tarball.clone()));
    arrives(&scene, &mut scene.fetch(&served));
    let short = |end: usize| Answer::Unsized(Arc::new(tarball[..end].to_vec()));
    for end in [0, 1000, tarball.len() - 1] {
        scene.server.set("/a/repo.tar", short(end));
        scene.failed(&served, 1, "/a/repo.tar");
    }
    scene.server.set("/a/repo.tar", Answer::Unsized(Arc::new([&tarball[..], b"\0"].concat())));
    scene.rejected(&served, "more than");
    scene.server.set_all("/a/repo.tar", [short(1000), short(0), Answer::Unsized(tarball.clone())]);
    arrives(&scene, scene.fetch(&served).args(["--retries", "2"]));
}

#[test]
fn a_busy_server_is_left_alone_for_as_long_as_it_asks() {
    let scene = Scene::new();
    let Offer { served, tarball } = serve(&scene);
    scene.server.set_all("/a/repo.tar", [Answer::Busy("3"), Answer::Bytes(tarball.clone())]);
    let start = Instant::now();
    arrives(&scene, scene.fetch(&served).args(["--retries", "1"]));
    assert!(start.elapsed() >= Duration::from_secs(3), "{:?}", start.elapsed());
    // There is no time for that: it ends at once.
    scene.server.set("/a/repo.tar", Answer::Busy("500"));
    let start = Instant::now();
    fails(scene.fetch(&served).args(["--retries", "1", "--deadline", "60"]), 1, "--deadline of 60 s");
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    // What will stay so is not tried again, and its reason is not read for ever.
    for answer in [Answer::Status(403), Answer::Endless(403)] {
        let before = scene.server.seen("/a/repo.tar").len();
        scene.server.set("/a/repo.tar", answer);
        fails(scene.fetch(&served).args(["--retries", "5"]), 3, "403");
        assert_eq!(scene.server.seen("/a/repo.tar").len(), before + 1);
    }
}

#[test]
fn a_server_that_falls_silent_is_given_up() {
    let scene = Scene::new();
    let Offer { served, tarball } = serve(&scene);
    let stall = Answer::Stall(tarball.clone(), tarball.len() / 2);
    scene.server.set_all("/a/repo.tar", [stall.clone(), Answer::Ranged(tarball.clone(), "\"v\"", usize::MAX)]);
    arrives(&scene, scene.fetch(&served).args(["--stall-timeout", "1", "--retries", "1"]));
    assert_eq!(starts(&scene.server)[1], tarball.len() / 2);
    scene.server.set("/a/repo.tar", stall);
    let start = Instant::now();
    fails(scene.fetch(&served).args(["--deadline", "2", "--retries", "9"]), 1, "--deadline of 2 s");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(names(&scene.path("out")), [""; 0]);
}

#[test]
fn the_next_run_goes_on_where_this_one_was_killed() {
    let scene = Scene::new();
    let Offer { served, tarball } = serve(&scene);
    let kept = scene.path("kept");
    let fetch = || {
        let mut command = scene.fetch(&served);
        command.arg("--resume-dir").arg(&kept);
        command
    };
    let half = tarball.len() / 2;
    let whole = Answer::Ranged(tarball.clone(), "\"v\"", usize::MAX);
    let partial = || kept.join(names(&kept).pop().expect("something is kept"));
    // It fails, and it is killed: what was there stays.
    scene.server.set("/a/repo.tar", Answer::Ranged(tarball.clone(), "\"v\"", half));
    fails(&mut fetch(), 1, "/a/repo.tar");
    assert_eq!(names(&scene.path("out")), [""; 0]);
    assert_eq!(fs::read(partial()).unwrap(), tarball[..half]);
    scene.server.set("/a/repo.tar", Answer::Stall(tarball.clone(), half + 5000));
    let mut child = fetch().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while fs::metadata(partial()).unwrap().len() < half as u64 + 5000 {
        assert!(Instant::now() < deadline, "the download did not go on");
        std::thread::sleep(Duration::from_millis(20));
    }
    fails(&mut fetch(), 1, "another fetch");
    child.kill().unwrap();
    child.wait().unwrap();
    scene.server.set("/a/repo.tar", whole.clone());
    let before = starts(&scene.server).len();
    arrives(&scene, &mut fetch());
    assert_eq!(starts(&scene.server)[before..], [half + 5000]);
    assert_eq!(names(&kept), [""; 0], "nothing is kept of what arrived");

    // All of it is there: the tarball is not asked for again.
    scene.server.set("/a/repo.tar", Answer::Ranged(tarball.clone(), "\"v\"", half));
    fails(&mut fetch(), 1, "/a/repo.tar");
    fs::write(partial(), &tarball[..]).unwrap();
    let before = starts(&scene.server).len();
    arrives(&scene, &mut fetch());
    assert_eq!(starts(&scene.server).len(), before);

    // What the server does not give for now is no reason to throw away what is here.
    scene.server.set("/a/repo.tar", Answer::Ranged(tarball.clone(), "\"v\"", half));
    fails(&mut fetch(), 1, "/a/repo.tar");
    for status in [401, 403, 404] {
        scene.server.set("/a/repo.tar", Answer::Status(status));
        fails(&mut fetch(), 3, &status.to_string());
        assert_eq!(fs::read(partial()).unwrap(), tarball[..half]);
    }
    scene.server.set("/a/repo.tar", whole.clone());
    arrives(&scene, &mut fetch());

    // What a power cut left is thrown away, not believed and not fatal.
    for bad in [vec![0; half], tarball.iter().map(|byte| byte ^ 1).collect(), vec![0; tarball.len() + 1]] {
        scene.server.set("/a/repo.tar", Answer::Ranged(tarball.clone(), "\"v\"", half));
        fails(&mut fetch(), 1, "/a/repo.tar");
        fs::write(partial(), bad).unwrap();
        scene.server.set("/a/repo.tar", whole.clone());
        arrives(&scene, &mut fetch());
    }
    // A tarball that is wrong at its source is rejected, and not kept.
    let wrong: Vec<u8> = tarball.iter().map(|byte| byte ^ 1).collect();
    scene.server.set("/a/repo.tar", Answer::Bytes(Arc::new(wrong)));
    fails(&mut fetch(), 3, "/a/manifest.json");
    assert_eq!(names(&kept), [""; 0]);
}

#[test]
fn a_signal_ends_it_and_nothing_is_left() {
    let scene = Scene::new();
    let Offer { served, tarball } = serve(&scene);
    scene.server.set("/a/repo.tar", Answer::Stall(tarball.clone(), tarball.len() / 2));
    for signal in ["TERM", "INT"] {
        let mut child = scene.fetch(&served).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while names(&scene.path("out")).is_empty() {
            assert!(Instant::now() < deadline, "the download did not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        ok(tool("kill").args(["-s", signal, &child.id().to_string()]));
        let ended = child.wait().unwrap();
        assert_eq!(ended.code(), Some(1));
        let log = std::io::read_to_string(child.stderr.unwrap()).unwrap();
        assert!(log.contains("stopped by a signal"), "{log}");
        assert_eq!(names(&scene.path("out")), [""; 0]);
    }
}

#[test]
fn a_redirect_never_carries_the_token_away() {
    let scene = Scene::new();
    let Offer { served, .. } = serve(&scene);
    let front = Static::start();
    let token = scene.path("token");
    fs::write(&token, "secret\n").unwrap();
    front.set("/b/manifest.json", Answer::Redirect("/c/manifest.json".to_owned()));
    front.set("/c/manifest.json", Answer::Redirect(served.url.clone()));
    let at_front = Served { url: front.url("/b/manifest.json"), digest: served.digest.clone() };
    arrives(&scene, scene.fetch(&at_front).arg("--token-file").arg(&token));
    for path in ["/b/manifest.json", "/c/manifest.json"] {
        assert_eq!(front.seen(path)[0].headers.get("authorization").map(String::as_str), Some("Bearer secret"));
    }
    for path in ["/a/manifest.json", "/a/repo.tar"] {
        assert!(!scene.server.seen(path)[0].headers.contains_key("authorization"), "{path}");
    }
    arrives(&scene, scene.fetch(&served).arg("--token-file").arg(&token));
    for path in ["/a/manifest.json", "/a/repo.tar"] {
        let seen = scene.server.seen(path).pop().unwrap();
        assert_eq!(seen.headers.get("authorization").map(String::as_str), Some("Bearer secret"), "{path}");
    }
    // To files, or round and round, it does not lead.
    for (to, reason) in [("file:///etc/passwd", "manifest.json"), ("/b/manifest.json", "redirects")] {
        front.set("/b/manifest.json", Answer::Redirect(to.to_owned()));
        let done = run(&mut scene.fetch(&at_front));
        assert!(done.code != 0 && done.stderr.contains(reason), "{done:?}");
    }
}

#[test]
fn a_token_that_is_replaced_on_the_way_is_read_anew() {
    let scene = Scene::new();
    let Offer { served, tarball } = serve(&scene);
    let token = scene.path("token");
    fs::write(&token, "first\n").unwrap();
    let whole = Answer::Ranged(tarball.clone(), "\"v\"", usize::MAX);
    scene.server.set_all("/a/repo.tar", [Answer::Stalling(tarball.clone(), "\"v\"", tarball.len() / 2), whole]);
    let mut command = scene.fetch(&served);
    command.args(["--stall-timeout", "2", "--retries", "1", "--token-file"]).arg(&token);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    e2e::wait_for(|| scene.server.seen("/a/repo.tar").len() == 1, "the download to begin");
    fs::write(&token, "second\n").unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let tokens: Vec<_> =
        scene.server.seen("/a/repo.tar").into_iter().map(|seen| seen.headers["authorization"].clone()).collect();
    assert_eq!(tokens, ["Bearer first", "Bearer second"]);
}

#[test]
fn a_redirect_to_tls_is_trusted_as_the_system_does() {
    let scene = Scene::new();
    let artifact = scene.artifact();
    let served = artifact.serve(&scene.server, "/a");
    let authority = Authority::new();
    let (cert, key) = (scene.path("tls.crt"), scene.path("tls.key"));
    authority.issue("endpoint.test", &cert, &key);
    let mut endpoint = Endpoint::start();
    let manifest = ok(tool("curl").args(["-sSf", &served.url])).stdout.into_bytes();
    assert_eq!(endpoint.put(&file("demo", "1", "repo.tar"), &artifact.tarball()).status, 201);
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest).status, 201);
    endpoint.kill();
    let mut command = endpoint.command();
    command.arg("--tls-cert").arg(&cert).arg("--tls-key").arg(&key);
    endpoint.run(command);
    let secure = endpoint.url(&file("demo", "1", "manifest.json")).replace("http://", "https://");
    scene.server.set("/a/manifest.json", Answer::Redirect(secure));
    arrives(&scene, scene.fetch(&served).env("SSL_CERT_FILE", authority.ca()).env_remove("SSL_CERT_DIR"));
    // Where the system trusts nobody, plain HTTP works all the same.
    let empty = scene.path("empty");
    fs::write(&empty, "").unwrap();
    let nobody = |command: &mut Command| {
        command.env("SSL_CERT_FILE", &empty).env_remove("SSL_CERT_DIR");
    };
    let mut command = scene.fetch(&served);
    nobody(&mut command);
    fails(&mut command, 1, "certificate");
    let served = artifact.serve(&scene.server, "/a");
    let mut command = scene.fetch(&served);
    nobody(&mut command);
    arrives(&scene, &mut command);
}

#[test]
fn a_rejected_object_ends_the_download() {
    let scene = Scene::new();
    let tree = scene.path("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("large"), crate::noise(64 << 20)).unwrap();
    (0..10).for_each(|number| fs::write(tree.join(number.to_string()), number.to_string()).unwrap());
    commit(&scene.path("source"), &tree, "1");
    let mut artifact = Artifact::of(&scene.path("source"));
    let first = artifact.entries.iter_mut().find(|entry| entry.path.starts_with("objects/")).unwrap();
    assert!(first.content.len() < 1 << 20, "the large one comes first");
    let (name, mut content) = (first.path["objects/".len()..].replace('/', ""), first.content.clone());
    content[0] ^= 1;
    first.replace(content);
    let served = artifact.serve(&scene.server, "/a");
    let proxy = Proxy::start(scene.server.url("").strip_prefix("http://").unwrap(), || u64::MAX);
    let through = Served { url: format!("{}/a/manifest.json", proxy.url()), digest: served.digest.clone() };
    fails(&mut scene.fetch(&through), 3, &name);
    // Some of it was on the way.
    assert!(proxy.passed() < 40 << 20, "{} bytes were sent", proxy.passed());
    // That the connection breaks later is not the reason.
    let tarball = Arc::new(artifact.tarball());
    let end = tarball.len() - (63 << 20);
    scene.server.set("/a/repo.tar", Answer::Cut(tarball, end));
    for _ in 0..5 {
        fails(&mut scene.fetch(&served), 3, &name);
    }
}

#[test]
fn proxies_come_from_the_environment() {
    let scene = Scene::new();
    let Offer { mut served, tarball } = serve(&scene);
    let manifest = ok(tool("curl").args(["-sSf", "--noproxy", "*", &served.url])).stdout.into_bytes();
    served.url = "http://endpoint.test/a/manifest.json".to_owned();
    scene.server.set(&served.url, Answer::Bytes(Arc::new(manifest)));
    scene.server.set("http://endpoint.test/a/repo.tar", Answer::Bytes(tarball));
    let mut command = scene.fetch(&served);
    arrives(&scene, command.env("http_proxy", scene.server.url("")).env_remove("no_proxy").env_remove("NO_PROXY"));
    let mut command = scene.fetch(&served);
    fails(command.env("http_proxy", scene.server.url("")).env("no_proxy", "endpoint.test"), 1, "endpoint.test");
}

#[test]
fn a_real_endpoint_behind_a_proxy_that_cuts() {
    let scene = Scene::new();
    let artifact = scene.artifact();
    let tarball = artifact.tarball();
    let served = artifact.serve(&scene.server, "/a");
    let mut endpoint = Endpoint::start();
    let manifest = ok(tool("curl").args(["-sSf", &served.url])).stdout.into_bytes();
    assert_eq!(endpoint.put(&file("demo", "1", "repo.tar"), &tarball).status, 201);
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest).status, 201);
    let mut random = Random(3);
    let part = tarball.len() / 12;
    let proxy = Proxy::start(&endpoint.server().address, move || (1000 + part + random.below(part)) as u64);
    let through =
        Served { url: format!("{}{}", proxy.url(), file("demo", "1", "manifest.json")), digest: served.digest.clone() };
    arrives(&scene, scene.fetch(&through).args(["--retries", "2"]));
    let carried = proxy.passed() as usize;
    assert!(carried < tarball.len() * 3 / 2, "{carried} bytes for {}", tarball.len());
    // And the endpoint may come back elsewhere in the middle.
    let child = scene.fetch(&through).args(["--retries", "5"]).stderr(Stdio::piped()).stdout(Stdio::null()).spawn();
    endpoint.restart();
    proxy.lead_to(&endpoint.server().address);
    let done = child.unwrap().wait_with_output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    ostree(&scene.path("out/repo"), &["fsck"]);
}
