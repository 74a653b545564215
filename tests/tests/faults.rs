//! Signals in every stage of a compose and of `run`, hostile artifacts as the commit before,
//! and the memory that large files take.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use e2e::artifacts::{self, Artifact, Entry, REF};
use e2e::endpoint::{Endpoint, TOKEN};
use e2e::http::{Answer, Static};
use e2e::{Done, builder, compose, fails, ok, rpms, tool, wait_for};

const REPOS: &str = "repos: [demo]\npackages: [filesystem, setup, bash, coreutils]\n";

fn treefile(dir: &Path, repository: &Path, text: &str) -> PathBuf {
    rpms::write_repo_file(&dir.join("demo.repo"), "demo", repository).unwrap();
    let path = dir.join("host.yaml");
    fs::write(&path, format!("ref: test/host\nselinux: false\nreleasever: \"1\"\n{text}")).unwrap();
    path
}

fn small(dir: &Path, text: &str) -> PathBuf {
    treefile(dir, &rpms::demo_repo(), &format!("{REPOS}{text}"))
}

/// One with the ref of the artifacts that are made by hand.
fn restored(dir: &Path) {
    let path = small(dir, "");
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("test/host", REF)).unwrap();
}

/// Where an endpoint has the newest of those.
const LATEST: &str = "/v1/artifacts/demo-x86_64-host/latest";

fn postprocess(script: &str) -> String {
    let lines: String = script.lines().map(|line| format!("    {line}\n")).collect();
    format!("postprocess:\n  - |\n    #!/bin/bash\n{lines}")
}

fn run_with(dir: &Path, endpoint: &str, options: &[&str]) -> Command {
    fs::write(dir.join("token"), TOKEN).unwrap();
    let mut command = builder();
    command.args([
        "run",
        "--engine",
        "dnf",
        "--output-format",
        "json",
        "--version-string",
        "1",
        "--endpoint",
        endpoint,
    ]);
    command.args(options).arg("--cache-dir").arg(dir.join("cache")).arg("--token-file").arg(dir.join("token"));
    command.arg(dir.join("host.yaml"));
    command
}

/// A program that is to be stopped.
struct Running {
    child: Child,
    log: BufReader<ChildStderr>,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, log }
    }

    /// Reads its log until a line contains `text`.
    #[track_caller]
    fn until(mut self, text: &str) -> Self {
        let (mut line, mut all) = (String::new(), String::new());
        while !line.contains(text) {
            line.clear();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "it ended before it said {text:?}: {all}");
            all.push_str(&line);
        }
        self
    }

    /// Sends the signal and requires an orderly end, of this program and all that it started.
    #[track_caller]
    fn stop(mut self, signal: &str, dir: &Path) {
        ok(tool("kill").args(["-s", signal, &self.child.id().to_string()]));
        let start = Instant::now();
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(1), "{rest}");
        assert!(start.elapsed() < Duration::from_secs(10), "{rest}");
        assert!(rest.contains("stopped by a signal"), "{rest}");
        let mine = dir.display().to_string();
        let processes = ok(tool("ps").args(["-e", "-ww", "-o", "args"])).stdout;
        assert!(!processes.contains(&mine), "{processes}");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(&mine) && !mounts.contains("/newroot"), "{mounts}");
        let work = dir.join("cache/work");
        assert!(!work.exists() || fs::read_dir(work).unwrap().count() == 0);
    }
}

#[test]
fn a_signal_ends_every_stage_of_a_compose_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let host = small(dir.path(), &postprocess("echo sleeping\nsleep 1000"));
    for (signal, text) in
        [("TERM", "downloading packages"), ("TERM", "Installing  "), ("INT", "Running trans"), ("TERM", "sleeping")]
    {
        Running::start(&mut compose(dir.path(), &host)).until(text).stop(signal, dir.path());
    }
    assert!(!dir.path().join("repo").exists());

    // What follows works with the repository: there is no ref, and no object that is not whole.
    let untouched = || {
        let repo = dir.path().join("repo");
        assert_eq!(ok(tool("ostree").args(["refs", "--repo"]).arg(&repo)).stdout, "");
        let objects = ok(tool("find").arg(&repo).args(["-path", "*/objects/*", "-type", "f"])).stdout;
        assert_eq!(objects, "");
        let staging = ok(tool("find").arg(repo.join("tmp")).args(["-mindepth", "1", "-name", "oscontainer-*"])).stdout;
        assert_eq!(staging, "");
    };
    // Deflating this takes longer than a signal may.
    let host = small(dir.path(), &postprocess("truncate -s 8G /usr/share/large"));
    let running = Running::start(&mut compose(dir.path(), &host)).until("committing");
    thread::sleep(Duration::from_millis(500));
    running.stop("TERM", dir.path());
    untouched();

    let dracut = "printf '#!/bin/bash\\necho sleeping; sleep 1000' > /usr/bin/dracut; chmod 755 /usr/bin/dracut";
    let kernel = "packages: [kmod, linux-image-cloud-amd64]\n";
    let text = format!(
        "{}{}",
        REPOS.replace("packages: [", &format!("{}, ", kernel.trim_end_matches("]\n"))),
        postprocess(dracut)
    );
    let host = treefile(dir.path(), &rpms::host_repo(), &text);
    Running::start(&mut compose(dir.path(), &host)).until("dracut: sleeping").stop("TERM", dir.path());
    untouched();
}

/// A PATH on which a script has the name of a program.
fn path_with(dir: &Path, name: &str, script: &str) -> String {
    let bin = dir.join("bin");
    fs::create_dir(&bin).unwrap();
    fs::write(bin.join(name), format!("#!/bin/bash\n{script}\n")).unwrap();
    fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())
}

#[test]
fn a_signal_ends_rpm_ostree_and_what_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = dir.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    let host = small(dir.path(), "");
    let helper = format!("mount -t tmpfs none {0} && (exec -a {0}/helper sleep 1000) &", mounted.display());
    let path = path_with(dir.path(), "rpm-ostree", &format!("{helper}\nsleep 1\necho sleeping\nwait"));
    let mut command = builder();
    command.env("PATH", path).args(["compose", "--engine", "rpm-ostree", "--cache-dir"]);
    command.arg(dir.path().join("cache")).arg("--repo").arg(dir.path().join("repo")).arg(host);
    Running::start(&mut command).until("rpm-ostree: sleeping").stop("TERM", dir.path());
}

/// bubblewrap has a child from the beginning, but that ends with it only when it is ready.
#[test]
fn a_signal_ends_what_outlives_its_program() {
    let dir = tempfile::tempdir().unwrap();
    let host = small(dir.path(), "");
    let orphan = format!("(exec -a {}/orphan setsid sleep 1000) &", dir.path().display());
    let script = format!("[ \"${{@: -1}}\" != true ] || exit 0\n{orphan}\necho started\nwait");
    let mut command = compose(dir.path(), &host);
    command.env("PATH", path_with(dir.path(), "bwrap", &script));
    Running::start(&mut command).until("dnf: started").stop("TERM", dir.path());
}

/// A server that takes connections and never says anything; tells of each connection.
fn silent() -> (String, Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (tell, told) = channel();
    thread::spawn(move || {
        let mut connections = Vec::new();
        for connection in listener.incoming() {
            connections.push(connection);
            // The test may have ended.
            let _ = tell.send(());
        }
    });
    (address, told)
}

#[test]
fn a_signal_ends_run_wherever_it_waits() {
    let dir = tempfile::tempdir().unwrap();
    small(dir.path(), "");
    let wait = Duration::from_secs(120);
    let repo = dir.path().join("cache/repo");
    let (address, connected) = silent();
    let url = format!("http://{address}");
    let running = Running::start(&mut run_with(dir.path(), &url, &[]));
    connected.recv_timeout(wait).unwrap();
    running.stop("TERM", dir.path());
    assert!(!repo.exists());
    let running = Running::start(&mut run_with(dir.path(), &url, &["--fresh"]));
    connected.recv_timeout(wait).unwrap();
    running.stop("TERM", dir.path());

    let endpoint = Endpoint::start();
    let (address, connected) = silent();
    let config = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"http://{address}\"}}}}]\n\
         users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
    );
    fs::write(dir.path().join("kubeconfig"), config).unwrap();
    for options in [&["--trigger", "cronjob/aggregate"][..], &["--job", "compose"]] {
        let mut command = run_with(dir.path(), &endpoint.url(""), options);
        command.env("KUBECONFIG", dir.path().join("kubeconfig"));
        let running = Running::start(&mut command);
        connected.recv_timeout(wait).unwrap();
        running.stop("TERM", dir.path());
    }

    // Another program is at work in the repository: nothing can be pruned.
    let fifo = dir.path().join("fifo");
    ok(tool("mkfifo").arg(&fifo));
    let mut other = tool("ostree");
    other.current_dir(dir.path()).args(["commit", "--repo=cache/repo", "--branch=other", "--tree=tar=fifo"]);
    let mut other = other.stdout(Stdio::null()).spawn().unwrap();
    let writing = File::options().write(true).open(&fifo).unwrap();
    let patience = |seconds: &str| {
        ok(tool("ostree").arg("config").arg("--repo").arg(&repo).args(["set", "core.lock-timeout-secs", seconds]));
    };
    patience("600");
    let running = Running::start(&mut run_with(dir.path(), &endpoint.url(""), &[])).until("nothing is packed");
    thread::sleep(Duration::from_secs(1));
    running.stop("TERM", dir.path());
    patience("1");
    let done = ok(&mut run_with(dir.path(), &endpoint.url(""), &[]));
    assert!(done.stderr.contains("the next run gives disk space back"), "{}", done.stderr);
    other.kill().unwrap();
    other.wait().unwrap();
    drop(writing);
}

#[test]
fn a_signal_ends_what_libostree_copies() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    File::create(tree.join("large")).unwrap().set_len(3 << 30).unwrap();
    let repo = dir.path().join("bare");
    ok(tool("ostree").args(["init", "--mode=bare-user", "--repo"]).arg(&repo));
    ok(tool("ostree").args(["commit", "--branch", REF, "--repo"]).arg(&repo).arg(&tree));
    let mut command = builder();
    command.args(["pack", "--ref", REF, "--repo"]).arg(&repo).arg("--output").arg(dir.path().join("artifact"));
    let running = Running::start(&mut command).until("compressing its objects");
    thread::sleep(Duration::from_millis(500));
    running.stop("TERM", dir.path());
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["bare", "tree"]);

    // The same of a commit that comes from the endpoint.
    File::options().write(true).open(tree.join("large")).unwrap().set_len(1 << 30).unwrap();
    let archive = dir.path().join("archive");
    artifacts::commit(&archive, &tree, "1");
    let server = Static::start();
    Artifact::of(&archive).serve(&server, LATEST);
    restored(dir.path());
    let running = Running::start(&mut run_with(dir.path(), &server.url(""), &[]));
    let taken = dir.path().join("cache/repo");
    wait_for(|| taken.join("config").exists(), "the repository");
    thread::sleep(Duration::from_millis(500));
    running.stop("TERM", dir.path());
    assert_eq!(ok(tool("ostree").args(["refs", "--repo"]).arg(&taken)).stdout, "");
    let objects = ok(tool("find").arg(&taken).args(["-name", "*.filez"])).stdout;
    assert_eq!(objects, "");
}

/// Runs `command` to its end; gives the most memory that it had itself, in bytes, its
/// children not counted.
fn peak(command: &mut Command) -> (Done, u64) {
    let mut output = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    let [stdout, stderr] = output.each_ref().map(|file| file.try_clone().unwrap());
    let mut child = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).spawn().unwrap();
    let mut most = 0;
    let status = loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        most = most.max(kib.unwrap_or(0) << 10);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        thread::sleep(Duration::from_millis(5));
    };
    let [stdout, stderr] = output.each_mut().map(|file| {
        let mut text = String::new();
        std::io::Seek::rewind(file).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    });
    (Done { code: status.code().unwrap_or(-1), stdout, stderr }, most)
}

const MIB: u64 = 1 << 20;

#[test]
fn a_large_file_takes_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    // Half of it is not compressible; so are the files that are deflated as a whole.
    let script = "head -c 100M /dev/urandom > /usr/share/large && truncate -s 600M /usr/share/large\n\
                  for i in 1 2 3 4 5 6; do head -c 31M /dev/urandom > /usr/share/large$i; done";
    let host = small(dir.path(), &postprocess(script));
    let (done, most) = peak(&mut compose(dir.path(), &host));
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(most > 10 * MIB && most < 200 * MIB, "{most}");
    let mut command = builder();
    command.args(["pack", "--ref", "test/host", "--repo"]).arg(dir.path().join("repo"));
    let (done, most) = peak(command.arg("--output").arg(dir.path().join("artifact")));
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(most < 100 * MIB, "{most}");
}

#[test]
fn a_hostile_artifact_is_no_commit_before() {
    let dir = tempfile::tempdir().unwrap();
    restored(dir.path());
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "content").unwrap();
    artifacts::commit(&dir.path().join("archive"), &tree, "1");
    let good = Artifact::of(&dir.path().join("archive"));
    let large = vec![b'x'; 96 << 20];
    let special = |kind: tar::EntryType, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_cksum();
        Entry { path: "special".to_owned(), header: header.as_bytes().to_vec(), content: content.to_vec() }
    };
    let with = |entry: Entry| {
        let mut artifact = good.clone();
        artifact.entries.insert(0, entry);
        artifact.tarball()
    };
    let mut twice = good.clone();
    let entry = twice.entry(".filez").clone();
    twice.entries.push(entry);
    let mut other = good.clone();
    let wrong = twice.entry(".dirtree").content.clone();
    other.entry(".filez").replace(wrong);
    let mut less = good.clone();
    less.entries.retain(|entry| !entry.path.ends_with(".dirmeta"));
    for (tarball, reason) in [
        (with(special(tar::EntryType::XHeader, &large)), "of type 'x' and 100663296 bytes"),
        (with(special(tar::EntryType::GNULongName, &large)), "of type 'L'"),
        (with(special(tar::EntryType::GNULongLink, &large)), "of type 'K'"),
        (with(special(tar::EntryType::XGlobalHeader, b"10 path=x\n")), "of type 'g'"),
        (with(special(tar::EntryType::Symlink, b"")), "of type '2'"),
        (twice.tarball(), "is twice in the tarball"),
        (vec![7; 4096], "is no archive"),
        (good.tarball()[..5000].to_vec(), "is no archive"),
        (less.tarball(), "dirmeta: No such metadata object"),
        (other.tarball(), "of the newest artifact cannot be taken: fsck content object"),
    ] {
        let server = Static::start();
        artifacts::Served::new(&server, LATEST, good.manifest.clone(), tarball);
        let (done, most) = peak(&mut run_with(dir.path(), &server.url(""), &[]));
        assert!(done.code == 3 && done.stderr.contains(reason), "{reason}: {}", done.stderr);
        assert!(!done.stderr.contains("ref binding"), "{}", done.stderr);
        assert!(most < 64 * MIB, "{reason}: {most}");
        assert!(!dir.path().join("cache/repo/refs/heads/demo").exists());
        assert_eq!(fs::read_dir(dir.path().join("cache/work")).unwrap().count(), 0);
        // What libostree has verified is not asked for again.
        fs::remove_dir_all(dir.path().join("cache")).unwrap();
    }
    // A manifest that is none.
    let server = Static::start();
    let path = format!("{LATEST}/manifest.json");
    server.set(&path, Answer::Bytes(Arc::new(b"{}".to_vec())));
    fails(&mut run_with(dir.path(), &server.url(""), &[]), 3, &path);
    server.set(&path, Answer::Bytes(Arc::new(vec![b' '; 32 << 20])));
    fails(&mut run_with(dir.path(), &server.url(""), &[]), 3, "is larger than a manifest may be");
}
