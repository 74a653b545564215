//! The ValidatingAdmissionPolicy of `manifests/10-policy.yaml`, its expressions evaluated:
//! which Pods may run in the namespace that admits privileged ones.

use std::fs;

use e2e::endpoint::{Reply, curl};
use e2e::kubernetes::{ADMIN, COMPOSE, Kubernetes, OTHER};
use e2e::{manifests, source_dir};
use serde_json::{Value, json};

/// A cluster with the namespaces and the policy, and nothing else.
fn cluster() -> Kubernetes {
    let cluster = Kubernetes::start();
    let base = source_dir().join("manifests");
    cluster.put_files([base.join("00-namespaces.yaml").as_path(), &base.join("10-policy.yaml")]);
    cluster
}

/// The Pod that the object of this kind and name in a manifest makes, as its controller makes it.
fn pod(file: &str, kind: &str, name: &str) -> Value {
    let text = fs::read_to_string(source_dir().join("manifests").join(file)).unwrap();
    let is = |object: &Value| object["kind"] == kind && object["metadata"]["name"].as_str().unwrap().starts_with(name);
    let object = manifests::documents(&text).into_iter().find(is).unwrap_or_else(|| panic!("{file}: no {kind} {name}"));
    let place = if kind == "CronJob" { "/spec/jobTemplate/spec/template" } else { "/spec/template" };
    let mut pod = object.pointer(place).unwrap().clone();
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = "x".into();
    // As the ServiceAccount admission plugin and defaulting complete it.
    let account = json!({"name": "kube-api-access-x", "projected": {"sources": [
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}}]}});
    let volumes = pod["spec"].as_object_mut().unwrap().entry("volumes").or_insert_with(|| json!([]));
    volumes.as_array_mut().unwrap().push(account);
    pod["spec"]["dnsPolicy"] = "ClusterFirst".into();
    pod["spec"]["schedulerName"] = "default-scheduler".into();
    pod
}

fn compose() -> Value {
    pod("80-compose.yaml", "Job", "compose-")
}

/// Asks for `method` of `path` below the namespace with this object.
fn ask(cluster: &Kubernetes, namespace: &str, method: &str, path: &str, object: &Value) -> Reply {
    let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let mut command = curl();
    command.args(["-X", method, "-H", &format!("Authorization: Bearer {ADMIN}")]);
    command.args(["-H", &format!("Content-Type: {kind}"), "-d", &object.to_string(), "--cacert"]).arg(cluster.ca());
    Reply::of(command.arg(format!("https://{}/api/v1/namespaces/{namespace}/{path}", cluster.address)))
}

#[track_caller]
fn admitted(cluster: &Kubernetes, namespace: &str, what: &str, pod: &Value) {
    // The answer to a dry run is the answer.
    let reply = ask(cluster, namespace, "POST", "pods?dryRun=All", pod);
    assert_eq!(reply.status, 201, "{what}: {}", reply.text());
}

#[track_caller]
fn refused(cluster: &Kubernetes, what: &str, pod: &Value, reason: &str) {
    let reply = ask(cluster, COMPOSE, "POST", "pods?dryRun=All", pod);
    assert_eq!(reply.status, 422, "{what}: {}", reply.text());
    let (message, start) = (
        reply.json()["message"].clone(),
        "pods \"x\" is forbidden: ValidatingAdmissionPolicy \
        'oscontainer-compose' with binding 'oscontainer-compose' denied request: ",
    );
    let why = message.as_str().unwrap().strip_prefix(start).unwrap_or_else(|| panic!("{what}: {message}"));
    assert!(why.contains(reason), "{what}: {why}");
}

/// The Pods of all manifests that run there.
#[test]
fn the_pods_of_the_manifests_are_admitted() {
    let cluster = cluster();
    for (file, kind, name) in [
        ("80-compose.yaml", "Job", "compose-"),
        ("userns/compose.yaml", "Job", "compose-"),
        ("nightly/compose.yaml", "CronJob", "compose"),
        ("openshift/50-compose.yaml", "Job", "compose-"),
        ("direct/direct.yaml", "Job", "direct-"),
    ] {
        admitted(&cluster, COMPOSE, file, &pod(file, kind, name));
    }
    // Elsewhere this policy has no say; there the Pod Security Standard `restricted` has.
    admitted(&cluster, OTHER, "another namespace", &pod("40-endpoint.yaml", "Deployment", "endpoint"));
}

#[test]
fn no_other_pod_is_admitted() {
    const IMAGE: &str = "run the image of the builder, or without privileges that of the aggregator, not ";
    const ACCOUNT: &str = "run with the service account compose";
    const NODE: &str = "use neither namespaces nor ports nor directories of the node";
    const EPHEMERAL: &str = "take no ephemeral containers";
    let cluster = cluster();
    let builder = compose()["spec"]["containers"][0]["image"].as_str().unwrap().to_owned();
    let aggregator = builder.replace("builder", "aggregator");
    let digest = format!("sha256:{}", "0".repeat(64));
    let refuse = |what: &str, place: &str, value: Value, reason: &str| {
        let mut pod = compose();
        let (parent, key) = place.rsplit_once('/').unwrap();
        match pod.pointer_mut(parent).unwrap_or_else(|| panic!("{parent}")) {
            Value::Array(items) => items.push(value),
            parent => parent[key] = value,
        }
        refused(&cluster, what, &pod, reason);
    };

    // Images: not another, not another version, not one that only looks like it.
    for image in [
        "registry.example/other:1".to_owned(),
        "localhost/oscontainer-builder".to_owned(),
        "localhost/oscontainer-builder:latest".to_owned(),
        format!("localhost/oscontainer-builder@{digest}"),
        format!("{builder}@{digest}"),
        format!("{builder}0"),
        format!("evil.example/{builder}"),
        builder.to_uppercase(),
        String::new(),
    ] {
        let reason = format!("{IMAGE}{image}");
        refuse(&image, "/spec/containers/0/image", image.clone().into(), &reason);
    }
    // A second container, before or beside the builder's.
    let other = json!({"name": "other", "image": "other:1"});
    refuse("a second container", "/spec/containers/-", other.clone(), "not other:1");
    refuse("an init container", "/spec/initContainers", json!([other.clone()]), "not other:1");
    let mut sidecar = other.clone();
    sidecar["restartPolicy"] = "Always".into();
    refuse("a sidecar", "/spec/initContainers", json!([sidecar]), "not other:1");
    // The aggregator's image may nothing.
    let harmless = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
    let with = |key: &str, value: Value| {
        let mut security = harmless.clone();
        security[key] = value;
        json!([{"name": "other", "image": aggregator, "securityContext": security}])
    };
    for (what, containers) in [
        ("privileged", with("privileged", true.into())),
        ("escalation", with("allowPrivilegeEscalation", true.into())),
        ("capabilities", with("capabilities", json!({"add": ["SYS_ADMIN"], "drop": ["ALL"]}))),
        ("defaults", json!([{"name": "other", "image": aggregator}])),
    ] {
        refuse(what, "/spec/initContainers", containers, &format!("not {aggregator}"));
    }
    let mut pod = compose();
    pod["spec"]["initContainers"] = with("readOnlyRootFilesystem", true.into());
    admitted(&cluster, COMPOSE, "the aggregator without privileges", &pod);

    // Accounts.
    for account in ["default", "endpoint", "Compose", ""] {
        refuse(account, "/spec/serviceAccountName", account.into(), ACCOUNT);
    }
    let mut pod = compose();
    pod["spec"].as_object_mut().unwrap().remove("serviceAccountName");
    refused(&cluster, "no account", &pod, ACCOUNT);

    // The node's.
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        refuse(field, &format!("/spec/{field}"), true.into(), NODE);
    }
    for path in ["/", "/run/containerd", "/dev"] {
        let volume = json!({"name": "host", "hostPath": {"path": path}});
        refuse(path, "/spec/volumes/-", volume, NODE);
    }
    refuse("a port", "/spec/containers/0/ports", json!([{"containerPort": 8080, "hostPort": 80}]), NODE);
    let mut pod = compose();
    pod["spec"]["containers"][0]["ports"] = json!([{"containerPort": 8080}]);
    pod["spec"]["hostNetwork"] = false.into();
    admitted(&cluster, COMPOSE, "what is false by default", &pod);
    refuse("ephemeral", "/spec/ephemeralContainers", json!([{"name": "debug", "image": builder}]), EPHEMERAL);

    // Controllers' Pods of other namespaces, put there.
    for (file, kind, name) in
        [("40-endpoint.yaml", "Deployment", "endpoint"), ("50-aggregate.yaml", "CronJob", "aggregate")]
    {
        refused(&cluster, file, &self::pod(file, kind, name), ACCOUNT);
    }
    assert!(cluster.list("Pod", COMPOSE).is_empty());
}

/// What is admitted cannot become something else, and can always end.
#[test]
fn updates_of_a_running_pod_are_judged_by_what_they_change() {
    let cluster = cluster();
    let mut pod = compose();
    pod["metadata"]["finalizers"] = json!(["batch.kubernetes.io/job-tracking"]);
    assert_eq!(ask(&cluster, COMPOSE, "POST", "pods", &pod).status, 201);
    // `kubectl debug`.
    let debug = json!({"spec": {"ephemeralContainers": [{"name": "debug", "image": "other:1"}]}});
    let reply = ask(&cluster, COMPOSE, "PATCH", "pods/x/ephemeralcontainers", &debug);
    assert!(reply.status == 422 && reply.text().contains("take no ephemeral containers"), "{reply:?}");
    let mut containers = pod["spec"]["containers"].clone();
    containers[0]["image"] = "other:1".into();
    let reply = ask(&cluster, COMPOSE, "PATCH", "pods/x", &json!({"spec": {"containers": containers}}));
    assert!(reply.status == 422 && reply.text().contains("not other:1"), "{reply:?}");

    // The next release: the policy takes only its own image. The old Pod still runs.
    let mut policy = cluster.one("ValidatingAdmissionPolicy", "", "oscontainer-compose");
    let next = policy["spec"].to_string().replace(concat!(":", env!("CARGO_PKG_VERSION")), ":9.9.9");
    policy["spec"] = serde_json::from_str(&next).unwrap();
    cluster.put(policy);
    let mut another = pod.clone();
    another["metadata"]["name"] = "y".into();
    assert_eq!(ask(&cluster, COMPOSE, "POST", "pods", &another).status, 422);
    let reply = ask(&cluster, COMPOSE, "PATCH", "pods/x", &json!({"metadata": {"finalizers": null}}));
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(ask(&cluster, COMPOSE, "PATCH", "pods/x/ephemeralcontainers", &debug).status, 422);
}

/// Who may create Jobs where everything else is gets no Secret and no other account by it.
#[test]
fn jobs_use_no_secret_but_the_registrys() {
    let cluster = cluster();
    let text = fs::read_to_string(source_dir().join("manifests/50-aggregate.yaml")).unwrap();
    let cron_job = manifests::documents(&text).into_iter().find(|object| object["kind"] == "CronJob").unwrap();
    let mut job = cron_job["spec"]["jobTemplate"].clone();
    job["apiVersion"] = "batch/v1".into();
    job["kind"] = "Job".into();
    job["metadata"]["name"] = "x".into();
    let pod = "/spec/template/spec";
    let create = |job: &Value| {
        let mut command = curl();
        command.args(["-H", &format!("Authorization: Bearer {ADMIN}"), "-H", "Content-Type: application/json"]);
        command.args(["-d", &job.to_string(), "--cacert"]).arg(cluster.ca());
        let path = format!("apis/batch/v1/namespaces/{OTHER}/jobs?dryRun=All");
        Reply::of(command.arg(format!("https://{}/{path}", cluster.address)))
    };
    let reply = create(&job);
    assert_eq!(reply.status, 201, "{}", reply.text());
    let secret = "Jobs in oscontainer use no Secret but the registry's";
    let reference = json!({"name": "endpoint-store", "key": "x"});
    let projected = json!({"sources": [{"secret": {"name": "endpoint-store"}}]});
    for (place, value, why) in [
        ("/volumes/-", json!({"name": "a", "secret": {"secretName": "endpoint-store"}}), secret),
        ("/volumes/-", json!({"name": "a", "projected": projected}), secret),
        ("/volumes/-", json!({"name": "a", "csi": {"driver": "secrets-store.csi.k8s.io"}}), secret),
        ("/containers/0/env/-", json!({"name": "a", "valueFrom": {"secretKeyRef": reference}}), secret),
        ("/initContainers/0/env/-", json!({"name": "a", "valueFrom": {"secretKeyRef": reference}}), secret),
        ("/containers/0/envFrom", json!([{"secretRef": {"name": "endpoint-store"}}]), secret),
        ("/imagePullSecrets", json!([{"name": "endpoint-store"}]), secret),
        ("/serviceAccountName", json!("builder"), "run with the service account aggregate"),
    ] {
        let mut job = job.clone();
        let (parent, key) = place.rsplit_once('/').unwrap();
        match job.pointer_mut(&format!("{pod}{parent}")).unwrap_or_else(|| panic!("{parent}")) {
            Value::Array(items) => items.push(value.clone()),
            parent => parent[key] = value.clone(),
        }
        let reply = create(&job);
        assert!(reply.status == 422 && reply.text().contains(why), "{value}: {}", reply.text());
    }
}
