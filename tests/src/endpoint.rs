//! An artifact endpoint in the background, and what `curl` gets from it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::Duration;

use oscontainer_artifact::digest::{Checksum, Digest};
use oscontainer_artifact::manifest::{MEDIA_TYPE, Manifest, TARBALL_MEDIA_TYPE, Tarball};
use tempfile::TempDir;

use crate::store::{Kind, Place};
use crate::{Server, builder, run, tool, wait_for};

/// The token that may write.
pub const TOKEN: &str = "a-long-and-secret-token-4711";

/// An endpoint on a store of its own.
pub struct Endpoint {
    dir: TempDir,
    /// Where its artifacts are.
    pub place: Place,
    server: Option<Server>,
}

impl Endpoint {
    /// One with a token file.
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// One with a token file and these options too.
    pub fn with(options: &[&str]) -> Self {
        Self::on(Kind::Directory, options)
    }

    /// One with a token file and these options too, on a store of this kind.
    pub fn on(kind: Kind, options: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("token"), format!("{TOKEN}\n")).unwrap();
        let place = Place::new(kind, &dir.path().join("store"));
        let mut endpoint = Self { dir, place, server: None };
        let mut command = endpoint.command();
        command.arg("--token-file").arg(endpoint.path("token")).args(options);
        endpoint.run(command);
        endpoint
    }

    /// The command without the token, for tests that start it in their own way.
    pub fn command(&self) -> Command {
        let mut command = builder();
        command.arg("endpoint").arg("--store").arg(&self.place.uri);
        self.place.credentials(&mut command);
        command
    }

    /// Starts what [`Endpoint::command`] began.
    pub fn run(&mut self, mut command: Command) {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        self.server = Some(Server::start(command.stderr(log)));
    }

    /// Kills it, with SIGKILL.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Kills it and starts it anew on the same store, with a token file.
    pub fn restart(&mut self) {
        self.kill();
        let mut command = self.command();
        command.arg("--token-file").arg(self.path("token"));
        self.run(command);
    }

    /// The running process.
    pub fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    /// Its process id.
    pub fn pid(&mut self) -> u32 {
        self.server.as_mut().unwrap().child().id()
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        self.server.as_mut().unwrap().child().wait().unwrap()
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in its directory, where `store`, `token` and `log` are.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// The URL of a path that starts with a slash.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.server().url())
    }

    /// Writes a file into its directory.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// What curl gets for `arguments` at `path`.
    #[track_caller]
    pub fn curl(&self, path: &str, arguments: &[&str]) -> Reply {
        Reply::of(curl().args(arguments).arg(self.url(path)))
    }

    /// A PUT of `bytes` by somebody who may.
    #[track_caller]
    pub fn put(&self, path: &str, bytes: &[u8]) -> Reply {
        self.put_with(path, bytes, &[])
    }

    /// A PUT of `bytes` by somebody who may, with more arguments for curl.
    #[track_caller]
    pub fn put_with(&self, path: &str, bytes: &[u8], arguments: &[&str]) -> Reply {
        let mut file = tempfile::NamedTempFile::new_in(self.dir.path()).unwrap();
        file.write_all(bytes).unwrap();
        let mut command = curl();
        command.arg("-H").arg(bearer()).arg("-T").arg(file.path()).args(arguments).arg(self.url(path));
        Reply::of(&mut command)
    }

    /// Stores a whole artifact whose tarball is `tarball`; gives its manifest's bytes.
    #[track_caller]
    pub fn store(&self, name: &str, version: &str, tarball: &[u8]) -> Vec<u8> {
        let bytes = manifest(name, version, tarball);
        for (name, content) in
            [(file(name, version, "repo.tar"), tarball), (file(name, version, "manifest.json"), &bytes)]
        {
            let mut reply = self.put(&name, content);
            // Beside other work Keystone may take longer over a token than that lives, and clients come again.
            let mut tries = if self.place.kind == Kind::Keystone { 10 } else { 0 };
            while reply.status == 503 && tries > 0 {
                thread::sleep(Duration::from_secs(1));
                reply = self.put(&name, content);
                tries -= 1;
            }
            let text = String::from_utf8_lossy(&reply.body);
            assert_eq!(reply.status, 201, "{name}: {text}; the log: {}", self.log());
        }
        bytes
    }

    /// The files in the store, relative to it, but for locks.
    pub fn stored(&self) -> Vec<String> {
        self.place.files()
    }

    /// Waits until it has read so many bytes of uploads since it was started.
    #[track_caller]
    pub fn received(&self, bytes: usize) {
        let received = || {
            let metrics = self.curl("/metrics", &[]).text();
            let line = metrics.lines().find_map(|line| line.strip_prefix("oscontainer_endpoint_received_bytes_total "));
            line.and_then(|number| number.parse::<usize>().ok()).unwrap_or_default()
        };
        wait_for(|| received() >= bytes, "bytes to come in");
    }
}

/// A response as curl saw it.
#[derive(Debug)]
pub struct Reply {
    /// The status of the last response.
    pub status: u16,
    /// The heads of all responses.
    pub head: String,
    /// The last response's body.
    pub body: Vec<u8>,
}

impl Reply {
    /// Runs a curl and takes its response.
    #[track_caller]
    pub fn of(command: &mut Command) -> Self {
        let dir = TempDir::new().unwrap();
        let (head, body) = (dir.path().join("head"), dir.path().join("body"));
        fs::write(&body, "").unwrap();
        let done = run(command.arg("-D").arg(&head).arg("-o").arg(&body).args(["-w", "%{http_code}"]));
        let status = done.stdout.parse().unwrap_or_else(|e| panic!("{command:?}: {e}: {done:?}"));
        Self { status, head: fs::read_to_string(head).unwrap_or_default(), body: fs::read(body).unwrap() }
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// A header's value in the last response.
    pub fn header(&self, name: &str) -> Option<&str> {
        let last = self.head.trim_end().rsplit("\r\n\r\n").next().unwrap();
        last.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// A curl that no proxy and no endless wait disturbs.
pub fn curl() -> Command {
    let mut command = tool("curl");
    command.args(["-sS", "--max-time", "60", "--path-as-is"]);
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command
}

/// The header of who may write.
pub fn bearer() -> String {
    format!("Authorization: Bearer {TOKEN}")
}

/// The path of a file of an artifact.
pub fn file(name: &str, version: &str, file: &str) -> String {
    format!("/v1/artifacts/{name}/{version}/{file}")
}

/// The manifest of a made-up commit in `tarball`.
pub fn manifest(name: &str, version: &str, tarball: &[u8]) -> Vec<u8> {
    let manifest = Manifest {
        schema_version: 1,
        media_type: MEDIA_TYPE.to_owned(),
        name: name.parse().unwrap(),
        version: version.parse().unwrap(),
        architecture: "amd64".to_owned(),
        ref_name: "demo/x86_64/host".to_owned(),
        commit: Checksum::from_bytes(&[7; 32]).unwrap(),
        tarball: Tarball {
            path: "repo.tar".to_owned(),
            media_type: TARBALL_MEDIA_TYPE.to_owned(),
            size: tarball.len() as u64,
            digest: Digest::of(tarball),
        },
        annotations: [("version".to_owned(), version.to_owned())].into(),
    };
    manifest.to_bytes()
}

/// Bytes that do not repeat within a block.
pub fn noise(size: usize, seed: u64) -> Vec<u8> {
    // Odd, for a state of 0 stays there.
    let mut state = 2 * seed + 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(size).collect()
}

/// A directory as `pack` leaves it.
pub fn packed(dir: &Path, version: &str, tarball: &[u8]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("repo.tar"), tarball).unwrap();
    fs::write(dir.join("manifest.json"), manifest("demo", version, tarball)).unwrap();
}
