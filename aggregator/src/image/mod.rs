//! `image`: a repository and the server become the oscontainer, an OCI image, without
//! any container daemon. Its layers are a log: the first brings the server, the
//! next the repository, and each says in its own index what it holds.
//!
//!     repository ─▶ source ─▶ index ─▶ layer ─▶ output (oci:, oci-archive:)
//!     server binary ────────▶ index ─▶ layer ─┘

mod document;
mod index;
mod layer;
mod output;
mod reference;
mod server;
mod source;
mod stored_gzip;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use oci_spec::image::MediaType;
use oscontainer_artifact::digest::Digest;
use oscontainer_artifact::tarball;
use oscontainer_program::exit::Usage;
use oscontainer_program::options::Global;
use serde::Serialize;

use index::{Brings, DIRECTORY, FileEntry, Index, REPO};
use layer::{Contents, Layer};
use output::Output;
use reference::Reference;
use server::Server;
use source::Source;

/// Options of `image`.
#[derive(Debug, Clone, Args)]
pub struct ImageArgs {
    /// Archive-mode OSTree repository, such as `fetch` makes it
    #[arg(long, value_name = "DIR", env = "OSCONTAINER_REPO")]
    repo: PathBuf,
    /// Ref to take; needed when the repository has several
    #[arg(long = "ref", value_name = "REF", env = "OSCONTAINER_REF")]
    ref_name: Option<String>,
    /// Where the image goes: oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    #[arg(long, value_name = "IMAGE", env = "OSCONTAINER_IMAGE")]
    output: String,
    /// Static executable that becomes the image's server [default: the running program]
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_SERVER")]
    server: Option<PathBuf>,
}

/// What `image` prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Printed {
    /// The output as it was given.
    image: String,
    /// The digest of the image's manifest.
    digest: Digest,
    /// Bytes of the layers that no earlier image has.
    new_bytes: u64,
    /// How many layers the image has.
    layers: usize,
    /// Whether the image begins a new log of layers.
    fresh: bool,
}

/// Assembles the image.
///
/// # Errors
/// Wrong usage, a repository that is not whole, or a result that cannot be written.
pub fn main(args: ImageArgs, global: &Global) -> Result<()> {
    let reference: Reference = args.output.parse().map_err(|e| Usage(format!("--output {}: {e}", args.output)))?;
    let server = Server::open(args.server.as_deref())?;
    let source = Source::open(&args.repo, args.ref_name.as_deref())?;
    let mut output = Output::create(&reference)?;

    let architecture = server.architecture;
    let base = base_index(&server);
    let repo = repo_index(std::slice::from_ref(&base), &source);
    let layers = [base_layer(&mut output, &base, server)?, repo_layer(&mut output, &repo, &source)?];

    let config = store(&mut output, MediaType::ImageConfig, &document::config(&source.commit, architecture, &layers)?)?;
    let manifest = document::manifest(&source.commit, config, &layers)?;
    let manifest = store(&mut output, MediaType::ImageManifest, &manifest)?;
    let digest = manifest.digest().to_string().parse()?;
    output.finish(document::platform(manifest, architecture)?)?;
    global.print(&Printed {
        image: reference.to_string(),
        digest,
        new_bytes: layers.iter().map(|layer| layer.size).sum(),
        layers: layers.len(),
        fresh: true,
    })
}

/// The first layer: the server.
fn base_index(server: &Server) -> Index {
    let mut index = Index::new(0, None);
    index.add_directory(&[], DIRECTORY);
    index.add_directory(&[], "usr/bin");
    index.files.push(FileEntry { path: document::SERVER.to_owned(), size: server.size, executable: true });
    index
}

fn base_layer(output: &mut Output, index: &Index, server: Server) -> Result<Layer> {
    tracing::info!("the server is {}, for {}", server.path.display(), server.architecture);
    let files = BTreeMap::from([(document::SERVER.to_owned(), Box::new(server.file) as Box<dyn Read>)]);
    layer::write(output, index, Contents { object: &|name| anyhow::bail!("{name} is not here"), files })
}

/// The layer that brings the source's commit: what it reaches, then the ref, then the
/// files that a repository must have.
fn repo_index(earlier: &[Index], source: &Source) -> Index {
    let commit = &source.commit;
    let brings = Brings { ref_name: commit.ref_name.clone(), commit: commit.checksum };
    let mut index = Index::new(earlier.len() as u32, Some(brings));
    index.add_directory(earlier, DIRECTORY);
    for directory in tarball::DIRECTORIES {
        index.add_directory(earlier, &format!("{REPO}/{directory}"));
    }
    let first_digits: BTreeSet<_> = source.objects.keys().map(|name| &name[..2]).collect();
    for digits in first_digits {
        index.add_directory(earlier, &format!("{REPO}/objects/{digits}"));
    }
    index.objects.clone_from(&source.objects);
    for (path, content) in source.files() {
        if let Some((directory, _)) = path.rsplit_once('/') {
            index.add_directory(earlier, directory);
        }
        index.files.push(FileEntry { path, size: content.len() as u64, executable: false });
    }
    index
}

fn repo_layer(output: &mut Output, index: &Index, source: &Source) -> Result<Layer> {
    let open = |content: Vec<u8>| Box::new(std::io::Cursor::new(content)) as Box<dyn Read>;
    let files = source.files().into_iter().map(|(path, content)| (path, open(content))).collect();
    layer::write(output, index, Contents { object: &|name| source.object(name), files })
}

/// Stores a JSON document of the image and describes it.
fn store(output: &mut Output, media_type: MediaType, content: &impl Serialize) -> Result<oci_spec::image::Descriptor> {
    let bytes = document::bytes(content)?;
    let size = bytes.len() as u64;
    let digest = output.blob(size, |file| {
        std::io::Write::write_all(file, &bytes)?;
        Ok(Digest::of(&bytes))
    })?;
    document::descriptor(media_type, size, digest)
}
