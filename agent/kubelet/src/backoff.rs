//! Exponential back-off by key, as upstream's `flowcontrol.Backoff`: doubles up to a bound, forgotten after twice the bound.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

use crate::clock;

/// First delay of a crashing container or a missing image.
pub(crate) const INITIAL: Duration = Duration::from_secs(10);
/// Longest delay.
pub(crate) const MAX: Duration = Duration::from_secs(300);

/// Delays by key; keys are containers of one pod, so the map is bounded by its spec.
#[derive(Debug, Default)]
pub(crate) struct Backoffs {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    delay: Duration,
    updated: Timestamp,
}

impl Entry {
    fn expired(&self, event: Timestamp) -> bool {
        event > clock::after(self.updated, MAX * 2)
    }
}

impl Backoffs {
    /// The end of the delay that counts from `event`, and the delay; `None` if there is nothing to wait for.
    pub(crate) fn waiting(
        &self,
        key: &str,
        event: Timestamp,
        now: Timestamp,
    ) -> Option<(Timestamp, Duration)> {
        let entry = self.entries.get(key)?;
        let end = clock::after(event, entry.delay);
        (!entry.expired(event) && now < end).then_some((end, entry.delay))
    }

    /// Doubles the delay of `key` (or begins with the first).
    pub(crate) fn next(&mut self, key: &str, event: Timestamp, now: Timestamp) {
        let delay = match self.entries.get(key) {
            Some(entry) if !entry.expired(event) => (entry.delay * 2).min(MAX),
            _ => INITIAL,
        };
        self.entries.insert(key.to_owned(), Entry { delay, updated: now });
    }

    /// The delay of `key` as it stands.
    pub(crate) fn delay(&self, key: &str) -> Duration {
        self.entries.get(key).map_or(INITIAL, |entry| entry.delay)
    }

    /// Forgets `key`.
    pub(crate) fn forget(&mut self, key: &str) {
        self.entries.remove(key);
    }
}

/// A duration as Go prints it: `10s`, `2m40s`, `5m0s`.
pub(crate) fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s}s"),
        (h, m, s) => format!("{h}h{m}m{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).unwrap()
    }

    #[test]
    fn first_restart_is_at_once_then_delays_double_up_to_the_bound() {
        let mut b = Backoffs::default();
        assert_eq!(b.waiting("c", at(0), at(0)), None);
        b.next("c", at(0), at(0));
        assert_eq!(b.waiting("c", at(1), at(1)), Some((at(11), INITIAL)));
        assert_eq!(b.waiting("c", at(1), at(11)), None);
        for (now, expected) in (11..).zip([20, 40, 80, 160, 300, 300]) {
            b.next("c", at(now), at(now));
            assert_eq!(b.delay("c"), Duration::from_secs(expected));
        }
    }

    #[test]
    fn ten_minutes_of_running_forget_the_delay() {
        let mut b = Backoffs::default();
        b.next("c", at(0), at(0));
        b.next("c", at(0), at(0));
        assert_eq!(b.waiting("c", at(601), at(601)), None);
        b.next("c", at(601), at(601));
        assert_eq!(b.delay("c"), INITIAL);
    }

    #[test]
    fn durations_read_like_go() {
        let text = |s| go_duration(Duration::from_secs(s));
        assert_eq!((text(10).as_str(), text(160).as_str(), text(300).as_str()), ("10s", "2m40s", "5m0s"));
    }
}
