//! A certificate authority for tests, made with openssl.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{ok, tool};

/// The authority; its files are gone when it is dropped.
pub struct Authority {
    dir: TempDir,
}

impl Authority {
    /// A new one.
    #[expect(clippy::new_without_default, reason = "it runs openssl")]
    pub fn new() -> Self {
        let authority = Self { dir: tempfile::tempdir().expect("a temporary directory") };
        let (key, cert) = (authority.path("ca.key"), authority.ca());
        ok(openssl(&["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=test CA"])
            .args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout"])
            .arg(key)
            .arg("-out")
            .arg(cert));
        authority
    }

    /// The certificate to trust.
    pub fn ca(&self) -> PathBuf {
        self.path("ca.crt")
    }

    /// Writes a certificate for 127.0.0.1 and `name`, and its key.
    pub fn issue(&self, name: &str, cert: &Path, key: &Path) {
        ok(openssl(&["req", "-x509", "-nodes", "-days", "2", "-CA"])
            .arg(self.ca())
            .arg("-CAkey")
            .arg(self.path("ca.key"))
            .args(["-subj", &format!("/CN={name}"), "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-addext", &format!("subjectAltName=IP:127.0.0.1,DNS:{name}"), "-keyout"])
            .arg(key)
            .arg("-out")
            .arg(cert));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn openssl(arguments: &[&str]) -> std::process::Command {
    let mut command = tool("openssl");
    command.args(arguments);
    command
}
