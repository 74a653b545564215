//! The newest artifact of an endpoint as the commit before: a builder without its own
//! repository goes on where another one stopped. Unchanged input is then not composed
//! again, uids and gids stay, and objects that are there are not deflated again.

use std::fs::{self, File};
use std::io::{self, BufReader, ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use oscontainer_artifact::Rejected;
use oscontainer_artifact::digest::Hasher;
use oscontainer_artifact::manifest::{FILE, MAX_SIZE, Manifest};
use oscontainer_artifact::object::ObjectName;
use oscontainer_artifact::protocol::Name;
use oscontainer_program::client::{Client, ClientOptions, success};
use oscontainer_program::progress::Progress;
use oscontainer_program::retry::Retry;
use oscontainer_program::{reject, stop};
use reqwest::{Response, StatusCode, Url};
use tar::{Archive, EntryType};

use crate::compose::commit;

/// The most bytes of an extended header: a path in it has at most 4096 (Linux, PATH_MAX).
const MAX_EXTENDED: u64 = 8 << 10;

/// Takes the newest version of the artifact `name` into the repository at `repo`, verified,
/// and sets `ref_name`; nothing where the endpoint has none of this ref. `work` is a
/// directory for what is on the way.
///
/// # Errors
/// Rejected when the artifact contradicts itself; else when the endpoint cannot be reached.
pub fn restore(
    (endpoint, client): (&Url, &ClientOptions),
    name: &Name,
    ref_name: &str,
    repo: &Path,
    work: &Path,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    let tarball = work.join("previous.tar");
    let manifest = runtime.block_on(stop::or(download((endpoint, client), name, ref_name, &tarball)))?;
    let Some(manifest) = manifest else { return Ok(()) };
    let unpacked = work.join("previous");
    unpack(&tarball, &manifest, &unpacked).with_context(|| format!("reading the newest artifact of {name}"))?;
    commit::import(repo, &unpacked, ref_name, &manifest.commit.to_string())?;
    fs::remove_dir_all(&unpacked)?;
    fs::remove_file(&tarball)?;
    tracing::info!("the commit before is {}, version {} of {name} at the endpoint", manifest.commit, manifest.version);
    Ok(())
}

async fn download(
    (endpoint, options): (&Url, &ClientOptions),
    name: &Name,
    ref_name: &str,
    tarball: &Path,
) -> Result<Option<Manifest>> {
    let client = options.client(endpoint)?;
    let mut retry = Retry::new(&options.retry);
    let latest = format!("{}/v1/artifacts/{name}/latest/{FILE}", endpoint.as_str().trim_end_matches('/'));
    let latest = Url::parse(&latest).with_context(|| format!("reading the URL {latest}"))?;
    let found = retry.run("asking for the newest artifact", async || manifest(&client, &latest).await).await?;
    let Some((manifest, url)) = found else {
        tracing::info!("the endpoint has no artifact {name} yet: there is no commit before this one");
        return Ok(None);
    };
    if manifest.ref_name != ref_name {
        tracing::info!(
            "the artifact {name} is of the ref {}, not {ref_name}: it is no commit before",
            manifest.ref_name
        );
        return Ok(None);
    }
    // Where the manifest was found, for `latest` may be another version by now.
    let url = url.join(&manifest.tarball.path).context("finding the tarball beside its manifest")?;
    retry.run("downloading the newest artifact", async || fetch(&client, &url, &manifest, tarball).await).await?;
    Ok(Some(manifest))
}

/// The manifest at `url`, with the URL that this led to; `None` where there is none.
async fn manifest(client: &Client, url: &Url) -> Result<Option<(Manifest, Url)>> {
    let response = client.get(url)?.send().await.with_context(|| format!("asking {url}"))?;
    if response.status() == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    let mut response = success(response).await?;
    let led_to = response.url().clone();
    let mut bytes = Vec::new();
    while let Some(chunk) = chunk(&mut response).await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > MAX_SIZE {
            reject!("{url} is larger than a manifest may be");
        }
    }
    let manifest = Manifest::parse(&bytes).with_context(|| format!("reading {url}"))?;
    Ok(Some((manifest, led_to)))
}

async fn fetch(client: &Client, url: &Url, manifest: &Manifest, tarball: &Path) -> Result<()> {
    let expected = &manifest.tarball;
    let mut response = success(client.get(url)?.send().await.with_context(|| format!("asking {url}"))?).await?;
    let progress = Progress::bytes("downloading the newest artifact", Some(expected.size));
    let mut file = File::create(tarball).with_context(|| format!("writing {}", tarball.display()))?;
    let (mut hasher, mut size) = (Hasher::new(), 0);
    while let Some(chunk) = chunk(&mut response).await? {
        size += chunk.len() as u64;
        if size > expected.size {
            reject!("{url} is larger than the {} bytes that its manifest says", expected.size);
        }
        hasher.update(&chunk);
        file.write_all(&chunk).with_context(|| format!("writing {}", tarball.display()))?;
        progress.add(chunk.len() as u64);
    }
    ensure!(size == expected.size, "{url} ended after {size} of {} bytes", expected.size);
    let digest = hasher.digest();
    if digest != expected.digest {
        reject!("{url} has {digest}, its manifest says {}", expected.digest);
    }
    Ok(())
}

async fn chunk(response: &mut Response) -> Result<Option<bytes::Bytes>> {
    let url = response.url().clone();
    response.chunk().await.with_context(|| format!("reading {url}"))
}

/// Unpacks the objects into a repository of their own, which nobody has verified yet.
fn unpack(tarball: &Path, manifest: &Manifest, target: &Path) -> Result<()> {
    commit::open(target)?;
    let mut archive = Archive::new(BufReader::new(File::open(tarball)?));
    // An extended header is an entry like any other here: nothing of the archive is kept in memory.
    for entry in archive.entries()?.raw(true) {
        let entry = entry.map_err(|error| malformed(error, manifest))?;
        let (kind, size) = (entry.header().entry_type(), entry.size());
        match kind {
            EntryType::Regular | EntryType::Directory => {}
            // It has the path of a ref that is too long for a header of its own.
            EntryType::XHeader if size <= MAX_EXTENDED => {}
            _ => reject!(
                "the tarball of commit {} has an entry of type {:?} and {size} bytes, which no artifact has",
                manifest.commit,
                char::from(kind.as_byte())
            ),
        }
        let path = entry.path_bytes();
        // All else is the same in every artifact.
        let Some(name) = std::str::from_utf8(&path).ok().and_then(ObjectName::from_path) else { continue };
        if kind != EntryType::Regular {
            reject!("{name} is not a file in the tarball of commit {}", manifest.commit);
        }
        let place = target.join(name.path());
        fs::create_dir_all(place.parent().context("objects lie in directories")?)?;
        let mut file = match File::create_new(&place) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                reject!("{name} is twice in the tarball of commit {}", manifest.commit)
            }
            file => file.with_context(|| format!("unpacking {name}"))?,
        };
        io::copy(&mut stop::Reader(entry), &mut file).with_context(|| format!("unpacking {name}"))?;
    }
    Ok(())
}

/// Why an entry cannot be read: the disk's fault, or the archive's.
fn malformed(error: io::Error, manifest: &Manifest) -> anyhow::Error {
    match error.raw_os_error() {
        Some(_) => error.into(),
        None => Rejected::new(format!("the tarball of commit {} is no archive: {error}", manifest.commit)).into(),
    }
}
