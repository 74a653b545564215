//! The Kubernetes API, as `submit`, `run` and `rollout` use it: who we are to which
//! cluster, and what its refusals mean.
//!
//!     treefile ─▶ bundle (ConfigMaps) ─┐
//!     manifest ─▶ template (Job) ──────┴▶ submit ─▶ follow ─▶ trigger ─▶ follow
//!     run ─▶ events, trigger           the same from inside, without following
//!     rollout ─▶ events                the aggregation Job's last step

mod build;
mod bundle;
pub mod events;
mod follow;
mod proxy;
pub mod rollout;
pub mod submit;
mod template;
pub mod trigger;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use k8s_openapi::NamespaceResourceScope;
use kube::api::ApiResource;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, Resource};
use oscontainer_artifact::Rejected;
use oscontainer_program::exit::Usage;
use oscontainer_program::{exit, tls};
use tokio::time::{Instant, sleep};

/// How long the API server may fail to answer, once it is known: upgrades restart it.
const PATIENCE: Duration = Duration::from_secs(300);
/// The first and the longest pause between two tries.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Seconds after which a connection on which nothing comes counts as broken.
pub const SILENCE: u32 = 60;
/// What a watch may take to end when its time is over.
const MARGIN: Duration = Duration::from_secs(5);

/// The cluster of the kubeconfig's context, as kubectl finds it, or else the one that this
/// Pod runs in.
///
/// # Errors
/// [`Usage`] when there is neither, or their files cannot be used.
pub async fn connect(context: Option<&str>) -> Result<Client> {
    connect_with(context, SILENCE).await
}

async fn connect_with(context: Option<&str>, silence: u32) -> Result<Client> {
    tls::install_provider();
    let mut config = match (from_kubeconfig(context).await, context) {
        (Ok(config), _) => config,
        (Err(error), Some(name)) => return Err(Usage(format!("--context {name}: {}", exit::chain(&error))).into()),
        // A Pod reaches the API server directly.
        (Err(kubeconfig), None) => Config::incluster().map_err(|error| {
            Usage(format!(
                "finding a cluster: neither a kubeconfig ({}) nor a Pod's service account ({error})",
                exit::chain(&kubeconfig)
            ))
        })?,
    };
    config.read_timeout = Some(Duration::from_secs(silence.into()) + MARGIN);
    // Else a connection's idle time counts too.
    config.reset_reader_on_write = true;
    Client::try_from(config).context("setting up the client of the Kubernetes API")
}

/// What the kubeconfig says of a context, or of the current one.
async fn from_kubeconfig(context: Option<&str>) -> Result<Config> {
    let kubeconfig = Kubeconfig::read()?;
    let own = proxy::of_context(&kubeconfig, context);
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
    config.proxy_url = proxy::to(&config.cluster_url, own.as_deref())?;
    Ok(config)
}

/// A cluster that is used for long: longer than a token may be valid.
#[derive(Clone)]
pub struct Access {
    context: Option<String>,
    /// Seconds after which a silent connection counts as broken.
    silence: u32,
    client: Arc<RwLock<Client>>,
}

impl Access {
    /// As [`connect`].
    ///
    /// # Errors
    /// As [`connect`].
    pub async fn new(context: Option<&str>, silence: u32) -> Result<Self> {
        let client = Arc::new(RwLock::new(connect_with(context, silence).await?));
        Ok(Self { context: context.map(str::to_owned), silence, client })
    }

    /// The client as it is now.
    pub fn client(&self) -> Client {
        self.client.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The objects of a kind in a namespace, with the client as it is now.
    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType: Default>,
    {
        Api::namespaced(self.client(), namespace)
    }

    /// Reads the kubeconfig again and runs its credential plugin: the cluster does not know us
    /// any more.
    ///
    /// # Errors
    /// As [`connect`].
    async fn renew(&self) -> Result<()> {
        let client = connect_with(self.context.as_deref(), self.silence).await?;
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = client;
        Ok(())
    }
}

/// The pauses between tries: each twice the one before. Controllers wait longer; here somebody
/// looks on.
struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(FIRST_PAUSE)
    }
}

impl Pauses {
    fn step(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST_PAUSE);
        pause
    }
}

/// Asks until there is an answer, be it a refusal, for as long as [`PATIENCE`].
///
/// # Errors
/// The refusal; or the last failure.
pub async fn patiently<T>(ask: impl AsyncFn() -> Result<T, kube::Error>) -> Result<T, kube::Error> {
    let start = Instant::now();
    let passes = |error: &kube::Error| match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        kube::Error::Auth(_) => false,
        _ => true,
    };
    let mut pauses = Pauses::default();
    loop {
        match ask().await {
            Err(error) if passes(&error) && start.elapsed() <= PATIENCE => {
                tracing::warn!("{}; trying again", exit::chain(&told(error)));
                sleep(pauses.step()).await;
            }
            done => return done,
        }
    }
}

/// What the API's answer means: what the cluster refuses it will refuse again, all else
/// may pass.
pub fn told(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => refused(&status.message, status.code),
        // exec plugins and token files that fail.
        kube::Error::Auth(error) => Usage(format!("the kubeconfig's credentials: {error}")).into(),
        other => anyhow!(other).context("asking the Kubernetes API"),
    }
}

/// An answer of the API with this status.
fn refused(message: &str, code: u16) -> anyhow::Error {
    let text = match code {
        401 => format!("the cluster does not know us: {message}"),
        _ => format!("the cluster answered {code}: {message}"),
    };
    match code {
        408 | 409 | 410 | 429 | 500.. => anyhow!(text),
        _ => Rejected::new(text).into(),
    }
}

/// The resource of batch/v1 Jobs.
fn jobs() -> ApiResource {
    ApiResource::erase::<k8s_openapi::api::batch::v1::Job>(&())
}

/// Five letters that make a name one of its own, as the API's `generateName` does.
fn suffix() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    // The API server's alphabet: no vowels, so that no words appear.
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut random = RandomState::new().build_hasher().finish();
    let mut letter = || {
        let letter = LETTERS[(random % 27) as usize];
        random /= 27;
        char::from(letter)
    };
    (0..5).map(|_| letter()).collect()
}
