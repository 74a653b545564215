//! Packages that no deb stands behind: the base that Fedora's packages expect
//! (`filesystem`, `setup`, a release), one with users and scriptlets of its own,
//! and the faulty ones.

use std::process::Command;

use anyhow::{Context as _, Result};
use rpm::Dependency;

use super::package::{Evr, File, Package, Script, When};

/// The directories of the root that are links into /usr.
pub const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// Directories of `filesystem`, with their modes.
const DIRECTORIES: [(&str, u16); 43] = [
    ("/boot", 0o755),
    ("/dev", 0o755),
    ("/etc", 0o755),
    ("/etc/profile.d", 0o755),
    ("/etc/skel", 0o755),
    ("/home", 0o755),
    ("/media", 0o755),
    ("/mnt", 0o755),
    ("/opt", 0o755),
    ("/proc", 0o555),
    ("/root", 0o700),
    ("/run", 0o755),
    ("/srv", 0o755),
    ("/sys", 0o555),
    ("/tmp", 0o1777),
    ("/usr", 0o755),
    ("/usr/bin", 0o755),
    ("/usr/include", 0o755),
    ("/usr/lib", 0o755),
    ("/usr/lib/sysusers.d", 0o755),
    ("/usr/lib/tmpfiles.d", 0o755),
    ("/usr/lib64", 0o755),
    ("/usr/libexec", 0o755),
    ("/usr/local", 0o755),
    ("/usr/local/bin", 0o755),
    ("/usr/sbin", 0o755),
    ("/usr/share", 0o755),
    ("/usr/share/doc", 0o755),
    ("/usr/share/info", 0o755),
    ("/usr/share/locale", 0o755),
    ("/usr/share/man", 0o755),
    ("/usr/share/man/man1", 0o755),
    ("/usr/share/man/man5", 0o755),
    ("/usr/share/man/man8", 0o755),
    ("/usr/share/misc", 0o755),
    ("/usr/src", 0o755),
    ("/var", 0o755),
    ("/var/cache", 0o755),
    ("/var/lib", 0o755),
    ("/var/log", 0o755),
    ("/var/opt", 0o755),
    ("/var/spool", 0o755),
    ("/var/tmp", 0o1777),
];

/// The accounts whose ids Debian fixes (its policy, section 9.2), which own
/// files in its packages.
const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:x:2:2:bin:/bin:/usr/sbin/nologin
sys:x:3:3:sys:/dev:/usr/sbin/nologin
man:x:6:12:man:/var/cache/man:/usr/sbin/nologin
mail:x:8:8:mail:/var/mail:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
";

const GROUPS: [(&str, u32); 17] = [
    ("root", 0),
    ("daemon", 1),
    ("bin", 2),
    ("sys", 3),
    ("adm", 4),
    ("tty", 5),
    ("disk", 6),
    ("kmem", 15),
    ("mail", 8),
    ("man", 12),
    ("shadow", 42),
    ("utmp", 43),
    ("video", 44),
    ("sudo", 27),
    ("staff", 50),
    ("users", 100),
    ("nogroup", 65534),
];

/// Whether `filesystem` has this directory.
pub fn owns_directory(path: &str) -> bool {
    DIRECTORIES.iter().any(|(directory, _)| *directory == path) || path == "/var/mail"
}

/// The packages that every tree needs, with what `demo-agent` adds.
///
/// # Errors
///
/// When there is no C compiler for the one program among them.
pub fn base(arch: &str) -> Result<Vec<Package>> {
    Ok(vec![filesystem(arch), setup(), release(), agent("1"), altfiles(arch)?])
}

fn noarch(name: &str, summary: &str) -> Package {
    Package {
        name: name.to_owned(),
        evr: Evr { epoch: 0, version: "1.0".to_owned(), release: "1".to_owned() },
        arch: "noarch".to_owned(),
        summary: summary.to_owned(),
        ..Package::default()
    }
}

fn filesystem(arch: &str) -> Package {
    let mut files: Vec<_> = DIRECTORIES.iter().map(|(path, mode)| File::directory(path, *mode)).collect();
    files.extend(MERGED.iter().map(|name| File::symlink(&format!("/{name}"), &format!("usr/{name}"))));
    files.push(File::directory("/var/mail", 0o2775).owned_by("root", "mail"));
    files.push(File::symlink("/var/run", "../run"));
    files.push(File::symlink("/var/lock", "../run/lock"));
    Package {
        arch: arch.to_owned(),
        requires: vec![Dependency::script_pre("setup")],
        files,
        ..noarch("filesystem", "The directories of a tree with a merged /usr")
    }
}

fn setup() -> Package {
    let group: String = GROUPS.iter().map(|(name, gid)| format!("{name}:x:{gid}:\n")).collect();
    let gshadow: String = GROUPS.iter().map(|(name, _)| format!("{name}:*::\n")).collect();
    let shadow: String = PASSWD
        .lines()
        .filter_map(|line| line.split(':').next())
        .map(|name| format!("{name}:*:20000:0:99999:7:::\n"))
        .collect();
    let files = vec![
        File::config("/etc/passwd", 0o644, PASSWD),
        File::config("/etc/group", 0o644, &group),
        // Root's alone: rpm knows no group before this very package is there.
        File::config("/etc/shadow", 0o600, &shadow),
        File::config("/etc/gshadow", 0o600, &gshadow),
        File::config("/etc/host.conf", 0o644, "multi on\n"),
        File::config("/etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n"),
        File::config("/etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"),
        File::config("/etc/profile", 0o644, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin\nexport PATH\n"),
        File::config("/etc/shells", 0o644, "/bin/sh\n/bin/bash\n/usr/bin/sh\n/usr/bin/bash\n"),
    ];
    Package { files, ..noarch("setup", "The accounts and defaults that all else relies on") }
}

fn release() -> Package {
    let os_release = "NAME=\"oscontainer demo\"\nID=oscontainer-demo\nID_LIKE=fedora\nVERSION=1\nVERSION_ID=1\n\
                      PRETTY_NAME=\"oscontainer demo 1\"\n";
    Package {
        requires: vec![Dependency::any("filesystem")],
        // dnf finds the release of an installed tree by this capability.
        provides: vec![Dependency::eq("system-release", "1")],
        files: vec![
            File::regular("/usr/lib/os-release", 0o644, os_release),
            File::symlink("/etc/os-release", "../usr/lib/os-release"),
        ],
        ..noarch("demo-release", "What names this operating system")
    }
}

/// The NSS service that finds the accounts of a tree. A compiler gives the same bytes
/// from the same source, without the path of the source in them.
fn altfiles(arch: &str) -> Result<Package> {
    let dir = tempfile::tempdir().context("making a directory for the compiler")?;
    let name = "libnss_altfiles.so.2";
    std::fs::write(dir.path().join("altfiles.c"), include_str!("altfiles.c"))
        .context("writing the compiler's input")?;
    let mut command = Command::new("gcc");
    command.args(["-shared", "-fPIC", "-O2", "-s", "-Wall", "-Werror", "-Wl,-soname,libnss_altfiles.so.2"]);
    super::deb::bytes(command.current_dir(dir.path()).args(["-o", name, "altfiles.c"]))?;
    let content = std::fs::read(dir.path().join(name)).context("reading what the compiler made")?;
    let file = File::regular(&format!("/usr/lib/{name}"), 0o755, content);
    Ok(Package {
        arch: arch.to_owned(),
        requires: vec![Dependency::any("filesystem"), Dependency::any("libc6")],
        files: vec![file],
        ..noarch("nss-altfiles", "Finds users and groups in /usr/lib")
    })
}

/// A service with an account of its own. Each kind of scriptlet leaves something
/// that a test can see, and that is the same in every build.
pub fn agent(release: &str) -> Package {
    let create = "getent group demo >/dev/null || groupadd --system --gid 980 demo\n\
                  getent passwd demo >/dev/null || useradd --system --uid 980 --gid demo \
                  --home-dir /var/lib/demo --no-create-home --shell /usr/sbin/nologin demo\n";
    let lua = "local f = assert(io.open('/usr/lib/demo/lua', 'w'))\n\
               f:write('written by lua in %post\\n')\nf:close()\n";
    let trans = "ls /usr/lib/demo > /usr/lib/demo/files\n";
    let script = |when, interpreter, body: &str| Script { when, interpreter, body: body.to_owned() };
    let mut package = noarch("demo-agent", "A service with an account and scriptlets");
    package.evr.release = release.to_owned();
    package.requires = vec![
        Dependency::any("filesystem"),
        Dependency::script_pre("passwd"),
        Dependency::script_pre("libc-bin"),
        Dependency::script_post("coreutils"),
    ];
    package.files = vec![
        File::directory("/usr/lib/demo", 0o755),
        File::regular("/usr/lib/demo/agent", 0o755, format!("#!/bin/sh\necho demo agent, release {release}\n")),
        File::symlink("/usr/bin/demo-agent", "../lib/demo/agent"),
        File::directory("/etc/demo", 0o755),
        File::config("/etc/demo/agent.conf", 0o640, "interval=60\n").owned_by("root", "demo"),
        File::directory("/var/lib/demo", 0o750).owned_by("demo", "demo"),
        File::regular("/var/lib/demo/seed", 0o600, "0123456789\n").owned_by("demo", "demo"),
    ];
    package.scripts = vec![
        script(When::Pre, "/bin/sh", create),
        script(When::Post, "<lua>", lua),
        script(When::PostTrans, "/bin/sh", trans),
    ];
    package
}

/// What a compose must refuse, one fault each.
pub fn faulty() -> Vec<Package> {
    let requires = |name: &str| vec![Dependency::any(name)];
    let fails = Script {
        when: When::Post,
        interpreter: "/bin/sh",
        body: "echo broken-script: this cannot work >&2\nexit 3\n".to_owned(),
    };
    vec![
        Package {
            requires: requires("filesystem"),
            scripts: vec![fails],
            ..noarch("broken-script", "Its %post ends with 3")
        },
        Package {
            requires: requires("no-package-provides-this"),
            ..noarch("broken-requires", "Nothing provides what it requires")
        },
        Package {
            requires: requires("filesystem"),
            files: vec![File::regular("/usr/lib/broken-owner", 0o640, "").owned_by("root", "nosuchgroup")],
            ..noarch("broken-owner", "A file of a group that nothing creates")
        },
    ]
}
