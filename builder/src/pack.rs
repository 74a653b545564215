//! Packs a commit as an artifact: a deterministic tarball of an archive-mode
//! repository with one ref, and the manifest that pins it (docs/artifact.md).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::mem::replace;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use anyhow::{Context, Result, ensure};
use clap::Args;
use oscontainer_artifact::digest::{Checksum, Digest, Hasher};
use oscontainer_artifact::manifest::{self, INPUTHASH, Manifest, PACKAGES, Tarball, oci_architecture};
use oscontainer_artifact::object::Package;
use oscontainer_artifact::protocol::{Name, valid_ref};
use oscontainer_artifact::tarball::{self, Kind};
use oscontainer_program::exit::Usage;
use oscontainer_program::options::Global;
use oscontainer_program::progress::Progress;
use oscontainer_program::reject;
use oscontainer_program::staging::{self, Staging};
use oscontainer_program::stop;
use ostree::{Repo, RepoMode, RepoPullFlags, gio};
use serde::Serialize;

use crate::compose::commit;

/// Bytes of the tarball that are written and hashed at a time.
const BLOCK: usize = 1 << 20;
/// After so many bytes the disk begins to write.
const SYNC: u64 = 32 << 20;

/// What `pack` takes.
#[derive(Debug, Clone, Args)]
pub struct PackArgs {
    /// OSTree repository with the commit, of any mode
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_REPO")]
    pub repo: PathBuf,
    /// Ref that names the commit
    #[arg(long = "ref", value_name = "REF", env = "OSCONTAINER_REF")]
    pub ref_name: String,
    /// Directory for manifest.json and repo.tar
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_OUTPUT")]
    pub output: PathBuf,
    #[command(flatten)]
    pub naming: Naming,
}

/// What the artifact is called.
#[derive(Debug, Clone, Args)]
pub struct Naming {
    /// The artifact's name [default: the ref with '-' for '/']
    #[arg(long, value_name = "N", env = "OSCONTAINER_NAME")]
    pub name: Option<String>,
    /// The artifact's version [default: the commit's version, or its checksum]
    #[arg(long = "version", value_name = "V", env = "OSCONTAINER_VERSION")]
    pub version: Option<String>,
}

impl Naming {
    /// The name of an artifact of `ref_name`.
    ///
    /// # Errors
    /// [`Usage`] when it is not a valid one.
    pub fn name(&self, ref_name: &str) -> Result<Name> {
        Ok(parse(self.name.clone().unwrap_or_else(|| ref_name.replace('/', "-")), "--name")?)
    }
}

fn parse(text: String, option: &str) -> Result<Name, Usage> {
    text.parse().map_err(|error| Usage(format!("{error}; give {option}")))
}

/// What `pack` made.
#[derive(Debug, Clone, Serialize)]
pub struct Packed {
    /// The manifest's path.
    pub manifest: PathBuf,
    /// The manifest's digest, which pins the artifact.
    pub digest: Digest,
    /// Bytes of the tarball.
    pub size: u64,
    /// Its digest.
    #[serde(skip)]
    pub tarball: Digest,
}

/// Runs `pack`.
///
/// # Errors
/// Rejected when the ref is not there; else when the repository cannot be read or
/// the output written.
pub fn main(args: PackArgs, global: &Global) -> Result<()> {
    stop::on_signals()?;
    global.print(&pack(&args.repo, &args.ref_name, &args.naming, &args.output)?)
}

/// Writes the artifact of `ref_name` to `output`; both files appear by a rename,
/// the manifest last.
///
/// # Errors
/// As [`main`].
pub fn pack(repo: &Path, ref_name: &str, naming: &Naming, output: &Path) -> Result<Packed> {
    if !repo.join("config").exists() {
        reject!("{} is not an OSTree repository: it has no config", repo.display());
    }
    if !valid_ref(ref_name) {
        return Err(Usage(format!("--ref {ref_name:?} is not a valid OSTree ref")).into());
    }
    let opened = commit::open(repo)?;
    let Some(checksum) = commit::resolve(&opened, ref_name)? else {
        reject!("{} has no ref {ref_name:?}: see `ostree refs --repo`", repo.display());
    };
    let facts = commit::describe(&opened, &checksum)?;
    let name = naming.name(ref_name)?;
    let version = naming.version.clone().or(facts.version).unwrap_or_else(|| checksum.clone());
    let version = parse(version, "--version")?;

    let staging = Staging::beside(output, "pack")?;
    let archive;
    let source = if opened.mode() == RepoMode::Archive {
        repo
    } else {
        archive = staging.path().join("archive");
        convert(repo, ref_name, &archive)?;
        &archive
    };
    let objects = commit::reachable(&commit::open(source)?, &checksum)?;
    let tar = staging.path().join(manifest::TARBALL_FILE);
    let (size, digest) = write_tarball(source, ref_name, &checksum, objects, &tar)?;
    let mut annotations = BTreeMap::from([(manifest::BUILDER.to_owned(), env!("CARGO_PKG_VERSION").to_owned())]);
    annotations.extend(facts.input_hash.map(|hash| (INPUTHASH.to_owned(), hash)));
    if !facts.packages.is_empty() {
        annotations.insert(PACKAGES.to_owned(), package_names(&facts.packages));
    }
    let mut manifest = Manifest {
        schema_version: 1,
        media_type: manifest::MEDIA_TYPE.into(),
        name,
        version,
        architecture: oci_architecture(&facts.architecture.unwrap_or_else(|| std::env::consts::ARCH.into())).into(),
        ref_name: ref_name.into(),
        commit: checksum.parse::<Checksum>()?,
        tarball: Tarball {
            path: manifest::TARBALL_FILE.into(),
            media_type: manifest::TARBALL_MEDIA_TYPE.into(),
            size,
            digest,
        },
        annotations,
    };
    if manifest.to_bytes().len() as u64 > manifest::MAX_SIZE {
        manifest.annotations.remove(PACKAGES);
    }
    let bytes = manifest.to_bytes();
    let file = staging.path().join(manifest::FILE);
    File::create(&file).and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))?;
    fs::create_dir_all(output).with_context(|| format!("making {}", output.display()))?;
    // An older artifact ends to be one before the first of its files changes.
    staging::remove_if_there(&output.join(manifest::FILE))?;
    for (from, to) in [(tar, manifest::TARBALL_FILE), (file, manifest::FILE)] {
        fs::rename(from, output.join(to)).with_context(|| format!("writing {to} to {}", output.display()))?;
    }
    staging::sync_dir(output)?;
    Ok(Packed { manifest: output.join(manifest::FILE), digest: Digest::of(&bytes), size, tarball: digest })
}

/// The packages as [`PACKAGES`] has them.
fn package_names(packages: &[Package]) -> String {
    let name = |package: &Package| format!("{}-{}.{}", package.name, package.evr(), package.architecture);
    let mut names: Vec<String> = packages.iter().map(name).collect();
    names.sort();
    names.join(" ")
}

/// Pulls the commit into a new archive-mode repository, which compresses it.
fn convert(repo: &Path, ref_name: &str, archive: &Path) -> Result<Repo> {
    let source = fs::canonicalize(repo)?;
    tracing::info!("{} is not in archive mode: compressing its objects", repo.display());
    let target = commit::open(archive)?;
    // It is thrown away: syncing each object would be for nothing.
    let config = target.copy_config();
    config.set_string("core", "fsync", "false");
    target.write_config(&config).context("configuring the temporary repository")?;
    target.reload_config(gio::Cancellable::NONE).context("configuring the temporary repository")?;
    let url = format!("file://{}", source.display());
    commit::long(|cancellable| target.pull(&url, &[ref_name], RepoPullFlags::MIRROR, None, cancellable))
        .with_context(|| format!("copying {ref_name} from {}", repo.display()))?;
    Ok(target)
}

/// Writes the tarball; gives its size and digest.
fn write_tarball(
    repo: &Path,
    ref_name: &str,
    commit: &str,
    mut objects: Vec<String>,
    target: &Path,
) -> Result<(u64, Digest)> {
    let detached = format!("objects/{}/{}.commitmeta", &commit[..2], &commit[2..]);
    if repo.join(&detached).exists() {
        objects.push(detached);
    }
    let ref_path = format!("refs/heads/{ref_name}");
    let mut entries: Vec<String> = objects;
    entries.extend(tarball::DIRECTORIES.map(str::to_owned));
    entries.extend(["config".to_owned(), ref_path.clone()]);
    entries.sort();

    let file = File::create(target).with_context(|| format!("writing {}", target.display()))?;
    // Reading and writing, hashing, and the disk each have their own pace.
    let (hash, blocks) = sync_channel::<Arc<Vec<u8>>>(8);
    let (sync, marks) = sync_channel::<()>(1);
    thread::scope(|scope| {
        let hasher = scope.spawn(|| {
            let mut hasher = Hasher::new();
            blocks.into_iter().for_each(|block| hasher.update(&block));
            hasher.digest()
        });
        let disk = scope.spawn(|| marks.into_iter().try_for_each(|()| file.sync_data()));
        let mut out = Output { file: &file, hash, sync, buffer: Vec::with_capacity(BLOCK), size: 0 };
        let written = write_entries(&mut out, repo, commit, entries, &ref_path).and_then(|()| out.flush());
        let size = out.size;
        drop(out);
        let digest = hasher.join().unwrap_or_else(|panic| resume_unwind(panic));
        let synced = disk.join().unwrap_or_else(|panic| resume_unwind(panic));
        written?;
        synced.and_then(|()| file.sync_all()).context("syncing the tarball")?;
        Ok((size, digest))
    })
}

fn write_entries(out: &mut Output, repo: &Path, commit: &str, entries: Vec<String>, ref_path: &str) -> Result<()> {
    let progress = Progress::bytes("packing", None);
    for path in entries {
        stop::check()?;
        if tarball::DIRECTORIES.contains(&path.as_str()) {
            out.write_all(&tarball::header(&path, Kind::Directory))?;
        } else if path == "config" {
            out.entry(&path, tarball::CONFIG)?;
        } else if path == ref_path {
            out.entry(&path, format!("{commit}\n").as_bytes())?;
        } else {
            let object = File::open(repo.join(&path)).with_context(|| format!("opening {path}"))?;
            let size = object.metadata()?.len();
            out.write_all(&tarball::header(&path, Kind::File(size)))?;
            out.copy(&object, size).with_context(|| format!("reading {path}"))?;
            out.write_all(&[0; tarball::BLOCK][..tarball::padding(size)])?;
            progress.add(size);
        }
    }
    out.write_all(&tarball::END)
}

/// The tarball on its way to file and digest, in blocks.
struct Output<'a> {
    file: &'a File,
    hash: SyncSender<Arc<Vec<u8>>>,
    sync: SyncSender<()>,
    buffer: Vec<u8>,
    size: u64,
}

impl Output<'_> {
    fn entry(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.write_all(&tarball::header(path, Kind::File(bytes.len() as u64)))?;
        self.write_all(bytes)?;
        self.write_all(&[0; tarball::BLOCK][..tarball::padding(bytes.len() as u64)])
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() < BLOCK { Ok(()) } else { self.flush() }
    }

    /// Appends the `size` bytes of `object`.
    fn copy(&mut self, object: &File, size: u64) -> Result<()> {
        let mut left = size;
        while left > 0 {
            stop::check()?;
            let count = object.take(left.min(BLOCK as u64)).read_to_end(&mut self.buffer)? as u64;
            ensure!(count > 0, "it changed its size while it was read");
            left -= count;
            if self.buffer.len() >= BLOCK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let block = Arc::new(replace(&mut self.buffer, Vec::with_capacity(2 * BLOCK)));
        self.file.write_all(&block).context("writing the tarball")?;
        let before = self.size;
        self.size += block.len() as u64;
        if before / SYNC != self.size / SYNC {
            // While the disk is busy with what was before, this can wait.
            let _ = self.sync.try_send(());
        }
        // The hasher lives as long as this.
        self.hash.send(block).context("hashing the tarball")
    }
}
