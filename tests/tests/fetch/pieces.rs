//! A large tarball comes in pieces over several connections, where that can be.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use e2e::artifacts::{Artifact, Served, commit};
use e2e::endpoint::{Endpoint, file};
use e2e::http::Answer;
use e2e::proxy::Proxy;
use e2e::{fails, ok, run, tool, wait_for};

use crate::transfer::{Offer, arrives, starts};
use crate::{Scene, names, noise};

/// Bytes of a piece.
const PIECE: usize = 8 << 20;

/// An artifact at `/a` of some pieces, the last one short.
fn serve(scene: &Scene) -> Offer {
    let tree = scene.path("tree");
    fs::create_dir_all(&tree).unwrap();
    fs::write(tree.join("large"), noise(4 * PIECE + 100_000)).unwrap();
    commit(&scene.path("source"), &tree, "1.0");
    let artifact = Artifact::of(&scene.path("source"));
    Offer { served: artifact.serve(&scene.server, "/a"), tarball: Arc::new(artifact.tarball()) }
}

fn ranged(offer: &Offer, limit: usize) -> Answer {
    Answer::Ranged(offer.tarball.clone(), "\"v\"", limit)
}

fn fetch(scene: &Scene, offer: &Offer, arguments: &[&str]) -> Command {
    let mut command = scene.fetch(&offer.served);
    command.args(arguments);
    command
}

#[test]
fn each_piece_is_asked_for_once_whatever_breaks() {
    let scene = Scene::new();
    let offer = serve(&scene);
    let size = offer.tarball.len();
    scene.server.set("/a/repo.tar", ranged(&offer, usize::MAX));
    arrives(&scene, &mut fetch(&scene, &offer, &[]));
    let wanted =
        |step: usize| (0..size).step_by(PIECE).flat_map(move |piece| (piece..size.min(piece + PIECE)).step_by(step));
    let mut asked = starts(&scene.server);
    asked.sort_unstable();
    assert!(asked.iter().copied().eq(wanted(PIECE)), "{asked:?}");
    for seen in scene.server.seen("/a/repo.tar").iter().filter(|seen| !seen.headers["range"].starts_with("bytes=0-")) {
        assert_eq!(seen.headers["if-range"], "\"v\"");
    }
    // Each answer breaks off: the rest of its piece is asked for, and nothing comes twice.
    let part = 3_000_000;
    scene.server.set("/a/repo.tar", ranged(&offer, part));
    let before = asked.len();
    arrives(&scene, &mut fetch(&scene, &offer, &["--retries", "1"]));
    let mut asked = starts(&scene.server).split_off(before);
    asked.sort_unstable();
    assert!(asked.iter().copied().eq(wanted(part)), "{asked:?}");

    // One connection is one request.
    scene.server.set("/a/repo.tar", ranged(&offer, usize::MAX));
    let before = before + asked.len();
    arrives(&scene, &mut fetch(&scene, &offer, &["--connections", "1"]));
    assert_eq!(starts(&scene.server)[before..], [0]);
    assert!(!scene.server.seen("/a/repo.tar")[before].headers.contains_key("range"));
    assert_eq!(run(&mut fetch(&scene, &offer, &["--connections", "0"])).code, 2);
}

#[test]
fn a_server_that_gives_one_connection_will_do() {
    let scene = Scene::new();
    let offer = serve(&scene);
    let whole = || Answer::Bytes(offer.tarball.clone());
    // It knows no ranges, from the start or suddenly.
    scene.server.set("/a/repo.tar", whole());
    arrives(&scene, &mut fetch(&scene, &offer, &[]));
    scene.server.set_all("/a/repo.tar", [ranged(&offer, usize::MAX), ranged(&offer, usize::MAX), whole()]);
    arrives(&scene, &mut fetch(&scene, &offer, &[]));
    // It is busy when more than one comes.
    let before = starts(&scene.server).len();
    scene.server.set_all("/a/repo.tar", [ranged(&offer, usize::MAX), Answer::Busy("1"), ranged(&offer, usize::MAX)]);
    arrives(&scene, &mut fetch(&scene, &offer, &["--retries", "1"]));
    let seen = scene.server.seen("/a/repo.tar").split_off(before);
    assert!(seen.last().unwrap().headers["range"].ends_with('-'), "{seen:?}");
    // What has another validator is another file: its bytes are not mixed in unseen.
    let mut other = offer.tarball.to_vec();
    other[3 * PIECE] ^= 1;
    let other = Answer::Ranged(Arc::new(other), "\"w\"", usize::MAX);
    scene.server.set_all("/a/repo.tar", [ranged(&offer, usize::MAX), other]);
    fails(&mut fetch(&scene, &offer, &[]), 3, "/a/manifest.json");
    scene.server.set_all("/a/repo.tar", [ranged(&offer, usize::MAX), Answer::Status(404)]);
    fails(&mut fetch(&scene, &offer, &[]), 3, "404");
    assert_eq!(names(&scene.path("out")), [""; 0]);
}

#[test]
fn the_next_run_goes_on_after_the_pieces_that_follow_each_other() {
    let scene = Scene::new();
    let offer = serve(&scene);
    let kept = scene.path("kept");
    let arguments = ["--resume-dir", kept.to_str().unwrap()];
    let stall = Answer::Stalling(offer.tarball.clone(), "\"v\"", 5_000_000);
    scene.server.set_all("/a/repo.tar", [ranged(&offer, usize::MAX), stall]);
    let mut child = fetch(&scene, &offer, &arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let length = || Some(fs::metadata(kept.join(names(&kept).pop()?)).unwrap().len() as usize);
    wait_for(|| kept.exists() && length() == Some(PIECE + 5_000_000), "the second piece");
    child.kill().unwrap();
    child.wait().unwrap();
    scene.server.set("/a/repo.tar", ranged(&offer, usize::MAX));
    let before = starts(&scene.server).len();
    arrives(&scene, &mut fetch(&scene, &offer, &arguments));
    assert_eq!(starts(&scene.server)[before], PIECE + 5_000_000);
    assert_eq!(names(&kept), [""; 0]);
}

/// Where each connection is slow, four are faster than one; through a proxy that cuts them all,
/// from a real endpoint, it arrives too.
#[test]
fn several_connections_are_faster_where_each_is_slow() {
    let scene = Scene::new();
    let offer = serve(&scene);
    let endpoint = Endpoint::start();
    let manifest = ok(tool("curl").args(["-sSf", "--noproxy", "*", &offer.served.url])).stdout.into_bytes();
    assert_eq!(endpoint.put(&file("demo", "1", "repo.tar"), &offer.tarball).status, 201);
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest).status, 201);
    let through = |proxy: &Proxy| Served {
        url: format!("{}{}", proxy.url(), file("demo", "1", "manifest.json")),
        digest: offer.served.digest.clone(),
    };
    let slow = through(&Proxy::slow(&endpoint.server().address, 4_000_000));
    let took = |connections: &str| {
        let start = Instant::now();
        arrives(&scene, scene.fetch(&slow).args(["--connections", connections]));
        start.elapsed()
    };
    let (four, one) = (took("4"), took("1"));
    println!("{four:?} over four connections, {one:?} over one");
    assert!(one > Duration::from_secs(8) && four < one * 2 / 3, "{four:?} over four connections, {one:?} over one");

    let mut length = 1_000_000;
    let cuts = move || {
        length = length * 7 % 5_000_011;
        500_000 + length
    };
    let proxy = Proxy::start(&endpoint.server().address, cuts);
    arrives(&scene, scene.fetch(&through(&proxy)).args(["--retries", "3"]));
    let carried = proxy.passed() as usize;
    assert!(carried < offer.tarball.len() * 3 / 2, "{carried} bytes for {}", offer.tarball.len());
}
