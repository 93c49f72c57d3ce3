//! Times of the API: RFC 3339 in UTC, to the second or to the microsecond.
use jiff::{Timestamp, fmt::strtime};

/// Text that is no time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("parsing time {text:?} as \"2006-01-02T15:04:05Z07:00\": cannot parse {rest:?} as {part:?}")]
pub struct TimeError {
    text: String,
    rest: String,
    part: &'static str,
}

/// Parts of a time in order, each with its fixed length; the fraction and the zone follow.
const PARTS: [(&str, usize); 11] = [
    ("2006", 4),
    ("-", 1),
    ("01", 2),
    ("-", 1),
    ("02", 2),
    ("T", 1),
    ("15", 2),
    (":", 1),
    ("04", 2),
    (":", 1),
    ("05", 2),
];

/// Parses RFC 3339, strictly.
pub fn parse(text: &str) -> Result<Timestamp, TimeError> {
    let error = |rest: &str, part| TimeError { text: text.to_owned(), rest: rest.to_owned(), part };
    let mut rest = text;
    for (part, length) in PARTS {
        let fits = rest.get(..length).is_some_and(|piece| {
            piece == part || length > 1 && piece.bytes().all(|byte| byte.is_ascii_digit())
        });
        if !fits {
            return Err(error(rest, part));
        }
        rest = &rest[length..];
    }
    if let Some(fraction) = rest.strip_prefix('.') {
        let zone = fraction.trim_start_matches(|c: char| c.is_ascii_digit());
        if zone.len() == fraction.len() {
            return Err(error(rest, "Z07:00"));
        }
        rest = zone;
    }
    let numeric = rest.len() == 6 && rest.starts_with(['+', '-']) && rest.as_bytes()[3] == b':';
    if rest != "Z" && !numeric {
        return Err(error(rest, "Z07:00"));
    }
    // What is left to be wrong is a day or an hour that doesn't exist.
    text.parse().ok().ok_or_else(|| error(text, "2006"))
}

/// The form of `metav1.Time`.
pub fn seconds(time: Timestamp) -> String {
    strtime::format("%Y-%m-%dT%H:%M:%SZ", time).expect("the format has only parts that a time has")
}

/// The form of `metav1.MicroTime`.
pub fn micros(time: Timestamp) -> String {
    strtime::format("%Y-%m-%dT%H:%M:%S.%6fZ", time).expect("the format has only parts that a time has")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_normalised() {
        let again = |text: &str| seconds(parse(text).unwrap());
        assert_eq!(again("2024-02-29T12:00:00Z"), "2024-02-29T12:00:00Z");
        assert_eq!(again("2024-01-01T01:00:00.999+02:00"), "2023-12-31T23:00:00Z");
        assert_eq!(micros(parse("2024-01-01T00:00:00.5Z").unwrap()), "2024-01-01T00:00:00.500000Z");
    }

    #[test]
    fn refuses_like_upstream() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(
            error("soon"),
            r#"parsing time "soon" as "2006-01-02T15:04:05Z07:00": cannot parse "soon" as "2006""#
        );
        assert!(error("2024-01-01").ends_with(r#"cannot parse "" as "T""#));
        assert!(error("2024-01-01 00:00:00Z").ends_with(r#"cannot parse " 00:00:00Z" as "T""#));
        assert!(error("2024-01-01T00:00:00").ends_with(r#"cannot parse "" as "Z07:00""#));
        assert!(parse("2024-02-30T00:00:00Z").is_err());
    }
}
