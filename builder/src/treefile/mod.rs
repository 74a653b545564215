//! rpm-ostree's treefile language: what a treefile, the files it includes and the
//! machine make together. The way of the data is
//!
//!     text ─▶ source (plain values) ─▶ decode, parse (one file) ─▶ load (all, merged)
//!
//! The result is the same JSON as `rpm-ostree compose tree --print-only` prints;
//! where the two differ is said in docs/treefile.md.

mod condition;
mod decode;
mod fields;
mod kickstart;
mod load;
mod origin;
mod parse;
mod schema;
mod source;
pub mod types;

use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use oscontainer_program::options::Global;
use serde_json::Value;

pub use fields::{ByDnf, Field, Treefile};
pub use load::load;
use origin::Origins;
pub use schema::main as print_schema;

/// For what machine a treefile is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The architecture as RPM's `$basearch` names it.
    pub basearch: String,
    /// A release version that replaces the treefiles' own.
    pub releasever: Option<String>,
}

impl Machine {
    /// The machine this runs on, and the treefiles' own release version.
    pub fn host() -> Self {
        let basearch = match std::env::consts::ARCH {
            "x86" => "i386",
            "arm" => "armhfp",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            // x86_64, aarch64, s390x, riscv64 and loongarch64 have RPM's name.
            name => name,
        };
        Self { basearch: basearch.to_owned(), releasever: None }
    }
}

/// A treefile and all that it includes, as one.
#[derive(Debug, Clone, PartialEq)]
pub struct Flattened {
    /// The fields: merged, variables substituted.
    pub treefile: Treefile,
    /// What the fields refer to on disk.
    pub external: External,
    /// Every treefile read, in that order.
    pub sources: Vec<PathBuf>,
    /// Where each field was set.
    pub origins: Origins,
}

/// Files beside the treefiles. All exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct External {
    /// The directory of the first treefile, where .repo files are looked for.
    pub directory: PathBuf,
    /// Sources and where in the tree they go, in the order of the field `add-files`.
    pub add_files: Vec<(PathBuf, String)>,
    /// The script of the field `postprocess-script`: one or none, for the includer's
    /// replaces the included ones.
    pub postprocess_scripts: Vec<PathBuf>,
    /// The file of the field `check-passwd`, if it is of that type.
    pub passwd: Option<PathBuf>,
    /// The file of the field `check-groups`, if it is of that type.
    pub group: Option<PathBuf>,
    /// Executables of `finalize.d` beside any of the treefiles, in the order of their names.
    pub finalize: Vec<PathBuf>,
}

impl Flattened {
    /// The fields as `rpm-ostree compose tree --print-only` prints them.
    pub fn to_json(&self) -> Value {
        self.treefile.to_json()
    }
}

/// What `flatten` takes.
#[derive(Debug, Clone, Args)]
pub struct FlattenArgs {
    /// The treefile: .yaml, .yml, .ks, or JSON under any other name
    #[arg(value_name = "TREEFILE")]
    treefile: PathBuf,
    /// The architecture to flatten for, such as aarch64 [default: this machine's]
    #[arg(long, value_name = "ARCH", env = "OSCONTAINER_ARCH")]
    arch: Option<String>,
    /// The release version, in place of the treefiles' own
    #[arg(long, value_name = "V", env = "OSCONTAINER_RELEASEVER")]
    releasever: Option<String>,
}

/// Prints the flattened treefile as JSON.
///
/// # Errors
/// As [`load`]; and where stdout cannot be written.
pub fn main(args: FlattenArgs, _global: &Global) -> Result<()> {
    let host = Machine::host();
    let machine = Machine { basearch: args.arch.unwrap_or(host.basearch), releasever: args.releasever };
    let json = load(&args.treefile, &machine)?.to_json();
    writeln!(stdout().lock(), "{json:#}").context("writing to stdout")
}
