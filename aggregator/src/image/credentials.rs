//! Credentials for registries, kept as podman and docker keep them
//! (containers-auth.json(5)): in the file that is named, else in the first of the
//! usual ones that knows the registry; credential helpers are asked as the file says.

use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use oci_client::Reference;
use oscontainer_program::exit::Usage;

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
        for key in keys(reference) {
            let file = match File::open(&path) {
                Ok(file) => BufReader::new(file),
                Err(e) if e.kind() == ErrorKind::NotFound => break,
                Err(e) => return Err(e).with_context(|| format!("opening {}", path.display())),
            };
            match docker_credential::get_credential_from_reader(file, &key) {
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
    [
        variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
        variable("XDG_CONFIG_HOME").or_else(|| below_home(".config")).map(|dir| dir.join("containers/auth.json")),
        variable("DOCKER_CONFIG").or_else(|| below_home(".docker")).map(|dir| dir.join("config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The repository, the namespaces above it, and the registry.
fn keys(reference: &Reference) -> Vec<String> {
    let whole = format!("{}/{}", reference.registry(), reference.repository());
    let ends = whole.match_indices('/').map(|(end, _)| end).chain([whole.len()]);
    let mut keys: Vec<_> = ends.map(|end| whole[..end].to_owned()).collect();
    keys.reverse();
    keys
}
