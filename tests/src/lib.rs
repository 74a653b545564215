//! What the end-to-end tests share: where the binaries are, how they are run and
//! what they leave. The tests drive the binaries, never their modules.

pub mod artifacts;
pub mod authority;
pub mod cluster;
pub mod containers;
pub mod endpoint;
pub mod http;
pub mod images;
pub mod ipv4;
pub mod issuer;
pub mod kubernetes;
pub mod manifests;
pub mod oci;
pub mod proxy;
pub mod registry;
pub mod repo;
pub mod rpms;
pub mod store;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};

/// A command that runs `oscontainer-builder`, with no environment of the caller's
/// that could change what it does.
pub fn builder() -> Command {
    binary("OSCONTAINER_BUILDER", "release/oscontainer-builder")
}

/// `compose` of `treefile` by the dnf engine, into `dir/repo`, with a cache in `dir`.
pub fn compose(dir: &Path, treefile: &Path) -> Command {
    let mut command = builder();
    command.args(["compose", "--engine", "dnf", "--output-format", "json", "--cache-dir"]).arg(dir.join("cache"));
    command.arg("--repo").arg(dir.join("repo")).arg(treefile);
    command
}

/// A command that runs `oscontainer-aggregator`: the static one that ships.
pub fn aggregator() -> Command {
    binary("OSCONTAINER_AGGREGATOR", "static/oscontainer-aggregator")
}

/// A program that is neither ours nor needs a description.
pub fn tool(name: &str) -> Command {
    Command::new(name)
}

fn binary(variable: &str, below_target: &str) -> Command {
    let path = std::env::var_os(variable).map_or_else(|| target_dir().join(below_target), PathBuf::from);
    assert!(path.exists(), "{} is missing: `make build` makes it, or set {variable}", path.display());
    let mut command = Command::new(path);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OSCONTAINER_") {
            command.env_remove(name);
        }
    }
    command
}

/// Cargo's target directory: this test's binary lies in `TARGET/release/deps`.
pub fn target_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("a running program has a path");
    let deps = exe.ancestors().find(|dir| dir.ends_with("deps")).expect("tests run from TARGET/PROFILE/deps");
    deps.ancestors().nth(2).expect("deps has two parents").to_owned()
}

/// The root of the project's sources.
pub fn source_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the project")
}

/// What a command that was run to its end left.
#[derive(Debug)]
pub struct Done {
    /// The exit code, or -1 after a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Done {
    /// Standard output as one JSON object.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("stdout is not JSON ({e}): {self:?}"))
    }
}

/// Runs `command` to its end, whatever it is.
#[track_caller]
pub fn run(command: &mut Command) -> Done {
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("running {command:?}: {e}"));
    Done {
        code: status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

/// Runs `command` and requires that it ends with 0; gives what it printed.
#[track_caller]
pub fn ok(command: &mut Command) -> Done {
    let done = run(command);
    succeeded(command, done)
}

/// Requires that `command` ended with 0; gives what it printed.
#[track_caller]
fn succeeded(command: &Command, done: Done) -> Done {
    assert!(done.code == 0, "{command:?} ended with {}\n{}\n{}", done.code, done.stdout, done.stderr);
    done
}

/// Runs `command` and requires that it fails with `code` and exactly one error
/// line that contains `reason`.
#[track_caller]
pub fn fails(command: &mut Command, code: i32, reason: &str) -> Done {
    let done = run(command);
    assert!(done.code == code, "{command:?} ended with {}, not {code}\n{}\n{}", done.code, done.stdout, done.stderr);
    let errors: Vec<_> = done.stderr.lines().filter(|line| line.contains("ERROR")).collect();
    assert!(errors.len() == 1 && errors[0].contains(reason), "expected one error with {reason:?}: {}", done.stderr);
    done
}

/// A server of ours in the background; dropped, it is killed.
pub struct Server {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub address: String,
}

impl Server {
    /// Starts `command --listen 127.0.0.1:PORT` on a free port and waits until
    /// `/healthz` may be asked.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        Self::start_on("127.0.0.1", command)
    }

    /// The same with `--listen HOST:PORT`, which takes connections to 127.0.0.1 too.
    #[track_caller]
    pub fn start_on(host: &str, command: &mut Command) -> Self {
        let address = free_address();
        let port = address.rsplit(':').next().expect("an address has a port");
        let child = command
            .args(["--listen", &format!("{host}:{port}")])
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("running {command:?}: {e}"));
        let mut server = Self { child, address };
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(&server.address).is_err() {
            let ended = server.child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "{command:?} ended: {ended:?}");
            assert!(Instant::now() < deadline, "{command:?} did not listen in 20 s");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The process, to be killed or waited for.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already; that is what the drop wants.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The most memory that the process `id` has had, in KiB.
pub fn peak_memory(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says it");
    line.split_whitespace().next().and_then(|size| size.parse().ok()).expect("it is a number")
}

/// Lets this process have as many open files as it may.
pub fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("the soft limit may be the hard one");
}

/// Waits up to 30 s for something that is soon so.
#[track_caller]
pub fn wait_for(condition: impl FnMut() -> bool, what: &str) {
    assert!(comes_true(condition), "waited 30 s for {what}");
}

/// Whether `condition` holds within 30 seconds.
pub fn comes_true(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    true
}

/// An address on loopback that is free now.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("a bound socket has an address").to_string()
}
