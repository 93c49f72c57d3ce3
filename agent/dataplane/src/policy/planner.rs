//! What the maps should say, kept up to date change by change. Pure but for [`Planner::sync`], which writes the difference.
//!
//! Order is what makes a change seamless: rules for new sets and identities are written first, then identities of addresses, then
//! sets of pods, and only then old rules go. A set that no pod has any more is kept until the pods' new ones are in the kernel, so
//! that in between it knows the new identities too.

mod identities;
mod sets;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use weft_ebpf_abi::Address;
use weft_ebpf_abi::policy::{PolicyPod, RangeKey, RuleKey};

use super::maps::PolicyTable;
use super::mirror::Mirror;
use super::objects::{Labels, Name, NamedPort, Peer, Pod, Policy};
use super::ranges::Nested;
use super::rules::{Element, SetSpec, Trial};
use crate::maps::{MapError, MapSet};

/// Who has an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    Pod(Address),
    Range(RangeKey),
}

#[derive(Debug, Default)]
struct Identity {
    elements: BTreeSet<Element>,
    holders: BTreeSet<Holder>,
}

#[derive(Debug)]
struct Set {
    spec: SetSpec,
    trial: Option<Trial>,
    /// Pods that have it, and those that have it until the next flush.
    uses: usize,
}

#[derive(Debug)]
struct PeerUse {
    peer: Peer,
    sets: BTreeSet<u64>,
    identities: BTreeSet<u64>,
}

/// What holds for a pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Assigned {
    devices: BTreeSet<u32>,
    value: PolicyPod,
}

/// The four maps.
#[derive(Debug)]
struct Tables {
    pods: Mirror<u32, PolicyPod>,
    identities: Mirror<Address, u64>,
    ranges: Mirror<RangeKey, u64>,
    rules: Mirror<RuleKey, u32>,
}

/// How big things are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Policies known.
    pub policies: usize,
    /// Pods of this node that a policy isolates.
    pub isolated: usize,
    /// Identities in use.
    pub identities: usize,
    /// Rules in the kernel.
    pub rules: usize,
}

/// The planner of a node.
#[derive(Debug)]
pub struct Planner {
    namespaces: BTreeMap<String, Labels>,
    pods: BTreeMap<Name, Pod>,
    /// Pods of this node.
    local: BTreeSet<Name>,
    /// Addresses that a pod of this node was given and the API may not say yet: uid and addresses.
    granted: BTreeMap<Name, (String, Vec<Address>)>,
    policies: BTreeMap<Name, Policy>,
    /// Devices that lead to addresses of this node's pods.
    devices: HashMap<Address, u32>,
    /// The devices among them, and others of pods.
    live: BTreeSet<u32>,
    /// What holds for a device that its pod's object has left before it: the pod is being killed.
    lingering: BTreeMap<u32, PolicyPod>,
    /// Pods of an address, the last one first in right.
    owners: BTreeMap<Address, Vec<Name>>,

    assigned: BTreeMap<Name, Assigned>,
    sets: HashMap<u64, Set>,
    peers: HashMap<u64, PeerUse>,
    /// Sets that name a port of the destination.
    named: BTreeMap<(u8, String), BTreeSet<u64>>,
    identities: HashMap<u64, Identity>,
    identity_of: HashMap<Holder, u64>,
    nested: Nested,
    /// Peers that may select pods of a namespace, worked out when needed.
    reach: HashMap<String, Vec<u64>>,
    /// Sets to let go of once the pods' new ones are in the kernel.
    retiring: Vec<u64>,

    dirty_local: BTreeSet<Name>,
    dirty_pods: BTreeSet<Name>,
    dirty_ranges: bool,
    tables: Tables,
}

impl std::hash::Hash for Holder {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        match self {
            Self::Pod(address) => address.hash(state),
            Self::Range(range) => range.hash(state),
        }
    }
}

impl Default for Planner {
    fn default() -> Self {
        Self::new()
    }
}

impl Planner {
    /// Nothing is known.
    #[must_use]
    pub fn new() -> Self {
        Self {
            namespaces: BTreeMap::new(),
            pods: BTreeMap::new(),
            local: BTreeSet::new(),
            granted: BTreeMap::new(),
            policies: BTreeMap::new(),
            devices: HashMap::new(),
            live: BTreeSet::new(),
            lingering: BTreeMap::new(),
            owners: BTreeMap::new(),
            assigned: BTreeMap::new(),
            sets: HashMap::new(),
            peers: HashMap::new(),
            named: BTreeMap::new(),
            identities: HashMap::new(),
            identity_of: HashMap::new(),
            nested: Nested::new(),
            reach: HashMap::new(),
            retiring: Vec::new(),
            dirty_local: BTreeSet::new(),
            dirty_pods: BTreeSet::new(),
            dirty_ranges: false,
            tables: Tables {
                pods: Mirror::new(PolicyTable::Pods),
                identities: Mirror::new(PolicyTable::Identities),
                ranges: Mirror::new(PolicyTable::Ranges),
                rules: Mirror::new(PolicyTable::Rules),
            },
        }
    }

    /// Takes in what an earlier agent left in the maps. What turns out not to be wanted goes with the first sync.
    ///
    /// # Errors
    /// If a map can't be read.
    pub fn adopt(&mut self, maps: &mut dyn MapSet<PolicyTable>) -> Result<(), MapError> {
        self.tables.pods.adopt(maps)?;
        self.tables.identities.adopt(maps)?;
        self.tables.ranges.adopt(maps)?;
        self.tables.rules.adopt(maps)
    }

    /// Enters a namespace.
    pub fn apply_namespace(&mut self, name: &str, labels: &Labels) {
        if self.namespaces.get(name) != Some(labels) {
            self.namespaces.insert(name.to_owned(), labels.clone());
            self.namespace_changed(name);
        }
    }

    /// Removes a namespace.
    pub fn delete_namespace(&mut self, name: &str) {
        if self.namespaces.remove(name).is_some() {
            self.namespace_changed(name);
        }
    }

    /// Its pods are looked at again only if other peers reach them now.
    fn namespace_changed(&mut self, name: &str) {
        let before = self.reach.remove(name);
        if before.as_ref() != Some(self.reach(name)) {
            self.dirty_pods.extend(names_in(&self.pods, name));
        }
    }

    /// Enters a pod; `None` if policy does not know it (any more).
    pub fn apply_pod(&mut self, name: &Name, pod: Option<Pod>) {
        let Some(mut pod) = pod else { return self.delete_pod(name) };
        match self.granted.get(name) {
            // What its network gave it is newer than what its status says.
            Some((uid, addresses)) if *uid == pod.uid && pod.local => pod.addresses.clone_from(addresses),
            Some(_) => drop(self.granted.remove(name)),
            None => {}
        }
        let old = self.pods.get(name);
        if old == Some(&pod) {
            return;
        }
        let was = old.map(|old| old.addresses.clone()).unwrap_or_default();
        self.own(name, &was, &pod.addresses);
        if pod.local {
            self.local.insert(name.clone());
        } else {
            self.local.remove(name);
        }
        self.dirty_local.insert(name.clone());
        self.dirty_pods.insert(name.clone());
        self.pods.insert(name.clone(), pod);
    }

    /// Removes a pod; its addresses are free.
    pub fn delete_pod(&mut self, name: &Name) {
        self.granted.remove(name);
        let Some(old) = self.pods.remove(name) else { return };
        self.own(name, &old.addresses, &[]);
        self.local.remove(name);
        self.dirty_local.insert(name.clone());
    }

    /// Enters a pod of this node with the addresses that its network has just given it.
    pub fn grant(&mut self, name: &Name, pod: Pod, addresses: Vec<Address>) {
        self.granted.insert(name.clone(), (pod.uid.clone(), addresses));
        self.apply_pod(name, Some(pod));
    }

    /// Enters a policy.
    pub fn apply_policy(&mut self, name: &Name, policy: Policy) {
        if self.policies.get(name) != Some(&policy) {
            self.select(name);
            self.policies.insert(name.clone(), policy);
            self.select(name);
        }
    }

    /// Removes a policy.
    pub fn delete_policy(&mut self, name: &Name) {
        self.select(name);
        self.policies.remove(name);
    }

    /// Marks the pods of this node that a policy selects.
    fn select(&mut self, name: &Name) {
        let Some(policy) = self.policies.get(name) else { return };
        let all = self.local.range(first_of(&name.namespace)..);
        let all = all.take_while(|pod| pod.namespace == name.namespace);
        let hit = all.filter(|pod| self.pods.get(*pod).is_some_and(|pod| policy.pods.matches(&pod.labels)));
        self.dirty_local.extend(hit.cloned());
    }

    /// Sets which devices lead to which addresses of this node's pods.
    pub fn set_devices(&mut self, devices: HashMap<Address, u32>) {
        let all: BTreeSet<&Address> = self.devices.keys().chain(devices.keys()).collect();
        let changed = all.into_iter().filter(|address| self.devices.get(*address) != devices.get(*address));
        let pods = changed.filter_map(|address| self.owners.get(address)).flatten();
        self.dirty_local.extend(pods.cloned());
        self.live = devices.values().copied().collect();
        self.devices = devices;
        let gone: Vec<u32> = self.lingering.keys().filter(|d| !self.live.contains(*d)).copied().collect();
        for device in gone {
            self.tables.pods.remove(&device);
            self.unlinger(device);
        }
    }

    /// Addresses of this node's pods that no device is known for.
    #[must_use]
    pub fn without_device(&self) -> Vec<Address> {
        let pods = self.local.iter().filter_map(|name| self.pods.get(name));
        let addresses = pods.flat_map(|pod| pod.addresses.iter());
        addresses.filter(|address| !self.devices.contains_key(*address)).copied().collect()
    }

    /// Addresses of this node's pods that ports of the node lead to.
    #[must_use]
    pub fn with_host_ports(&self) -> BTreeSet<Address> {
        let pods = self.local.iter().filter_map(|name| self.pods.get(name)).filter(|pod| pod.host_ports);
        pods.flat_map(|pod| pod.addresses.iter().copied()).collect()
    }

    /// Pods' names, for a relist.
    #[must_use]
    pub fn pod_names(&self) -> Vec<Name> {
        self.pods.keys().cloned().collect()
    }

    /// Policies' names, for a relist.
    #[must_use]
    pub fn policy_names(&self) -> Vec<Name> {
        self.policies.keys().cloned().collect()
    }

    /// Namespaces' names, for a relist.
    #[must_use]
    pub fn namespace_names(&self) -> Vec<String> {
        self.namespaces.keys().cloned().collect()
    }

    /// Sets on trial, by their numbers.
    #[must_use]
    pub fn trials(&self) -> BTreeMap<u64, Trial> {
        self.sets.iter().filter_map(|(set, known)| Some((*set, known.trial.clone()?))).collect()
    }

    /// How big things are.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            policies: self.policies.len(),
            isolated: self.tables.pods.wanted().len(),
            identities: self.identities.len(),
            rules: self.tables.rules.wanted().len(),
        }
    }

    /// Whether the maps lag behind.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        let sources = !self.dirty_local.is_empty() || !self.dirty_pods.is_empty() || self.dirty_ranges;
        let tables = &self.tables;
        sources
            || !self.retiring.is_empty()
            || tables.pods.is_dirty()
            || tables.identities.is_dirty()
            || tables.ranges.is_dirty()
            || tables.rules.is_dirty()
    }

    /// Brings the maps up to date.
    ///
    /// # Errors
    /// If an entry fails: it stays to be done, and nothing that depends on it is done before.
    pub fn sync(&mut self, maps: &mut dyn MapSet<PolicyTable>) -> Result<(), MapError> {
        while self.is_dirty() {
            self.settle();
            self.flush(maps)?;
            for set in std::mem::take(&mut self.retiring) {
                self.release_set(set);
            }
        }
        Ok(())
    }

    /// Works out what follows from the changes.
    fn settle(&mut self) {
        loop {
            while let Some(name) = self.dirty_local.pop_first() {
                self.assign(&name);
            }
            if std::mem::take(&mut self.dirty_ranges) {
                self.nest_ranges();
            }
            let Some(name) = self.dirty_pods.pop_first() else { break };
            self.identify(&name);
        }
    }

    fn flush(&mut self, maps: &mut dyn MapSet<PolicyTable>) -> Result<(), MapError> {
        let tables = &mut self.tables;
        tables.rules.write(maps)?;
        tables.ranges.write(maps)?;
        tables.identities.write(maps)?;
        tables.identities.clear(maps)?;
        tables.ranges.clear(maps)?;
        tables.pods.write(maps)?;
        tables.pods.clear(maps)?;
        tables.rules.clear(maps)
    }

    /// Keeps in mind whose an address is. The last pod that came with it has it: of two, one has ended.
    fn own(&mut self, name: &Name, before: &[Address], after: &[Address]) {
        for address in before {
            if let Some(owners) = self.owners.get_mut(address) {
                owners.retain(|owner| owner != name);
                if owners.is_empty() {
                    self.owners.remove(address);
                }
            }
            self.touched(address);
        }
        for address in after {
            self.owners.entry(*address).or_default().push(name.clone());
            self.touched(address);
        }
    }

    /// The owner of an address may be another: its identity is worked out again, or let go.
    fn touched(&mut self, address: &Address) {
        match self.owners.get(address).and_then(|owners| owners.last()) {
            Some(owner) => drop(self.dirty_pods.insert(owner.clone())),
            None => self.hold(Holder::Pod(*address), None),
        }
    }

    /// Peers that may select pods of a namespace.
    fn reach(&mut self, namespace: &str) -> &Vec<u64> {
        let labels = self.namespaces.get(namespace);
        let empty = Labels::new();
        let peers = &self.peers;
        self.reach.entry(namespace.to_owned()).or_insert_with(|| {
            let labels = labels.unwrap_or(&empty);
            let mut ids: Vec<u64> = peers
                .values()
                .filter(|used| sets::reaches(&used.peer.spec, namespace, labels))
                .map(|used| used.peer.id)
                .collect();
            ids.sort_unstable();
            ids
        })
    }
}

/// A name before all of a namespace.
fn first_of(namespace: &str) -> Name {
    Name { namespace: namespace.to_owned(), name: String::new() }
}

/// Names of the pods of a namespace.
fn names_in(pods: &BTreeMap<Name, Pod>, namespace: &str) -> Vec<Name> {
    let all = pods.range(first_of(namespace)..).map(|(name, _)| name);
    all.take_while(|name| name.namespace == namespace).cloned().collect()
}

/// Whether a pod has a port of this name.
fn has_port(pod: &Pod, protocol: u8, name: &str) -> Option<NamedPort> {
    pod.ports.iter().find(|port| port.protocol == protocol && port.name == name).cloned()
}
