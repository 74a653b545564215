//! Requests: who asks, whether they may, and the answer.

use std::collections::BTreeMap;
use std::io;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::admission::{Asked, denied};
use super::connection::{Connection, Request, begin, chunk, request, respond};
use super::rights::{Wanted, allowed};
use super::schema::{KINDS, Kind, check};
use super::store::Store;
use super::{ADMIN, Shared, patch};

/// How long a watch is open that does not say so itself.
const WATCH: Duration = Duration::from_secs(30);

/// How long a connection is open on which nothing comes any more.
const SILENCE: Duration = Duration::from_secs(120);

/// A refusal: the status, its reason, and a message.
struct Refused(u16, &'static str, String);

/// What a path names.
struct Target<'a> {
    kind: &'a Kind,
    group: &'a str,
    namespace: String,
    name: Option<String>,
    subresource: Option<String>,
}

impl<'a> Target<'a> {
    fn parse(path: &str) -> Option<Target<'static>> {
        let mut parts = path.split('/').skip(1);
        let api_version = match parts.next()? {
            "api" => parts.next()?.to_owned(),
            "apis" => format!("{}/{}", parts.next()?, parts.next()?),
            _ => return None,
        };
        let mut rest: Vec<_> = parts.collect();
        let mut namespace = String::new();
        if rest.first() == Some(&"namespaces") && rest.len() > 2 {
            namespace = rest[1].to_owned();
            rest.drain(..2);
        }
        let kind = KINDS.iter().find(|kind| kind.api_version == api_version && kind.plural == rest[0])?;
        let group = kind.api_version.split_once('/').map_or("", |(group, _)| group);
        let part = |index: usize| rest.get(index).map(ToString::to_string);
        Some(Target { kind, group, namespace, name: part(1), subresource: part(2) })
    }

    fn resource(&self) -> String {
        let plural = self.kind.plural;
        self.subresource.as_ref().map_or(plural.to_owned(), |subresource| format!("{plural}/{subresource}"))
    }
}

/// Serves one connection to its end.
pub fn connection(mut connection: Connection, shared: &Shared) -> io::Result<()> {
    while let Some(request) = request(&mut connection)? {
        let mut store = shared.lock();
        if store.down {
            return Err(io::Error::other("down"));
        }
        store.requests.push(format!("{} {}", request.method, request.path));
        let answer = answer(&mut store, &request);
        if let Err(Refused(code, _, message)) = &answer {
            store.refused.push(format!("{} {}: {code} {message}", request.method, request.path));
        }
        drop(store);
        shared.changed.notify_all();
        match answer {
            Ok(Answer::Object(status, object)) => respond(&mut connection, status, object.to_string().as_bytes())?,
            Ok(Answer::Watch(selector, version)) => watch(&mut connection, shared, &selector, version)?,
            Ok(Answer::Log(pod, container)) => return log(&mut connection, shared, &request, (pod, container)),
            Err(Refused(code, reason, message)) => {
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": message, "reason": reason, "code": code});
                respond(&mut connection, code, status.to_string().as_bytes())?;
            }
        }
    }
    Ok(())
}

enum Answer {
    Object(u16, Value),
    Watch(Selector, u64),
    Log(String, String),
}

fn answer(store: &mut Store, request: &Request) -> Result<Answer, Refused> {
    if let Some(found) = discovery(&request.path) {
        return Ok(Answer::Object(200, found));
    }
    let header = |name: &str| request.headers.get(name).map_or("", String::as_str);
    let token = header("authorization").strip_prefix("Bearer ").unwrap_or_default();
    let user = match store.users.get(token) {
        Some((user, audiences)) if audiences.is_empty() => user.clone(),
        _ if token == ADMIN => "admin".to_owned(),
        _ => return Err(Refused(401, "Unauthorized", "Unauthorized".to_owned())),
    };
    let Some(target) = Target::parse(&request.path) else {
        return Err(Refused(404, "NotFound", format!("the server could not find {}", request.path)));
    };
    let watching = request.query.get("watch").is_some_and(|value| value == "true" || value == "1");
    let verb = match (request.method.as_str(), target.name.is_some()) {
        ("GET", true) => "get",
        ("GET", false) if watching => "watch",
        ("GET", false) => "list",
        ("POST", _) => "create",
        ("PATCH", true) => "patch",
        ("PUT", true) => "update",
        ("DELETE", true) => "delete",
        (method, _) => return Err(Refused(405, "MethodNotAllowed", format!("{method} is not supported"))),
    };
    let resource = target.resource();
    let selector = Selector::of(&target, request);
    let name = target.name.as_deref().or(selector.name.as_deref());
    let wanted = Wanted { verb, group: target.group, resource: &resource, namespace: &target.namespace, name };
    if user != "admin" && !allowed(store, &user, &wanted) {
        let text = format!(
            "{resource} is forbidden: User \"{user}\" cannot {verb} resource \"{resource}\" in API group \"{}\" in \
             the namespace \"{}\"",
            target.group, target.namespace
        );
        return Err(Refused(403, "Forbidden", text));
    }
    let dry = match request.query.get("dryRun").map(String::as_str) {
        None => false,
        Some("All") => true,
        Some(other) => return Err(Refused(400, "BadRequest", format!("dryRun={other}"))),
    };
    let body = || -> Result<Value, Refused> {
        serde_json::from_slice(&request.body).map_err(|error| Refused(400, "BadRequest", error.to_string()))
    };
    match (verb, target.subresource.as_deref()) {
        ("get", Some("log")) if target.kind.kind == "Pod" => log_of(store, &target, request),
        ("create", Some("instantiate")) => instantiate(store, &target, &body()?),
        ("create", None) => create(store, &target, body()?, header("content-type"), dry),
        ("get", None) => existing(store, &target).map(|object| Answer::Object(200, object)),
        ("list", None) => Ok(Answer::Object(200, listed(store, &target, &selector))),
        ("watch", None) => {
            let from = request.query.get("resourceVersion").and_then(|version| version.parse().ok());
            Ok(Answer::Watch(selector, from.unwrap_or_else(|| store.version())))
        }
        ("patch", None | Some("ephemeralcontainers")) => {
            let mut object = existing(store, &target)?;
            let before = object.clone();
            patch::apply(header("content-type"), &mut object, &body()?)
                .map_err(|message| Refused(415, "UnsupportedMediaType", message))?;
            valid(&object)?;
            unchangeable(&before, &object)?;
            admitted(store, &target, "UPDATE", &object, &before)?;
            Ok(Answer::Object(200, if dry { object } else { store.put(object) }))
        }
        ("delete", None) => {
            let object = existing(store, &target)?;
            store.delete(target.kind.kind, &target.namespace, target.name.as_deref().unwrap_or_default());
            Ok(Answer::Object(200, object))
        }
        _ => Err(Refused(405, "MethodNotAllowed", format!("{verb} of {resource}"))),
    }
}

fn existing(store: &Store, target: &Target<'_>) -> Result<Value, Refused> {
    let name = target.name.as_deref().unwrap_or_default();
    match store.get(target.kind.kind, &target.namespace, name) {
        Some(object) => Ok(object.clone()),
        None => Err(Refused(404, "NotFound", format!("{} \"{name}\" not found", target.kind.plural))),
    }
}

fn valid(object: &Value) -> Result<(), Refused> {
    check(object).map_err(|why| Refused(422, "Invalid", format!("{} is invalid: {why}", object["kind"])))
}

/// That no admission policy refuses it.
fn admitted(
    store: &Store,
    target: &Target<'_>,
    operation: &str,
    object: &Value,
    before: &Value,
) -> Result<(), Refused> {
    let resource = &target.resource();
    let asked = Asked { operation, group: target.group, resource, namespace: &target.namespace, object, before };
    denied(store, &asked).map_or(Ok(()), |why| Err(Refused(422, "Invalid", why)))
}

/// What the API reference says cannot be changed.
fn unchangeable(before: &Value, after: &Value) -> Result<(), Refused> {
    let places: &[&str] = match after["kind"].as_str() {
        Some("Job") => &["/spec/template", "/spec/selector", "/spec/podFailurePolicy"],
        Some("ConfigMap") if before["immutable"] == true => &["/data", "/binaryData"],
        Some("Deployment") => &["/spec/selector"],
        _ => &[],
    };
    match places.iter().find(|place| before.pointer(place) != after.pointer(place)) {
        Some(place) => {
            Err(Refused(422, "Invalid", format!("{} is invalid: {place}: field is immutable", after["kind"])))
        }
        None => Ok(()),
    }
}

fn create(
    store: &mut Store,
    target: &Target<'_>,
    mut object: Value,
    content_type: &str,
    dry: bool,
) -> Result<Answer, Refused> {
    if content_type != "application/json" {
        return Err(Refused(415, "UnsupportedMediaType", format!("content-type {content_type:?}")));
    }
    if object["kind"] != target.kind.kind || object["apiVersion"] != target.kind.api_version {
        return Err(Refused(400, "BadRequest", format!("not a {}: {object}", target.kind.kind)));
    }
    if target.kind.kind == "TokenReview" {
        return Ok(Answer::Object(201, review(store, object)?));
    }
    if target.kind.namespaced {
        if store.get("Namespace", "", &target.namespace).is_none() {
            return Err(Refused(404, "NotFound", format!("namespaces \"{}\" not found", target.namespace)));
        }
        let theirs = object["metadata"]["namespace"].clone();
        if !theirs.is_null() && theirs != target.namespace.as_str() {
            return Err(Refused(400, "BadRequest", "the namespace of the object does not match".to_owned()));
        }
        object["metadata"]["namespace"] = target.namespace.clone().into();
    }
    if let Some(start) = object["metadata"]["generateName"].as_str().map(str::to_owned) {
        object["metadata"]["name"] = store.new_name(&start).into();
    }
    let Some(name) = object["metadata"]["name"].as_str().map(str::to_owned) else {
        return Err(Refused(422, "Invalid", "name or generateName is required".to_owned()));
    };
    valid(&object)?;
    if target.kind.kind == "Event" && object["eventTime"].is_null() {
        return Err(Refused(422, "Invalid", "eventTime is required".to_owned()));
    }
    if store.get(target.kind.kind, &target.namespace, &name).is_some() {
        return Err(Refused(409, "AlreadyExists", format!("{} \"{name}\" already exists", target.kind.plural)));
    }
    admitted(store, target, "CREATE", &object, &Value::Null)?;
    if dry {
        object["metadata"]["uid"] = "00000000-0000-4000-8000-000000000000".into();
        return Ok(Answer::Object(201, object));
    }
    Ok(Answer::Object(201, store.put(object)))
}

/// OpenShift's build of a BuildConfig.
fn instantiate(store: &mut Store, target: &Target<'_>, request: &Value) -> Result<Answer, Refused> {
    let config = existing(store, target)?;
    if request["kind"] != "BuildRequest" || request["metadata"]["name"] != config["metadata"]["name"] {
        return Err(Refused(400, "BadRequest", format!("not a BuildRequest for this: {request}")));
    }
    let mut strategy = config["spec"]["strategy"].clone();
    let from = &mut strategy["dockerStrategy"]["from"];
    if from["kind"] == "ImageStreamTag" {
        let name = from["name"].as_str().unwrap_or_default();
        let Some(tag) = store.get("ImageStreamTag", &target.namespace, name) else {
            return Err(Refused(
                422,
                "Invalid",
                format!("BuildConfig is invalid: unable to find latest tagged image: {name}"),
            ));
        };
        *from = json!({"kind": "DockerImage", "name": tag["image"]["dockerImageReference"]});
    }
    // Those of the request are added, or take the place of the BuildConfig's (origin, pkg/build/generator, updateBuildArgs).
    let arguments = &mut strategy["dockerStrategy"]["buildArgs"];
    let mut merged: BTreeMap<String, Value> = BTreeMap::new();
    for argument in
        [&*arguments, &request["dockerStrategyOptions"]["buildArgs"]].into_iter().filter_map(Value::as_array)
    {
        merged.extend(argument.iter().map(|one| (one["name"].as_str().unwrap_or_default().to_owned(), one.clone())));
    }
    *arguments = merged.into_values().collect();
    let config = &config["metadata"]["name"];
    let name = store.new_name(&format!("{}-", config.as_str().unwrap()));
    let build = json!({
        "apiVersion": "build.openshift.io/v1", "kind": "Build",
        "metadata": {"name": name, "namespace": target.namespace, "labels": {
            "buildconfig": config, "openshift.io/build-config.name": config, "openshift.io/build.start-policy": "SerialLatestOnly",
        }},
        "spec": {"strategy": strategy, "triggeredBy": request["triggeredBy"]},
        "status": {"phase": "New"},
    });
    Ok(Answer::Object(201, store.put(build)))
}

/// TokenReview, authentication.k8s.io/v1.
fn review(store: &Store, mut review: Value) -> Result<Value, Refused> {
    valid(&review)?;
    let wanted = review["spec"]["audiences"].as_array().cloned().unwrap_or_default();
    let known = review["spec"]["token"].as_str().and_then(|token| store.users.get(token));
    review["status"] = match known {
        Some((user, audiences)) => {
            let both: Vec<_> = wanted.into_iter().filter(|one| audiences.iter().any(|theirs| one == theirs)).collect();
            match both.is_empty() {
                true => json!({"authenticated": false, "error": "token audiences do not match"}),
                false => json!({"authenticated": true, "user": {"username": user, "uid": "1"}, "audiences": both}),
            }
        }
        None => json!({"authenticated": false, "error": "invalid bearer token"}),
    };
    Ok(review)
}

fn listed(store: &Store, target: &Target<'_>, selector: &Selector) -> Value {
    let mut items = store.list(target.kind.kind, &target.namespace);
    items.retain(|object| selector.takes(object));
    // In lists the server leaves out what all items have.
    for item in &mut items {
        let fields = item.as_object_mut().unwrap();
        fields.remove("kind");
        fields.remove("apiVersion");
    }
    json!({"kind": format!("{}List", target.kind.kind), "apiVersion": target.kind.api_version,
        "metadata": {"resourceVersion": store.version().to_string()}, "items": items})
}

/// Which objects of a kind are meant.
struct Selector {
    kind: &'static str,
    namespace: String,
    labels: Vec<(String, String)>,
    /// By the field metadata.name.
    name: Option<String>,
    bookmarks: bool,
    /// How long a watch is open.
    time: Duration,
}

impl Selector {
    fn of(target: &Target<'static>, request: &Request) -> Self {
        let parts = |key: &str| {
            let text = request.query.get(key).cloned().unwrap_or_default();
            let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
            pairs.map(|(key, value)| (key.to_owned(), value.trim_start_matches('=').to_owned())).collect::<Vec<_>>()
        };
        let fields = parts("fieldSelector");
        assert!(fields.iter().all(|(key, _)| key == "metadata.name"), "{fields:?} is not understood");
        let bookmarks = request.query.get("allowWatchBookmarks").is_some_and(|value| value == "true");
        Self {
            kind: target.kind.kind,
            namespace: target.namespace.clone(),
            labels: parts("labelSelector"),
            name: fields.into_iter().next().map(|(_, name)| name),
            bookmarks,
            time: request.query.get("timeoutSeconds").map_or(WATCH, |time| Duration::from_secs(time.parse().unwrap())),
        }
    }

    fn takes(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        object["kind"] == self.kind
            && (self.namespace.is_empty() || metadata["namespace"] == self.namespace.as_str())
            && self.labels.iter().all(|(key, value)| metadata["labels"][key] == value.as_str())
            && self.name.as_ref().is_none_or(|name| metadata["name"] == name.as_str())
    }
}

/// Sends what happens, from a version on.
fn watch(connection: &mut Connection, shared: &Shared, selector: &Selector, mut version: u64) -> io::Result<()> {
    begin(connection)?;
    let end = Instant::now() + selector.time;
    let mut store = shared.lock();
    let silences = store.silences;
    store.watches += 1;
    let number = store.watches;
    let mut sent = 0;
    // As if the history were forgotten.
    let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "message": "too old resource version", "reason": "Expired", "code": 410, "metadata": {}}});
    loop {
        if version < store.forgotten {
            drop(store);
            chunk(connection, format!("{gone}\n").as_bytes())?;
            return Err(io::Error::other("forgotten"));
        }
        let news: Vec<_> = store
            .history
            .iter()
            .filter(|change| change.version > version && selector.takes(&change.object))
            .map(|change| json!({"type": change.kind, "object": change.object}).to_string() + "\n")
            .collect();
        version = store.version();
        let shaking = store.shaking;
        drop(broken(store, silences)?);
        for event in news {
            if shaking && sent > 0 {
                // In the middle of an event, or after it.
                match number % 2 {
                    0 => chunk(connection, &event.as_bytes()[..event.len() / 2])?,
                    _ => chunk(connection, format!("{gone}\n").as_bytes())?,
                }
                return Err(io::Error::other("cut"));
            }
            chunk(connection, event.as_bytes())?;
            sent += 1;
        }
        if selector.bookmarks {
            let kind = KINDS.iter().find(|kind| kind.kind == selector.kind).unwrap();
            let mark = json!({"type": "BOOKMARK", "object": {"kind": kind.kind, "apiVersion": kind.api_version,
                "metadata": {"resourceVersion": version.to_string(), "creationTimestamp": null}}});
            chunk(connection, format!("{mark}\n").as_bytes())?;
        }
        store = shared.lock();
        while store.version() == version {
            if Instant::now() > end {
                drop(store);
                return chunk(connection, b"");
            }
            store = shared.changed.wait_timeout(store, Duration::from_millis(200)).unwrap().0;
            store = broken(store, silences)?;
        }
    }
}

/// Nothing, as long as the connection is to live; else it ends, or is silent from now on.
fn broken(store: MutexGuard<'_, Store>, silences: usize) -> io::Result<MutexGuard<'_, Store>> {
    if store.down {
        return Err(io::Error::other("down"));
    }
    if store.silences == silences {
        return Ok(store);
    }
    drop(store);
    std::thread::sleep(SILENCE);
    Err(io::Error::other("silent"))
}

fn log_of(store: &Store, target: &Target<'_>, request: &Request) -> Result<Answer, Refused> {
    let pod = existing(store, target)?;
    let Some(container) = request.query.get("container") else {
        return Err(Refused(400, "BadRequest", "a container name must be specified".to_owned()));
    };
    let lists = ["initContainerStatuses", "containerStatuses"];
    let mut statuses = lists.iter().flat_map(|list| pod["status"][list].as_array().into_iter().flatten());
    let status = statuses.find(|status| status["name"] == container.as_str());
    if status.is_none_or(|status| !status["state"]["waiting"].is_null()) {
        return Err(Refused(400, "BadRequest", format!("container {container:?} is waiting to start")));
    }
    Ok(Answer::Log(target.name.clone().unwrap_or_default(), container.clone()))
}

/// A container's log, as long as it runs.
fn log(connection: &mut Connection, shared: &Shared, request: &Request, key: (String, String)) -> io::Result<()> {
    begin(connection)?;
    let query = |name: &str| request.query.get(name).map_or("", String::as_str);
    // The API server takes sinceTime to the second.
    let since = seconds(query("sinceTime"));
    let mut sent = 0;
    let mut lines = 0;
    let (silences, turn) = {
        let store = shared.lock();
        (store.silences, store.turns.get(&key).copied())
    };
    loop {
        let mut store = broken(shared.lock(), silences)?;
        if store.turns.get(&key).copied() != turn {
            // Kubelets have lost their way at a rotation, and said nothing any more.
            drop(store);
            std::thread::sleep(SILENCE);
            return Err(io::Error::other("rotated"));
        }
        let source = if query("previous") == "true" { &store.previous } else { &store.logs };
        let all = source.get(&key).cloned().unwrap_or_default();
        let news: Vec<_> = all.iter().filter(|(time, _)| time.as_secs() >= since).skip(sent).cloned().collect();
        let (cut_after, cuts_left) = store.cuts;
        let cut = cuts_left > 0 && lines + news.len() > cut_after;
        if cut {
            store.cuts.1 -= 1;
        }
        let running = store
            .list("Pod", "")
            .into_iter()
            .any(|pod| pod["metadata"]["name"] == key.0.as_str() && pod["status"]["phase"] == "Running");
        drop(store);
        for (time, text) in &news {
            let stamp = if query("timestamps") == "true" { stamp(*time) + " " } else { String::new() };
            let line = [stamp.as_bytes(), text, b"\n"].concat();
            if cut && lines == cut_after {
                chunk(connection, &line[..line.len() / 2])?;
                return Err(io::Error::other("cut"));
            }
            chunk(connection, &line)?;
            lines += 1;
        }
        sent += news.len();
        if query("follow") != "true" || !running {
            chunk(connection, b"")?;
            return Err(io::Error::other("the end"));
        }
        let store = shared.lock();
        if store.logs.get(&key).map_or(0, Vec::len) == all.len() {
            let _ = shared.changed.wait_timeout(store, Duration::from_millis(200)).unwrap();
        }
    }
}

/// RFC 3339 with nanoseconds, as the kubelet stamps lines.
fn stamp(time: Duration) -> String {
    let done = crate::ok(crate::tool("date").args(["-u", "-d", &format!("@{}", time.as_secs()), "+%Y-%m-%dT%H:%M:%S"]));
    format!("{}.{:09}Z", done.stdout.trim(), time.subsec_nanos())
}

/// Since 1970.
fn seconds(time: &str) -> u64 {
    if time.is_empty() {
        return 0;
    }
    crate::ok(crate::tool("date").args(["-u", "-d", time, "+%s"])).stdout.trim().parse().unwrap()
}

/// What clients ask first: which groups and resources there are.
fn discovery(path: &str) -> Option<Value> {
    let group_of = |kind: &Kind| kind.api_version.rsplit_once('/').map_or("", |(group, _)| group).to_owned();
    let mut groups: Vec<_> = KINDS.iter().map(group_of).filter(|group| !group.is_empty()).collect();
    groups.sort();
    groups.dedup();
    match path {
        "/version" => {
            Some(json!({"major": "1", "minor": "37", "gitVersion": "v1.37.0", "gitCommit": "", "gitTreeState": "",
            "buildDate": "", "goVersion": "", "compiler": "", "platform": ""}))
        }
        "/api" => Some(json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})),
        "/apis" => {
            let version = |group: &String| json!({"groupVersion": format!("{group}/v1"), "version": "v1"});
            let groups = groups
                .iter()
                .map(|group| json!({"name": group, "versions": [version(group)], "preferredVersion": version(group)}));
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups.collect::<Vec<_>>()}))
        }
        _ => {
            let version = path.strip_prefix("/apis/").or_else(|| path.strip_prefix("/api/"))?;
            let ours: Vec<_> = KINDS.iter().filter(|kind| kind.api_version == version).map(resource).collect();
            let list =
                json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": ours});
            (!ours.is_empty()).then_some(list)
        }
    }
}

fn resource(kind: &Kind) -> Value {
    json!({"name": kind.plural, "singularName": kind.kind.to_lowercase(), "namespaced": kind.namespaced,
        "kind": kind.kind, "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"]})
}
