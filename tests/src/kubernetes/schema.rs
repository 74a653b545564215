//! The kinds that are known, and the schemas that they must match.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use jsonschema::{Registry, Validator};
use serde_json::Value;

/// The version of Kubernetes that this is.
const VERSION: &str = "1.37.0";

/// A resource of the API.
pub struct Kind {
    /// Such as `Job`.
    pub kind: &'static str,
    /// Such as `batch/v1`.
    pub api_version: &'static str,
    /// Such as `jobs`.
    pub plural: &'static str,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
}

/// What the manifests and our programs use.
pub const KINDS: [Kind; 21] = [
    kind("Namespace", "v1", "namespaces", false),
    kind("Pod", "v1", "pods", true),
    kind("Service", "v1", "services", true),
    kind("ConfigMap", "v1", "configmaps", true),
    kind("PersistentVolumeClaim", "v1", "persistentvolumeclaims", true),
    kind("ServiceAccount", "v1", "serviceaccounts", true),
    kind("Deployment", "apps/v1", "deployments", true),
    kind("Job", "batch/v1", "jobs", true),
    kind("CronJob", "batch/v1", "cronjobs", true),
    kind("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies", true),
    kind("Role", "rbac.authorization.k8s.io/v1", "roles", true),
    kind("RoleBinding", "rbac.authorization.k8s.io/v1", "rolebindings", true),
    kind("ClusterRole", "rbac.authorization.k8s.io/v1", "clusterroles", false),
    kind("ClusterRoleBinding", "rbac.authorization.k8s.io/v1", "clusterrolebindings", false),
    kind("ValidatingAdmissionPolicy", "admissionregistration.k8s.io/v1", "validatingadmissionpolicies", false),
    kind(
        "ValidatingAdmissionPolicyBinding",
        "admissionregistration.k8s.io/v1",
        "validatingadmissionpolicybindings",
        false,
    ),
    kind("Event", "events.k8s.io/v1", "events", true),
    kind("TokenReview", "authentication.k8s.io/v1", "tokenreviews", false),
    kind("BuildConfig", "build.openshift.io/v1", "buildconfigs", true),
    kind("Build", "build.openshift.io/v1", "builds", true),
    kind("ImageStreamTag", "image.openshift.io/v1", "imagestreamtags", true),
];

const fn kind(kind: &'static str, api_version: &'static str, plural: &'static str, namespaced: bool) -> Kind {
    Kind { kind, api_version, plural, namespaced }
}

/// The schemas, as `make setup-test` brings them.
pub fn directory(version: &str) -> PathBuf {
    crate::target_dir().join(format!("schemas/kubernetes/v{version}-local-strict"))
}

/// The strict schema of the kind that `object` says it is.
pub fn validator(version: &str, object: &Value) -> Validator {
    let kind = object["kind"].as_str().unwrap().to_lowercase();
    let group = object["apiVersion"].as_str().unwrap();
    // rbac.authorization.k8s.io/v1 is rbac-v1, v1 stays.
    let group = match group.split_once('/') {
        Some((group, version)) => format!("{}-{version}", group.split('.').next().unwrap()),
        None => group.to_owned(),
    };
    let definitions = read(&directory(version).join("_definitions.json"));
    let address = definitions["$id"].as_str().unwrap().to_owned();
    let registry = Registry::new().add(address, definitions).unwrap().prepare().unwrap();
    let options = jsonschema::options().with_registry(&registry);
    options.build(&read(&directory(version).join(format!("{kind}-{group}.json")))).unwrap()
}

/// A file of JSON that `make setup-test` brings.
pub fn read(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}: `make setup-test` brings it", path.display()));
    serde_json::from_slice(&text).unwrap()
}

/// What is wrong with an object, if anything is.
pub fn check(object: &Value) -> Result<(), String> {
    static VALIDATORS: LazyLock<HashMap<&str, Validator>> = LazyLock::new(|| {
        let ours = KINDS.iter().filter(|kind| !kind.api_version.contains("openshift"));
        let of =
            |kind: &Kind| validator(VERSION, &serde_json::json!({"kind": kind.kind, "apiVersion": kind.api_version}));
        ours.map(|kind| (kind.kind, of(kind))).collect()
    });
    let Some(validator) = object["kind"].as_str().and_then(|kind| VALIDATORS.get(kind)) else { return Ok(()) };
    let errors: Vec<_> = validator.iter_errors(object).map(|e| format!("{}: {e}", e.instance_path())).collect();
    if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
}
