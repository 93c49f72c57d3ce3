//! How long ago: the approximations that kubectl shows.

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

const MINUTE: i64 = 60;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;
const YEAR: i64 = 365 * DAY;

/// A duration in at most two units, as in the AGE column: `3m5s`, `47h`, `2y18d`.
pub fn human_duration(duration: SignedDuration) -> String {
    let seconds = duration.as_secs();
    if let Some(text) = seconds_or_invalid(seconds, 2 * MINUTE) {
        text
    } else if seconds < 10 * MINUTE {
        two_units(seconds / MINUTE, "m", seconds % MINUTE, "s")
    } else if seconds < 3 * HOUR {
        format!("{}m", seconds / MINUTE)
    } else if seconds < 8 * HOUR {
        two_units(seconds / HOUR, "h", seconds % HOUR / MINUTE, "m")
    } else if seconds < 2 * DAY {
        format!("{}h", seconds / HOUR)
    } else if seconds < 8 * DAY {
        two_units(seconds / DAY, "d", seconds % DAY / HOUR, "h")
    } else if seconds < 2 * YEAR {
        format!("{}d", seconds / DAY)
    } else if seconds < 8 * YEAR {
        two_units(seconds / YEAR, "y", seconds % YEAR / DAY, "d")
    } else {
        format!("{}y", seconds / YEAR)
    }
}

/// A duration in one unit: `3m`, `1d`.
pub fn short_human_duration(duration: SignedDuration) -> String {
    let seconds = duration.as_secs();
    if let Some(text) = seconds_or_invalid(seconds, MINUTE) {
        return text;
    }
    let (unit, name) = match seconds {
        ..HOUR => (MINUTE, "m"),
        HOUR..DAY => (HOUR, "h"),
        DAY..YEAR => (DAY, "d"),
        YEAR.. => (YEAR, "y"),
    };
    format!("{}{name}", seconds / unit)
}

/// Clocks of two machines differ: up to two seconds in the future count as now.
fn seconds_or_invalid(seconds: i64, limit: i64) -> Option<String> {
    match seconds {
        ..-1 => Some("<invalid>".to_owned()),
        -1 => Some("0s".to_owned()),
        _ if seconds < limit => Some(format!("{seconds}s")),
        _ => None,
    }
}

fn two_units(large: i64, large_unit: &str, small: i64, small_unit: &str) -> String {
    if small == 0 {
        format!("{large}{large_unit}")
    } else {
        format!("{large}{large_unit}{small}{small_unit}")
    }
}

/// The instant in an RFC 3339 string; none if it is absent or unreadable.
pub(super) fn instant(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

/// Time since the instant in `value`; `<unknown>` without one.
pub(super) fn since(value: &Value, now: Timestamp) -> String {
    instant(value).map_or_else(|| "<unknown>".to_owned(), |then| human_duration(now.duration_since(then)))
}

/// Time since the object was created.
pub(super) fn age(object: &Value, now: Timestamp) -> Value {
    since(&object["metadata"]["creationTimestamp"], now).into()
}
