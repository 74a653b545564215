//! The page for people at `/`: what is here and the commands that fetch it. Plain
//! HTML made on the server, no scripts, readable on a phone and in the dark.

use std::fmt::Write;

use axum::http::HeaderMap;
use axum::http::header::HOST;
use oscontainer_artifact::manifest::{FILE, TARBALL_FILE};
use oscontainer_artifact::protocol::{Name, PREFIX, path};

use super::store::Record;
use super::timestamp;

/// The page's `Content-Security-Policy`: its own style and nothing else.
pub const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
/// How many versions of a name are shown.
const SHOWN: usize = 20;

const STYLE: &str = "
:root { color-scheme: light dark; --line: #d5d9e0; --soft: #f3f5f8; --faint: #5a6372; }
@media (prefers-color-scheme: dark) { :root { --line: #363c47; --soft: #1d2129; --faint: #9aa4b5; } body { background: #14171c; color: #e4e8ef; } a { color: #8ab4ff; } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .75rem 0; padding: .5rem .75rem; }
summary { cursor: pointer; overflow-wrap: anywhere; } summary span { color: var(--faint); margin-left: .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .75rem 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; }
pre { background: var(--soft); border-radius: .5rem; padding: .75rem; overflow-x: auto; user-select: all; }
footer { margin-top: 3rem; color: var(--faint); }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
";

/// The URL that the client used for the endpoint, as far as its headers tell.
pub fn base(headers: &HeaderMap) -> String {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text("x-forwarded-host").or_else(|| text(HOST.as_str())).unwrap_or_default();
    let scheme = if text("x-forwarded-proto") == Some("https") { "https" } else { "http" };
    // It ends up in commands that people paste into a shell.
    let plain = |b: u8| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b);
    if host.is_empty() || !host.bytes().all(plain) {
        "http://ENDPOINT".to_owned()
    } else {
        format!("{scheme}://{host}")
    }
}

/// The page.
pub fn render(artifacts: &[(Name, Vec<(Name, Record)>)], base: &str) -> String {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>oscontainer artifacts</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>oscontainer artifacts</h1>\n"
    );
    if artifacts.is_empty() {
        let command = format!("oscontainer-builder publish DIR --endpoint {base} --token-file FILE");
        let _ = write!(
            html,
            "<p>Nothing is stored here yet. To publish an artifact:</p>\n<pre>{}</pre>\n",
            escape(&command)
        );
    } else {
        html.push_str(
            "<p>Host images as OSTree repositories in tarballs. A manifest’s digest pins everything in it: \
             take the digest from whom you trust, not from this page.</p>\n",
        );
    }
    for (name, versions) in artifacts {
        let _ = writeln!(html, "<section>\n<h2>{}</h2>", escape(name.as_str()));
        for (index, (version, record)) in versions.iter().take(SHOWN).enumerate() {
            html.push_str(&one(name, version, record, (base, index == 0)));
        }
        if let Some(more) = versions.len().checked_sub(SHOWN).filter(|more| *more > 0) {
            let list = escape(&format!("{PREFIX}{name}/"));
            let _ = writeln!(html, "<p><a href=\"{list}\">{more} older versions (JSON)</a></p>");
        }
        html.push_str("</section>\n");
    }
    let _ = write!(
        html,
        "</main>\n<footer><p>oscontainer-builder {} · <a href=\"{PREFIX}\">names as JSON</a> · \
         <a href=\"/metrics\">metrics</a></p></footer>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION")
    );
    html
}

/// One version of `name`; `place` is the base URL and whether it is the newest.
fn one(name: &Name, version: &Name, record: &Record, place: (&str, bool)) -> String {
    let (base, newest) = place;
    let (manifest, tarball) = (path(name, version, FILE), path(name, version, TARBALL_FILE));
    let commands = format!(
        "curl -fLO {base}{manifest} -fLO {base}{tarball}\n\
         sha256sum -c <<'END'\n{}  {FILE}\n{}  {TARBALL_FILE}\nEND",
        record.manifest_digest.hex(),
        record.digest.hex()
    );
    let fetch = format!(
        "oscontainer-aggregator fetch {base}{manifest} \\\n  --digest {} --output repo",
        record.manifest_digest
    );
    let stored = timestamp::rfc3339(record.stored);
    format!(
        "<details{}>\n<summary><strong>{}</strong><span>{}, {}</span></summary>\n<dl>\n\
         <dt>manifest</dt><dd><a href=\"{}\">{FILE}</a> <code>{}</code></dd>\n\
         <dt>tarball</dt><dd><a href=\"{}\">{TARBALL_FILE}</a> <code>{}</code></dd>\n\
         <dt>ref</dt><dd><code>{}</code></dd>\n<dt>commit</dt><dd><code>{}</code></dd>\n\
         <dt>architecture</dt><dd>{}</dd>\n<dt>stored</dt><dd>{stored}</dd>\n</dl>\n\
         <p>Fetch and verify into a repository:</p>\n<pre>{}</pre>\n\
         <p>By hand:</p>\n<pre>{}</pre>\n</details>\n",
        if newest { " open" } else { "" },
        escape(version.as_str()),
        escape(&size(record.size)),
        escape(&stored[..10]),
        escape(&manifest),
        record.manifest_digest,
        escape(&tarball),
        record.digest,
        escape(&record.ref_name),
        record.commit,
        escape(&record.architecture),
        escape(&fetch),
        escape(&commands),
    )
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

/// Text as it may stand in HTML's content and in quoted attributes.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}
