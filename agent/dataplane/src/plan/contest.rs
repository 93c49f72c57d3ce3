//! Addresses that several Services claim: who waits for which, in an order that depends on the Services only.

use std::collections::{BTreeSet, HashMap};

use weft_ebpf_abi::ServiceKey;

use crate::desired::{Claim, Desired};
use crate::tables::ServiceName;

/// A Service's right to an address: the kind of claim, then age, then name. The least has it.
type Right<'a> = (Claim, i64, &'a ServiceName);

/// Claims that are not granted.
#[derive(Debug, Default)]
pub(super) struct Contests {
    waiting: HashMap<ServiceKey, BTreeSet<(Claim, i64, ServiceName)>>,
    waits: HashMap<ServiceName, BTreeSet<ServiceKey>>,
    disturbed: BTreeSet<ServiceName>,
}

impl Contests {
    /// Lets the best of several new claims be known before the first of them is looked at.
    pub(super) fn announce(&mut self, changes: &[(ServiceName, Desired)]) {
        if changes.len() < 2 {
            return;
        }
        let mut best: HashMap<ServiceKey, Right<'_>> = HashMap::new();
        for (name, desired) in changes {
            for (key, frontend) in &desired.frontends {
                let right = (frontend.claim, desired.created, name);
                let other = *best.entry(*key).or_insert(right);
                if other != right {
                    best.insert(*key, other.min(right));
                    self.wait(key, other.min(right));
                }
            }
        }
    }

    /// Nobody who waits has a better right.
    pub(super) fn is_best(&self, key: &ServiceKey, right: Right<'_>) -> bool {
        let best = self.waiting.get(key).and_then(BTreeSet::first);
        best.is_none_or(|(claim, created, name)| right <= (*claim, *created, name))
    }

    /// Enters a claim that is not granted.
    pub(super) fn wait(&mut self, key: &ServiceKey, (claim, created, name): Right<'_>) {
        tracing::debug!(service = %name, address = ?key.address, port = ?key.port, "several Services claim this");
        self.waiting.entry(*key).or_default().insert((claim, created, name.clone()));
        self.waits.entry(name.clone()).or_default().insert(*key);
    }

    /// Forgets the claims of a Service.
    pub(super) fn withdraw(&mut self, name: &ServiceName) {
        for key in self.waits.remove(name).into_iter().flatten() {
            if let Some(waiting) = self.waiting.get_mut(&key) {
                waiting.retain(|(_, _, other)| other != name);
                if waiting.is_empty() {
                    self.waiting.remove(&key);
                }
            }
        }
    }

    /// A Service must decide anew.
    pub(super) fn disturb(&mut self, name: &ServiceName) {
        self.disturbed.insert(name.clone());
    }

    /// An address became free: those who wait for it must decide anew.
    pub(super) fn freed(&mut self, key: &ServiceKey) {
        self.disturbed.extend(self.waiting.get(key).into_iter().flatten().map(|(_, _, name)| name.clone()));
    }

    pub(super) fn take_disturbed(&mut self) -> BTreeSet<ServiceName> {
        std::mem::take(&mut self.disturbed)
    }
}
