//! Users and groups: root stays in /etc, all others go to /usr/lib, where
//! nss-altfiles finds them, so that a node's own /etc/passwd is not in the way of
//! an update (rpm-ostree does the same, rust/src/passwd.rs).

use std::collections::BTreeMap;

use anyhow::Result;

use super::tree::Tree;

/// Names by number, to write snippets for systemd-tmpfiles.
pub struct Accounts {
    users: BTreeMap<u32, String>,
    groups: BTreeMap<u32, String>,
}

impl Accounts {
    /// Reads the tree's /etc/passwd and /etc/group.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn read(tree: &Tree) -> Result<Self> {
        let names = |text: Option<String>| {
            let text = text.unwrap_or_default();
            text.lines()
                .filter_map(|line| {
                    let mut fields = line.split(':');
                    let name = fields.next()?;
                    Some((fields.nth(1)?.parse().ok()?, name.to_owned()))
                })
                .collect()
        };
        Ok(Self { users: names(tree.read("etc/passwd")?), groups: names(tree.read("etc/group")?) })
    }

    /// The user's name, or its number where it has none.
    pub fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// The group's name, or its number where it has none.
    pub fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

/// Splits /etc/passwd and /etc/group. Groups in `keep` (the treefile's
/// etc-group-members) are in both, so that a node can add members.
///
/// # Errors
/// When the files cannot be read or written.
pub fn split(tree: &Tree, keep: &[String]) -> Result<()> {
    for (file, keep) in [("passwd", &[][..]), ("group", keep)] {
        let Some(text) = tree.read(&format!("etc/{file}"))? else { continue };
        let is_root = |line: &&str| line.starts_with("root:");
        let is_kept = |line: &&str| line.split(':').next().is_some_and(|name| keep.iter().any(|kept| kept == name));
        let etc: Vec<&str> = text.lines().filter(|line| is_root(line) || is_kept(line)).collect();
        let usr: Vec<&str> = text.lines().filter(|line| !is_root(line)).collect();
        tree.write(&format!("etc/{file}"), lines(&etc).as_bytes(), 0o644)?;
        tree.write(&format!("usr/lib/{file}"), lines(&usr).as_bytes(), 0o644)?;
        for backup in [format!("etc/{file}-"), format!("etc/{}-", shadow(file)), format!("etc/.{file}.lock")] {
            tree.remove(&backup)?;
        }
    }
    tree.remove("etc/.pwd.lock")?;
    let Some(nsswitch) = tree.read("etc/nsswitch.conf")? else { return Ok(()) };
    tree.write("etc/nsswitch.conf", altfiles(&nsswitch).as_bytes(), 0o644)
}

fn shadow(file: &str) -> &str {
    if file == "group" { "gshadow" } else { "shadow" }
}

fn lines(lines: &[&str]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Adds `altfiles` after `files` for passwd and group.
fn altfiles(nsswitch: &str) -> String {
    let mut out = String::new();
    for line in nsswitch.lines() {
        let ours = line.starts_with("passwd:") || line.starts_with("group:");
        if ours && !line.contains("altfiles") {
            out.push_str(&line.replacen("files", "files altfiles", 1));
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::altfiles;

    #[test]
    fn altfiles_comes_after_files_once() {
        let before = "passwd:   files systemd\ngroup: files\nshadow: files\n";
        let after = "passwd:   files altfiles systemd\ngroup: files altfiles\nshadow: files\n";
        assert_eq!(altfiles(before), after);
        assert_eq!(altfiles(after), after);
    }
}
