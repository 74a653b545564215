//! `image` to and from registries: Debian's docker-registry, with and without a password
//! and TLS, and one behind a door that misbehaves.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use e2e::issuer::{IDENTITY, Issuer};
use e2e::proxy::Tunnels;
use e2e::registry::{Access, Door, PASSWORD, Registry, Trouble, USER};
use e2e::repo::OstreeRepo;
use e2e::{aggregator, fails, free_address, ok, run, tool, wait_for};
use serde_json::Value;
use tempfile::TempDir;

const REF: &str = "demo/x86_64/host";

fn image(repo: &OstreeRepo, output: &str) -> Command {
    let mut command = aggregator();
    command.args(["image", "--output-format", "json", "--repo"]).arg(&repo.path).args(["--output", output]);
    // Nobody's credentials but the test's.
    for name in ["REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG"] {
        command.env_remove(name);
    }
    command.arg("--retries=2").env("HOME", repo.path.parent().expect("the repository lies in the test's directory"));
    command
}

fn plain(repo: &OstreeRepo, output: &str) -> Command {
    let mut command = image(repo, output);
    command.arg("--tls-verify=false");
    command
}

fn inspect(image: &str) -> Value {
    ok(tool("skopeo").args(["inspect", "--tls-verify=false", image])).json()
}

fn layout(dir: &Path, name: &str) -> String {
    format!("oci:{}", dir.join(name).display())
}

/// A repository, and a registry behind a door.
struct Behind {
    dir: TempDir,
    repo: OstreeRepo,
    registry: Registry,
    door: Door,
}

impl Behind {
    /// With a commit of `noise` bytes that do not deflate.
    fn new(noise: usize) -> Self {
        let dir = TempDir::new().unwrap();
        let repo = OstreeRepo::new(dir.path(), "repo");
        repo.put_noise("blob", noise, 1);
        repo.commit(REF, "one");
        let registry = Registry::start(dir.path(), Access::Plain);
        let door = Door::before(&registry.address);
        Self { dir, repo, registry, door }
    }

    /// An image there.
    fn at(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.door.address)
    }
}

/// How many of `seen` start with `method` and contain `part`.
fn count(seen: &[String], method: &str, part: &str) -> usize {
    seen.iter().filter(|request| request.starts_with(method) && request.contains(part)).count()
}

#[test]
fn only_what_is_new_moves_and_digests_are_the_same_everywhere() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let registry = Registry::start(dir.path(), Access::Plain);
    let door = Door::before(&registry.address);
    let at = |name: &str| format!("docker://{}/{name}", door.address);
    repo.commit(REF, "one");
    let first = ok(&mut plain(&repo, &at("a/host:1"))).json();
    assert_eq!(first["image"], at("a/host:1"));
    assert_eq!(inspect(&at("a/host:1"))["Digest"], first["digest"]);
    // The same as in a layout.
    assert_eq!(ok(&mut image(&repo, &layout(dir.path(), "one"))).json()["digest"], first["digest"]);

    // Once more: nothing is uploaded but the manifest.
    door.seen();
    ok(&mut plain(&repo, &at("a/host:again")));
    let seen = door.seen();
    assert_eq!((count(&seen, "PATCH", ""), count(&seen, "PUT", "/manifests/again")), (0, 1), "{seen:#?}");

    // Under the name of an image for one machine there is no place for others, and nothing is uploaded in vain.
    repo.commit(REF, "two");
    fails(plain(&repo, &at("a/host:1")).arg("--index"), 2, "an image for one machine under that name");
    let seen = door.seen();
    assert_eq!((count(&seen, "PATCH", ""), count(&seen, "PUT", "")), (0, 0), "{seen:#?}");

    // The next: one layer, one config and two documents are uploaded, and no layer is downloaded but its start.
    let second = ok(plain(&repo, &at("a/host:2")).args(["--previous", &at("a/host:1")])).json();
    let seen = door.seen();
    assert_eq!((&second["layers"], &second["fresh"]), (&3.into(), &false.into()));
    assert_eq!(second["previous"], first["digest"]);
    assert_eq!(count(&seen, "PUT", "/blobs/uploads/"), 4, "{seen:#?}");
    assert_eq!(count(&seen, "GET", "/blobs/"), 3, "the config and two indexes: {seen:#?}");
    assert_eq!(inspect(&at("a/host:2"))["Digest"], second["digest"]);

    // The same from a layout, by digest, and with all of it verified.
    let previous = layout(dir.path(), "one");
    let next = ok(image(&repo, &layout(dir.path(), "two")).args(["--previous", &previous])).json();
    assert_eq!(next["digest"], second["digest"]);
    let pinned = at(&format!("a/host@{}", first["digest"].as_str().unwrap()));
    let mut verified = plain(&repo, &at("a/host:verified"));
    assert_eq!(ok(verified.args(["--previous", &pinned, "--verify-previous"])).json()["digest"], second["digest"]);

    // Into another repository of the registry: mounted. Out of the registry: streamed.
    door.seen();
    let mounted = ok(plain(&repo, &at("b/host:2")).args(["--previous", &at("a/host:1")])).json();
    assert_eq!(mounted["digest"], second["digest"]);
    let seen = door.seen();
    assert_eq!(count(&seen, "POST", "mount="), 2, "{seen:#?}");
    assert_eq!(count(&seen, "PUT", "/blobs/uploads/"), 5, "{seen:#?}");
    let out = ok(plain(&repo, &layout(dir.path(), "out")).args(["--previous", &at("a/host:1")])).json();
    assert_eq!(out["digest"], second["digest"]);
    ok(tool("skopeo").args(["copy", "-q", &layout(dir.path(), "out"), &layout(dir.path(), "check")]));

    // A registry that does not mount gets them streamed.
    let other = TempDir::new().unwrap();
    let far = Registry::start(other.path(), Access::Plain);
    let streamed = ok(plain(&repo, &far.image("c/host:2")).args(["--previous", &at("a/host:1")])).json();
    assert_eq!(streamed["digest"], second["digest"]);
    door.set(|request| if request.contains("mount=") { Trouble::Status(202) } else { Trouble::None });
    let streamed = ok(plain(&repo, &at("d/host:2")).args(["--previous", &at("a/host:1")])).json();
    assert_eq!(streamed["digest"], second["digest"]);
    // One that begins an upload instead is taken at its word; one that is busy is asked again.
    door.set(|request| match request.split_once('?') {
        Some((upload, how)) if how.starts_with("mount=") => Trouble::Instead(upload.to_owned()),
        _ => Trouble::None,
    });
    door.seen();
    let streamed = ok(plain(&repo, &at("e/host:2")).args(["--previous", &at("a/host:1")])).json();
    assert_eq!(streamed["digest"], second["digest"]);
    let seen = door.seen();
    assert_eq!((count(&seen, "POST", "mount="), count(&seen, "POST", "/uploads/")), (2, 7), "{seen:#?}");
    first_requests(&door, "POST", "mount=", 1, Trouble::Status(503));
    let done = ok(plain(&repo, &at("f/host:2")).args(["--previous", &at("a/host:1")]));
    assert_eq!((&done.json()["digest"], done.stderr.contains("next try")), (&second["digest"], true));
    let seen = door.seen();
    assert_eq!((count(&seen, "POST", "mount="), count(&seen, "PUT", "/uploads/")), (3, 5), "{seen:#?}");
    door.set(|_| Trouble::None);

    // Mirrors keep the digests.
    let args = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    ok(tool("skopeo").args(["copy", "-q"]).args(args).args([&at("a/host:2"), &far.image("mirror/host:2")]));
    assert_eq!(inspect(&far.image("mirror/host:2"))["Digest"], second["digest"]);
    let (source, target) = (format!("{}/a/host", registry.address), format!("{}/synced", far.address));
    ok(tool("skopeo").args(["sync", "--src=docker", "--dest=docker"]).args(args).args([&source, &target]));
    for (tag, digest) in [("1", &first["digest"]), ("2", &second["digest"])] {
        assert_eq!(inspect(&far.image(&format!("synced/host:{tag}")))["Digest"], *digest);
    }
}

#[test]
fn passwords_and_certificates() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.commit(REF, "one");
    let registry = Registry::start(dir.path(), Access::Tls);
    let name = registry.image("host:1");
    let login = |file: &Path, key: &str, password: &str| {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let both = ok(tool("sh").args(["-c", "printf %s \"$0\" | base64 -w0", &format!("{USER}:{password}")])).stdout;
        fs::write(file, format!("{{\"auths\":{{\"{key}\":{{\"auth\":\"{both}\"}}}}}}")).unwrap();
    };
    let trusting = |output: &str| {
        let mut command = image(&repo, output);
        command.arg("--ca-file").arg(&registry.ca);
        command
    };
    fails(&mut image(&repo, &name), 3, "has no TLS that is trusted: --ca-file");
    fails(&mut trusting(&name), 3, "no or wrong credentials");
    let file = dir.path().join("auth/auth.json");
    login(&file, &registry.address, "wrong");
    fails(trusting(&name).arg("--authfile").arg(&file), 3, "no or wrong credentials");
    login(&file, &registry.address, PASSWORD);
    let digest = ok(trusting(&name).arg("--authfile").arg(&file)).json()["digest"].clone();
    let seen =
        ok(tool("skopeo").args(["inspect", "--tls-verify=false", "--creds", &format!("{USER}:{PASSWORD}"), &name]))
            .json();
    assert_eq!(seen["Digest"], digest);
    fails(trusting(&name).args(["--authfile", "/nowhere/auth.json"]), 1, "/nowhere/auth.json");

    // Where podman and docker keep them, for the registry or a namespace in it.
    ok(trusting(&name).env("REGISTRY_AUTH_FILE", &file));
    let runtime = dir.path().join("run");
    login(&runtime.join("containers/auth.json"), &format!("{}/host", registry.address), PASSWORD);
    ok(trusting(&name).env("XDG_RUNTIME_DIR", &runtime));
    fails(trusting(&registry.image("other:1")).env("XDG_RUNTIME_DIR", &runtime), 3, "no or wrong credentials");
    let docker = dir.path().join("docker");
    login(&docker.join("config.json"), &format!("https://{}/v1/", registry.address), PASSWORD);
    ok(trusting(&name).env("DOCKER_CONFIG", &docker));

    // A credential helper.
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\nread -r key || :\ntest \"$key\" = {} || {{ echo credentials not found in native keychain; exit 1; }}\n\
         echo '{{\"ServerURL\":\"x\",\"Username\":\"{USER}\",\"Secret\":\"{PASSWORD}\"}}'\n",
        registry.address
    );
    fs::write(bin.join("docker-credential-test"), script).unwrap();
    ok(tool("chmod").arg("755").arg(bin.join("docker-credential-test")));
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    fs::write(&file, r#"{"credsStore":"test"}"#).unwrap();
    ok(trusting(&name).env("PATH", &path).arg("--authfile").arg(&file));
    fs::write(&file, r#"{"credsStore":"missing"}"#).unwrap();
    fails(trusting(&name).arg("--authfile").arg(&file), 2, "credential helper");
    fs::write(&file, "no JSON").unwrap();
    fails(trusting(&name).arg("--authfile").arg(&file), 2, "Unable to read config");

    // It is asked for the registry alone; Docker's own registry has another name there.
    let asked = dir.path().join("asked");
    let script = format!(
        "#!/bin/sh\nread -r key || :\necho \"$key\" >> {}\ntest \"$key\" = https://index.docker.io/v1/ || \
         {{ echo credentials not found in native keychain; exit 1; }}\n\
         echo '{{\"ServerURL\":\"x\",\"Username\":\"{USER}\",\"Secret\":\"{PASSWORD}\"}}'\n",
        asked.display()
    );
    fs::write(bin.join("docker-credential-test"), script).unwrap();
    fs::write(&file, r#"{"credsStore":"test"}"#).unwrap();
    let hub = Tunnels::start(&registry.address);
    let mut pushed = plain(&repo, "docker://docker.io/somebody/host:1");
    ok(pushed.env("PATH", &path).env("https_proxy", format!("http://{}", hub.address())).arg("--authfile").arg(&file));
    assert!(hub.asked().iter().all(|name| name == "index.docker.io:443"), "{:?}", hub.asked());
    assert_eq!(fs::read_to_string(&asked).unwrap(), "docker.io\nhttps://index.docker.io/v1/\n");

    // Without XDG_RUNTIME_DIR podman's lie elsewhere: here on a /run of the test's own.
    login(&file, &registry.address, PASSWORD);
    let inner = trusting(&name);
    let own = "mount -t tmpfs none /run && mkdir -p /run/containers/0 && cp \"$0\" /run/containers/0/auth.json && exec \"$@\"";
    let mut namespace = tool("unshare");
    namespace.args(["--map-root-user", "--mount", "sh", "-ec", own]).arg(&file);
    namespace.arg(inner.get_program()).args(inner.get_args()).env_clear();
    ok(namespace.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("PATH", &path));

    // Without TLS only when asked.
    let bare = Registry::start(dir.path(), Access::Password);
    login(&file, &bare.address, PASSWORD);
    fails(image(&repo, &bare.image("host:1")).arg("--authfile").arg(&file), 3, "no TLS that is trusted");
    let pushed = ok(plain(&repo, &bare.image("host:1")).arg("--authfile").arg(&file)).json();
    assert_eq!(pushed["digest"], digest);
    // And not because nobody is there, or says nothing.
    fails(&mut plain(&repo, &format!("docker://{}/host:1", free_address())), 1, "for TLS: ");
    let silent = free_address();
    let mut server = tool("openssl");
    server.args(["s_server", "-quiet", "-accept", &silent, "-cert"]).arg(&registry.ca).arg("-key");
    server.arg(registry.ca.with_file_name("key.pem")).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut server = server.spawn().unwrap();
    wait_for(|| std::net::TcpStream::connect(&silent).is_ok(), "openssl to listen");
    let done = run(plain(&repo, &format!("docker://{silent}/host:1")).arg("--stall-timeout=1"));
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(done.code == 1 && done.stderr.contains("has not answered for 1 s"), "{done:?}");
}

#[test]
fn tokens_for_passwords_and_for_identity_tokens() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.commit(REF, "one");
    let issuer = Issuer::start(dir.path());
    let registry = Registry::with_tokens(dir.path(), &issuer);
    let file = dir.path().join("auth.json");
    let known = |entry: &Value| {
        let mut auths = serde_json::Map::new();
        auths.insert(registry.address.clone(), entry.clone());
        fs::write(&file, serde_json::json!({"auths": auths}).to_string()).unwrap();
    };
    let push = |name: &str| {
        let mut command = plain(&repo, &registry.image(name));
        command.arg("--authfile").arg(&file);
        command
    };
    known(&serde_json::json!({"username": USER, "password": PASSWORD}));
    let first = ok(&mut push("host:1")).json();
    assert!(issuer.issued().contains(&"password repository:host:pull,push".to_owned()));
    // As docker keeps it: the field auth is there too, with nobody's password.
    known(&serde_json::json!({"auth": "PHRva2VuPjo=", "identitytoken": IDENTITY}));
    assert_eq!(ok(&mut push("other:1")).json()["digest"], first["digest"]);
    assert_eq!(issuer.issued(), ["refresh_token repository:other:pull,push"]);
    // From another repository of the registry, for which both have to be in the token.
    repo.commit(REF, "two");
    let second = ok(push("third:2").args(["--previous", &registry.image("host:1")])).json();
    assert_eq!((&second["previous"], &second["layers"]), (&first["digest"], &3.into()));
    let issued = issuer.issued();
    assert!(issued.contains(&"refresh_token repository:third:pull,push repository:host:pull".into()), "{issued:?}");
    // A credential helper has identity tokens too, under this name.
    let bin = dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let answer = serde_json::json!({"ServerURL": "x", "Username": "<token>", "Secret": IDENTITY});
    fs::write(bin.join("docker-credential-test"), format!("#!/bin/sh\ncat >/dev/null\necho '{answer}'\n")).unwrap();
    ok(tool("chmod").arg("755").arg(bin.join("docker-credential-test")));
    fs::write(&file, r#"{"credsStore":"test"}"#).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    assert_eq!(ok(push("fourth:2").env("PATH", path)).json()["layers"], 2);

    known(&serde_json::json!({"identitytoken": IDENTITY}));
    let door = Door::before(&registry.address);
    fs::write(&file, fs::read_to_string(&file).unwrap().replace(&registry.address, &door.address)).unwrap();
    let at = |name: &str| format!("docker://{}/{name}", door.address);
    let mut mounted = plain(&repo, &at("mounted:2"));
    ok(mounted.arg("--authfile").arg(&file).args(["--previous", &at("host:1")]));
    // The new layer, the config and three parts of the documents; the old layers were mounted, with one token.
    assert_eq!(count(&door.seen(), "PUT", "/blobs/uploads/"), 5);
    let mount = "refresh_token repository:mounted:pull,push repository:host:pull";
    assert_eq!(issuer.issued().iter().filter(|issued| *issued == mount).count(), 1);
    // Some want a token only for what is in a repository, and some would take a password too.
    let empty = "HTTP/1.1 200 x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    door.set(move |request| if request == "GET /v2/" { Trouble::Says(empty.into()) } else { Trouble::None });
    ok(plain(&repo, &at("asked:1")).arg("--authfile").arg(&file));
    assert_eq!(issuer.issued(), ["refresh_token repository:asked:pull,push"]);
    first_requests(&door, "GET", "/v2/", u32::MAX, Trouble::Adds("WWW-Authenticate: Basic realm=\"x\"".into()));
    ok(plain(&repo, &at("both:1")).arg("--authfile").arg(&file));
    assert_eq!(issuer.issued(), ["refresh_token repository:both:pull,push"]);
    // A token whose time is over: the next one is got.
    let through = at("late:1");
    for (method, part, status) in [
        ("HEAD", "/blobs/", 401),
        ("POST", "/blobs/uploads/", 401),
        ("PUT", "/manifests/", 401),
        // Some only find that a stranger may not write.
        ("PUT", "/manifests/", 403),
    ] {
        first_requests(&door, method, part, 1, Trouble::Status(status));
        issuer.issued();
        ok(plain(&repo, &through).arg("--authfile").arg(&file));
        assert_eq!(issuer.issued().len(), 2, "{method} {part} {status}");
        ok(tool("rm").arg("-rf").arg(dir.path().join("registry-0/store/docker/registry/v2/repositories/late")));
    }

    known(&serde_json::json!({"identitytoken": "another"}));
    fails(&mut push("host:3"), 3, "no or wrong credentials");
    known(&serde_json::json!({"username": USER, "password": "wrong"}));
    fails(&mut push("host:3"), 3, "no or wrong credentials");
    assert_eq!(issuer.issued(), [""; 0]);
    // One that wants a password has nobody who issues tokens.
    let other = TempDir::new().unwrap();
    let bare = Registry::start(other.path(), Access::Password);
    fs::write(&file, format!("{{\"auths\":{{\"{}\":{{\"identitytoken\":\"x\"}}}}}}", bare.address)).unwrap();
    let mut refused = plain(&repo, &bare.image("host:1"));
    fails(refused.arg("--authfile").arg(&file), 3, "does not say who issues tokens");
}

#[test]
fn a_token_may_end_in_the_middle_of_an_upload() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    repo.put_noise("blob", 50 << 20, 1);
    repo.commit(REF, "one");
    let issuer = Issuer::start(dir.path());
    let registry = Registry::with_tokens(dir.path(), &issuer);
    let door = Door::before(&registry.address);
    let file = dir.path().join("auth.json");
    fs::write(&file, format!("{{\"auths\":{{\"{}\":{{\"identitytoken\":\"{IDENTITY}\"}}}}}}", door.address)).unwrap();
    let mut patches = 0;
    door.set(move |request| {
        patches += u32::from(request.starts_with("PATCH"));
        if request.starts_with("PATCH") && patches == 2 { Trouble::Status(401) } else { Trouble::None }
    });
    ok(plain(&repo, &format!("docker://{}/host:1", door.address)).arg("--authfile").arg(&file));
    assert_eq!(issuer.issued().len(), 2);
    // Whoever issues tokens cannot send the identity token elsewhere.
    let other = Door::before(&registry.address);
    let (realm, elsewhere) = (format!("http://{}/token", door.address), format!("http://{}/token", other.address));
    let empty = "Content-Length: 0\r\nConnection: close\r\n\r\n";
    let challenge = format!("HTTP/1.1 401 x\r\nWWW-Authenticate: Bearer realm=\"{realm}\",service=\"s\"\r\n{empty}");
    let redirect = format!("HTTP/1.1 307 x\r\nLocation: {elsewhere}\r\n{empty}");
    door.set(move |request| match request {
        "GET /v2/" => Trouble::Says(challenge.clone()),
        "POST /token" => Trouble::Says(redirect.clone()),
        _ => Trouble::None,
    });
    let mut refused = plain(&repo, &format!("docker://{}/host:1", door.address));
    fails(refused.arg("--authfile").arg(&file), 3, "/token answered 307");
    assert_eq!(other.seen(), [""; 0]);
}

#[test]
fn a_registry_that_says_nothing_is_given_up() {
    let behind = Behind::new(1);
    let Behind { repo, door, .. } = &behind;
    ok(&mut plain(repo, &behind.at("host:1")));
    repo.commit(REF, "two");
    let fails_soon = || {
        let mut next = plain(repo, &behind.at("new:2"));
        next.args(["--previous", &behind.at("host:1"), "--stall-timeout=1"]);
        fails(&mut next, 1, " for 1 s");
    };
    for (method, part) in
        [("GET", "/manifests/"), ("GET", "/blobs/"), ("HEAD", "/blobs/"), ("POST", "/uploads/"), ("PUT", "/manifests/")]
    {
        first_requests(door, method, part, u32::MAX, Trouble::Silence);
        fails_soon();
    }
    // Nor is what is sent in one piece waited for.
    let large = OstreeRepo::new(behind.dir.path(), "large");
    large.put_noise("blob", 20 << 20, 1);
    large.commit(REF, "one");
    door.set(|request| match request.split(' ').next() {
        Some("PATCH") => Trouble::Status(200),
        Some("PUT") if request.contains("/uploads/") => Trouble::Silence,
        _ => Trouble::None,
    });
    let mut whole = plain(&large, &behind.at("large:1"));
    fails(whole.arg("--stall-timeout=1"), 1, "has not got on for");
}

#[test]
fn a_busy_registry_says_when_to_come_again() {
    let behind = Behind::new(1);
    let Behind { repo, door, .. } = &behind;
    for (number, (part, times)) in [("/blobs/sha256:", 2), ("/blobs/uploads/", 1)].into_iter().enumerate() {
        first_requests(door, "", part, times, Trouble::Busy(3));
        let done = ok(&mut plain(repo, &format!("docker://{}/busy{number}:1", door.address)));
        assert!(done.stderr.contains("next try in 3.0 s"), "{part}: {}", done.stderr);
    }
}

/// The first `times` requests like this meet with trouble.
fn first_requests(door: &Door, method: &'static str, part: &'static str, mut times: u32, trouble: Trouble) {
    door.set(move |request| {
        let met = times > 0 && request.starts_with(method) && request.contains(part);
        times -= u32::from(met);
        if met { trouble.clone() } else { Trouble::None }
    });
}

#[test]
fn a_registry_that_misbehaves_is_tried_again_or_named() {
    // Larger than a chunk of an upload and than the first part of a download.
    let behind = Behind::new(20 << 20);
    let Behind { dir, repo, registry, door } = &behind;
    let at = |name: &str| behind.at(name);
    let expected = ok(&mut image(repo, &layout(dir.path(), "one"))).json()["digest"].clone();
    for (number, (method, part, trouble)) in [
        ("HEAD", "/blobs/", Trouble::Status(429)),
        ("POST", "/blobs/uploads/", Trouble::Status(503)),
        ("PATCH", "", Trouble::CutRequest(1 << 20)),
        ("PATCH", "", Trouble::CutAnswer(0)),
        ("PUT", "/blobs/uploads/", Trouble::Status(500)),
        ("PUT", "/manifests/", Trouble::CutAnswer(10)),
    ]
    .into_iter()
    .enumerate()
    {
        first_requests(door, method, part, 1, trouble.clone());
        let done = ok(&mut plain(repo, &at(&format!("push{number}:1"))));
        assert_eq!(done.json()["digest"], expected, "{method} {trouble:?}");
        assert!(done.stderr.contains("next try in"), "{method} {trouble:?}: {}", done.stderr);
    }
    // A registry that takes no chunks, or no such, gets blobs whole.
    for status in [200, 400, 404, 405, 413, 415, 416, 501] {
        first_requests(door, "PATCH", "", u32::MAX, Trouble::Status(status));
        door.seen();
        let done = ok(&mut plain(repo, &at(&format!("whole{status}:1"))));
        assert_eq!(done.json()["digest"], expected);
        assert!(done.stderr.contains("sending blobs whole") && !done.stderr.contains("next try"), "{}", done.stderr);
        assert_eq!(count(&door.seen(), "PATCH", ""), 1, "{status}");
    }

    repo.commit(REF, "two");
    first_requests(door, "GET", "/blobs/", 3, Trouble::CutAnswer(100_000));
    let mut next = plain(repo, &at("push0:2"));
    let done = ok(next.args(["--previous", &at("push0:1"), "--verify-previous"]));
    assert!(done.stderr.contains("next try in"), "{}", done.stderr);

    // A registry whose blobs are not what their names say.
    let manifest = ok(tool("skopeo").args(["inspect", "--raw", "--tls-verify=false", &at("push0:1")])).json();
    let layer = registry.blob(manifest["layers"][1]["digest"].as_str().unwrap());
    let mut bytes = fs::read(&layer).unwrap();
    bytes[4 << 20] ^= 1;
    fs::write(&layer, &bytes).unwrap();
    // Its index is sound, so only reading all of it tells.
    ok(plain(repo, &at("push0:3")).args(["--previous", &at("push0:1")]));
    let mut verified = plain(repo, &at("push0:3"));
    fails(verified.args(["--previous", &at("push0:1"), "--verify-previous"]), 3, "layer 1");
    fails(plain(repo, &layout(dir.path(), "spoilt")).args(["--previous", &at("push0:1")]), 3, "its digest is");
    fs::write(&layer, &bytes[..bytes.len() / 2]).unwrap();
    fails(plain(repo, &layout(dir.path(), "spoilt")).args(["--previous", &at("push0:1")]), 3, "answered 416");
    assert!(!dir.path().join("spoilt").exists());

    fails(&mut plain(repo, &format!("{}@sha256:{}", at("a:1"), "0".repeat(64))), 2, "names a digest");
    fails(&mut plain(repo, &at("a")), 2, "no tag");
}

#[test]
fn an_upload_goes_on_where_it_broke() {
    // Four chunks of an upload.
    let behind = Behind::new(50 << 20);
    let Behind { repo, door, .. } = &behind;
    let image_at = |name: &str| behind.at(name);
    let whole = ok(&mut plain(repo, &image_at("whole:1"))).json();
    let seen = door.seen();
    let (begun, chunks) = (count(&seen, "POST", "/blobs/uploads/"), count(&seen, "PATCH", ""));
    let mut patches = 0;
    door.set(move |request| {
        patches += u32::from(request.starts_with("PATCH"));
        // The server's layer is one chunk, which needs no PATCH; of the next one every other is lost.
        let lost = request.starts_with("PATCH") && patches % 2 == 0;
        if lost { Trouble::CutRequest(1 << 20) } else { Trouble::None }
    });
    let done = ok(&mut plain(repo, &image_at("cut:1")));
    assert_eq!(done.json()["digest"], whole["digest"]);
    let seen = door.seen();
    assert_eq!(count(&seen, "POST", "/blobs/uploads/"), begun, "no upload began anew: {seen:#?}");
    assert!(count(&seen, "GET", "/blobs/uploads/") >= 3, "{seen:#?}");
    assert_eq!(count(&seen, "PATCH", ""), chunks + count(&seen, "GET", "/blobs/uploads/"), "{seen:#?}");
    // What is lost may be the last answer alone.
    let mut large = false;
    door.set(move |request| {
        large |= request.starts_with("PATCH");
        let lost = large && request.starts_with("PUT") && request.contains("/blobs/uploads/");
        large &= !lost;
        if lost { Trouble::CutAnswer(0) } else { Trouble::None }
    });
    assert!(ok(&mut plain(repo, &image_at("lost:1"))).stderr.contains("next try in"));
    let seen = door.seen();
    assert_eq!((count(&seen, "POST", "/uploads/"), count(&seen, "PATCH", "")), (begun, chunks), "{seen:#?}");
    // Nor does it begin anew where the end is refused at first, or the question how far it is.
    let (mut large, mut puts, mut gets) = (false, 0, 0);
    door.set(move |request| {
        large |= request.starts_with("PATCH");
        let (ends, asks) = (request.starts_with("PUT") && large, request.starts_with("GET") && large);
        puts += u32::from(ends && request.contains("/uploads/"));
        gets += u32::from(asks && request.contains("/uploads/"));
        match (ends && puts == 1, asks && gets == 1) {
            (true, _) => Trouble::Status(503),
            (_, true) => Trouble::CutAnswer(0),
            _ => Trouble::None,
        }
    });
    ok(&mut plain(repo, &image_at("end:1")));
    let seen = door.seen();
    assert_eq!((count(&seen, "POST", "/uploads/"), count(&seen, "PATCH", "")), (begun, chunks), "{seen:#?}");
    assert_eq!(count(&seen, "GET", "/uploads/"), 2, "{seen:#?}");
}

#[test]
fn an_upload_that_is_gone_begins_anew() {
    let behind = Behind::new(20 << 20);
    let Behind { repo, door, .. } = &behind;
    // As after a restart of docker-registry without a secret: no session of before is known, in chunks and whole.
    for (name, patch) in [("chunks:1", 202), ("whole:1", 405)] {
        let (mut large, mut gone, mut lost) = (false, false, 0);
        door.set(move |request| {
            let (method, upload) = (request.split(' ').next(), request.contains("/uploads/"));
            large |= method == Some("PATCH");
            gone |= large && lost == 0 && upload && method == Some("PUT");
            gone &= method != Some("POST");
            lost += u32::from(gone);
            match method {
                Some("PUT" | "GET") if gone && upload => Trouble::Status(404),
                Some("PATCH") if patch != 202 => Trouble::Status(patch),
                _ => Trouble::None,
            }
        });
        assert!(ok(&mut plain(repo, &behind.at(name))).stderr.contains("next try"), "{name}");
    }
}

#[test]
fn chunks_are_as_large_as_the_registry_wants_them() {
    let behind = Behind::new(50 << 20);
    let Behind { repo, door, .. } = &behind;
    for (least, chunks) in [(1 << 20, 4), (40 << 20, 2), (100 << 20, 0)] {
        first_requests(door, "POST", "", u32::MAX, Trouble::Adds(format!("OCI-Chunk-Min-Length: {least}")));
        door.seen();
        ok(&mut plain(repo, &behind.at(&format!("host{least}:1"))));
        assert_eq!(count(&door.seen(), "PATCH", ""), chunks, "{least}");
    }
}

#[test]
fn documents_are_attached() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let commit = repo.commit(REF, "one");
    let registry = Registry::start(dir.path(), Access::Plain);
    let digest = ok(&mut plain(&repo, &registry.image("host:1"))).json()["digest"].as_str().unwrap().to_owned();
    // This registry has no referrers API, so they are listed under a tag.
    let tag = digest.replace(':', "-");
    let raw =
        |name: &str| ok(tool("skopeo").args(["inspect", "--raw", "--tls-verify=false", &registry.image(name)])).json();
    let list = raw(&format!("host:{tag}"));
    assert_eq!(list["mediaType"], "application/vnd.oci.image.index.v1+json");
    let types = ["application/spdx+json", "application/vnd.in-toto+json"];
    for (entry, expected) in list["manifests"].as_array().unwrap().iter().zip(types) {
        assert_eq!(entry["artifactType"], expected);
        let manifest = raw(&format!("host@{}", entry["digest"].as_str().unwrap()));
        assert_eq!(manifest["subject"]["digest"], digest.as_str());
        assert_eq!((&manifest["artifactType"], &manifest["annotations"]), (&expected.into(), &entry["annotations"]));
        let document = fs::read(registry.blob(manifest["layers"][0]["digest"].as_str().unwrap())).unwrap();
        let document: Value = serde_json::from_slice(&document).unwrap();
        if expected == types[1] {
            let hex = digest.strip_prefix("sha256:").unwrap();
            assert_eq!(document["subject"][0]["digest"]["sha256"], hex);
            assert_eq!(document["subject"][1]["digest"]["sha256"], commit.as_str());
        } else {
            assert_eq!(document["packages"][0]["checksums"][0]["checksumValue"], commit.as_str());
        }
    }
    // Once more, the same; what others attached stays.
    let other = serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/x-other", "size": 2, "digest": list["manifests"][0]["digest"]});
    let mut more = list.clone();
    more["manifests"].as_array_mut().unwrap().push(other);
    let file = dir.path().join("list.json");
    fs::write(&file, more.to_string()).unwrap();
    let url = format!("http://{}/v2/host/manifests/{tag}", registry.address);
    let media_type = "Content-Type: application/vnd.oci.image.index.v1+json";
    ok(tool("curl")
        .args(["-sSf", "-X", "PUT", "-H", media_type, "--data-binary"])
        .arg(format!("@{}", file.display()))
        .arg(&url));
    ok(&mut plain(&repo, &registry.image("host:again")));
    let after = raw(&format!("host:{tag}"));
    assert_eq!(after["manifests"].as_array().unwrap().len(), 3);
    // Also where it is of the same type, and another's list takes the place of ours at first.
    let mut theirs = more.clone();
    theirs["annotations"] = serde_json::json!({"kept": "yes"});
    let entries = theirs["manifests"].as_array_mut().unwrap();
    entries[0]["annotations"].as_object_mut().unwrap().remove("oscontainer.document");
    entries[0]["digest"] = entries[1]["digest"].clone();
    entries.truncate(1);
    fs::write(&file, theirs.to_string()).unwrap();
    ok(tool("curl")
        .args(["-sSf", "-X", "PUT", "-H", media_type, "--data-binary"])
        .arg(format!("@{}", file.display()))
        .arg(&url));
    let door = Door::before(&registry.address);
    first_requests(&door, "PUT", "/manifests/sha256-", 1, Trouble::Status(201));
    ok(&mut plain(&repo, &format!("docker://{}/host:1", door.address)));
    let after = raw(&format!("host:{tag}"));
    assert_eq!((after["manifests"].as_array().unwrap().len(), &after["annotations"]["kept"]), (3, &"yes".into()));
    assert_eq!(after["manifests"][0], theirs["manifests"][0]);
    // A registry may say in many ways that it has no API for it.
    for status in [400, 403, 405, 501] {
        first_requests(&door, "GET", "/referrers/", u32::MAX, Trouble::Status(status));
        let name = format!("host{status}");
        let done = ok(&mut plain(&repo, &format!("docker://{}/{name}:1", door.address)));
        assert!(!done.stderr.contains("has not taken"), "{status}: {}", done.stderr);
        assert_eq!(raw(&format!("{name}:{tag}")), list);
    }
    // Whatever it says, the image gets there.
    first_requests(&door, "GET", "/referrers/", u32::MAX, Trouble::Status(503));
    let done = ok(&mut plain(&repo, &format!("docker://{}/busy:1", door.address)));
    assert!(done.stderr.contains("has not taken the attached documents"), "{}", done.stderr);
    assert_eq!(inspect(&registry.image("busy:1"))["Digest"], digest.as_str());

    // A registry that has the API does not get the tag: here a door that answers for it.
    let door = Door::before(&registry.address);
    let answer = list.to_string();
    door.set(
        move |request| {
            if request.contains("/referrers/sha256") { Trouble::Answer(answer.clone()) } else { Trouble::None }
        },
    );
    door.seen();
    ok(&mut plain(&repo, &format!("docker://{}/host:1", door.address)));
    assert_eq!(count(&door.seen(), "PUT", &tag), 0);
    // One that does not say where a manifest is now.
    first_requests(&door, "PUT", "/manifests/sha256", u32::MAX, Trouble::Status(201));
    let done = ok(&mut plain(&repo, &format!("docker://{}/ecr:1", door.address)));
    assert!(!done.stderr.contains("has not taken the attached documents"), "{}", done.stderr);
    // One that refuses such manifests gets the image all the same.
    first_requests(&door, "PUT", "/manifests/sha256:", u32::MAX, Trouble::Status(400));
    let done = ok(&mut plain(&repo, &format!("docker://{}/other:1", door.address)));
    assert!(done.stderr.contains("has not taken the attached documents"), "{}", done.stderr);
    assert_eq!(inspect(&registry.image("other:1"))["Digest"], digest.as_str());
}

#[test]
fn what_stays_wrong_is_one_error() {
    let behind = Behind::new(1);
    let Behind { repo, door, .. } = &behind;
    let at = |name: &str| behind.at(name);
    ok(&mut plain(repo, &at("host:1")));
    repo.commit(REF, "two");
    // What stays so has one error, soon or after some tries.
    for (method, part, status, code, reason) in [
        ("GET", "/manifests/", 401, 3, "no or wrong credentials"),
        ("GET", "/manifests/", 404, 3, "404"),
        ("GET", "/blobs/", 404, 3, "404"),
        ("POST", "/blobs/uploads/", 403, 3, "no or wrong credentials"),
        ("POST", "/blobs/uploads/", 429, 1, "answered 429"),
        ("PUT", "/manifests/", 400, 3, "answered 400"),
    ] {
        first_requests(door, method, part, u32::MAX, Trouble::Status(status));
        fails(plain(repo, &at("new:2")).args(["--previous", &at("host:1")]), code, reason);
    }
    first_requests(door, "PUT", "/blobs/uploads/", u32::MAX, Trouble::CutRequest(1000));
    fails(plain(repo, &at("cut:2")).args(["--previous", &at("host:1")]), 1, "uploading the blob");
    // Nobody listens there.
    fails(&mut image(repo, &format!("docker://{}/a:1", free_address())), 1, "https://");
    door.set(|_| Trouble::None);
    assert!(
        tool("skopeo").args(["inspect", "--tls-verify=false", &at("new:2")]).output().unwrap().status.code() != Some(0)
    );
}

#[test]
fn a_push_goes_upon_the_image_that_is_there() {
    let dir = TempDir::new().unwrap();
    let repo = OstreeRepo::new(dir.path(), "repo");
    let registry = Registry::start(dir.path(), Access::Plain);
    let (name, result) = (format!("{}/c/host:stable", registry.address), dir.path().join("result.json"));
    let push = |name: &str| {
        let mut command = plain(&repo, &layout(dir.path(), "elsewhere"));
        command.args(["--push", name, "--result-file"]).arg(&result);
        command
    };
    repo.commit(REF, "one");
    let first = ok(&mut push(&name)).json();
    assert_eq!((&first["image"], &first["previous"]), (&format!("docker://{name}").into(), &Value::Null));
    repo.commit(REF, "two");
    let done = ok(&mut push(&name));
    let second = done.json();
    assert_eq!((&second["previous"], &second["layers"]), (&first["digest"], &3.into()));
    assert_eq!(inspect(&registry.image("c/host:stable"))["Digest"], second["digest"]);
    assert_eq!(fs::read_to_string(&result).unwrap(), done.stdout);
    assert!(!dir.path().join("elsewhere").exists());

    // Set to nothing is not set; and a failure is a result too.
    ok(&mut push(""));
    assert!(dir.path().join("elsewhere").exists());
    fails(&mut push("no name"), 2, "--push docker://no name");
    let written: Value = serde_json::from_str(&fs::read_to_string(&result).unwrap()).unwrap();
    assert!(written["exitCode"] == 2 && written["error"].as_str().unwrap().contains("no name"), "{written}");
    drop(registry);
    fails(&mut push(&name), 1, "Connection refused");
}
