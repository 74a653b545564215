//! Role-based access control, by the Roles and bindings that are stored
//! (rbac.authorization.k8s.io/v1): rights only add up, nothing is denied.

use serde_json::Value;

use super::store::Store;

/// What somebody wants.
pub struct Wanted<'a> {
    /// `create`, `watch`, …
    pub verb: &'a str,
    /// The group, empty for the core.
    pub group: &'a str,
    /// `pods`, or `pods/log`.
    pub resource: &'a str,
    /// Empty for cluster-wide resources.
    pub namespace: &'a str,
    /// The one object, where it is one.
    pub name: Option<&'a str>,
}

/// Whether the bindings let `user` have it.
pub fn allowed(store: &Store, user: &str, wanted: &Wanted<'_>) -> bool {
    let bound = |binding: &&Value| items(&binding["subjects"]).any(|subject| is(subject, user));
    let local = store.list("RoleBinding", wanted.namespace);
    let everywhere = store.list("ClusterRoleBinding", "");
    local.iter().chain(&everywhere).filter(bound).any(|binding| {
        let role = &binding["roleRef"];
        let namespace = if role["kind"] == "Role" { wanted.namespace } else { "" };
        let roles = store.list(role["kind"].as_str().unwrap(), namespace);
        roles
            .iter()
            .filter(|one| one["metadata"]["name"] == role["name"])
            .any(|role| items(&role["rules"]).any(|rule| permits(rule, wanted)))
    })
}

fn is(subject: &Value, user: &str) -> bool {
    match subject["kind"].as_str() {
        Some("ServiceAccount") => {
            let text = |key: &str| subject[key].as_str().unwrap_or_default().to_owned();
            user == format!("system:serviceaccount:{}:{}", text("namespace"), text("name"))
        }
        Some("User") => subject["name"] == user,
        _ => false,
    }
}

fn permits(rule: &Value, wanted: &Wanted<'_>) -> bool {
    let has = |key: &str, value: &str| items(&rule[key]).any(|item| item == value);
    // `create`, `list` and `watch` name no object, unless by a field selector.
    let named = rule["resourceNames"].is_null() || wanted.name.is_some_and(|name| has("resourceNames", name));
    has("verbs", wanted.verb) && has("apiGroups", wanted.group) && has("resources", wanted.resource) && named
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}
