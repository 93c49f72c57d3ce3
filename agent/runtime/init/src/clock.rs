//! The wall clock, and its form in logs.

use std::fmt::{self, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

const NS: i64 = 1_000_000_000;

/// Nanoseconds since the epoch.
pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Writes `2026-01-02T03:04:05.123456789Z`.
pub(crate) fn rfc3339(out: &mut String, ns: i64) -> fmt::Result {
    let (seconds, fraction) = (ns.div_euclid(NS), ns.rem_euclid(NS));
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    write!(out, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{fraction:09}Z")
}

/// Year, month and day of a day number since the epoch, in the Gregorian calendar. Counting starts in March, so that
/// the leap day is a year's last.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(ns: i64) -> String {
        let mut out = String::new();
        rfc3339(&mut out, ns).unwrap();
        out
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(said(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(said(1_709_164_799 * NS + 5), "2024-02-28T23:59:59.000000005Z");
        assert_eq!(said(1_709_164_800 * NS), "2024-02-29T00:00:00.000000000Z");
        assert_eq!(said(1_767_323_045 * NS + 123_456_789), "2026-01-02T03:04:05.123456789Z");
        assert_eq!(said(951_868_800 * NS), "2000-03-01T00:00:00.000000000Z");
    }
}
