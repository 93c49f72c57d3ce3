//! Decisions on packets and tables, without IO: they run in the kernel and, unchanged, on the host.
//!
//! Functions are generic over [`Tables`], so the same code asks BPF maps there and ordinary maps in tests.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod connecting;
pub mod direct;
pub mod fast;
pub mod flow;
pub mod hash;
pub mod packet;
pub mod policy;
pub mod sctp;
pub mod service;
pub mod tunnel;

use weft_ebpf_abi::{
    Address, AffinityKey, AffinityValue, BackendKey, BackendValue, ServiceKey, ServiceValue, SlotKey,
};

/// The tables that decisions are made from.
pub trait Tables {
    /// A Service's address and port.
    fn service(&self, key: &ServiceKey) -> Option<ServiceValue>;
    /// A place in a list of backends.
    fn slot(&self, key: &SlotKey) -> Option<BackendKey>;
    /// A backend.
    fn backend(&self, key: &BackendKey) -> Option<BackendValue>;
    /// Whether the node answers NodePorts at this address.
    fn is_node_address(&self, address: &Address) -> bool;
    /// Whether a client may use a list of backends whose Service checks its clients.
    fn source_allowed(&self, list: u32, client: &Address) -> bool;
    /// What a client had last.
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue>;
    /// Remembers what a client has. Best effort: a full table forgets the oldest.
    fn remember(&self, key: &AffinityKey, value: &AffinityValue);
    /// A random number.
    fn random(&self) -> u32;
    /// Seconds of the monotonic clock.
    fn now_seconds(&self) -> u32;
}

#[cfg(test)]
mod tests;
