//! TLS of the servers: a certificate and its key from PEM files that may be
//! replaced while the server runs, as cert-manager and Kubernetes do.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use oscontainer_artifact::Rejected;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::sync::watch;

use crate::reject;

/// How often the files are looked at.
const INTERVAL: Duration = Duration::from_secs(2);

/// Makes ring the TLS library of this process. Only the first call does; a later
/// one finds the same.
pub fn install_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// TLS options of a server.
#[derive(Debug, Clone, Args)]
pub struct TlsOptions {
    /// PEM file with the certificate chain, for HTTPS; read anew when it changes
    #[arg(long, value_name = "FILE", requires = "tls_key", env = "OSCONTAINER_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's private key
    #[arg(long, value_name = "FILE", requires = "tls_cert", env = "OSCONTAINER_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// PEM file with the certificate authorities that must have signed clients' certificates; without
    /// it clients need none
    #[arg(long, value_name = "FILE", requires = "tls_cert", env = "OSCONTAINER_TLS_CLIENT_CA")]
    tls_client_ca: Option<PathBuf>,
}

impl TlsOptions {
    /// The configuration, and its successors as the files change; `None` without
    /// the options.
    ///
    /// # Errors
    /// When the files cannot be read, or are no certificate and its key.
    pub fn watch(&self) -> Result<Option<watch::Receiver<Arc<ServerConfig>>>> {
        let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) else { return Ok(None) };
        install_provider();
        let files = Files { cert: cert.clone(), key: key.clone(), client_ca: self.tls_client_ca.clone() };
        let mut last = files.read()?;
        let (sender, receiver) = watch::channel(files.config(&last)?);
        tokio::spawn(async move {
            while !sender.is_closed() {
                tokio::time::sleep(INTERVAL).await;
                let found = match files.read() {
                    Ok(found) if found == last => continue,
                    Ok(found) => found,
                    // Between the old files and the new ones there may be none.
                    Err(error) => {
                        tracing::debug!("{error:#}");
                        continue;
                    }
                };
                match files.config(&found) {
                    Ok(config) => {
                        tracing::info!("{} has changed: new connections get it", files.cert.display());
                        sender.send_replace(config);
                    }
                    Err(error) => tracing::warn!("{error:#}; the certificate before it stays in use"),
                }
                last = found;
            }
        });
        Ok(Some(receiver))
    }
}

struct Files {
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

/// What is in the files.
#[derive(PartialEq, Eq)]
struct Contents {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Files {
    fn read(&self) -> Result<Contents> {
        let read =
            |option: &str, path: &Path| fs::read(path).with_context(|| format!("reading {option} {}", path.display()));
        let client_ca = self.client_ca.as_ref().map(|path| read("--tls-client-ca", path)).transpose()?;
        Ok(Contents { cert: read("--tls-cert", &self.cert)?, key: read("--tls-key", &self.key)?, client_ca })
    }

    fn config(&self, contents: &Contents) -> Result<Arc<ServerConfig>> {
        let (cert_shown, key_shown) = (self.cert.display(), self.key.display());
        let chain = certificates("--tls-cert", &self.cert, &contents.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|error| Rejected::new(format!("reading the private key in --tls-key {key_shown}: {error}")))?;
        let builder = match (&self.client_ca, &contents.client_ca) {
            (Some(path), Some(pem)) => ServerConfig::builder().with_client_cert_verifier(verifier(path, pem)?),
            _ => ServerConfig::builder().with_no_client_auth(),
        };
        let unusable = |error| Rejected::new(format!("--tls-cert {cert_shown} with --tls-key {key_shown}: {error}"));
        let mut config = builder.with_single_cert(chain, key).map_err(unusable)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// The certificates in `pem`, the content of the file that `option` names; there is one at least.
fn certificates(option: &str, path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let shown = path.display();
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|error| Rejected::new(format!("{option} {shown}: {error}")))?;
    if certificates.is_empty() {
        reject!("{option} {shown} holds no certificate");
    }
    Ok(certificates)
}

/// The authorities in `pem`, the content of the file that `option` names; there is one at least.
///
/// # Errors
/// [`Rejected`] when it holds something else.
pub fn roots(option: &str, path: &Path, pem: &[u8]) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(option, path, pem)? {
        roots.add(authority).map_err(|error| Rejected::new(format!("{option} {}: {error}", path.display())))?;
    }
    Ok(roots)
}

/// Lets clients in whose certificates one of the authorities in `pem` has signed.
fn verifier(path: &Path, pem: &[u8]) -> Result<Arc<dyn ClientCertVerifier>> {
    let roots = roots("--tls-client-ca", path, pem)?;
    WebPkiClientVerifier::builder(Arc::new(roots))
        .build()
        .with_context(|| format!("using --tls-client-ca {}", path.display()))
}
