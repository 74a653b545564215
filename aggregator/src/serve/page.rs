//! The page at `/`, for people: what is in the repository, how it differs from what was
//! before, and the exact commands that take it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use axum::http::HeaderMap;
use maud::{Markup, html};
use oscontainer_artifact::digest::Checksum;
use oscontainer_artifact::object::{Commit, ObjectName, Package, Type};
use oscontainer_program::{moment, page};

use crate::image::container::commits_of;
use crate::repo::Repository;

/// The name that the commands give to this server.
const REMOTE: &str = "oscontainer";
/// How many changes are shown at once; more are folded.
const MAX_OPEN: usize = 40;

/// The repository that the page tells about.
pub struct Page {
    repo: PathBuf,
    layer_index: PathBuf,
    /// The image's commits, the oldest first; an image does not change.
    commits: OnceLock<Vec<Checksum>>,
}

/// A ref as the page shows it.
struct Row {
    name: String,
    checksum: String,
    commit: Commit,
    /// The commit before, if it is here.
    before: Option<(String, Commit)>,
}

impl Page {
    /// A page about the repository at `repo`, in an image whose layers have their indexes at `layer_index`.
    pub fn new(repo: &Path, layer_index: &Path) -> Self {
        Self { repo: repo.to_owned(), layer_index: layer_index.to_owned(), commits: OnceLock::new() }
    }

    /// The page as it is now, for a client that sent `headers`; it may block.
    ///
    /// # Errors
    /// When the repository cannot be read.
    pub fn html(&self, headers: &HeaderMap) -> Result<String> {
        let repo = Repository::open(&self.repo)?;
        let mut rows = Vec::new();
        for (name, checksum) in repo.refs()? {
            let commit = repo.commit(&checksum)?;
            let before = self.before(&repo, checksum, &commit)?;
            rows.push(Row { name, checksum: checksum.to_string(), commit, before });
        }
        Ok(render(&rows, &page::origin(headers)))
    }

    /// The commit before `checksum`, its parent or by the log of layers, if it is here.
    fn before(&self, repo: &Repository, checksum: Checksum, commit: &Commit) -> Result<Option<(String, Commit)>> {
        let commits = self.commits.get_or_init(|| {
            commits_of(&self.layer_index).unwrap_or_else(|error| {
                tracing::warn!("the page does not show what was before: {error:#}");
                Vec::new()
            })
        });
        let place = commits.iter().rposition(|found| *found == checksum);
        let logged = place.and_then(|place| commits[..place].iter().rfind(|found| **found != checksum));
        let Some(before) = commit.parent.or(logged.copied()) else { return Ok(None) };
        if !repo.path().join(ObjectName::new(before, Type::Commit).path()).exists() {
            return Ok(None);
        }
        Ok(Some((before.to_string(), repo.commit(&before)?)))
    }
}

/// What changed in the packages from one commit to another: name, the releases before and after. Several
/// releases of a package, such as kernels, count together.
fn changes(before: &[Package], after: &[Package]) -> Vec<(String, String, String)> {
    let by_name = |packages: &[Package]| {
        let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for package in packages {
            found.entry(package.name.clone()).or_default().insert(package.evr());
        }
        found
    };
    let (before, after) = (by_name(before), by_name(after));
    let names: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let releases = |found: Option<&BTreeSet<String>>| {
        found.map_or_else(String::new, |found| found.iter().map(String::as_str).collect::<Vec<_>>().join(", "))
    };
    let changed = names.into_iter().filter(|name| before.get(*name) != after.get(*name));
    changed.map(|name| (name.clone(), releases(before.get(name)), releases(after.get(name)))).collect()
}

fn render(rows: &[Row], origin: &str) -> String {
    let content = html! {
        p {
            "This is an OSTree repository. Nodes take their operating system from it with "
            code { "ostree" } " or " code { "rpm-ostree" } "."
        }
        p.warn {
            "The commands name the commit, for the commits are not signed: who can change what an HTTP remote \
             answers decides what a node runs that follows the ref alone."
        }
        p { "Once on each node:" }
        pre { "ostree remote add --if-not-exists --set=gpg-verify=false " (REMOTE) " " (origin) "/" }
        @if rows.is_empty() { p { "It has no refs." } }
        @for row in rows { (section(row)) }
    };
    let footer = html! { a href="/metrics" { "metrics" } " · " a href="/healthz" { "health" } };
    page::document("oscontainer", &content, &footer)
}

/// One ref.
fn section(row: &Row) -> Markup {
    let commit = &row.commit;
    let date = moment::utc(commit.timestamp);
    let facts = [("Version", commit.version.as_deref()), ("Date", date.as_deref()), ("Subject", Some(&commit.subject))];
    html! {
        h2 { (row.name) }
        dl {
            dt { "Commit" } dd { code { (row.checksum) } }
            @for (label, value) in facts {
                @if let Some(value) = value.filter(|value| !value.is_empty()) { dt { (label) } dd { (value) } }
            }
        }
        p { "Change a node to it, at its next boot:" }
        pre { "rpm-ostree rebase " (REMOTE) ":" (row.name) " " (row.checksum) }
        p { "Only download it:" }
        pre { "ostree pull " (REMOTE) " " (row.name) "@" (row.checksum) }
        @if let Some((checksum, before)) = &row.before { (difference(checksum, before, commit)) }
        @if !commit.packages.is_empty() {
            details {
                summary { "Packages" span { (commit.packages.len()) } }
                table {
                    @for package in &commit.packages {
                        tr { td { (package.name) } td { (package.evr()) } td { (package.architecture) } }
                    }
                }
            }
        }
    }
}

/// What changed since the commit before, and the way back to it.
fn difference(checksum: &str, before: &Commit, after: &Commit) -> Markup {
    let changes = changes(&before.packages, &after.packages);
    html! {
        details open[changes.len() <= MAX_OPEN] {
            summary { "Changes since " (before.version.as_deref().unwrap_or("the commit before")) span { (changes.len()) } }
            @if changes.is_empty() { p { "The packages are the same." } }
            table {
                @for (name, before, after) in &changes {
                    tr {
                        td { (name) }
                        @match (before.as_str(), after.as_str()) {
                            ("", after) => { td { "added" } td { (after) } },
                            (before, "") => { td { (before) } td { "removed" } },
                            (before, after) => { td { (before) } td { (after) } },
                        }
                    }
                }
            }
            p { "The commit before is here too, to go back to:" }
            pre { "rpm-ostree deploy " (checksum) }
        }
    }
}
