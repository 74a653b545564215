//! `submit --aggregate buildconfig/NAME` on OpenShift.

use e2e::kubernetes::OTHER;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{DIGEST, Running, Setting, published, text};

/// A cluster with the BuildConfigs, in which Jane may start builds.
fn openshift() -> Setting {
    let setting = Setting::new();
    setting.cluster.put_openshift(&["sha256:server".to_owned()]);
    setting.cluster.put(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "jane-builds", "namespace": OTHER},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "submit-build"},
        "subjects": [{"kind": "User", "name": "jane", "apiGroup": "rbac.authorization.k8s.io"}],
    }));
    setting
}

/// A `submit` whose build runs in a Pod, which has said so: with the build and the Pod's name.
fn building(setting: &Setting) -> (Running, Value, String) {
    let cluster = &setting.cluster;
    let (submit, job) = setting.submitting(&["--aggregate", "buildconfig/oscontainer"]);
    let pod = setting.running(&job, "compose");
    setting.end(&job, &pod, "compose", 0, &published());
    let build = cluster.wait("Build", OTHER, "oscontainer-");
    let name = text(&build["metadata"]["name"]);
    let pod = format!("{name}-build");
    cluster.put(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod,
        "namespace": OTHER, "labels": {"openshift.io/build.name": name}}, "status": {"phase": "Pending"}}));
    cluster.set_container(OTHER, &pod, "Running", "docker-build", json!({"running": {}}));
    cluster.log(&pod, "docker-build", "STEP 1/7");
    submit.says("STEP 1/7");
    (submit, build, pod)
}

#[test]
fn a_build_on_openshift_is_followed() {
    let setting = openshift();
    let cluster = &setting.cluster;
    let (submit, build, pod) = building(&setting);
    let arguments = build["spec"]["strategy"]["dockerStrategy"]["buildArgs"].as_array().unwrap();
    for argument in [
        json!({"name": "ARTIFACT_URL", "value": published()["manifestUrl"]}),
        json!({"name": "ARTIFACT_DIGEST", "value": DIGEST}),
        json!({"name": "OSCONTAINER_CA_FILE", "value": "/service-ca/service-ca.crt"}),
    ] {
        assert!(arguments.contains(&argument), "{argument}: {arguments:?}");
    }
    let digest = format!("sha256:{}", "e".repeat(64));
    cluster.set_container(OTHER, &pod, "Succeeded", "docker-build", json!({"terminated": {"exitCode": 0}}));
    cluster.set_status(
        "Build",
        OTHER,
        text(&build["metadata"]["name"]),
        json!({"phase": "Complete", "output": {"to": {"imageDigest": digest}},
        "outputDockerImageReference": "registry.example/oscontainer:host"}),
    );
    let done = submit.done();
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(done.json()["digest"], digest.as_str());
    let refused = cluster.refused();
    assert!(refused.iter().all(|why| why.contains("/log") || why.contains("404 imagestreamtags")), "{refused:?}");
}

/// The image has the commit already: nothing is built, and the result names it.
#[test]
fn what_the_image_has_is_not_built_again() {
    let setting = openshift();
    let published = published();
    let labels = json!({"ostree.ref": published["ref"], "oscontainer.artifact": DIGEST});
    let layers = ["sha256:server", "sha256:host"].map(str::to_owned);
    setting.cluster.put_image(OTHER, "oscontainer:host", labels, &layers);
    let (submit, job) = setting.submitting(&["--aggregate", "buildconfig/oscontainer"]);
    let pod = setting.running(&job, "compose");
    setting.end(&job, &pod, "compose", 0, &published);
    let done = submit.done();
    let (image, result) = (setting.cluster.one("ImageStreamTag", OTHER, "oscontainer:host"), done.json());
    assert_eq!(result["digest"], image["image"]["metadata"]["name"], "{done:?}");
    assert_eq!(result["image"], image["image"]["dockerImageReference"]);
    assert_eq!(setting.cluster.list("Build", OTHER), Vec::<Value>::new());
}

/// What somebody else cancelled while no watch told it: the list has it, and does not say what it is.
#[test]
fn a_build_that_a_list_brings_is_one_too() {
    let setting = openshift();
    let (submit, mut build, pod) = building(&setting);
    let terminated = json!({"terminated": {"exitCode": 137}});
    setting.cluster.set_container(OTHER, &pod, "Failed", "docker-build", terminated);
    build["status"] = json!({"phase": "Cancelled", "reason": "CancelledBuild", "message": "cancelled by user"});
    setting.cluster.put_unwatched(build);
    let done = submit.done();
    assert!(done.code == 1 && done.stderr.contains("CancelledBuild: cancelled by user"), "{done:?}");
}

#[test]
fn an_interruption_cancels_the_build() {
    let setting = openshift();
    let (submit, build, _) = building(&setting);
    submit.signal(Signal::INT);
    let done = submit.done();
    assert!(done.code == 1 && done.stderr.contains("interrupted"), "{done:?}");
    let build = setting.cluster.one("Build", OTHER, text(&build["metadata"]["name"]));
    assert_eq!(build["status"], json!({"phase": "New", "cancelled": true}), "{done:?}");
}
