//! Packs a commit as an artifact: a deterministic tarball of an archive-mode
//! repository with one ref, and the manifest that pins it (docs/artifact.md).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use oscontainer_artifact::digest::{Checksum, Digest, Hasher};
use oscontainer_artifact::manifest::{self, INPUTHASH, Manifest, Tarball, oci_architecture};
use oscontainer_artifact::protocol::{Name, valid_ref};
use oscontainer_artifact::tarball::{self, Kind};
use oscontainer_program::exit::Usage;
use oscontainer_program::options::Global;
use oscontainer_program::progress::Progress;
use oscontainer_program::reject;
use oscontainer_program::staging::{self, Staging};
use ostree::{Repo, RepoMode, RepoPullFlags, gio};
use serde::Serialize;

use crate::compose::commit;

/// Bytes read from an object at a time.
const CHUNK: usize = 256 << 10;

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

/// What `pack` made.
#[derive(Debug, Clone, Serialize)]
pub struct Packed {
    /// The manifest's path.
    pub manifest: PathBuf,
    /// The manifest's digest, which pins the artifact.
    pub digest: Digest,
    /// Bytes of the tarball.
    pub size: u64,
}

/// Runs `pack`.
///
/// # Errors
/// Rejected when the ref is not there; else when the repository cannot be read or
/// the output written.
pub fn main(args: PackArgs, global: &Global) -> Result<()> {
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
    let name = naming.name.clone().unwrap_or_else(|| ref_name.replace('/', "-"));
    let version = naming.version.clone().or(facts.version).unwrap_or_else(|| checksum.clone());
    let parse = |text: String, option: &str| text.parse::<Name>().map_err(|e| Usage(format!("{e}; give {option}")));
    let (name, version) = (parse(name, "--name")?, parse(version, "--version")?);

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
    let annotations = BTreeMap::from_iter(facts.input_hash.map(|hash| (INPUTHASH.to_owned(), hash)));
    let manifest = Manifest {
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
    let bytes = manifest.to_bytes();
    let file = staging.path().join(manifest::FILE);
    File::create(&file).and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))?;
    fs::create_dir_all(output).with_context(|| format!("making {}", output.display()))?;
    for (from, to) in [(tar, manifest::TARBALL_FILE), (file, manifest::FILE)] {
        fs::rename(from, output.join(to)).with_context(|| format!("writing {to} to {}", output.display()))?;
    }
    staging::sync_dir(output)?;
    Ok(Packed { manifest: output.join(manifest::FILE), digest: Digest::of(&bytes), size })
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
    target
        .pull(&url, &[ref_name], RepoPullFlags::MIRROR, None, gio::Cancellable::NONE)
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
    let mut out = Hashing { inner: BufWriter::with_capacity(CHUNK, file), hasher: Hasher::new(), size: 0 };
    let progress = Progress::bytes("packing", None);
    let mut buffer = vec![0; CHUNK];
    for path in entries {
        if tarball::DIRECTORIES.contains(&path.as_str()) {
            out.write_all(&tarball::header(&path, Kind::Directory))?;
        } else if path == "config" {
            out.entry(&path, tarball::CONFIG)?;
        } else if path == ref_path {
            out.entry(&path, format!("{commit}\n").as_bytes())?;
        } else {
            let mut object = File::open(repo.join(&path)).with_context(|| format!("opening {path}"))?;
            let size = object.metadata()?.len();
            out.write_all(&tarball::header(&path, Kind::File(size)))?;
            let mut left = size;
            while left > 0 {
                let count = object.read(&mut buffer).with_context(|| format!("reading {path}"))?;
                if count as u64 > left || count == 0 {
                    anyhow::bail!("{path} changed its size while it was read");
                }
                out.write_all(&buffer[..count])?;
                left -= count as u64;
            }
            out.write_all(&[0; tarball::BLOCK][..tarball::padding(size)])?;
            progress.add(size);
        }
    }
    out.write_all(&tarball::END)?;
    let file = out.inner.into_inner().map_err(std::io::IntoInnerError::into_error).context("writing the tarball")?;
    file.sync_all().context("syncing the tarball")?;
    Ok((out.size, out.hasher.digest()))
}

/// Counts and hashes what is written.
struct Hashing {
    inner: BufWriter<File>,
    hasher: Hasher,
    size: u64,
}

impl Hashing {
    fn entry(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.write_all(&tarball::header(path, Kind::File(bytes.len() as u64)))?;
        self.write_all(bytes)?;
        self.write_all(&[0; tarball::BLOCK][..tarball::padding(bytes.len() as u64)])
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        self.inner.write_all(bytes).context("writing the tarball")
    }
}
