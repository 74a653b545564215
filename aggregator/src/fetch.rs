//! `fetch`: downloads an artifact whose digest the caller knows, verifies it while
//! it streams, and leaves an OSTree repository.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use futures_util::TryStreamExt;
use oscontainer_artifact::digest::{Checksum, Digest};
use oscontainer_artifact::manifest::{self, Manifest};
use oscontainer_program::client::{self, ClientOptions};
use oscontainer_program::options::Global;
use oscontainer_program::progress::Progress;
use oscontainer_program::reject;
use reqwest::{Client, Url};
use serde::Serialize;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::repo::Staging;
use crate::verify::{self, Fetched};

/// What `fetch` takes.
#[derive(Debug, Clone, Args)]
pub struct FetchArgs {
    /// URL of the artifact's manifest.json
    #[arg(env = "OSCONTAINER_ARTIFACT_URL")]
    manifest_url: Url,
    /// The manifest's digest, sha256:…, as publish printed it
    #[arg(long, env = "OSCONTAINER_DIGEST")]
    digest: Digest,
    /// The repository: a new directory, or an archive-mode repository to add to
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_OUTPUT")]
    output: PathBuf,
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
    let fetched = runtime.block_on(download(&args))?;
    let staging = Staging::for_output(&args.output)?;
    let progress = Progress::bytes("downloading and verifying", Some(fetched.manifest.tarball.size));
    let verified = verify::verify(fetched, &staging, |bytes| progress.add(bytes))
        .with_context(|| format!("fetching {}", args.manifest_url))?;
    drop(progress);
    staging.publish(&verified)?;
    let manifest = verified.manifest();
    tracing::info!("{} is verified and in {}", manifest.commit, args.output.display());
    global.print(&Fetch {
        commit: manifest.commit,
        ref_name: manifest.ref_name.clone(),
        objects: verified.objects(),
        bytes: manifest.tarball.size,
    })
}

/// Downloads and checks the manifest, and begins with the tarball.
async fn download(args: &FetchArgs) -> Result<Fetched<impl Read + use<>>> {
    let url = &args.manifest_url;
    let client = args.client.client(url)?;
    let (manifest, url) = manifest(&client, url, &args.digest).await?;
    let url = url.join(&manifest.tarball.path).with_context(|| format!("finding the tarball beside {url}"))?;
    let response = client.get(url.clone()).send().await.with_context(|| format!("downloading {url}"))?;
    let response = client::success(response).await?;
    let size = manifest.tarball.size;
    if let Some(length) = response.content_length().filter(|length| *length != size) {
        reject!("{url} has {length} bytes, the manifest says {size}");
    }
    let stream = response.bytes_stream().map_err(std::io::Error::other);
    let tarball = SyncIoBridge::new(StreamReader::new(Box::pin(stream)));
    Ok(Fetched { manifest, tarball })
}

/// The manifest, and the URL where it was found after redirects.
async fn manifest(client: &Client, url: &Url, expected: &Digest) -> Result<(Manifest, Url)> {
    let downloading = || format!("downloading {url}");
    let response = client.get(url.clone()).send().await.with_context(downloading)?;
    let mut response = client::success(response).await?;
    let found_at = response.url().clone();
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.with_context(downloading)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > manifest::MAX_SIZE {
            reject!("the manifest at {url} is larger than the limit of {} bytes", manifest::MAX_SIZE);
        }
    }
    let found = Digest::of(&bytes);
    if found != *expected {
        reject!("the manifest at {url} has the digest {found}, expected is {expected}");
    }
    let manifest = Manifest::parse(&bytes).map_err(|e| anyhow!(e).context(format!("reading the manifest at {url}")))?;
    Ok((manifest, found_at))
}
