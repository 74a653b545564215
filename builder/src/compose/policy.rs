//! The SELinux policy of a tree, brought to where an OSTree-based system has it.

use anyhow::Result;
use oscontainer_program::reject;

use super::layout::merge;
use super::process;
use super::sandbox::Sandbox;
use super::tree::Tree;

/// Moves the store of the SELinux policy's modules from /var to /etc/selinux, where it is updated with
/// the policy, and where a node's own modules are merged with it (rpm-ostree,
/// src/libpriv/rpmostree-postprocess.cxx, `postprocess_selinux_policy_store_location`).
///
/// # Errors
/// Rejected when the tree's configuration names none, or its `semodule` fails.
pub fn place(tree: &Tree) -> Result<()> {
    let config = tree.read("etc/selinux/config")?.unwrap_or_default();
    let Some(name) = config.lines().find_map(|line| line.trim().strip_prefix("SELINUXTYPE=")) else { return Ok(()) };
    let name = name.trim();
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        reject!("/etc/selinux/config of the tree names the policy {name:?}, which is no name");
    }
    let substitutions = format!("etc/selinux/{name}/contexts/files/file_contexts.subs_dist");
    if let Some(text) = tree.read(&substitutions)? {
        tree.write(&substitutions, substituted(&text).as_bytes(), 0o644)?;
    }
    let store = format!("var/lib/selinux/{name}");
    if tree.find(&format!("{store}/active/modules"))?.is_none() {
        return Ok(());
    }
    if tree.entry("usr/sbin/semodule")?.is_some() || tree.entry("usr/bin/semodule")?.is_some() {
        for arguments in [["-n", "-B"], ["-n", "--refresh"]] {
            let mut semodule = Sandbox { writable: &[], network: false }.inside(tree.root());
            let ended = process::run("semodule", semodule.arg("semodule").args(arguments))?;
            ended.had_what_it_needs("semodule")?;
            if !ended.status.success() {
                reject!("semodule ended with {}; its last lines:{}", ended.status, ended.tail());
            }
        }
    }
    const ROOT: &str = "\nstore-root=/etc/selinux\n";
    if let Some(text) = tree.read("etc/selinux/semanage.conf")?.filter(|text| !text.contains(ROOT)) {
        tree.write("etc/selinux/semanage.conf", (text + ROOT).as_bytes(), 0o644)?;
    }
    for name in ["semanage.read.LOCK", "semanage.trans.LOCK"] {
        tree.remove(&format!("{store}/{name}"))?;
    }
    tracing::info!("the store of the SELinux policy's modules moves to /etc/selinux/{name}");
    merge(tree, &store, &format!("etc/selinux/{name}"))
}

/// Which paths have the labels of others, besides what the policy says: home directories are in /var/home, though the
/// policy may think the other way round; /etc is made of /usr/etc, and /opt of /usr/lib/opt (rpm-ostree,
/// rust/src/composepost.rs, `postprocess_subs_dist`).
fn substituted(text: &str) -> String {
    let has = |path: &str| text.lines().any(|line| line.starts_with(path));
    let mut new: String = text
        .lines()
        .map(|line| format!("{}{line}\n", if line.starts_with("/var/home ") { "# " } else { "" }))
        .collect();
    new += "/home /var/home\n";
    if !has("/usr/etc ") {
        new += "/usr/etc /etc\n";
    }
    // A path is substituted once.
    for line in text.lines().filter(|line| line.starts_with("/etc/")) {
        new += &format!("/usr{line}\n");
    }
    if !has("/usr/lib/opt ") {
        new += "/usr/lib/opt /opt\n";
    }
    new
}
