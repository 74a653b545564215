//! `image`: a repository and the server become the oscontainer, an OCI image, without
//! any container daemon. Its layers are a log: the first brings the server, the
//! next the repository, and each says in its own index what it holds. The next image
//! keeps them and adds one.
//!
//!     previous image ─▶ previous ─▶ log ─┐
//!     repository ─────▶ source ──────────┼▶ plan ─▶ layer ─▶ output (oci:, oci-archive:, docker://)
//!     server binary ──▶ server ──────────┘

mod connection;
pub mod container;
mod credentials;
mod document;
mod download;
mod facts;
mod index;
mod input;
mod layer;
mod layout;
mod layout_output;
mod log;
mod output;
mod parallel;
mod plan;
mod previous;
mod reference;
mod referrers;
mod refusal;
mod registry;
mod registry_output;
mod section;
mod server;
mod source;
mod stored_gzip;
mod token;
mod upload;

use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use oci_spec::image::{Descriptor, MediaType};
use oscontainer_artifact::digest::Digest;
use oscontainer_program::exit::Usage;
use oscontainer_program::options::Global;
use oscontainer_program::outcome;
use serde::Serialize;

use connection::RegistryOptions;
use output::Output;
use plan::{Limits, Plan};
use previous::{Previous, Wanted};
use reference::Reference;
use registry::Registries;
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
    /// Where the image goes: oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://HOST/NAME:TAG
    #[arg(long, value_name = "IMAGE", env = "OSCONTAINER_IMAGE", required_unless_present = "push")]
    output: Option<String>,
    /// Push it to this name in a registry instead, upon the image that is there, if there is one
    #[arg(long, value_name = "HOST/NAME:TAG", conflicts_with = "previous", env = "OSCONTAINER_PUSH")]
    push: Option<String>,
    /// Write the result as one line of JSON, also after a failure (a pod's termination message)
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_RESULT_FILE")]
    result_file: Option<PathBuf>,
    /// The image before this one, in the same forms (docker:// with a tag or a digest): its layers stay
    /// as they are, and one new layer holds what is new
    #[arg(long, value_name = "IMAGE", env = "OSCONTAINER_PREVIOUS")]
    previous: Option<String>,
    /// Read all layers of a previous image in a registry and compare them with their indexes
    #[arg(long, requires = "previous", env = "OSCONTAINER_VERIFY_PREVIOUS")]
    verify_previous: bool,
    /// Begin a new log of layers all the same
    #[arg(long, env = "OSCONTAINER_FRESH")]
    fresh: bool,
    /// How many commits stay pullable when a new log begins, the new one included
    #[arg(long, value_name = "N", default_value_t = 1, env = "OSCONTAINER_KEEP_COMMITS",
          value_parser = clap::value_parser!(u16).range(1..=100))]
    keep_commits: u16,
    /// Begin a new log of layers when more than this share of the bytes is of no use to the kept commits
    #[arg(long, value_name = "PERCENT", default_value_t = 25, env = "OSCONTAINER_MAX_WASTE",
          value_parser = clap::value_parser!(u8).range(..=100))]
    max_waste: u8,
    /// Begin a new log of layers when there would be more layers than this
    #[arg(long, value_name = "N", default_value_t = 64, env = "OSCONTAINER_MAX_LAYERS",
          value_parser = clap::value_parser!(u16).range(2..=125))]
    max_layers: u16,
    /// Add the image to the image index under the output's tag, in place of the one for the same machine,
    /// or begin one: for hosts of several machines under one name
    #[arg(long, env = "OSCONTAINER_IMAGE_INDEX")]
    index: bool,
    /// Static executable that becomes the image's server [default: the running program]
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_SERVER")]
    server: Option<PathBuf>,
    #[command(flatten)]
    registry: RegistryOptions,
}

/// What `image` prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Printed {
    /// The output as it was given.
    image: String,
    /// The digest of the image's manifest.
    digest: Digest,
    /// The digest of the image index that the image is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<Digest>,
    /// Bytes of the layers that no earlier image has.
    new_bytes: u64,
    /// How many layers the image has.
    layers: usize,
    /// Whether the image begins a new log of layers.
    fresh: bool,
    /// The digest of the previous image's manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<Digest>,
}

/// Assembles the image.
///
/// # Errors
/// Wrong usage, a repository or a previous image that is not whole, or a result that
/// cannot be written.
pub fn main(args: ImageArgs, global: &Global) -> Result<()> {
    let result = assemble(&args);
    if let Some(file) = &args.result_file {
        outcome::write(file, &result)?;
    }
    global.print(&result?)
}

fn assemble(args: &ImageArgs) -> Result<Printed> {
    if args.keep_commits >= args.max_layers {
        let wanted = args.keep_commits + 1;
        return Err(Usage(format!(
            "--keep-commits {} needs --max-layers {wanted} or more: one for the server, and one for each commit",
            args.keep_commits
        ))
        .into());
    }
    let registries = Registries::new(&args.registry);
    let (reference, previous) = places(args)?;
    let server = server::Opened::open(args.server.as_deref())?;
    let source = source::Opened::open(&args.repo, args.ref_name.as_deref())?;
    let wanted = previous.as_ref().map(|reference| Wanted {
        reference,
        architecture: server.architecture,
        verify: args.verify_previous,
        optional: is_push(args),
        new_machine: args.index || args.fresh,
    });
    // Nothing is read for what has no place to go.
    let output = args.index.then(|| Output::create(&reference, &registries)).transpose()?;
    output.as_ref().map(Output::takes_machines).transpose()?;
    // Files are read while registries are waited for.
    let (mut output, previous, server, source) = thread::scope(|scope| {
        let (server, source) = (scope.spawn(|| server.read()), scope.spawn(|| source.walk()));
        // Before the image there is read: who may write may read, so one token is enough.
        let output = output.map_or_else(|| Output::create(&reference, &registries), Ok)?;
        let previous = wanted.and_then(|wanted| Previous::open(&wanted, &registries).transpose()).transpose()?;
        let panicked = |_| anyhow!("a thread panicked");
        let (server, source) = (server.join().map_err(panicked)?, source.join().map_err(panicked)?);
        Ok::<_, anyhow::Error>((output, previous, server?, source?))
    })?;
    if let Some(previous) = &previous {
        tracing::info!("the previous image {} is {}", previous.reference(), previous.digest);
    }
    let limits = Limits {
        fresh: args.fresh,
        keep_commits: args.keep_commits.into(),
        max_waste: args.max_waste.into(),
        max_layers: args.max_layers.into(),
    };
    let plan = Plan::new(&source, &server, previous.as_ref(), &limits)?;
    let written = write(&mut output, &plan, &source, server.architecture, previous.as_ref())?;
    let finished = output.finish(&written.manifest, server.architecture, &source.commit, args.index)?;
    Ok(Printed {
        image: reference.to_string(),
        digest: finished.digest,
        index: finished.index,
        new_bytes: written.new_bytes,
        layers: written.layers,
        fresh: plan.fresh(),
        previous: previous.as_ref().map(|previous| previous.digest),
    })
}

/// Whether the image goes upon what is in the registry. A variable that is set to nothing is not set.
fn is_push(args: &ImageArgs) -> bool {
    args.push.as_ref().is_some_and(|name| !name.is_empty())
}

/// Where the image goes, and where the one before it is.
fn places(args: &ImageArgs) -> Result<(Reference, Option<Reference>)> {
    let parse = |option: &str, text: &str| -> Result<Reference> {
        Ok(text.parse().map_err(|e| Usage(format!("--{option} {text}: {e}")))?)
    };
    if let Some(name) = args.push.as_deref().filter(|_| is_push(args)) {
        let reference = parse("push", &format!("docker://{name}"))?;
        return Ok((reference.clone(), Some(reference)));
    }
    let Some(output) = &args.output else { return Err(Usage("--output or --push is needed".into()).into()) };
    Ok((parse("output", output)?, args.previous.as_deref().map(|text| parse("previous", text)).transpose()?))
}

struct Written {
    manifest: Vec<u8>,
    new_bytes: u64,
    layers: usize,
}

/// Writes layers, config and manifest. Where nothing is new the image is the previous
/// one, to the digest.
fn write(
    output: &mut Output,
    plan: &Plan<'_>,
    source: &Source,
    architecture: &str,
    previous: Option<&Previous>,
) -> Result<Written> {
    let kept = previous.map_or(&[][..], |previous| &previous.layers[..plan.kept]);
    let mut layers = Vec::new();
    for kept in kept {
        if let Some(previous) = previous {
            let kept = output.keep(previous, &kept.layer).with_context(|| format!("taking over {}", kept.layer.digest));
            kept?;
        }
        layers.push(kept.layer);
    }
    for index in &plan.new {
        layers.push(layer::write(output, index, plan.contents())?);
    }
    let new_bytes = layers[plan.kept..].iter().map(|layer| layer.size).sum();
    let base = previous.filter(|_| !plan.fresh());
    let manifest = match base {
        Some(previous) if plan.new.is_empty() && previous.is_oci() => {
            tracing::info!("nothing is new: the image is the previous one");
            store(output, &previous.config)?;
            previous.manifest.clone()
        }
        _ => {
            let base = base.map(|previous| &previous.digest);
            let config = document::config(&source.commit, base, architecture, &layers)?;
            let config = store(output, &document::bytes(&config)?)?;
            document::bytes(&document::manifest(&source.commit, base, config, &layers)?)?
        }
    };
    Ok(Written { manifest, new_bytes, layers: layers.len() })
}

/// Stores the image's config and describes it.
fn store(output: &mut Output, bytes: &[u8]) -> Result<Descriptor> {
    let size = bytes.len() as u64;
    let digest = output.blob(size, &mut |out| {
        out.write_all(bytes)?;
        Ok(Digest::of(bytes))
    })?;
    document::descriptor(MediaType::ImageConfig, size, digest)
}
