//! Operations on the maps, and what the maps say as a whole.

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

/// What the maps say, in order: to be read and compared. The planner keeps the same smaller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Services' addresses.
    pub services: BTreeMap<ServiceKey, ServiceValue>,
    /// Lists by number, with what stands at each place; the last one is never empty.
    pub lists: BTreeMap<u32, Vec<Option<BackendKey>>>,
    /// Ranges of clients, by the list's number.
    pub sources: BTreeMap<u32, BTreeSet<SourceKey>>,
    /// Backends.
    pub backends: BTreeMap<BackendKey, BackendValue>,
    /// Addresses of the node.
    pub node_addresses: BTreeSet<Address>,
}
