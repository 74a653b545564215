//! `run` as in its Pod: with the service account's files where the kubelet mounts them, it
//! composes, publishes, starts the aggregation and writes Events, with the rights of the
//! manifests' Roles and no others. The API server is a stand-in.

use std::fs;
use std::process::Command;

use e2e::endpoint::{Endpoint, bearer};
use e2e::kubernetes::{COMPOSE, Kubernetes, OTHER};
use e2e::{builder, fails, ok, rpms, source_dir, tool};
use oscontainer_artifact::digest::Digest;
use serde_json::{Value, json};
use tempfile::TempDir;

const TOKEN: &str = "the-pods-token";
const ACCOUNT: &str = "/run/secrets/kubernetes.io/serviceaccount";

/// A cluster with the manifests, an endpoint, and what the Pod's volumes hold.
struct Setting {
    cluster: Kubernetes,
    endpoint: Endpoint,
    dir: TempDir,
}

impl Setting {
    fn new() -> Self {
        let (cluster, endpoint, dir) = (Kubernetes::with_manifests(&[]), Endpoint::start(), TempDir::new().unwrap());
        cluster.know(TOKEN, "system:serviceaccount:oscontainer-compose:compose", &[]);
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("account/token", TOKEN);
        write("account/namespace", COMPOSE);
        write("account/ca.crt", &fs::read_to_string(cluster.ca()).unwrap());
        write("token", bearer().trim_start_matches("Authorization: Bearer "));
        let fields = "selinux: false\nreleasever: \"1\"\nrepos: [distribution]\npackages: [filesystem, setup, bash]\n";
        write("treefile/host.yaml", &format!("ref: test/host\n{fields}"));
        // As it is shipped: the repositories are those of the image.
        let shipped = fs::read_to_string(source_dir().join("treefiles/host.repo")).unwrap();
        write("treefile/host.repo", &shipped);
        write("yum.repos.d/another.repo", "[another]\nname=another\nbaseurl=http://127.0.0.1:1/\n");
        rpms::write_repo_file(&dir.path().join("yum.repos.d/d.repo"), "distribution", &rpms::demo_repo()).unwrap();
        Self { cluster, endpoint, dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// `run` in a mount namespace in which the account's files are where a Pod has them.
    fn run(&self, trigger: &[&str]) -> Command {
        self.run_as("7", trigger)
    }

    /// The same as the Job with this uid.
    fn run_as(&self, uid: &str, trigger: &[&str]) -> Command {
        let inner = builder();
        let (host, port) = self.cluster.address.split_once(':').unwrap();
        let mut command = tool("unshare");
        let script = format!("mount -t tmpfs tmpfs /run && mkdir -p {ACCOUNT} && cp \"$0\"/* {ACCOUNT} && exec \"$@\"");
        command.args(["--mount", "sh", "-ec", &script, &self.path("account")]).arg(inner.get_program());
        command.args(["run", "--engine", "dnf", "--output-format", "json", "--version-string", "1"]);
        command.args(["--endpoint", &self.endpoint.url(""), "--token-file", &self.path("token")]);
        command.args(["--cache-dir", &self.path("cache"), "--repos-dir", &self.path("yum.repos.d")]);
        command.args(["--job", "compose-1", "--job-uid", uid, "--result-file", &self.path("message")]);
        command.args(trigger).arg(self.path("treefile/host.yaml"));
        command.env("KUBERNETES_SERVICE_HOST", host).env("KUBERNETES_SERVICE_PORT", port);
        command.env_remove("KUBECONFIG").env("HOME", self.dir.path());
        command
    }

    /// The Events about the Job so far: reasons and times.
    fn events(&self) -> Vec<(String, String)> {
        let mut events = self.cluster.list("Event", COMPOSE);
        events.sort_by_key(|event| event["metadata"]["resourceVersion"].as_str().unwrap().parse::<u64>().unwrap());
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        for event in &events {
            assert_eq!(
                event["regarding"],
                json!({"apiVersion": "batch/v1", "kind": "Job", "name": "compose-1",
                "namespace": COMPOSE, "uid": "7"})
            );
        }
        events.iter().map(|event| (text(&event["reason"]), text(&event["eventTime"]))).collect()
    }
}

fn environment<'a>(job: &'a Value, name: &str) -> Vec<&'a str> {
    let pod = &job["spec"]["template"]["spec"];
    let containers = ["initContainers", "containers"].map(|list| pod[list].as_array().unwrap());
    let variables = containers.into_iter().flatten().flat_map(|container| container["env"].as_array().unwrap());
    variables.filter(|one| one["name"] == name).map(|one| one["value"].as_str().unwrap()).collect()
}

#[test]
fn a_run_starts_the_aggregation_job() {
    let setting = Setting::new();
    let there = ["--trigger", "cronjob/aggregate", "--trigger-namespace", OTHER];
    let result = ok(&mut setting.run(&there)).json();
    let (url, digest) = (result["manifestUrl"].as_str().unwrap(), result["manifestDigest"].as_str().unwrap());
    let name = |uid: &str| format!("aggregate-{}", &Digest::of(format!("{digest} {uid}").as_bytes()).hex()[..10]);
    let job = setting.cluster.one("Job", OTHER, &name("7"));
    assert_eq!(job["metadata"]["annotations"]["oscontainer/artifact"], digest);
    assert_eq!(environment(&job, "ARTIFACT_URL"), [url; 3]);
    assert_eq!(environment(&job, "ARTIFACT_DIGEST"), [digest; 3]);
    let template = setting.cluster.one("CronJob", OTHER, "aggregate");
    assert_eq!(job["metadata"]["ownerReferences"][0]["uid"], template["metadata"]["uid"]);
    let account = &job["spec"]["template"]["spec"]["serviceAccountName"];
    assert_eq!((account, &template["spec"]["suspend"]), (&json!("aggregate"), &json!(true)));
    // Nothing was asked for that the Roles do not give.
    assert_eq!(setting.cluster.refused(), Vec::<String>::new());

    // Events: the stages, not more often than every five seconds, and the end.
    let events = setting.events();
    let reasons: Vec<_> = events.iter().map(|(reason, _)| reason.as_str()).collect();
    assert_eq!((reasons[0], &reasons[reasons.len() - 2..]), ("Composing", &["Triggered", "Published"][..]));
    let seconds = |time: &str| -> f64 {
        let (hours, rest) = time.split_once('T').unwrap().1.trim_end_matches('Z').split_once(':').unwrap();
        let (minutes, seconds) = rest.split_once(':').unwrap();
        let number = |text: &str| text.parse::<f64>().unwrap();
        number(hours) * 3600.0 + number(minutes) * 60.0 + number(seconds)
    };
    let stages: Vec<_> = events[..events.len() - 2].iter().map(|(_, time)| seconds(time)).collect();
    assert!(stages.windows(2).all(|pair| (pair[1] - pair[0]).rem_euclid(86400.0) >= 5.0), "{events:?}");

    // The Job's next try: the same artifact, and no second Job.
    let again = ok(&mut setting.run(&there));
    assert!(again.stderr.contains("nothing changed since commit"), "{}", again.stderr);
    assert_eq!(again.json()["manifestDigest"], digest);
    setting.cluster.one("Job", OTHER, "aggregate-");

    // The next night nothing is new, and it is aggregated again: that heals what was set back.
    let next = ok(&mut setting.run_as("8", &there));
    assert_eq!(next.json()["manifestDigest"], digest);
    setting.cluster.one("Job", OTHER, &name("8"));
    assert_eq!(setting.cluster.list("Job", OTHER).len(), 2);
}

/// A cluster with the two BuildConfigs, and the aggregator's image.
fn openshift() -> Setting {
    let setting = Setting::new();
    setting.cluster.put_openshift(&layers("server", 1));
    setting
}

/// The digests of so many layers.
fn layers(name: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| Digest::of(format!("{name} {number}").as_bytes()).to_string()).collect()
}

fn argument_list(build: &Value) -> Vec<(&str, &str)> {
    let arguments = build["spec"]["strategy"]["dockerStrategy"]["buildArgs"].as_array().unwrap();
    arguments.iter().map(|one| (one["name"].as_str().unwrap(), one["value"].as_str().unwrap())).collect()
}

#[test]
fn updates_are_built_upon_the_image_there_is() {
    let setting = openshift();
    let cluster = &setting.cluster;
    let there = ["--trigger", "buildconfig/oscontainer", "--trigger-namespace", OTHER];
    let artifact = std::cell::RefCell::new(String::new());
    // A run, what it says, and the BuildConfig of the build that it starts, if it does; that ends at once.
    let started = |phase: &str| {
        let before = cluster.list("Build", OTHER);
        let done = ok(&mut setting.run(&there));
        *artifact.borrow_mut() = done.json()["manifestDigest"].as_str().unwrap().to_owned();
        let builds = cluster.list("Build", OTHER);
        let new =
            builds.iter().find(|build| before.iter().all(|old| old["metadata"]["name"] != build["metadata"]["name"]));
        let config = new.map(|build| {
            let name = build["metadata"]["name"].as_str().unwrap();
            cluster.set_status("Build", OTHER, name, json!({"phase": phase}));
            let from = build["spec"]["strategy"]["dockerStrategy"]["from"]["name"].as_str().unwrap();
            let stream = from.rsplit_once('/').unwrap().1.split_once('@').unwrap().0;
            (build["metadata"]["labels"]["buildconfig"].as_str().unwrap().to_owned(), stream.to_owned())
        });
        (config, done.stderr)
    };
    let whole = Some(("oscontainer".to_owned(), "oscontainer-aggregator".to_owned()));
    let update = Some(("oscontainer-next".to_owned(), "oscontainer".to_owned()));
    let image = |labels: Value, server: &str, count: usize| {
        let layers = [layers(server, 1), layers("host", count)].concat();
        cluster.put_image(OTHER, "oscontainer:host", labels, &layers);
    };
    let of_before = || json!({"ostree.ref": "test/host", "oscontainer.artifact": "another"});
    let end = |phase: &str| {
        for build in cluster.list("Build", OTHER) {
            if ["Running", "Pending", "New"].iter().any(|unfinished| build["status"]["phase"] == *unfinished) {
                cluster.set_status(
                    "Build",
                    OTHER,
                    build["metadata"]["name"].as_str().unwrap(),
                    json!({"phase": phase}),
                );
            }
        }
    };

    // Before it has ended, the next waits behind it.
    assert_eq!(started("Running").0, whole);
    image(of_before(), "server", 1);
    let (config, said) = started("Complete");
    assert_eq!(config, whole);
    assert!(said.contains("builds of oscontainer are under way"), "{said}");
    end("Complete");
    image(of_before(), "server", 62);
    assert_eq!(started("Pending").0, update);
    image(of_before(), "server", 63);
    assert_eq!(started("Complete").0, update, "one is under way");
    // What cannot be added to is not, whatever is under way.
    for (labels, server, count, why) in [
        (json!({"ostree.ref": "other/host"}), "server", 1, "the one there is has the ref \"other/host\""),
        (json!(null), "server", 1, "the one there is has the ref \"\""),
        (of_before(), "older server", 1, "the one there is began with another image of the aggregator"),
    ] {
        image(labels, server, count);
        let (config, said) = started("Cancelled");
        assert_eq!(config, whole, "{why}");
        assert!(said.contains(&format!("the image begins anew: {why}")), "{why}: {said}");
    }
    end("Complete");
    image(of_before(), "server", 63);
    let (config, said) = started("Complete");
    assert_eq!(config, whole);
    assert!(said.contains("the image begins anew: the one there is has 64 layers"), "{said}");
    // After a build upon it that failed comes a whole one, and then again an update.
    image(of_before(), "server", 2);
    assert_eq!(started("Failed").0, update);
    let (config, said) = started("Complete");
    assert_eq!(config, whole);
    assert!(said.contains("the image begins anew: the last build of oscontainer-next failed"), "{said}");
    assert_eq!(started("Complete").0, update);
    // What it has already is not built again.
    image(json!({"ostree.ref": "test/host", "oscontainer.artifact": *artifact.borrow()}), "server", 3);
    let (config, said) = started("Complete");
    assert!(config.is_none() && said.contains(&format!("has the artifact {} already", artifact.borrow())), "{said}");
    // Who has only the rights of before.
    image(of_before(), "server", 3);
    let role = cluster.one("Role", OTHER, "trigger-build");
    let mut less = role.clone();
    less["rules"].as_array_mut().unwrap().retain(|rule| rule["resources"] != json!(["builds"]));
    cluster.put(less);
    let (config, said) = started("Complete");
    assert_eq!(config, whole);
    assert!(
        said.contains("the image begins anew: builds.build.openshift.io is forbidden") || said.contains("cannot list"),
        "{said}"
    );
    cluster.put(role);
    assert_eq!(started("Complete").0, update);
    // Without the annotation there is one BuildConfig.
    let configs = cluster.list("BuildConfig", OTHER);
    let mut config = configs.into_iter().find(|config| config["metadata"]["name"] == "oscontainer").unwrap();
    config["metadata"]["annotations"] = json!({"oscontainer/next": "../other"});
    cluster.put(config.clone());
    fails(
        &mut setting.run(&there),
        3,
        "the annotation oscontainer/next of the BuildConfig oscontainer says \"../other\"",
    );
    config["metadata"]["annotations"] = json!({"oscontainer/next": "next", "oscontainer/max-layers": "many"});
    cluster.put(config.clone());
    fails(
        &mut setting.run(&there),
        3,
        "the annotation oscontainer/max-layers of the BuildConfig oscontainer is no number",
    );
    config["metadata"]["annotations"] = json!({});
    cluster.put(config);
    assert_eq!(started("Complete").0, whole);
}

#[test]
fn a_run_instantiates_the_build() {
    let setting = openshift();
    let there = ["--trigger", "buildconfig/oscontainer", "--trigger-namespace", OTHER];
    let result = ok(&mut setting.run(&there)).json();
    let build = setting.cluster.one("Build", OTHER, "oscontainer-");
    let mut given = argument_list(&build);
    given.sort();
    let text = |key: &str| result[key].as_str().unwrap();
    let expected = [
        ("ARTIFACT_DIGEST", text("manifestDigest")),
        ("ARTIFACT_URL", text("manifestUrl")),
        ("COMMIT", text("commit")),
        ("OSCONTAINER_CA_FILE", "/service-ca/service-ca.crt"),
        ("REF", "test/host"),
        ("VERSION", "1"),
    ];
    assert_eq!(given, expected);
    // There is no image yet, and nothing else was asked for in vain.
    let refused = setting.cluster.refused();
    assert!(
        refused.len() == 1 && refused[0].ends_with("404 imagestreamtags \"oscontainer:host\" not found"),
        "{refused:?}"
    );

    // Of all else it has no right. What was published stays, and the message says what happened.
    for (trigger, namespace) in [
        ("buildconfig/another", OTHER),
        ("buildconfig/oscontainer", COMPOSE),
        ("cronjob/another", OTHER),
        ("cronjob/aggregate", COMPOSE),
    ] {
        let options = ["--trigger", trigger, "--trigger-namespace", namespace];
        fails(&mut setting.run(&options), 3, &format!("starting {trigger} in {namespace}"));
        let message = fs::read_to_string(setting.path("message")).unwrap();
        let message: Value = serde_json::from_str(&message).unwrap();
        assert!(message["exitCode"] == 3 && message["error"].as_str().unwrap().contains("403"), "{message}");
    }
    assert_eq!(setting.events().last().unwrap().0, "Failed");

    // A repository that is in neither place, and files that are not beside the treefile.
    let treefile = setting.path("treefile/host.yaml");
    let text = fs::read_to_string(&treefile).unwrap();
    fs::write(&treefile, text.replace("[distribution]", "[nobodys, distribution]")).unwrap();
    fails(&mut setting.run(&there), 3, "repository \"nobodys\", but no .repo file in");
    fs::write(setting.path("base.yaml"), "packages: [bash]\n").unwrap();
    fs::write(&treefile, format!("{text}include: ../base.yaml\n")).unwrap();
    fails(&mut setting.run(&there), 3, "all files must be below the treefile's directory");
}
