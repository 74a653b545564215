//! What in `manifests/` follows from other files: the ConfigMap from `treefiles/`, the
//! inline Dockerfile from `aggregator/Containerfile`, the images' version, and the hashes
//! in names. `make manifests` writes it, a test compares.

use std::fs;
use std::path::{Path, PathBuf};

use oscontainer_artifact::digest::Digest;
use serde_json::{Map, Value};

/// The files of `treefiles/` that the ConfigMap holds, which are its keys too.
pub const TREEFILE: [&str; 2] = ["host.yaml", "host.repo"];

/// The file that is written as a whole.
const CONFIG_MAP: &str = "70-treefile.yaml";
/// Letters of a hash in a name.
const HASH: usize = 8;

/// All manifests below `root`, the project's sources, each with the text that it should have.
pub fn refreshed(root: &Path) -> Vec<(PathBuf, String)> {
    let (config_map, hash) = config_map(root);
    let containerfile = fs::read_to_string(root.join("aggregator/Containerfile")).unwrap();
    let mut refreshed = Vec::new();
    for path in files(&root.join("manifests")) {
        if path.ends_with(CONFIG_MAP) {
            continue;
        }
        let mut text = fs::read_to_string(&path).unwrap();
        for image in ["builder", "aggregator"] {
            text = with_version(&text, &format!("oscontainer-{image}:"));
        }
        text = with_hash(&text, "treefile-", &hash);
        text = with_dockerfile(&text, &containerfile);
        for job in documents(&text).iter().filter(|document| document["kind"] == "Job") {
            let name = job["metadata"]["name"].as_str().unwrap();
            let prefix = &name[..name.len() - HASH];
            text = with_hash(&text, prefix, &hash_of(job));
        }
        refreshed.push((path, text));
    }
    refreshed.push((root.join("manifests").join(CONFIG_MAP), config_map));
    refreshed
}

/// The YAML files below a directory, in the order in which kubectl takes them.
pub fn files(directory: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    let below = |path: PathBuf| if path.is_dir() { files(&path) } else { vec![path] };
    entries.into_iter().flat_map(below).filter(|path| path.extension().is_some_and(|end| end == "yaml")).collect()
}

/// The objects in a file of YAML documents.
pub fn documents(text: &str) -> Vec<Value> {
    use serde::Deserialize;
    let all = serde_yaml::Deserializer::from_str(text).map(|document| Value::deserialize(document).unwrap());
    all.filter(|document| !document.is_null()).collect()
}

/// The ConfigMap's file, and the hash in its name.
fn config_map(root: &Path) -> (String, String) {
    let contents = TREEFILE.map(|name| (name, fs::read_to_string(root.join("treefiles").join(name)).unwrap()));
    let data = contents.iter().map(|(name, text)| ((*name).to_owned(), Value::from(text.as_str())));
    let hash = hash_of(&Value::Object(data.collect()));
    let mut text = format!(
        "# What the compose Job composes: treefiles/host.yaml and what it needs. `make manifests` writes
# this file; the hash in the name is that of the contents.
apiVersion: v1
kind: ConfigMap
metadata:
  name: treefile-{hash}
  namespace: oscontainer-compose
  labels:
    app.kubernetes.io/name: treefile
    app.kubernetes.io/part-of: oscontainer
immutable: true
data:
"
    );
    for (name, content) in &contents {
        text += &format!("  {name}: |\n{}", indented(content, 4));
    }
    (text, hash)
}

/// The hash of an object without its own name.
fn hash_of(object: &Value) -> String {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("name");
    }
    Digest::of(sorted(object).to_string().as_bytes()).hex()[..HASH].to_owned()
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.into_iter().map(|(name, value)| (name, sorted(value))).collect();
            fields.sort_by(|one, other| one.0.cmp(&other.0));
            Value::Object(Map::from_iter(fields))
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// The text with `hash` wherever `prefix` is followed by a hash.
fn with_hash(text: &str, prefix: &str, hash: &str) -> String {
    let mut parts = text.split(prefix);
    let mut new = parts.next().unwrap().to_owned();
    for part in parts {
        let is_hash = part.len() >= HASH && part.bytes().take(HASH).all(|byte| byte.is_ascii_hexdigit());
        new += prefix;
        new += &if is_hash { format!("{hash}{}", &part[HASH..]) } else { part.to_owned() };
    }
    new
}

/// The text with this version wherever `image` is followed by one.
fn with_version(text: &str, image: &str) -> String {
    let mut parts = text.split(image);
    let mut new = parts.next().unwrap().to_owned();
    for part in parts {
        let end = part.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '.').unwrap_or(part.len());
        new += &format!("{image}{}{}", env!("CARGO_PKG_VERSION"), &part[end..]);
    }
    new
}

/// The text with `dockerfile` as the block of that key, wherever it has one.
fn with_dockerfile(text: &str, dockerfile: &str) -> String {
    let key = "    dockerfile: |\n";
    let Some((before, rest)) = text.split_once(key) else { return text.to_owned() };
    let inside = |line: &&str| line.is_empty() || line.starts_with("      ");
    let length: usize = rest.split('\n').take_while(inside).map(|line| line.len() + 1).sum();
    format!("{before}{key}{}{}", indented(dockerfile, 6), with_dockerfile(&rest[length..], dockerfile))
}

fn indented(text: &str, by: usize) -> String {
    let line = |line: &str| if line.is_empty() { "\n".to_owned() } else { format!("{:by$}{line}\n", "") };
    text.lines().map(line).collect()
}
