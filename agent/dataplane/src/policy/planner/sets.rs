//! Sets of rules: which a pod of this node has, and what comes into use with them.

use std::collections::BTreeSet;

use weft_ebpf_abi::policy::{
    POLICY_DRY_EGRESS, POLICY_DRY_INGRESS, POLICY_EGRESS, POLICY_INGRESS, PolicyPod,
};

use super::super::objects::{Labels, Name, Peer, PeerSpec, Policy, PortRule};
use super::super::ranges;
use super::super::rules::{self, SetSpec, Trial};
use super::{Assigned, PeerUse, Planner, Set, first_of, has_port, names_in};

/// Whether a peer may select pods of a namespace with these labels.
pub(super) fn reaches(spec: &PeerSpec, namespace: &str, labels: &Labels) -> bool {
    match spec {
        PeerSpec::Pods { namespace: own, .. } => own == namespace,
        PeerSpec::PodsOf { namespaces, .. } => namespaces.matches(labels),
        PeerSpec::Block { .. } => false,
    }
}

impl Planner {
    /// Works out which sets a pod of this node has.
    pub(super) fn assign(&mut self, name: &Name) {
        let mut new = Assigned::default();
        if let Some(pod) = self.pods.get(name).filter(|pod| pod.local) {
            let devices = pod.addresses.iter().filter_map(|address| self.devices.get(address));
            new.devices = devices.copied().collect();
        }
        for (ingress, dry, spec, trial) in self.wanted_sets(name) {
            let set = rules::set_number(&spec, trial.as_ref());
            let value = &mut new.value;
            let (place, flag) = match (ingress, dry) {
                (true, false) => (&mut value.ingress, POLICY_INGRESS),
                (false, false) => (&mut value.egress, POLICY_EGRESS),
                (true, true) => (&mut value.dry_ingress, POLICY_DRY_INGRESS),
                (false, true) => (&mut value.dry_egress, POLICY_DRY_EGRESS),
            };
            *place = set;
            value.flags |= flag;
            self.acquire_set(set, spec, trial);
        }
        let old = self.assigned.remove(name).unwrap_or_default();
        for device in old.devices.difference(&new.devices) {
            if self.live.contains(device) && old.value.flags != 0 {
                self.linger(*device, old.value);
            } else {
                self.tables.pods.remove(device);
            }
        }
        self.retiring.extend(sets_of(&old.value));
        for device in &new.devices {
            self.unlinger(*device);
            if new.value.flags == 0 {
                self.tables.pods.remove(device);
            } else {
                self.tables.pods.put(*device, new.value);
            }
        }
        if new != Assigned::default() {
            self.assigned.insert(name.clone(), new);
        }
    }

    /// Keeps what holds for a device although its pod's object is gone.
    fn linger(&mut self, device: u32, value: PolicyPod) {
        for set in sets_of(&value) {
            if let Some(known) = self.sets.get_mut(&set) {
                known.uses += 1;
            }
        }
        self.lingering.insert(device, value);
    }

    /// The device has another pod, or is gone.
    pub(super) fn unlinger(&mut self, device: u32) {
        if let Some(value) = self.lingering.remove(&device) {
            self.retiring.extend(sets_of(&value));
        }
    }

    /// What its policies allow it: for each way that they are about, in force and on trial. What is on trial adds to what is in
    /// force.
    fn wanted_sets(&self, name: &Name) -> Vec<(bool, bool, SetSpec, Option<Trial>)> {
        let Some(pod) = self.pods.get(name).filter(|pod| pod.local) else { return Vec::new() };
        let all = self.policies.range(first_of(&name.namespace)..);
        let all = all.take_while(|(policy, _)| policy.namespace == name.namespace);
        let mine: Vec<_> = all.filter(|(_, policy)| policy.pods.matches(&pod.labels)).collect();
        let mut sets = Vec::new();
        for ingress in [true, false] {
            let about =
                |policy: &'_ Policy| if ingress { policy.ingress.is_some() } else { policy.egress.is_some() };
            let own = ingress.then_some(&pod.ports);
            let join = |dry: bool| {
                let meant = mine.iter().filter(|(_, policy)| dry || !policy.dry_run);
                let rules =
                    meant.flat_map(|(_, policy)| if ingress { &policy.ingress } else { &policy.egress });
                rules::set(rules.flatten(), own)
            };
            if mine.iter().any(|(_, policy)| about(policy) && !policy.dry_run) {
                sets.push((ingress, false, join(false), None));
            }
            let tried = mine.iter().filter(|(_, policy)| about(policy) && policy.dry_run);
            let policies: BTreeSet<Name> = tried.map(|(name, _)| (*name).clone()).collect();
            if !policies.is_empty() {
                sets.push((ingress, true, join(true), Some(Trial { ingress, policies })));
            }
        }
        sets
    }

    fn acquire_set(&mut self, set: u64, spec: SetSpec, trial: Option<Trial>) {
        if let Some(known) = self.sets.get_mut(&set) {
            known.uses += 1;
            return;
        }
        let peers: BTreeSet<Peer> = spec.iter().filter_map(|(peer, _)| peer.clone()).collect();
        for (protocol, name) in named_ports(&spec) {
            let users = self.named.entry((protocol, name.clone())).or_default();
            if users.is_empty() {
                let having = self.pods.iter().filter(|(_, pod)| has_port(pod, protocol, &name).is_some());
                self.dirty_pods.extend(having.map(|(name, _)| name.clone()));
            }
            users.insert(set);
        }
        for rule in rules::for_all(set, &spec) {
            self.tables.rules.put(rule, 1);
        }
        self.sets.insert(set, Set { spec, trial, uses: 1 });
        let mut identities = BTreeSet::new();
        for peer in peers {
            if let Some(used) = self.peers.get_mut(&peer.id) {
                used.sets.insert(set);
                identities.extend(used.identities.iter().copied());
            } else {
                self.peer_comes(&peer, set);
            }
        }
        // Identities of named ports, which have no peer's list.
        if self.sets.get(&set).is_some_and(|s| !named_ports(&s.spec).is_empty()) {
            identities.extend(self.identities.keys().copied());
        }
        for identity in identities {
            self.put_rules(set, identity);
        }
    }

    /// Lets go of a set; with its last use its rules go, and the peers that only it named.
    pub(super) fn release_set(&mut self, set: u64) {
        let Some(known) = self.sets.get_mut(&set) else { return };
        known.uses -= 1;
        if known.uses > 0 {
            return;
        }
        let Some(Set { spec, .. }) = self.sets.remove(&set) else { return };
        for rule in rules::for_all(set, &spec) {
            self.tables.rules.remove(&rule);
        }
        for (id, identity) in &self.identities {
            for rule in rules::for_identity(set, &spec, *id, &identity.elements) {
                self.tables.rules.remove(&rule);
            }
        }
        for (protocol, name) in named_ports(&spec) {
            let key = (protocol, name);
            let Some(users) = self.named.get_mut(&key) else { continue };
            users.remove(&set);
            if users.is_empty() {
                let having = self.pods.iter().filter(|(_, pod)| has_port(pod, key.0, &key.1).is_some());
                self.dirty_pods.extend(having.map(|(name, _)| name.clone()));
                self.named.remove(&key);
            }
        }
        for peer in spec.iter().filter_map(|(peer, _)| peer.as_ref()).collect::<BTreeSet<_>>() {
            let Some(used) = self.peers.get_mut(&peer.id) else { continue };
            used.sets.remove(&set);
            if used.sets.is_empty() {
                self.peer_goes(peer.id);
            }
        }
    }

    /// A peer comes into use: whom it names gets another identity.
    fn peer_comes(&mut self, peer: &Peer, set: u64) {
        let used = PeerUse { peer: peer.clone(), sets: BTreeSet::from([set]), identities: BTreeSet::new() };
        self.peers.insert(peer.id, used);
        let namespaces: Vec<String> = match peer.spec.as_ref() {
            PeerSpec::Block { .. } => {
                self.dirty_ranges = true;
                return;
            }
            PeerSpec::Pods { namespace, .. } => vec![namespace.clone()],
            PeerSpec::PodsOf { namespaces, .. } => {
                // A namespace that is not known yet counts as one without labels.
                let none = Labels::new();
                let mut all: Vec<&String> = self.pods.keys().map(|name| &name.namespace).collect();
                all.dedup();
                let hit = all
                    .into_iter()
                    .filter(|name| namespaces.matches(self.namespaces.get(*name).unwrap_or(&none)));
                hit.cloned().collect()
            }
        };
        for namespace in namespaces {
            let hit = names_in(&self.pods, &namespace).into_iter();
            let hit =
                hit.filter(|name| self.pods.get(name).is_some_and(|pod| selects(&peer.spec, &pod.labels)));
            self.dirty_pods.extend(hit);
        }
        let (namespaces, none) = (&self.namespaces, Labels::new());
        self.reach.retain(|namespace, _| {
            !reaches(&peer.spec, namespace, namespaces.get(namespace).unwrap_or(&none))
        });
    }

    fn peer_goes(&mut self, id: u64) {
        let Some(used) = self.peers.remove(&id) else { return };
        for reached in self.reach.values_mut() {
            reached.retain(|other| *other != id);
        }
        if matches!(*used.peer.spec, PeerSpec::Block { .. }) {
            self.dirty_ranges = true;
            return;
        }
        for identity in used.identities {
            let Some(identity) = self.identities.get(&identity) else { continue };
            for holder in &identity.holders {
                if let super::Holder::Pod(address) = holder
                    && let Some(owner) = self.owners.get(address).and_then(|owners| owners.last())
                {
                    self.dirty_pods.insert(owner.clone());
                }
            }
        }
    }

    /// Nests the ranges in use again, and looks at the pods in those that changed.
    pub(super) fn nest_ranges(&mut self) {
        let blocks = self.peers.values().map(|used| (used.peer.id, used.peer.spec.as_ref()));
        let nested = ranges::nest(blocks);
        let old = std::mem::replace(&mut self.nested, nested);
        let all: BTreeSet<_> = old.keys().chain(self.nested.keys()).copied().collect();
        for range in all {
            let new = self.nested.get(&range);
            if old.get(&range) == new {
                continue;
            }
            let (first, last) = ranges::span(&range);
            let inside = self.owners.range(first..=last).filter_map(|(_, owners)| owners.last());
            self.dirty_pods.extend(inside.cloned());
            let elements = new.map(|ids| ids.iter().copied().map(rules::Element::Peer).collect());
            self.hold(super::Holder::Range(range), elements);
        }
    }
}

pub(super) fn selects(spec: &PeerSpec, labels: &Labels) -> bool {
    match spec {
        PeerSpec::Pods { pods, .. } | PeerSpec::PodsOf { pods, .. } => pods.matches(labels),
        PeerSpec::Block { .. } => false,
    }
}

fn named_ports(spec: &SetSpec) -> BTreeSet<(u8, String)> {
    let named = spec.iter().filter_map(|(_, port)| match port {
        PortRule::Named(protocol, name) => Some((*protocol, name.clone())),
        PortRule::Any | PortRule::Span(..) => None,
    });
    named.collect()
}

fn sets_of(value: &PolicyPod) -> impl Iterator<Item = u64> {
    let all = [
        (POLICY_INGRESS, value.ingress),
        (POLICY_EGRESS, value.egress),
        (POLICY_DRY_INGRESS, value.dry_ingress),
        (POLICY_DRY_EGRESS, value.dry_egress),
    ];
    let flags = value.flags;
    all.into_iter().filter(move |(flag, _)| flags & flag != 0).map(|(_, set)| set)
}
