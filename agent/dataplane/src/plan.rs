//! The difference between what the maps say and what they should say, as ordered operations. Pure: applying is the reconciler's.

mod contest;
mod ledger;

pub use ledger::{Ledger, Op};

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use weft_ebpf_abi::{
    Address, BACKEND_ACTIVE, BackendKey, BackendValue, ServiceKey, ServiceValue, SlotKey, SourceData,
    SourceKey,
};

use self::contest::Contests;
use crate::desired::{Desired, Known, ListName};
use crate::maglev;
use crate::tables::{Range, ServiceName};

/// What a Service has in the maps, or may have after operations that failed.
#[derive(Debug, Default)]
struct Owned {
    frontends: BTreeSet<ServiceKey>,
    lists: BTreeMap<ListName, u32>,
    backends: BTreeSet<BackendKey>,
}

impl Owned {
    fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.lists.is_empty() && self.backends.is_empty()
    }
}

/// Counts over all Services, kept with every change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Services with an address.
    pub services: usize,
    /// Services with internalTrafficPolicy Local that have endpoints, and none on this node.
    pub no_local_internal: usize,
    /// Likewise with externalTrafficPolicy Local.
    pub no_local_external: usize,
}

impl Totals {
    fn count(&mut self, desired: &Desired, count: impl Fn(&mut usize)) {
        let facts = [
            (!desired.frontends.is_empty(), &mut self.services),
            (desired.no_local_internal, &mut self.no_local_internal),
            (desired.no_local_external, &mut self.no_local_external),
        ];
        facts.into_iter().filter(|(is, _)| *is).for_each(|(_, total)| count(total));
    }
}

/// Plans changes of the maps. It owns the numbers of lists and generations.
#[derive(Debug)]
pub struct Planner {
    /// What the maps say.
    pub ledger: Ledger,
    owned: HashMap<ServiceName, Owned>,
    desired: HashMap<ServiceName, Desired>,
    owner_of: HashMap<ServiceKey, ServiceName>,
    contests: Contests,
    totals: Totals,
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
        let numbered = ledger.lists.keys().chain(ledger.sources.keys()).copied();
        let last_list = numbered.max().unwrap_or(0).max(in_services);
        let last_generation = ledger.backends.values().map(|b| b.generation).max().unwrap_or(0);
        Self {
            ledger,
            owned: HashMap::new(),
            desired: HashMap::new(),
            owner_of: HashMap::new(),
            contests: Contests::default(),
            totals: Totals::default(),
            references: HashMap::new(),
            pending: HashMap::new(),
            claimed: HashSet::new(),
            next_list: last_list.wrapping_add(1),
            next_generation: last_generation.wrapping_add(1),
        }
    }

    /// Plans for Services that changed; one that is gone wants nothing. Each operation names its Service by its place in
    /// `changes`.
    pub fn plan(&mut self, changes: Vec<(ServiceName, Desired)>) -> Vec<(usize, Op)> {
        self.contests.announce(&changes);
        let names: Vec<_> = changes.iter().map(|(name, _)| name.clone()).collect();
        for (name, desired) in changes {
            self.intend(&name, desired);
        }
        let mut ops = Vec::new();
        for (index, name) in names.iter().enumerate() {
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

    /// Services to be planned again, because an address became free that they wait for, or an older Service claims theirs.
    pub fn take_disturbed(&mut self) -> BTreeSet<ServiceName> {
        self.contests.take_disturbed()
    }

    /// Plans the removal of addresses and lists that no Service wants. To be called once all sources are known.
    #[must_use]
    pub fn plan_prune(&self) -> Vec<Op> {
        let services = self.ledger.services.keys().filter(|k| !self.owner_of.contains_key(k));
        let mut ops: Vec<_> = services.map(|k| Op::DeleteService(*k)).collect();
        for (list, slots) in self.ledger.lists.iter().filter(|(l, _)| !self.claimed.contains(l)) {
            ops.extend(slots.keys().rev().map(|i| Op::DeleteSlot(SlotKey { list: *list, index: *i })));
        }
        let sources = self.ledger.sources.iter().filter(|(l, _)| !self.claimed.contains(l));
        ops.extend(sources.flat_map(|(_, ranges)| ranges).map(|key| Op::DeleteSource(*key)));
        ops
    }

    /// Likewise of backends; to be called when no list leads to one that its Service no longer wants.
    #[must_use]
    pub fn plan_prune_backends(&self) -> Vec<Op> {
        let backends = self.ledger.backends.keys().filter(|k| !self.references.contains_key(k));
        backends.map(|k| Op::DeleteBackend(*k)).collect()
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
        if let Op::DeleteService(key) = op
            && self.contests.is_contested(key)
        {
            if let Some(owned) = self.owner_of.remove(key).and_then(|owner| self.owned.get_mut(&owner)) {
                owned.frontends.remove(key);
            }
            self.contests.freed(key);
        }
    }

    /// Counts over all Services.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    fn intend(&mut self, name: &ServiceName, mut desired: Desired) {
        self.contest(name, &mut desired);
        if let Some(old) = self.desired.get(name) {
            self.totals.count(old, |total| *total -= 1);
        }
        self.totals.count(&desired, |total| *total += 1);
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

    /// Several Services may claim one address and port: who has the better right gets it, whoever comes first, so that
    /// every node and every start of an agent decide alike. The others wait.
    fn contest(&mut self, name: &ServiceName, desired: &mut Desired) {
        self.contests.withdraw(name);
        let created = desired.created;
        desired.frontends.retain(|key, frontend| {
            let mine = (frontend.claim, created, name);
            if let Some(owner) = self.owner_of.get(key).filter(|owner| *owner != name) {
                let theirs = self.desired.get(owner).and_then(|d| Some((d.frontends.get(key)?, d.created)));
                // One that wants it no longer gives it up of itself.
                if let Some((frontend, created)) = theirs
                    && mine < (frontend.claim, created, owner)
                {
                    self.contests.disturb(owner);
                }
                self.contests.wait(key, mine);
                return false;
            }
            let wins = self.contests.is_best(key, mine);
            if !wins {
                self.contests.wait(key, mine);
            }
            wins
        });
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
            let wanted = desired.lists.get(list).unwrap_or(&nothing);
            if list.hashed {
                plan_table(*number, slots, &maglev::table(wanted), ops);
            } else {
                plan_slots(*number, slots, wanted, ops);
            }
            plan_sources(*number, self.ledger.sources.get(number), desired.sources.get(list), ops);
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
                let backends = desired.lists.get(&list)?.len();
                let count =
                    if list.hashed { maglev::size(backends) } else { u32::try_from(backends).ok()? };
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
                self.contests.freed(key);
            }
            keep
        });
        owned.lists.retain(|list, number| {
            let keep = desired.lists.contains_key(list)
                || ledger.lists.contains_key(number)
                || ledger.sources.contains_key(number);
            if !keep {
                self.claimed.remove(number);
            }
            keep
        });
        owned.backends.retain(|key| desired.backends.contains_key(key) || ledger.backends.contains_key(key));
        if owned.is_empty() {
            self.owned.remove(name);
            if let Some(old) = self.desired.remove(name) {
                self.totals.count(&old, |total| *total -= 1);
            }
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

/// Every place of a table is decided by its hashes: only those that differ change.
fn plan_table(list: u32, slots: &BTreeMap<u32, BackendKey>, table: &[BackendKey], ops: &mut Vec<Op>) {
    let count = u32::try_from(table.len()).unwrap_or(u32::MAX);
    for (index, backend) in (0..count).zip(table) {
        if slots.get(&index) != Some(backend) {
            ops.push(Op::PutSlot(SlotKey { list, index }, *backend));
        }
    }
    ops.extend(slots.range(count..).rev().map(|(i, _)| Op::DeleteSlot(SlotKey { list, index: *i })));
}

fn plan_sources(
    list: u32,
    current: Option<&BTreeSet<SourceKey>>,
    wanted: Option<&BTreeSet<Range>>,
    ops: &mut Vec<Op>,
) {
    let key = |range: &Range| SourceKey {
        prefix_bits: u32::BITS + range.prefix_bits,
        data: SourceData { list: list.to_be_bytes(), address: range.first },
    };
    let wanted: BTreeSet<_> = wanted.into_iter().flatten().map(key).collect();
    let none = BTreeSet::new();
    let current = current.unwrap_or(&none);
    ops.extend(wanted.difference(current).map(|key| Op::PutSource(*key)));
    ops.extend(current.difference(&wanted).map(|key| Op::DeleteSource(*key)));
}
