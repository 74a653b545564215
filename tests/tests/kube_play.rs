//! The manifests' own Pods, run by `podman kube play` with the built images: from the
//! treefile to a published artifact, aggregated by the unprivileged Pod, served by the
//! mirror's. The API server is a stand-in, with the real schemas and the manifests' Roles;
//! podman is the kubelet. One transformation, [`Cluster::play`], says what differs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use e2e::containers::{Buildah, Podman, debian_base};
use e2e::endpoint::{Reply, curl};
use e2e::kubernetes::{COMPOSE, Kubernetes, OTHER};
use e2e::registry::{Access, Registry};
use e2e::{Done, ok, rpms, run, source_dir, target_dir, tool, wait_for};
use serde_json::{Value, json};
use tempfile::TempDir;

const ENDPOINT: &str = "http://127.0.0.1:8080";

/// The nodes: podman, and what a cluster would have beside it.
struct Cluster {
    api: Kubernetes,
    podman: Podman,
    dir: TempDir,
}

/// The images of `make images`, upon a Debian in place of Fedora, as archives.
fn images(dir: &Path) -> [PathBuf; 2] {
    let buildah = Buildah::as_root(dir);
    let scratch = buildah.ok(buildah.command().args(["from", "scratch"])).stdout;
    buildah.ok(buildah.command().args(["add", "-q", scratch.trim()]).arg(debian_base()));
    buildah.ok(buildah.command().args(["commit", "-q", "--rm", scratch.trim(), "localhost/base"]));
    let mut images = buildah.environment(source_dir().join("builder/images.sh").to_str().unwrap());
    images.env("BASE", "localhost/base").env("IMAGES", dir.join("images"));
    buildah.ok(images.arg(target_dir()).arg(env!("CARGO_PKG_VERSION")));
    ["builder", "aggregator"].map(|name| dir.join(format!("images/oscontainer-{name}.oci.tar")))
}

impl Cluster {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let archives = images(dir.path());
        let podman = Podman::new(dir.path());
        for archive in archives {
            ok(podman.command().args(["load", "-q", "-i"]).arg(archive));
        }
        let api = Kubernetes::with_manifests(&[]);
        for (token, account) in
            [("a", "oscontainer:endpoint"), ("b", "oscontainer-compose:compose"), ("c", "oscontainer:aggregate")]
        {
            api.know(token, &format!("system:serviceaccount:{account}"), &[]);
        }
        api.know("for-the-endpoint", "system:serviceaccount:oscontainer-compose:compose", &["oscontainer-endpoint"]);
        // The cluster's DNS.
        let hosts = "127.0.0.1 localhost endpoint.oscontainer.svc\n";
        fs::write(dir.path().join("hosts"), hosts).unwrap();
        let conf = dir.path().join("podman/containers.conf");
        let hosts = format!("base_hosts_file = \"{}\"\n", dir.path().join("hosts").display());
        fs::write(&conf, fs::read_to_string(&conf).unwrap() + &hosts).unwrap();
        Self { api, podman, dir }
    }

    /// Runs the Pod of `object` as podman 4.3 can, which knows neither Jobs nor projected
    /// volumes. This is all that is done to it:
    ///
    /// - a Job becomes the Pod of its template, with the labels that the Job controller adds;
    /// - what the kubelet mounts itself is mounted from ConfigMaps and a file of the host: the
    ///   service account's token, the projected token, the termination message;
    /// - claims, empty directories and the Secret that is optional, and missing, are podman's
    ///   volumes, writable by the Pod's `fsGroup`;
    /// - what the kubelet does itself: `$(VARIABLE)` in arguments is replaced, probes are asked by
    ///   the test (podman would run a curl in the container, where there is none);
    /// - the node's network is the Pod's, for there is no other here, so no port is mapped.
    fn play(&self, object: &Value, token: &str, config_maps: &[Value]) -> String {
        let owner = object["metadata"]["name"].as_str().unwrap();
        let mut pod = object["spec"]["template"].clone();
        let name = format!("{owner}-pod");
        let group = &pod["spec"]["securityContext"]["fsGroup"].clone();
        pod["apiVersion"] = "v1".into();
        pod["kind"] = "Pod".into();
        pod["metadata"]["name"] = name.clone().into();
        if object["kind"] == "Job" {
            pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] = owner.into();
            pod["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] = object["metadata"]["uid"].clone();
        }
        let spec = pod["spec"].as_object_mut().unwrap();
        spec.insert("hostNetwork".to_owned(), true.into());
        let message = self.message(&name);
        fs::write(&message, "").unwrap();
        ok(tool("chmod").arg("666").arg(&message));
        let (host, port) = self.api.address.split_once(':').unwrap();
        let account = json!({"token": token, "namespace": object["metadata"]["namespace"],
            "ca.crt": fs::read_to_string(self.api.ca()).unwrap()});
        let mut documents = config_maps.to_vec();
        documents.push(config_map("account", account));
        documents.push(config_map("token", json!({"token": "for-the-endpoint"})));
        let mut volumes = spec.get("volumes").and_then(Value::as_array).cloned().unwrap_or_default();
        for volume in &mut volumes {
            let name = volume["name"].clone();
            let claim = volume["persistentVolumeClaim"]["claimName"].as_str().map(str::to_owned);
            if !volume["projected"].is_null() {
                *volume = json!({"name": name, "configMap": {"name": "token"}});
            } else if let Some(claim) = claim {
                self.volume(&claim, group);
                *volume = json!({"name": name, "persistentVolumeClaim": {"claimName": claim}});
            } else if !volume["emptyDir"].is_null() || volume["secret"]["optional"] == true {
                let claim = format!("{owner}-{}", name.as_str().unwrap());
                self.volume(&claim, group);
                *volume = json!({"name": name, "persistentVolumeClaim": {"claimName": claim}});
            }
        }
        volumes.push(json!({"name": "account", "configMap": {"name": "account"}}));
        volumes.push(json!({"name": "message", "hostPath": {"path": message, "type": "File"}}));
        spec.insert("volumes".to_owned(), volumes.into());
        for list in ["initContainers", "containers"] {
            for container in pod["spec"][list].as_array_mut().into_iter().flatten() {
                let mut mounts = container["volumeMounts"].as_array().cloned().unwrap_or_default();
                mounts.push(json!({"name": "account", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}));
                mounts.push(json!({"name": "message", "mountPath": "/dev/termination-log"}));
                container["volumeMounts"] = mounts.into();
                let fields = container.as_object_mut().unwrap();
                fields.retain(|key, _| !["ports", "livenessProbe", "readinessProbe"].contains(&key.as_str()));
                let mut env = container["env"].as_array().cloned().unwrap_or_default();
                env.push(json!({"name": "KUBERNETES_SERVICE_HOST", "value": host}));
                env.push(json!({"name": "KUBERNETES_SERVICE_PORT", "value": port}));
                for argument in container["args"].as_array_mut().into_iter().flatten() {
                    let expanded = env.iter().filter_map(|one| Some((one["name"].as_str()?, one["value"].as_str()?)));
                    let text = argument.as_str().unwrap().to_owned();
                    let replaced =
                        expanded.fold(text, |text, (name, value)| text.replace(&format!("$({name})"), value));
                    *argument = replaced.into();
                }
                container["env"] = env.into();
            }
        }
        documents.push(pod);
        let file = self.dir.path().join(format!("{name}.yaml"));
        let text: Vec<_> =
            documents.iter().map(|one| format!("---\n{}", serde_yaml::to_string(one).unwrap())).collect();
        fs::write(&file, text.concat()).unwrap();
        let played = run(self.podman.command().args(["kube", "play"]).arg(&file));
        if played.code != 0 {
            // An init container failed: what it said.
            let logs = run(self.podman.command().args(["pod", "logs", &name]));
            panic!("{name}: {}\n{}\n{}", played.stderr, logs.stdout, logs.stderr);
        }
        name
    }

    fn volume(&self, name: &str, group: &Value) {
        if run(self.podman.command().args(["volume", "inspect", name])).code == 0 {
            return;
        }
        ok(self.podman.command().args(["volume", "create", name]));
        let mounted = ok(self.podman.command().args(["volume", "inspect", "--format", "{{.Mountpoint}}", name]));
        if !group.is_null() {
            ok(tool("chgrp").arg(group.to_string()).arg(mounted.stdout.trim()));
        }
        ok(tool("chmod").arg(if group.is_null() { "1777" } else { "2775" }).arg(mounted.stdout.trim()));
    }

    /// The file of a Pod's termination message.
    fn message(&self, pod: &str) -> PathBuf {
        self.dir.path().join(format!("{pod}.message"))
    }

    /// Waits for a container's end; gives its exit code and log.
    fn ended(&self, pod: &str, container: &str) -> (String, String) {
        let name = format!("{pod}-{container}");
        let code = ok(self.podman.command().args(["wait", &name])).stdout.trim().to_owned();
        let Done { stdout, stderr, .. } = ok(self.podman.command().args(["logs", &name]));
        (code, stdout + &stderr)
    }
}

fn config_map(name: &str, data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
}

/// The repository of packages, over HTTP; dropped, it ends.
struct Packages {
    child: Child,
    url: String,
}

impl Packages {
    fn serve() -> Self {
        let address = e2e::free_address();
        let port = address.rsplit(':').next().unwrap();
        let mut command = tool("python3");
        command.args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"]).arg(rpms::demo_repo()).arg(port);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let packages = Self { child, url: format!("http://{address}") };
        wait_for(|| std::net::TcpStream::connect(&address).is_ok(), "the packages' server");
        packages
    }
}

impl Drop for Packages {
    fn drop(&mut self) {
        // It may have ended already; that is what the drop wants.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn from_the_treefile_to_the_mirror() {
    let packages = Packages::serve();
    let cluster = Cluster::new();
    let registry = Registry::start(cluster.dir.path(), Access::Plain);
    let api = &cluster.api;
    let get = |path: &str| Reply::of(curl().arg(format!("{ENDPOINT}{path}")));

    let endpoint = cluster.play(&api.one("Deployment", OTHER, "endpoint"), "a", &[]);
    wait_for(|| get("/readyz").status == 200, "the endpoint");

    // The shipped Job with another treefile: there is no Fedora here.
    let demo = fs::read_to_string(source_dir().join("treefiles/demo.yaml")).unwrap();
    let (before, after) = (demo.find("add-files:").unwrap(), demo.find("metadata:").unwrap());
    let treefile = format!("{}{}", &demo[..before], &demo[after..]);
    let repo = format!("[demo]\nname=demo\nbaseurl={}\ngpgcheck=0\n", packages.url);
    let job = api.one("Job", COMPOSE, "compose-");
    let volumes = job["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    let map = volumes.iter().find_map(|volume| volume["configMap"]["name"].as_str()).unwrap();
    let treefile = config_map(map, json!({"host.yaml": treefile, "host.repo": repo}));
    let pod = cluster.play(&job, "b", &[treefile]);
    let (code, log) = cluster.ended(&pod, "compose");
    let message: Value = serde_json::from_str(&fs::read_to_string(cluster.message(&pod)).unwrap()).unwrap_or_default();
    assert!(code == "0" && message["changed"] == true, "{code} {message}\n{log}\n{:?}", api.refused());
    let digest = message["manifestDigest"].as_str().unwrap();
    let commit = message["commit"].as_str().unwrap();
    let path = message["manifestUrl"].as_str().unwrap().replace("http://endpoint.oscontainer.svc:8080", "");
    assert_eq!(get(&path).status, 200);
    // Who is not the compose Job may not write.
    let mut put = curl();
    put.args(["-X", "PUT", "-H", "Authorization: Bearer b", "-d", "x"]);
    assert_eq!(Reply::of(put.arg(format!("{ENDPOINT}/v1/artifacts/a/1/repo.tar"))).status, 403);
    let reasons = |namespace: &str| -> Vec<String> {
        api.list("Event", namespace).iter().map(|event| event["reason"].as_str().unwrap().to_owned()).collect()
    };
    for reason in ["Composing", "Triggered", "Published"] {
        assert!(reasons(COMPOSE).iter().any(|one| one == reason), "{reason}: {:?}", reasons(COMPOSE));
    }

    // Its trigger made the aggregation Job. First without, then with a registry.
    let job = api.one("Job", OTHER, "aggregate-");
    assert_eq!(job["metadata"]["annotations"]["oscontainer/artifact"], digest);
    let nowhere = config_map("oscontainer", json!({"nothing": "here"}));
    let pod = cluster.play(&job, "c", &[nowhere]);
    let (code, log) = cluster.ended(&pod, "rollout");
    assert!(code == "0" && log.contains("skopeo copy oci-archive:/images/oscontainer.oci.tar"), "{code} {log}");
    assert!(reasons(OTHER).contains(&"ImageReady".to_owned()));
    ok(cluster.podman.command().args(["pod", "rm", "-f", "-t", "0", &pod]));

    let image = format!("{}/host:stable", registry.address);
    let there = config_map("oscontainer", json!({"image": image, "tls-verify": "false"}));
    let pod = cluster.play(&job, "c", &[there]);
    let (code, log) = cluster.ended(&pod, "rollout");
    assert!(code == "0", "{code} {log} {:?}", api.refused());
    let rolled: Value = serde_json::from_str(&fs::read_to_string(cluster.message(&pod)).unwrap()).unwrap();
    assert!(reasons(OTHER).contains(&"RolledOut".to_owned()));
    for pod in [&pod, &endpoint] {
        ok(cluster.podman.command().args(["pod", "rm", "-f", "-t", "0", pod]));
    }

    // The mirror as its Deployment now says.
    let mirror = api.one("Deployment", OTHER, "mirror");
    let pinned = format!("{}/host@{}", registry.address, rolled["digest"].as_str().unwrap());
    assert_eq!(mirror.pointer("/spec/template/spec/containers/0/image"), Some(&json!(pinned)));
    assert_eq!(mirror["spec"]["replicas"], 1);
    ok(cluster.podman.command().args(["pull", "-q", "--tls-verify=false", &pinned]));
    cluster.play(&mirror, "", &[]);
    wait_for(|| get("/healthz").status == 200, "the mirror");
    let client = cluster.dir.path().join("client");
    let repo = format!("--repo={}", client.display());
    ok(tool("ostree").args([&repo, "init", "--mode=bare-user"]));
    ok(tool("ostree").args([&repo, "remote", "add", "--no-gpg-verify", "host", ENDPOINT]));
    ok(tool("ostree").args([&repo, "pull", "host", &format!("{}@{commit}", message["ref"].as_str().unwrap())]));
    ok(tool("ostree").args([&repo, "fsck"]));
    assert_eq!(api.refused(), Vec::<String>::new());
}
