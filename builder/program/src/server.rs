//! Serves a router until SIGTERM or SIGINT, over HTTP/1.1, or over TLS with
//! HTTP/2 as well, and lets transfers that are under way end. Clients that connect and
//! then say nothing, or take nothing of what they asked for, are hung up on, and connections are limited.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::Router;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::http::header::HOST;
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use clap::Args;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::Service;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, getrlimit, setrlimit};
use rustls::ServerConfig;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::activity::{Activity, Watched};
use crate::page::FORWARDED_PROTO;
use crate::tls::TlsOptions;

/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest head of a request, and how much of a body is read at a time, in bytes.
const BUFFER: usize = 64 << 10;
/// Bytes that the kernel takes from us for a client before it has sent those before: a client that reads
/// slowly, or not at all, would have it keep megabytes.
const UNSENT: u32 = 512 << 10;
/// Threads for each core that read large files: as many as disks can serve at a time, and no more.
const BLOCKING: usize = 8;
/// How often a silent HTTP/2 client is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// Requests at a time over one HTTP/2 connection: for each one a part of its answer is in memory, and a client may
/// take none of it.
const STREAMS: u32 = 16;
/// How long transfers that are under way may take to end when the server stops: clients that dawdle would keep
/// it for ever.
const STOP_TIMEOUT: Duration = Duration::from_secs(600);
/// How long to wait after a connection could not be accepted, mostly for want of
/// file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The address that a request came from; each has it as an extension.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// Options of a server besides its address.
#[derive(Debug, Clone, Args)]
pub struct ServerOptions {
    #[command(flatten)]
    tls: TlsOptions,
    /// Listen on a unix socket too, without TLS: the path of the socket, where nothing is or one that
    /// nobody listens on any more
    #[arg(long, value_name = "PATH", env = "OSCONTAINER_ALSO_LISTEN")]
    also_listen: Option<PathBuf>,
    /// Connections at a time; more wait until one ends
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..),
        env = "OSCONTAINER_MAX_CONNECTIONS")]
    max_connections: u32,
    /// Seconds that a client may send nothing of a request, or take nothing of a response
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..),
        env = "OSCONTAINER_CLIENT_TIMEOUT")]
    client_timeout: u64,
}

impl ServerOptions {
    /// How long a client may be silent.
    pub fn client_timeout(&self) -> Duration {
        Duration::from_secs(self.client_timeout)
    }
}

/// Serves `router` on `listen` until `stop`; the address that was really bound (port 0 picks a
/// free one) is logged as `listening on http://…` or `https://…`.
///
/// # Errors
/// When the address cannot be bound or the certificate cannot be used.
pub async fn serve(listen: SocketAddr, router: Router, options: &ServerOptions, stop: CancellationToken) -> Result<()> {
    serve_on(&[Handle::current()], listen, router, options, stop).await
}

/// Cancelled when SIGTERM or SIGINT comes, which from now on do not kill this process.
///
/// # Errors
/// When the handlers cannot be set.
pub fn stop_on_signals() -> Result<CancellationToken> {
    let mut term = signal(SignalKind::terminate()).context("handling SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("handling SIGINT")?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
        stopping.cancel();
    });
    Ok(stop)
}

/// Serves as [`serve`] does, from one single-threaded runtime for each core, so that no connection's
/// work goes from core to core: for short answers, which cost little more than that would.
///
/// # Errors
/// As [`serve`], and when no thread can be started.
pub fn serve_per_core(listen: SocketAddr, router: Router, options: &ServerOptions) -> Result<()> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let runtimes = (0..cores).map(|_| runtime()).collect::<Result<Vec<_>>>()?;
    let handles: Vec<_> = runtimes.iter().map(|runtime| runtime.handle().clone()).collect();
    let end = CancellationToken::new();
    thread::scope(|scope| {
        let _ends = end.clone().drop_guard();
        for runtime in runtimes {
            let end = end.clone();
            let run = move || runtime.block_on(end.cancelled());
            thread::Builder::new().name("serve".into()).spawn_scoped(scope, run).context("starting a thread")?;
        }
        runtime()?.block_on(async { serve_on(&handles, listen, router, options, stop_on_signals()?).await })
    })
}

fn runtime() -> Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.max_blocking_threads(BLOCKING).enable_all().build().context("starting the runtime")
}

/// Accepts here; each connection is served on one of `workers`.
async fn serve_on(
    workers: &[Handle],
    listen: SocketAddr,
    router: Router,
    options: &ServerOptions,
    stop: CancellationToken,
) -> Result<()> {
    let tls = options.tls.watch()?;
    raise_file_limit();
    let listen = reachable(listen);
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    tracing::info!("listening on {scheme}://{}", listener.local_addr()?);
    let router = if tls.is_some() { router.layer(from_fn(as_https)) } else { router };
    let service = TowerToHyperService::new(router);
    let connections = Arc::new(Semaphore::new(options.max_connections as usize));
    let graceful = GracefulShutdown::new();
    let socket = options.also_listen.as_deref().map(Socket::bind).transpose()?;
    let listeners = Listeners { tcp: listener, socket };
    for worker in workers.iter().cycle() {
        let (permit, stream) = tokio::select! {
            accepted = listeners.accept(&connections) => accepted?,
            () = stop.cancelled() => break,
        };
        let config = tls.as_ref().map(|current| current.borrow().clone());
        let client =
            Client { service: service.clone(), watcher: graceful.watcher(), timeout: options.client_timeout() };
        // A socket belongs to the runtime that made it.
        let stream = match stream.into_std() {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!("taking a connection: {error}");
                continue;
            }
        };
        worker.spawn(async move {
            if let Err(error) = client.serve(stream, config).await {
                tracing::debug!("a connection ended: {error:#}");
            }
            drop(permit);
        });
    }
    drop(listeners);
    tracing::info!("stopping: no new connections, transfers under way may end");
    if tokio::time::timeout(STOP_TIMEOUT, graceful.shutdown()).await.is_err() {
        tracing::warn!("transfers were cut off that took longer than {} seconds to end", STOP_TIMEOUT.as_secs());
    }
    Ok(())
}

/// `[::]` takes IPv4 too, but cannot be bound where IPv6 is switched off.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    if listen.ip() == any && UdpSocket::bind((any, 0)).is_err() {
        tracing::info!("there is no IPv6 here: listening on IPv4");
        return SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), listen.port());
    }
    listen
}

/// Where connections come from.
struct Listeners {
    tcp: TcpListener,
    socket: Option<Socket>,
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// The same without a runtime.
enum StdStream {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Stream {
    fn into_std(self) -> std::io::Result<StdStream> {
        Ok(match self {
            Self::Tcp(stream) => StdStream::Tcp(stream.into_std()?),
            Self::Unix(stream) => StdStream::Unix(stream.into_std()?),
        })
    }
}

impl Listeners {
    /// The next connection, when there may be one more.
    async fn accept(&self, connections: &Arc<Semaphore>) -> Result<(OwnedSemaphorePermit, Stream)> {
        let permit = Arc::clone(connections).acquire_owned().await.context("waiting for a free connection")?;
        loop {
            let accepted = tokio::select! {
                accepted = self.tcp.accept() => accepted.map(|(stream, _)| Stream::Tcp(stream)),
                accepted = async { match &self.socket {
                    Some(socket) => socket.listener.accept().await,
                    None => std::future::pending().await,
                } } => accepted.map(|(stream, _)| Stream::Unix(stream)),
            };
            match accepted {
                Ok(stream) => return Ok((permit, stream)),
                Err(error) => {
                    tracing::debug!("accepting a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// A unix socket; dropped, its path is gone.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    fn bind(path: &Path) -> Result<Self> {
        let listening = || format!("listening on {}", path.display());
        // What a killed run left, and nothing else, is in the way of nobody.
        let is_socket = path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket());
        if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
            std::fs::remove_file(path).with_context(listening)?;
        }
        let listener = UnixListener::bind(path).with_context(listening)?;
        tracing::info!("listening on unix:{}", path.display());
        Ok(Self { listener, path: path.to_owned() })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("removing {}: {error}", self.path.display());
        }
    }
}

/// How a client is served.
struct Client {
    service: TowerToHyperService<Router>,
    watcher: Watcher,
    /// How long it may be silent.
    timeout: Duration,
}

impl Client {
    async fn serve(self, stream: StdStream, tls: Option<Arc<ServerConfig>>) -> Result<()> {
        let stream = match stream {
            StdStream::Tcp(stream) => TcpStream::from_std(stream)?,
            StdStream::Unix(stream) => {
                let stream = UnixStream::from_std(stream)?;
                return Box::pin(local(stream, self.service, self.watcher, self.timeout)).await;
            }
        };
        stream.set_nodelay(true)?;
        let peer = Peer(stream.peer_addr()?.ip().to_canonical());
        let service = WithPeer { service: self.service, peer };
        // The kernel sees better than we do whether a client takes what it is sent.
        SockRef::from(&stream).set_tcp_user_timeout(Some(self.timeout))?;
        SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT)?;
        match tls {
            // Apart, as above, for what it needs would be taken for each connection without TLS too.
            Some(config) => Box::pin(secure(stream, config, service, self.watcher, self.timeout)).await,
            None => {
                let served = http1(self.timeout).serve_connection(TokioIo::new(stream), service);
                self.watcher.watch(served).await.context("serving")
            }
        }
    }
}

fn http1(timeout: Duration) -> http1::Builder {
    let mut http1 = http1::Builder::new();
    http1.timer(TokioTimer::new()).header_read_timeout(timeout).max_buf_size(BUFFER);
    http1
}

/// Says in each request who sent it.
#[derive(Clone)]
struct WithPeer {
    service: TowerToHyperService<Router>,
    peer: Peer,
}

impl Service<hyper::Request<Incoming>> for WithPeer {
    type Response = <TowerToHyperService<Router> as Service<hyper::Request<Incoming>>>::Response;
    type Error = <TowerToHyperService<Router> as Service<hyper::Request<Incoming>>>::Error;
    type Future = <TowerToHyperService<Router> as Service<hyper::Request<Incoming>>>::Future;

    fn call(&self, mut request: hyper::Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(self.peer);
        self.service.call(request)
    }
}

async fn local(
    stream: UnixStream,
    service: TowerToHyperService<Router>,
    watcher: Watcher,
    timeout: Duration,
) -> Result<()> {
    let activity = Activity::new();
    let service = Watched::new(service, Arc::clone(&activity));
    let served = watcher.watch(http1(timeout).serve_connection(TokioIo::new(stream), service));
    active(served, &activity, timeout).await
}

async fn secure(
    stream: TcpStream,
    tls: Arc<ServerConfig>,
    service: WithPeer,
    watcher: Watcher,
    timeout: Duration,
) -> Result<()> {
    let handshake = TlsAcceptor::from(tls).accept(stream);
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT.min(timeout), handshake).await.context("shaking hands")??;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return watcher.watch(http1(timeout).serve_connection(TokioIo::new(stream), service)).await.context("serving");
    }
    let mut http2 = http2::Builder::new(TokioExecutor::new());
    http2.timer(TokioTimer::new()).keep_alive_interval(PING_INTERVAL).max_concurrent_streams(STREAMS);
    let activity = Activity::new();
    let service = Watched::new(service, Arc::clone(&activity));
    let served = watcher.watch(http2.serve_connection(TokioIo::new(stream), service));
    active(served, &activity, timeout).await
}

/// Serves a connection until it ends, or its client has done nothing for `timeout`.
async fn active(served: impl Future<Output = hyper::Result<()>>, activity: &Activity, timeout: Duration) -> Result<()> {
    tokio::select! {
        served = served => served.context("serving"),
        () = activity.ends(timeout) => bail!("its client took nothing for {} seconds", timeout.as_secs()),
    }
}

/// Each reader takes a socket and a file, and the usual limit of 1,024 is from a time
/// when select(2) was in use.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("raising the limit of open files: {error}");
    }
}

/// What HTTP/1.1 behind a proxy says of a request's origin, for what came over TLS:
/// the scheme is known, and HTTP/2 has the host in the URI.
async fn as_https(mut request: Request, next: Next) -> Response {
    let host = request.uri().authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok());
    let headers = request.headers_mut();
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("https"));
    if let Some(host) = host {
        headers.entry(HOST).or_insert(host);
    }
    next.run(request).await
}
