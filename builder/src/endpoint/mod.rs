//! `endpoint`: the artifact endpoint. It stores what builders publish and serves it
//! to aggregators and to people; the protocol is in docs/artifact.md.
//!
//!     routes ─▶ auth ─▶ upload ─▶ store        PUT; auth asks review, review the cluster
//!     routes ─▶ auth ─▶ resume ─▶ store        PUT that only begins, then PATCH
//!     routes ─▶ store ─▶ files::respond        GET, HEAD
//!     routes ─▶ store ─▶ page, compare         for people

mod auth;
mod compare;
mod fresh;
mod housekeeping;
mod metrics;
mod page;
mod rate;
mod reply;
mod resume;
mod review;
mod routes;
mod store;
mod upload;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use oscontainer_program::options::Global;
use oscontainer_program::server::{self, ServerOptions};

use auth::{Access, AccessOptions};
use housekeeping::KeepOptions;
use routes::Limits;
use store::{Store, StoreOptions};

/// Options of `endpoint`.
#[derive(Debug, Clone, Args)]
pub struct EndpointArgs {
    /// Address and port to listen on
    #[arg(long, value_name = "ADDR", env = "OSCONTAINER_LISTEN")]
    listen: SocketAddr,
    #[command(flatten)]
    store: StoreOptions,
    #[command(flatten)]
    access: AccessOptions,
    #[command(flatten)]
    server: ServerOptions,
    /// Largest file that is taken: bytes, or with KiB, MiB, GiB or TiB
    #[arg(long, value_name = "SIZE", default_value = "64GiB", value_parser = size, env = "OSCONTAINER_MAX_SIZE")]
    max_size: u64,
    /// How long unfinished uploads, and tarballs without a manifest, are kept: a number with s, m, h or d
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = duration, env = "OSCONTAINER_UPLOAD_EXPIRY")]
    upload_expiry: Duration,
    /// Most bytes that are stored in all, or with KiB, MiB, GiB or TiB [default: what fits the disk]
    #[arg(long, value_name = "SIZE", value_parser = size, env = "OSCONTAINER_QUOTA")]
    quota: Option<u64>,
    /// Requests a second that one client address may make, in bursts of ten seconds' worth [default: no limit]
    #[arg(long, value_name = "N", env = "OSCONTAINER_CLIENT_RATE")]
    client_rate: Option<NonZeroU32>,
    #[command(flatten)]
    keep: KeepOptions,
}

/// How long the store may take to end what it is at, when everything else has.
const LEAVE: Duration = Duration::from_secs(10);

/// Serves until SIGTERM or SIGINT.
pub fn main(args: EndpointArgs, _global: &Global) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    let served = runtime.block_on(async {
        // A container's first process has no other way to end.
        let stop = server::stop_on_signals()?;
        let access = Access::new(&args.access).await?;
        let limits = Limits {
            max_size: args.max_size,
            upload_expiry: args.upload_expiry,
            client_timeout: args.server.client_timeout(),
            client_rate: args.client_rate,
            keep: args.keep.clone(),
        };
        let opening = tokio::task::spawn_blocking(move || Store::open(&args.store, args.quota));
        let store = tokio::select! {
            opened = opening => Arc::new(opened.context("opening the store")??),
            () = stop.cancelled() => bail!("stopped by a signal before the store was open"),
        };
        let (router, housekeeping) = routes::router(store.clone(), access, limits);
        server::serve(args.listen, router, &args.server, stop).await?;
        housekeeping.stop().await;
        tokio::task::spawn_blocking(move || store.close()).await.context("closing the store")
    });
    runtime.shutdown_timeout(LEAVE);
    served
}

/// Reads a number of bytes, or of a unit.
///
/// # Errors
/// Says what was expected.
pub fn size(text: &str) -> Result<u64, String> {
    let units = [("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
    quantity(text, "bytes, or with KiB, MiB, GiB or TiB", &units)
}

fn duration(text: &str) -> Result<Duration, String> {
    let units = [("s", 1), ("m", 60), ("h", 60 * 60), ("d", 24 * 60 * 60)];
    quantity(text, "with s, m, h or d", &units).map(Duration::from_secs)
}

/// A number and one of these units.
fn quantity(text: &str, expected: &str, units: &[(&str, u64)]) -> Result<u64, String> {
    let (number, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
    let factor = units.iter().find_map(|(name, factor)| (*name == unit).then_some(*factor));
    let quantity = factor.and_then(|factor| number.parse::<u64>().ok()?.checked_mul(factor));
    quantity.ok_or_else(|| format!("expected a number {expected}"))
}
