//! The `dnf` engine's way from a treefile to a commit, stage by stage.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use oscontainer_artifact::digest::Hasher;
use oscontainer_artifact::manifest::INPUTHASH;
use oscontainer_program::exit::Usage;
use oscontainer_program::moment;
use oscontainer_program::reject;

use super::commit::{self, Facts, Previous, Session, Target};
use super::dnf::Dnf;
use super::kernel::{self, Kernel};
use super::lockfile::{self, Lockfile};
use super::packages::{self, Package};
use super::plan::{Plan, Planned};
use super::tree::Tree;
use super::{Engine, Job, Made, accounts, customize, layout, version};
use crate::treefile::{ByDnf, External, Field, Flattened};

/// `dnf --installroot`, and the rest done here.
pub struct DnfEngine;

/// What rpm writes as the time of installation where SOURCE_DATE_EPOCH is not
/// set: the newest package's build time is not known before it is installed.
const INSTALL_TIME: u64 = 1;

impl Engine for DnfEngine {
    fn name(&self) -> &'static str {
        "dnf"
    }

    fn plan(&self, job: &Job) -> Result<Option<Plan>> {
        supported(job)?;
        let previous = Previous::find(job.repo, job.ref_name)?;
        choose_version(job, previous.as_ref(), source_date_epoch()?)?;
        let tree = empty_tree(job)?;
        let mut dnf = Dnf::prepare(job.flattened, &job.work.join("dnf"), job.cache, tree.root(), INSTALL_TIME)?;
        dnf.pin(&Lockfile::read(&job.options.lockfile)?)?;
        let packages = job.stages.run("resolving packages", || dnf.resolve())?;
        write_lockfile(job, &packages, None, source_date_epoch()?)?;
        Plan::new(job.ref_name.to_owned(), packages, job.flattened, previous.as_ref()).map(Some)
    }

    fn compose(&self, job: &Job) -> Result<Made> {
        supported(job)?;
        let flattened = job.flattened;
        let epoch = source_date_epoch()?;
        // Owner and mode of what is made here are the tree's: they do not depend on the caller.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let tree = empty_tree(job)?;
        let root = tree.root().to_owned();
        let lockfile = Lockfile::read(&job.options.lockfile)?;
        let mut dnf = Dnf::prepare(flattened, &job.work.join("dnf"), job.cache, &root, epoch.unwrap_or(INSTALL_TIME))?;
        let previous = Previous::find(job.repo, job.ref_name)?;
        let version = choose_version(job, previous.as_ref(), epoch)?;
        let parent = parent(job)?;
        let files = files_digest(flattened)?;

        dnf.pin(&lockfile)?;
        let (planned, rpms) = job.stages.run("downloading packages", || dnf.download())?;
        lockfile.verify(&planned, rpms.as_deref())?;
        write_lockfile(job, &planned, rpms.as_deref(), epoch)?;
        let resolved = rpms.map(|rpms| packages::of_files(&rpms, &dnf.home())).transpose()?;
        if let (Some(packages), Some(previous), false) = (&resolved, &previous, job.options.force_nocache) {
            let input_hash = input_hash(flattened, &files, packages, epoch);
            if is_again(previous, job, &input_hash, parent.as_deref())? {
                tracing::info!("nothing changed since commit {}: not composed again", previous.commit);
                return Ok(Made { commit: previous.commit.clone(), sizes: sizes(packages), written: None });
            }
        }
        accounts::preserve(&tree, flattened, previous.as_ref())?;
        job.stages.run("installing packages", || dnf.install_cached())?;
        accounts::drop_packaged(&tree)?;
        let database = packages::database(&tree)?;
        packages::forget_keys(&database, &dnf.home())?;
        let packages = packages::installed(&database, &dnf.home())?;
        if let Some(resolved) = resolved.filter(|resolved| *resolved != packages) {
            let names =
                |list: &[Package]| list.iter().map(|package| package.listed.name.clone()).collect::<Vec<_>>().join(" ");
            bail!("dnf resolved {}, but installed {}", names(&resolved), names(&packages));
        }

        let treefile = &flattened.treefile;
        if treefile.remove_from_packages.is_some() {
            customize::remove_from_packages(&tree, treefile, &packages::files(&database, &dnf.home())?)?;
        }
        if treefile.readonly_executables == Some(true) {
            customize::protect_executables(&root)?;
        }
        let newest = packages.iter().map(|package| package.build_time).max().unwrap_or_default();
        let timestamp = epoch.unwrap_or(newest);
        job.stages.run("customizing the tree", || {
            layout::prepare_for_scripts(&tree)?;
            tree.write("usr/share/rpm-ostree/treefile.json", flattened.to_json().to_string().as_bytes(), 0o644)?;
            customize::customize(&tree, flattened, version.as_deref(), timestamp)
        })?;
        let kernel = match treefile.container {
            Some(true) => None,
            _ => kernel::place(&tree)?,
        };
        job.stages.run("arranging the tree", || {
            // Scripts have run since.
            let volatile = packages::volatile(&packages::database(&tree)?, &dnf.home())?;
            layout::place_rpmdb(&tree, treefile.rpmdb, &dnf.home())?;
            layout::clean(&tree)?;
            layout::arrange(&tree, treefile, &volatile)?;
            accounts::check(&tree, flattened, previous.as_ref())
        })?;
        if treefile.selinux == Some(true) && tree.entry("usr/etc/selinux/config")?.is_none() {
            reject!(
                "selinux is true ({}), but the tree has no policy: add a package that has one",
                flattened.origins.of("selinux")
            );
        }
        let repo = commit::open(job.repo)?;
        let mut session = Session::begin((&repo, job.repo), &root, treefile.selinux.unwrap_or(true))?;
        if let Some(kernel) = &kernel {
            let initramfs = make_initramfs(job, &tree, kernel, &mut session)?;
            kernel::finish(&tree, treefile, kernel, initramfs.as_deref())?;
        }
        customize::finalize(&tree, flattened)?;
        let facts = Facts {
            version: version.as_deref(),
            title: title(&tree, job.ref_name)?,
            packages: &packages,
            input_hash: input_hash(flattened, &files, &packages, epoch),
            kernel: kernel.map(|kernel| kernel.version),
            timestamp,
            extra: extra_metadata(flattened, files),
        };
        let target = Target { ref_name: job.ref_name, parent: parent.as_deref(), keep: job.options.keep };
        let (commit, written) = job.stages.run("committing", || session.commit(&target, &facts))?;
        Ok(Made { commit, sizes: sizes(&packages), written })
    }
}

/// Makes the initramfs that the treefile asks for, while the tree's objects are written.
fn make_initramfs(job: &Job, tree: &Tree, kernel: &Kernel, session: &mut Session) -> Result<Option<PathBuf>> {
    let treefile = &job.flattened.treefile;
    if treefile.no_initramfs == Some(true) {
        return Ok(None);
    }
    let make = || job.stages.run("making the initramfs", || kernel::make_initramfs(tree, treefile, kernel, job.work));
    thread::scope(|scope| {
        let image = scope.spawn(make);
        let ahead = job.stages.run("writing objects ahead", || session.write_ahead());
        let image = image.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        ahead.map(|()| Some(image))
    })
}

fn sizes(packages: &[Package]) -> BTreeMap<(String, String), u64> {
    let key = |package: &Package| (package.listed.name.clone(), package.listed.architecture.clone());
    packages.iter().map(|package| (key(package), package.size)).collect()
}

/// Writes the lockfile that `--write-lockfile-to` asks for.
fn write_lockfile(job: &Job, packages: &[Planned], files: Option<&[PathBuf]>, epoch: Option<u64>) -> Result<()> {
    let Some(path) = &job.options.write_lockfile_to else { return Ok(()) };
    let seconds = match epoch {
        Some(epoch) => epoch,
        None => SystemTime::now().duration_since(UNIX_EPOCH).context("reading the clock")?.as_secs(),
    };
    lockfile::write(path, packages, files, moment::utc(seconds))
}

/// The commit that `--parent` names.
fn parent(job: &Job) -> Result<Option<String>> {
    let Some(rev) = &job.options.parent else { return Ok(None) };
    let found = match job.repo.join("config").exists() {
        true => commit::resolve(&commit::open(job.repo)?, rev)?,
        false => None,
    };
    match found {
        Some(commit) => Ok(Some(commit)),
        None => reject!("--parent {rev}: {} has no such ref or commit", job.repo.display()),
    }
}

/// A tree with the directories that a sandbox needs.
fn empty_tree(job: &Job) -> Result<Tree> {
    let root = job.work.join("root");
    fs::create_dir(&root)?;
    // In a directory with the set-group-ID bit, such as a volume's, it would belong to that group.
    rustix::fs::chown(&root, Some(rustix::fs::Uid::ROOT), Some(rustix::fs::Gid::ROOT)).context("making the tree")?;
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).context("making the tree")?;
    let tree = Tree::open(&root)?;
    for dir in ["dev", "proc", "run", "tmp"] {
        tree.directory(dir)?;
    }
    Ok(tree)
}

/// `SOURCE_DATE_EPOCH`, seconds since 1970 (reproducible-builds.org/specs/source-date-epoch).
fn source_date_epoch() -> Result<Option<u64>> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => {
            let seconds =
                text.parse().map_err(|_| Usage(format!("SOURCE_DATE_EPOCH {text:?} is not a number of seconds")))?;
            Ok(Some(seconds))
        }
        Err(_) => Ok(None),
    }
}

fn choose_version(job: &Job, previous: Option<&Previous>, epoch: Option<u64>) -> Result<Option<String>> {
    if let Some(version) = &job.options.version_string {
        return Ok(Some(version.clone()));
    }
    let treefile = &job.flattened.treefile;
    let Some(prefix) = &treefile.automatic_version_prefix else { return Ok(None) };
    let last = previous.map(|commit| commit.metadata_string("version")).transpose()?.flatten();
    let now = match epoch {
        Some(epoch) => i64::try_from(epoch).unwrap_or(i64::MAX),
        None => ostree::glib::DateTime::now_utc().context("reading the clock")?.to_unix(),
    };
    let suffix = treefile.automatic_version_suffix.as_deref();
    version::next(prefix, suffix, last.as_deref(), now).map(Some)
}

/// The name for people: os-release's, or the ref.
fn title(tree: &Tree, ref_name: &str) -> Result<String> {
    let text = tree.read("usr/lib/os-release")?.unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    Ok(name.map_or(ref_name, |name| name.trim_matches(['"', '\''])).to_owned())
}

/// Whether the commit before was made of the same, and is what the options ask for.
fn is_again(previous: &Previous, job: &Job, input_hash: &str, parent: Option<&str>) -> Result<bool> {
    let version = &job.options.version_string;
    // What programs of finalize.d read, nobody knows.
    if !job.flattened.external.finalize.is_empty() {
        return Ok(false);
    }
    Ok(previous.metadata_string(INPUTHASH)?.as_deref() == Some(input_hash)
        && (version.is_none() || *version == previous.metadata_string("version")?)
        && (parent.is_none() || parent == previous.parent()?.as_deref()))
}

/// The sha256 over all that went in: the flattened treefile, the files it names, the
/// packages' headers, SOURCE_DATE_EPOCH and this program's version.
fn input_hash(flattened: &Flattened, files: &str, packages: &[Package], epoch: Option<u64>) -> String {
    let mut hasher = Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_be_bytes());
        hasher.update(bytes);
    };
    add(env!("CARGO_PKG_VERSION").as_bytes());
    add(epoch.map(|epoch| epoch.to_string()).unwrap_or_default().as_bytes());
    add(flattened.to_json().to_string().as_bytes());
    add(files.as_bytes());
    for package in packages {
        add(package.header.as_bytes());
    }
    hasher.checksum().to_string()
}

/// The sha256, in hex, over modes and content of the files that the treefile names.
///
/// # Errors
/// When one cannot be read.
pub fn files_digest(flattened: &Flattened) -> Result<String> {
    let External { add_files, postprocess_scripts, passwd, group, finalize, .. } = &flattened.external;
    let files = add_files.iter().map(|(source, _)| source).chain(postprocess_scripts).chain(finalize);
    let mut hasher = Hasher::new();
    for file in files.chain(passwd).chain(group) {
        let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        // A file that is added keeps its mode.
        let mode = fs::metadata(file).with_context(|| format!("reading {}", file.display()))?.mode() & 0o7777;
        hasher.update(&mode.to_be_bytes());
        hasher.update(&(bytes.len() as u64).to_be_bytes());
        hasher.update(&bytes);
    }
    Ok(hasher.checksum().to_string())
}

/// The treefile's `add-commit-metadata` and `container-cmd`, and the digest of its files.
fn extra_metadata(flattened: &Flattened, files: String) -> Vec<(String, serde_json::Value)> {
    let extra = flattened.treefile.add_commit_metadata.iter().flatten();
    let mut extra: Vec<_> = extra.map(|(key, value)| (key.clone(), value.clone())).collect();
    if let Some(command) = &flattened.treefile.container_cmd {
        // libostree's OSTREE_COMMIT_META_CONTAINER_CMD.
        extra.push(("ostree.container-cmd".to_owned(), serde_json::json!(command)));
    }
    extra.push((commit::FILES.to_owned(), files.into()));
    extra
}

/// Refuses what this engine would have to ignore, and what contradicts itself.
fn supported(job: &Job) -> Result<()> {
    let Flattened { treefile, origins, .. } = job.flattened;
    // rpm-ostree refuses this too, but prints such a treefile.
    if treefile.machineid_compat == Some(false) && treefile.units.as_ref().is_some_and(|units| !units.is_empty()) {
        reject!(
            "units ({}) has no effect with machineid-compat: false ({}), where systemd presets decide: \
             write a .preset file instead",
            origins.of("units"),
            origins.of("machineid-compat")
        );
    }
    let said = |field: &&Field| format!("{} ({})", field.name, origins.of(field.name));
    let (layering, refused): (Vec<_>, Vec<_>) =
        treefile.refused_by_dnf().into_iter().partition(|field| field.by_dnf == ByDnf::Layering);
    let list = |fields: &[&Field]| fields.iter().map(said).collect::<Vec<_>>().join(", ");
    let mut reasons = Vec::new();
    if !refused.is_empty() {
        reasons.push(format!(
            "the dnf engine does not carry out {}: use --engine rpm-ostree, which does (docs/treefile.md lists what \
             each engine does)",
            list(&refused)
        ));
    }
    if !layering.is_empty() {
        reasons.push(format!("{}: for layering on a booted system, not for a compose", list(&layering)));
    }
    if !reasons.is_empty() {
        reject!("{}", reasons.join("; "));
    }
    Ok(())
}
