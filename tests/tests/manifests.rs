//! The manifests: what follows from other files is up to date, each object is what the
//! schemas of Kubernetes and OpenShift say, and nothing may more than it should.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use e2e::kubernetes::schema::{read, validator as kubernetes};
use e2e::manifests::{TREEFILE, documents, files, refreshed};
use e2e::{builder, ok, source_dir, target_dir};
use jsonschema::Validator;
use serde_json::{Value, json};

/// The oldest version of Kubernetes that the manifests are for, and the newest.
const VERSIONS: [&str; 2] = ["1.30.0", "1.37.0"];

fn manifests() -> PathBuf {
    source_dir().join("manifests")
}

/// All objects, with the file, relative to `manifests/`, that each is in.
fn objects() -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for path in files(&manifests()) {
        let name = path.strip_prefix(manifests()).unwrap().display().to_string();
        all.extend(documents(&fs::read_to_string(&path).unwrap()).into_iter().map(|object| (name.clone(), object)));
    }
    assert!(all.len() > 40, "{} objects", all.len());
    all
}

/// `kind/name`, for messages.
fn called(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    format!("{}/{}", text(&object["kind"]), text(&object["metadata"]["name"]))
}

#[test]
fn what_follows_from_other_files_is_written() {
    for (path, text) in refreshed(source_dir()) {
        assert!(fs::read_to_string(&path).unwrap() == text, "{}: run `make manifests`", path.display());
    }
}

#[test]
fn every_change_of_a_job_changes_its_name() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["manifests", "treefiles", "aggregator"] {
        ok(e2e::tool("cp").arg("-r").arg(source_dir().join(name)).arg(dir.path().join(name)));
    }
    let names = || -> BTreeMap<PathBuf, String> {
        let jobs = refreshed(dir.path()).into_iter().filter_map(|(path, text)| {
            let job = documents(&text).into_iter().find(|object| object["kind"] == "Job")?;
            Some((path, job["metadata"]["name"].as_str()?.to_owned()))
        });
        jobs.collect()
    };
    let before = names();
    assert_eq!(before, names());
    let treefile = dir.path().join("treefiles/host.yaml");
    fs::write(&treefile, fs::read_to_string(&treefile).unwrap() + "# changed\n").unwrap();
    let after = names();
    assert!(before.len() >= 4 && before.iter().all(|(path, name)| after[path] != *name), "{before:?} {after:?}");
    // Another registry, as the docs do it.
    for path in files(&dir.path().join("manifests")) {
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("localhost/oscontainer-", "registry.example/oscontainer-")).unwrap();
    }
    let elsewhere = names();
    assert!(after.iter().all(|(path, name)| elsewhere[path] != *name), "{after:?} {elsewhere:?}");
}

/// What `submit` would send is what the ConfigMap holds: the treefile and all it needs, no more.
#[test]
fn the_config_map_holds_all_that_the_treefile_needs() {
    let mut submit = builder();
    submit.args(["submit", "--dry-run=client", "-o", "json"]).arg(source_dir().join("treefiles/host.yaml"));
    let list = ok(&mut submit).json();
    let submitted = list["items"].as_array().unwrap().iter().find(|object| object["kind"] == "ConfigMap").unwrap();
    let text = fs::read_to_string(manifests().join("70-treefile.yaml")).unwrap();
    assert!(text.len() < 200 << 10);
    let shipped = &documents(&text)[0];
    let keys: BTreeSet<_> = shipped["data"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, BTreeSet::from(TREEFILE));
    assert_eq!(shipped["data"], submitted["data"]);
}

/// The schema of an OpenShift object, strict: the API server drops what it does not know,
/// and says nothing.
fn openshift(object: &Value) -> Validator {
    let mut spec = read(&target_dir().join("schemas/openshift.json"));
    let definitions = spec["definitions"].as_object_mut().unwrap();
    // The package's spec is older than volumes in builds (OpenShift 4.9): as build/v1's
    // reference documents them.
    let volumes = json!({"type": "array", "items": {
        "type": "object",
        "required": ["name", "source", "mounts"],
        "properties": {
            "name": {"type": "string"},
            "mounts": {"type": "array", "minItems": 1, "items": {
                "type": "object",
                "required": ["destinationPath"],
                "properties": {"destinationPath": {"type": "string", "pattern": "^/"}},
            }},
            "source": {
                "type": "object",
                "required": ["type"],
                "properties": {
                    "type": {"enum": ["Secret", "ConfigMap", "CSI"]},
                    "configMap": {"$ref": "#/definitions/io.k8s.api.core.v1.ConfigMapVolumeSource"},
                    "secret": {"$ref": "#/definitions/io.k8s.api.core.v1.SecretVolumeSource"},
                },
            },
        },
    }});
    definitions["com.github.openshift.api.build.v1.DockerBuildStrategy"]["properties"]["volumes"] = volumes;
    for definition in definitions.values_mut() {
        strict(definition);
    }
    let (group, version) = object["apiVersion"].as_str().unwrap().split_once('/').unwrap();
    let group = group.split('.').next().unwrap();
    let name = format!("com.github.openshift.api.{group}.{version}.{}", object["kind"].as_str().unwrap());
    assert!(definitions.contains_key(&name), "{name}");
    let schema = json!({"$ref": format!("#/definitions/{name}"), "definitions": spec["definitions"]});
    // Its formats, such as int-or-string, are not JSON Schema's.
    jsonschema::options().with_draft(jsonschema::Draft::Draft4).build(&schema).unwrap()
}

/// Objects have the properties that are listed, and no others. What the server fills in is
/// not required: the package's spec lists all that Go writes without `omitempty`.
fn strict(schema: &mut Value) {
    if let Some(schema) = schema.as_object_mut() {
        if let Some(required) = schema.get_mut("required").and_then(Value::as_array_mut) {
            required.retain(|name| !FILLED_IN.iter().any(|filled| name == filled));
        }
        if schema.get("required").is_some_and(|required| required.as_array().is_some_and(Vec::is_empty)) {
            schema.remove("required");
        }
        if schema.contains_key("properties") && !schema.contains_key("additionalProperties") {
            schema.insert("additionalProperties".to_owned(), false.into());
        }
        schema.values_mut().for_each(strict);
    } else if let Some(items) = schema.as_array_mut() {
        items.iter_mut().for_each(strict);
    }
}

/// Fields that OpenShift's API server sets where they are missing.
const FILLED_IN: [&str; 7] = ["status", "host", "lookupPolicy", "nodeSelector", "postCommit", "resources", "weight"];

#[track_caller]
fn validate(validator: &Validator, file: &str, object: &Value) {
    let errors: Vec<_> = validator.iter_errors(object).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(errors.is_empty(), "{file}: {}: {}", called(object), errors.join("\n"));
}

#[test]
fn every_object_is_valid() {
    let mut kubernetes_validators = BTreeMap::new();
    for (file, object) in objects() {
        let group = object["apiVersion"].as_str().unwrap().to_owned();
        if group.contains("openshift.io") {
            validate(&openshift(&object), &file, &object);
            continue;
        }
        for version in VERSIONS {
            let key = (version, group.clone(), object["kind"].to_string());
            let validator = kubernetes_validators.entry(key).or_insert_with(|| kubernetes(version, &object));
            validate(validator, &file, &object);
        }
    }
}

/// The checks themselves find mistakes.
#[test]
fn mistakes_are_found() {
    let job = objects().into_iter().find(|(_, object)| object["kind"] == "Job").unwrap().1;
    let validator = kubernetes(VERSIONS[0], &job);
    assert!(validator.is_valid(&job));
    for (place, value) in [
        ("/spec/backofLimit", json!(3)),
        ("/spec/template/spec/containers/0/securityContext/priviledged", json!(true)),
        ("/spec/template/spec/volumes/0/name", json!(7)),
    ] {
        let mut wrong = job.clone();
        let (parent, key) = place.rsplit_once('/').unwrap();
        wrong.pointer_mut(parent).unwrap()[key] = value;
        assert!(!validator.is_valid(&wrong), "{place}");
    }
    let build = objects().into_iter().find(|(_, object)| object["kind"] == "BuildConfig").unwrap().1;
    let validator = openshift(&build);
    assert!(validator.is_valid(&build));
    for place in ["/spec/strategy/dockerStrategy/buildargs", "/spec/outputs"] {
        let mut wrong = build.clone();
        let (parent, key) = place.rsplit_once('/').unwrap();
        wrong.pointer_mut(parent).unwrap()[key] = json!([]);
        assert!(!validator.is_valid(&wrong), "{place}");
    }
}

/// The Pod that an object makes, if it makes one.
fn pod(object: &Value) -> Option<&Value> {
    let place = match object["kind"].as_str()? {
        "Deployment" | "Job" => "/spec/template",
        "CronJob" => "/spec/jobTemplate/spec/template",
        _ => return None,
    };
    object.pointer(place)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    list(&pod["spec"]["initContainers"]).chain(list(&pod["spec"]["containers"]))
}

/// Where a privileged container is allowed, and where one with capabilities.
const PRIVILEGED: [(&str, &str); 4] = [
    ("80-compose.yaml", "compose"),
    ("direct/direct.yaml", "compose"),
    ("nightly/compose.yaml", "compose"),
    ("openshift/50-compose.yaml", "compose"),
];
const CAPABLE: (&str, &str) = ("userns/compose.yaml", "compose");

#[test]
fn nothing_has_more_rights_than_it_needs() {
    let mut privileged = Vec::new();
    for (file, object) in objects() {
        let what = format!("{file}: {}", called(&object));
        assert_ne!(object["kind"], "Secret", "{what}");
        let Some(pod) = pod(&object) else { continue };
        let spec = &pod["spec"];
        for forbidden in ["hostNetwork", "hostPID", "hostIPC"] {
            assert!(spec[forbidden].is_null(), "{what}: {forbidden}");
        }
        assert!(list(&spec["volumes"]).all(|volume| volume["hostPath"].is_null()), "{what}");
        let composes = object["metadata"]["namespace"] == "oscontainer-compose";
        for container in containers(pod) {
            let name = container["name"].as_str().unwrap();
            let what = format!("{what}, container {name}");
            let security = &container["securityContext"];
            for limit in ["cpu", "memory"] {
                assert!(container["resources"]["limits"][limit].is_string(), "{what} has no limit of {limit}");
                assert!(container["resources"]["requests"][limit].is_string(), "{what} requests no {limit}");
            }
            assert_eq!(security["readOnlyRootFilesystem"], true, "{what}");
            let image = container["image"].as_str().unwrap();
            let pinned = ["builder", "aggregator"]
                .iter()
                .any(|name| image == format!("localhost/oscontainer-{name}:{}", env!("CARGO_PKG_VERSION")));
            assert!(pinned, "{what}: {image}");
            assert_eq!(container["imagePullPolicy"], "IfNotPresent", "{what}");
            if security["privileged"] == true {
                assert!(composes && image.contains("builder"), "{what}");
                privileged.push((file.clone(), name.to_owned()));
                continue;
            }
            assert_eq!(security["capabilities"]["drop"], json!(["ALL"]), "{what}");
            if (file.as_str(), name) == CAPABLE {
                assert_eq!(spec["hostUsers"], false, "{what}");
                continue;
            }
            // The Pod Security Standard `restricted`.
            assert!(security["capabilities"]["add"].is_null(), "{what}");
            assert_eq!(security["allowPrivilegeEscalation"], false, "{what}");
            let either = |key: &str| [&security[key], &spec["securityContext"][key]].into_iter().find(|v| !v.is_null());
            assert_eq!(either("runAsNonRoot"), Some(&json!(true)), "{what}");
            assert_eq!(either("seccompProfile"), Some(&json!({"type": "RuntimeDefault"})), "{what}");
            assert_ne!(either("runAsUser"), Some(&json!(0)), "{what}");
        }
        if !composes {
            assert_eq!(object["metadata"]["namespace"], "oscontainer", "{what}");
        }
    }
    privileged.sort();
    let expected: Vec<_> = PRIVILEGED.iter().map(|(file, name)| ((*file).to_owned(), (*name).to_owned())).collect();
    assert_eq!(privileged, expected);
}

#[test]
fn rights_in_the_cluster_are_named_one_by_one() {
    for (file, object) in objects() {
        let what = format!("{file}: {}", called(&object));
        for rule in list(&object["rules"]) {
            for list in ["apiGroups", "resources", "verbs"] {
                let items = rule[list].as_array().unwrap_or_else(|| panic!("{what}: no {list}"));
                assert!(!items.is_empty() && items.iter().all(|item| !item.as_str().unwrap().contains('*')), "{what}");
            }
            assert!(!rule["resources"].as_array().unwrap().contains(&json!("secrets")), "{what}");
        }
        if object["kind"] == "ClusterRole" {
            let review = json!([{"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"],
                "verbs": ["create"]}]);
            assert_eq!(object["rules"], review, "{what}");
        }
        if object["roleRef"]["name"] == "cluster-admin" {
            panic!("{what} binds cluster-admin");
        }
    }
}

/// Names lead somewhere: service accounts, volumes' claims and ConfigMaps, Services' ports.
#[test]
fn names_fit_together() {
    let all = objects();
    let has = |kind: &str, namespace: &Value, name: &Value| {
        all.iter().any(|(_, object)| {
            object["kind"] == kind
                && object["metadata"]["namespace"] == *namespace
                && object["metadata"]["name"] == *name
        })
    };
    for (file, object) in &all {
        let what = format!("{file}: {}", called(object));
        let namespace = &object["metadata"]["namespace"];
        assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/part-of"], "oscontainer", "{what}");
        if object["kind"] == "RoleBinding" || object["kind"] == "ClusterRoleBinding" {
            let role = &object["roleRef"];
            let theirs = role["name"].as_str().unwrap().starts_with("system:");
            let space = if role["kind"] == "Role" { namespace } else { &Value::Null };
            assert!(theirs || has(role["kind"].as_str().unwrap(), space, &role["name"]), "{what}");
            for subject in list(&object["subjects"]) {
                assert!(has("ServiceAccount", &subject["namespace"], &subject["name"]), "{what}: {subject}");
            }
        }
        let Some(pod) = pod(object) else { continue };
        if !pod["spec"]["serviceAccountName"].is_null() {
            assert!(has("ServiceAccount", namespace, &pod["spec"]["serviceAccountName"]), "{what}");
        }
        let volumes: BTreeSet<_> = list(&pod["spec"]["volumes"]).map(|volume| volume["name"].to_string()).collect();
        for volume in list(&pod["spec"]["volumes"]) {
            let claim = &volume["persistentVolumeClaim"]["claimName"];
            assert!(claim.is_null() || has("PersistentVolumeClaim", namespace, claim), "{what}: {claim}");
            let map = &volume["configMap"]["name"];
            assert!(map.is_null() || has("ConfigMap", namespace, map), "{what}: {map}");
        }
        let mounted: BTreeSet<_> =
            containers(pod).flat_map(|c| list(&c["volumeMounts"])).map(|m| m["name"].to_string()).collect();
        assert_eq!(mounted, volumes, "{what}");
    }
    let selectors = |kind: &str| {
        let of = all.iter().filter(move |(_, object)| object["kind"] == kind).map(|(_, object)| object);
        of.collect::<Vec<_>>()
    };
    for service in selectors("Service") {
        let name = &service["spec"]["selector"]["app.kubernetes.io/name"];
        let ports = &service["spec"]["ports"][0];
        let served = selectors("Deployment").into_iter().any(|deployment| {
            let template = &deployment["spec"]["template"];
            template["metadata"]["labels"]["app.kubernetes.io/name"] == *name
                && template["spec"]["containers"][0]["ports"][0]["name"] == ports["targetPort"]
        });
        assert!(served && ports["port"] == 8080, "{}", called(service));
    }
}

/// A variant's Pod is the base's but for what the variant is about.
#[test]
fn variants_differ_only_where_they_must() {
    const STORE: &[&str] = &[
        "/containers/0/args",
        "/containers/0/envFrom",
        "/containers/0/volumeMounts",
        "/volumes",
        "/securityContext/fsGroup",
    ];
    const TLS: &[&str] = &[
        "/containers/0/args",
        "/containers/0/env",
        "/containers/0/livenessProbe/httpGet/scheme",
        "/containers/0/readinessProbe/httpGet/scheme",
        "/containers/0/volumeMounts",
        "/imagePullSecrets",
        "/securityContext",
        "/volumes",
    ];
    let all = objects();
    let find = |file: &str| {
        let mut pods = all.iter().filter(|(name, _)| name == file).filter_map(|(_, object)| pod(object));
        let pod = pods.next().unwrap_or_else(|| panic!("{file} has no Pod"));
        assert!(pods.next().is_none(), "{file}");
        pod["spec"].clone()
    };
    for (variant, base, allowed) in [
        ("nightly/compose.yaml", "80-compose.yaml", &[][..]),
        (
            "userns/compose.yaml",
            "80-compose.yaml",
            &["/containers/0/args", "/containers/0/securityContext", "/hostUsers"],
        ),
        (
            "openshift/50-compose.yaml",
            "80-compose.yaml",
            &["/containers/0/args", "/containers/0/volumeMounts", "/volumes"],
        ),
        ("s3/endpoint.yaml", "40-endpoint.yaml", STORE),
        ("swift/endpoint.yaml", "40-endpoint.yaml", STORE),
        ("openshift/20-endpoint.yaml", "40-endpoint.yaml", TLS),
        ("openshift/30-mirror.yaml", "60-mirror.yaml", TLS),
    ] {
        let mut differences = Vec::new();
        differ(&find(variant), &find(base), String::new(), &mut differences);
        for place in differences {
            assert!(allowed.iter().any(|start| place.starts_with(start)), "{variant}: {place} is not as in {base}");
        }
    }
}

/// rpm-ostree's rofiles-fuse needs /dev/fuse, which only privileged containers have.
#[test]
fn without_privileges_the_engine_is_dnf() {
    let arguments = |file: &str| -> Vec<String> {
        let all = objects();
        let mut pods = all.iter().filter(|(name, _)| name == file).filter_map(|(_, object)| pod(object));
        let container = &pods.next().unwrap()["spec"]["containers"][0];
        list(&container["args"]).map(|argument| argument.as_str().unwrap().to_owned()).collect()
    };
    let mut userns = arguments("userns/compose.yaml");
    let place = userns.iter().position(|argument| argument == "--engine=dnf").unwrap();
    userns.remove(place);
    assert_eq!(userns, arguments("80-compose.yaml"));
    // What Fedora's image must have for both engines.
    let containerfile = fs::read_to_string(source_dir().join("builder/Containerfile")).unwrap();
    let (_, line) = containerfile.split_once("dnf install ").unwrap();
    let line = line.split(';').next().unwrap().replace('\\', " ");
    for package in ["/usr/bin/dnf", "rpm-ostree", "selinux-policy-targeted"] {
        assert!(line.split_whitespace().any(|word| word == package), "{package}: {line}");
    }
}

/// Where composing needs to write under a read-only root.
#[test]
fn composing_has_room_for_temporary_files() {
    let mut found = 0;
    for (file, object) in objects() {
        let Some(pod) = pod(&object) else { continue };
        for container in containers(pod).filter(|container| container["name"] == "compose") {
            found += 1;
            for path in ["/tmp", "/var/tmp", "/var/cache/oscontainer"] {
                let mount = list(&container["volumeMounts"]).find(|mount| mount["mountPath"] == path);
                let mount = mount.unwrap_or_else(|| panic!("{file}: no {path}"));
                assert!(mount["readOnly"].is_null(), "{file}: {path}");
            }
        }
    }
    assert_eq!(found, 5);
}

/// What fails before it can write its result is told by its log's end.
#[test]
fn every_containers_last_words_are_kept() {
    for (file, object) in objects() {
        let Some(pod) = pod(&object) else { continue };
        if pod["spec"]["restartPolicy"] != "Never" {
            continue;
        }
        for container in containers(pod) {
            let what = format!("{file}: {}, container {}", called(&object), container["name"]);
            assert_eq!(container["terminationMessagePolicy"], "FallbackToLogsOnError", "{what}");
        }
    }
}

/// Pods pull with the Secret `registry`: by their account, or where they have none by themselves.
#[test]
fn every_pod_can_pull_from_a_registry_with_a_password() {
    let all = objects();
    let secret = json!([{"name": "registry"}]);
    for (file, object) in &all {
        let Some(pod) = pod(object) else { continue };
        let what = format!("{file}: {}", called(object));
        let account = &pod["spec"]["serviceAccountName"];
        if account.is_null() {
            // OpenShift gives every account the internal registry's.
            assert!(pod["spec"]["imagePullSecrets"] == secret || file.starts_with("openshift/"), "{what}");
            continue;
        }
        let is = |other: &&(String, Value)| {
            let metadata = &other.1["metadata"];
            other.1["kind"] == "ServiceAccount"
                && metadata["name"] == *account
                && metadata["namespace"] == object["metadata"]["namespace"]
        };
        assert_eq!(all.iter().find(is).unwrap().1["imagePullSecrets"], secret, "{what}");
    }
}

/// The places in which two values differ, as JSON pointers.
fn differ(one: &Value, other: &Value, place: String, found: &mut Vec<String>) {
    match (one, other) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: BTreeSet<_> = a.keys().chain(b.keys()).collect();
            keys.into_iter().for_each(|key| differ(&one[key], &other[key], format!("{place}/{key}"), found));
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            (0..a.len()).for_each(|index| differ(&a[index], &b[index], format!("{place}/{index}"), found));
        }
        _ if one == other => {}
        _ => found.push(place),
    }
}
