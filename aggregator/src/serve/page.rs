//! The page at `/`, for people: what is in the repository and the exact commands
//! that take it. No scripts, no files beside it, every value escaped.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use axum::http::HeaderMap;
use axum::http::header::HOST;

use crate::repo::Repository;
use crate::rfc3339;

/// The name that the commands give to this server.
const REMOTE: &str = "oscontainer";
/// What is shown where the client did not say how it reached the server.
const UNKNOWN_HOST: &str = "HOST:8080";
const STYLE: &str = "\
:root{color-scheme:light dark}\
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;\
color:#1b1b1f;background:#fff}\
code,pre{font:14px/1.5 ui-monospace,monospace}\
pre{background:#f1f1f4;padding:.8rem 1rem;border-radius:6px;overflow-x:auto}\
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{font-weight:600}\
dd{margin:0;overflow-wrap:anywhere}h2{margin-top:2.5rem}\
.warn{border-left:4px solid #b45309;padding-left:1rem}\
@media(prefers-color-scheme:dark){body{color:#e6e6ea;background:#16161a}pre{background:#24242b}a{color:#8ab4f8}}";

/// The repository that the page tells about.
pub struct Page {
    repo: PathBuf,
}

/// A ref as the page shows it.
struct Row {
    name: String,
    commit: String,
    version: Option<String>,
    date: Option<String>,
    subject: String,
}

impl Page {
    /// A page about the repository at `repo`.
    pub fn new(repo: &Path) -> Self {
        Self { repo: repo.to_owned() }
    }

    /// The page as it is now, for a client that sent `headers`; it may block.
    ///
    /// # Errors
    /// When the repository cannot be read.
    pub fn html(&self, headers: &HeaderMap) -> Result<String> {
        let repo = Repository::open(&self.repo)?;
        let mut rows = Vec::new();
        for (name, commit) in repo.refs()? {
            let info = repo.commit(&commit)?;
            rows.push(Row {
                name,
                commit: commit.to_string(),
                version: info.version,
                date: rfc3339::utc(info.timestamp),
                subject: info.subject,
            });
        }
        Ok(render(&rows, &base_url(headers))?)
    }
}

/// The URL under which the client reached the server, if it says so in characters
/// that can do no harm in a shell.
fn base_url(headers: &HeaderMap) -> String {
    let value = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let harmless =
        |host: &&str| !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".:-[]_".contains(&b));
    let host = value(HOST.as_str()).filter(harmless).unwrap_or(UNKNOWN_HOST);
    let scheme = if value("x-forwarded-proto") == Some("https") { "https" } else { "http" };
    format!("{scheme}://{host}/")
}

fn render(rows: &[Row], url: &str) -> Result<String, std::fmt::Error> {
    let mut html = String::new();
    write!(
        html,
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>oscontainer</title><style>{STYLE}</style></head><body>\
         <h1>oscontainer</h1><p>This is an OSTree repository. Nodes take their operating system \
         from it with <code>ostree</code> or <code>rpm-ostree</code>.</p>\
         <p class=\"warn\">The commands name the commit, for the commits are not signed: who can change what an \
         HTTP remote answers decides what a node runs that follows the ref alone.</p>\
         <p>Once on each node:</p><pre>ostree remote add --if-not-exists --set=gpg-verify=false {REMOTE} {}</pre>",
        escape(url)
    )?;
    if rows.is_empty() {
        html.push_str("<p>It has no refs.</p>");
    }
    for row in rows {
        let (name, commit) = (escape(&row.name), escape(&row.commit));
        write!(html, "<h2>{name}</h2><dl><dt>Commit</dt><dd><code>{commit}</code></dd>")?;
        let facts = [("Version", row.version.as_ref()), ("Date", row.date.as_ref()), ("Subject", Some(&row.subject))];
        for (label, value) in facts {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                write!(html, "<dt>{label}</dt><dd>{}</dd>", escape(value))?;
            }
        }
        write!(
            html,
            "</dl><p>Change a node to it, at its next boot:</p>\
             <pre>rpm-ostree rebase {REMOTE}:{name} {commit}</pre>\
             <p>Only download it:</p><pre>ostree pull {REMOTE} {name}@{commit}</pre>"
        )?;
    }
    html.push_str("<p><a href=\"/metrics\">metrics</a> · <a href=\"/healthz\">health</a></p></body></html>\n");
    Ok(html)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_outside_is_markup_or_shell() {
        assert_eq!(escape("<a href='x'>&\"</a>"), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;&lt;/a&gt;");
        for (host, expected) in [
            ("mirror:8080", "http://mirror:8080/"),
            ("[::1]:80", "http://[::1]:80/"),
            ("a;reboot", "http://HOST:8080/"),
            ("$(x)", "http://HOST:8080/"),
            ("<b>", "http://HOST:8080/"),
            ("", "http://HOST:8080/"),
        ] {
            assert_eq!(base_url(&HeaderMap::from_iter([(HOST, host.parse().unwrap())])), expected);
        }
    }
}
