//! The difference between what the maps say and what they should say, as ordered operations. Pure: applying is the reconciler's.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use weft_ebpf_abi::{Address, BACKEND_ACTIVE, BackendKey, BackendValue, ServiceKey, ServiceValue, SlotKey};

use crate::desired::{Desired, Known, ListName};
use crate::tables::ServiceName;

/// One change of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Enter a backend or change it.
    PutBackend(BackendKey, BackendValue),
    /// Enter a node's address.
    PutNodeAddress(Address),
    /// Set a place in a list.
    PutSlot(SlotKey, BackendKey),
    /// Enter a Service's address or change it.
    PutService(ServiceKey, ServiceValue),
    /// Remove a Service's address.
    DeleteService(ServiceKey),
    /// Remove a place behind the end of its list.
    DeleteSlot(SlotKey),
    /// Remove a node's address.
    DeleteNodeAddress(Address),
    /// Remove a backend: flows to it end.
    DeleteBackend(BackendKey),
}

impl Op {
    /// Order of application: whatever a reader finds leads to something that is there.
    #[must_use]
    pub fn phase(&self) -> usize {
        match self {
            Self::PutBackend(..) => 0,
            Self::PutNodeAddress(_) => 1,
            Self::PutSlot(..) => 2,
            Self::PutService(..) => 3,
            Self::DeleteService(_) => 4,
            Self::DeleteSlot(_) => 5,
            Self::DeleteNodeAddress(_) => 6,
            Self::DeleteBackend(_) => 7,
        }
    }
}

/// What the maps say, as far as every operation that succeeded is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Services' addresses.
    pub services: BTreeMap<ServiceKey, ServiceValue>,
    /// Lists by number.
    pub lists: BTreeMap<u32, BTreeMap<u32, BackendKey>>,
    /// Backends.
    pub backends: BTreeMap<BackendKey, BackendValue>,
    /// Addresses of the node.
    pub node_addresses: BTreeSet<Address>,
}

impl Ledger {
    /// Notes an operation that succeeded.
    pub fn record(&mut self, op: &Op) {
        match op {
            Op::PutBackend(key, value) => drop(self.backends.insert(*key, *value)),
            Op::PutNodeAddress(address) => drop(self.node_addresses.insert(*address)),
            Op::PutSlot(key, backend) => {
                self.lists.entry(key.list).or_default().insert(key.index, *backend);
            }
            Op::PutService(key, value) => drop(self.services.insert(*key, *value)),
            Op::DeleteService(key) => drop(self.services.remove(key)),
            Op::DeleteSlot(key) => {
                if let Some(list) = self.lists.get_mut(&key.list) {
                    list.remove(&key.index);
                    if list.is_empty() {
                        self.lists.remove(&key.list);
                    }
                }
            }
            Op::DeleteNodeAddress(address) => drop(self.node_addresses.remove(address)),
            Op::DeleteBackend(key) => drop(self.backends.remove(key)),
        }
    }
}

/// What a Service has in the maps, or may have after operations that failed.
#[derive(Debug, Default)]
struct Owned {
    frontends: BTreeSet<ServiceKey>,
    lists: BTreeMap<ListName, u32>,
    backends: BTreeSet<BackendKey>,
}

/// Plans changes of the maps. It owns the numbers of lists and generations.
#[derive(Debug)]
pub struct Planner {
    /// What the maps say.
    pub ledger: Ledger,
    owned: HashMap<ServiceName, Owned>,
    desired: HashMap<ServiceName, Desired>,
    owner_of: HashMap<ServiceKey, ServiceName>,
    references: HashMap<BackendKey, BTreeMap<ServiceName, Known>>,
    /// Generations given in plans that are not applied yet.
    pending: HashMap<BackendKey, BackendValue>,
    claimed: HashSet<u32>,
    next_list: u32,
    next_generation: u32,
}

impl Planner {
    /// Adopts maps as found; numbers go on behind theirs.
    #[must_use]
    pub fn adopt(ledger: Ledger) -> Self {
        let in_services = ledger.services.values().map(|v| v.list).max().unwrap_or(0);
        let last_list = ledger.lists.keys().copied().max().unwrap_or(0).max(in_services);
        let last_generation = ledger.backends.values().map(|b| b.generation).max().unwrap_or(0);
        Self {
            ledger,
            owned: HashMap::new(),
            desired: HashMap::new(),
            owner_of: HashMap::new(),
            references: HashMap::new(),
            pending: HashMap::new(),
            claimed: HashSet::new(),
            next_list: last_list.wrapping_add(1),
            next_generation: last_generation.wrapping_add(1),
        }
    }

    /// Plans for Services that changed; `None` for one that is gone. Each operation names its Service by its place in `changes`.
    pub fn plan(&mut self, changes: &[(ServiceName, Option<Desired>)]) -> Vec<(usize, Op)> {
        for (name, desired) in changes {
            self.intend(name, desired.clone().unwrap_or_default());
        }
        let mut ops = Vec::new();
        for (index, (name, _)) in changes.iter().enumerate() {
            let mut own = Vec::new();
            self.plan_backends(name, &mut own);
            self.plan_lists(name, &mut own);
            self.plan_services(name, &mut own);
            self.release(name);
            ops.extend(own.into_iter().map(|op| (index, op)));
        }
        ops.sort_by_key(|(_, op)| op.phase());
        ops
    }

    /// Plans the removal of all that no Service wants. To be called once all sources are known.
    #[must_use]
    pub fn plan_prune(&self) -> Vec<Op> {
        let services = self.ledger.services.keys().filter(|k| !self.owner_of.contains_key(k));
        let mut ops: Vec<_> = services.map(|k| Op::DeleteService(*k)).collect();
        for (list, slots) in self.ledger.lists.iter().filter(|(l, _)| !self.claimed.contains(l)) {
            ops.extend(slots.keys().rev().map(|i| Op::DeleteSlot(SlotKey { list: *list, index: *i })));
        }
        let backends = self.ledger.backends.keys().filter(|k| !self.references.contains_key(k));
        ops.extend(backends.map(|k| Op::DeleteBackend(*k)));
        ops
    }

    /// Plans the node's own addresses.
    #[must_use]
    pub fn plan_node_addresses(&self, wanted: &BTreeSet<Address>) -> Vec<Op> {
        let known = &self.ledger.node_addresses;
        let new = wanted.difference(known).map(|a| Op::PutNodeAddress(*a));
        new.chain(known.difference(wanted).map(|a| Op::DeleteNodeAddress(*a))).collect()
    }

    /// Notes that an operation succeeded.
    pub fn record(&mut self, op: &Op) {
        self.ledger.record(op);
        if let Op::PutBackend(key, _) = op {
            self.pending.remove(key);
        }
    }

    /// Number of Services known.
    #[must_use]
    pub fn services(&self) -> usize {
        self.desired.values().filter(|d| !d.frontends.is_empty()).count()
    }

    fn intend(&mut self, name: &ServiceName, mut desired: Desired) {
        // Two Services may claim one external address and port: the first keeps it.
        desired.frontends.retain(|key, _| match self.owner_of.get(key) {
            Some(owner) if owner != name => {
                tracing::warn!(service = %name, other = %owner, address = ?key.address, port = ?key.port,
                    "another Service has this address and port");
                false
            }
            Some(_) | None => true,
        });
        let owned = self.owned.entry(name.clone()).or_default();
        for (key, known) in &desired.backends {
            self.references.entry(*key).or_default().insert(name.clone(), *known);
            owned.backends.insert(*key);
        }
        for key in owned.backends.iter().filter(|k| !desired.backends.contains_key(k)) {
            if let Some(users) = self.references.get_mut(key) {
                users.remove(name);
                if users.is_empty() {
                    self.references.remove(key);
                }
            }
        }
        for key in desired.frontends.keys() {
            self.owner_of.insert(*key, name.clone());
            owned.frontends.insert(*key);
        }
        for list in desired.lists.keys() {
            if !owned.lists.contains_key(list) {
                let adopted = desired.frontends.iter().filter(|(_, f)| f.list == Some(*list));
                let mut adopted = adopted.filter_map(|(k, _)| self.ledger.services.get(k).map(|v| v.list));
                let number = adopted.find(|number| !self.claimed.contains(number)).unwrap_or_else(|| {
                    self.next_list += 1;
                    self.next_list - 1
                });
                self.claimed.insert(number);
                owned.lists.insert(*list, number);
            }
        }
        self.desired.insert(name.clone(), desired);
    }

    fn plan_backends(&mut self, name: &ServiceName, ops: &mut Vec<Op>) {
        let Some(owned) = self.owned.get(name) else { return };
        for key in &owned.backends {
            let current = self.ledger.backends.get(key);
            let Some(users) = self.references.get(key) else {
                if current.is_some() {
                    ops.push(Op::DeleteBackend(*key));
                }
                continue;
            };
            let flags = if users.values().any(|u| u.active) { BACKEND_ACTIVE } else { 0 };
            let owner = users.values().find(|u| u.active).or(users.values().next()).map_or(0, |u| u.owner);
            let same = |value: &&BackendValue| value.owner == owner;
            let generation = match current.filter(same).or(self.pending.get(key).filter(same)) {
                Some(value) => value.generation,
                None => {
                    self.next_generation = self.next_generation.wrapping_add(1);
                    self.next_generation.wrapping_sub(1)
                }
            };
            let value = BackendValue { generation, flags, owner };
            if current != Some(&value) {
                self.pending.insert(*key, value);
                ops.push(Op::PutBackend(*key, value));
            }
        }
    }

    fn plan_lists(&self, name: &ServiceName, ops: &mut Vec<Op>) {
        let (Some(owned), Some(desired)) = (self.owned.get(name), self.desired.get(name)) else { return };
        let empty = BTreeMap::new();
        let nothing = BTreeSet::new();
        for (list, number) in &owned.lists {
            let slots = self.ledger.lists.get(number).unwrap_or(&empty);
            plan_slots(*number, slots, desired.lists.get(list).unwrap_or(&nothing), ops);
        }
    }

    fn plan_services(&self, name: &ServiceName, ops: &mut Vec<Op>) {
        let (Some(owned), Some(desired)) = (self.owned.get(name), self.desired.get(name)) else { return };
        for key in &owned.frontends {
            let current = self.ledger.services.get(key);
            let Some(frontend) = desired.frontends.get(key) else {
                if current.is_some() {
                    ops.push(Op::DeleteService(*key));
                }
                continue;
            };
            let list = frontend.list.and_then(|list| {
                let count = u32::try_from(desired.lists.get(&list)?.len()).ok()?;
                Some((*owned.lists.get(&list)?, count))
            });
            let (list, count) = list.unwrap_or((0, 0));
            let (affinity_seconds, flags) = (frontend.affinity_seconds, frontend.flags);
            let value = ServiceValue { list, count, affinity_seconds, flags };
            if current != Some(&value) {
                ops.push(Op::PutService(*key, value));
            }
        }
    }

    /// Lets go of what the Service no longer wants and the maps no longer have.
    fn release(&mut self, name: &ServiceName) {
        let (Some(owned), Some(desired)) = (self.owned.get_mut(name), self.desired.get(name)) else { return };
        let ledger = &self.ledger;
        owned.frontends.retain(|key| {
            let keep = desired.frontends.contains_key(key) || ledger.services.contains_key(key);
            if !keep {
                self.owner_of.remove(key);
            }
            keep
        });
        owned.lists.retain(|list, number| {
            let keep = desired.lists.contains_key(list) || ledger.lists.contains_key(number);
            if !keep {
                self.claimed.remove(number);
            }
            keep
        });
        owned.backends.retain(|key| desired.backends.contains_key(key) || ledger.backends.contains_key(key));
        if owned.frontends.is_empty() && owned.lists.is_empty() && owned.backends.is_empty() {
            self.owned.remove(name);
            self.desired.remove(name);
        }
    }
}

/// Backends that stay keep their places; holes are filled with new ones, then with those from the end.
fn plan_slots(
    list: u32,
    slots: &BTreeMap<u32, BackendKey>,
    wanted: &BTreeSet<BackendKey>,
    ops: &mut Vec<Op>,
) {
    let count = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
    let mut placed = BTreeSet::new();
    let mut stay = HashSet::new();
    for (index, backend) in slots.range(..count) {
        if wanted.contains(backend) && placed.insert(*backend) {
            stay.insert(*index);
        }
    }
    let mut missing = wanted.iter().filter(|b| !placed.contains(b));
    for index in (0..count).filter(|i| !stay.contains(i)) {
        if let Some(backend) = missing.next() {
            ops.push(Op::PutSlot(SlotKey { list, index }, *backend));
        }
    }
    ops.extend(slots.range(count..).rev().map(|(i, _)| Op::DeleteSlot(SlotKey { list, index: *i })));
}
