//! Merge patches (RFC 7396) and strategic merge patches (Kubernetes, "Update API Objects in
//! Place Using kubectl patch").

use serde_json::Value;

/// What identifies the items of lists of objects, in this order.
const KEYS: [&str; 6] = ["name", "mountPath", "containerPort", "port", "type", "uid"];

/// Applies a patch of this content type.
pub fn apply(kind: &str, target: &mut Value, patch: &Value) -> Result<(), String> {
    match kind {
        "application/merge-patch+json" => merge(target, patch, false),
        "application/strategic-merge-patch+json" => merge(target, patch, true),
        other => return Err(format!("patches of the type {other} are not understood")),
    }
    Ok(())
}

fn merge(target: &mut Value, patch: &Value, strategic: bool) {
    let Value::Object(fields) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let object = target.as_object_mut().unwrap();
    if let Some(kept) = fields.get("$retainKeys").and_then(Value::as_array) {
        object.retain(|key, _| kept.iter().any(|one| one == key));
    }
    for (key, value) in fields {
        if strategic && key.starts_with('$') {
            continue;
        }
        match (value, object.get_mut(key)) {
            (Value::Null, _) => {
                object.remove(key);
            }
            (Value::Array(items), Some(Value::Array(now))) if strategic => merge_list(now, items),
            (value, Some(now)) => merge(now, value, strategic),
            (value, None) => {
                let mut new = Value::Null;
                merge(&mut new, value, strategic);
                object.insert(key.clone(), new);
            }
        }
    }
}

fn merge_list(now: &mut Vec<Value>, items: &[Value]) {
    let key = |item: &Value| KEYS.into_iter().find(|key| item.get(key).is_some());
    for item in items {
        if item["$patch"] == "replace" {
            continue;
        }
        let Some(key) = key(item) else {
            // A list of plain values is replaced as a whole.
            *now = items.to_vec();
            return;
        };
        let place = now.iter().position(|one| one[key] == item[key]);
        match (item["$patch"] == "delete", place) {
            (true, Some(place)) => {
                now.remove(place);
            }
            (true, None) => {}
            (false, Some(place)) => merge(&mut now[place], item, true),
            (false, None) => now.push(item.clone()),
        }
    }
}
