//! The packages of the tree, as its rpm database has them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::process;

/// One installed package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its epoch, `0` where it has none.
    pub epoch: String,
    /// Its version.
    pub version: String,
    /// Its release.
    pub release: String,
    /// Its architecture.
    pub arch: String,
    /// Seconds since 1970.
    pub build_time: u64,
    /// The sha256 of its header, in hex: what pins its content.
    pub header: String,
}

/// rpm's query for the fields of [`Package`], in their order.
const QUERY: &str = "%{NAME}\t%{EPOCHNUM}\t%{VERSION}\t%{RELEASE}\t%{ARCH}\t%{BUILDTIME}\t%{SHA256HEADER}\n";

/// The packages in the database `dbpath` (a host path), sorted.
///
/// # Errors
/// When rpm cannot read the database.
pub fn installed(dbpath: &Path, home: &Path) -> Result<Vec<Package>> {
    let mut command = Command::new("rpm");
    command.env("HOME", home).arg("--dbpath").arg(dbpath).args(["--query", "--all", "--queryformat", QUERY]);
    let mut packages = process::output("rpm", &mut command)?.lines().map(parse).collect::<Result<Vec<_>>>()?;
    packages.sort();
    Ok(packages)
}

fn parse(line: &str) -> Result<Package> {
    let fields: [&str; 7] = line
        .split('\t')
        .collect::<Vec<_>>()
        .try_into()
        .ok()
        .with_context(|| format!("reading rpm's answer {line:?}"))?;
    let [name, epoch, version, release, arch, build_time, header] = fields.map(str::to_owned);
    let build_time = build_time.parse().with_context(|| format!("reading the build time of {name}"))?;
    Ok(Package { name, epoch, version, release, arch, build_time, header })
}
