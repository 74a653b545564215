//! Admission by the ValidatingAdmissionPolicies that are stored
//! (admissionregistration.k8s.io/v1): which requests they match, and what their
//! expressions, evaluated by an implementation of CEL, say of them.

use std::sync::Arc;

use cel::{Context, Env, Value as Cel, extensions};
use serde_json::{Value, json};

use super::store::Store;

/// A request that changes an object, as admission sees it.
pub struct Asked<'a> {
    /// `CREATE` or `UPDATE`.
    pub operation: &'a str,
    /// The group, empty for the core.
    pub group: &'a str,
    /// `pods`, or `pods/ephemeralcontainers`.
    pub resource: &'a str,
    /// Empty for cluster-wide resources.
    pub namespace: &'a str,
    /// As it would be stored.
    pub object: &'a Value,
    /// As it was; null where it is made.
    pub before: &'a Value,
}

/// Why a policy refuses it, as the API server says it, if one does.
pub fn denied(store: &Store, asked: &Asked<'_>) -> Option<String> {
    let bindings = store.list("ValidatingAdmissionPolicyBinding", "");
    bindings.iter().filter(|binding| binds(store, binding, asked)).find_map(|binding| {
        let policy = &binding["spec"]["policyName"];
        // Without its policy a binding does nothing.
        let spec = &store.get("ValidatingAdmissionPolicy", "", policy.as_str().unwrap())?["spec"];
        let rules = items(&spec["matchConstraints"]["resourceRules"]);
        rules.iter().find(|rule| concerns(rule, asked))?;
        let why = refusal(spec, asked)?;
        let (name, resource) = (&asked.object["metadata"]["name"], asked.resource.split('/').next().unwrap());
        let binding = &binding["metadata"]["name"];
        Some(format!(
            "{resource} {name} is forbidden: ValidatingAdmissionPolicy '{}' with binding '{}' denied request: {why}",
            policy.as_str().unwrap(),
            binding.as_str().unwrap()
        ))
    })
}

fn binds(store: &Store, binding: &Value, asked: &Asked<'_>) -> bool {
    let spec = &binding["spec"];
    let labels = match store.get("Namespace", "", asked.namespace) {
        Some(namespace) => namespace["metadata"]["labels"].clone(),
        None => return false,
    };
    let wanted = spec["matchResources"]["namespaceSelector"]["matchLabels"].as_object();
    items(&spec["validationActions"]).contains(&json!("Deny"))
        && wanted.into_iter().flatten().all(|(key, value)| match key.as_str() {
            // Which the API server sets on every namespace.
            "kubernetes.io/metadata.name" => asked.namespace == value,
            key => labels[key] == *value,
        })
}

fn concerns(rule: &Value, asked: &Asked<'_>) -> bool {
    let has = |key: &str, value: &str| items(&rule[key]).iter().any(|item| item == value || item == "*");
    // `*` in resources means no subresources.
    has("operations", asked.operation)
        && has("apiGroups", asked.group)
        && has("apiVersions", "v1")
        && items(&rule["resources"]).contains(&json!(asked.resource))
}

/// What the policy says against it. What cannot be evaluated is refused, for that is what
/// `failurePolicy: Fail`, the default, means.
fn refusal(spec: &Value, asked: &Asked<'_>) -> Option<String> {
    let mut env = Env::stdlib();
    extensions::strings(&mut env).unwrap();
    let env = Arc::new(env);
    let mut context = Context::with_env(Arc::clone(&env));
    for (name, value) in [
        ("object", asked.object.clone()),
        ("oldObject", asked.before.clone()),
        ("request", json!({"operation": asked.operation, "namespace": asked.namespace})),
    ] {
        context.add_variable(name, value).unwrap();
    }
    let evaluate = |context: &Context<'_, '_>, expression: &Value| -> Result<Cel, String> {
        let text = expression.as_str().ok_or("no expression")?;
        let program = env.compile(text).map_err(|error| format!("compilation error: {error}"))?;
        program.execute(context).map_err(|error| format!("expression '{text}' resulted in error: {error}"))
    };
    let fails = spec["failurePolicy"] != "Ignore";
    for condition in items(&spec["matchConditions"]) {
        match evaluate(&context, &condition["expression"]) {
            Ok(Cel::Bool(true)) => {}
            Ok(_) => return None,
            Err(error) => return fails.then_some(error),
        }
    }
    let mut variables = std::collections::HashMap::<String, Cel>::new();
    for variable in items(&spec["variables"]) {
        // One that fails matters where it is used.
        if let Ok(value) = evaluate(&context, &variable["expression"]) {
            variables.insert(variable["name"].as_str().unwrap().to_owned(), value);
        }
        context.add_variable_from_value("variables", variables.clone());
    }
    for validation in items(&spec["validations"]) {
        match evaluate(&context, &validation["expression"]) {
            Ok(Cel::Bool(true)) => {}
            Ok(_) => {
                let expressed = validation.get("messageExpression").map(|message| evaluate(&context, message));
                return Some(match (expressed, validation["message"].as_str()) {
                    (Some(Ok(Cel::String(text))), _) if !text.trim().is_empty() && !text.contains('\n') => {
                        text.to_string()
                    }
                    (_, Some(text)) => text.to_owned(),
                    (expressed, None) => format!("failed expression, and no message: {expressed:?}"),
                });
            }
            Err(error) if fails => return Some(error),
            Err(_) => {}
        }
    }
    None
}

fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}
