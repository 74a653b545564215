//! Runs a router on an address until SIGTERM or SIGINT, and lets transfers that
//! are under way end.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use axum::Router;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Serves `router` on `listen`; the address that was really bound (port 0 picks a
/// free one) is logged as `listening on http://…`.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(listen: SocketAddr, router: Router) -> Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    tracing::info!("listening on http://{}", listener.local_addr()?);
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("stopping: no new connections, transfers under way may end");
    };
    axum::serve(listener, router).with_graceful_shutdown(stop).await.context("serving")
}
