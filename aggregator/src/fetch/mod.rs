//! `fetch`: downloads an artifact whose digest the caller knows, verifies it while
//! it streams, and leaves an OSTree repository.

mod download;
mod partial;
mod piece;

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow, bail};
use clap::Args;
use oscontainer_artifact::digest::{Checksum, Digest};
use oscontainer_artifact::manifest::{self, Manifest};
use oscontainer_program::client::{self, Client, ClientOptions};
use oscontainer_program::exit::{self, Usage};
use oscontainer_program::options::Global;
use oscontainer_program::progress::Progress;
use oscontainer_program::reject;
use oscontainer_program::retry::Retry;
use oscontainer_program::server;
use reqwest::Url;
use serde::Serialize;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::image::container;
use crate::repo::Staging;
use crate::verify::{self, Fetched, Verified};
use download::Download;
use partial::Partial;
use piece::Origin;

/// How long a fetch that was told to stop may take to clean up.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// What `fetch` takes.
#[derive(Debug, Clone, Args)]
pub struct FetchArgs {
    /// URL of the artifact's manifest.json: http, https, or file (a tarball that was carried here by hand)
    #[arg(env = "OSCONTAINER_ARTIFACT_URL")]
    manifest_url: Url,
    /// The manifest's digest, sha256:…, as publish printed it
    #[arg(long, env = "OSCONTAINER_DIGEST")]
    digest: Digest,
    /// The repository: a new directory, or an archive-mode repository to add to
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_OUTPUT")]
    output: PathBuf,
    /// Keep what was downloaded here until it is whole, for a later run to go on with
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_RESUME_DIR")]
    resume_dir: Option<PathBuf>,
    /// How many connections a large tarball comes over, in pieces of 8 MiB, where the server knows ranges
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32),
        env = "OSCONTAINER_CONNECTIONS")]
    connections: u8,
    /// In a container build: the image's directory of layer indexes, /usr/share/oscontainer/layers; the
    /// index of what is added goes there, so that `image --previous` takes the result
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_LAYER_INDEX")]
    layer_index: Option<PathBuf>,
    #[command(flatten)]
    client: ClientOptions,
}

/// What `fetch` prints.
#[derive(Serialize)]
struct Fetch {
    commit: Checksum,
    #[serde(rename = "ref")]
    ref_name: String,
    /// Objects in the tarball.
    objects: u64,
    /// Bytes of the tarball.
    bytes: u64,
}

/// Runs the command: download, verify, publish.
pub fn main(args: FetchArgs, global: &Global) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let stop = stop_on_signals(&runtime)?;
    let retry = Retry::new(&args.client.retry);
    let (staging, verified) = match attempt(&args, &runtime, &stop, &retry)? {
        Attempt::Verified(done) => *done,
        Attempt::BadPartial(error) => {
            // A power cut may have left anything in it.
            tracing::warn!("what an earlier run left is not to be used: {}", exit::chain(&error));
            match attempt(&args, &runtime, &stop, &retry)? {
                Attempt::Verified(done) => *done,
                Attempt::BadPartial(error) => return Err(error),
            }
        }
    };
    let manifest = verified.manifest();
    let written = args.layer_index.as_ref().map(|_| staging.written()).transpose()?;
    staging.publish(&verified, args.digest)?;
    if let Some(dir) = &args.resume_dir {
        Partial::remove(dir, &manifest.tarball)?;
    }
    if let (Some(directory), Some(written)) = (&args.layer_index, written) {
        let (ref_name, reached) = (manifest.ref_name.as_str(), verified.objects());
        let added = container::Added { ref_name, commit: manifest.commit, reached, written };
        container::write_index(directory, &args.output, added).context("writing the index of the layer")?;
    }
    tracing::info!("{} is verified and in {}", manifest.commit, args.output.display());
    global.print(&Fetch {
        commit: manifest.commit,
        ref_name: manifest.ref_name.clone(),
        objects: verified.objects().len() as u64,
        bytes: manifest.tarball.size,
    })
}

/// How an attempt ended that did not fail altogether.
enum Attempt {
    Verified(Box<(Staging, Verified)>),
    /// What was in `--resume-dir` was rejected, and is gone.
    BadPartial(Error),
}

/// Downloads and verifies once.
fn attempt(args: &FetchArgs, runtime: &Runtime, stop: &CancellationToken, retry: &Retry) -> Result<Attempt> {
    let (fetched, found) = match args.manifest_url.scheme() {
        "http" | "https" => runtime.block_on(remote(args, stop, retry.renewed()))?,
        "file" => (local(&args.manifest_url, &args.digest)?, 0),
        _ => return Err(Usage(format!("{}: expected an http, https or file URL", args.manifest_url)).into()),
    };
    if let Some(directory) = &args.layer_index {
        container::goes_on(directory, &fetched.manifest.ref_name)?;
    }
    let staging = Staging::for_output(&args.output)?;
    let tarball = fetched.manifest.tarball.clone();
    let progress = Progress::bytes("downloading and verifying", Some(tarball.size));
    let failed = Cell::new(false);
    let fetched =
        Fetched { manifest: fetched.manifest, tarball: Source { inner: fetched.tarball, stop, failed: &failed } };
    let verified = verify::verify(fetched, &staging, |bytes| progress.add(bytes))
        .with_context(|| format!("fetching {}", args.manifest_url));
    match verified {
        Ok(verified) => Ok(Attempt::Verified(Box::new((staging, verified)))),
        Err(error) => {
            // A server that gives no more of it says nothing about what is here.
            if let Some(dir) = &args.resume_dir
                && exit::code(&error) == exit::REJECTED
                && !failed.get()
            {
                Partial::remove(dir, &tarball)?;
                if found > 0 {
                    return Ok(Attempt::BadPartial(error));
                }
            }
            Err(error)
        }
    }
}

/// Lets SIGTERM and SIGINT end the transfer as an error does, so that nothing is left.
fn stop_on_signals(runtime: &Runtime) -> Result<CancellationToken> {
    let _entered = runtime.enter();
    let stop = server::stop_on_signals()?;
    let stopping = stop.clone();
    runtime.spawn(async move {
        stopping.cancelled().await;
        tokio::time::sleep(STOP_TIMEOUT).await;
        // It waits for another process or a slow disk; what it leaves the next run removes.
        #[expect(clippy::disallowed_methods, reason = "there is nobody left who could return")]
        std::process::exit(i32::from(exit::RETRY));
    });
    Ok(stop)
}

/// A reader that ends with an error once it is to stop.
struct Source<'a, R> {
    inner: R,
    stop: &'a CancellationToken,
    /// Set when it cannot be read to its end.
    failed: &'a Cell<bool>,
}

impl<R: Read> Read for Source<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() {
            return Err(io::Error::other("stopped by a signal"));
        }
        self.inner.read(buffer).inspect_err(|_| self.failed.set(true))
    }
}

/// Downloads and checks the manifest, and begins with the tarball; also how much of
/// it an earlier run left.
async fn remote(args: &FetchArgs, stop: &CancellationToken, mut retry: Retry) -> Result<(Fetched<Box<dyn Read>>, u64)> {
    let url = &args.manifest_url;
    let client = args.client.client(url)?;
    let (manifest, url) = tokio::select! {
        () = stop.cancelled() => bail!("stopped by a signal"),
        found = retry.run("the download", async || manifest(&client, url, &args.digest).await) => found?,
    };
    let url = url.join(&manifest.tarball.path).with_context(|| format!("finding the tarball beside {url}"))?;
    let partial = args.resume_dir.as_ref().map(|dir| Partial::open(dir, &manifest.tarball)).transpose()?;
    let found = partial.as_ref().map_or(0, Partial::found);
    let origin = Origin::new(client, url, manifest.tarball.size);
    let download = Download::new(origin, retry, usize::from(args.connections), found, stop.clone());
    let tarball: Box<dyn Read> = match partial {
        Some(partial) => Box::new(partial.then(download)),
        None => Box::new(download),
    };
    Ok((Fetched { manifest, tarball }, found))
}

/// Opens the two files of an artifact on this machine: no less is checked of them.
fn local(url: &Url, expected: &Digest) -> Result<Fetched<Box<dyn Read>>> {
    let Ok(path) = url.to_file_path() else {
        return Err(Usage(format!("{url}: expected file:///absolute/path/manifest.json")).into());
    };
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(manifest::MAX_SIZE + 1).read_to_end(&mut bytes))
        .with_context(|| format!("reading {}", path.display()))?;
    let manifest = pinned(url, &bytes, expected)?;
    let path = path.with_file_name(&manifest.tarball.path);
    let opening = || format!("opening {}", path.display());
    let tarball = File::open(&path).with_context(opening)?;
    let (found, size) = (tarball.metadata().with_context(opening)?.len(), manifest.tarball.size);
    if found != size {
        reject!("{} has {found} bytes, the manifest says {size}", path.display());
    }
    Ok(Fetched { manifest, tarball: Box::new(tarball) })
}

/// The manifest, and the URL where it was found after redirects.
async fn manifest(client: &Client, url: &Url, expected: &Digest) -> Result<(Manifest, Url)> {
    let downloading = || format!("downloading {url}");
    let response = client.get(url)?.send().await.with_context(downloading)?;
    let mut response = client::success(response).await?;
    let found_at = response.url().clone();
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.with_context(downloading)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > manifest::MAX_SIZE {
            break;
        }
    }
    Ok((pinned(url, &bytes, expected)?, found_at))
}

/// The manifest in `bytes`, if it is the one that is expected.
fn pinned(url: &Url, bytes: &[u8], expected: &Digest) -> Result<Manifest> {
    if bytes.len() as u64 > manifest::MAX_SIZE {
        reject!("the manifest at {url} is larger than the limit of {} bytes", manifest::MAX_SIZE);
    }
    let found = Digest::of(bytes);
    if found != *expected {
        reject!("the manifest at {url} has the digest {found}, expected is {expected}");
    }
    Manifest::parse(bytes).map_err(|e| anyhow!(e).context(format!("reading the manifest at {url}")))
}
