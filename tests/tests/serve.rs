//! `serve`, asked by curl and by the real `ostree`.

use std::fs;
use std::path::Path;
use std::process::Command;

use e2e::repo::OstreeRepo;
use e2e::{Server, aggregator, fails, ok, run, tool};
use tempfile::TempDir;

const REF: &str = "demo/x86_64/host";

fn serve(repo: &Path) -> Server {
    Server::start(aggregator().arg("serve").arg("--repo").arg(repo))
}

/// An answer: its status, its headers (names in lower case) and its body.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Answer {
    #[track_caller]
    fn header(&self, name: &str) -> &str {
        self.find(name).unwrap_or_else(|| panic!("{name} is missing: {:?}", self.headers))
    }

    fn find(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Asks for `path`, which goes out as it is, with more arguments for curl.
#[track_caller]
fn ask(server: &Server, path: &str, arguments: &[&str]) -> Answer {
    let mut curl = tool("curl");
    curl.args(["-sS", "-i", "--path-as-is"]).args(arguments).arg(format!("{}{path}", server.url()));
    let text = ok(&mut curl).stdout;
    let (head, body) = text.split_once("\r\n\r\n").expect("an answer has a head");
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status line");
    let headers = lines.filter_map(|line| line.split_once(": ")).map(|(key, value)| (key.to_lowercase(), value.into()));
    Answer { status, headers: headers.collect(), body: body.to_owned() }
}

fn pull(repo: &OstreeRepo, remote: &str) -> Command {
    ok(repo.ostree().args(["remote", "add", "--set=gpg-verify=false", "r", remote]));
    let mut command = repo.ostree();
    command.arg("pull");
    command
}

/// A served path of an object of `repo` that ends in `suffix`.
fn object(repo: &OstreeRepo, suffix: &str) -> String {
    let found = ok(tool("find").arg(repo.path.join("objects")).args(["-name", &format!("*{suffix}"), "-size", "+1"]));
    let path = found.stdout.lines().next().expect("there is such an object").to_owned();
    path.strip_prefix(repo.path.to_str().unwrap()).unwrap().to_owned()
}

#[test]
fn ostree_pulls_what_the_page_says() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    ok(repo.ostree().args(["summary", "-u"]));
    let server = serve(&repo.path);
    let page = ask(&server, "/", &[]);
    assert_eq!((page.status, page.header("content-type")), (200, "text/html; charset=utf-8"));
    assert!(page.header("content-security-policy").contains("default-src 'none'"));
    for text in [
        format!("ostree remote add --if-not-exists --set=gpg-verify=false oscontainer {}/", server.url()),
        format!("rpm-ostree rebase oscontainer:{REF} {commit}"),
        format!("ostree pull oscontainer {REF}@{commit}"),
        "1.&lt;2&gt;".into(),
        "2023-11-14T22:13:20Z".into(),
        "a &lt;small&gt; tree".into(),
        "not signed".into(),
    ] {
        assert!(page.body.contains(&text), "{text:?} is not in {}", page.body);
    }
    assert!(!page.body.contains("<script") && !page.body.contains("<small>"));

    let pinned = OstreeRepo::new(dir.path(), "pinned");
    ok(pull(&pinned, &server.url()).args(["r", &format!("{REF}@{commit}")]));
    ok(pinned.ostree().arg("fsck"));
    let mirror = OstreeRepo::new(dir.path(), "mirror");
    ok(pull(&mirror, &server.url()).args(["--mirror", "r"]));
    assert_eq!(ok(mirror.ostree().args(["rev-parse", REF])).stdout.trim(), commit);

    // The next commit is seen at once, though every file time may be the same.
    let next = repo.commit(REF, "two");
    ok(repo.ostree().args(["summary", "-u"]));
    ok(mirror.ostree().args(["pull", "--mirror", "r"]));
    assert_eq!(ok(mirror.ostree().args(["rev-parse", REF])).stdout.trim(), next);
}

#[test]
fn the_page_tells_packages_and_what_changed() {
    let dir = TempDir::new().unwrap();
    let mut repo = OstreeRepo::new(dir.path(), "repo");
    let list = |packages: &str| format!("rpmostree.rpmdb.pkglist=@a(sssss) [{packages}]");
    repo.add_metadata(&list(
        "('bash', '0', '5', '1', 'x'), ('gone', '0', '1', '1', 'x'), ('same', '1', '2', '3', 'x')",
    ));
    let before = repo.commit(REF, "one");
    ok(aggregator().arg("image").arg("--repo").arg(&repo.path).arg("--output").arg(layout(dir.path(), "a")));
    repo.clear_metadata();
    repo.add_metadata(&list(
        "('bash', '0', '5', '2', 'x'), ('<new>', '0', '1', '1', 'x'), ('same', '1', '2', '3', 'x')",
    ));
    // Its parent is not known: the log of layers tells what was before.
    ok(repo.ostree().args(["refs", "--delete", REF]));
    repo.commit(REF, "two");
    let mut next = aggregator();
    next.arg("image").arg("--repo").arg(&repo.path).arg("--output").arg(layout(dir.path(), "b"));
    ok(next.arg("--previous").arg(layout(dir.path(), "a")));
    let root = dir.path().join("root");
    ok(tool("umoci").args(["unpack", "--image", &layout(dir.path(), "b")[4..]]).arg(&root));
    let image = root.join("rootfs");
    let server = Server::start(
        aggregator()
            .args(["serve", "--layer-index"])
            .arg(image.join("usr/share/oscontainer/layers"))
            .arg("--repo")
            .arg(image.join("srv/repo")),
    );
    let page = ask(&server, "/", &[]).body;
    for row in [
        "<td>bash</td><td>5-1</td><td>5-2</td>",
        "<td>gone</td><td>1-1</td><td>removed</td>",
        "<td>&lt;new&gt;</td><td>added</td><td>1-1</td>",
        "<td>same</td><td>1:2-3</td><td>x</td>",
        &format!("rpm-ostree deploy {before}"),
    ] {
        assert!(page.contains(row), "{row:?} is not in {page}");
    }
    assert_eq!(page.matches("<td>same</td>").count(), 1, "{page}");
}

fn layout(dir: &Path, name: &str) -> String {
    format!("oci:{}:x", dir.join(name).display())
}

#[test]
fn a_client_with_a_cached_signed_summary_sees_the_update() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let home = dir.path().join("gnupg");
    fs::create_dir(&home).unwrap();
    ok(tool("chmod").arg("700").arg(&home));
    let gpg = || {
        let mut command = tool("gpg");
        command.arg("--homedir").arg(&home).args(["--batch", "--quiet", "--passphrase", ""]);
        command
    };
    ok(gpg().args(["--quick-gen-key", "test@example", "ed25519", "sign", "never"]));
    let key = dir.path().join("key");
    ok(gpg().arg("--output").arg(&key).args(["--export", "test@example"]));
    let publish = |text: &str| {
        let commit = repo.commit(REF, text);
        let homedir = format!("--gpg-homedir={}", home.display());
        ok(repo.ostree().args(["summary", "-u", "--gpg-sign=test@example", &homedir]));
        // As in an image: every file time is 0.
        ok(tool("touch").arg("-d").arg("@0").args(["summary", "summary.sig"].map(|file| repo.path.join(file))));
        commit
    };
    publish("one");
    let server = serve(&repo.path);
    let mirror = OstreeRepo::new(dir.path(), "mirror");
    let import = format!("--gpg-import={}", key.display());
    let settings = ["remote", "add", "--set=gpg-verify=false", "--set=gpg-verify-summary=true"];
    ok(mirror.ostree().args(settings).args([&import, "r", &server.url()]));
    let pull = || {
        ok(mirror.ostree().args(["pull", "--mirror", "r"]));
        ok(mirror.ostree().args(["rev-parse", REF])).stdout.trim().to_owned()
    };
    pull();
    assert!(mirror.path.join("tmp/cache/summaries/r.sig").exists());
    pull();
    let cached = "oscontainer_http_requests_total{method=\"GET\",status=\"304\"}";
    assert!(ask(&server, "/metrics", &[]).body.contains(cached), "the cache was asked for");
    let next = publish("two");
    assert_eq!(pull(), next);
    ok(tool("gpgconf").arg("--homedir").arg(&home).args(["--kill", "all"]));
}

#[test]
fn it_also_listens_on_a_unix_socket() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    let socket = dir.path().join("socket");
    let start =
        || Server::start(aggregator().arg("serve").arg("--repo").arg(&repo.path).arg("--also-listen").arg(&socket));
    let through = |path: &str| {
        ok(tool("curl").arg("-sS").arg("--unix-socket").arg(&socket).arg(format!("http://x{path}"))).stdout
    };
    let mut server = start();
    assert_eq!(through(&format!("/refs/heads/{REF}")).trim(), commit);
    assert_eq!(ask(&server, "/healthz", &[]).body, "ok\n");
    let mut second = aggregator();
    second.args(["serve", "--listen", "127.0.0.1:0", "--repo"]).arg(&repo.path).arg("--also-listen").arg(&socket);
    fails(&mut second, 1, "listening on");
    // A killed one leaves its socket, which is in nobody's way.
    ok(tool("kill").args(["-KILL", &server.child().id().to_string()]));
    server.child().wait().unwrap();
    assert!(socket.exists());
    let mut server = start();
    assert_eq!(through("/healthz"), "ok\n");
    ok(tool("kill").args(["-TERM", &server.child().id().to_string()]));
    assert!(server.child().wait().unwrap().success());
    assert!(!socket.exists());
    // What is no socket stays.
    fs::write(&socket, "mine").unwrap();
    fails(&mut second, 1, "listening on");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "mine");
}

#[test]
fn validators_come_from_content() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    ok(repo.ostree().args(["summary", "-u"]));
    let server = serve(&repo.path);
    let object = object(&repo, ".filez");
    let name = object.trim_start_matches("/objects/").replace('/', "");

    let whole = ask(&server, &object, &["-I"]);
    let size: u64 = whole.header("content-length").parse().unwrap();
    assert_eq!(size, fs::metadata(repo.path.join(&object[1..])).unwrap().len());
    assert!(whole.header("etag").starts_with(&format!("\"{name}")), "{}", whole.header("etag"));
    assert!(whole.header("cache-control").contains("immutable"));
    assert_eq!(whole.header("content-type"), "application/octet-stream");

    for (path, content_type) in [
        ("/config", "text/plain; charset=utf-8"),
        (&format!("/refs/heads/{REF}"), "text/plain; charset=utf-8"),
        ("/summary", "application/octet-stream"),
    ] {
        let answer = ask(&server, path, &["-I"]);
        assert_eq!((answer.status, answer.header("cache-control")), (200, "no-cache"), "{path}");
        assert_eq!(answer.header("content-type"), content_type, "{path}");
        let sum = ok(tool("sha256sum").arg(repo.path.join(&path[1..]))).stdout;
        assert_eq!(answer.header("etag"), format!("\"{}\"", &sum[..64]), "{path}");
        assert_eq!(answer.find("last-modified"), None, "{path}");
        let etag = format!("If-None-Match: {}", answer.header("etag"));
        assert_eq!(ask(&server, path, &["-H", &etag]).status, 304, "{path}");
        // A client that knows only a time gets the content.
        let since = "If-Modified-Since: Thu, 01 Jan 2099 00:00:00 GMT";
        assert_eq!(ask(&server, path, &["-I", "-H", since]).status, 200, "{path}");
    }
    let reference = ask(&server, &format!("/refs/heads/{REF}"), &[]);
    assert_eq!(reference.body.trim(), commit);

    // The same size and the same time, other content: another ETag, for large files too.
    let delta = repo.path.join("deltas/ab/cd-ef");
    fs::create_dir_all(&delta).unwrap();
    let part = delta.join("0");
    let mut seen = Vec::new();
    for byte in [b'a', b'b'] {
        fs::write(&part, vec![byte; 100_000]).unwrap();
        ok(tool("touch").args(["-d", "@0"]).arg(&part));
        for _ in 0..2 {
            seen.push(ask(&server, "/deltas/ab/cd-ef/0", &["-I"]).header("etag").to_owned());
        }
    }
    assert!(seen[0] == seen[1] && seen[1] != seen[2] && seen[2] == seen[3], "{seen:?}");
}

#[test]
fn ranges_and_methods() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    let server = serve(&repo.path);
    let path = format!("/refs/heads/{REF}");
    let etag = ask(&server, &path, &["-I"]).header("etag").to_owned();
    let part = ask(&server, &path, &["-r", "2-5"]);
    assert_eq!((part.status, part.body.as_str(), part.header("content-range")), (206, &commit[2..6], "bytes 2-5/65"));
    let tail = ask(&server, &path, &["-r", "-5"]);
    assert_eq!((tail.status, tail.body.as_str()), (206, &format!("{}\n", &commit[60..])[..]));
    let outside = ask(&server, &path, &["-r", "65-"]);
    assert_eq!((outside.status, outside.header("content-range")), (416, "bytes */65"));
    let same = ask(&server, &path, &["-r", "2-5", "-H", &format!("If-Range: {etag}")]);
    assert_eq!(same.status, 206);
    let other = ask(&server, &path, &["-r", "2-5", "-H", "If-Range: \"other\""]);
    assert_eq!((other.status, other.body.len()), (200, 65));
    for (condition, status) in [(etag.as_str(), 206), ("*", 206), ("\"other\"", 412)] {
        let answer = ask(&server, &path, &["-r", "2-5", "-H", &format!("If-Match: {condition}")]);
        assert_eq!((answer.status, answer.header("etag")), (status, etag.as_str()), "{condition}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"] {
        let answer = ask(&server, &path, &["-X", method]);
        assert_eq!((answer.status, answer.header("allow")), (405, "GET, HEAD"), "{method}");
    }
    let health = ask(&server, "/healthz", &[]);
    assert_eq!((health.status, health.body.as_str()), (200, "ok\n"));
    let metrics = ask(&server, "/metrics", &[]);
    assert!(
        metrics.body.contains("oscontainer_http_requests_total{method=\"GET\",status=\"206\"} 5"),
        "{}",
        metrics.body
    );
    assert!(metrics.body.contains("method=\"other\",status=\"405\"} 6"), "{}", metrics.body);
}

#[test]
fn nothing_but_the_repository_is_served() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.commit(REF, "one");
    fs::write(dir.path().join("secret"), "secret").unwrap();
    fs::write(repo.path.join("refs/heads/.hidden"), "secret").unwrap();
    fs::write(repo.path.join("notes"), "secret").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", repo.path.join("refs/heads/link")).unwrap();
    std::os::unix::fs::symlink(dir.path(), repo.path.join("refs/heads/up")).unwrap();
    ok(tool("mkfifo").arg(repo.path.join("refs/heads/pipe")));
    let server = serve(&repo.path);
    for path in [
        "/../secret",
        "/refs/heads/../../../secret",
        "/refs/heads/%2e%2e/%2e%2e/%2e%2e/secret",
        "/refs/heads/..%2f..%2f..%2fsecret",
        "/refs/heads/%252e%252e/secret",
        "//etc/passwd",
        "/refs/heads//etc/passwd",
        "/refs/heads/.hidden",
        "/refs/heads/link",
        "/refs/heads/up/secret",
        "/refs/heads/pipe",
        "/refs/heads/demo",
        "/refs/heads/none",
        "/refs/heads/a%00b",
        "/refs/heads/%ff",
        "/notes",
        "/state/x",
        "/tmp/cache",
        "/.lock",
        "/objects/",
        "/objects/00",
    ] {
        let answer = ask(&server, path, &["--max-time", "10"]);
        assert_eq!(answer.status, 404, "{path}: {}", answer.body);
        assert!(!answer.body.contains("secret") && !answer.body.contains("root:"), "{path}: {}", answer.body);
    }
    assert_eq!(ask(&server, &format!("/refs/heads/{}", REF.replace('x', "%78")), &[]).status, 200);
}

#[test]
fn it_says_why_it_does_not_start_and_stops_when_told() {
    let dir = TempDir::new().unwrap();
    let nowhere = dir.path().join("nowhere");
    fails(aggregator().args(["serve", "--listen", "127.0.0.1:0", "--repo"]).arg(&nowhere), 1, "nowhere");
    assert_eq!(run(aggregator().args(["serve", "--listen", "here"])).code, 2);
    let repo = OstreeRepo::new(dir.path(), "repo");
    let mut server = serve(&repo.path);
    let page = ask(&server, "/", &[]);
    assert!(page.status == 200 && page.body.contains("no refs"), "{}", page.body);
    fails(aggregator().args(["serve", "--listen", &server.address, "--repo"]).arg(&repo.path), 1, &server.address);
    let id = server.child().id().to_string();
    ok(tool("kill").args(["-TERM", &id]));
    assert!(server.child().wait().unwrap().success());
}

/// The shipped default is `[::]`.
#[test]
fn a_machine_without_ipv6_is_served_on_ipv4() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let mut command = aggregator();
    command.arg("serve").arg("--repo").arg(&repo.path);
    let server = Server::start_on("[::]", &mut e2e::ipv4::only(dir.path(), &command));
    assert_eq!(ask(&server, "/healthz", &[]).status, 200);
}
