//! Makes the RPM repository that the demo composes from, and puts a treefile
//! beside a `.repo` file that finds it.
//!
//!     make-rpms --output DIR [--cache DIR] [--update] [--host | --large] [--treefile FILE --work DIR]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use e2e::rpms::{self, Variant, deb};

const USAGE: &str = "make-rpms --output DIR [--cache DIR] [--update] [--host | --large] [--treefile FILE --work DIR]";

fn main() -> ExitCode {
    match arguments().and_then(|arguments| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("make-rpms: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The options by name; `--update`, `--host` and `--large` have the empty path.
fn arguments() -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut rest = std::env::args().skip(1);
    while let Some(name) = rest.next() {
        let value = match name.as_str() {
            "--update" | "--host" | "--large" => String::new(),
            "--output" | "--cache" | "--treefile" | "--work" => {
                rest.next().with_context(|| format!("reading the value of {name}: {USAGE}"))?
            }
            _ => bail!("{name} is no option: {USAGE}"),
        };
        found.insert(name, PathBuf::from(value));
    }
    Ok(found)
}

fn run(arguments: &BTreeMap<String, PathBuf>) -> Result<()> {
    let output = arguments.get("--output").with_context(|| format!("reading --output: {USAGE}"))?;
    let cache = arguments.get("--cache").cloned().unwrap_or_else(|| deb::default_cache(output));
    let given = |name: &str| arguments.contains_key(name);
    let variant = match (given("--update"), given("--host"), given("--large")) {
        (false, false, false) => Variant::Demo,
        (true, false, false) => Variant::Update,
        (false, true, false) => Variant::Host,
        (false, false, true) => Variant::Large,
        (true, false, true) => Variant::LargeUpdate,
        _ => bail!("--host goes with none of the others: {USAGE}"),
    };
    rpms::make(variant, output, &cache)?;
    match (arguments.get("--treefile"), arguments.get("--work")) {
        (Some(treefile), Some(work)) => place(treefile, work, output),
        (None, None) => Ok(()),
        _ => bail!("--treefile and --work belong together: {USAGE}"),
    }
}

/// Copies the directory of `treefile`, whose files it refers to by relative
/// names, and writes `demo.repo` there: only that knows where the RPMs are.
fn place(treefile: &Path, work: &Path, output: &Path) -> Result<()> {
    let from = treefile.parent().context("finding the directory of the treefile")?;
    copy(from, work)?;
    rpms::write_repo_file(&work.join("demo.repo"), "demo", output)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
        let entry = entry.with_context(|| format!("listing {}", from.display()))?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target).with_context(|| format!("writing {}", target.display()))?;
        }
    }
    Ok(())
}
