//! The difference between what the maps say and what they should say, as ordered operations. Pure: applying is the reconciler's.
//!
//! What a Service wants is derived anew whenever it changes and not kept: memory holds what the maps hold, and whose it is.

mod backends;
mod book;
mod contest;
mod ledger;
mod lists;
mod owned;

pub(crate) use book::Book;
pub use ledger::{Ledger, Op};
pub use owned::Totals;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use weft_ebpf_abi::{Address, BACKEND_ACTIVE, BackendKey, BackendValue, ServiceValue};

use self::contest::Contests;
use self::owned::{Id, Owned};
use crate::desired::{Desired, ListName};
use crate::maglev::{self, Shares};
use crate::maps::Table;
use crate::rows::Rows;
use crate::tables::ServiceName;

/// Backends of a change that is large: the room for so many is not kept.
const MANY_PENDING: usize = 1_024;

/// Plans changes of the maps. It owns the numbers of lists and generations.
#[derive(Debug)]
pub(crate) struct Planner {
    /// What the maps say.
    book: Book,
    services: Rows<ServiceName, Owned>,
    contests: Contests,
    totals: Totals,
    /// Generations given in plans that are not applied yet.
    pending: HashMap<BackendKey, BackendValue>,
    /// Lists by number, and whose they are.
    claimed: HashMap<u32, Id>,
    next_list: u32,
    next_generation: u32,
}

impl Planner {
    /// Adopts maps as found; numbers go on behind theirs.
    #[must_use]
    pub(crate) fn adopt(book: Book) -> Self {
        let last_list = book.last_list();
        let last_generation = book.backends.in_maps().map(|(_, b)| b.generation).max().unwrap_or(0);
        Self {
            book,
            services: Rows::default(),
            contests: Contests::default(),
            totals: Totals::default(),
            pending: HashMap::new(),
            claimed: HashMap::new(),
            next_list: last_list.wrapping_add(1),
            next_generation: last_generation.wrapping_add(1),
        }
    }

    /// What the maps say.
    pub(crate) fn book(&self) -> &Book {
        &self.book
    }

    /// Addresses of the node in the maps.
    pub(crate) fn node_addresses(&self) -> &BTreeSet<Address> {
        &self.book.node_addresses
    }

    /// Entries of a map.
    pub(crate) fn entries(&self, table: Table) -> usize {
        match table {
            Table::Services => self.book.services,
            Table::Slots => self.book.slots,
            Table::Backends => self.book.backends.programmed(),
            Table::NodeAddresses => self.book.node_addresses.len(),
            Table::Sources => self.book.ranges,
        }
    }

    /// Plans for Services that changed; one that is gone wants nothing. Each operation names its Service by its place in
    /// `changes`.
    pub(crate) fn plan(&mut self, mut changes: Vec<(ServiceName, Desired)>) -> Vec<(usize, Op)> {
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
    pub(crate) fn take_disturbed(&mut self) -> BTreeSet<ServiceName> {
        self.contests.take_disturbed()
    }

    /// Plans the removal of addresses and lists that no Service wants. To be called once all sources are known.
    #[must_use]
    pub(crate) fn plan_prune(&self) -> Vec<Op> {
        let mut ops: Vec<_> = self.book.unowned().map(Op::DeleteService).collect();
        for (list, slots) in self.book.lists().filter(|(number, _)| !self.claimed.contains_key(number)) {
            lists::plan_slots(list, &slots, &BTreeSet::new(), &mut ops);
        }
        let sources = self.book.sources.iter().filter(|(number, _)| !self.claimed.contains_key(number));
        ops.extend(sources.flat_map(|(_, ranges)| ranges).map(|key| Op::DeleteSource(*key)));
        ops
    }

    /// Likewise of backends; to be called when no list leads to one that its Service no longer wants.
    #[must_use]
    pub(crate) fn plan_prune_backends(&self) -> Vec<Op> {
        self.book.backends.unused().map(Op::DeleteBackend).collect()
    }

    /// Plans the node's own addresses.
    #[must_use]
    pub(crate) fn plan_node_addresses(&self, wanted: &BTreeSet<Address>) -> Vec<Op> {
        let known = &self.book.node_addresses;
        let new = wanted.difference(known).map(|a| Op::PutNodeAddress(*a));
        new.chain(known.difference(wanted).map(|a| Op::DeleteNodeAddress(*a))).collect()
    }

    /// Notes that an operation succeeded.
    pub(crate) fn record(&mut self, op: &Op) {
        self.book.record(op);
        if let Op::PutBackend(key, _) = op {
            self.pending.remove(key);
            if self.pending.is_empty() && self.pending.capacity() > MANY_PENDING {
                // What the first synchronisation took is not needed again.
                self.pending = HashMap::new();
            }
        }
        if let Op::DeleteService(key) = op {
            self.contests.freed(key);
        }
    }

    /// Whose a list is.
    #[must_use]
    pub(crate) fn owner_of_list(&self, number: u32) -> Option<&ServiceName> {
        let id = self.claimed.get(&number)?;
        self.services.at(*id).map(|(name, _)| name)
    }

    /// Counts over all Services.
    #[must_use]
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// Enters what a Service wants, less what others have a better right to. What it had stays its own until it is gone
    /// from the maps.
    fn intend(&mut self, name: &ServiceName, desired: &mut Desired) -> Id {
        let id = self.services.enter(name.clone(), |_| Owned::default());
        self.contest(id, name, desired);
        let Some(mut owned) = self.services.at_mut(id).map(std::mem::take) else { return id };
        self.intend_frontends(id, &mut owned, desired);
        self.intend_lists(id, &mut owned, desired);
        self.intend_backends(id, &mut owned, desired);
        self.totals.replace(owned.set_facts(desired), owned.facts());
        if let Some(kept) = self.services.at_mut(id) {
            *kept = owned;
        }
        id
    }

    /// Several Services may claim one address and port: who has the better right gets it, whoever comes first, so that
    /// every node and every start of an agent decide alike. The others wait.
    fn contest(&mut self, id: Id, name: &ServiceName, desired: &mut Desired) {
        self.contests.withdraw(name);
        let created = desired.created;
        desired.frontends.retain(|key, frontend| {
            let mine = (frontend.claim, created, name);
            if let Some(owner) = self.book.owner(key).filter(|owner| *owner != id) {
                // One that wants it no longer gives it up of itself.
                if let Some((other, owned)) = self.services.at(owner)
                    && let Some((claim, created)) = owned.right_to(key)
                    && mine < (claim, created, other)
                {
                    self.contests.disturb(other);
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
        let unwanted = owned.frontends.iter().map(|(key, _)| *key);
        let unwanted = unwanted.filter(|key| !desired.frontends.contains_key(key));
        let mut left = Vec::new();
        for key in unwanted.filter(|key| self.book.owner(key) == Some(id)).collect::<Vec<_>>() {
            if self.book.service(&key).is_some() {
                left.push((key, None));
            } else {
                self.book.set_owner(key, None);
                self.contests.freed(&key);
            }
        }
        let wanted = desired.frontends.iter().map(|(key, frontend)| (*key, Some(frontend.claim)));
        owned.frontends = wanted.chain(left).collect();
        owned.created = desired.created;
        for key in desired.frontends.keys() {
            self.book.set_owner(*key, Some(id));
        }
    }

    fn intend_lists(&mut self, id: Id, owned: &mut Owned, desired: &Desired) {
        let book = &self.book;
        owned.lists = std::mem::take(&mut owned.lists)
            .into_iter()
            .filter(|(list, number)| {
                let keep = desired.lists.contains_key(list)
                    || book.has_list(*number)
                    || book.sources.contains_key(number);
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
                && let Some(value) = book.service(key)
                && let Entry::Vacant(free) = self.claimed.entry(value.list)
            {
                free.insert(id);
                *number = Some(value.list);
            }
        }
        let numbered = new.into_iter().map(|(list, adopted)| {
            let number = adopted.unwrap_or_else(|| {
                self.next_list += 1;
                self.next_list - 1
            });
            self.claimed.insert(number, id);
            (list, number)
        });
        let mut all: Vec<_> = owned.lists.iter().copied().chain(numbered).collect();
        all.sort_unstable();
        owned.lists = all.into();
    }

    fn intend_backends(&mut self, id: Id, owned: &mut Owned, desired: &Desired) {
        let backends = &mut self.book.backends;
        let mut all = Vec::with_capacity(desired.backends.len());
        for (key, known) in &desired.backends {
            let place = backends.refer(*key);
            backends.set_user(place, id, *known);
            all.push(place);
        }
        for place in &owned.backends {
            let Some(key) = backends.key(*place) else { continue };
            if desired.backends.contains_key(&key) {
                continue;
            }
            backends.remove_user(*place, id);
            if backends.value(&key).is_some() {
                all.push(backends.refer(key));
            }
        }
        let before = std::mem::replace(&mut owned.backends, all.into());
        before.iter().for_each(|place| backends.release(*place));
    }

    fn plan_backends(&mut self, id: Id, ops: &mut Vec<Op>) {
        let Some((_, owned)) = self.services.at(id) else { return };
        for place in &owned.backends {
            let Some((key, current, known)) = self.book.backends.look(*place) else { continue };
            let Some(known) = known else {
                if current.is_some() {
                    ops.push(Op::DeleteBackend(key));
                }
                continue;
            };
            let (flags, owner) = (if known.active { BACKEND_ACTIVE } else { 0 }, known.owner);
            let same = |value: &BackendValue| value.owner == owner;
            let pending = || self.pending.get(&key).copied().filter(same);
            let generation = match current.filter(same).or_else(pending) {
                Some(value) => value.generation,
                None => {
                    self.next_generation = self.next_generation.wrapping_add(1);
                    self.next_generation.wrapping_sub(1)
                }
            };
            let value = BackendValue { generation, flags, owner };
            if current != Some(value) {
                self.pending.insert(key, value);
                ops.push(Op::PutBackend(key, value));
            }
        }
    }

    fn plan_lists(&self, id: Id, desired: &Desired, ops: &mut Vec<Op>) {
        let Some((_, owned)) = self.services.at(id) else { return };
        let nothing = BTreeSet::new();
        for (list, number) in &owned.lists {
            let slots = self.book.list(*number);
            let wanted = desired.lists.get(list).unwrap_or(&nothing);
            let shares = Shares::of(wanted, &desired.weights);
            if is_table(list, &shares) {
                lists::plan_table(*number, &slots, &maglev::table(&shares), ops);
            } else {
                lists::plan_slots(*number, &slots, wanted, ops);
            }
            lists::plan_sources(*number, self.book.sources.get(number), desired.sources.get(list), ops);
        }
    }

    fn plan_services(&self, id: Id, desired: &Desired, ops: &mut Vec<Op>) {
        let Some((_, owned)) = self.services.at(id) else { return };
        let places: HashMap<_, _> = desired
            .lists
            .iter()
            .map(|(list, backends)| {
                let shares = Shares::of(backends, &desired.weights);
                (*list, if is_table(list, &shares) { maglev::size(&shares) } else { shares.backends() })
            })
            .collect();
        for (key, _) in &owned.frontends {
            let current = self.book.service(key);
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
            if current != Some(value) {
                ops.push(Op::PutService(*key, value));
            }
        }
    }

    fn forget_if_empty(&mut self, id: Id) {
        if let Some((name, owned)) = self.services.at(id)
            && owned.is_empty()
        {
            let name = name.clone();
            self.services.remove(&name);
        }
    }
}

/// Whether a list stands in the maps as a Maglev table, of which each backend has as many places as its share: a random place
/// is a choice by weight, too. Else each backend stands in it once.
fn is_table(list: &ListName, shares: &Shares) -> bool {
    list.hashed || !shares.are_even()
}
