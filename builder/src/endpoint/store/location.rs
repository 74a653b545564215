//! Where a store is, from its URI, and how it is reached: credentials and endpoints come from
//! the variables that each kind's own tools read.

use std::env;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use opendal::layers::{RetryLayer, TimeoutLayer};
use opendal::services::{Azblob, Gcs, S3};
use opendal::{HttpTransporter, Operator};
use opendal_http_transport_reqwest::ReqwestTransport;
use oscontainer_program::client::authorities;
use oscontainer_program::exit::Usage;
use oscontainer_program::tls;
use reqwest::Url;
use reqwest::redirect::Policy;

use super::backend::Backend;
use super::directory::Directory;
use super::objects::{Objects, Operators};
use super::swift;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the store may take to answer to a request.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How often a request is tried again, and how long is waited before the first time and at most.
const RETRIES: (usize, Duration, Duration) = (6, Duration::from_millis(100), Duration::from_secs(10));

/// Options that say where artifacts are kept.
#[derive(Debug, Clone, Args)]
pub struct StoreOptions {
    /// Where artifacts are kept: a directory, s3://BUCKET/PREFIX, swift://CONTAINER/PREFIX,
    /// gs://BUCKET/PREFIX or az://CONTAINER/PREFIX
    #[arg(long, value_name = "URI", env = "OSCONTAINER_STORE")]
    store: String,
    /// PEM file with the certificate authorities to trust for the store instead of the system's
    #[arg(long, value_name = "FILE", env = "OSCONTAINER_STORE_CA_FILE")]
    store_ca_file: Option<PathBuf>,
}

impl StoreOptions {
    /// The location that they name.
    ///
    /// # Errors
    /// [`Usage`] when it is none.
    pub fn location(&self) -> Result<Location> {
        let uri = self.store.as_str();
        let wrong = |expected: &str| Usage(format!("--store {uri}: expected {expected}"));
        let Some((scheme, rest)) = uri.split_once("://") else { return Ok(Location::Directory(PathBuf::from(uri))) };
        let kind = match scheme {
            "file" => {
                let path = Url::parse(uri).ok().and_then(|url| url.to_file_path().ok());
                return Ok(Location::Directory(path.ok_or_else(|| wrong("file:///absolute/path"))?));
            }
            "s3" => Kind::S3,
            "swift" => Kind::Swift,
            "gs" => Kind::Gcs,
            "az" => Kind::Azure,
            _ => return Err(wrong("a directory, or file://, s3://, swift://, gs:// or az://").into()),
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() || rest.contains(['?', '#', '@']) {
            return Err(wrong(&format!("{scheme}://NAME or {scheme}://NAME/PREFIX")).into());
        }
        Ok(Location::Objects(Place {
            shown: uri.to_owned(),
            kind,
            bucket: bucket.to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
            ca_file: self.store_ca_file.clone(),
        }))
    }
}

/// Where a store is.
#[derive(Debug, Clone)]
pub enum Location {
    /// In a directory.
    Directory(PathBuf),
    /// In an object store.
    Objects(Place),
}

impl Location {
    /// Opens it; on a thread that may block.
    ///
    /// # Errors
    /// When it cannot be used, or another endpoint serves it.
    pub(super) fn open(&self) -> Result<Box<dyn Backend>> {
        match self {
            Self::Directory(dir) => Ok(Box::new(Directory::open(dir)?)),
            Self::Objects(place) => Ok(Box::new(Objects::open(place.operators()?, &place.shown)?)),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    S3,
    Swift,
    Gcs,
    Azure,
}

/// A place in an object store.
#[derive(Debug, Clone)]
pub struct Place {
    shown: String,
    kind: Kind,
    /// The bucket or container.
    pub(super) bucket: String,
    /// What all paths begin with, without slashes around it.
    pub(super) prefix: String,
    ca_file: Option<PathBuf>,
}

impl Place {
    fn operators(&self) -> Result<Operators> {
        let client = self.client()?;
        let transport = ReqwestTransport::new(client.clone());
        let using = || format!("using the store {}", self.shown);
        let once = match self.kind {
            Kind::S3 => self.s3().with_context(using)?,
            Kind::Gcs => self.gcs().with_context(using)?,
            Kind::Azure => self.azure().with_context(using)?,
            Kind::Swift => swift::Account::from_environment(client)?.operator(self, transport.clone())?,
        };
        HttpTransporter::install_default(transport);
        let timeouts = TimeoutLayer::new().with_timeout(TIMEOUT).with_io_timeout(TIMEOUT);
        let (times, first, most) = RETRIES;
        let retries = RetryLayer::new().with_max_times(times).with_min_delay(first).with_max_delay(most).with_jitter();
        let once = once.layer(timeouts);
        Ok(Operators { patient: once.clone().layer(retries), once })
    }

    fn s3(&self) -> Result<Operator> {
        // The region is part of the signature, but most servers besides Amazon's take any.
        let region = first_of(&["AWS_REGION", "AWS_DEFAULT_REGION"]).unwrap_or_else(|| "us-east-1".to_owned());
        let mut builder = S3::default().bucket(&self.bucket).root(&self.prefix).region(&region);
        if let Some(endpoint) = first_of(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]) {
            builder = builder.endpoint(&endpoint);
        }
        Ok(Operator::new(builder)?)
    }

    fn gcs(&self) -> Result<Operator> {
        let mut builder = Gcs::default().bucket(&self.bucket).root(&self.prefix);
        // Google's own client libraries take an emulator from this variable, and sign nothing for it.
        if let Some(host) = first_of(&["STORAGE_EMULATOR_HOST"]) {
            let url = if host.contains("://") { host } else { format!("http://{host}") };
            builder = builder.endpoint(url.trim_end_matches('/')).skip_signature();
        }
        Ok(Operator::new(builder)?)
    }

    fn azure(&self) -> Result<Operator> {
        let mut builder = match first_of(&["AZURE_STORAGE_CONNECTION_STRING"]) {
            Some(connection) => {
                Azblob::from_connection_string(&connection).context("reading AZURE_STORAGE_CONNECTION_STRING")?
            }
            None => Azblob::default(),
        };
        if let Some(account) = first_of(&["AZURE_STORAGE_ACCOUNT"]) {
            builder = builder.account_name(&account).endpoint(&format!("https://{account}.blob.core.windows.net"));
        }
        if let Some(key) = first_of(&["AZURE_STORAGE_KEY"]) {
            builder = builder.account_key(&key);
        }
        if let Some(token) = first_of(&["AZURE_STORAGE_SAS_TOKEN"]) {
            builder = builder.sas_token(&token);
        }
        let builder = builder.container(&self.bucket).root(&self.prefix);
        Ok(Operator::new(builder)?)
    }

    /// The certificate authorities are those of the option, or of the variable that the kind's
    /// own tools read.
    fn client(&self) -> Result<reqwest::Client> {
        let variable = match self.kind {
            Kind::S3 => Some("AWS_CA_BUNDLE"),
            Kind::Swift => Some("OS_CACERT"),
            Kind::Gcs | Kind::Azure => None,
        };
        let ca_file = self.ca_file.clone().map(|file| ("--store-ca-file", file));
        let ca_file = ca_file.or_else(|| variable.and_then(|name| Some((name, PathBuf::from(env::var_os(name)?)))));
        tls::install_provider();
        let mut builder = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).redirect(Policy::none());
        if let Some((name, file)) = &ca_file {
            builder = builder.tls_certs_only(authorities(name, file)?);
        }
        builder.build().context("setting up the HTTP client of the store")
    }
}

/// The first of these variables that is set and not empty.
pub fn first_of(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| env::var(name).ok().filter(|value| !value.is_empty()))
}
