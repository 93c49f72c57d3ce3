//! Operations on the maps, and what is believed to be in them.

use std::collections::{BTreeMap, BTreeSet};

use weft_ebpf_abi::{Address, BackendKey, BackendValue, ServiceKey, ServiceValue, SlotKey, SourceKey};

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
    /// Lists by number.
    pub lists: BTreeMap<u32, BTreeMap<u32, BackendKey>>,
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
    /// Notes an operation that succeeded.
    pub fn record(&mut self, op: &Op) {
        match op {
            Op::PutBackend(key, value) => drop(self.backends.insert(*key, *value)),
            Op::PutNodeAddress(address) => drop(self.node_addresses.insert(*address)),
            Op::PutSlot(key, backend) => {
                let old = self.lists.entry(key.list).or_default().insert(key.index, *backend);
                self.slots += usize::from(old.is_none());
            }
            Op::PutSource(key) => {
                let new = self.sources.entry(list_of(key)).or_default().insert(*key);
                self.ranges += usize::from(new);
            }
            Op::PutService(key, value) => drop(self.services.insert(*key, *value)),
            Op::DeleteService(key) => drop(self.services.remove(key)),
            Op::DeleteSlot(key) => {
                if let Some(list) = self.lists.get_mut(&key.list) {
                    self.slots -= usize::from(list.remove(&key.index).is_some());
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
