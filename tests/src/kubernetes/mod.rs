//! A stand-in for a Kubernetes API server, by the API's reference: it stores objects that
//! are valid by the real schemas, lets users do what the stored Roles and admission policies say,
//! and serves lists, watches, patches and logs, with the faults that the real one has. There are no
//! controllers and no kubelet: tests say what becomes of a Job and its Pods.

mod admission;
mod connection;
mod patch;
mod rights;
pub mod schema;
mod serve;
mod store;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use oscontainer_artifact::digest::Digest;
use serde_json::{Value, json};

use crate::authority::Authority;
use admission::{Asked, denied};
use store::Store;

/// The token of the one who may do everything.
pub const ADMIN: &str = "the-administrators-token";
/// The manifests' namespace of the compose Job.
pub const COMPOSE: &str = "oscontainer-compose";
/// The manifests' namespace of all else.
pub const OTHER: &str = "oscontainer";

/// The server; it runs until the test's process ends.
#[derive(Clone)]
pub struct Kubernetes {
    shared: Arc<Shared>,
    /// `127.0.0.1:PORT`.
    pub address: String,
    authority: Arc<Authority>,
}

/// What all connections see.
struct Shared {
    store: Mutex<Store>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Store> {
        // A failed test has said already what is wrong.
        self.store.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Kubernetes {
    /// Starts one on a free port of loopback.
    pub fn start() -> Self {
        let authority = Arc::new(Authority::new());
        let tls = connection::tls(&authority);
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let shared = Arc::new(Shared { store: Mutex::new(Store::new()), changed: Condvar::new() });
        let server = Self { shared: Arc::clone(&shared), address, authority };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shared, tls) = (Arc::clone(&shared), Arc::clone(&tls));
                // A client that goes away is part of the tests.
                thread::spawn(move || serve::connection(connection::open(stream, tls)?, &shared));
            }
        });
        server
    }

    /// Starts one to which `kubectl apply -f manifests/` was done, but for these files.
    pub fn with_manifests(without: &[&str]) -> Self {
        let cluster = Self::start();
        let all = crate::manifests::files(&crate::source_dir().join("manifests"));
        let base = all.iter().filter(|path| path.parent().unwrap().ends_with("manifests"));
        let wanted = |path: &&Path| !without.iter().any(|name| path.ends_with(name));
        cluster.put_files(base.map(PathBuf::as_path).filter(wanted));
        cluster
    }

    /// The certificate authority to trust.
    pub fn ca(&self) -> PathBuf {
        self.authority.ca()
    }

    /// Writes a kubeconfig that leads here, for whom `token` is.
    pub fn write_kubeconfig(&self, path: &Path, token: &str) {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{}", self.address), "certificate-authority": self.ca()}}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": "user"}},
                {"name": "elsewhere", "context": {"cluster": "test", "user": "user", "namespace": "elsewhere"}},
            ],
        });
        std::fs::write(path, config.to_string()).expect("a kubeconfig can be written");
    }

    /// Stores an object as it is, as its controller would.
    pub fn put(&self, object: Value) {
        self.shared.lock().put(object);
        self.shared.changed.notify_all();
    }

    /// The same, but the history is forgotten at once (410): watches must list again to see it.
    pub fn put_unwatched(&self, object: Value) {
        let mut store = self.shared.lock();
        store.put(object);
        store.forgotten = store.version();
        drop(store);
        self.shared.changed.notify_all();
    }

    /// Stores all objects of these files, as an administrator would.
    pub fn put_files<'a>(&self, files: impl IntoIterator<Item = &'a Path>) {
        for file in files {
            let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            crate::manifests::documents(&text).into_iter().for_each(|object| self.put(object));
        }
    }

    /// Makes it OpenShift: the rights and the BuildConfigs of the manifests, and the aggregator's image with these layers.
    pub fn put_openshift(&self, layers: &[String]) {
        let openshift = crate::source_dir().join("manifests/openshift");
        self.put_files([openshift.join("00-rights.yaml").as_path(), &openshift.join("40-build.yaml")]);
        self.put_image(OTHER, concat!("oscontainer-aggregator:", env!("CARGO_PKG_VERSION")), json!({}), layers);
    }

    /// Has an image stream's tag name an image with these labels and layers, as a push does.
    pub fn put_image(&self, namespace: &str, tag: &str, labels: Value, layers: &[String]) {
        let (stream, _) = tag.split_once(':').expect("STREAM:TAG");
        let digest = Digest::of(format!("{tag} {labels} {layers:?}").as_bytes()).to_string();
        let layers = layers.iter().map(|name| json!({"name": name, "size": 1, "mediaType": "x"}));
        self.put(json!({
            "apiVersion": "image.openshift.io/v1", "kind": "ImageStreamTag",
            "metadata": {"name": tag, "namespace": namespace},
            "image": {
                "metadata": {"name": digest},
                "dockerImageReference": format!("registry.example:5000/{namespace}/{stream}@{digest}"),
                "dockerImageLayers": layers.collect::<Vec<_>>(),
                "dockerImageMetadata": {"Config": {"Labels": labels}},
            },
        }));
    }

    /// Deletes an object, as somebody else may.
    pub fn remove(&self, object: &Value) {
        let [kind, namespace, name] = ["/kind", "/metadata/namespace", "/metadata/name"]
            .map(|place| object.pointer(place).and_then(Value::as_str).unwrap_or_default());
        self.shared.lock().delete(kind, namespace, name);
        self.shared.changed.notify_all();
    }

    /// Lets `token` be `user`'s, made for these audiences (none: the API server's own).
    pub fn know(&self, token: &str, user: &str, audiences: &[&str]) {
        let audiences = audiences.iter().map(ToString::to_string).collect();
        self.shared.lock().users.insert(token.to_owned(), (user.to_owned(), audiences));
    }

    /// Lets a token be nobody's any more.
    pub fn forget(&self, token: &str) {
        self.shared.lock().users.remove(token);
    }

    /// The objects of a kind in a namespace, as they are now.
    pub fn list(&self, kind: &str, namespace: &str) -> Vec<Value> {
        self.shared.lock().list(kind, namespace)
    }

    /// The objects of a kind in a namespace whose names start so; one there must be.
    #[track_caller]
    pub fn one(&self, kind: &str, namespace: &str, start: &str) -> Value {
        let all = self.list(kind, namespace);
        let mut named = all.iter().filter(|object| object["metadata"]["name"].as_str().unwrap().starts_with(start));
        let one = named.next().unwrap_or_else(|| panic!("no {kind} {start}… in {namespace}: {all:?}"));
        assert!(named.next().is_none(), "several {kind} {start}… in {namespace}");
        one.clone()
    }

    /// Waits for an object of a kind in a namespace whose name starts so.
    #[track_caller]
    pub fn wait(&self, kind: &str, namespace: &str, start: &str) -> Value {
        let found = || {
            let all = self.list(kind, namespace);
            all.into_iter().find(|object| object["metadata"]["name"].as_str().unwrap().starts_with(start))
        };
        crate::wait_for(|| found().is_some(), &format!("{kind} {start}… in {namespace}"));
        found().unwrap()
    }

    /// Requests that were refused, and why.
    pub fn refused(&self) -> Vec<String> {
        self.shared.lock().refused.clone()
    }

    /// All requests so far: method and target.
    pub fn requests(&self) -> Vec<String> {
        self.shared.lock().requests.clone()
    }

    /// From now on watches end soon, by turns: cut in the middle of an event, and with the
    /// error that the history is forgotten (410).
    pub fn shake_watches(&self) {
        self.shared.lock().shaking = true;
    }

    /// Cuts each log after so many lines, so many times.
    pub fn cut_logs(&self, lines: usize, times: usize) {
        self.shared.lock().cuts = (lines, times);
    }

    /// Ends all connections at once, or is there again.
    pub fn set_down(&self, down: bool) {
        self.shared.lock().down = down;
        self.shared.changed.notify_all();
    }

    /// Lets all connections that are open fall silent, as a firewall does that forgets them.
    pub fn fall_silent(&self) {
        self.shared.lock().silences += 1;
    }

    /// The kubelet begins a new file for a container's log: what it had is no longer served.
    pub fn rotate_log(&self, pod: &str, container: &str) {
        let key = (pod.to_owned(), container.to_owned());
        let mut store = self.shared.lock();
        store.logs.remove(&key);
        *store.turns.entry(key).or_default() += 1;
    }

    /// A container that ended is started again: its log is the previous one.
    pub fn restart(&self, namespace: &str, pod: &str, container: &str) {
        let key = (pod.to_owned(), container.to_owned());
        let mut store = self.shared.lock();
        let log = store.logs.remove(&key).unwrap_or_default();
        store.previous.insert(key.clone(), log);
        *store.turns.entry(key).or_default() += 1;
        drop(store);
        let ended = json!({"exitCode": 1, "reason": "Error"});
        let status = json!({"phase": "Running", "containerStatuses": [{
            "name": container, "image": "", "imageID": "", "ready": true, "restartCount": 1,
            "state": {"running": {}}, "lastState": {"terminated": ended},
        }]});
        self.set_status("Pod", namespace, pod, status);
    }

    /// What the Job controller and the kubelet do: a Pod of the Job, waiting.
    #[track_caller]
    pub fn make_pod(&self, job: &Value) -> String {
        self.try_pod(job).unwrap_or_else(|why| panic!("no Pod of {}: {why}", job["metadata"]["name"]))
    }

    /// The same; where admission refuses the Pod, the Event that the Job controller writes.
    ///
    /// # Errors
    /// Why it was refused.
    pub fn try_pod(&self, job: &Value) -> Result<String, String> {
        let mut template = job["spec"]["template"].clone();
        let owner = job["metadata"]["name"].as_str().unwrap();
        let namespace = job["metadata"]["namespace"].as_str().unwrap();
        let name = self.shared.lock().new_name(&format!("{owner}-"));
        let metadata = &mut template["metadata"];
        metadata["name"] = name.clone().into();
        metadata["namespace"] = namespace.into();
        metadata["labels"]["batch.kubernetes.io/job-name"] = owner.into();
        metadata["labels"]["batch.kubernetes.io/controller-uid"] = job["metadata"]["uid"].clone();
        metadata["ownerReferences"] = json!([{"apiVersion": "batch/v1", "kind": "Job", "controller": true,
            "name": owner, "uid": job["metadata"]["uid"]}]);
        template["apiVersion"] = "v1".into();
        template["kind"] = "Pod".into();
        let asked = Asked {
            operation: "CREATE",
            group: "",
            resource: "pods",
            namespace,
            object: &template,
            before: &Value::Null,
        };
        let refusal = denied(&self.shared.lock(), &asked);
        if let Some(why) = refusal {
            self.warn(job, "FailedCreate", &format!("Error creating: {why}"));
            return Err(why);
        }
        template["status"] = json!({"phase": "Pending"});
        self.put(template);
        Ok(name)
    }

    /// Sets the status of an object.
    pub fn set_status(&self, kind: &str, namespace: &str, name: &str, status: Value) {
        let mut object = self.one(kind, namespace, name);
        object["status"] = status;
        self.put(object);
    }

    /// The state of one container of a Pod, all of whose other containers are not told of.
    pub fn set_container(&self, namespace: &str, pod: &str, phase: &str, container: &str, state: Value) {
        let status = json!({"phase": phase, "containerStatuses": [{
            "name": container, "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state,
        }]});
        self.set_status("Pod", namespace, pod, status);
    }

    /// A line of a container's log.
    pub fn log(&self, pod: &str, container: &str, line: impl AsRef<[u8]>) {
        let mut store = self.shared.lock();
        store.clock += Duration::from_micros(1);
        let time = store.clock;
        store.logs.entry((pod.to_owned(), container.to_owned())).or_default().push((time, line.as_ref().to_owned()));
        drop(store);
        self.shared.changed.notify_all();
    }

    /// A Warning about an object.
    pub fn warn(&self, about: &Value, reason: &str, note: &str) {
        let name = self.shared.lock().new_name("warning.");
        let metadata = &about["metadata"];
        self.put(json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": {"name": name, "namespace": metadata["namespace"]},
            "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Warning", "reason": reason, "note": note,
            "action": reason, "reportingController": "job-controller", "reportingInstance": "job-controller",
            "regarding": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]},
        }));
    }
}
