//! `submit`, `rollout` and kubectl against a stand-in API server that checks objects by the
//! real schemas and rights by the Roles in `manifests/`. What a kubelet and the Job controller
//! would do, the tests do.

mod apply;
mod builds;
mod following;
mod proxies;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use e2e::kubernetes::{COMPOSE, Kubernetes, OTHER};
use e2e::{Done, builder, comes_true, fails, manifests, ok, source_dir};
use oscontainer_artifact::digest::Digest;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

const TOKEN: &str = "janes-token";
const DIGEST: &str = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// A cluster to which `kubectl apply -f manifests/` was done, and a directory with a
/// kubeconfig of Jane's, who may submit, and a treefile.
struct Setting {
    cluster: Kubernetes,
    dir: TempDir,
}

impl Setting {
    fn new() -> Self {
        // The Job itself is what the tests submit.
        let cluster = Kubernetes::with_manifests(&["80-compose.yaml"]);
        cluster.know(TOKEN, "jane", &[]);
        for namespace in [COMPOSE, OTHER] {
            cluster.put(json!({
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
                "metadata": {"name": "jane", "namespace": namespace},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "submit"},
                "subjects": [{"kind": "User", "name": "jane", "apiGroup": "rbac.authorization.k8s.io"}],
            }));
        }
        let dir = TempDir::new().unwrap();
        cluster.write_kubeconfig(&dir.path().join("kubeconfig"), TOKEN);
        let write = |name: &str, content: &[u8]| {
            let path = dir.path().join("trees").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            path
        };
        let host = b"ref: my/host\nrepos: [my]\ninclude: ../common/base.yaml\npostprocess-script: finish.sh\n";
        write("host/host.yaml", host);
        write("host/my.repo", b"[my]\nname=my\nbaseurl=http://repo.example/\n");
        let script = write("host/finish.sh", b"#!/bin/sh\nexit 0\n");
        fs::set_permissions(script, fs::Permissions::from_mode(0o755)).unwrap();
        write("common/base.yaml", b"packages: [bash]\nadd-files:\n  - [my logo.png, /usr/share/logo.png]\n");
        write("common/my logo.png", &[0x89, b'P', b'N', b'G', 0xff, 0]);
        Self { cluster, dir }
    }

    fn treefile(&self) -> PathBuf {
        self.dir.path().join("trees/host/host.yaml")
    }

    fn command(&self, name: &str) -> Command {
        let mut command = builder();
        command.arg(name).args(["--output-format", "json"]).env("KUBECONFIG", self.dir.path().join("kubeconfig"));
        command
    }

    fn submit(&self, options: &[&str]) -> Command {
        let mut command = self.command("submit");
        command.arg(self.treefile()).args(options);
        command
    }

    /// Starts `submit` in the background, and waits for its Job.
    #[track_caller]
    fn submitting(&self, options: &[&str]) -> (Running, Value) {
        let mut command = self.submit(options);
        let stderr = self.dir.path().join("stderr");
        let log = fs::File::create(&stderr).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let job = self.cluster.wait("Job", COMPOSE, "compose-");
        (Running { child, stderr }, job)
    }

    /// A Pod of `job` in which `container` runs.
    fn running(&self, job: &Value, container: &str) -> String {
        let namespace = text(&job["metadata"]["namespace"]);
        let pod = self.cluster.make_pod(job);
        self.cluster.set_container(namespace, &pod, "Running", container, json!({"running": {}}));
        pod
    }

    /// The Pod's one container ends, and so does the Job.
    fn end(&self, job: &Value, pod: &str, container: &str, code: i32, message: &Value) {
        let (namespace, name) = (text(&job["metadata"]["namespace"]), text(&job["metadata"]["name"]));
        let phase = if code == 0 { "Succeeded" } else { "Failed" };
        let state = json!({"terminated": {"exitCode": code, "reason": if code == 0 { "Completed" } else { "Error" },
            "message": format!("{message}\n")}});
        // The Job's watch may bring it first.
        let condition = match code {
            0 => json!({"type": "Complete", "status": "True"}),
            _ => json!({"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "a rule matched"}),
        };
        self.cluster.set_container(namespace, pod, phase, container, state);
        self.cluster.set_status("Job", namespace, name, json!({"conditions": [condition]}));
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a text: {value}"))
}

/// A `submit` in the background.
struct Running {
    child: Child,
    stderr: PathBuf,
}

impl Running {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it has logged this.
    #[track_caller]
    fn says(&self, what: &str) {
        let said = || fs::read_to_string(&self.stderr).unwrap();
        assert!(comes_true(|| said().contains(what)), "it never said {what:?}:\n{}", said());
    }

    /// What it left at its end.
    fn done(self) -> Done {
        let Output { status, stdout, .. } = self.child.wait_with_output().unwrap();
        let stderr = fs::read_to_string(&self.stderr).unwrap();
        Done { code: status.code().unwrap_or(-1), stdout: String::from_utf8(stdout).unwrap(), stderr }
    }
}

/// The name of the aggregation Job that this compose Job starts.
fn aggregation(compose: &Value) -> String {
    let by = text(&compose["metadata"]["uid"]);
    format!("aggregate-{}", &Digest::of(format!("{DIGEST} {by}").as_bytes()).hex()[..10])
}

fn published() -> Value {
    json!({"manifestUrl": "http://endpoint.oscontainer.svc:8080/v1/artifacts/host/1/manifest.json",
        "manifestDigest": DIGEST, "commit": "c".repeat(64), "ref": "my/host", "version": "1", "changed": true})
}

#[test]
fn from_the_treefile_to_the_image_through_all_troubles() {
    let setting = Setting::new();
    let cluster = &setting.cluster;
    cluster.shake_watches();
    cluster.cut_logs(3, 2);
    let (submit, job) = setting.submitting(&["--aggregate", "job"]);
    let name = text(&job["metadata"]["name"]).to_owned();

    // The treefile, all that it includes, and the way back to files.
    let map = cluster.wait("ConfigMap", COMPOSE, &name);
    assert_eq!(map["metadata"]["ownerReferences"][0]["uid"], job["metadata"]["uid"]);
    assert_eq!(map["binaryData"]["common__my_20logo.png"], "iVBOR/8A");
    let volume = &job["spec"]["template"]["spec"]["volumes"][0];
    let items = volume["projected"]["sources"][0]["configMap"]["items"].as_array().unwrap();
    let paths: Vec<_> = items.iter().map(|item| (text(&item["path"]), item["mode"].as_u64().unwrap())).collect();
    let expected = [
        ("common/base.yaml", 0o444),
        ("common/my logo.png", 0o444),
        ("host/finish.sh", 0o555),
        ("host/host.yaml", 0o444),
        ("host/my.repo", 0o444),
    ];
    assert_eq!(paths, expected);
    let arguments = job["spec"]["template"]["spec"]["containers"][0]["args"].as_array().unwrap();
    assert_eq!(arguments[1], "/treefile/host/host.yaml");
    assert!(arguments.iter().all(|argument| !text(argument).starts_with("--trigger")), "{arguments:?}");

    // What was once told of a Job of the name that the aggregation will have.
    let aggregation = aggregation(&job);
    let before = json!({"metadata": {"name": aggregation, "namespace": OTHER, "uid": "another"}});
    cluster.warn(&before, "FailedCreate", "Error creating: ValidatingAdmissionPolicy 'x' denied request");

    // The image comes late, the first Pod is evicted, its logs break off.
    let first = cluster.make_pod(&job);
    let waiting = json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such host"}});
    cluster.set_container(COMPOSE, &first, "Pending", "compose", waiting);
    submit.says("ImagePullBackOff: no such host");
    cluster.set_container(COMPOSE, &first, "Running", "compose", json!({"running": {}}));
    for line in 0..10 {
        cluster.log(&first, "compose", format!("first, line {line}."));
    }
    // A kubelet keeps a Pod's log as long as the Pod.
    submit.says("first, line 9.");
    cluster.set_status(
        "Pod",
        COMPOSE,
        &first,
        json!({"phase": "Failed", "reason": "Evicted", "message": "node low on memory",
        "containerStatuses": [{"name": "compose", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 137, "reason": "Error"}}}]}),
    );
    let second = setting.running(&job, "compose");
    for line in 0..5 {
        cluster.log(&second, "compose", format!("second, line {line}."));
    }
    setting.end(&job, &second, "compose", 0, &published());

    // The aggregation: a Job of the CronJob's template, told the artifact.
    let job = cluster.wait("Job", OTHER, &aggregation);
    assert_eq!(job["metadata"]["ownerReferences"][0]["kind"], "CronJob");
    for container in job["spec"]["template"]["spec"]["initContainers"].as_array().unwrap() {
        let env = container["env"].as_array().unwrap();
        let value = |name: &str| env.iter().find(|variable| variable["name"] == name).unwrap()["value"].clone();
        assert_eq!(
            (value("ARTIFACT_URL"), value("ARTIFACT_DIGEST")),
            (published()["manifestUrl"].clone(), json!(DIGEST))
        );
    }
    let pod = setting.running(&job, "rollout");
    cluster.log(&pod, "rollout", "rolling out.");
    let image = json!({"image": "docker://registry.example/host", "digest": format!("sha256:{}", "d".repeat(64))});
    setting.end(&job, &pod, "rollout", 0, &image);

    let done = submit.done();
    assert_eq!(done.code, 0, "{done:?}");
    let result = done.json();
    assert_eq!((&result["job"], &result["manifestDigest"]), (&json!(name), &json!(DIGEST)));
    assert_eq!((&result["digest"], &result["image"]), (&image["digest"], &image["image"]));
    let lines: Vec<_> = done.stderr.lines().filter(|line| line.ends_with('.')).collect();
    let first_lines = (0..10).map(|line| format!("first, line {line}."));
    let all: Vec<_> = first_lines.chain((0..5).map(|line| format!("second, line {line}."))).collect();
    assert_eq!(lines, all.iter().map(String::as_str).chain(["rolling out."]).collect::<Vec<_>>(), "{}", done.stderr);
    assert!(done.stderr.contains("Evicted: node low on memory"), "{}", done.stderr);
    // A log is asked for once too early or too late; nothing else was refused.
    let refused: Vec<_> = cluster.refused().into_iter().filter(|why| !why.contains("/log")).collect();
    assert!(refused.is_empty(), "{refused:?}");
}

#[test]
fn the_jobs_own_error_is_the_answer() {
    let setting = Setting::new();
    let (submit, job) = setting.submitting(&[]);
    let pod = setting.running(&job, "compose");
    let message = json!({"error": "host.yaml:3:1: packges: unknown field", "exitCode": 3});
    setting.end(&job, &pod, "compose", 3, &message);
    let done = submit.done();
    assert_eq!(done.code, 3, "{done:?}");
    assert!(done.stderr.contains("packges: unknown field") && done.stderr.contains("PodFailurePolicy"), "{done:?}");
    // It stays, to be looked at.
    setting.cluster.one("Job", COMPOSE, "compose-");
}

/// Also of the same artifact: that heals a mirror that was set back.
#[test]
fn every_compose_job_aggregates() {
    let setting = Setting::new();
    let mut names = Vec::new();
    for code in [1, 0] {
        let (submit, job) = setting.submitting(&["--aggregate", "job"]);
        let pod = setting.running(&job, "compose");
        setting.end(&job, &pod, "compose", 0, &published());
        let (compose, job) = (job.clone(), setting.cluster.wait("Job", OTHER, &aggregation(&job)));
        let pod = setting.running(&job, "rollout");
        let message = match code {
            0 => json!({"image": "docker://registry.example/host", "digest": DIGEST}),
            _ => json!({"error": "the registry answered 401", "exitCode": 1}),
        };
        setting.end(&job, &pod, "rollout", code, &message);
        let done = submit.done();
        assert!(done.code == code && (code == 0 || done.stderr.contains("the registry answered 401")), "{done:?}");
        names.push(text(&job["metadata"]["name"]).to_owned());
        // The next one has the only Job of that name.
        setting.cluster.remove(&compose);
    }
    assert_ne!(names[0], names[1]);
}

/// `fetch` writes no JSON; its log's end is the message, by `FallbackToLogsOnError`.
#[test]
fn an_init_containers_exit_code_is_the_answer_too() {
    let setting = Setting::new();
    let cases = [
        ("2026 INFO fetching\n2026 ERROR digest mismatch\n", 3, "ERROR digest mismatch"),
        ("2026 ERROR the connection broke\n", 1, "ERROR the connection broke"),
        ("error: unexpected argument '--x' found\n\nUsage: fetch\n", 2, "'--x' found; Usage: fetch"),
        ("", 3, "it left no termination message"),
        ("", 137, "it left no termination message"),
    ];
    for (said, code, shown) in cases {
        let (submit, job) = setting.submitting(&["--aggregate", "job"]);
        let pod = setting.running(&job, "compose");
        setting.end(&job, &pod, "compose", 0, &published());
        let compose = job.clone();
        let job = setting.cluster.wait("Job", OTHER, &aggregation(&job));
        let (name, pod) = (text(&job["metadata"]["name"]), setting.cluster.make_pod(&job));
        let status = |name: &str, state: Value| {
            json!({"name": name, "image": "", "imageID": "", "ready": false,
            "restartCount": 0, "state": state})
        };
        let waiting = json!({"waiting": {"reason": "PodInitializing"}});
        let terminated = json!({"terminated": {"exitCode": code, "reason": "Error", "message": said}});
        let status = json!({"phase": "Failed", "initContainerStatuses": [
            status("fetch", terminated), status("image", waiting.clone())],
            "containerStatuses": [status("rollout", waiting)]});
        setting.cluster.set_status("Pod", OTHER, &pod, status);
        let failed = json!({"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "a rule"});
        setting.cluster.set_status("Job", OTHER, name, json!({"conditions": [failed]}));
        let done = submit.done();
        assert_eq!(done.code, if code > 3 { 1 } else { code }, "{done:?}");
        assert!(done.stderr.lines().last().unwrap().contains(shown), "{shown}: {}", done.stderr);
        setting.cluster.remove(&compose);
    }
}

#[test]
fn what_cannot_start_is_told_and_removed() {
    // Admission refuses: at once.
    let setting = Setting::new();
    let (submit, job) = setting.submitting(&["--image", "registry.example/other:1"]);
    let why = setting.cluster.try_pod(&job).unwrap_err();
    assert!(why.contains("denied request") && why.contains("not registry.example/other:1"), "{why}");
    let done = submit.done();
    assert!(done.code == 3 && done.stderr.contains(&why), "{done:?}");
    assert!(done.stderr.contains("--template manifests/80-compose.yaml"), "{done:?}");
    assert!(setting.cluster.list("Job", COMPOSE).is_empty() && setting.cluster.list("ConfigMap", COMPOSE).len() == 1);

    // No node, or no quota, may pass: after a while.
    for keep in [false, true] {
        let options = ["--start-timeout", "2", "--keep"];
        let (submit, job) = setting.submitting(&options[..if keep { 3 } else { 2 }]);
        setting.cluster.warn(&job, "FailedCreate", "exceeded quota: compute, requested: limits.cpu=8");
        setting.cluster.warn(&job, "FailedToRetrieveImagePullSecret", "some image pull secrets (registry)");
        let pod = setting.cluster.make_pod(&job);
        let condition = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient memory."});
        let status = json!({"phase": "Pending", "conditions": [condition]});
        setting.cluster.set_status("Pod", COMPOSE, &pod, status);
        let done = submit.done();
        assert!(done.code == 1 && done.stderr.contains("3 Insufficient memory"), "{done:?}");
        assert!(done.stderr.contains("exceeded quota") && !done.stderr.contains("pull secrets"), "{done:?}");
        assert_eq!(setting.cluster.list("Job", COMPOSE).len(), usize::from(keep));
        assert_eq!(setting.cluster.list("Pod", COMPOSE).len(), usize::from(keep));
    }
}

#[test]
fn who_may_not_is_told_so() {
    let setting = Setting::new();
    setting.cluster.know("nobodys-token", "nobody", &[]);
    let config = setting.dir.path().join("kubeconfig");
    setting.cluster.write_kubeconfig(&config, "nobodys-token");
    fails(&mut setting.submit(&[]), 3, "User \"nobody\" cannot create resource \"jobs\"");
    setting.cluster.write_kubeconfig(&config, "an-old-token");
    fails(&mut setting.submit(&[]), 3, "the cluster does not know us");
    fails(&mut setting.submit(&["--context", "missing"]), 2, "--context missing");
    // Jane may in the Job's namespace, not in the other context's.
    setting.cluster.write_kubeconfig(&config, TOKEN);
    fails(&mut setting.submit(&["--context", "elsewhere"]), 3, "in the namespace \"elsewhere\"");
    assert!(setting.cluster.list("Job", COMPOSE).is_empty());
}

#[test]
fn a_dry_run_makes_nothing() {
    let setting = Setting::new();
    let before = setting.cluster.requests().len();
    // Not even a kubeconfig is needed.
    let mut client = setting.submit(&["--dry-run=client", "-o", "yaml", "--image", "other:1", "--", "--force-nocache"]);
    let printed = ok(client.env("KUBECONFIG", "/nonexistent")).stdout;
    let objects = manifests::documents(&printed);
    let kinds: Vec<_> = objects.iter().map(|object| text(&object["kind"])).collect();
    assert_eq!(kinds, ["ConfigMap", "Job"]);
    let container = &objects[1]["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["image"], "other:1");
    assert_eq!(container["args"].as_array().unwrap().last().unwrap(), "--force-nocache");
    assert_eq!(setting.cluster.requests().len(), before);

    let printed = ok(&mut setting.submit(&["--dry-run=server", "-o", "json"])).json();
    assert!(printed["items"][1]["metadata"]["uid"].is_string(), "{printed}");
    assert!(setting.cluster.list("Job", COMPOSE).is_empty() && setting.cluster.list("ConfigMap", COMPOSE).len() == 1);

    // Another template, such as the one for user namespaces.
    let template = source_dir().join("manifests/userns/compose.yaml");
    let done = ok(setting.submit(&["--dry-run=server", "-o", "json", "--template"]).arg(template)).json();
    assert_eq!(done["items"][1]["spec"]["template"]["spec"]["hostUsers"], false);
}

#[test]
fn large_treefiles_are_split_and_larger_ones_refused() {
    let setting = Setting::new();
    let add = |count: usize, size: usize| {
        let list: Vec<_> = (0..count).map(|number| format!("  - [file{number}, /usr/share/file{number}]\n")).collect();
        let text = format!("ref: my/host\nrepos: [my]\nadd-files:\n{}", list.concat());
        fs::write(setting.treefile(), text).unwrap();
        for number in 0..count {
            let content = vec![b'a' + (number % 26) as u8; size - number];
            fs::write(setting.treefile().with_file_name(format!("file{number}")), content).unwrap();
        }
    };
    add(5, 500 << 10);
    let list = ok(&mut setting.submit(&["--dry-run=server", "-o", "json"])).json();
    let items = list["items"].as_array().unwrap();
    assert_eq!(items.iter().filter(|item| item["kind"] == "ConfigMap").count(), 5);
    let job = items.iter().find(|item| item["kind"] == "Job").unwrap();
    let sources = &job["spec"]["template"]["spec"]["volumes"][0]["projected"]["sources"];
    let paths = sources.as_array().unwrap().iter().flat_map(|source| source["configMap"]["items"].as_array().unwrap());
    assert_eq!(paths.count(), 5 + 3 - 1);
    add(20, 500 << 10);
    fails(&mut setting.submit(&["--dry-run=client"]), 3, "8192 may be submitted");
    fails(&mut setting.submit(&["--dry-run=client"]), 3, "file0 (500 KiB)");
    add(1, 1 << 20);
    fails(&mut setting.submit(&["--dry-run=client"]), 3, "file0 (1024 KiB)");
}
