//! The page for people at `/`: what is here and the commands that fetch it.

use maud::{Markup, html};
use oscontainer_artifact::manifest::{FILE, TARBALL_FILE};
use oscontainer_artifact::protocol::{Name, PREFIX, path};
use oscontainer_program::page;

use super::compare;
use super::store::Record;

/// The pages' `Content-Security-Policy`: their own style, and forms that lead back here.
pub const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'self'";

/// How many versions of a name are shown.
const SHOWN: usize = 20;

/// The page; `origin` is the URL of the endpoint's root, without the slash.
pub fn render(artifacts: &[(Name, Vec<(Name, Record)>)], origin: &str) -> String {
    let content = html! {
        @if artifacts.is_empty() {
            p { "Nothing is stored here yet. To publish an artifact:" }
            pre { "oscontainer-builder publish DIR --endpoint " (origin) " --token-file FILE" }
        } @else {
            p {
                "Host images as OSTree repositories in tarballs. A manifest’s digest pins everything in it: \
                 take the digest from whom you trust, not from this page."
            }
        }
        @for (name, versions) in artifacts {
            section {
                h2 { (name) }
                @for (index, (version, record)) in versions.iter().take(SHOWN).enumerate() {
                    details open[index == 0] {
                        (one(name, version, record, origin))
                        @if let Some((before, _)) = versions.get(index + 1) {
                            p { a href={ "compare/" (name) "/" (before) "/" (version) } { "What changed since " (before) } }
                        }
                    }
                }
                @if let [(newest, _), (before, _), ..] = &versions[..] {
                    @let all: Vec<_> = versions.iter().map(|(version, _)| version.clone()).collect();
                    (compare::form("compare/", name.as_str(), &all, (before, newest)))
                }
                @if versions.len() > SHOWN {
                    p { a href={ (relative(PREFIX)) (name) "/" } { (versions.len() - SHOWN) " older versions (JSON)" } }
                }
            }
        }
    };
    let footer = html! {
        "oscontainer-builder " (env!("CARGO_PKG_VERSION")) " · "
        a href=(relative(PREFIX)) { "names as JSON" } " · " a href="metrics" { "metrics" }
    };
    page::document("oscontainer artifacts", &content, &footer)
}

/// One version of `name`.
fn one(name: &Name, version: &Name, record: &Record, origin: &str) -> Markup {
    let (manifest, tarball) = (path(name, version, FILE), path(name, version, TARBALL_FILE));
    let stored = record.stored_utc();
    let facts = [
        ("ref", record.ref_name.as_str()),
        ("commit", &record.commit.to_string()),
        ("architecture", &record.architecture),
        ("stored", &stored),
    ];
    let commands = format!(
        "curl -fLO {origin}{manifest} -fLO {origin}{tarball}\n\
         sha256sum -c <<'END'\n{}  {FILE}\n{}  {TARBALL_FILE}\nEND",
        record.manifest_digest.hex(),
        record.digest.hex()
    );
    html! {
        summary {
            strong { (version) }
            span { (size(record.size)) ", " (stored.split('T').next().unwrap_or_default()) }
        }
        dl {
            dt { "manifest" } dd { a href=(relative(&manifest)) { (FILE) } " " code { (record.manifest_digest) } }
            dt { "tarball" } dd { a href=(relative(&tarball)) { (TARBALL_FILE) } " " code { (record.digest) } }
            @for (label, value) in facts { dt { (label) } dd { (value) } }
        }
        p { "Fetch and verify into a repository:" }
        pre {
            "oscontainer-aggregator fetch " (origin) (manifest) " \\\n  --digest " (record.manifest_digest)
            " --output repo"
        }
        p { "By hand:" }
        pre { (commands) }
    }
}

/// A path as this page links to it, wherever the endpoint is mounted.
fn relative(path: &str) -> &str {
    path.trim_start_matches('/')
}

/// Bytes for people: three digits and a unit.
fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}
