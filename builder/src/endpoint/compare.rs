//! The page that shows what changed between two versions: their packages, as the manifests name
//! them.

use std::collections::BTreeMap;

use maud::{Markup, html};
use oscontainer_artifact::manifest::{Manifest, PACKAGES};
use oscontainer_artifact::protocol::Name;
use oscontainer_program::page;

/// The packages of one version: name and architecture, and its versions. A kernel can be there twice.
type Packages<'a> = BTreeMap<(&'a str, &'a str), Vec<&'a str>>;

/// What became of the packages.
#[derive(Debug, Default, PartialEq, Eq)]
struct Difference<'a> {
    added: Vec<(&'a str, String)>,
    removed: Vec<(&'a str, String)>,
    /// Name, before, after.
    changed: Vec<(&'a str, String, String)>,
}

/// The packages that a manifest names; `None` where it names none.
fn packages(manifest: &Manifest) -> Option<Packages<'_>> {
    let mut packages = Packages::new();
    for text in manifest.annotations.get(PACKAGES)?.split_whitespace() {
        let Some((rest, arch)) = text.rsplit_once('.') else { continue };
        // NAME-[EPOCH:]VERSION-RELEASE; only the name may have more hyphens.
        let Some((end, _)) = rest.rmatch_indices('-').nth(1) else { continue };
        packages.entry((&rest[..end], arch)).or_default().push(&rest[end + 1..]);
    }
    Some(packages)
}

impl<'a> Difference<'a> {
    fn between(before: &Packages<'a>, after: &Packages<'a>) -> Self {
        let mut difference = Self::default();
        for ((name, arch), versions) in after {
            match before.get(&(*name, *arch)) {
                None => difference.added.push((name, versions.join(", "))),
                Some(old) if old != versions => difference.changed.push((name, old.join(", "), versions.join(", "))),
                Some(_) => {}
            }
        }
        let gone = before.iter().filter(|(package, _)| !after.contains_key(*package));
        difference.removed = gone.map(|((name, _), versions)| (*name, versions.join(", "))).collect();
        difference
    }
}

/// The page; `versions` are all that can be compared, newest first.
pub fn render(from: &Manifest, to: &Manifest, versions: &[Name]) -> String {
    let content = html! {
        p { "What changed from " strong { (from.version) } " to " strong { (to.version) } "." }
        @match (packages(from), packages(to)) {
            (Some(before), Some(after)) => (differences(&Difference::between(&before, &after))),
            _ => p.warn {
                "A manifest of these two does not name its packages: it was packed by an older version, or of a \
                 commit that does not list them."
            },
        }
        @if from.commit == to.commit { p { "Both are the same commit." } }
        dl {
            dt { "commit before" } dd { code { (from.commit) } }
            dt { "commit after" } dd { code { (to.commit) } }
        }
        (form("../../", from.name.as_str(), versions, (&from.version, &to.version)))
    };
    let footer = html! { a href="../../../" { "all artifacts" } };
    page::document(to.name.as_str(), &content, &footer)
}

/// The choice of two versions; `base` leads from the page to where compared versions are.
pub fn form(base: &str, name: &str, versions: &[Name], (from, to): (&Name, &Name)) -> Markup {
    let choice = |label: &str, chosen: &Name| {
        html! {
            label { (label) " "
                select name=(label) {
                    @for version in versions { option value=(version) selected[version == chosen] { (version) } }
                }
            }
        }
    };
    html! {
        form action={ (base) (name) } { (choice("from", from)) " " (choice("to", to)) " " button { "Compare" } }
    }
}

fn differences(difference: &Difference) -> Markup {
    let Difference { added, removed, changed } = difference;
    let count = |number: usize, what: &str| (number > 0).then(|| format!("{number} {what}"));
    let counts: Vec<_> =
        [count(changed.len(), "changed"), count(added.len(), "added"), count(removed.len(), "removed")]
            .into_iter()
            .flatten()
            .collect();
    html! {
        p { "Packages: " (if counts.is_empty() { "the same".to_owned() } else { counts.join(", ") }) }
        @if !changed.is_empty() {
            h2 { "Changed" }
            dl { @for (name, before, after) in changed { dt { (name) } dd { (before) " → " (after) } } }
        }
        @for (title, packages) in [("Added", added), ("Removed", removed)] {
            @if !packages.is_empty() {
                h2 { (title) }
                dl { @for (name, versions) in packages { dt { (name) } dd { (versions) } } }
            }
        }
    }
}
