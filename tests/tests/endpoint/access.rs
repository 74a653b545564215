//! Who may write, and who may read.

use std::fs;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use e2e::authority::Authority;
use e2e::cluster::{self, Cluster};
use e2e::endpoint::{Endpoint, Reply, TOKEN, bearer, curl, file, noise, packed};
use e2e::{builder, fails, ok, run, wait_for};

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
fn reading_may_need_a_token_too() {
    let mut endpoint = Endpoint::start();
    endpoint.store("demo", "1", b"x");
    let paths = ["/", "/v1/artifacts/", "/v1/artifacts/demo/", "/v1/artifacts/demo/latest/manifest.json"];
    let readable = |endpoint: &Endpoint, header: &str| {
        let mut statuses: Vec<_> = paths.iter().map(|path| endpoint.curl(path, &["-H", header]).status).collect();
        statuses.push(endpoint.curl(&file("demo", "1", "repo.tar"), &["-I", "-H", header]).status);
        statuses
    };
    assert_eq!(readable(&endpoint, "X: y"), [200, 200, 200, 307, 200]);
    endpoint.kill();
    let readers = endpoint.file("readers", b"may-read\n");
    let mut command = endpoint.command();
    command.arg("--token-file").arg(endpoint.path("token")).arg("--read-token-file").arg(readers);
    endpoint.run(command);
    assert_eq!(readable(&endpoint, "X: y"), [401; 5]);
    assert_eq!(readable(&endpoint, "Authorization: Bearer wrong"), [403; 5]);
    assert_eq!(readable(&endpoint, "Authorization: Bearer may-read"), [200, 200, 200, 307, 200]);
    assert_eq!(readable(&endpoint, &bearer()), [200, 200, 200, 307, 200]);
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(endpoint.curl(path, &[]).status, 200, "{path}");
    }
    let upload = endpoint.file("upload", b"y");
    let arguments = ["-H", "Authorization: Bearer may-read", "-T", upload.to_str().unwrap()];
    assert_eq!(endpoint.curl(&file("demo", "2", "repo.tar"), &arguments).status, 403);
    assert_eq!(endpoint.put(&file("demo", "2", "repo.tar"), b"y").status, 201);
    assert!(!endpoint.log().contains("may-read"), "{}", endpoint.log());
}

#[test]
fn a_cluster_reviews_the_tokens_of_service_accounts() {
    let cluster = Cluster::start();
    const NEVER: u64 = 1 << 40;
    let token = |name: &str| cluster::token(name, &["oscontainer", "other"], NEVER);
    for (name, user, audiences) in [
        ("writers-token", "system:serviceaccount:oscontainer-compose:compose", &["oscontainer"][..]),
        ("readers-token", "system:serviceaccount:oscontainer:aggregate", &["oscontainer", "other"]),
        ("neighbours-token", "system:serviceaccount:default:compose", &["oscontainer"]),
        ("api-token", "system:serviceaccount:oscontainer-compose:compose", &["https://kubernetes.default.svc"]),
        ("humans-token", "oscontainer-compose:compose", &["oscontainer"]),
    ] {
        cluster.know(&token(name), user, audiences);
    }
    let mut endpoint = Endpoint::start();
    let config = endpoint.path("kubeconfig");
    cluster.write_kubeconfig(&config);
    let start = |endpoint: &mut Endpoint| {
        endpoint.kill();
        let mut command = endpoint.command();
        command.args(["-vv", "--token-review-audience", "oscontainer"]).env("KUBECONFIG", &config);
        command.args(["--allow", "oscontainer-compose/compose", "--allow-read", "oscontainer/aggregate"]);
        endpoint.run(command);
    };
    start(&mut endpoint);
    let path = file("demo", "1", "repo.tar");
    let upload = endpoint.file("upload", b"x");
    let write_with = |endpoint: &Endpoint, token: &str| {
        let header = format!("Authorization: Bearer {token}");
        endpoint.curl(&path, &["-H", &header, "-T", upload.to_str().unwrap()]).status
    };
    let write = |endpoint: &Endpoint, name: &str| write_with(endpoint, &token(name));
    let read = |endpoint: &Endpoint, name: &str| {
        endpoint.curl("/v1/artifacts/", &["-H", &format!("Authorization: Bearer {}", token(name))]).status
    };
    assert_eq!([201, 200, 200], [(); 3].map(|()| write(&endpoint, "writers-token")));
    assert_eq!(cluster.reviews(), 1, "an answer is kept");
    assert_eq!((read(&endpoint, "writers-token"), read(&endpoint, "readers-token")), (200, 200));
    for token in ["readers-token", "neighbours-token", "api-token", "humans-token", "unknown-token"] {
        assert_eq!(write(&endpoint, token), 403, "{token}");
    }
    for token in ["neighbours-token", "api-token", "humans-token", "unknown-token"] {
        assert_eq!(read(&endpoint, token), 403, "{token}");
    }
    assert_eq!(endpoint.curl(&path, &["-T", upload.to_str().unwrap()]).status, 401);
    assert_eq!(endpoint.curl("/v1/artifacts/", &[]).status, 401);

    let log = endpoint.log();
    assert!(log.contains("client=127.0.0.1 writer=oscontainer-compose/compose"), "{log}");

    // What says that it is not for us costs no question; who knows of what says nothing?
    let before = cluster.reviews();
    let (late, other) = (cluster::token("late", &["oscontainer"], 1_000_000_000), cluster::token("x", &["y"], NEVER));
    for token in ["e30.e30.e30", &late, &other] {
        assert_eq!(write_with(&endpoint, token), 403, "{token}");
    }
    assert_eq!(cluster.reviews(), before);
    cluster.know("opaque", "system:serviceaccount:oscontainer-compose:compose", &["oscontainer"]);
    assert_eq!(["garbage", "a.b.c", "opaque"].map(|token| write_with(&endpoint, token)), [403, 403, 200]);
    assert_eq!(cluster.reviews(), before + 3);

    // What the cluster cannot say now is no answer, neither yes nor no.
    cluster.set_down(true);
    assert_eq!(write(&endpoint, "new-token"), 503);
    assert_eq!(write(&endpoint, "writers-token"), 200);
    cluster.set_down(false);
    assert_eq!(write(&endpoint, "new-token"), 403);

    // An API server that knows no audiences says yes to any token that it knows.
    cluster.forget_audiences();
    start(&mut endpoint);
    assert_eq!(write(&endpoint, "writers-token"), 403);
    assert_eq!(cluster.wrong(), [""; 0]);
    for secret in [&token("writers-token"), &token("unknown-token"), "the-endpoints-own-token"] {
        assert!(!endpoint.log().contains(secret), "{secret}: {}", endpoint.log());
    }
}

#[test]
fn options_about_access_are_checked_at_the_start() {
    let endpoint = Endpoint::start();
    let address = e2e::free_address();
    let mut command = endpoint.command();
    command.args(["--listen", &address, "--token-review-audience", "x", "--allow", "no-slash"]);
    assert_eq!(run(&mut command).code, 2);
    let mut command = endpoint.command();
    command.args(["--listen", &address, "--token-review-audience", "x"]);
    assert_eq!(run(&mut command).code, 2, "an audience without accounts lets nobody in");
    let mut command = endpoint.command();
    command.args(["--listen", &address, "--token-review-audience", "x", "--allow", "a/b"]);
    command.env("KUBECONFIG", endpoint.path("absent")).env_remove("KUBERNETES_SERVICE_HOST");
    fails(&mut command, 1, "finding the cluster");
}

#[test]
fn tls_takes_new_certificates_while_it_runs() {
    let (first, second) = (Authority::new(), Authority::new());
    let mut endpoint = Endpoint::start();
    endpoint.kill();
    let (cert, key) = (endpoint.path("tls.crt"), endpoint.path("tls.key"));
    first.issue("endpoint.test", &cert, &key);
    let mut command = endpoint.command();
    command.arg("--token-file").arg(endpoint.path("token"));
    command.arg("--tls-cert").arg(&cert).arg("--tls-key").arg(&key);
    endpoint.run(command);
    let url = endpoint.url("").replace("http://", "https://");
    let get = |authority: &Authority, path: &str| {
        let mut command = curl();
        run(command.args(["-w", " %{http_version}", "--cacert"]).arg(authority.ca()).arg(format!("{url}{path}")))
    };
    assert_eq!(get(&first, "/healthz").stdout, "ok\n 2");
    assert_eq!(get(&second, "/healthz").code, 60, "another authority's certificate");
    let page = get(&first, "/").stdout;
    assert!(page.contains(&format!("--endpoint {url} ")), "{page}");

    // The real clients, over HTTP/2: 20 MB there and back.
    let tarball = noise(20_000_000, 19);
    let dir = endpoint.path("packed");
    packed(&dir, "1", &tarball);
    let publish = |ca: &std::path::Path| {
        let mut command = builder();
        command.args(["publish", "--endpoint", &url, "--token-file"]).arg(endpoint.path("token")).arg(&dir);
        command.arg("--ca-file").arg(ca).env("OSCONTAINER_RETRIES", "0");
        command
    };
    fails(&mut publish(&second.ca()), 1, "certificate");
    ok(&mut publish(&first.ca()));
    let mut command = curl();
    command.arg("--cacert").arg(first.ca()).arg(format!("{url}{}", file("demo", "1", "repo.tar")));
    let reply = Reply::of(&mut command);
    assert_eq!((reply.status, reply.body == tarball), (200, true));
    assert!(endpoint.log().contains("listening on https://"), "{}", endpoint.log());

    // Half of a new pair is not used, all of it is, without a restart.
    let (new_cert, new_key) = (endpoint.path("new.crt"), endpoint.path("new.key"));
    second.issue("endpoint.test", &new_cert, &new_key);
    fs::rename(&new_cert, &cert).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !endpoint.log().contains("stays in use") {
        assert!(Instant::now() < deadline, "{}", endpoint.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(get(&first, "/healthz").stdout, "ok\n 2");
    fs::rename(&new_key, &key).unwrap();
    while get(&second, "/healthz").code != 0 {
        assert!(Instant::now() < deadline, "{}", endpoint.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    // A client that connects and never shakes hands does not disturb the others.
    let _silent = TcpStream::connect(&endpoint.server().address).unwrap();
    assert_eq!(get(&second, "/healthz").stdout, "ok\n 2");
    let mut command = endpoint.command();
    command.args(["--listen", &e2e::free_address()]).arg("--tls-cert").arg(&cert);
    assert_eq!(run(&mut command).code, 2, "a certificate without its key");

    // What is no certificate will be none the next time either.
    let empty = endpoint.file("empty.pem", b"nothing\n");
    let garbage = endpoint.file("garbage.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    for file in [&empty, &garbage] {
        fails(&mut publish(file), 3, file.to_str().unwrap());
        let store = endpoint.path("other");
        for (cert, key) in [(file, &key), (&cert, file)] {
            let mut command = builder();
            command.args(["endpoint", "--listen", &e2e::free_address(), "--store"]).arg(&store);
            fails(command.arg("--tls-cert").arg(cert).arg("--tls-key").arg(key), 3, file.to_str().unwrap());
        }
    }
}

#[test]
fn a_client_without_a_certificate_is_kept_out_where_one_is_asked_for() {
    let (server, clients, others) = (Authority::new(), Authority::new(), Authority::new());
    let mut endpoint = Endpoint::start();
    endpoint.kill();
    let pair = |authority: &Authority, name: &str| {
        let (cert, key) = (endpoint.path(&format!("{name}.crt")), endpoint.path(&format!("{name}.key")));
        authority.issue(name, &cert, &key);
        (cert, key)
    };
    let ((cert, key), right, wrong) = (pair(&server, "endpoint"), pair(&clients, "builder"), pair(&others, "other"));
    let mut command = endpoint.command();
    command.arg("--token-file").arg(endpoint.path("token"));
    command.arg("--tls-cert").arg(&cert).arg("--tls-key").arg(&key).arg("--tls-client-ca").arg(clients.ca());
    endpoint.run(command);
    let url = endpoint.url("").replace("http://", "https://");
    let dir = endpoint.path("packed");
    packed(&dir, "1", &noise(1_000_000, 20));
    let publish = |pair: Option<&(std::path::PathBuf, std::path::PathBuf)>| {
        let mut command = builder();
        command.args(["publish", "--endpoint", &url, "--token-file"]).arg(endpoint.path("token")).arg(&dir);
        command.arg("--ca-file").arg(server.ca()).env("OSCONTAINER_RETRIES", "0");
        if let Some((cert, key)) = pair {
            command.arg("--client-cert").arg(cert).arg("--client-key").arg(key);
        }
        command
    };
    fails(&mut publish(None), 1, "/v1/artifacts/demo/1/manifest.json");
    fails(&mut publish(Some(&wrong)), 1, "/v1/artifacts/demo/1/manifest.json");
    ok(&mut publish(Some(&right)));
    let get = |pair: &[&std::path::Path]| {
        let mut command = curl();
        command.arg("--cacert").arg(server.ca());
        if let [cert, key] = pair {
            command.arg("--cert").arg(cert).arg("--key").arg(key);
        }
        run(command.arg(format!("{url}/healthz"))).code
    };
    assert_eq!(get(&[&right.0, &right.1]), 0);
    assert_ne!(get(&[]), 0);
    assert_ne!(get(&[&wrong.0, &wrong.1]), 0);
}

#[test]
fn a_client_that_comes_too_often_waits() {
    let endpoint = Endpoint::with(&["--client-rate", "1"]);
    wait_for(|| endpoint.curl("/healthz", &[]).status == 200, "the endpoint answers");
    let mut statuses = (0..200).map(|_| endpoint.curl("/v1/artifacts/", &[]).status);
    let passed = statuses.by_ref().take_while(|status| *status == 200).count();
    // On a slow machine the clock grants more meanwhile.
    assert!((10..200).contains(&passed), "a burst passes, and no more: {passed}");
    let path = file("demo", "1", "repo.tar");
    // A body is not in the way of the answer.
    let busy = (0..200).map(|_| endpoint.put(&path, &noise(3_000_000, 21))).find(|reply| reply.status == 429);
    let busy = busy.expect("there are too many");
    assert!(busy.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1, "{busy:?}");
    assert_eq!(endpoint.curl("/healthz", &[]).status, 200, "probes always pass");
    // The client waits as long as it is told.
    let dir = endpoint.path("packed");
    packed(&dir, "2", &noise(1_000_000, 22));
    let mut publish = builder();
    publish.args(["publish", "--endpoint", &endpoint.url(""), "--token-file"]).arg(endpoint.path("token")).arg(&dir);
    ok(&mut publish);
}
