//! The artifact endpoint by its protocol: the built endpoint and a real `curl`.
//! Any bytes serve as a tarball here, for the endpoint looks at digests only.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::{Done, Server, builder, fails, ok, run, tool};
use oscontainer_artifact::digest::{Checksum, Digest};
use oscontainer_artifact::manifest::{MEDIA_TYPE, Manifest, TARBALL_MEDIA_TYPE, Tarball};
use oscontainer_artifact::protocol::digest_header;
use tempfile::TempDir;

const TOKEN: &str = "a-long-and-secret-token-4711";

/// An endpoint on a store of its own.
struct Endpoint {
    dir: TempDir,
    server: Option<Server>,
}

impl Endpoint {
    fn start() -> Self {
        Self::with(&[])
    }

    fn with(options: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("token"), format!("{TOKEN}\n")).unwrap();
        let mut endpoint = Self { dir, server: None };
        let mut command = endpoint.command();
        command.arg("--token-file").arg(endpoint.path("token")).args(options);
        endpoint.run(command);
        endpoint
    }

    fn command(&self) -> Command {
        let mut command = builder();
        command.arg("endpoint").arg("--store").arg(self.path("store"));
        command
    }

    fn run(&mut self, mut command: Command) {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        self.server = Some(Server::start(command.stderr(log)));
    }

    fn kill(&mut self) {
        self.server = None;
    }

    fn restart(&mut self) {
        self.kill();
        let mut command = self.command();
        command.arg("--token-file").arg(self.path("token"));
        self.run(command);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.server.as_ref().unwrap().url())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// What curl gets for `arguments` at `path`.
    #[track_caller]
    fn curl(&self, path: &str, arguments: &[&str]) -> Reply {
        Reply::of(curl().args(arguments).arg(self.url(path)))
    }

    /// A PUT of `bytes` by somebody who may.
    #[track_caller]
    fn put(&self, path: &str, bytes: &[u8]) -> Reply {
        self.put_with(path, bytes, &[])
    }

    #[track_caller]
    fn put_with(&self, path: &str, bytes: &[u8], arguments: &[&str]) -> Reply {
        let mut file = tempfile::NamedTempFile::new_in(self.dir.path()).unwrap();
        file.write_all(bytes).unwrap();
        let mut command = curl();
        command.arg("-H").arg(bearer()).arg("-T").arg(file.path()).args(arguments).arg(self.url(path));
        Reply::of(&mut command)
    }

    /// Stores a whole artifact whose tarball is `tarball`; gives its manifest's bytes.
    #[track_caller]
    fn store(&self, name: &str, version: &str, tarball: &[u8]) -> Vec<u8> {
        let bytes = manifest(name, version, tarball);
        assert_eq!(self.put(&file(name, version, "repo.tar"), tarball).status, 201);
        assert_eq!(self.put(&file(name, version, "manifest.json"), &bytes).status, 201);
        bytes
    }

    /// The files in the store, relative to it.
    fn stored(&self) -> Vec<String> {
        let listed = ok(tool("find").arg(self.path("store")).args(["-type", "f", "-printf", "%P\\n"]));
        let mut files: Vec<_> = listed.stdout.lines().map(str::to_owned).collect();
        files.sort();
        files
    }
}

/// A response as curl saw it.
#[derive(Debug)]
struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Reply {
    #[track_caller]
    fn of(command: &mut Command) -> Self {
        let dir = TempDir::new().unwrap();
        let (head, body) = (dir.path().join("head"), dir.path().join("body"));
        fs::write(&body, "").unwrap();
        let done = run(command.arg("-D").arg(&head).arg("-o").arg(&body).args(["-w", "%{http_code}"]));
        let status = done.stdout.parse().unwrap_or_else(|e| panic!("{command:?}: {e}: {done:?}"));
        Self { status, head: fs::read_to_string(head).unwrap_or_default(), body: fs::read(body).unwrap() }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// A header's value in the last response.
    fn header(&self, name: &str) -> Option<&str> {
        let last = self.head.trim_end().rsplit("\r\n\r\n").next().unwrap();
        last.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

fn curl() -> Command {
    let mut command = tool("curl");
    command.args(["-sS", "--max-time", "60", "--path-as-is"]);
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command
}

fn bearer() -> String {
    format!("Authorization: Bearer {TOKEN}")
}

fn file(name: &str, version: &str, file: &str) -> String {
    format!("/v1/artifacts/{name}/{version}/{file}")
}

/// The manifest of a made-up commit in `tarball`.
fn manifest(name: &str, version: &str, tarball: &[u8]) -> Vec<u8> {
    let manifest = Manifest {
        schema_version: 1,
        media_type: MEDIA_TYPE.to_owned(),
        name: name.parse().unwrap(),
        version: version.parse().unwrap(),
        architecture: "amd64".to_owned(),
        ref_name: "demo/x86_64/host".to_owned(),
        commit: Checksum::from_bytes(&[7; 32]).unwrap(),
        tarball: Tarball {
            path: "repo.tar".to_owned(),
            media_type: TARBALL_MEDIA_TYPE.to_owned(),
            size: tarball.len() as u64,
            digest: Digest::of(tarball),
        },
        annotations: [("version".to_owned(), version.to_owned())].into(),
    };
    manifest.to_bytes()
}

/// Bytes that do not repeat within a block.
fn noise(size: usize, seed: u64) -> Vec<u8> {
    // Odd, for a state of 0 stays there.
    let mut state = 2 * seed + 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(size).collect()
}

/// A directory as `pack` leaves it.
fn packed(dir: &Path, version: &str, tarball: &[u8]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("repo.tar"), tarball).unwrap();
    fs::write(dir.join("manifest.json"), manifest("demo", version, tarball)).unwrap();
}

#[test]
fn an_artifact_is_invisible_until_its_manifest_is_stored() {
    let endpoint = Endpoint::start();
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

#[test]
fn ranges_and_conditions_go_by_the_digest() {
    let endpoint = Endpoint::start();
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
    let outside = endpoint.curl(&path, &["-r", "10000-"]);
    assert_eq!((outside.status, outside.header("content-range")), (416, Some("bytes */10000")));

    let same = endpoint.curl(&path, &["-r", "0-9", "-H", &format!("If-Range: {etag}")]);
    assert_eq!((same.status, &same.body[..]), (206, &tarball[..10]));
    let other = endpoint.curl(&path, &["-r", "0-9", "-H", "If-Range: \"sha256:00\""]);
    assert_eq!((other.status, &other.body), (200, &tarball));
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

#[test]
fn a_complete_version_never_changes() {
    let endpoint = Endpoint::start();
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

#[test]
fn a_job_that_died_after_its_tarball_does_not_block_the_next() {
    let mut endpoint = Endpoint::start();
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

#[test]
fn writes_need_the_token_and_the_log_never_shows_it() {
    let endpoint = Endpoint::start();
    let path = file("demo", "1", "repo.tar");
    let tarball = noise(2_000_000, 7);
    let upload = endpoint.file("upload", &tarball);
    let upload = upload.to_str().unwrap();

    let none = endpoint.curl(&path, &["-T", upload]);
    assert_eq!(none.status, 401);
    assert!(none.header("www-authenticate").is_some_and(|value| value.starts_with("Bearer")), "{none:?}");
    for wrong in [
        "Bearer a-long-and-secret-token-4712".to_owned(),
        format!("Bearer {TOKEN}x"),
        format!("Bearer {}", &TOKEN[1..]),
        format!("Bearer {}", TOKEN.to_uppercase()),
    ] {
        let header = format!("Authorization: {wrong}");
        // With and without waiting for `100 Continue`: the reply always arrives.
        for expect in ["Expect:", "Expect: 100-continue"] {
            let reply = endpoint.curl(&path, &["-T", upload, "-H", &header, "-H", expect]);
            assert_eq!(reply.status, 403, "{header} {expect}: {reply:?}");
        }
        assert_eq!(endpoint.curl("/v1/artifacts/demo/1", &["-X", "DELETE", "-H", &header]).status, 403);
    }
    assert_eq!(endpoint.curl(&path, &["-T", upload, "-H", &format!("Authorization: Basic {TOKEN}")]).status, 401);
    assert_eq!(endpoint.curl("/v1/artifacts/demo/1", &["-X", "DELETE"]).status, 401);
    assert!(!endpoint.stored().iter().any(|path| path.starts_with("artifacts/")));

    // The file is read anew: a rotated token counts at once, two may overlap.
    endpoint.file("token", format!("another\n{TOKEN}\n").as_bytes());
    assert_eq!(endpoint.put(&path, &tarball).status, 201);
    endpoint.file("token", b"another");
    assert_eq!(endpoint.put(&path, &tarball).status, 403);
    assert_eq!(endpoint.curl(&path, &["-T", upload, "-H", "authorization: bearer another"]).status, 200);

    let log = endpoint.log();
    assert!(log.contains("status=403") && log.contains("/v1/artifacts/demo/1/repo.tar"), "{log}");
    for secret in [TOKEN, "4712", "another"] {
        assert!(!log.contains(secret), "{log}");
    }
}

#[test]
fn without_a_token_file_nothing_is_written() {
    let mut endpoint = Endpoint::start();
    endpoint.kill();
    let command = endpoint.command();
    endpoint.run(command);
    let reply = endpoint.put(&file("demo", "1", "repo.tar"), b"x");
    assert_eq!(reply.status, 403);
    assert!(reply.text().contains("--token-file"), "{reply:?}");
    assert!(endpoint.log().contains("every write will be refused"), "{}", endpoint.log());
}

#[test]
fn files_that_contradict_their_digests_are_refused() {
    let endpoint = Endpoint::start();
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
    let free = ok(tool("stat").args(["-f", "-c", "%a %S"]).arg(endpoint.dir.path())).stdout;
    let free: Vec<u64> = free.split_whitespace().map(|part| part.parse().unwrap()).collect();
    if free[0] * free[1] < 60 << 30 {
        assert_eq!(endpoint.put_with(&file("demo", "3", "repo.tar"), b"", &["-H", &huge]).status, 507);
    }
}

#[test]
fn uploads_at_the_same_time_do_not_disturb_each_other() {
    let endpoint = Endpoint::start();
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
    let mut stream = TcpStream::connect(&endpoint.server.as_ref().unwrap().address).unwrap();
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

#[test]
fn versions_are_listed_newest_first_and_latest_leads_to_the_newest() {
    let mut endpoint = Endpoint::start();
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
        assert_eq!((reply.status, reply.header("location")), (307, Some(file("demo", "1.0", name).as_str())));
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

#[test]
fn paths_are_taken_by_the_grammar_only() {
    let endpoint = Endpoint::start();
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
    assert!(files.iter().all(|path| path == ".lock" || path.starts_with("artifacts/demo/1/")), "{files:?}");
}

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
        assert!(!html.contains(host) && html.contains("http://ENDPOINT/v1"), "{html}");
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
    assert_eq!(endpoint.curl("/readyz", &[]).status, 503);
    assert_eq!(endpoint.curl("/healthz", &[]).status, 200);
}

#[test]
fn a_store_has_one_endpoint_and_a_known_kind() {
    let endpoint = Endpoint::start();
    let address = e2e::free_address();
    fails(endpoint.command().args(["--listen", &address]), 1, "is in use");
    for uri in ["s3://bucket/x", "swift://container"] {
        let done =
            fails(builder().args(["endpoint", "--listen", &address, "--store", uri]), 2, "come with a later version");
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

#[test]
fn requests_that_are_no_http_do_no_harm() {
    let endpoint = Endpoint::start();
    let address = &endpoint.server.as_ref().unwrap().address;
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

fn publish(endpoint: &str, dir: &Path, token: &Path) -> Command {
    let mut command = builder();
    command.args(["publish", "--output-format", "json", "--endpoint", endpoint, "--token-file"]).arg(token).arg(dir);
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
