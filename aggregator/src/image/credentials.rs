//! Credentials for registries, kept as podman and docker keep them
//! (containers-auth.json(5)): in the file that is named, else in the first of the
//! usual ones that knows the registry; credential helpers are asked as the file says.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use oci_client::Reference;
use oscontainer_program::exit::Usage;
use rustix::process::getuid;
use serde_json::{Map, Value};

/// Docker's name for its own registry, where helpers are asked (docker login).
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// What proves who we are.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Nothing.
    None,
    /// A name and a password.
    Password(String, String),
    /// An identity token, as `docker login` keeps it for registries that log in with a browser: who issues tokens
    /// for the registry gives some for it, and for nothing else.
    Identity(String),
}

/// What proves to the registry of `reference` who we are, if any file knows it.
///
/// # Errors
/// [`Usage`] when a file cannot be understood or a helper fails.
pub fn find(reference: &Reference, authfile: Option<&Path>) -> Result<Credentials> {
    let named = std::env::var_os("REGISTRY_AUTH_FILE").filter(|path| !path.is_empty()).map(PathBuf::from);
    let files = match (authfile, named) {
        (Some(file), _) => {
            File::open(file).with_context(|| format!("opening --authfile {}", file.display()))?;
            vec![file.to_owned()]
        }
        (None, Some(file)) => vec![file],
        (None, None) => usual_files(),
    };
    for path in files {
        let file = match fs::read(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        };
        let below = without_helpers(&file);
        for (key, is_registry) in keys(reference) {
            let known = if is_registry { &file } else { &below };
            match docker_credential::get_credential_from_reader(&known[..], &key) {
                Ok(DockerCredential::UsernamePassword(user, password)) => {
                    tracing::debug!("{} has credentials for {key}", path.display());
                    return Ok(Credentials::Password(user, password));
                }
                Ok(DockerCredential::IdentityToken(token)) => {
                    tracing::debug!("{} has an identity token for {key}", path.display());
                    return Ok(Credentials::Identity(token));
                }
                Err(CredentialRetrievalError::NoCredentialConfigured) => {}
                // What helpers say of a registry that they do not know (docker-credential-helpers).
                Err(CredentialRetrievalError::HelperFailure { stdout, .. })
                    if stdout.contains("credentials not found") => {}
                Err(e) => {
                    return Err(anyhow!(Usage(format!("reading credentials for {key} in {}: {e}", path.display()))));
                }
            }
        }
    }
    Ok(Credentials::None)
}

/// In the order in which podman looks.
fn usual_files() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = variable("HOME");
    let below_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let own = PathBuf::from(format!("/run/containers/{}/auth.json", getuid().as_raw()));
    [
        // Others' directories may be closed to us.
        Some(variable("XDG_RUNTIME_DIR").map_or(own, |dir| dir.join("containers/auth.json")))
            .filter(|file| file.try_exists().is_ok()),
        variable("XDG_CONFIG_HOME").or_else(|| below_home(".config")).map(|dir| dir.join("containers/auth.json")),
        variable("DOCKER_CONFIG").or_else(|| below_home(".docker")).map(|dir| dir.join("config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The repository, the namespaces above it, and the registry, under all its names; whether it is the registry.
fn keys(reference: &Reference) -> Vec<(String, bool)> {
    let registry = reference.registry();
    let whole = format!("{registry}/{}", reference.repository());
    let below = whole.match_indices('/').map(|(end, _)| end).skip(1).chain([whole.len()]);
    let mut keys: Vec<_> = below.map(|end| (whole[..end].to_owned(), false)).collect();
    keys.reverse();
    keys.push((registry.to_owned(), true));
    if registry == "docker.io" {
        keys.push((DOCKER_HUB.to_owned(), true));
    }
    keys
}

/// The file without what it says of helpers: they know registries, and nothing below them.
fn without_helpers(file: &[u8]) -> Vec<u8> {
    match serde_json::from_slice::<Map<String, Value>>(file) {
        Ok(mut all) => {
            all.retain(|name, _| name == "auths");
            Value::Object(all).to_string().into_bytes()
        }
        // Who reads it says so.
        Err(_) => file.to_owned(),
    }
}
