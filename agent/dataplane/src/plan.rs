//! The difference between what the maps say and what they should say, as ordered operations. Pure: applying is the reconciler's.
//!
//! What a Service wants is derived anew whenever it changes and not kept: memory holds what the maps hold, and whose it is.

mod contest;
mod ledger;
mod lists;
mod owned;

pub use ledger::{Ledger, Op};
pub use owned::Totals;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use weft_ebpf_abi::{Address, BACKEND_ACTIVE, BackendKey, BackendValue, ServiceKey, ServiceValue};

use self::contest::Contests;
use self::owned::{Id, Owned, Users};
use crate::desired::{Desired, ListName};
use crate::maglev::{self, Shares};
use crate::tables::ServiceName;

/// Plans changes of the maps. It owns the numbers of lists and generations.
#[derive(Debug)]
pub struct Planner {
    /// What the maps say.
    pub ledger: Ledger,
    ids: HashMap<ServiceName, Id>,
    /// Boxed: up to half of a hash map stands empty.
    owned: HashMap<Id, Box<Owned>>,
    next_id: Id,
    owner_of: HashMap<ServiceKey, Id>,
    contests: Contests,
    totals: Totals,
    references: HashMap<BackendKey, Users>,
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
            ids: HashMap::new(),
            owned: HashMap::new(),
            next_id: 0,
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
    pub fn plan(&mut self, mut changes: Vec<(ServiceName, Desired)>) -> Vec<(usize, Op)> {
        self.contests.announce(&changes);
        let mut ids = Vec::with_capacity(changes.len());
        for (name, desired) in &mut changes {
            ids.push(self.intend(name, desired));
        }
        let mut ops = Vec::new();
        for (index, (id, (_, desired))) in ids.into_iter().zip(&changes).enumerate() {
            let mut own = Vec::new();
            self.plan_backends(id, &mut own);
            self.plan_lists(id, desired, &mut own);
            self.plan_services(id, desired, &mut own);
            self.forget_if_empty(id);
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
            lists::plan_slots(*list, slots, &BTreeSet::new(), &mut ops);
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
            if self.pending.is_empty() {
                // What the first synchronisation took is not needed again.
                self.pending = HashMap::new();
            }
        }
        if let Op::DeleteService(key) = op {
            self.owner_of.remove(key);
            self.contests.freed(key);
        }
    }

    /// Counts over all Services.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Enters what a Service wants, less what others have a better right to. What it had stays its own until it is gone
    /// from the maps.
    fn intend(&mut self, name: &ServiceName, desired: &mut Desired) -> Id {
        let id = self.ids.get(name).copied().unwrap_or_else(|| {
            let id = self.next_id;
            self.next_id = self.next_id.wrapping_add(1);
            self.ids.insert(name.clone(), id);
            self.owned.insert(id, Box::new(Owned::new(name.clone())));
            id
        });
        self.contest(id, name, desired);
        let Some(mut owned) = self.owned.remove(&id) else { return id };
        self.intend_frontends(id, &mut owned, desired);
        self.intend_lists(&mut owned, desired);
        self.intend_backends(id, &mut owned, desired);
        self.totals.replace(owned.set_facts(desired), owned.facts());
        self.owned.insert(id, owned);
        id
    }

    /// Several Services may claim one address and port: who has the better right gets it, whoever comes first, so that
    /// every node and every start of an agent decide alike. The others wait.
    fn contest(&mut self, id: Id, name: &ServiceName, desired: &mut Desired) {
        self.contests.withdraw(name);
        let created = desired.created;
        desired.frontends.retain(|key, frontend| {
            let mine = (frontend.claim, created, name);
            if let Some(owner) = self.owner_of.get(key).filter(|owner| **owner != id) {
                // One that wants it no longer gives it up of itself.
                if let Some(theirs) = self.owned.get(owner).and_then(|owned| owned.right_to(key))
                    && mine < theirs
                {
                    self.contests.disturb(theirs.2);
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

    fn intend_frontends(&mut self, id: Id, owned: &mut Owned, desired: &Desired) {
        for (key, _) in &owned.frontends {
            if desired.frontends.contains_key(key) || self.owner_of.get(key) != Some(&id) {
                continue;
            }
            if !self.ledger.services.contains_key(key) {
                self.owner_of.remove(key);
                self.contests.freed(key);
            }
        }
        let left = owned.frontends.iter().map(|(key, _)| *key);
        let left = left.filter(|k| !desired.frontends.contains_key(k) && self.owner_of.get(k) == Some(&id));
        let left: Vec<_> = left.map(|key| (key, None)).collect();
        let wanted = desired.frontends.iter().map(|(key, frontend)| (*key, Some(frontend.claim)));
        owned.frontends = wanted.chain(left).collect();
        owned.created = desired.created;
        self.owner_of.extend(desired.frontends.keys().map(|key| (*key, id)));
    }

    fn intend_lists(&mut self, owned: &mut Owned, desired: &Desired) {
        let ledger = &self.ledger;
        owned.lists = std::mem::take(&mut owned.lists)
            .into_iter()
            .filter(|(list, number)| {
                let keep = desired.lists.contains_key(list)
                    || ledger.lists.contains_key(number)
                    || ledger.sources.contains_key(number);
                if !keep {
                    self.claimed.remove(number);
                }
                keep
            })
            .collect();
        let mut new: BTreeMap<_, _> = desired
            .lists
            .keys()
            .filter(|list| owned.number(list).is_none())
            .map(|list| (*list, None))
            .collect();
        if new.is_empty() {
            return;
        }
        // The number that the list has in maps which were adopted, or a new one.
        for (key, frontend) in &desired.frontends {
            if let Some(number @ None) = frontend.list.as_ref().and_then(|list| new.get_mut(list))
                && let Some(value) = ledger.services.get(key)
                && self.claimed.insert(value.list)
            {
                *number = Some(value.list);
            }
        }
        let numbered = new.into_iter().map(|(list, adopted)| {
            let number = adopted.unwrap_or_else(|| {
                self.next_list += 1;
                self.next_list - 1
            });
            self.claimed.insert(number);
            (list, number)
        });
        let mut all: Vec<_> = owned.lists.iter().copied().chain(numbered).collect();
        all.sort_unstable();
        owned.lists = all.into();
    }

    fn intend_backends(&mut self, id: Id, owned: &mut Owned, desired: &Desired) {
        for (key, known) in &desired.backends {
            self.references
                .entry(*key)
                .and_modify(|users| users.set(id, *known))
                .or_insert_with(|| Users::one(id, *known));
        }
        let gone = owned.backends.iter().filter(|key| !desired.backends.contains_key(key));
        let mut left = Vec::new();
        for key in gone {
            if self.references.get_mut(key).is_some_and(|users| users.remove(id)) {
                self.references.remove(key);
            }
            if self.ledger.backends.contains_key(key) {
                left.push(*key);
            }
        }
        owned.backends = desired.backends.keys().copied().chain(left).collect();
    }

    fn plan_backends(&mut self, id: Id, ops: &mut Vec<Op>) {
        let Some(owned) = self.owned.get(&id) else { return };
        for key in &owned.backends {
            let current = self.ledger.backends.get(key);
            let Some(users) = self.references.get(key) else {
                if current.is_some() {
                    ops.push(Op::DeleteBackend(*key));
                }
                continue;
            };
            let known = users.sum();
            let (flags, owner) = (if known.active { BACKEND_ACTIVE } else { 0 }, known.owner);
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

    fn plan_lists(&self, id: Id, desired: &Desired, ops: &mut Vec<Op>) {
        let Some(owned) = self.owned.get(&id) else { return };
        let nothing = BTreeSet::new();
        for (list, number) in &owned.lists {
            let slots = self.ledger.lists.get(number).map_or(&[][..], Vec::as_slice);
            let wanted = desired.lists.get(list).unwrap_or(&nothing);
            let shares = Shares::of(wanted, &desired.weights);
            if is_table(list, &shares) {
                lists::plan_table(*number, slots, &maglev::table(&shares), ops);
            } else {
                lists::plan_slots(*number, slots, wanted, ops);
            }
            lists::plan_sources(*number, self.ledger.sources.get(number), desired.sources.get(list), ops);
        }
    }

    fn plan_services(&self, id: Id, desired: &Desired, ops: &mut Vec<Op>) {
        let Some(owned) = self.owned.get(&id) else { return };
        let places: HashMap<_, _> = desired
            .lists
            .iter()
            .map(|(list, backends)| {
                let shares = Shares::of(backends, &desired.weights);
                (*list, if is_table(list, &shares) { maglev::size(&shares) } else { shares.backends() })
            })
            .collect();
        for (key, _) in &owned.frontends {
            let current = self.ledger.services.get(key);
            let Some(frontend) = desired.frontends.get(key) else {
                if current.is_some() {
                    ops.push(Op::DeleteService(*key));
                }
                continue;
            };
            let list = frontend.list.and_then(|list| Some((owned.number(&list)?, *places.get(&list)?)));
            let (list, count) = list.unwrap_or((0, 0));
            let (affinity_seconds, flags) = (frontend.affinity_seconds, frontend.flags);
            let value = ServiceValue { list, count, affinity_seconds, flags };
            if current != Some(&value) {
                ops.push(Op::PutService(*key, value));
            }
        }
    }

    fn forget_if_empty(&mut self, id: Id) {
        if let Some(owned) = self.owned.get(&id)
            && owned.is_empty()
        {
            self.ids.remove(&owned.name);
            self.owned.remove(&id);
        }
    }
}

/// Whether a list stands in the maps as a Maglev table, of which each backend has as many places as its share: a random place
/// is a choice by weight, too. Else each backend stands in it once.
fn is_table(list: &ListName, shares: &Shares) -> bool {
    list.hashed || !shares.are_even()
}
