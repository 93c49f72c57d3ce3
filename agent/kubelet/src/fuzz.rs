//! What the fuzzer feeds: lines of container logs, quantities in pod specs.

use crate::{logs, quantity};

/// A line of a log file without its newline; its text, and whether the rest of the container's line follows.
pub fn log_line(line: &[u8]) -> Option<(&[u8], bool)> {
    let read = logs::parse(line)?;
    assert!(line.starts_with(read.stamp.as_bytes()), "the time as written");
    assert!(line.ends_with(read.text), "the text is all that is behind the tags");
    assert_eq!(read.stamp.parse().ok(), Some(read.time));
    Some((read.text, read.partial))
}

/// Thousandths of a quantity.
pub fn quantity_milli(text: &str) -> Option<i128> {
    quantity::milli(text)
}
