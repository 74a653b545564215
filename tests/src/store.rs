//! The kinds of stores that an endpoint can have: a directory, S3 from Ceph's gateway and
//! OpenStack Swift, each real, and emulators of Azure's (Microsoft's own) and Google's stores.
//! The servers start when the first test wants them and end with the test's process.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::{free_address, ok, run, source_dir, target_dir, tool, wait_for};

/// The bucket or container in which each endpoint has a prefix of its own.
const BUCKET: &str = "artifacts";
/// The key to S3, as the gateway is told, and the user of Swift's TempAuth.
const KEY: (&str, &str) = ("AKTEST", "SKTEST");
/// Seconds after which a token of Swift's expires: soon, so that every test renews it.
const TOKEN_LIFE: &str = "5";
/// The same for Keystone, which is slower.
const KEYSTONE_LIFE: &str = "10";

/// A kind of store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// S3.
    S3,
    /// OpenStack Swift with TempAuth.
    Swift,
    /// OpenStack Swift with Keystone.
    Keystone,
    /// Azure Blob Storage.
    Azure,
    /// Google Cloud Storage.
    Gcs,
}

/// The key of the account that Azurite has, from its documentation.
const AZURE_KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
/// A signature by this key, for clients that cannot use it with an emulator.
const AZURE_SIGNATURE: &str = "sv=2020-08-04&ss=b&srt=sco&sp=rwdlac&se=2099-01-01T00:00:00Z\
    &sig=x%2FQXZVVilc6CBdKa9TN6OcrIf0rB%2Fv0F0GVQBOwF7so%3D";
/// What the variables of stores begin with.
pub const VARIABLES: [&str; 6] = ["AWS_", "OS_", "ST_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_HOST"];

/// Runs each of these functions, which take a [`Kind`], on every kind of store.
#[macro_export]
macro_rules! on_each_store {
    ($($test:ident),+ $(,)?) => {
        $($crate::on_stores!($test: directory Directory, s3 S3, swift Swift, azure Azure, gcs Gcs);)+
    };
}

/// The same for object stores.
#[macro_export]
macro_rules! on_each_object_store {
    ($($test:ident),+ $(,)?) => {
        $($crate::on_stores!($test: s3 S3, swift Swift, azure Azure, gcs Gcs);)+
    };
}

/// Runs the function on these kinds of stores, each a test of this name.
#[macro_export]
macro_rules! on_stores {
    ($test:ident: $($name:ident $kind:ident),+) => {
        mod $test {
            $(#[test]
            fn $name() {
                super::$test($crate::store::Kind::$kind);
            })+
        }
    };
}

/// A place for one endpoint's artifacts.
#[derive(Debug, Clone)]
pub struct Place {
    /// Its kind.
    pub kind: Kind,
    /// What `--store` takes.
    pub uri: String,
    /// The store's server.
    address: String,
}

impl Place {
    /// A place of this kind that nobody has; a directory is `dir`.
    pub fn new(kind: Kind, dir: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let scheme = match kind {
            Kind::Directory => {
                return Self { kind, uri: dir.to_str().expect("its path is ASCII").to_owned(), address: String::new() };
            }
            Kind::S3 => "s3",
            Kind::Swift | Kind::Keystone => "swift",
            Kind::Azure => "az",
            Kind::Gcs => "gs",
        };
        Self { kind, uri: format!("{scheme}://{BUCKET}/{prefix}"), address: server(kind).to_owned() }
    }

    /// The same place, reached through something at another address.
    pub fn through(&self, address: &str) -> Self {
        Self { address: address.to_owned(), ..self.clone() }
    }

    /// `127.0.0.1:PORT` of the store's server.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Gives a command the variables that lead to the store, and no others.
    pub fn credentials(&self, command: &mut Command) {
        for (name, _) in std::env::vars_os() {
            if VARIABLES.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        let url = format!("http://{}", self.address);
        match self.kind {
            Kind::Directory => {}
            Kind::S3 => {
                command.env("AWS_ACCESS_KEY_ID", KEY.0).env("AWS_SECRET_ACCESS_KEY", KEY.1);
                command.env("AWS_ENDPOINT_URL", url).env("AWS_REGION", "default");
            }
            Kind::Swift => {
                command
                    .env("ST_AUTH", format!("{url}/auth/v1.0"))
                    .env("ST_USER", "test:tester")
                    .env("ST_KEY", "testing");
                // The account is where TempAuth says; through a proxy it must be told.
                command.env("OS_STORAGE_URL", format!("{url}/v1/AUTH_test"));
            }
            Kind::Keystone => {
                command.env("OS_AUTH_URL", format!("http://{}/v3", keystone())).env("OS_IDENTITY_API_VERSION", "3");
                command.env("OS_USERNAME", "admin").env("OS_PASSWORD", "secret").env("OS_PROJECT_NAME", "admin");
                command.env("OS_USER_DOMAIN_NAME", "Default").env("OS_PROJECT_DOMAIN_ID", "default");
                command.env("OS_REGION_NAME", "test").env("OS_ENDPOINT_TYPE", "publicURL");
            }
            Kind::Azure => {
                let account = format!("AccountName=devstoreaccount1;AccountKey={AZURE_KEY}");
                let connection = format!("DefaultEndpointsProtocol=http;{account};BlobEndpoint={url}/devstoreaccount1");
                command.env("AZURE_STORAGE_CONNECTION_STRING", connection);
            }
            Kind::Gcs => {
                command.env("STORAGE_EMULATOR_HOST", url);
            }
        }
    }

    /// The paths of all files in it, but for locks.
    pub fn files(&self) -> Vec<String> {
        let mut command = match self.kind {
            Kind::Directory => {
                let mut command = tool("find");
                command.arg(&self.uri).args(["-type", "f", "-printf", "%P\\n"]);
                command
            }
            _ => {
                let (_, path) = self.uri.split_once("://").expect("it is a URI");
                let mut command = rclone(self.kind, server(self.kind));
                command.args(["lsf", "-R", "--files-only"]).arg(format!("store:{path}"));
                command
            }
        };
        let listed = run(&mut command);
        // rclone takes a prefix that nothing is below for an error.
        let mut files: Vec<_> = listed.stdout.lines().map(str::to_owned).collect();
        files.retain(|path| ![".lock", "lock"].contains(&path.as_str()));
        files.sort();
        files
    }

    /// Writes a file into it, past the endpoint.
    pub fn overwrite(&self, path: &str, bytes: &[u8]) {
        if self.kind == Kind::Directory {
            return fs::write(Path::new(&self.uri).join(path), bytes).expect("the store can be written to");
        }
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        fs::write(file.path(), bytes).expect("it can be written to");
        let (_, prefix) = self.uri.split_once("://").expect("it is a URI");
        let mut command = rclone(self.kind, server(self.kind));
        ok(command.arg("copyto").arg(file.path()).arg(format!("store:{prefix}/{path}")));
    }

    /// Reads a file from it, past the endpoint.
    pub fn read(&self, path: &str) -> Vec<u8> {
        if self.kind == Kind::Directory {
            return fs::read(Path::new(&self.uri).join(path)).expect("the store can be read");
        }
        let (_, prefix) = self.uri.split_once("://").expect("it is a URI");
        let mut command = rclone(self.kind, server(self.kind));
        ok(command.arg("cat").arg(format!("store:{prefix}/{path}"))).stdout.into_bytes()
    }
}

/// The port of `HOST:PORT`.
fn port(address: &str) -> &str {
    address.rsplit(':').next().unwrap_or_default()
}

/// An independent client of the store, to whom it is `store:`.
fn rclone(kind: Kind, address: &str) -> Command {
    let mut command = tool("rclone");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_")) {
        command.env_remove(name);
    }
    command.args(["--config", ""]);
    let mut set = |name: &str, value: &str| {
        command.env(format!("RCLONE_CONFIG_STORE_{name}"), value);
    };
    let url = format!("http://{address}");
    match kind {
        Kind::S3 => {
            set("TYPE", "s3");
            set("PROVIDER", "Ceph");
            set("ACCESS_KEY_ID", KEY.0);
            set("SECRET_ACCESS_KEY", KEY.1);
            set("ENDPOINT", &url);
        }
        Kind::Azure => {
            set("TYPE", "azureblob");
            set("SAS_URL", &format!("{url}/devstoreaccount1?{AZURE_SIGNATURE}"));
        }
        Kind::Gcs => {
            set("TYPE", "google cloud storage");
            set("ANONYMOUS", "true");
            set("PROJECT_NUMBER", "1");
            set("ENDPOINT", &format!("{url}/storage/v1/"));
        }
        Kind::Swift | Kind::Keystone | Kind::Directory => {
            set("TYPE", "swift");
            set("USER", "test:tester");
            set("KEY", "testing");
            set("AUTH", &format!("{url}/auth/v1.0"));
        }
    }
    command
}

/// A server that was started.
struct Running {
    address: String,
    dir: PathBuf,
    /// Closed, it ends the server.
    _stdin: ChildStdin,
}

/// A command that makes the bucket or container.
fn bucket(kind: Kind, address: &str) -> Command {
    if kind != Kind::Keystone {
        let mut command = rclone(kind, address);
        command.args(["mkdir", &format!("store:{BUCKET}"), "--contimeout", "2s"]);
        return command;
    }
    let mut command = tool("swift");
    command.args(["--retries", "0", "post", BUCKET]);
    Place { kind, uri: String::new(), address: address.to_owned() }.credentials(&mut command);
    command
}

/// The address of the server of this kind.
fn server(kind: Kind) -> &'static str {
    &running(kind).address
}

/// The server of this kind, which is started if it does not run yet.
fn running(kind: Kind) -> &'static Running {
    static S3: OnceLock<Running> = OnceLock::new();
    static SWIFT: OnceLock<Running> = OnceLock::new();
    static KEYSTONE: OnceLock<Running> = OnceLock::new();
    static AZURE: OnceLock<Running> = OnceLock::new();
    static GCS: OnceLock<Running> = OnceLock::new();
    let running = match kind {
        Kind::S3 => &S3,
        Kind::Swift | Kind::Directory => &SWIFT,
        Kind::Keystone => &KEYSTONE,
        Kind::Azure => &AZURE,
        Kind::Gcs => &GCS,
    };
    running.get_or_init(|| {
        let scripts = source_dir().join("tests/src/store");
        let emulators = target_dir().join("emulators");
        let python = emulators.join("python/bin/python3").display().to_string();
        // Debian's own Python has Swift.
        let (program, script) = match kind {
            Kind::S3 => ("bash", "ceph.sh"),
            Kind::Azure => ("bash", "azurite.sh"),
            Kind::Gcs => (python.as_str(), "gcs_server.py"),
            _ => ("/usr/bin/python3", "swift_servers.py"),
        };
        let mut command = tool(program);
        command
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("S3_KEY", KEY.0)
            .env("S3_SECRET", KEY.1)
            .arg(scripts.join(script));
        let address = free_address();
        let dir =
            tempfile::Builder::new().prefix("oscontainer-store-").tempdir().expect("a temporary directory").keep();
        command.arg(&dir).arg(port(&address));
        match kind {
            Kind::S3 | Kind::Gcs => &mut command,
            Kind::Azure => command.arg(&emulators),
            Kind::Keystone => command.args([KEYSTONE_LIFE, port(keystone())]),
            _ => command.arg(TOKEN_LIFE),
        };
        let log = fs::File::create(dir.join("log")).expect("the log can be written");
        command.stdout(log.try_clone().expect("a file can be cloned")).stderr(log).stdin(Stdio::piped());
        #[expect(clippy::zombie_processes, reason = "it ends with this process")]
        let mut child = command.spawn().expect("make setup-test installs what it needs");
        let stdin = child.stdin.take().expect("it was asked for");
        let deadline = Instant::now() + Duration::from_secs(180);
        // rclone waits long for a server that does not listen.
        while TcpStream::connect(&address).is_err() || run(&mut bucket(kind, &address)).code != 0 {
            let ended = child.try_wait().expect("a child can be waited for");
            let log = || fs::read_to_string(dir.join("log")).unwrap_or_default();
            assert!(ended.is_none() && Instant::now() < deadline, "the store did not start: {ended:?}\n{}", log());
            std::thread::sleep(Duration::from_millis(300));
        }
        Running { address, dir, _stdin: stdin }
    })
}

/// Where Keystone is, or will be.
fn keystone() -> &'static str {
    static ADDRESS: OnceLock<String> = OnceLock::new();
    ADDRESS.get_or_init(free_address)
}

/// Keystone's application credential, as its API describes it.
pub fn application_credential() -> serde_json::Value {
    let path = running(Kind::Keystone).dir.join("credential.json");
    wait_for(|| path.exists(), "the application credential");
    serde_json::from_slice(&fs::read(path).expect("it can be read")).expect("it is JSON")
}
