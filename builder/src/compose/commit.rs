//! The one place that speaks to libostree for composing: the repository, and the
//! commit of a tree into it.

use std::path::Path;

use anyhow::{Context, Result};
use oscontainer_artifact::manifest::INPUTHASH;
use oscontainer_program::reject;
use ostree::glib::prelude::ToVariant;
use ostree::glib::{Variant, VariantDict};
use ostree::prelude::*;
use ostree::{MutableTree, Repo, RepoCommitModifier, RepoCommitModifierFlags, RepoFile, RepoMode, SePolicy, gio};

use super::packages::Package;

/// libostree's `AT_FDCWD`: paths are relative to the working directory.
const CWD: i32 = -100;

/// What is said of a tree in its commit's metadata.
pub struct Facts<'a> {
    /// The version, where it has one.
    pub version: Option<&'a str>,
    /// A title for people.
    pub title: String,
    /// All packages, sorted.
    pub packages: &'a [Package],
    /// The hash of what went in.
    pub input_hash: String,
    /// The kernel's version, where the tree has one.
    pub kernel: Option<String>,
    /// Seconds since 1970.
    pub timestamp: u64,
    /// More, from the treefile's `add-commit-metadata`.
    pub extra: Vec<(String, serde_json::Value)>,
}

/// Opens the repository; where there is none, one in archive mode is made.
///
/// # Errors
/// When it cannot be opened or made.
pub fn open(path: &Path) -> Result<Repo> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    if !path.join("config").exists() {
        std::fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))?;
        Repo::create_at(CWD, text, RepoMode::Archive, None, gio::Cancellable::NONE)
            .with_context(|| format!("making the repository {text}"))?;
    }
    Repo::open_at(CWD, text, gio::Cancellable::NONE).with_context(|| format!("opening the repository {text}"))
}

/// The commit that `rev` names: a ref or a checksum; `None` for a ref that is not there.
///
/// # Errors
/// When `rev` is no valid name.
pub fn resolve(repo: &Repo, rev: &str) -> Result<Option<String>> {
    let found = repo.resolve_rev(rev, true).with_context(|| format!("resolving {rev:?}"))?;
    Ok(found.map(Into::into))
}

/// Sets `ref_name` to a commit that is there.
///
/// # Errors
/// When the ref cannot be written.
pub fn set_ref(repo: &Repo, ref_name: &str, commit: &str) -> Result<()> {
    repo.set_ref_immediate(None, ref_name, Some(commit), gio::Cancellable::NONE)
        .with_context(|| format!("setting the ref {ref_name}"))
}

/// The string `key` of a commit's metadata.
///
/// # Errors
/// When the commit cannot be read.
pub fn metadata_string(repo: &Repo, commit: &str, key: &str) -> Result<Option<String>> {
    let (variant, _) = repo.load_commit(commit).with_context(|| format!("reading commit {commit}"))?;
    let metadata = VariantDict::new(Some(&variant.child_value(0)));
    Ok(metadata.lookup_value(key, None).and_then(|value| value.get::<String>()))
}

/// What `pack` wants to know of a commit.
pub struct Description {
    /// `version` of its metadata.
    pub version: Option<String>,
    /// `rpmostree.inputhash` of its metadata.
    pub input_hash: Option<String>,
    /// `ostree.architecture` of its metadata, else that of its packages.
    pub architecture: Option<String>,
}

/// Reads a commit's metadata.
///
/// # Errors
/// When the commit cannot be read.
pub fn describe(repo: &Repo, commit: &str) -> Result<Description> {
    let (variant, _) = repo.load_commit(commit).with_context(|| format!("reading commit {commit}"))?;
    let metadata = VariantDict::new(Some(&variant.child_value(0)));
    let text = |key: &str| metadata.lookup_value(key, None).and_then(|value| value.get::<String>());
    let packages = metadata.lookup_value("rpmostree.rpmdb.pkglist", None);
    let packages =
        packages.and_then(|list| list.get::<Vec<(String, String, String, String, String)>>()).unwrap_or_default();
    let packaged = packages.into_iter().map(|package| package.4).find(|arch| arch != "noarch");
    Ok(Description {
        version: text("version"),
        input_hash: text(INPUTHASH),
        architecture: text("ostree.architecture").or(packaged),
    })
}

/// The paths, below an archive-mode repository, of all objects that the commit
/// reaches; not of its parents.
///
/// # Errors
/// When an object is missing or cannot be read.
pub fn reachable(repo: &Repo, commit: &str) -> Result<Vec<String>> {
    let objects = repo
        .traverse_commit(commit, 0, gio::Cancellable::NONE)
        .with_context(|| format!("finding what commit {commit} reaches"))?;
    let path = |object: &ostree::ObjectName| {
        let checksum = object.checksum();
        let extension = match object.object_type() {
            ostree::ObjectType::Commit => "commit",
            ostree::ObjectType::DirTree => "dirtree",
            ostree::ObjectType::DirMeta => "dirmeta",
            // A traversal gives no other kind.
            _ => "filez",
        };
        format!("objects/{}/{}.{extension}", &checksum[..2], &checksum[2..])
    };
    Ok(objects.iter().map(path).collect())
}

/// Commits the tree at `root` and sets `ref_name`, in one transaction.
///
/// # Errors
/// When libostree fails.
pub fn commit(repo: &Repo, root: &Path, ref_name: &str, parent: Option<&str>, facts: &Facts) -> Result<String> {
    let root_text = root.to_str().context("the tree's path is not UTF-8")?;
    let modifier = RepoCommitModifier::new(RepoCommitModifierFlags::NONE, None);
    if root.join("usr/etc/selinux/config").exists() {
        let policy =
            SePolicy::new(&gio::File::for_path(root), gio::Cancellable::NONE).context("loading the SELinux policy")?;
        modifier.set_sepolicy(Some(&policy));
    }
    let transaction = repo.auto_transaction(gio::Cancellable::NONE).context("starting a transaction")?;
    let mtree = MutableTree::new();
    repo.write_dfd_to_mtree(CWD, root_text, &mtree, Some(&modifier), gio::Cancellable::NONE)
        .context("writing the tree's objects")?;
    let file = repo.write_mtree(&mtree, gio::Cancellable::NONE).context("writing the tree")?;
    let file = file.downcast::<RepoFile>().ok().context("libostree gave no tree")?;
    let metadata = metadata(facts)?;
    let commit = repo
        .write_commit_with_time(parent, None, None, Some(&metadata), &file, facts.timestamp, gio::Cancellable::NONE)
        .context("writing the commit")?;
    repo.transaction_set_ref(None, ref_name, Some(&commit));
    transaction.commit(gio::Cancellable::NONE).context("ending the transaction")?;
    Ok(commit.into())
}

/// The keys that rpm-ostree writes (src/libpriv/rpmostree-postprocess.cxx and
/// src/app/rpmostree-compose-builtin-tree.cxx), sorted, so that equal facts are equal bytes.
fn metadata(facts: &Facts) -> Result<Variant> {
    let mut entries: Vec<(String, Variant)> = Vec::new();
    for (key, value) in &facts.extra {
        entries.push((key.clone(), variant(key, value)?));
    }
    if let Some(version) = facts.version {
        entries.push(("version".into(), version.to_variant()));
    }
    entries.push(("ostree.source-title".into(), facts.title.to_variant()));
    if let Some(kernel) = &facts.kernel {
        entries.push(("ostree.bootable".into(), true.to_variant()));
        entries.push(("ostree.linux".into(), kernel.to_variant()));
    }
    entries.push((INPUTHASH.into(), facts.input_hash.to_variant()));
    let list: Vec<(&str, &str, &str, &str, &str)> = facts
        .packages
        .iter()
        .map(|p| (p.name.as_str(), p.epoch.as_str(), p.version.as_str(), p.release.as_str(), p.arch.as_str()))
        .collect();
    entries.push(("rpmostree.rpmdb.pkglist".into(), list.to_variant()));
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    let entries = entries
        .into_iter()
        .map(|(key, value)| Variant::from_dict_entry(&key.to_variant(), &Variant::from_variant(&value)));
    Ok(Variant::array_from_iter_with_type(ostree::glib::VariantTy::new("{sv}")?, entries))
}

/// A JSON scalar as the variant that rpm-ostree makes of it.
fn variant(key: &str, value: &serde_json::Value) -> Result<Variant> {
    Ok(match value {
        serde_json::Value::String(text) => text.to_variant(),
        serde_json::Value::Bool(flag) => flag.to_variant(),
        serde_json::Value::Number(number) if number.is_i64() => number.as_i64().unwrap_or_default().to_variant(),
        other => reject!("add-commit-metadata: {key}: {other} is neither a string, a boolean nor a whole number"),
    })
}
