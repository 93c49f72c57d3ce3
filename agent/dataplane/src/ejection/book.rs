//! Which backends are ejected and until when. Pure: the clock is handed in, in seconds.

use std::collections::{BTreeMap, BTreeSet};

use weft_ebpf_abi::{BackendKey, FAILURES_IN_A_ROW, Failures};

/// How long a backend is left out the first time.
pub const FIRST_SECONDS: u32 = 30;
/// And at most; it doubles with each time.
pub const LONGEST_SECONDS: u32 = 300;

/// A backend that is ejected or comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Which.
    pub backend: BackendKey,
    /// For how many seconds it is left out; `None` if it comes back.
    pub seconds: Option<u32>,
}

/// An entry to set, or one to remove.
pub(super) type Change = (BackendKey, Option<Failures>);

/// The backends that are watched, as the agent knows them; what failed is the programs' to count.
#[derive(Debug, Default)]
pub(super) struct Book(BTreeMap<BackendKey, Failures>);

impl Book {
    /// Takes over what an earlier agent knew.
    pub(super) fn adopt(entries: impl IntoIterator<Item = (BackendKey, Failures)>) -> Self {
        Self(entries.into_iter().collect())
    }

    /// Makes these the ones that are watched, with their owners: another pod on an address begins anew.
    pub(super) fn watch(&mut self, wanted: &BTreeMap<BackendKey, u64>) -> Vec<Change> {
        let gone = self.0.keys().filter(|key| !wanted.contains_key(*key)).map(|key| (*key, None));
        let new = wanted.iter().filter(|(key, owner)| self.0.get(*key).is_none_or(|f| f.owner != **owner));
        let fresh = |owner| Failures { owner, ..Failures::default() };
        let changes: Vec<_> = gone.chain(new.map(|(key, owner)| (*key, Some(fresh(*owner))))).collect();
        for change in &changes {
            self.record(change);
        }
        changes
    }

    /// A backend failed too often in a row, as its entry in the map says. It is ejected, unless it is so already.
    pub(super) fn failed(&mut self, key: BackendKey, found: &Failures, now: u32) -> Option<(Turn, Change)> {
        let known = self.0.get(&key)?;
        if known.back_at != 0 || known.owner != found.owner || found.failed < FAILURES_IN_A_ROW {
            return None;
        }
        let seconds = wait(found.ejections);
        let ejections = found.ejections.saturating_add(1);
        // 0 stands for not ejected.
        let ejected = Failures { ejections, back_at: now.saturating_add(seconds).max(1), ..*found };
        let change = (key, Some(ejected));
        self.record(&change);
        Some((Turn { backend: key, seconds: Some(seconds) }, change))
    }

    /// Those whose time is over come back, on trial: one more failure ejects them again, for longer.
    pub(super) fn due(&mut self, now: u32) -> Vec<(Turn, Change)> {
        let due = self.0.iter().filter(|(_, f)| f.back_at != 0 && f.back_at <= now);
        let back = |f: &Failures| Failures { back_at: 0, failed: FAILURES_IN_A_ROW - 1, ..*f };
        let back: Vec<_> =
            due.map(|(key, f)| (Turn { backend: *key, seconds: None }, (*key, Some(back(f))))).collect();
        for (_, change) in &back {
            self.record(change);
        }
        back
    }

    /// When the next one is due.
    pub(super) fn next(&self) -> Option<u32> {
        self.0.values().map(|f| f.back_at).filter(|at| *at != 0).min()
    }

    /// Those that are ejected.
    pub(super) fn ejected(&self) -> BTreeSet<BackendKey> {
        self.0.iter().filter(|(_, f)| f.back_at != 0).map(|(key, _)| *key).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets a backend that could not be entered: it will be tried again.
    pub(super) fn forget(&mut self, key: &BackendKey) {
        self.0.remove(key);
    }

    fn record(&mut self, (key, entry): &Change) {
        match entry {
            Some(entry) => drop(self.0.insert(*key, *entry)),
            None => drop(self.0.remove(key)),
        }
    }
}

/// Seconds of an ejection that follows `before` others without a success between them.
fn wait(before: u32) -> u32 {
    FIRST_SECONDS.checked_shl(before.min(16)).unwrap_or(LONGEST_SECONDS).min(LONGEST_SECONDS)
}

#[cfg(test)]
mod tests {
    use weft_ebpf_abi::{Address, Port, TCP};

    use super::*;

    fn key(last: u8) -> BackendKey {
        BackendKey { address: Address::v4([10, 42, 0, last]), port: Port::new(80), protocol: TCP, pad: 0 }
    }

    fn watching(owner: u64) -> Book {
        let mut book = Book::default();
        let changes = book.watch(&BTreeMap::from([(key(1), owner), (key(2), 7)]));
        assert_eq!(changes.len(), 2);
        book
    }

    fn counted(owner: u64, failed: u32, ejections: u32) -> Failures {
        Failures { owner, failed, ejections, ..Failures::default() }
    }

    #[test]
    fn too_few_failures_eject_nobody() {
        let mut book = watching(3);
        assert_eq!(book.failed(key(1), &counted(3, FAILURES_IN_A_ROW - 1, 0), 100), None);
        assert_eq!(book.failed(key(9), &counted(3, FAILURES_IN_A_ROW, 0), 100), None, "nobody watches it");
        assert_eq!(book.failed(key(1), &counted(4, FAILURES_IN_A_ROW, 0), 100), None, "another pod's");
        assert!(book.ejected().is_empty() && book.next().is_none());
    }

    #[test]
    fn waits_double_until_a_connection_succeeds() {
        let mut book = watching(3);
        let (mut now, mut entry, mut waits) = (100, counted(3, FAILURES_IN_A_ROW, 0), Vec::new());
        for _ in 0..6 {
            let (turn, (_, ejected)) = book.failed(key(1), &entry, now).unwrap();
            let ejected = ejected.unwrap();
            waits.extend(turn.seconds);
            assert_eq!(book.ejected(), BTreeSet::from([key(1)]));
            assert_eq!(book.failed(key(1), &ejected, now), None, "it is ejected once");
            assert!(book.due(ejected.back_at - 1).is_empty());
            now = book.next().unwrap();
            let back = book.due(now);
            assert_eq!(back[0].0, Turn { backend: key(1), seconds: None });
            entry = back[0].1.1.unwrap();
            assert!(entry.failed < FAILURES_IN_A_ROW && book.ejected().is_empty());
            // One more failure is enough.
            entry.failed += 1;
        }
        assert_eq!(waits, [30, 60, 120, 240, 300, 300]);
        // The programs clear both counts when a connection succeeds.
        let (turn, _) = book.failed(key(1), &counted(3, FAILURES_IN_A_ROW, 0), now).unwrap();
        assert_eq!(turn.seconds, Some(30));
    }

    #[test]
    fn another_pod_on_the_address_begins_anew() {
        let mut book = watching(3);
        book.failed(key(1), &counted(3, FAILURES_IN_A_ROW, 0), 100).unwrap();
        let changes = book.watch(&BTreeMap::from([(key(1), 4)]));
        assert_eq!(changes, [(key(2), None), (key(1), Some(counted(4, 0, 0)))]);
        assert!(book.ejected().is_empty());
        assert_eq!(book.watch(&BTreeMap::from([(key(1), 4)])), []);
    }

    #[test]
    fn the_next_agent_goes_on() {
        let mut book = watching(3);
        let (_, change) = book.failed(key(1), &counted(3, FAILURES_IN_A_ROW, 1), 100).unwrap();
        let mut next = Book::adopt([(change.0, change.1.unwrap())]);
        assert_eq!((next.ejected(), next.next()), (BTreeSet::from([key(1)]), Some(160)));
        assert_eq!(next.watch(&BTreeMap::from([(key(1), 3)])), [], "the same pod stays ejected");
    }
}
