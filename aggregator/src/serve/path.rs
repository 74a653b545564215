//! Which paths of a repository are served, and what their names promise. It is an
//! allow list: what libostree's clients ask for, and nothing else that lies there.

use oscontainer_program::files::{IMMUTABLE, NO_CACHE};

/// What a path is, by its name alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The path below the repository; none of its components is empty, hidden or `..`.
    pub path: String,
    /// The object's name, where it pins the content.
    pub object: Option<String>,
    /// The `Content-Type`.
    pub content_type: &'static str,
    /// The `Cache-Control`.
    pub cache_control: &'static str,
}

/// Text in the repository: its config and its refs.
const TEXT: &str = "text/plain; charset=utf-8";
/// Everything else.
const BINARY: &str = "application/octet-stream";
/// Object types whose name is a checksum of their content (libostree, "Anatomy of
/// an OSTree repository"). Detached metadata has the commit's name, and may change.
const PINNED: [&str; 4] = ["filez", "commit", "dirtree", "dirmeta"];

/// What the request path `path` is, percent-decoded by the caller; `None` when it is
/// not served.
pub fn entry(path: &str) -> Option<Entry> {
    let path = path.strip_prefix('/')?;
    // Most requests are for these, and their names are of hex digits.
    if let Some((directory, file)) = path.strip_prefix("objects/").and_then(|rest| rest.split_once('/')) {
        let object = object_name(directory, file)?;
        let cache_control = if object.is_some() { IMMUTABLE } else { NO_CACHE };
        return Some(Entry { path: path.to_owned(), object, content_type: BINARY, cache_control });
    }
    let components: Vec<&str> = path.split('/').collect();
    if !components.iter().all(|component| plain(component)) {
        return None;
    }
    let content_type = match components[..] {
        ["config"] => TEXT,
        ["summary" | "summary.sig"] | ["summaries", _] => BINARY,
        ["refs", "heads" | "mirrors" | "remotes", _, ..] => TEXT,
        ["deltas", directory, _, _] if directory.len() == 2 => BINARY,
        ["delta-indexes", directory, file] if directory.len() == 2 && file.ends_with(".index") => BINARY,
        ["extensions", _, _, ..] => BINARY,
        _ => return None,
    };
    Some(Entry { path: path.to_owned(), object: None, content_type, cache_control: NO_CACHE })
}

/// Letters, digits and what libostree's names have besides (its base64 has `_` and `+`);
/// not hidden, and so neither `.` nor `..`.
fn plain(component: &str) -> bool {
    !component.starts_with('.')
        && !component.is_empty()
        && component.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'+' | b'=' | b'-'))
}

/// `Some(Some(name))` for an object that its name pins, `Some(None)` for one that may
/// change, `None` for what is no object.
fn object_name(directory: &str, file: &str) -> Option<Option<String>> {
    let (rest, kind) = file.split_once('.')?;
    let hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if directory.len() != 2 || rest.len() != 62 || !hex(directory) || !hex(rest) {
        return None;
    }
    match kind {
        "commitmeta" => Some(None),
        kind if PINNED.contains(&kind) => Some(Some(format!("{directory}{file}"))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_clients_ask_for_is_served() {
        let rest = "0".repeat(62);
        for (path, pinned) in [
            ("/config".to_owned(), false),
            ("/summary".into(), false),
            ("/summary.sig".into(), false),
            ("/refs/heads/a/b/c".into(), false),
            (format!("/objects/ab/{rest}.filez"), true),
            (format!("/objects/ab/{rest}.commitmeta"), false),
            ("/deltas/Ab/c_+d-e/superblock".into(), false),
            ("/delta-indexes/Ab/c.index".into(), false),
            ("/extensions/a/b".into(), false),
        ] {
            let found = entry(&path).unwrap_or_else(|| panic!("{path}"));
            assert_eq!(found.cache_control == IMMUTABLE, pinned, "{path}");
            assert_eq!(found.object.is_some(), pinned, "{path}");
        }
        for path in [
            "",
            "config",
            "//config",
            "/config/",
            "/refs/heads",
            "/refs/heads/",
            "/refs/heads/../../config",
            "/refs/heads/.hidden",
            "/refs/other/a",
            "/state/x",
            "/tmp/x",
            "/.lock",
            "/objects",
            "/objects/ab/x.filez",
            &format!("/objects/AB/{rest}.filez"),
            &format!("/objects/ab/{rest}.file"),
            &format!("/objects/ab/{rest}.filez.tmp"),
            "/extensions/a",
            "/refs/heads/a b",
            "/refs/heads/a\0",
        ] {
            assert_eq!(entry(path), None, "{path}");
        }
    }
}
