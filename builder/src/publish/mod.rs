//! `publish`: uploads an artifact, first the tarball, then the manifest that makes
//! it visible. What is there already is not sent again: not after a break, and not by
//! the next run either.

mod remote;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::{Digest, Hasher};
use oscontainer_artifact::manifest::{FILE, Manifest, TARBALL_FILE};
use oscontainer_program::client::ClientOptions;
use oscontainer_program::exit::{self, Usage};
use oscontainer_program::options::Global;
use oscontainer_program::progress::Progress;
use oscontainer_program::reject;
use oscontainer_program::retry::Retry;
use oscontainer_program::stop;
use reqwest::Url;
use serde::{Deserialize, Serialize};

use crate::pack::Packed;
use remote::{Remote, Step, Upload, immutable};

/// Options of `publish`.
#[derive(Debug, Clone, Args)]
pub struct PublishArgs {
    /// Directory with manifest.json and repo.tar, as pack writes it
    dir: PathBuf,
    /// URL of the artifact endpoint
    #[arg(long, value_name = "URL", env = "OSCONTAINER_ENDPOINT")]
    endpoint: Url,
    #[command(flatten)]
    client: ClientOptions,
}

/// What was published.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Published {
    /// Where the manifest is.
    pub manifest_url: String,
    /// The digest of the artifact: the manifest's sha256.
    pub manifest_digest: String,
    /// The OSTree commit in it.
    pub commit: String,
    /// The ref that names the commit.
    #[serde(rename = "ref")]
    pub ref_name: String,
    /// The artifact's version.
    pub version: String,
    /// Whether the endpoint had it not before.
    #[serde(skip)]
    pub changed: bool,
}

impl Published {
    fn new(manifest: &Manifest, digest: Digest, url: &Url, changed: bool) -> Self {
        Self {
            manifest_url: url.to_string(),
            manifest_digest: digest.to_string(),
            commit: manifest.commit.to_string(),
            ref_name: manifest.ref_name.clone(),
            version: manifest.version.to_string(),
            changed,
        }
    }
}

/// Uploads an artifact and prints where it is.
pub fn main(args: PublishArgs, global: &Global) -> Result<()> {
    stop::on_signals()?;
    let published = publish(&args.dir, None, &args.endpoint, &args.client)?;
    global.print(&published)
}

/// Uploads the artifact in `dir` to `endpoint`, after it was checked; `packed` says that it was made just now, and
/// its tarball need not be read for that.
///
/// # Errors
/// [`Rejected`] when the files contradict each other, or the endpoint will never
/// take them; other errors are worth a retry.
pub fn publish(dir: &Path, packed: Option<&Packed>, endpoint: &Url, client: &ClientOptions) -> Result<Published> {
    if !matches!(endpoint.scheme(), "http" | "https") {
        return Err(Usage(format!("--endpoint {endpoint}: expected an http or https URL")).into());
    }
    let local = Local::read(dir, packed)?;
    let remote = Remote::new(endpoint, client)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(stop::or(send(&remote, &local, Retry::new(&client.retry))))
}

/// What was published before with the manifest `bytes`, if `endpoint` has it still.
///
/// # Errors
/// Rejected when this is no manifest; when the endpoint does not say.
pub fn again(bytes: &[u8], endpoint: &Url, client: &ClientOptions) -> Result<Option<Published>> {
    let manifest = Manifest::parse(bytes)?;
    let remote = Remote::new(endpoint, client)?;
    let url = remote.url(&manifest, FILE)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    let mut retry = Retry::new(&client.retry);
    let asked = retry.run("asking for the manifest", async || remote.stored(&url).await);
    let stored = runtime.block_on(stop::or(asked))?;
    let digest = Digest::of(bytes);
    Ok((stored == Some(digest.to_string())).then(|| Published::new(&manifest, digest, &url, false)))
}

/// An artifact on disk whose tarball is what its manifest says.
struct Local {
    manifest: Manifest,
    bytes: Vec<u8>,
    tarball: PathBuf,
}

impl Local {
    fn read(dir: &Path, packed: Option<&Packed>) -> Result<Self> {
        let path = dir.join(FILE);
        let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let manifest = Manifest::parse(&bytes).with_context(|| format!("reading {}", path.display()))?;
        let tarball = dir.join(TARBALL_FILE);
        let (size, digest) = match packed {
            Some(packed) => (packed.size, packed.tarball),
            None => measure(&tarball)?,
        };
        if (size, digest) != (manifest.tarball.size, manifest.tarball.digest) {
            reject!(
                "{} has {size} bytes and {digest}, but {} says {} bytes and {}: pack the commit again",
                tarball.display(),
                path.display(),
                manifest.tarball.size,
                manifest.tarball.digest
            );
        }
        Ok(Self { manifest, bytes, tarball })
    }
}

fn measure(path: &Path) -> Result<(u64, Digest)> {
    let mut hasher = Hasher::new();
    let size = File::open(path).and_then(|file| hasher.update_from(stop::Reader(file)));
    Ok((size.with_context(|| format!("reading {}", path.display()))?, hasher.digest()))
}

async fn send(remote: &Remote, local: &Local, mut retry: Retry) -> Result<Published> {
    let digest = Digest::of(&local.bytes);
    let manifest_url = remote.url(&local.manifest, FILE)?;
    let changed = match retry.run("asking for the manifest", async || remote.stored(&manifest_url).await).await? {
        Some(stored) if stored == digest.to_string() => {
            tracing::info!("{manifest_url} is there already, with the same digest");
            false
        }
        Some(stored) => {
            let conflict = format!("{manifest_url} is there already, with {stored} instead of {digest}");
            return Err(immutable(Rejected::new(conflict).into()));
        }
        None => {
            send_tarball(remote, local, &mut retry).await?;
            retry
                .run("uploading the manifest", async || remote.put_manifest(&manifest_url, &local.bytes).await)
                .await?;
            true
        }
    };
    Ok(Published::new(&local.manifest, digest, &manifest_url, changed))
}

/// Uploads the tarball, from where an earlier try stopped, in this run or another.
async fn send_tarball(remote: &Remote, local: &Local, retry: &mut Retry) -> Result<()> {
    let tarball = &local.manifest.tarball;
    let url = remote.url(&local.manifest, TARBALL_FILE)?;
    let progress = Arc::new(Progress::bytes(format!("uploading {TARBALL_FILE}"), Some(tarball.size)));
    let (mut upload, mut furthest): (Option<Upload>, u64) = (None, 0);
    let (mut resumed, mut restarted) = (false, false);
    loop {
        let before = upload.as_ref().map(|upload| upload.offset);
        let step = match upload.take() {
            None => retry.bounded(remote.begin(&url, tarball)).await,
            Some(upload) => retry.bounded(remote.append(upload, &local.tarball, tarball.size, &progress)).await,
        };
        match step {
            Ok(Step::Done) => return Ok(()),
            Ok(Step::More(next)) if before.is_some_and(|before| next.offset <= before) => {
                let offset = next.offset;
                let error = anyhow!("{url}: the endpoint took nothing and is at byte {offset}");
                retry.pause("uploading the tarball", error).await?;
            }
            Ok(Step::More(next)) => {
                if before.is_none() && next.offset > 0 {
                    tracing::info!("the upload goes on at byte {} of {}", next.offset, tarball.size);
                    resumed = true;
                }
                if next.offset > furthest {
                    furthest = next.offset;
                    retry.progress();
                }
                progress.set(next.offset);
                upload = Some(next);
            }
            Ok(Step::Mismatch(error)) if resumed && !restarted => {
                // A power cut may have spoilt what the endpoint had of it.
                tracing::warn!("the upload starts again: {}", exit::chain(&error));
                (furthest, restarted) = (0, true);
            }
            Ok(Step::Mismatch(error)) => return Err(error),
            Err(error) => retry.pause("uploading the tarball", error).await?,
        }
    }
}
