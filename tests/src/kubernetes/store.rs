//! What the server keeps: objects, what happened to them, users, logs.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

/// A line of a log: when it was written, since 1970, and its text.
pub type Line = (Duration, Vec<u8>);

/// Something that happened to an object.
pub struct Change {
    /// The resource version that it led to.
    pub version: u64,
    /// `ADDED`, `MODIFIED` or `DELETED`.
    pub kind: &'static str,
    /// The object then.
    pub object: Value,
}

/// All of it.
pub struct Store {
    objects: BTreeMap<(String, String, String), Value>,
    /// In order.
    pub history: Vec<Change>,
    /// By token: the user, and the audiences that it was made for.
    pub users: HashMap<String, (String, Vec<String>)>,
    /// By Pod and container.
    pub logs: HashMap<(String, String), Vec<Line>>,
    /// Logs of containers that were restarted.
    pub previous: HashMap<(String, String), Vec<Line>>,
    /// How often logs were rotated or containers restarted.
    pub turns: HashMap<(String, String), usize>,
    /// Whether all connections end at once.
    pub down: bool,
    /// How often all open connections fell silent.
    pub silences: usize,
    /// Since 1970: lines of logs get their times from it.
    pub clock: Duration,
    /// Whether watches are to fail.
    pub shaking: bool,
    /// What happened up to this version is not told to watches any more.
    pub forgotten: u64,
    /// How many watches began since.
    pub watches: usize,
    /// Logs are cut after so many lines, so many times.
    pub cuts: (usize, usize),
    pub refused: Vec<String>,
    pub requests: Vec<String>,
    version: u64,
    names: u64,
}

impl Store {
    /// An empty one.
    pub fn new() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        Self {
            objects: BTreeMap::new(),
            history: Vec::new(),
            users: HashMap::new(),
            logs: HashMap::new(),
            previous: HashMap::new(),
            turns: HashMap::new(),
            down: false,
            silences: 0,
            // Late in a second, so that a time that is rounded up loses lines.
            clock: Duration::new(now.as_secs(), 700_000_000),
            shaking: false,
            forgotten: 0,
            watches: 0,
            cuts: (0, 0),
            refused: Vec::new(),
            requests: Vec::new(),
            version: 1,
            names: 0,
        }
    }

    /// The version of the newest change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// `start` and five letters of its own.
    pub fn new_name(&mut self, start: &str) -> String {
        self.names += 1;
        format!("{start}{:05}", self.names)
    }

    /// The objects of a kind, in a namespace or in all.
    pub fn list(&self, kind: &str, namespace: &str) -> Vec<Value> {
        let of = |(key, _): &(&(String, String, String), &Value)| {
            key.0 == kind && (namespace.is_empty() || key.1 == namespace)
        };
        self.objects.iter().filter(of).map(|(_, object)| object.clone()).collect()
    }

    /// One object.
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<&Value> {
        self.objects.get(&(kind.to_owned(), namespace.to_owned(), name.to_owned()))
    }

    /// Stores an object; gives it what the server gives: uid, version, time.
    pub fn put(&mut self, mut object: Value) -> Value {
        let key = key(&object);
        let before = self.objects.get(&key);
        if before.is_some_and(|before| without_version(before) == without_version(&object)) {
            return before.unwrap().clone();
        }
        self.version += 1;
        let metadata = &mut object["metadata"];
        if metadata["uid"].is_null() {
            metadata["uid"] = format!("00000000-0000-4000-8000-{:012}", self.version).into();
            // A second passes with each change.
            let (minutes, seconds) = (self.version / 60, self.version % 60);
            metadata["creationTimestamp"] = format!("2026-01-01T00:{minutes:02}:{seconds:02}Z").into();
        }
        metadata["resourceVersion"] = self.version.to_string().into();
        let kind = if before.is_some() { "MODIFIED" } else { "ADDED" };
        self.history.push(Change { version: self.version, kind, object: object.clone() });
        self.objects.insert(key, object.clone());
        object
    }

    /// Removes an object and all that belongs to it.
    pub fn delete(&mut self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let mut object = self.objects.remove(&(kind.to_owned(), namespace.to_owned(), name.to_owned()))?;
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.history.push(Change { version: self.version, kind: "DELETED", object: object.clone() });
        let uid = &object["metadata"]["uid"];
        let owned = |other: &&Value| {
            other["metadata"]["ownerReferences"].as_array().into_iter().flatten().any(|owner| owner["uid"] == *uid)
        };
        let belongings: Vec<_> = self.objects.values().filter(owned).map(key).collect();
        for (kind, namespace, name) in belongings {
            self.delete(&kind, &namespace, &name);
        }
        Some(object)
    }
}

fn key(object: &Value) -> (String, String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&object["kind"]), text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]))
}

fn without_version(object: &Value) -> Value {
    let mut object = object.clone();
    object["metadata"]["resourceVersion"] = json!(null);
    object
}
