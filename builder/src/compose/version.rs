//! The version of a compose, from the treefile's `automatic-version-prefix`: the
//! prefix, then a number that counts up from the version of the commit before
//! (rpm-ostree, rust/src/version.rs and docs/treefile.md).

use anyhow::Result;
use oscontainer_program::reject;
use ostree::glib::DateTime;

/// The version after `last`. `<date:FORMAT>` in the prefix becomes the date of
/// `now` (seconds since 1970, UTC) in strftime's format.
///
/// # Errors
/// Rejected when the date's format is not closed or unknown.
pub fn next(prefix: &str, suffix: Option<&str>, last: Option<&str>, now: i64) -> Result<String> {
    let (prefix, dated) = match prefix.split_once("<date:") {
        None => (prefix.to_owned(), false),
        Some((before, rest)) => {
            let Some((format, after)) = rest.split_once('>') else {
                reject!("automatic-version-prefix {prefix:?}: <date: is not closed");
            };
            let date = match DateTime::from_unix_utc(now).and_then(|time| time.format(format)) {
                Ok(date) => date,
                Err(error) => reject!("automatic-version-prefix {prefix:?}: formatting the date: {error}"),
            };
            (format!("{before}{date}{after}"), true)
        }
    };
    let suffix = suffix.unwrap_or(".");
    let number = last.and_then(|last| last.strip_prefix(&prefix)).map(|rest| {
        rest.strip_prefix(suffix)
            .and_then(|number| number.parse::<u64>().ok())
            .map_or(1, |number| number.saturating_add(1))
    });
    Ok(match number {
        Some(number) => format!("{prefix}{suffix}{number}"),
        None if dated => format!("{prefix}{suffix}0"),
        None => prefix,
    })
}

#[cfg(test)]
mod tests {
    use super::next;

    #[test]
    fn versions_count_up_within_a_prefix() {
        let noon = 1_795_262_400; // 2026-11-21T12:00:00Z
        for (prefix, suffix, last, expected) in [
            ("1", None, None, "1"),
            ("1", None, Some("1"), "1.1"),
            ("1", None, Some("1.9"), "1.10"),
            ("2", None, Some("1.9"), "2"),
            ("1", Some("-"), Some("1-3"), "1-4"),
            ("1.<date:%Y%m%d>", None, None, "1.20261121.0"),
            ("1.<date:%Y%m%d>", None, Some("1.20261121.0"), "1.20261121.1"),
            ("1.<date:%Y%m%d>", None, Some("1.20261120.4"), "1.20261121.0"),
        ] {
            assert_eq!(next(prefix, suffix, last, noon).unwrap(), expected, "{prefix} {last:?}");
        }
        assert!(next("1.<date:%Y", None, None, noon).is_err());
    }
}
