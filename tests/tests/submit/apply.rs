//! What is done to objects that are there: by `rollout`, and by kubectl.

use std::fs;
use std::path::Path;

use e2e::kubernetes::{ADMIN, COMPOSE, Kubernetes, OTHER};
use e2e::{fails, manifests, ok, source_dir, tool};
use serde_json::json;
use tempfile::TempDir;

use crate::{DIGEST, Setting, text};

#[test]
fn the_mirror_gets_the_image_that_was_pushed() {
    let setting = Setting::new();
    let cluster = &setting.cluster;
    let config = setting.dir.path().join("kubeconfig");
    cluster.know("the-jobs-token", "system:serviceaccount:oscontainer:aggregate", &[]);
    cluster.write_kubeconfig(&config, "the-jobs-token");
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace("\"name\":\"test\",\"context\":{", "\"name\":\"test\",\"context\":{\"namespace\":\"oscontainer\",");
    fs::write(&config, text).unwrap();
    let result = setting.dir.path().join("image.json");
    let message = setting.dir.path().join("message");
    let rollout = |image: &str| {
        fs::write(&result, json!({"image": image, "digest": DIGEST, "layers": 3}).to_string()).unwrap();
        let mut command = setting.command("rollout");
        command.args(["--job", "aggregate-1", "--job-uid", "7"]).arg("--image-result").arg(&result);
        command.arg("--result-file").arg(&message);
        command
    };
    let mirror = || cluster.one("Deployment", OTHER, "mirror");
    let place = "/spec/template/spec/containers/0/image";
    let before = mirror();

    // Not pushed: nothing is set, and an Event says how to push.
    ok(&mut rollout("oci-archive:/images/oscontainer.oci.tar"));
    assert_eq!(mirror(), before);
    let event = cluster.one("Event", OTHER, "aggregate-1.");
    assert_eq!((&event["reason"], &event["regarding"]["uid"]), (&json!("ImageReady"), &json!("7")));
    assert!(event["note"].as_str().unwrap().contains("skopeo copy oci-archive:/images/oscontainer.oci.tar"), "{event}");

    let done = ok(&mut rollout("docker://registry.example:5000/team/host:stable")).json();
    assert_eq!(done["deployment"], "mirror");
    assert_eq!(fs::read_to_string(&message).unwrap().trim(), done.to_string());
    let pinned = format!("registry.example:5000/team/host@{DIGEST}");
    assert_eq!(mirror().pointer(place), Some(&json!(pinned)));
    assert_eq!(mirror()["spec"]["replicas"], 1);
    // The rest stays, and so does a number of replicas that somebody chose.
    assert_eq!(
        mirror().pointer("/spec/template/spec/containers/0/ports"),
        before.pointer("/spec/template/spec/containers/0/ports")
    );
    let mut scaled = mirror();
    scaled["spec"]["replicas"] = 3.into();
    cluster.put(scaled);
    ok(&mut rollout("docker://registry.example/host:stable"));
    assert_eq!(mirror()["spec"]["replicas"], 3);
    assert_eq!(cluster.refused(), Vec::<String>::new());

    // Of another Deployment it has no right.
    fails(rollout("docker://registry.example/host:stable").args(["--deployment", "endpoint"]), 3, "forbidden");
    assert!(fs::read_to_string(&message).unwrap().contains("\"exitCode\":3"));
    fs::write(&result, "{}").unwrap();
    let mut command = setting.command("rollout");
    fails(command.arg("--image-result").arg(&result), 3, "not the result of an image");
}

/// Applying the manifests works, twice, and after an edit.
#[test]
fn kubectl_applies_the_manifests_again_and_again() {
    let cluster = Kubernetes::start();
    let dir = TempDir::new().unwrap();
    cluster.write_kubeconfig(&dir.path().join("kubeconfig"), ADMIN);
    for name in ["manifests", "treefiles", "aggregator"] {
        ok(tool("cp").arg("-r").arg(source_dir().join(name)).arg(dir.path().join(name)));
    }
    let apply = |options: &[&str]| {
        let mut command = tool("kubectl");
        command.env("KUBECONFIG", dir.path().join("kubeconfig")).env("HOME", dir.path());
        // The stand-in publishes no OpenAPI; it checks every object itself.
        command.args(["apply", "--validate=false", "-f", "manifests/"]).args(options).current_dir(dir.path());
        ok(&mut command).stdout
    };
    let first = apply(&[]);
    assert!(first.lines().count() > 25 && first.lines().all(|line| line.ends_with(" created")), "{first}");
    let second = apply(&[]);
    assert!(second.lines().all(|line| line.ends_with(" unchanged")), "{second}");
    let names = |kind: &str| -> Vec<String> {
        let all = cluster.list(kind, COMPOSE);
        all.iter().map(|object| text(&object["metadata"]["name"]).to_owned()).collect()
    };
    assert_eq!((names("Job").len(), names("ConfigMap").len()), (1, 1));

    // Another treefile, and less memory for the endpoint; `make manifests`.
    let treefile = dir.path().join("treefiles/host.yaml");
    fs::write(&treefile, fs::read_to_string(&treefile).unwrap().replace("  - chrony\n", "")).unwrap();
    for (path, text) in manifests::refreshed(dir.path()) {
        fs::write(path, text).unwrap();
    }
    edit(&dir.path().join("manifests/40-endpoint.yaml"), "memory: 512Mi", "memory: 256Mi");
    edit(&dir.path().join("manifests/40-endpoint.yaml"), "            - --keep=10\n", "");
    let third = apply(&[]);
    let changed: Vec<_> = third.lines().filter(|line| !line.ends_with(" unchanged")).collect();
    let expected = ["deployment.apps/endpoint configured", "configmap/treefile-", "job.batch/compose-"];
    assert!(changed.len() == 3 && changed.iter().zip(expected).all(|(line, start)| line.starts_with(start)), "{third}");
    assert_eq!((names("Job").len(), names("ConfigMap").len()), (2, 2));
    let endpoint = cluster.one("Deployment", OTHER, "endpoint");
    let container = &endpoint["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["resources"]["limits"], json!({"cpu": "2", "memory": "256Mi"}));
    assert!(!container["args"].as_array().unwrap().contains(&json!("--keep=10")));
    let fourth = apply(&["-l", "app.kubernetes.io/name!=compose"]);
    assert!(fourth.lines().all(|line| line.ends_with(" unchanged") && !line.starts_with("job.")), "{fourth}");

    // The mirror as an aggregation leaves it: the documented command leaves it so, and a plain one does not.
    let mut mirror = cluster.one("Deployment", OTHER, "mirror");
    mirror["spec"]["replicas"] = 2.into();
    mirror["spec"]["template"]["spec"]["containers"][0]["image"] = format!("registry.example/host@{DIGEST}").into();
    cluster.put(mirror);
    let rolled_out = cluster.one("Deployment", OTHER, "mirror");
    let text = fs::read_to_string(source_dir().join("manifests/60-mirror.yaml")).unwrap();
    assert!(text.contains("kubectl apply -f manifests/ -l 'app.kubernetes.io/name notin (mirror)'"));
    edit(&dir.path().join("manifests/40-endpoint.yaml"), "memory: 256Mi", "memory: 300Mi");
    let fifth = apply(&["-l", "app.kubernetes.io/name notin (mirror)"]);
    assert!(fifth.contains("deployment.apps/endpoint configured") && !fifth.contains("apps/mirror"), "{fifth}");
    assert_eq!(cluster.one("Deployment", OTHER, "mirror"), rolled_out);
    // As variants of the endpoint need it.
    edit(&dir.path().join("manifests/40-endpoint.yaml"), "memory: 300Mi", "memory: 400Mi");
    let sixth = apply(&["-l", "app.kubernetes.io/name notin (mirror,endpoint)"]);
    assert!(sixth.lines().all(|line| line.ends_with(" unchanged")), "{sixth}");
    assert_eq!(cluster.one("Deployment", OTHER, "mirror"), rolled_out);
    apply(&[]);
    assert_eq!(cluster.one("Deployment", OTHER, "mirror")["spec"]["replicas"], 0);
    assert!(cluster.refused().iter().all(|why| why.contains(" 404 ")), "{:?}", cluster.refused());
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{}: no {from}", path.display());
    fs::write(path, text.replace(from, to)).unwrap();
}
