//! What `submit` survives while it follows a Job, and what ends it.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use e2e::kubernetes::{ADMIN, COMPOSE, OTHER};
use e2e::{Done, comes_true, ok, tool};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{Setting, TOKEN, aggregation, published, text};

#[test]
fn an_interruption_leaves_nothing_or_all() {
    let setting = Setting::new();
    for (signal, keep) in [(Signal::INT, false), (Signal::TERM, false), (Signal::INT, true)] {
        let (submit, job) = setting.submitting(if keep { &["--keep"] } else { &[] });
        setting.cluster.wait("ConfigMap", COMPOSE, text(&job["metadata"]["name"]));
        let pod = setting.running(&job, "compose");
        setting.cluster.log(&pod, "compose", "under way");
        submit.signal(signal);
        let done = submit.done();
        assert!(done.code == 1 && done.stderr.contains("interrupted"), "{done:?}");
        let left = ["Job", "Pod"].map(|kind| setting.cluster.list(kind, COMPOSE).len());
        // The ConfigMap of the manifests is another one.
        let maps = setting.cluster.list("ConfigMap", COMPOSE).len() - 1;
        assert_eq!((left, maps), if keep { ([1, 1], 1) } else { ([0, 0], 0) }, "{done:?}");
    }
}

/// Such as one that the template's own trigger made.
#[test]
fn an_interruption_leaves_the_aggregation_that_was_there_before() {
    let setting = Setting::new();
    let (submit, job) = setting.submitting(&["--aggregate", "job"]);
    let pod = setting.running(&job, "compose");
    let mut before = setting.cluster.one("CronJob", OTHER, "aggregate")["spec"]["jobTemplate"].clone();
    before["apiVersion"] = "batch/v1".into();
    before["kind"] = "Job".into();
    before["metadata"] = json!({"name": aggregation(&job), "namespace": OTHER});
    setting.cluster.put(before);
    setting.end(&job, &pod, "compose", 0, &published());
    submit.says("already, for the same artifact");
    submit.says("started Job aggregate-");
    submit.signal(Signal::INT);
    let done = submit.done();
    assert!(done.code == 1 && done.stderr.contains("interrupted"), "{done:?}");
    setting.cluster.one("Job", OTHER, "aggregate-");
    assert!(setting.cluster.list("Job", COMPOSE).is_empty(), "{done:?}");
}

#[test]
fn a_job_that_somebody_deletes_is_the_end() {
    let setting = Setting::new();
    let (submit, job) = setting.submitting(&[]);
    let mut delete = e2e::endpoint::curl();
    let (name, token) = (text(&job["metadata"]["name"]), format!("Authorization: Bearer {ADMIN}"));
    let path = format!("https://{}/apis/batch/v1/namespaces/{COMPOSE}/jobs/{name}", setting.cluster.address);
    ok(delete.args(["-X", "DELETE", "-H", &token, &path, "--cacert"]).arg(setting.cluster.ca()));
    let done = submit.done();
    assert!(done.code == 1 && done.stderr.contains("was deleted"), "{done:?}");
}

#[test]
fn a_job_that_is_deleted_while_nobody_looks_is_the_end_too() {
    let setting = Setting::new();
    let (submit, job) = setting.submitting(&["--answer-timeout", "1"]);
    submit.says("made the Job");
    setting.running(&job, "compose");
    setting.cluster.set_down(true);
    submit.says("watching");
    setting.cluster.remove(&job);
    setting.cluster.set_down(false);
    let done = submit.done();
    assert!(done.code == 1 && done.stderr.contains("was deleted"), "{done:?}");
}

/// Lines of the Job's own, in the order in which they were shown.
fn shown(done: &Done) -> Vec<&str> {
    done.stderr.lines().filter(|line| line.starts_with("line ")).collect()
}

#[test]
fn a_log_is_whole_whatever_happens_to_its_connection() {
    let setting = Setting::new();
    let cluster = &setting.cluster;
    let (submit, job) = setting.submitting(&["--answer-timeout", "1"]);
    let pod = setting.running(&job, "compose");
    let log =
        |lines: std::ops::Range<usize>| lines.for_each(|line| cluster.log(&pod, "compose", format!("line {line}.")));
    log(0..3);
    submit.says("line 2.");
    // A connection that is dead, and says so to nobody.
    cluster.fall_silent();
    log(3..6);
    submit.says("line 5.");
    // Not UTF-8, and the API server is upgraded.
    cluster.log(&pod, "compose", b"line \xff.");
    submit.says("line \u{fffd}.");
    cluster.set_down(true);
    log(6..8);
    submit.says("watching");
    cluster.set_down(false);
    submit.says("line 7.");
    // The kubelet begins a new file, and the old connection brings nothing of it.
    cluster.rotate_log(&pod, "compose");
    log(8..10);
    submit.says("line 9.");
    // The last lines, and the end, while the connection is dead.
    cluster.fall_silent();
    log(10..12);
    setting.end(&job, &pod, "compose", 0, &published());
    let done = submit.done();
    assert_eq!(done.code, 0, "{done:?}");
    let number = |line: usize| format!("line {line}.");
    let expected: Vec<_> = (0..6).map(number).chain(["line \u{fffd}.".to_owned()]).chain((6..12).map(number)).collect();
    assert_eq!(shown(&done), expected, "{}", done.stderr);
}

#[test]
fn a_container_that_is_started_again_has_two_logs() {
    let setting = Setting::new();
    let cluster = &setting.cluster;
    // Another template, whose Pods start their container again.
    let list = ok(&mut setting.submit(&["--dry-run=client", "-o", "json"])).json();
    let mut template = list["items"].as_array().unwrap().last().unwrap().clone();
    template["spec"].as_object_mut().unwrap().remove("podFailurePolicy");
    template["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure".into();
    let file = setting.dir.path().join("template.yaml");
    fs::write(&file, template.to_string()).unwrap();
    let (submit, job) = setting.submitting(&["--answer-timeout", "1", "--template", file.to_str().unwrap()]);
    let pod = setting.running(&job, "compose");
    cluster.log(&pod, "compose", "line 1.");
    submit.says("line 1.");
    // What is not yet read when it ends is in the previous log.
    cluster.fall_silent();
    cluster.log(&pod, "compose", "line 2.");
    cluster.restart(COMPOSE, &pod, "compose");
    cluster.log(&pod, "compose", "line 3.");
    submit.says("line 3.");
    submit.says("line 2.");
    setting.end(&job, &pod, "compose", 0, &published());
    let done = submit.done();
    assert_eq!(done.code, 0, "{done:?}");
    let mut lines = shown(&done);
    lines.sort_unstable();
    assert_eq!(lines, ["line 1.", "line 2.", "line 3."], "{}", done.stderr);
}

#[test]
fn a_token_that_expires_is_fetched_again() {
    let setting = Setting::new();
    let cluster = &setting.cluster;
    let (config, credential) = (setting.dir.path().join("kubeconfig"), setting.dir.path().join("credential"));
    // As an exec plugin gives it that does not say until when it is valid.
    let give = |token: &str| {
        let kind = json!({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
            "status": {"token": token}});
        fs::write(&credential, kind.to_string()).unwrap();
    };
    let mut written: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    written["users"][0]["user"] = json!({"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "cat",
        "args": [credential], "interactiveMode": "Never"}});
    fs::write(&config, written.to_string()).unwrap();
    give(TOKEN);
    let (submit, job) = setting.submitting(&["--answer-timeout", "1"]);
    let pod = setting.running(&job, "compose");
    cluster.log(&pod, "compose", "line 1.");
    submit.says("line 1.");
    // A while passes in which the old one is not valid any more, and there is no new one.
    cluster.forget(TOKEN);
    submit.says("Unauthorized");
    cluster.know("janes-next-token", "jane", &[]);
    give("janes-next-token");
    setting.end(&job, &pod, "compose", 0, &published());
    let done = submit.done();
    assert_eq!((done.code, shown(&done)), (0, vec!["line 1."]), "{done:?}");
}

/// On a terminal Ctrl-C asks; `script` gives one.
#[test]
fn an_interruption_on_a_terminal_asks() {
    const QUESTION: &str = "Delete the Job and what belongs to it? [Y/n]";
    let setting = Setting::new();
    let cluster = &setting.cluster;
    for (answer, deleted) in [("y\n", true), ("\n", true), ("n\n", false), ("\u{3}", false)] {
        let mut inner = setting.submit(&[]);
        let words: Vec<_> = [inner.get_program()].into_iter().chain(inner.get_args()).collect();
        let words: Vec<_> = words.into_iter().map(|word| word.to_str().unwrap()).collect();
        let terminal = setting.dir.path().join("terminal");
        let mut command = tool("script");
        // Without `exec` some shells stay between the two and answer Ctrl-C with a code of their own.
        let line = format!("exec {}", words.join(" "));
        command.args(["--quiet", "--return", "--flush", "--command", &line]).arg(&terminal);
        command.env("KUBECONFIG", setting.dir.path().join("kubeconfig"));
        inner.env_clear();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut keyboard = child.stdin.take().unwrap();
        let said = || String::from_utf8_lossy(&fs::read(&terminal).unwrap_or_default()).into_owned();
        let job = cluster.wait("Job", COMPOSE, "compose-");
        let pod = setting.running(&job, "compose");
        cluster.log(&pod, "compose", "under way");
        assert!(comes_true(|| said().contains("under way")), "{}", said());
        // What the key Ctrl-C sends.
        keyboard.write_all(b"\x03").unwrap();
        assert!(comes_true(|| said().contains(QUESTION)), "{}", said());
        // Meanwhile nothing is written over the question.
        cluster.log(&pod, "compose", "further on");
        keyboard.write_all(answer.as_bytes()).unwrap();
        let code = child.wait().unwrap().code();
        let (said, left) = (said(), cluster.list("Job", COMPOSE).len());
        assert!(code == Some(1) && said.contains("interrupted") && !said.contains("further on"), "{code:?} {said}");
        assert_eq!(left, usize::from(!deleted), "{answer:?}: {said}");
        let follow = format!("kubectl logs -f -n {COMPOSE} job/{}", text(&job["metadata"]["name"]));
        assert_eq!(said.contains(&follow), !deleted, "{answer:?}: {said}");
        cluster.remove(&job);
        fs::remove_file(&terminal).unwrap();
    }
}
