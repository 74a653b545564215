//! `endpoint`: the artifact endpoint. It stores what builders publish and serves it
//! to aggregators and to people; the protocol is in docs/artifact.md.
//!
//!     routes ─▶ auth ─▶ upload ─▶ store        PUT
//!     routes ─▶ store ─▶ files::respond        GET, HEAD

mod auth;
mod metrics;
mod page;
mod reply;
mod routes;
mod store;
mod timestamp;
mod upload;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use oscontainer_program::exit::Usage;
use oscontainer_program::options::Global;
use oscontainer_program::server;
use reqwest::Url;

use auth::Writers;
use store::Store;

/// Options of `endpoint`.
#[derive(Debug, Clone, Args)]
pub struct EndpointArgs {
    /// Address and port to listen on
    #[arg(long, value_name = "ADDR", env = "OSCONTAINER_LISTEN")]
    listen: SocketAddr,
    /// Where artifacts are kept: a directory, as a path or file:// URI
    #[arg(long, value_name = "URI", env = "OSCONTAINER_STORE")]
    store: String,
    /// File with the bearer token that may write, read anew when it changes; without it, writes are refused
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Largest file that is taken: bytes, or with KiB, MiB, GiB or TiB
    #[arg(long, value_name = "SIZE", default_value = "64GiB", value_parser = size, env = "OSCONTAINER_MAX_SIZE")]
    max_size: u64,
}

/// Serves until SIGTERM or SIGINT.
pub fn main(args: EndpointArgs, _global: &Global) -> Result<()> {
    let dir = directory(&args.store)?;
    let writers = Writers::from_option(args.token_file.as_deref())?;
    let store = Store::open(&dir)?;
    let router = routes::router(store, writers, args.max_size);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(server::serve(args.listen, router))
}

/// The directory that a store's URI names.
fn directory(uri: &str) -> Result<PathBuf> {
    let Some((scheme, _)) = uri.split_once("://") else { return Ok(PathBuf::from(uri)) };
    if scheme != "file" {
        let text = format!("--store {uri}: {scheme}:// stores come with a later version; give a directory for now");
        return Err(Usage(text).into());
    }
    let path = Url::parse(uri).ok().and_then(|url| url.to_file_path().ok());
    path.ok_or_else(|| Usage(format!("--store {uri}: expected file:///absolute/path")).into())
}

fn size(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(format!("{unit:?} is not KiB, MiB, GiB or TiB")),
    };
    let number: u64 = number.parse().map_err(|_| "expected a number of bytes".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "larger than any file".to_owned())
}
