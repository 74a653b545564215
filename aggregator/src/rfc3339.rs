//! A commit's time as text.

/// `YYYY-MM-DDTHH:MM:SSZ` for `timestamp` seconds since 1970 (RFC 3339, 5.6); `None`
/// after the year 9999, where that form ends.
pub fn utc(timestamp: u64) -> Option<String> {
    /// 10000-01-01.
    const END: u64 = 253_402_300_800;
    if timestamp >= END {
        return None;
    }
    let (days, seconds) = (timestamp / 86_400, timestamp % 86_400);
    // Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days:
    // the year begins in March, in eras of 400 years.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    Some(format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (timestamp, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_795_262_171, "2026-11-21T11:56:11Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (253_402_300_799, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(utc(timestamp).as_deref(), Some(expected));
        }
        assert_eq!(utc(253_402_300_800), None);
    }
}
