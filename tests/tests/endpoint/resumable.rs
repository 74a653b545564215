//! Uploads that are resumed: the protocol by hand, and `publish` through breaks and kills.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::endpoint::{Endpoint, Reply, TOKEN, bearer, curl, file, manifest, noise, packed};
use e2e::proxy::Proxy;
use e2e::store::Kind;
use e2e::{builder, fails, ok, on_each_store, run, tool, wait_for};
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::protocol::digest_header;

/// An upload by hand, of a tarball to version 1 of demo.
struct Upload<'a> {
    endpoint: &'a Endpoint,
    path: String,
}

impl<'a> Upload<'a> {
    #[track_caller]
    fn begin(endpoint: &'a Endpoint, version: &str, tarball: &[u8]) -> Self {
        let reply = begin(endpoint, version, tarball.len(), &Digest::of(tarball));
        assert_eq!((reply.status, reply.header("upload-complete")), (201, Some("?0")), "{reply:?}");
        assert_eq!(reply.header("upload-offset"), Some("0"));
        assert!(reply.header("upload-limit").unwrap().contains("max-size="), "{reply:?}");
        let location = reply.header("location").unwrap();
        let path = format!("/v1/uploads/demo/{version}/sha256-{}", Digest::of(tarball).hex());
        assert_eq!(location.strip_prefix("../../../"), path.strip_prefix("/v1/"), "relative to the file");
        Self { endpoint, path }
    }

    #[track_caller]
    fn patch(&self, bytes: &[u8], offset: usize, complete: bool) -> Reply {
        let part = self.endpoint.file("part", bytes);
        let mut command = curl();
        command.args(["-X", "PATCH", "-H", &bearer(), "-H", "Content-Type: application/partial-upload"]);
        command.args(["-H", &format!("Upload-Offset: {offset}"), "-H"]);
        command.arg(format!("Upload-Complete: ?{}", u8::from(complete)));
        command.arg("--data-binary").arg(format!("@{}", part.display())).arg(self.endpoint.url(&self.path));
        Reply::of(&mut command)
    }

    /// The offset, or the status where there is no such upload.
    #[track_caller]
    fn offset(&self) -> Result<usize, u16> {
        let reply = self.endpoint.curl(&self.path, &["-I", "-H", &bearer()]);
        if reply.status != 204 {
            return Err(reply.status);
        }
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        Ok(reply.header("upload-offset").unwrap().parse().unwrap())
    }
}

#[track_caller]
fn begin(endpoint: &Endpoint, version: &str, length: usize, digest: &Digest) -> Reply {
    let (length, digest) = (format!("Upload-Length: {length}"), format!("Repr-Digest: {}", digest_header(digest)));
    let arguments = ["-X", "PUT", "-H", "Upload-Complete: ?0", "-H", &length, "-H", &digest, "-H", &bearer()];
    endpoint.curl(&file("demo", version, "repo.tar"), &arguments)
}

on_each_store!(
    parts_make_a_whole,
    what_is_no_good_part_is_refused,
    a_break_loses_nothing_and_a_new_request_ends_the_old_one,
    what_is_left_unfinished_goes_after_a_while,
    publish_goes_on_after_every_cut,
    a_tarball_that_was_damaged_on_the_way_is_sent_again,
    two_uploads_of_the_same_are_both_right_and_of_two_the_first_wins,
    a_deletion_ends_uploads_and_loses_nothing_that_was_stored,
    what_somebody_asks_for_stays,
);
// Google's emulator takes one request at a time, in Python: too slow for so many starts.
e2e::on_stores!(kills_at_random_moments_lose_nothing: directory Directory, s3 S3, swift Swift, azure Azure);

fn parts_make_a_whole(kind: Kind) {
    let mut endpoint = Endpoint::on(kind, &["--max-size", "8MiB"]);
    let tarball = noise(3_000_000, 30);
    let path = file("demo", "1", "repo.tar");
    let upload_path = {
        let upload = Upload::begin(&endpoint, "1", &tarball);
        let reply = upload.patch(&tarball[..1_000_000], 0, false);
        assert_eq!((reply.status, reply.header("upload-offset")), (204, Some("1000000")), "{reply:?}");
        assert_eq!(reply.header("upload-complete"), Some("?0"));
        assert_eq!(upload.offset(), Ok(1_000_000));
        // A client that lost everything begins again and learns where it was.
        let again = begin(&endpoint, "1", tarball.len(), &Digest::of(&tarball));
        assert_eq!((again.status, again.header("upload-offset")), (200, Some("1000000")));
        for wrong in [0, 999_999, 1_000_001] {
            let reply = upload.patch(&tarball[..10], wrong, false);
            assert_eq!((reply.status, reply.header("upload-offset")), (409, Some("1000000")));
        }
        upload.path
    };
    endpoint.restart();
    let upload = Upload { endpoint: &endpoint, path: upload_path };
    assert_eq!(upload.offset(), Ok(1_000_000), "a restart loses nothing");
    assert_eq!(upload.patch(&tarball[1_000_000..2_000_000], 1_000_000, false).status, 204);
    assert_eq!(endpoint.curl(&path, &[]).status, 404);
    let done = upload.patch(&tarball[2_000_000..], 2_000_000, true);
    assert_eq!((done.status, done.header("upload-complete")), (201, Some("?1")), "{done:?}");
    assert_eq!(done.header("etag"), Some(format!("\"{}\"", Digest::of(&tarball)).as_str()));
    assert_eq!(upload.offset(), Ok(tarball.len()));
    assert_eq!(upload.patch(b"", tarball.len(), true).status, 400, "it is complete already");
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest("demo", "1", &tarball)).status, 201);
    assert_eq!(endpoint.curl(&path, &[]).body, tarball);
    let again = begin(&endpoint, "1", tarball.len(), &Digest::of(&tarball));
    assert_eq!((again.status, again.header("upload-complete")), (200, Some("?1")));
    assert_eq!(begin(&endpoint, "1", 5, &Digest::of(b"other")).status, 409, "artifacts are immutable");

    // All bytes in parts that say nothing of the end, then the word that it is.
    let upload = Upload::begin(&endpoint, "2", &tarball);
    assert_eq!(upload.patch(&tarball, 0, false).status, 204);
    assert_eq!(upload.patch(b"", tarball.len(), true).status, 201);
    assert!(!endpoint.stored().iter().any(|path| path.starts_with("uploads/")), "{:?}", endpoint.stored());
}

fn what_is_no_good_part_is_refused(kind: Kind) {
    let endpoint = Endpoint::on(kind, &["--max-size", "1MiB"]);
    let tarball = noise(100_000, 31);
    let digest = Digest::of(&tarball);
    let path = file("demo", "1", "repo.tar");
    let options = endpoint.curl(&path, &["-X", "OPTIONS"]);
    assert_eq!((options.status, options.header("accept-patch")), (204, Some("application/partial-upload")));
    assert!(options.header("upload-limit").unwrap().contains("max-size=1048576"), "{options:?}");

    let large = begin(&endpoint, "1", 2 << 20, &digest);
    assert_eq!(large.status, 413);
    assert!(large.header("upload-limit").unwrap().contains("max-size=1048576"), "{large:?}");
    let auth = bearer();
    let repr = format!("Repr-Digest: {}", digest_header(&digest));
    let incomplete = ["-X", "PUT", "-H", "Upload-Complete: ?0", "-H", &auth];
    for more in [&["-H", &repr][..], &["-H", "Upload-Length: 5"], &["-H", &repr, "-H", "Upload-Length: -5"]] {
        assert_eq!(endpoint.curl(&path, &[&incomplete, more].concat()).status, 400, "{more:?}");
    }
    let filled = ["-H", &repr, "-H", "Upload-Length: 5", "-d", "x"];
    assert_eq!(endpoint.curl(&path, &[&incomplete[..], &filled].concat()).status, 400);
    let small = ["-H", &repr, "-H", "Upload-Length: 5"];
    assert_eq!(endpoint.curl(&file("demo", "1", "manifest.json"), &[&incomplete[..], &small].concat()).status, 400);

    let upload = Upload::begin(&endpoint, "1", &tarball);
    assert_eq!(begin(&endpoint, "1", 5, &digest).status, 400, "one digest has one length");
    for method in ["HEAD", "PATCH", "DELETE"] {
        assert_eq!(endpoint.curl(&upload.path, &["-I", "-X", method]).status, 401);
    }
    let part = ["-X", "PATCH", "-H", &auth, "-d", "x"];
    let kind = ["-H", "Content-Type: application/partial-upload"];
    let complete = ["-H", "Upload-Complete: ?0"];
    assert_eq!(endpoint.curl(&upload.path, &[&part[..], &complete, &["-H", "Upload-Offset: 0"]].concat()).status, 415);
    assert_eq!(endpoint.curl(&upload.path, &[&part[..], &kind, &complete].concat()).status, 400);
    assert_eq!(endpoint.curl(&upload.path, &[&part[..], &kind, &["-H", "Upload-Offset: 0"]].concat()).status, 400);
    assert_eq!(upload.patch(&tarball[..5], 0, true).status, 400, "that is not all");
    assert_eq!(upload.patch(&[&tarball[..], b"x"].concat(), 0, true).status, 400, "that is more");
    assert_eq!(upload.offset(), Ok(0));
    // Without a length it shows only when it is too late.
    let body = endpoint.file("long", &[&tarball[..], b"x"].concat());
    let data = format!("@{}", body.display());
    let chunked = ["-H", "Transfer-Encoding: chunked", "-H", "Upload-Offset: 0", "--data-binary", &data];
    assert_eq!(endpoint.curl(&upload.path, &[&part[..4], &kind, &complete, &chunked].concat()).status, 400);
    assert_eq!(upload.offset(), Err(404), "the draft wants it gone");

    // The digest was promised; what it is not is thrown away.
    let upload = Upload::begin(&endpoint, "1", &tarball);
    let mut flipped = tarball.clone();
    flipped[500] ^= 1;
    assert_eq!(upload.patch(&flipped[..1000], 0, false).status, 204);
    let reply = upload.patch(&flipped[1000..], 1000, true);
    assert_eq!((reply.status, reply.header("upload-complete")), (422, Some("?1")), "{reply:?}");
    assert_eq!(upload.offset(), Err(404));
    let upload = Upload::begin(&endpoint, "1", &tarball);
    assert_eq!(endpoint.curl(&upload.path, &["-X", "DELETE", "-H", &auth]).status, 204);
    assert_eq!(endpoint.curl(&upload.path, &["-X", "DELETE", "-H", &auth]).status, 404);
    for bad in ["sha256-00", "..%2f..%2fversion.json", "sha512-00"] {
        let path = format!("/v1/uploads/demo/1/{bad}");
        assert_eq!(endpoint.curl(&path, &["-I", "-H", &auth]).status, 404, "{path}");
    }
    assert_eq!(endpoint.stored(), [""; 0]);
}

fn a_break_loses_nothing_and_a_new_request_ends_the_old_one(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let tarball = noise(8_000_000, 32);
    let upload = Upload::begin(&endpoint, "1", &tarball);
    let send = |start: usize, end: usize| {
        let mut stream = TcpStream::connect(&endpoint.server().address).unwrap();
        let head = format!(
            "PATCH {} HTTP/1.1\r\nHost: x\r\n{}\r\nContent-Type: application/partial-upload\r\n\
             Upload-Offset: {start}\r\nUpload-Complete: ?1\r\nContent-Length: {}\r\n\r\n",
            upload.path,
            bearer(),
            tarball.len() - start
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&tarball[start..end]).unwrap();
        stream
    };
    drop(send(0, 2_500_001));
    endpoint.received(2_500_001);
    assert_eq!(upload.offset(), Ok(2_500_001), "every byte that came is kept");
    // This one stays connected and says nothing: its client has another connection now.
    let _silent = send(2_500_001, 5_000_003);
    endpoint.received(4_500_000);
    let start = Instant::now();
    let offset = upload.offset().unwrap();
    assert!((4_500_000..=5_000_003).contains(&offset), "{offset}");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let _silent = send(offset, 6_000_000);
    endpoint.received(5_500_000);
    let offset = upload.offset().unwrap();
    let reply = upload.patch(&tarball[offset..], offset, true);
    assert_eq!(reply.status, 201, "{reply:?}");
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest("demo", "1", &tarball)).status, 201);
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body, tarball);
}

fn what_is_left_unfinished_goes_after_a_while(kind: Kind) {
    let endpoint = Endpoint::on(kind, &["--upload-expiry", "2s"]);
    let tarball = noise(1000, 33);
    endpoint.store("demo", "kept", &tarball);
    let kept = endpoint.stored();
    let upload = Upload::begin(&endpoint, "1", &tarball);
    assert_eq!(upload.patch(&tarball[..10], 0, false).status, 204);
    assert_eq!(endpoint.put(&file("demo", "2", "repo.tar"), &tarball).status, 201);
    assert!(endpoint.stored().len() > kept.len());
    let deadline = Instant::now() + Duration::from_secs(20);
    while endpoint.stored() != kept {
        assert!(Instant::now() < deadline, "{:?}", endpoint.stored());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(upload.offset(), Err(404));
    assert_eq!(endpoint.curl(&file("demo", "kept", "repo.tar"), &[]).body, tarball);
    // And at once when the version is complete or deleted.
    let upload = Upload::begin(&endpoint, "3", &noise(2000, 34));
    endpoint.store("demo", "3", &tarball);
    assert_eq!(upload.offset(), Err(404));
    let upload = Upload::begin(&endpoint, "4", &tarball);
    assert_eq!(endpoint.put(&file("demo", "4", "repo.tar"), b"x").status, 201);
    assert_eq!(endpoint.curl("/v1/artifacts/demo/4", &["-X", "DELETE", "-H", &bearer()]).status, 204);
    assert_eq!(upload.offset(), Err(404));
}

fn what_somebody_asks_for_stays(kind: Kind) {
    let endpoint = Endpoint::on(kind, &["--upload-expiry", "4s"]);
    let tarball = noise(1000, 43);
    assert_eq!(endpoint.put(&file("demo", "1", "repo.tar"), &tarball).status, 201);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        let reply = begin(&endpoint, "1", tarball.len(), &Digest::of(&tarball));
        assert_eq!((reply.status, reply.header("upload-complete")), (200, Some("?1")), "{reply:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest("demo", "1", &tarball)).status, 201);
}

/// Segments of plain uploads that take longer than what is unfinished is kept.
#[test]
fn an_upload_under_way_is_not_left_unfinished() {
    let endpoint = Endpoint::on(Kind::S3, &["--upload-expiry", "2s"]);
    let tarball = noise(40_000_000, 44);
    let path = file("demo", "1", "repo.tar");
    let mut stream = send(&endpoint, &format!("PUT {path}"), &tarball);
    wait_for(|| endpoint.stored().iter().any(|path| path.starts_with("segments/")), "the first segment");
    std::thread::sleep(Duration::from_secs(6));
    stream.write_all(&tarball[30_000_000..]).unwrap();
    assert_eq!(status(stream), 201);
    assert_eq!(endpoint.put(&file("demo", "1", "manifest.json"), &manifest("demo", "1", &tarball)).status, 201);
    assert!(endpoint.curl(&path, &[]).body == tarball);
}

/// Sends a request with the first 30 MB of `tarball`.
fn send(endpoint: &Endpoint, request: &str, tarball: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(&endpoint.server().address).unwrap();
    let head = format!(
        "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{}\r\nContent-Type: application/partial-upload\r\n\
         Upload-Offset: 0\r\nUpload-Complete: ?1\r\nContent-Length: {}\r\n\r\n",
        bearer(),
        tarball.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&tarball[..30_000_000]).unwrap();
    stream
}

/// The status of the answer; 0 where the connection broke.
fn status(mut stream: TcpStream) -> u16 {
    let mut head = [0; 12];
    let read = stream.read_exact(&mut head);
    read.map_or(0, |()| String::from_utf8_lossy(&head[9..]).parse().unwrap())
}

fn a_deletion_ends_uploads_and_loses_nothing_that_was_stored(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let tarball = noise(40_000_000, 42);
    let (path, version) = (file("demo", "1", "repo.tar"), "/v1/artifacts/demo/1");
    let under_way = || {
        // Of a segment at least nobody has to wait for it any more.
        let stored = endpoint.stored();
        kind == Kind::Directory || stored.iter().any(|path| path.starts_with("segments/demo/1/"))
    };
    for (resumed, received) in [(true, 29_000_000), (false, 59_000_000)] {
        let request = if resumed {
            format!("PATCH {}", Upload::begin(&endpoint, "1", &tarball).path)
        } else {
            format!("PUT {path}")
        };
        let mut stream = send(&endpoint, &request, &tarball);
        endpoint.received(received);
        wait_for(under_way, "the first segment");
        let deleted = endpoint.curl(version, &["-X", "DELETE", "-H", &bearer()]).status;
        // Of what comes in one request a directory has nothing below the version's name yet.
        let apart = kind == Kind::Directory && !resumed;
        assert_eq!(deleted, if apart { 404 } else { 204 });
        // It may have got its answer already.
        let _ = stream.write_all(&tarball[30_000_000..]);
        let answer = status(stream);
        assert!(if apart { answer == 201 } else { [503, 0].contains(&answer) }, "{answer}, resumed: {resumed}");
        if !apart {
            wait_for(|| endpoint.stored().is_empty(), "everything to be gone");
        }
    }
    let dir = endpoint.path("packed");
    packed(&dir, "1", &tarball);
    ok(&mut publish(&endpoint.url(""), &dir));
    assert!(endpoint.curl(&path, &[]).body == tarball);
}

fn publish(url: &str, dir: &Path) -> Command {
    let mut command = builder();
    let token = dir.with_file_name("token");
    command.args(["publish", "--endpoint", url, "--token-file"]).arg(token).arg(dir);
    command
}

/// A xorshift generator, so that every run is the same.
fn random(mut state: u64) -> impl FnMut(u64) -> u64 {
    move |limit| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    }
}

fn publish_goes_on_after_every_cut(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let tarball = noise(30_000_000, 35);
    let dir = endpoint.path("packed");
    packed(&dir, "1", &tarball);
    let mut random = random(5);
    let proxy = Proxy::start(&endpoint.server().address, move || 1_000_000 + random(8_000_000));
    let done = ok(&mut publish(&proxy.url(), &dir));
    assert!(done.stderr.contains("the upload goes on at byte"), "{done:?}");
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body, tarball);
    // A cut loses what was on the way, no more.
    assert!(proxy.passed() < 36_000_000, "{} bytes for {}", proxy.passed(), tarball.len());
}

fn a_tarball_that_was_damaged_on_the_way_is_sent_again(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let tarball = noise(5_000_000, 36);
    let dir = endpoint.path("packed");
    packed(&dir, "1", &tarball);
    let upload = Upload::begin(&endpoint, "1", &tarball);
    assert_eq!(upload.patch(&noise(1_000_000, 37), 0, false).status, 204);
    let done = ok(&mut publish(&endpoint.url(""), &dir));
    assert!(done.stderr.contains("the upload starts again"), "{done:?}");
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body, tarball);
}

fn two_uploads_of_the_same_are_both_right_and_of_two_the_first_wins(kind: Kind) {
    let endpoint = Endpoint::on(kind, &[]);
    let (dir, other) = (endpoint.path("packed"), endpoint.path("other"));
    packed(&dir, "1", &noise(20_000_000, 38));
    let spawn = |dir: &Path| publish(&endpoint.url(""), dir).stderr(Stdio::piped()).stdout(Stdio::null()).spawn();
    let same: Vec<_> = (0..3).map(|_| spawn(&dir).unwrap()).collect();
    for child in same {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    packed(&dir, "2", &noise(20_000_000, 39));
    packed(&other, "2", &noise(20_000_000, 40));
    let both = [spawn(&dir).unwrap(), spawn(&other).unwrap()];
    let mut codes: Vec<_> = both.into_iter().map(|mut child| child.wait().unwrap().code()).collect();
    codes.sort_unstable();
    assert_eq!(codes, [Some(0), Some(3)]);
    assert!(!endpoint.stored().iter().any(|path| path.starts_with("uploads/")), "{:?}", endpoint.stored());
}

fn kills_at_random_moments_lose_nothing(kind: Kind) {
    let rounds: u64 = std::env::var("FAULT_ROUNDS").map_or(20, |rounds| rounds.parse().unwrap());
    let mut endpoint = Endpoint::on(kind, &[]);
    let dir = endpoint.path("packed");
    let proxy = Proxy::start(&endpoint.server().address, || u64::MAX);
    let mut random = random(11);
    let (mut version, mut kills, mut whole) = (0, 0, Vec::new());
    let mut tarball = Vec::new();
    while kills < rounds {
        if tarball.is_empty() {
            version += 1;
            tarball = noise(40_000_000, 1000 + version);
            packed(&dir, &version.to_string(), &tarball);
        }
        let mut client = publish(&proxy.url(), &dir).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(20 + random(300)));
        if let Some(ended) = client.try_wait().unwrap() {
            assert!(ended.success(), "version {version}");
            whole.push((version, Digest::of(&tarball)));
            tarball.clear();
            continue;
        }
        kills += 1;
        if random(2) == 0 {
            client.kill().unwrap();
        } else {
            // Some die in the middle of a removal, which is asked for again then.
            let removed = if !whole.is_empty() && random(2) == 0 {
                let (version, _) = whole.remove(random(whole.len() as u64) as usize);
                let path = format!("/v1/artifacts/demo/{version}");
                let mut command = curl();
                command.args(["-X", "DELETE", "-H", &bearer()]).arg(endpoint.url(&path));
                let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
                std::thread::sleep(Duration::from_millis(random(60)));
                Some((path, child))
            } else {
                None
            };
            endpoint.restart();
            if let Some((path, mut child)) = removed {
                child.wait().unwrap();
                let status = endpoint.curl(&path, &["-X", "DELETE", "-H", &bearer()]).status;
                assert!([204, 404].contains(&status), "{status} {path}");
            }
            proxy.lead_to(&endpoint.server().address);
            // It goes on with the endpoint that came back.
            if random(2) == 0 {
                assert!(client.wait().unwrap().success(), "version {version}");
            } else {
                client.kill().unwrap();
            }
        }
        client.wait().unwrap();
    }
    if !tarball.is_empty() {
        ok(&mut publish(&proxy.url(), &dir));
        whole.push((version, Digest::of(&tarball)));
    }
    for (version, digest) in &whole {
        let path = endpoint.path("got");
        ok(curl().arg("-fo").arg(&path).arg(endpoint.url(&file("demo", &version.to_string(), "repo.tar"))));
        assert!(ok(tool("sha256sum").arg(&path)).stdout.starts_with(&digest.hex()), "version {version}");
    }
    // Each version has its record, manifest and tarball or index, and there is nothing else.
    let files = endpoint.stored();
    let (segments, others): (Vec<_>, Vec<_>) = files.iter().partition(|path| path.starts_with("segments/"));
    assert_eq!(others.len(), 3 * whole.len(), "{files:?}");
    let bytes: u64 = segments.iter().map(|path| path.rsplit('-').nth(1).unwrap().parse::<u64>().unwrap()).sum();
    assert_eq!(bytes, if kind == Kind::Directory { 0 } else { 40_000_000 * whole.len() as u64 }, "{files:?}");
    assert!(!endpoint.log().contains("ERROR"), "{}", endpoint.log());
}

#[test]
fn a_full_disk_damages_nothing() {
    let mut endpoint = Endpoint::start();
    endpoint.kill();
    let inner = endpoint.command();
    let mut command = tool("bash");
    command.args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$@\"", "bash"]).arg(inner.get_program());
    command.args(inner.get_args()).arg("--token-file").arg(endpoint.path("token"));
    endpoint.run(command);
    let tarball = noise(3_000_000, 41);
    let dir = endpoint.path("packed");
    packed(&dir, "1", &tarball);
    fails(publish(&endpoint.url(""), &dir).env("OSCONTAINER_RETRIES", "0"), 1, "");
    // There is room again: it goes on.
    endpoint.restart();
    let done = ok(&mut publish(&endpoint.url(""), &dir));
    assert!(done.stderr.contains("the upload goes on at byte 1048576"), "{done:?}");
    assert_eq!(endpoint.curl(&file("demo", "1", "repo.tar"), &[]).body, tarball);
    assert!(!run(&mut publish(&endpoint.url(""), &dir)).stderr.contains(TOKEN));
}
