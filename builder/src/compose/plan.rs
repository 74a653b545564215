//! What a compose would do: the packages that dnf resolved, and what is different from
//! the commit that the ref names now.

use std::fmt;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use super::commit::{self, Previous};
use super::report::{self, Changes, Versions};
use crate::treefile::Flattened;

/// A package that would be installed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its architecture.
    pub arch: String,
    /// `EPOCH:VERSION-RELEASE`, without an epoch of 0.
    pub evr: String,
    /// The repository that it comes from.
    pub repository: String,
    /// Its size, as exact as dnf prints it.
    pub bytes: u64,
}

/// What a compose would do.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// The ref that it would set.
    #[serde(rename = "ref")]
    pub ref_name: String,
    /// Whether the tree would be another than that of `previous`.
    pub changed: bool,
    /// The commit that the ref names.
    pub previous: Option<String>,
    /// All packages, sorted.
    pub packages: Vec<Planned>,
    /// The sum of their sizes.
    pub bytes: u64,
    /// What is different from `previous`, if there is one.
    #[serde(flatten)]
    pub differences: Differences,
}

/// What is different between a commit and a plan.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Differences {
    /// Packages.
    #[serde(flatten)]
    pub packages: Changes,
    /// Treefile fields with another value.
    pub fields: Vec<String>,
    /// Whether the content of files that the treefile names is another.
    pub files: bool,
}

impl Plan {
    /// Compares `packages` and the treefile with the commit before.
    ///
    /// # Errors
    /// When the commit cannot be read, or rpm does not compare versions.
    pub fn new(
        ref_name: String,
        mut packages: Vec<Planned>,
        flattened: &Flattened,
        previous: Option<&Previous>,
    ) -> Result<Self> {
        packages.sort();
        let bytes = packages.iter().map(|package| package.bytes).sum();
        let differences = match previous {
            Some(previous) => differences(&packages, flattened, previous)?,
            None => Differences::default(),
        };
        let changed = previous.is_none() || differences != Differences::default();
        let previous = previous.map(|previous| previous.commit.clone());
        Ok(Self { ref_name, changed, previous, packages, bytes, differences })
    }
}

fn differences(packages: &[Planned], flattened: &Flattened, previous: &Previous) -> Result<Differences> {
    let now: Versions =
        packages.iter().map(|package| ((package.name.clone(), package.arch.clone()), package.evr.clone())).collect();
    // A commit that is not ours may have no such digest: then there is nothing to compare with.
    let digest = previous.metadata_string(commit::FILES)?;
    Ok(Differences {
        packages: Changes::between(&report::versions(previous.packages()?), &now)?,
        fields: changed_fields(&flattened.to_json(), previous)?,
        files: match digest {
            Some(digest) => digest != super::dnf_engine::files_digest(flattened)?,
            None => false,
        },
    })
}

/// The names of the fields whose value is another than in the commit's treefile.
fn changed_fields(now: &Value, previous: &Previous) -> Result<Vec<String>> {
    let Some(text) = previous.file("usr/share/rpm-ostree/treefile.json")? else { return Ok(Vec::new()) };
    let before: Value = serde_json::from_str(&text).context("reading the previous commit's treefile.json")?;
    let names = [&before, now].into_iter().filter_map(Value::as_object).flat_map(|fields| fields.keys());
    let mut changed: Vec<String> = names.filter(|name| before.get(name) != now.get(name)).cloned().collect();
    changed.sort();
    changed.dedup();
    Ok(changed)
}

/// The sections of dnf's table that list packages.
const INSTALLING: [&str; 5] = [
    "Installing:",
    "Installing dependencies:",
    "Installing weak dependencies:",
    "Installing group packages:",
    "Installing group/module packages:",
];

/// Reads the table that dnf 4 and 5 print of a transaction into an empty root.
///
/// # Errors
/// When it is not as expected.
pub fn parse(lines: &[String]) -> Result<Vec<Planned>> {
    let mut tokens = Vec::new();
    let mut reads = false;
    for line in lines {
        if line.starts_with("Transaction Summary") {
            break;
        }
        if line.ends_with(':') && !line.starts_with(' ') {
            // Other sections, such as modules that are enabled, list no packages.
            reads = INSTALLING.contains(&line.as_str());
        } else if reads {
            tokens.extend(line.split_whitespace());
        }
    }
    // A long name has a line of its own: lines mean nothing, the order of tokens does.
    let mut packages = Vec::new();
    let mut tokens = tokens.into_iter().peekable();
    while let Some(name) = tokens.next() {
        let mut next = || tokens.next().with_context(|| format!("dnf's table ends within the package {name}"));
        let (arch, evr, repository, number) = (next()?, next()?, next()?, next()?);
        let number: f64 = number.parse().with_context(|| format!("reading the size of {name} in dnf's table"))?;
        let unit = tokens.next_if(|token| unit(token).is_some()).and_then(unit).unwrap_or(1.0);
        // From a table for people: below 2^53 by far.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a size is small and not negative")]
        let bytes = (number * unit).round() as u64;
        packages.push(Planned {
            name: name.to_owned(),
            arch: arch.to_owned(),
            evr: evr.strip_prefix("0:").unwrap_or(evr).to_owned(),
            repository: repository.to_owned(),
            bytes,
        });
    }
    Ok(packages)
}

/// The bytes of a unit of dnf 4 (`k`) or 5 (`KiB`).
fn unit(token: &str) -> Option<f64> {
    Some(match token {
        "B" => 1.0,
        "k" | "KiB" => 1024.0,
        "M" | "MiB" => 1024.0 * 1024.0,
        "G" | "GiB" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    })
}

/// For people: a table, and what is different.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: u64| format!("{}.{} MB", bytes / 1_000_000, bytes % 1_000_000 / 100_000);
        let rows: Vec<[String; 5]> = self
            .packages
            .iter()
            .map(|p| [p.name.clone(), p.evr.clone(), p.arch.clone(), p.repository.clone(), megabytes(p.bytes)])
            .collect();
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or_default();
        let widths = [width(0), width(1), width(2), width(3), width(4)];
        for [name, evr, arch, repository, size] in &rows {
            let [a, b, c, d, e] = widths;
            writeln!(f, "{name:a$}  {evr:b$}  {arch:c$}  {repository:d$}  {size:>e$}")?;
        }
        writeln!(f, "{} packages, {}", rows.len(), megabytes(self.bytes))?;
        let Some(previous) = &self.previous else {
            return write!(f, "{} names no commit yet: this would be its first", self.ref_name);
        };
        let Differences { packages, fields, files } = &self.differences;
        if !self.changed {
            return write!(f, "nothing changed since commit {previous}, which {} names", self.ref_name);
        }
        write!(f, "changed since commit {previous}, which {} names:{packages}", self.ref_name)?;
        if !fields.is_empty() {
            write!(f, "\n  treefile fields: {}", fields.join(", "))?;
        }
        if *files { write!(f, "\n  content of files that the treefile names") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    fn parsed(text: &str) -> Vec<String> {
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let show = |p: super::Planned| format!("{} {} {} {} {}", p.name, p.evr, p.arch, p.repository, p.bytes);
        parse(&lines).unwrap().into_iter().map(show).collect()
    }

    #[test]
    fn the_table_of_dnf_4_is_read() {
        let text = "\
demo                                            4.0 MB/s |  25 kB     00:00
Dependencies resolved.
================================================================================
 Package                  Architecture Version                 Repository  Size
================================================================================
Installing:
 filesystem               x86_64       1.0-1                   demo       9.6 k
 a-package-whose-name-is-too-long-for-its-column
                          noarch       2:3.4-1                 demo        28 M
 tiny                     noarch       1.0-1                   demo       512
Installing dependencies:
 libaudit1                x86_64       1:3.0.9-1               demo       1.1 G
Installing weak dependencies:
 k                        noarch       1-1                     demo        80 k
Installing group/module packages:
 of-a-group               noarch       1-1                     demo        80 k
Installing Groups:
 Core
Enabling module streams:
 nodejs                                18

Transaction Summary
================================================================================
Install  5 Packages
";
        assert_eq!(
            parsed(text),
            [
                "filesystem 1.0-1 x86_64 demo 9830",
                "a-package-whose-name-is-too-long-for-its-column 2:3.4-1 noarch demo 29360128",
                "tiny 1.0-1 noarch demo 512",
                "libaudit1 1:3.0.9-1 x86_64 demo 1181116006",
                "k 1-1 noarch demo 81920",
                "of-a-group 1-1 noarch demo 81920",
            ]
        );
    }

    #[test]
    fn the_table_of_dnf_5_is_read() {
        let text = "\
Updating and loading repositories:
Repositories loaded.
Package                     Arch   Version         Repository      Size
Installing:
 bash                       x86_64 0:5.2.32-1.fc41 fedora       8.2 MiB
Installing dependencies:
 a-package-whose-name-is-too-long-for-its-column
                            noarch 1:1-1.fc41      fedora       0.0   B
Installing weak dependencies:
 libxcrypt                  x86_64 4.4.36-7.fc41   fedora     265.9 KiB

Transaction Summary:
 Installing:         3 packages
";
        assert_eq!(
            parsed(text),
            [
                "bash 5.2.32-1.fc41 x86_64 fedora 8598323",
                "a-package-whose-name-is-too-long-for-its-column 1:1-1.fc41 noarch fedora 0",
                "libxcrypt 4.4.36-7.fc41 x86_64 fedora 272282",
            ]
        );
    }

    #[test]
    fn a_table_that_is_cut_is_an_error() {
        let lines = ["Installing:".to_owned(), " bash x86_64 1-1 demo".to_owned()];
        assert!(parse(&lines).is_err());
    }
}
