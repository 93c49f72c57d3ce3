//! Operations on the maps, and what is believed to be in them.

use std::collections::{BTreeMap, BTreeSet};

use weft_ebpf_abi::{
    Address, BACKEND_ACTIVE, BackendKey, BackendValue, ServiceKey, ServiceValue, SlotKey, SourceKey, UDP,
};

/// One change of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Enter a backend or change it.
    PutBackend(BackendKey, BackendValue),
    /// Enter a node's address.
    PutNodeAddress(Address),
    /// Set a place in a list.
    PutSlot(SlotKey, BackendKey),
    /// Let a range of clients use a list.
    PutSource(SourceKey),
    /// Enter a Service's address or change it.
    PutService(ServiceKey, ServiceValue),
    /// Remove a Service's address.
    DeleteService(ServiceKey),
    /// Let a range of clients no longer use a list.
    DeleteSource(SourceKey),
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
            // Before the Service asks for it, or clients would be kept out that may get in; and gone after the Service
            // no longer asks.
            Self::PutSource(_) => 3,
            Self::PutService(..) => 4,
            Self::DeleteService(_) => 5,
            Self::DeleteSource(_) => 6,
            Self::DeleteSlot(_) => 7,
            Self::DeleteNodeAddress(_) => 8,
            Self::DeleteBackend(_) => 9,
        }
    }
}

/// What the maps say, as far as every operation that succeeded is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Services' addresses.
    pub services: BTreeMap<ServiceKey, ServiceValue>,
    /// Lists by number, with what stands at each place; the last one is never empty.
    pub lists: BTreeMap<u32, Vec<Option<BackendKey>>>,
    /// Places in all lists.
    pub slots: usize,
    /// Ranges of clients, by the list's number.
    pub sources: BTreeMap<u32, BTreeSet<SourceKey>>,
    /// Number of ranges of all lists.
    pub ranges: usize,
    /// Backends.
    pub backends: BTreeMap<BackendKey, BackendValue>,
    /// Addresses of the node.
    pub node_addresses: BTreeSet<Address>,
}

impl Ledger {
    /// The UDP backend that sockets must leave because of an operation that is about to be noted: it is removed, takes no new
    /// flows any more, or is another pod's from now on. The programs treat flows of packets alike.
    #[must_use]
    pub fn left_by(&self, op: &Op) -> Option<BackendKey> {
        match op {
            Op::DeleteBackend(key) if key.protocol == UDP => Some(*key),
            Op::PutBackend(key, new) if key.protocol == UDP => {
                let old = self.backends.get(key)?;
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
    pub fn record(&mut self, op: &Op) {
        match op {
            Op::PutBackend(key, value) => drop(self.backends.insert(*key, *value)),
            Op::PutNodeAddress(address) => drop(self.node_addresses.insert(*address)),
            Op::PutSlot(key, backend) => {
                let list = self.lists.entry(key.list).or_default();
                let place = key.index as usize;
                if list.len() <= place {
                    list.resize(place + 1, None);
                }
                self.slots += usize::from(list[place].replace(*backend).is_none());
            }
            Op::PutSource(key) => {
                let new = self.sources.entry(list_of(key)).or_default().insert(*key);
                self.ranges += usize::from(new);
            }
            Op::PutService(key, value) => drop(self.services.insert(*key, *value)),
            Op::DeleteService(key) => drop(self.services.remove(key)),
            Op::DeleteSlot(key) => {
                if let Some(list) = self.lists.get_mut(&key.list) {
                    let slot = list.get_mut(key.index as usize).and_then(Option::take);
                    self.slots -= usize::from(slot.is_some());
                    list.truncate(list.iter().rposition(Option::is_some).map_or(0, |last| last + 1));
                    if list.is_empty() {
                        self.lists.remove(&key.list);
                    }
                }
            }
            Op::DeleteSource(key) => {
                if let Some(ranges) = self.sources.get_mut(&list_of(key)) {
                    self.ranges -= usize::from(ranges.remove(key));
                    if ranges.is_empty() {
                        self.sources.remove(&list_of(key));
                    }
                }
            }
            Op::DeleteNodeAddress(address) => drop(self.node_addresses.remove(address)),
            Op::DeleteBackend(key) => drop(self.backends.remove(key)),
        }
    }
}

fn list_of(key: &SourceKey) -> u32 {
    u32::from_be_bytes(key.data.list)
}

#[cfg(test)]
mod tests {
    use weft_ebpf_abi::{Port, TCP};

    use super::*;

    #[test]
    fn sockets_leave_udp_backends_that_end_drain_or_change_hands() {
        let key = |protocol| BackendKey { address: Address::ANY_V4, port: Port::new(53), protocol, pad: 0 };
        let value = |generation, flags| BackendValue { generation, flags, owner: 0 };
        let mut ledger = Ledger::default();
        assert_eq!(ledger.left_by(&Op::PutBackend(key(UDP), value(1, BACKEND_ACTIVE))), None, "it is new");
        for protocol in [TCP, UDP] {
            ledger.record(&Op::PutBackend(key(protocol), value(1, BACKEND_ACTIVE)));
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
            assert_eq!(ledger.left_by(&op), wanted, "{name}");
        }
    }
}
