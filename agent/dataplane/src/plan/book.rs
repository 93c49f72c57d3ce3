//! What is believed to be in the maps, as far as every operation that succeeded is known, and whose it is. Kept small: see [`Ledger`] for
//! the same in order.

use std::collections::{BTreeMap, BTreeSet};

use weft_ebpf_abi::{Address, BACKEND_ACTIVE, BackendKey, ServiceKey, ServiceValue, SourceKey, UDP};

use super::backends::Backends;
use super::owned::Id;
use super::{Ledger, Op};
use crate::rows::{Place, Rows};

/// In a list: nothing stands there.
const HOLE: Place = Place::MAX;

/// An address of a Service. It is kept while the maps have it, or a Service wants it.
#[derive(Debug, Default)]
struct Frontend {
    value: Option<ServiceValue>,
    owner: Option<Id>,
}

/// The belief.
#[derive(Debug, Default)]
pub(crate) struct Book {
    frontends: Rows<ServiceKey, Frontend>,
    /// Of the frontends, those that are in the maps.
    pub(super) services: usize,
    /// By number, which backends stand in a list; the last place is never empty.
    lists: Rows<u32, Vec<Place>>,
    /// Places in all lists.
    pub(super) slots: usize,
    /// Ranges of clients, by the list's number.
    pub(super) sources: BTreeMap<u32, BTreeSet<SourceKey>>,
    /// Number of ranges of all lists.
    pub(super) ranges: usize,
    pub(super) backends: Backends,
    /// Addresses of the node.
    pub(super) node_addresses: BTreeSet<Address>,
}

impl Book {
    /// What the maps say of an address.
    pub(super) fn service(&self, key: &ServiceKey) -> Option<ServiceValue> {
        self.frontends.get(key)?.value
    }

    /// Whose an address is: it wants it, or has not let go of it in the maps yet.
    pub(super) fn owner(&self, key: &ServiceKey) -> Option<Id> {
        self.frontends.get(key)?.owner
    }

    /// Makes an address somebody's, or nobody's.
    pub(super) fn set_owner(&mut self, key: ServiceKey, owner: Option<Id>) {
        self.change_frontend(key, |frontend| frontend.owner = owner);
    }

    fn change_frontend(&mut self, key: ServiceKey, change: impl FnOnce(&mut Frontend)) {
        let frontend = self.frontends.or_default(key);
        let was = frontend.value.is_some();
        change(frontend);
        self.services = self.services + usize::from(frontend.value.is_some()) - usize::from(was);
        if frontend.value.is_none() && frontend.owner.is_none() {
            self.frontends.remove(&key);
        }
    }

    /// Addresses in the maps that are nobody's.
    pub(super) fn unowned(&self) -> impl Iterator<Item = ServiceKey> {
        self.frontends.iter().filter(|(_, f)| f.value.is_some() && f.owner.is_none()).map(|(key, _)| *key)
    }

    /// Whether a list has places.
    pub(super) fn has_list(&self, number: u32) -> bool {
        self.lists.place(&number).is_some()
    }

    /// What stands in a list.
    pub(super) fn list(&self, number: u32) -> Vec<Option<BackendKey>> {
        self.lists.get(&number).map_or_else(Vec::new, |places| self.named(places))
    }

    fn named(&self, places: &[Place]) -> Vec<Option<BackendKey>> {
        places.iter().map(|place| self.backends.key(*place)).collect()
    }

    /// All lists.
    pub(super) fn lists(&self) -> impl Iterator<Item = (u32, Vec<Option<BackendKey>>)> {
        self.lists.iter().map(|(number, places)| (*number, self.named(places)))
    }

    /// The highest number of a list, in maps that were adopted.
    pub(super) fn last_list(&self) -> u32 {
        let in_services = self.frontends.iter().filter_map(|(_, frontend)| Some(frontend.value?.list));
        let lists = self.lists.iter().map(|(number, _)| *number);
        in_services.chain(lists).chain(self.sources.keys().copied()).max().unwrap_or(0)
    }

    /// The UDP backend that sockets must leave because of an operation that is about to be noted: it is removed, takes no new
    /// flows any more, or is another pod's from now on. The programs treat flows of packets alike.
    pub(crate) fn left_by(&self, op: &Op) -> Option<BackendKey> {
        match op {
            Op::DeleteBackend(key) if key.protocol == UDP => Some(*key),
            Op::PutBackend(key, new) if key.protocol == UDP => {
                let old = self.backends.value(key)?;
                let drains = old.flags & BACKEND_ACTIVE != 0 && new.flags & BACKEND_ACTIVE == 0;
                (drains || old.generation != new.generation).then_some(*key)
            }
            Op::PutBackend(..)
            | Op::PutNodeAddress(_)
            | Op::PutSlot(..)
            | Op::PutSource(_)
            | Op::PutService(..)
            | Op::DeleteService(_)
            | Op::DeleteSource(_)
            | Op::DeleteSlot(_)
            | Op::DeleteNodeAddress(_)
            | Op::DeleteBackend(_) => None,
        }
    }

    /// Notes an operation that succeeded.
    pub(crate) fn record(&mut self, op: &Op) {
        match op {
            Op::PutBackend(key, value) => self.backends.set_value(*key, Some(*value)),
            Op::PutNodeAddress(address) => drop(self.node_addresses.insert(*address)),
            Op::PutSlot(key, backend) => {
                let place = self.backends.refer(*backend);
                self.put_slot(key.list, key.index as usize, place);
            }
            Op::PutSource(key) => {
                let new = self.sources.entry(list_of(key)).or_default().insert(*key);
                self.ranges += usize::from(new);
            }
            Op::PutService(key, value) => {
                self.change_frontend(*key, |frontend| frontend.value = Some(*value))
            }
            Op::DeleteService(key) => {
                self.change_frontend(*key, |frontend| (frontend.value, frontend.owner) = (None, None));
            }
            Op::DeleteSlot(key) => self.delete_slot(key.list, key.index as usize),
            Op::DeleteSource(key) => {
                if let Some(ranges) = self.sources.get_mut(&list_of(key)) {
                    self.ranges -= usize::from(ranges.remove(key));
                    if ranges.is_empty() {
                        self.sources.remove(&list_of(key));
                    }
                }
            }
            Op::DeleteNodeAddress(address) => drop(self.node_addresses.remove(address)),
            Op::DeleteBackend(key) => self.backends.set_value(*key, None),
        }
    }

    fn put_slot(&mut self, list: u32, index: usize, backend: Place) {
        let list = self.lists.or_default(list);
        if list.len() <= index {
            list.resize(index + 1, HOLE);
        }
        match std::mem::replace(&mut list[index], backend) {
            HOLE => self.slots += 1,
            before => self.backends.release(before),
        }
    }

    fn delete_slot(&mut self, number: u32, index: usize) {
        let Some(list) = self.lists.get_mut(&number) else { return };
        let before = list.get_mut(index).map_or(HOLE, |place| std::mem::replace(place, HOLE));
        list.truncate(list.iter().rposition(|place| *place != HOLE).map_or(0, |last| last + 1));
        if list.is_empty() {
            self.lists.remove(&number);
        }
        if before != HOLE {
            self.slots -= 1;
            self.backends.release(before);
        }
    }

    /// The same in order.
    pub(crate) fn ledger(&self) -> Ledger {
        Ledger {
            services: self.frontends.iter().filter_map(|(key, f)| Some((*key, f.value?))).collect(),
            lists: self.lists().collect(),
            sources: self.sources.clone(),
            backends: self.backends.in_maps().collect(),
            node_addresses: self.node_addresses.clone(),
        }
    }
}

fn list_of(key: &SourceKey) -> u32 {
    u32::from_be_bytes(key.data.list)
}

#[cfg(test)]
mod tests {
    use weft_ebpf_abi::{BackendValue, Port, SlotKey, TCP};

    use super::*;

    fn backend(number: u16, protocol: u8) -> BackendKey {
        BackendKey { address: Address::ANY_V4, port: Port::new(number), protocol, pad: 0 }
    }

    #[test]
    fn sockets_leave_udp_backends_that_end_drain_or_change_hands() {
        let key = |protocol| backend(53, protocol);
        let value = |generation, flags| BackendValue { generation, flags, owner: 0 };
        let mut book = Book::default();
        assert_eq!(book.left_by(&Op::PutBackend(key(UDP), value(1, BACKEND_ACTIVE))), None, "it is new");
        for protocol in [TCP, UDP] {
            book.record(&Op::PutBackend(key(protocol), value(1, BACKEND_ACTIVE)));
        }
        let rows = [
            ("stays", Op::PutBackend(key(UDP), value(1, BACKEND_ACTIVE)), None),
            ("drains", Op::PutBackend(key(UDP), value(1, 0)), Some(key(UDP))),
            ("is another pod's", Op::PutBackend(key(UDP), value(2, BACKEND_ACTIVE)), Some(key(UDP))),
            ("ends", Op::DeleteBackend(key(UDP)), Some(key(UDP))),
            ("TCP drains", Op::PutBackend(key(TCP), value(1, 0)), None),
            ("TCP ends", Op::DeleteBackend(key(TCP)), None),
        ];
        for (name, op, wanted) in rows {
            assert_eq!(book.left_by(&op), wanted, "{name}");
        }
    }

    /// Adopted maps may say so, and another backend must never seem to stand there.
    #[test]
    fn a_backend_keeps_its_name_in_a_list_until_it_is_taken_out() {
        let mut book = Book::default();
        let slot = |index| SlotKey { list: 1, index };
        let value = BackendValue { generation: 1, flags: BACKEND_ACTIVE, owner: 0 };
        book.record(&Op::PutBackend(backend(1, TCP), value));
        book.record(&Op::PutSlot(slot(0), backend(1, TCP)));
        book.record(&Op::PutSlot(slot(2), backend(2, TCP)));
        book.record(&Op::DeleteBackend(backend(1, TCP)));
        book.record(&Op::PutBackend(backend(3, TCP), value));
        assert_eq!(book.list(1), [Some(backend(1, TCP)), None, Some(backend(2, TCP))]);
        assert_eq!((book.slots, book.backends.programmed()), (2, 1));
        book.record(&Op::DeleteSlot(slot(2)));
        assert_eq!(book.list(1), [Some(backend(1, TCP))], "it ends with what stands there");
        book.record(&Op::PutSlot(slot(0), backend(3, TCP)));
        book.record(&Op::DeleteSlot(slot(0)));
        assert!(!book.has_list(1) && book.slots == 0);
        book.record(&Op::DeleteBackend(backend(3, TCP)));
        assert_eq!(book.ledger(), Ledger::default());
    }
}
