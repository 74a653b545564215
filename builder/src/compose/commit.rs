//! The one place that speaks to libostree for composing: the repository, and the
//! commit of a tree into it.

use std::io::Read;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result};
use oscontainer_artifact::manifest::INPUTHASH;
use oscontainer_artifact::{Rejected, object};
use oscontainer_program::{reject, stop};
use ostree::gio::prelude::InputStreamExtManual;
use ostree::glib::prelude::ToVariant;
use ostree::glib::{self, Variant, VariantDict};
use ostree::prelude::*;
use ostree::{
    MutableTree, Repo, RepoCommitModifier, RepoCommitModifierFlags, RepoFile, RepoListRefsExtFlags, RepoMode,
    RepoPruneFlags, RepoPullFlags, SePolicy, TransactionGuard, gio,
};

use super::objects::{Writer, Written};
use super::packages::Package;

/// libostree's `AT_FDCWD`: paths are relative to the working directory.
const CWD: i32 = -100;

/// The key of a commit's metadata for the sha256, in hex, over the files that the treefile
/// names: what tells whether they changed.
pub const FILES: &str = "oscontainer.files";

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

/// Where a commit goes.
pub struct Target<'a> {
    /// The ref that will name it.
    pub ref_name: &'a str,
    /// Its parent.
    pub parent: Option<&'a str>,
    /// Whether the commit that the ref names now stays, as [`keep`] does it.
    pub keep: bool,
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

/// Begins a transaction. While it lasts nobody prunes the repository: what is there, or is
/// written now, is still there when the transaction sets a ref to it.
///
/// # Errors
/// When the repository cannot be written to.
pub fn begin(repo: &Repo) -> Result<TransactionGuard<'_>> {
    long(|cancellable| repo.auto_transaction(cancellable)).context("starting a transaction")
}

/// Ends `transaction` of `repo`, and sets `ref_name` to a commit that is there.
///
/// # Errors
/// When the ref cannot be written.
pub fn set_ref(repo: &Repo, transaction: TransactionGuard, ref_name: &str, commit: &str) -> Result<()> {
    repo.transaction_set_ref(None, ref_name, Some(commit));
    let ended = transaction.commit(gio::Cancellable::NONE);
    ended.map(drop).with_context(|| format!("setting the ref {ref_name}"))
}

/// Runs what may take long in libostree: after a signal it gives up.
///
/// # Errors
/// Those of `work`, and that of [`stop::check`].
pub fn long<T>(work: impl FnOnce(Option<&gio::Cancellable>) -> Result<T, glib::Error>) -> Result<T> {
    static CANCELLABLE: LazyLock<gio::Cancellable> = LazyLock::new(|| {
        let cancellable = gio::Cancellable::new();
        let ours = cancellable.clone();
        stop::listen(move || ours.cancel());
        cancellable
    });
    let done = work(Some(&CANCELLABLE));
    stop::check()?;
    Ok(done?)
}

/// The string `key` of a commit's metadata.
///
/// # Errors
/// When the commit cannot be read.
pub fn metadata_string(repo: &Repo, commit: &str, key: &str) -> Result<Option<String>> {
    Ok(text(&metadata_of(&load(repo, commit)?), key))
}

fn load(repo: &Repo, commit: &str) -> Result<Variant> {
    let (variant, _) = repo.load_commit(commit).with_context(|| format!("reading commit {commit}"))?;
    Ok(variant)
}

fn metadata_of(commit: &Variant) -> VariantDict {
    VariantDict::new(Some(&commit.child_value(0)))
}

fn text(metadata: &VariantDict, key: &str) -> Option<String> {
    metadata.lookup_value(key, None).and_then(|value| value.get())
}

fn package_list(metadata: &VariantDict) -> Vec<object::Package> {
    type Entry = (String, String, String, String, String);
    let list = metadata.lookup_value("rpmostree.rpmdb.pkglist", None);
    let list: Vec<Entry> = list.and_then(|list| list.get()).unwrap_or_default();
    let package =
        |(name, epoch, version, release, architecture)| object::Package { name, epoch, version, release, architecture };
    list.into_iter().map(package).collect()
}

/// The commit that a ref named before a compose.
pub struct Previous {
    root: gio::File,
    /// Its checksum, 64 hex digits.
    pub commit: String,
    repo: Repo,
}

impl Previous {
    /// The commit that `ref_name` names in the repository at `path`; `None` where there
    /// is no such repository or ref. Nothing is made.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn find(path: &Path, ref_name: &str) -> Result<Option<Self>> {
        if !path.join("config").exists() {
            return Ok(None);
        }
        let repo = open(path)?;
        let Some(commit) = resolve(&repo, ref_name)? else { return Ok(None) };
        let (root, _) = repo
            .read_commit(&commit, gio::Cancellable::NONE)
            .with_context(|| format!("reading commit {commit}, which {ref_name} names"))?;
        Ok(Some(Self { root, commit, repo }))
    }

    /// The text of a regular file; `None` where there is none.
    ///
    /// # Errors
    /// When it cannot be read or is not UTF-8.
    pub fn file(&self, path: &str) -> Result<Option<String>> {
        let file = self.root.resolve_relative_path(path);
        if !file.query_exists(gio::Cancellable::NONE) {
            return Ok(None);
        }
        let read = || -> Result<Option<String>> {
            let file = file.downcast::<RepoFile>().ok().context("libostree gave no file")?;
            let (stream, _, _) = self.repo.load_file(&file.checksum(), gio::Cancellable::NONE)?;
            // A link has none.
            let Some(stream) = stream else { return Ok(None) };
            let mut text = String::new();
            stream.into_read().read_to_string(&mut text)?;
            Ok(Some(text))
        };
        read().with_context(|| format!("reading /{path} of commit {}", self.commit))
    }

    /// The permissions of a file, links not followed; `None` where there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn mode(&self, path: &str) -> Result<Option<u32>> {
        let file = self.root.resolve_relative_path(path);
        if !file.query_exists(gio::Cancellable::NONE) {
            return Ok(None);
        }
        let info = file
            .query_info("unix::mode", gio::FileQueryInfoFlags::NOFOLLOW_SYMLINKS, gio::Cancellable::NONE)
            .with_context(|| format!("reading /{path} of commit {}", self.commit))?;
        Ok(Some(info.attribute_uint32("unix::mode") & 0o7777))
    }

    /// The string `key` of its metadata.
    ///
    /// # Errors
    /// When the commit cannot be read.
    pub fn metadata_string(&self, key: &str) -> Result<Option<String>> {
        metadata_string(&self.repo, &self.commit, key)
    }

    /// Its parent's checksum.
    ///
    /// # Errors
    /// When the commit cannot be read.
    pub fn parent(&self) -> Result<Option<String>> {
        Ok(ostree::commit_get_parent(&load(&self.repo, &self.commit)?).map(Into::into))
    }

    /// Its packages.
    ///
    /// # Errors
    /// When the commit cannot be read.
    pub fn packages(&self) -> Result<Vec<object::Package>> {
        Ok(package_list(&metadata_of(&load(&self.repo, &self.commit)?)))
    }
}

/// Takes `commit` of the repository at `from`, which is verified, into the one at `path`
/// (made where there is none), and sets `ref_name`.
///
/// # Errors
/// Rejected when an object is missing or not what its name says.
pub fn import(path: &Path, from: &Path, ref_name: &str, commit: &str) -> Result<()> {
    let repo = open(path)?;
    let url = format!("file://{}", std::fs::canonicalize(from)?.display());
    let options = VariantDict::new(None);
    options.insert("refs", vec![ref_name]);
    options.insert("override-commit-ids", vec![commit]);
    options.insert("flags", (RepoPullFlags::MIRROR | RepoPullFlags::UNTRUSTED).bits() as i32);
    let options = options.end();
    long(|cancellable| repo.pull_with_options(&url, &options, None, cancellable)).map_err(|error| {
        let Some(reason) = error.downcast_ref::<glib::Error>() else { return error };
        let text = format!("commit {commit} of the newest artifact cannot be taken: {reason}");
        if reason.matches(gio::IOErrorEnum::NoSpace) { anyhow::anyhow!(text) } else { Rejected::new(text).into() }
    })
}

/// Where refs stand that keep what `run` composed before.
const KEPT: &str = "kept";

/// Keeps the commit that `ref_name` names, if it is another one than `next`, by the next of the refs
/// `kept/REF/NUMBER`. Within the transaction that sets the ref to `next`, but at once: wherever that is broken off, the
/// commit has a name.
///
/// # Errors
/// When refs cannot be read or written.
pub fn keep(repo: &Repo, ref_name: &str, next: &str) -> Result<()> {
    let Some(previous) = resolve(repo, ref_name)?.filter(|previous| previous != next) else { return Ok(()) };
    let kept = kept(repo, ref_name)?;
    if kept.iter().any(|(_, commit)| *commit == previous) {
        return Ok(());
    }
    let number = kept.last().map_or(1, |(number, _)| number + 1);
    let name = format!("{KEPT}/{ref_name}/{number}");
    let set = repo.set_ref_immediate(None, &name, Some(&previous), gio::Cancellable::NONE);
    set.with_context(|| format!("setting the ref {name}"))
}

/// Of the commits that were kept of `ref_name`, leaves so many that there are `count` with that
/// which it names now, and removes what no ref reaches any more; where `alone`, what only
/// parents reach too.
///
/// # Errors
/// When refs cannot be written or objects not removed.
pub fn prune(path: &Path, ref_name: &str, count: usize, alone: bool) -> Result<()> {
    let repo = open(path)?;
    let now = resolve(&repo, ref_name)?;
    // A run that was broken off may have kept what the ref still names.
    let (named, mut surplus): (Vec<_>, Vec<_>) =
        kept(&repo, ref_name)?.into_iter().partition(|(_, commit)| Some(commit) == now.as_ref());
    surplus.truncate(surplus.len().saturating_sub(count.saturating_sub(1)));
    for (number, commit) in named.iter().chain(&surplus) {
        let name = format!("{KEPT}/{ref_name}/{number}");
        repo.set_ref_immediate(None, &name, None, gio::Cancellable::NONE)
            .with_context(|| format!("removing the ref {name} of commit {commit}"))?;
    }
    let depth = if alone { 0 } else { -1 };
    let (_, removed, bytes) = long(|cancellable| repo.prune(RepoPruneFlags::REFS_ONLY, depth, cancellable))
        .context("removing old objects")?;
    if removed > 0 {
        tracing::info!("removed {removed} objects that no ref reaches any more, {bytes} bytes");
    }
    Ok(())
}

/// Numbers and commits of what is kept of `ref_name`, the oldest first.
fn kept(repo: &Repo, ref_name: &str) -> Result<Vec<(u64, String)>> {
    let prefix = format!("{KEPT}/{ref_name}");
    let listed = repo.list_refs_ext(Some(&prefix), RepoListRefsExtFlags::NONE, gio::Cancellable::NONE);
    let number = |name: &str| name.strip_prefix(&prefix)?.strip_prefix('/')?.parse::<u64>().ok();
    let listed = listed.context("listing the refs of what is kept")?;
    let mut kept: Vec<_> = listed.into_iter().filter_map(|(name, commit)| Some((number(&name)?, commit))).collect();
    kept.sort();
    Ok(kept)
}

/// What `pack` wants to know of a commit.
pub struct Description {
    /// `version` of its metadata.
    pub version: Option<String>,
    /// `rpmostree.inputhash` of its metadata.
    pub input_hash: Option<String>,
    /// `ostree.architecture` of its metadata, else that of its packages.
    pub architecture: Option<String>,
    /// Its packages, as its metadata lists them.
    pub packages: Vec<object::Package>,
}

/// Reads a commit's metadata.
///
/// # Errors
/// When the commit cannot be read.
pub fn describe(repo: &Repo, commit: &str) -> Result<Description> {
    let metadata = metadata_of(&load(repo, commit)?);
    let packages = package_list(&metadata);
    let packaged = packages.iter().map(|package| package.architecture.clone()).find(|arch| arch != "noarch");
    Ok(Description {
        version: text(&metadata, "version"),
        input_hash: text(&metadata, INPUTHASH),
        architecture: text(&metadata, "ostree.architecture").or(packaged),
        packages,
    })
}

/// The paths, below an archive-mode repository, of all objects that the commit
/// reaches; not of its parents.
///
/// # Errors
/// When an object is missing or cannot be read.
pub fn reachable(repo: &Repo, commit: &str) -> Result<Vec<String>> {
    let objects = long(|cancellable| repo.traverse_commit(commit, 0, cancellable))
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

/// The way of one tree into a repository, in one transaction.
pub struct Session<'a> {
    repo: &'a Repo,
    transaction: TransactionGuard<'a>,
    root: &'a Path,
    policy: Option<SePolicy>,
    /// For a repository in archive mode.
    objects: Option<Writer>,
}

impl<'a> Session<'a> {
    /// Begins with the arranged tree at `root`, whose files get labels where it has a policy
    /// and `selinux` is set. `path` is that of `repo`.
    ///
    /// # Errors
    /// When the policy cannot be read, or the repository not be written to.
    pub fn begin((repo, path): (&'a Repo, &Path), root: &'a Path, selinux: bool) -> Result<Self> {
        let policy = match selinux && root.join("usr/etc/selinux/config").exists() {
            true => Some(SePolicy::new(&gio::File::for_path(root), gio::Cancellable::NONE)),
            false => None,
        };
        let policy = policy.transpose().context("loading the SELinux policy")?;
        let transaction = begin(repo)?;
        let objects = (repo.mode() == RepoMode::Archive).then(|| Writer::new(path)).transpose()?;
        Ok(Self { repo, transaction, root, policy, objects })
    }

    /// Writes the objects of the tree as it is now; what changes later is written by
    /// [`Session::commit`].
    ///
    /// # Errors
    /// As [`Session::commit`].
    pub fn write_ahead(&mut self) -> Result<()> {
        match &mut self.objects {
            Some(objects) => objects.write_ahead(self.root, self.policy.as_ref()),
            None => Ok(()),
        }
    }

    /// Commits the tree and sets the ref; gives the commit's checksum.
    ///
    /// # Errors
    /// Rejected when the tree holds what no commit can; other errors when libostree fails.
    pub fn commit(self, target: &Target, facts: &Facts) -> Result<(String, Option<Written>)> {
        let Self { repo, transaction, root, policy, objects } = self;
        let mtree = MutableTree::new();
        let written = match objects {
            Some(objects) => Some(objects.write(repo, root, policy.as_ref(), &mtree)?),
            None => {
                write_by_libostree(repo, root, policy.as_ref(), &mtree)?;
                None
            }
        };
        let file = repo.write_mtree(&mtree, gio::Cancellable::NONE).context("writing the tree")?;
        let file = file.downcast::<RepoFile>().ok().context("libostree gave no tree")?;
        let metadata = metadata(facts)?;
        let commit = repo
            .write_commit_with_time(
                target.parent,
                None,
                None,
                Some(&metadata),
                &file,
                facts.timestamp,
                gio::Cancellable::NONE,
            )
            .context("writing the commit")?;
        if target.keep {
            keep(repo, target.ref_name, &commit)?;
        }
        set_ref(repo, transaction, target.ref_name, &commit)?;
        Ok((commit.into(), written))
    }
}

/// Writes the tree's objects into a repository of another mode than archive: one
/// file after the other.
fn write_by_libostree(repo: &Repo, root: &Path, policy: Option<&SePolicy>, mtree: &MutableTree) -> Result<()> {
    super::objects::strip_attributes(root)?;
    let root = root.to_str().context("the tree's path is not UTF-8")?;
    let modifier = RepoCommitModifier::new(RepoCommitModifierFlags::NONE, None);
    modifier.set_sepolicy(policy);
    long(|cancellable| repo.write_dfd_to_mtree(CWD, root, mtree, Some(&modifier), cancellable))
        .context("writing the tree's objects")
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
        .map(|package| &package.listed)
        .map(|p| (p.name.as_str(), p.epoch.as_str(), p.version.as_str(), p.release.as_str(), p.architecture.as_str()))
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
        serde_json::Value::Array(items) if items.iter().all(serde_json::Value::is_string) => {
            items.iter().filter_map(|item| item.as_str()).collect::<Vec<_>>().to_variant()
        }
        other => {
            reject!("add-commit-metadata: {key}: {other} is no string, boolean, whole number or list of strings")
        }
    })
}
