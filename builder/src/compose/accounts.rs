//! Users and groups: root stays in /etc, all others go to /usr/lib, where
//! nss-altfiles finds them, so that a node's own /etc/passwd is not in the way of
//! an update. Numbers stay the same from commit to commit: the accounts of the one
//! before are there before any package is (rpm-ostree does the same, rust/src/passwd.rs).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use oscontainer_program::reject;

use super::commit::Previous;
use super::tree::Tree;
use crate::treefile::Flattened;
use crate::treefile::types::{CheckGroups, CheckPasswd, UserIds};

/// The files of accounts, and their shadows.
const FILES: [&str; 4] = ["passwd", "group", "shadow", "gshadow"];

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
        // User or group 0, whatever its name.
        let is_root = |line: &&str| line.split(':').nth(2) == Some("0");
        let is_kept = |line: &&str| line.split(':').next().is_some_and(|name| keep.iter().any(|kept| kept == name));
        let etc: Vec<&str> = text.lines().filter(|line| is_root(line) || is_kept(line)).collect();
        let usr: Vec<&str> = text.lines().filter(|line| !is_root(line)).collect();
        tree.write(&format!("etc/{file}"), lines(&etc).as_bytes(), 0o644)?;
        tree.write(&format!("usr/lib/{file}"), lines(&usr).as_bytes(), 0o644)?;
        let backups = [file, shadow(file), if file == "group" { "subgid" } else { "subuid" }];
        for backup in backups.map(|file| format!("etc/{file}-")).iter().chain([&format!("etc/.{file}.lock")]) {
            tree.remove(backup)?;
        }
    }
    tree.remove("etc/.pwd.lock")?;
    undate(tree)?;
    if !has_altfiles(tree)? {
        tracing::warn!(
            "the tree has no libnss_altfiles.so.2: nodes will know no user and no group but root's; \
             add the package nss-altfiles"
        );
    }
    // A link is another program's, such as authselect's.
    if tree.entry("etc/nsswitch.conf")?.is_some_and(|place| place.is_symlink()) {
        return Ok(());
    }
    let Some(nsswitch) = tree.read("etc/nsswitch.conf")? else { return Ok(()) };
    tree.write("etc/nsswitch.conf", altfiles(&nsswitch).as_bytes(), 0o644)
}

/// Takes the day of the last change of the password from accounts that are locked or have none (rpm-ostree,
/// rust/src/normalization.rs, `normalize_etc_shadow`): it is that of SOURCE_DATE_EPOCH, and day 0, which that may be,
/// means that the password must be changed now (shadow(5)).
fn undate(tree: &Tree) -> Result<()> {
    let Some(text) = tree.read("etc/shadow")? else { return Ok(()) };
    let undated = |line: &str| {
        let mut fields: Vec<&str> = line.split(':').collect();
        if let [_, password, day, ..] = fields.as_mut_slice()
            && password.starts_with(['!', '*'])
        {
            *day = "";
        }
        fields.join(":") + "\n"
    };
    tree.rewrite("etc/shadow", text.lines().map(undated).collect::<String>().as_bytes())
}

/// All lines of an arranged tree's passwd or group file, root's first.
///
/// # Errors
/// When they cannot be read.
pub fn whole(tree: &Tree, file: &str) -> Result<String> {
    let [etc, lib] = ["usr/etc", "usr/lib"].map(|dir| tree.read(&format!("{dir}/{file}")));
    Ok(unique(&(etc?.unwrap_or_default() + &lib?.unwrap_or_default())))
}

/// Writes the accounts that `preserve-passwd` keeps into the empty tree: those of the
/// files that check-passwd and check-groups name, else of the previous commit.
///
/// # Errors
/// Rejected when only one of the two names a file; when files cannot be read or written.
pub fn preserve(tree: &Tree, flattened: &Flattened, previous: Option<&Previous>) -> Result<()> {
    if flattened.treefile.preserve_passwd == Some(false) {
        return Ok(());
    }
    match (&flattened.external.passwd, &flattened.external.group) {
        (Some(passwd), Some(group)) => {
            let (passwd, group) = (unique(&read(passwd)?), unique(&read(group)?));
            let shadow: String = names(&passwd).map(|name| format!("{name}:*::0:99999:7:::\n")).collect();
            let gshadow: String = names(&group).map(|name| format!("{name}:::\n")).collect();
            for (file, text, mode) in
                [("passwd", passwd, 0o644), ("group", group, 0o644), ("shadow", shadow, 0), ("gshadow", gshadow, 0)]
            {
                tree.write(&format!("etc/{file}"), text.as_bytes(), mode)?;
            }
        }
        (None, None) => {
            let Some(previous) = previous else { return Ok(()) };
            for file in ["passwd", "group"] {
                let etc = previous.file(&format!("usr/etc/{file}"))?;
                let lib = previous.file(&format!("usr/lib/{file}"))?;
                if let (Some(etc), Some(lib)) = (etc, lib) {
                    tree.write(&format!("etc/{file}"), unique(&(etc + &lib)).as_bytes(), 0o644)?;
                }
            }
            // Scriptlets add what belongs to an account only when they make the account.
            for file in ["shadow", "gshadow"] {
                let path = format!("usr/etc/{file}");
                if let (Some(text), Some(mode)) = (previous.file(&path)?, previous.mode(&path)?) {
                    tree.write(&format!("etc/{file}"), text.as_bytes(), mode)?;
                }
            }
        }
        _ => reject!(
            "check-passwd and check-groups must both be of type file or neither: preserve-passwd would keep \
             the numbers of one from the file, and of the other from the previous commit"
        ),
    }
    Ok(())
}

/// Removes what rpm put beside the files that [`preserve`] wrote.
///
/// # Errors
/// When it cannot be removed.
pub fn drop_packaged(tree: &Tree) -> Result<()> {
    FILES.iter().try_for_each(|file| tree.remove(&format!("etc/{file}.rpmnew")))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// The lines of a passwd or group file without those whose name was there before.
fn unique(text: &str) -> String {
    let mut seen = BTreeSet::new();
    let lines = text.lines().filter(|line| !line.is_empty());
    lines.filter(|line| seen.insert(line.split(':').next())).map(|line| format!("{line}\n")).collect()
}

fn names(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.split(':').next())
}

/// Names and numbers; of a user the user's and the group's, of a group its own.
type Numbers = BTreeMap<String, Vec<u32>>;

/// The numbers in a passwd or group file, `count` of each line.
fn numbers(text: &str, count: usize) -> Numbers {
    let line = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        let ids = fields.skip(1).take(count).map(|id| id.parse().ok()).collect::<Option<Vec<u32>>>()?;
        (ids.len() == count).then_some((name, ids))
    };
    text.lines().filter_map(line).collect()
}

/// Holds the arranged tree's accounts against what check-passwd and check-groups name.
///
/// # Errors
/// Rejected when a number changed, or when a user or group that files belong to is gone.
pub fn check(tree: &Tree, flattened: &Flattened, previous: Option<&Previous>) -> Result<()> {
    let treefile = &flattened.treefile;
    let before = |file: &str| previous.map_or(Ok(None), |commit| commit.file(&format!("usr/lib/{file}")));
    let users = match (&treefile.check_passwd, &flattened.external.passwd) {
        (Some(CheckPasswd::None), _) => Numbers::new(),
        (Some(CheckPasswd::Data { entries }), _) => {
            entries.iter().map(|(name, ids)| (name.clone(), user_ids(*ids).to_vec())).collect()
        }
        (Some(CheckPasswd::File { .. }), Some(file)) => numbers(&read(file)?, 2),
        _ => numbers(&before("passwd")?.unwrap_or_default(), 2),
    };
    let groups = match (&treefile.check_groups, &flattened.external.group) {
        (Some(CheckGroups::None), _) => Numbers::new(),
        (Some(CheckGroups::Data { entries }), _) => {
            entries.iter().map(|(name, id)| (name.clone(), vec![*id])).collect()
        }
        (Some(CheckGroups::File { .. }), Some(file)) => numbers(&read(file)?, 1),
        _ => numbers(&before("group")?.unwrap_or_default(), 1),
    };
    if users.is_empty() && groups.is_empty() {
        return Ok(());
    }
    let mut owners = Owners::default();
    owners.add(tree.root())?;
    let now = |file: &str, count| -> Result<Numbers> {
        let mut all = numbers(&tree.read(&format!("usr/etc/{file}"))?.unwrap_or_default(), count);
        all.extend(numbers(&tree.read(&format!("usr/lib/{file}"))?.unwrap_or_default(), count));
        Ok(all)
    };
    let mut wrong =
        compare("check-passwd: user", &users, &now("passwd", 2)?, &owners.users, &treefile.ignore_removed_users);
    wrong.extend(compare(
        "check-groups: group",
        &groups,
        &now("group", 1)?,
        &owners.groups,
        &treefile.ignore_removed_groups,
    ));
    if !wrong.is_empty() {
        reject!("{}", wrong.join("; "));
    }
    Ok(())
}

fn user_ids(ids: UserIds) -> [u32; 2] {
    match ids {
        UserIds::Same(id) | UserIds::SameInList([id]) => [id, id],
        UserIds::UserAndGroup(ids) => ids,
    }
}

/// What is wrong with the accounts `now`, which should have the numbers of `expected`.
fn compare(
    what: &str,
    expected: &Numbers,
    now: &Numbers,
    owners: &BTreeSet<u32>,
    ignored: &Option<BTreeSet<String>>,
) -> Vec<String> {
    let ignored = |name: &str| ignored.as_ref().is_some_and(|names| names.contains(name) || names.contains("*"));
    let show = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(":");
    let mut wrong = Vec::new();
    for (name, ids) in expected {
        match now.get(name) {
            Some(same) if same == ids => {}
            Some(other) => wrong.push(format!("{what} {name} was {}, and is {} now", show(ids), show(other))),
            None if ignored(name) => tracing::info!("{what} {name} is gone, which the treefile ignores"),
            None if owners.contains(&ids[0]) => {
                wrong.push(format!("{what} {name} ({}) is gone, but files belong to it", show(ids)));
            }
            None => tracing::info!("{what} {name} is gone, and no file belongs to it"),
        }
    }
    wrong
}

/// Whose files there are in a tree.
#[derive(Default)]
struct Owners {
    users: BTreeSet<u32>,
    groups: BTreeSet<u32>,
}

impl Owners {
    fn add(&mut self, dir: &Path) -> Result<()> {
        for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
            let entry = entry?;
            let meta = entry.metadata()?;
            self.users.insert(meta.uid());
            self.groups.insert(meta.gid());
            if meta.is_dir() {
                self.add(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Whether the tree's C library can find the accounts in /usr/lib.
fn has_altfiles(tree: &Tree) -> Result<bool> {
    let debian = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    for dir in ["usr/lib64", "usr/lib", &debian] {
        if tree.find(&format!("{dir}/libnss_altfiles.so.2"))?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn shadow(file: &str) -> &str {
    if file == "group" { "gshadow" } else { "shadow" }
}

fn lines(lines: &[&str]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Adds `altfiles` for passwd and group: after `files`, or where that is not there at the end.
fn altfiles(nsswitch: &str) -> String {
    let mut out = String::new();
    for line in nsswitch.lines() {
        let services = line.strip_prefix("passwd:").or_else(|| line.strip_prefix("group:"));
        let mut services = services.unwrap_or_default().split_whitespace();
        if services.clone().next().is_none() || services.any(|service| service == "altfiles") {
            out.push_str(line);
        } else if line.split_whitespace().any(|service| service == "files") {
            out.push_str(&line.replacen("files", "files altfiles", 1));
        } else {
            out.push_str(&format!("{} altfiles", line.trim_end()));
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Numbers, altfiles, compare, numbers, unique};

    #[test]
    fn changed_and_missing_accounts_are_found() {
        let before = numbers("a:x:1:1::/:\nb:x:2:2::/:\nc:x:3:3::/:\nd:x:4:4::/:\ne:x:5:5::/:\nbad:x:y:1\n", 2);
        assert_eq!(before.len(), 5);
        let now: Numbers = numbers("a:x:1:1::/:\nb:x:2:9::/:\nnew:x:9:9::/:\n", 2);
        let ignored = Some(BTreeSet::from(["d".to_owned()]));
        let wrong = compare("user", &before, &now, &BTreeSet::from([3, 4]), &ignored);
        assert_eq!(wrong, ["user b was 2:2, and is 2:9 now", "user c (3:3) is gone, but files belong to it"]);
        let all = Some(BTreeSet::from(["*".to_owned()]));
        assert_eq!(compare("user", &before, &now, &BTreeSet::from([3, 4]), &all).len(), 1);
    }

    #[test]
    fn the_first_of_a_name_counts() {
        assert_eq!(unique("root:x:0:\na:x:1:\n\nroot:x:7:\n"), "root:x:0:\na:x:1:\n");
    }

    #[test]
    fn altfiles_comes_after_files_once() {
        let before = "passwd:   files systemd\ngroup: files\nshadow: files\n";
        let after = "passwd:   files altfiles systemd\ngroup: files altfiles\nshadow: files\n";
        assert_eq!(altfiles(before), after);
        assert_eq!(altfiles(after), after);
        assert_eq!(
            altfiles("passwd: sss systemd\ngroup: compat \n"),
            "passwd: sss systemd altfiles\ngroup: compat altfiles\n"
        );
    }
}
