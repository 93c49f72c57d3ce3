//! Identities: which peers in use an address belongs to, and the rules that this means.

use std::collections::BTreeSet;

use weft_ebpf_abi::policy::IDENTITY_NONE;

use super::super::objects::{Name, number};
use super::super::ranges;
use super::super::rules::{self, Element};
use super::sets::selects;
use super::{Holder, Identity, Planner, has_port};

impl Planner {
    /// Works out the identities of a pod's addresses.
    pub(super) fn identify(&mut self, name: &Name) {
        let Some(pod) = self.pods.get(name).cloned() else { return };
        let reached = self.reach(&name.namespace).clone();
        let mut of_pod: BTreeSet<Element> = reached
            .into_iter()
            .filter(|id| self.peers.get(id).is_some_and(|used| selects(&used.peer.spec, &pod.labels)))
            .map(Element::Peer)
            .collect();
        let ports = self.named.keys().filter_map(|(protocol, port)| has_port(&pod, *protocol, port));
        of_pod.extend(ports.map(Element::Port));
        for address in &pod.addresses {
            if self.owners.get(address).and_then(|owners| owners.last()) != Some(name) {
                continue;
            }
            // What only ranges say of it, the ranges' map says too.
            let elements = (!of_pod.is_empty()).then(|| {
                let ranges = ranges::lookup(&self.nested, address).into_iter().flatten();
                of_pod.iter().cloned().chain(ranges.copied().map(Element::Peer)).collect()
            });
            self.hold(Holder::Pod(*address), elements);
        }
    }

    /// Gives a holder the identity of these elements, or none.
    pub(super) fn hold(&mut self, holder: Holder, elements: Option<BTreeSet<Element>>) {
        let new = elements.as_ref().map(|e| if e.is_empty() { IDENTITY_NONE } else { number(e) });
        let old = self.identity_of.get(&holder).copied();
        if new == old {
            return;
        }
        if let (Some(id), Some(elements)) = (new.filter(|id| *id != IDENTITY_NONE), elements) {
            self.acquire_identity(id, elements, holder);
        }
        match (holder, new) {
            (Holder::Pod(address), Some(id)) => self.tables.identities.put(address, id),
            (Holder::Pod(address), None) => self.tables.identities.remove(&address),
            // An exception within a range is an entry too: it hides the range.
            (Holder::Range(range), Some(id)) => self.tables.ranges.put(range, id),
            (Holder::Range(range), None) => self.tables.ranges.remove(&range),
        }
        match new {
            Some(id) => drop(self.identity_of.insert(holder, id)),
            None => drop(self.identity_of.remove(&holder)),
        }
        if let Some(old) = old {
            self.release_identity(old, &holder);
        }
    }

    fn acquire_identity(&mut self, id: u64, elements: BTreeSet<Element>, holder: Holder) {
        if let Some(known) = self.identities.get_mut(&id) {
            known.holders.insert(holder);
            return;
        }
        let mut sets = BTreeSet::new();
        for element in &elements {
            match element {
                Element::Peer(peer) => {
                    let Some(used) = self.peers.get_mut(peer) else { continue };
                    used.identities.insert(id);
                    sets.extend(used.sets.iter().copied());
                }
                Element::Port(port) => {
                    let key = (port.protocol, port.name.clone());
                    sets.extend(self.named.get(&key).into_iter().flatten().copied());
                }
            }
        }
        self.identities.insert(id, Identity { elements, holders: BTreeSet::from([holder]) });
        for set in sets {
            self.put_rules(set, id);
        }
    }

    fn release_identity(&mut self, id: u64, holder: &Holder) {
        let Some(known) = self.identities.get_mut(&id) else { return };
        known.holders.remove(holder);
        if !known.holders.is_empty() {
            return;
        }
        let Some(Identity { elements, .. }) = self.identities.remove(&id) else { return };
        for element in &elements {
            if let Element::Peer(peer) = element
                && let Some(used) = self.peers.get_mut(peer)
            {
                used.identities.remove(&id);
            }
        }
        for (set, known) in &self.sets {
            for rule in rules::for_identity(*set, &known.spec, id, &elements) {
                self.tables.rules.remove(&rule);
            }
        }
    }

    /// Enters the rules of a set for an identity.
    pub(super) fn put_rules(&mut self, set: u64, identity: u64) {
        let (Some(known), Some(who)) = (self.sets.get(&set), self.identities.get(&identity)) else { return };
        for rule in rules::for_identity(set, &known.spec, identity, &who.elements) {
            self.tables.rules.put(rule, 1);
        }
    }
}
