//! Moments as text.

use jiff::Timestamp;

/// `YYYY-MM-DDTHH:MM:SSZ` for `seconds` since 1970 (RFC 3339, 5.6); `None` after the
/// year 9999, where that form ends.
pub fn utc(seconds: u64) -> Option<String> {
    let moment = Timestamp::from_second(i64::try_from(seconds).ok()?).ok()?;
    Some(moment.to_string())
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn moments_are_rfc_3339_up_to_its_last_year() {
        for (seconds, text) in [
            (0, Some("1970-01-01T00:00:00Z")),
            (951_782_400, Some("2000-02-29T00:00:00Z")),
            (253_402_207_200, Some("9999-12-30T22:00:00Z")),
            (253_402_300_800, None),
            (u64::MAX, None),
        ] {
            assert_eq!(utc(seconds).as_deref(), text);
        }
    }
}
