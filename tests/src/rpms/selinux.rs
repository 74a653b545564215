//! Debian's SELinux policy as an RPM: the modules of its deb, compiled as the deb's own
//! maintainer script does on a running system, so that the tree has what libselinux reads.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::deb;
use super::package::{File, Kind, Package};

/// The deb, and the name of its policy.
const DEB: &str = "selinux-policy-default";
const POLICY: &str = "default";
/// What `selinux-basics` would configure.
const CONFIG: &str = "SELINUX=permissive\nSELINUXTYPE=default\n";

/// Makes the package.
///
/// # Errors
///
/// When the deb cannot be had, or semodule cannot compile its modules.
pub fn policy(cache: &Path) -> Result<Package> {
    let debs: Vec<_> = deb::closure(&[DEB], cache)?.into_iter().filter(|deb| deb.name() == DEB).collect();
    deb::download(&debs, cache)?;
    let mut package = debs.first().context("apt knows no SELinux policy")?.convert(cache)?;
    // It names the tools that work on a running system.
    package.requires.clear();

    let root = tempfile::tempdir().context("creating a directory for the policy")?;
    let modules = format!("/usr/share/selinux/{POLICY}/");
    let mut names = Vec::new();
    for file in &package.files {
        let place = root.path().join(file.path.trim_start_matches('/'));
        match &file.kind {
            Kind::Directory => fs::create_dir_all(&place)?,
            Kind::Symlink(_) => continue,
            Kind::Regular(regular) => {
                fs::create_dir_all(place.parent().context("a file lies in a directory")?)?;
                fs::write(&place, &regular.content)?;
                if file.path.starts_with(&modules) && file.path.ends_with(".pp.bz2") {
                    names.push(place);
                }
            }
        }
    }
    fs::write(root.path().join("etc/selinux/config"), CONFIG)?;
    fs::create_dir_all(root.path().join("var/lib/selinux").join(POLICY))?;
    let mut command = Command::new("semodule");
    command.arg("--path").arg(root.path()).args(["--noreload", "--store", POLICY]);
    for name in names {
        command.arg("--install").arg(name);
    }
    deb::bytes(&mut command).context("compiling the SELinux policy")?;

    package.files.retain(|file| !file.path.starts_with(&modules) && !file.path.starts_with("/var/lib/selinux"));
    package.files.push(File::config("/etc/selinux/config", 0o644, CONFIG));
    // Of the store of modules, which Fedora's package has too, one is enough.
    let store = Path::new("var/lib/selinux").join(POLICY);
    for inside in ["active/modules/400/ssh/cil", "semanage.read.LOCK"].map(|name| store.join(name)) {
        let content = fs::read(root.path().join(&inside)).unwrap_or_default();
        package.files.push(File::regular(&format!("/{}", inside.display()), 0o600, content));
    }
    let compiled = root.path().join("etc/selinux").join(POLICY);
    for name in ["policy", "contexts/files"] {
        for entry in fs::read_dir(compiled.join(name))? {
            let path = entry?.path();
            let inside = format!("/{}", path.strip_prefix(root.path())?.display());
            if path.is_file() && package.files.iter().all(|file| file.path != inside) {
                package.files.push(File::regular(&inside, 0o644, fs::read(&path)?));
            }
        }
    }
    Ok(package)
}
