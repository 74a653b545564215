//! What the two servers' pages for people share: the document around them, and the
//! address that their commands name. Plain HTML, no scripts, nothing loaded, readable
//! on a phone and in the dark.

use http::HeaderMap;
use http::header::HOST;
use maud::{DOCTYPE, Markup, PreEscaped, html};

/// The pages' `Content-Security-Policy`: their own style and nothing else.
pub const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
/// Says which scheme the client used, where a proxy or our own TLS has taken it off.
pub const FORWARDED_PROTO: &str = "x-forwarded-proto";
/// Stands in the commands where the client did not say how it reached the server.
const UNKNOWN: &str = "http://HOST:8080";

const STYLE: &str = "
:root { color-scheme: light dark; --line: #d5d9e0; --soft: #f3f5f8; --faint: #5a6372; }
@media (prefers-color-scheme: dark) {
  :root { --line: #363c47; --soft: #1d2129; --faint: #9aa4b5; }
  body { background: #14171c; color: #e4e8ef; }
  a { color: #8ab4ff; }
}
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.5rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .75rem 0; padding: .5rem .75rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
summary span { color: var(--faint); margin-left: .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .75rem 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; }
pre { background: var(--soft); border-radius: .5rem; padding: .75rem; overflow-x: auto; user-select: all; }
.warn { border-left: 4px solid #b45309; padding-left: 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; font-size: .9rem; }
td { border-top: 1px solid var(--line); padding: .2rem .75rem .2rem 0; overflow-wrap: anywhere; vertical-align: top; }
footer { margin-top: 3rem; color: var(--faint); }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
";

/// A whole page: `title` is its heading too, `footer` its last line.
pub fn document(title: &str, content: &Markup, footer: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main { h1 { (title) } (content) }
                footer { p { (footer) } }
            }
        }
    };
    page.into_string()
}

/// Scheme and host under which the client reached the server, if it says so in
/// characters that can do no harm in a shell: people paste the commands.
pub fn origin(headers: &HeaderMap) -> String {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text("x-forwarded-host").or_else(|| text(HOST.as_str())).unwrap_or_default();
    let scheme = if text(FORWARDED_PROTO) == Some("https") { "https" } else { "http" };
    let harmless = |b: u8| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b);
    if host.is_empty() || !host.bytes().all(harmless) { UNKNOWN.to_owned() } else { format!("{scheme}://{host}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_outside_is_shell() {
        for (host, expected) in [
            ("mirror:8080", "http://mirror:8080"),
            ("[::1]:80", "http://[::1]:80"),
            ("a;reboot", UNKNOWN),
            ("$(x)", UNKNOWN),
            ("<b>", UNKNOWN),
            ("", UNKNOWN),
        ] {
            assert_eq!(origin(&HeaderMap::from_iter([(HOST, host.parse().unwrap())])), expected);
        }
    }
}
