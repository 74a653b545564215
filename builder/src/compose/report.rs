//! What a compose says of itself when it ends: how long each stage took, which packages
//! are in the commit, and what is different from the commit before.

use std::collections::BTreeMap;
use std::fmt;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Result, ensure};
use oscontainer_artifact::object::Package;
use oscontainer_program::reject;
use serde::Serialize;

use super::process;

/// One stage of a compose.
#[derive(Debug, Clone, Serialize)]
pub struct Stage {
    /// What it does, for people.
    pub name: String,
    /// How long it took. Stages may overlap.
    pub seconds: f64,
}

/// The stages so far, in the order in which they ended.
#[derive(Debug, Default)]
pub struct Stages(Mutex<Vec<Stage>>);

impl Stages {
    /// Runs one stage, and logs how long it took.
    ///
    /// # Errors
    /// As the stage's.
    pub fn run<T>(&self, name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
        oscontainer_program::stop::check()?;
        tracing::info!("{name}");
        let start = Instant::now();
        let result = run()?;
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!("{name}: {seconds:.1} s");
        let mut stages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stages.push(Stage { name: name.to_owned(), seconds });
        Ok(result)
    }

    /// All that ended.
    pub fn into_list(self) -> Vec<Stage> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Versions (`EPOCH:VERSION-RELEASE`, without an epoch of 0) by name and architecture.
pub type Versions = BTreeMap<(String, String), String>;

/// The versions in a commit's package list.
pub fn versions(packages: Vec<Package>) -> Versions {
    let version = |package: Package| {
        let evr = package.evr();
        ((package.name, package.architecture), evr)
    };
    packages.into_iter().map(version).collect()
}

/// A package with another version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `NAME.ARCH`
    pub package: String,
    /// Its version before.
    pub from: String,
    /// Its version now.
    pub to: String,
}

/// Which packages are different.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// `NAME-EVR.ARCH` of packages that were not there before.
    pub added: Vec<String>,
    /// The same of those that were there before only.
    pub removed: Vec<String>,
    /// Packages with a higher version now.
    pub upgraded: Vec<Change>,
    /// Packages with a lower version now.
    pub downgraded: Vec<Change>,
}

impl Changes {
    /// What is different from `before` to `now`.
    ///
    /// # Errors
    /// When rpm does not compare versions.
    pub fn between(before: &Versions, now: &Versions) -> Result<Self> {
        let only = |these: &Versions, those: &Versions| {
            let missing = these.iter().filter(|(key, _)| !those.contains_key(key));
            missing.map(|((name, arch), evr)| format!("{name}-{evr}.{arch}")).collect()
        };
        let changed = now.iter().filter_map(|(key, to)| {
            let from = before.get(key).filter(|from| *from != to)?;
            Some(Change { package: format!("{}.{}", key.0, key.1), from: from.clone(), to: to.clone() })
        });
        let changed: Vec<Change> = changed.collect();
        // One argument has at most 128 KiB.
        let higher = changed.chunks(500).map(higher).collect::<Result<Vec<_>>>()?.concat();
        let (upgraded, downgraded): (Vec<_>, Vec<_>) = changed.into_iter().zip(higher).partition(|(_, higher)| *higher);
        let strip = |changes: Vec<(Change, bool)>| changes.into_iter().map(|(change, _)| change).collect();
        Ok(Self {
            added: only(now, before),
            removed: only(before, now),
            upgraded: strip(upgraded),
            downgraded: strip(downgraded),
        })
    }
}

/// For people: a line for each kind, each after a line break.
impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = |what: &str, items: &[String]| match items {
            [] => Ok(()),
            items => write!(f, "\n  {what}: {}", items.join(", ")),
        };
        let arrows = |changes: &[Change]| -> Vec<String> {
            changes.iter().map(|change| format!("{} {} → {}", change.package, change.from, change.to)).collect()
        };
        list("added", &self.added)?;
        list("removed", &self.removed)?;
        list("upgraded", &arrows(&self.upgraded))?;
        list("downgraded", &arrows(&self.downgraded))
    }
}

/// Whether each package goes to a higher version, in rpm's own judgement.
fn higher(changes: &[Change]) -> Result<Vec<bool>> {
    let mut script = String::new();
    for Change { package, from, to } in changes {
        // RPM's grammar of versions; anything else could be code here.
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+~^:-".contains(&b));
        if !plain(from) || !plain(to) {
            reject!("{package} has a version that RPM does not know: {from:?} or {to:?}");
        }
        script.push_str(&format!("print(rpm.vercmp(\"{to}\", \"{from}\")..\" \") "));
    }
    let text = process::output("rpm", Command::new("rpm").arg("--eval").arg(format!("%{{lua: {script}}}")))?;
    let higher: Vec<bool> = text.split_whitespace().map(|order| order == "1").collect();
    ensure!(higher.len() == changes.len(), "rpm compared {} of {} versions", higher.len(), changes.len());
    Ok(higher)
}

/// A package of a commit.
#[derive(Debug, Clone, Serialize)]
pub struct Installed {
    /// Its name.
    pub name: String,
    /// Its version, as in [`Versions`].
    pub evr: String,
    /// Its architecture.
    pub arch: String,
    /// Bytes of its files, where the engine knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

/// More about a commit than its name.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The commit that the ref named before.
    pub previous: Option<String>,
    /// All packages, sorted.
    pub packages: Vec<Installed>,
    /// What is different from `previous`; everything is added where there is none.
    #[serde(flatten)]
    pub changes: Changes,
    /// Content objects that the repository lacked, where the engine knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_objects: Option<u64>,
    /// Their bytes in the repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_bytes: Option<u64>,
    /// What was done.
    pub stages: Vec<Stage>,
}

/// For people: what changed, what is new, and a table of the stages.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} packages", self.packages.len())?;
        match &self.previous {
            Some(previous) if self.changes == Changes::default() => write!(f, ", the same as in commit {previous}")?,
            Some(previous) => write!(f, "; since commit {previous}:{}", self.changes)?,
            None => {}
        }
        if let (Some(objects), Some(bytes)) = (self.new_objects, self.new_bytes) {
            write!(f, "\n{objects} new content objects, {bytes} bytes")?;
        }
        let width = self.stages.iter().map(|stage| stage.name.len()).max().unwrap_or_default();
        for Stage { name, seconds } in &self.stages {
            write!(f, "\n  {name:width$} {seconds:7.1} s")?;
        }
        Ok(())
    }
}
