//! What the nodes say of Services, and what follows from it for each. Pure: reports and changes come in, verdicts go out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;
use weft_control_client::ObjectKey;

use super::report::Report;

/// How long a node may lag behind a change before that is written down. Nodes tell at once of what they had to program, and
/// of other changes within 20 s.
const GRACE: Duration = Duration::from_secs(30);
/// Nodes that a message names before it only counts.
const MAX_NAMED: usize = 3;

/// What is known of a Service.
#[derive(Debug)]
struct Known {
    /// Resource version of its last change that nodes may have to program.
    version: u64,
    since: Instant,
    /// It was found with a condition: at which version that was, nobody knows any more.
    inherited: bool,
}

/// What the condition should say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) programmed: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
    /// The message must be up to date, not only status and reason.
    pub(super) exact: bool,
}

/// What is to be done about a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    /// Nothing, until something changes.
    Nothing,
    /// Nothing yet: look again after this time.
    Wait(Duration),
    Say(Verdict),
}

/// Everything that is known. The cost of a report is what it changes, and a look at the version of each node.
#[derive(Debug, Default)]
pub(super) struct Book {
    nodes: BTreeMap<Box<str>, Report>,
    services: HashMap<ObjectKey, Known>,
    /// Services that fail, with the nodes that say so.
    failing: HashMap<ObjectKey, BTreeSet<Box<str>>>,
    /// Services whose last change not every node has taken in, by its version.
    pending: BTreeSet<(u64, ObjectKey)>,
    /// Services that nothing can be said of while a node's list of failures is cut short.
    unclear: BTreeSet<ObjectKey>,
}

impl Book {
    /// A Service has come, or changed in a way that nodes may have to program.
    pub(super) fn changed(&mut self, key: &ObjectKey, version: u64, inherited: bool, now: Instant) {
        let before = self.services.insert(key.clone(), Known { version, since: now, inherited });
        if let Some(before) = before {
            self.pending.remove(&(before.version, key.clone()));
        }
        self.pending.insert((version, key.clone()));
    }

    /// A Service is gone, or no matter of the nodes any more.
    pub(super) fn gone(&mut self, key: &ObjectKey) {
        if let Some(known) = self.services.remove(key) {
            self.pending.remove(&(known.version, key.clone()));
        }
        self.unclear.remove(key);
    }

    /// What a node says now; `None` if it doesn't count (any more). Answers the Services to look at.
    pub(super) fn report(&mut self, node: &str, report: Option<Report>) -> BTreeSet<ObjectKey> {
        let mut concerned = BTreeSet::new();
        let before = match &report {
            Some(report) => self.nodes.insert(node.into(), report.clone()),
            None => self.nodes.remove(node),
        };
        let (old, new) = (before.unwrap_or_default(), report.unwrap_or_default());
        for key in old.failing.keys().filter(|key| !new.failing.contains_key(*key)) {
            if let Some(nodes) = self.failing.get_mut(key) {
                nodes.remove(node);
                if nodes.is_empty() {
                    self.failing.remove(key);
                }
            }
            concerned.insert(key.clone());
        }
        for (key, reason) in &new.failing {
            self.failing.entry(key.clone()).or_default().insert(node.into());
            if old.failing.get(key) != Some(reason) {
                concerned.insert(key.clone());
            }
        }
        if old.is_cut_short && !self.nodes.values().any(|report| report.is_cut_short) {
            concerned.append(&mut self.unclear);
        }
        // What the slowest has taken in, all have.
        let slowest = self.nodes.values().map(|report| report.version).min().unwrap_or(0);
        while let Some((version, _)) = self.pending.first()
            && *version <= slowest
            && let Some((_, key)) = self.pending.pop_first()
        {
            concerned.insert(key);
        }
        concerned
    }

    /// What follows for a Service.
    pub(super) fn judge(&mut self, key: &ObjectKey, now: Instant) -> Judgement {
        let Some(known) = self.services.get(key) else { return Judgement::Nothing };
        if self.nodes.is_empty() {
            return Judgement::Nothing;
        }
        let failing = self.failing.get(key);
        if failing.is_none() && self.nodes.values().any(|report| report.is_cut_short) {
            self.unclear.insert(key.clone());
            return Judgement::Nothing;
        }
        let lags = |report: &Report| report.version < known.version;
        let behind: Vec<&str> = self.nodes.iter().filter(|(_, r)| lags(r)).map(|(name, _)| &**name).collect();
        let waited = now.saturating_duration_since(known.since);
        if !behind.is_empty() && waited < GRACE {
            return Judgement::Wait(GRACE - waited);
        }
        let mut not_there: BTreeMap<&str, String> = BTreeMap::new();
        for node in &behind {
            not_there.insert(*node, "it has not said so yet".to_owned());
        }
        for node in failing.into_iter().flatten() {
            let reason = self.nodes.get(node).and_then(|report| report.failing.get(key));
            not_there.insert(&**node, reason.map(ToString::to_string).unwrap_or_default());
        }
        let reason = match (failing.is_some(), behind.is_empty()) {
            (true, _) => "ProgrammingFailed",
            (false, false) => "Pending",
            (false, true) => "Programmed",
        };
        Judgement::Say(Verdict {
            programmed: not_there.is_empty(),
            reason,
            message: message(&not_there, self.nodes.len(), known.version),
            exact: !known.inherited,
        })
    }
}

/// `programmed on 2 of 3 nodes at resource version 4711; node-2: map weft_slot_2 is full`
fn message(not_there: &BTreeMap<&str, String>, nodes: usize, version: u64) -> String {
    let there = nodes - not_there.len();
    let mut text = format!("programmed on {there} of {nodes} nodes at resource version {version}");
    for (node, reason) in not_there.iter().take(MAX_NAMED) {
        text.push_str(&format!("; {node}: {reason}"));
    }
    if not_there.len() > MAX_NAMED {
        text.push_str(&format!("; and {} more", not_there.len() - MAX_NAMED));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("default", name)
    }

    fn at(version: u64) -> Option<Report> {
        Some(Report { version, ..Report::default() })
    }

    fn failing(version: u64, names: &[(&str, &str)]) -> Option<Report> {
        let failing = names.iter().map(|(name, reason)| (key(name), (*reason).into())).collect();
        Some(Report { version, failing, is_cut_short: false })
    }

    fn names(keys: BTreeSet<ObjectKey>) -> Vec<String> {
        keys.into_iter().map(|key| key.name.into()).collect()
    }

    fn said(judgement: Judgement) -> (bool, &'static str, String) {
        match judgement {
            Judgement::Say(verdict) => (verdict.programmed, verdict.reason, verdict.message),
            other @ (Judgement::Nothing | Judgement::Wait(_)) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_service_is_looked_at_once_all_nodes_have_it() {
        let (mut book, now) = (Book::default(), Instant::now());
        book.changed(&key("web"), 10, false, now);
        assert_eq!(book.judge(&key("web"), now), Judgement::Nothing, "no node has spoken");
        assert_eq!(names(book.report("a", at(9))), [""; 0]);
        assert_eq!(names(book.report("b", at(12))), [""; 0]);
        assert_eq!(book.judge(&key("web"), now), Judgement::Wait(GRACE));
        assert_eq!(names(book.report("a", at(10))), ["web"]);
        let all = "programmed on 2 of 2 nodes at resource version 10".to_owned();
        assert_eq!(said(book.judge(&key("web"), now)), (true, "Programmed", all));
        // Nobody has to look again, whatever else happens.
        assert_eq!(names(book.report("a", at(100))), [""; 0]);
        assert_eq!(names(book.report("c", at(100))), [""; 0]);
        assert_eq!(names(book.report("c", None)), [""; 0]);
    }

    #[test]
    fn a_failure_is_named_and_its_end_too() {
        let (mut book, now) = (Book::default(), Instant::now());
        for node in ["a", "b"] {
            book.report(node, at(5));
        }
        for name in ["big", "small"] {
            book.changed(&key(name), 10, false, now);
        }
        assert_eq!(names(book.report("a", at(10))), [""; 0], "b lags");
        assert_eq!(names(book.report("b", failing(10, &[("big", "map is full")]))), ["big", "small"]);
        let text = "programmed on 1 of 2 nodes at resource version 10; b: map is full".to_owned();
        assert_eq!(said(book.judge(&key("big"), now)), (false, "ProgrammingFailed", text));
        assert!(said(book.judge(&key("small"), now)).0);
        assert_eq!(names(book.report("b", failing(11, &[("big", "map is full")]))), [""; 0], "nothing new");
        assert_eq!(names(book.report("b", failing(11, &[("big", "another reason")]))), ["big"]);
        assert_eq!(names(book.report("b", at(11))), ["big"]);
        assert!(said(book.judge(&key("big"), now)).0);
        // A node that goes takes what it said with it.
        book.report("b", failing(12, &[("small", "map is full")]));
        assert_eq!(names(book.report("b", None)), ["small"]);
        assert!(said(book.judge(&key("small"), now)).0);
    }

    #[test]
    fn a_node_that_lags_is_written_down_after_a_while() {
        let (mut book, now) = (Book::default(), Instant::now());
        for node in ["a", "b", "c", "d", "e"] {
            book.report(node, at(5));
        }
        book.report("e", at(20));
        book.changed(&key("web"), 10, false, now);
        let half = now + GRACE / 2;
        assert_eq!(book.judge(&key("web"), half), Judgement::Wait(GRACE / 2));
        let text = "programmed on 1 of 5 nodes at resource version 10; a: it has not said so yet; b: it has not said so \
                    yet; c: it has not said so yet; and 1 more";
        assert_eq!(said(book.judge(&key("web"), now + GRACE)), (false, "Pending", text.to_owned()));
        for node in ["a", "b", "c"] {
            assert_eq!(names(book.report(node, at(11))), [""; 0]);
        }
        // The last one never speaks again, and its Node goes.
        assert_eq!(names(book.report("d", None)), ["web"]);
        assert!(said(book.judge(&key("web"), now + GRACE)).0);
    }

    #[test]
    fn of_a_list_that_is_cut_short_nothing_is_concluded() {
        let (mut book, now) = (Book::default(), Instant::now());
        for name in ["listed", "other"] {
            book.changed(&key(name), 10, false, now);
        }
        let mut report = failing(10, &[("listed", "map is full")]).unwrap();
        report.is_cut_short = true;
        book.report("a", Some(report));
        assert_eq!(said(book.judge(&key("listed"), now)).1, "ProgrammingFailed");
        assert_eq!(book.judge(&key("other"), now), Judgement::Nothing);
        assert_eq!(names(book.report("a", failing(10, &[("listed", "map is full")]))), ["other"]);
        assert!(said(book.judge(&key("other"), now)).0);
    }

    #[test]
    fn what_is_gone_leaves_nothing() {
        let (mut book, now) = (Book::default(), Instant::now());
        book.report("a", at(1));
        for version in 2..100 {
            book.changed(&key("web"), version, false, now);
        }
        assert_eq!(book.pending.len(), 1);
        book.gone(&key("web"));
        assert!(book.pending.is_empty() && book.services.is_empty());
        assert_eq!(book.judge(&key("web"), now), Judgement::Nothing);
    }
}
