//! What decisions cost: how often they ask a table. A lookup is what a program spends its time on, so these numbers are
//! promises; a change that raises one must be worth it.

use std::cell::Cell;

use weft_ebpf_abi::*;

use super::{Memory, NODE, VIP, from, hashed, key, to, with_backends};
use crate::Tables;
use crate::service::{Client, Destination, Found, allows, find, flow_is_current, select};

/// Counts what is asked.
struct Counting {
    inner: Memory,
    lookups: Cell<u32>,
    writes: Cell<u32>,
}

impl Counting {
    fn new(inner: Memory) -> Self {
        Self { inner, lookups: Cell::new(0), writes: Cell::new(0) }
    }

    fn looked(&self) -> &Memory {
        self.lookups.set(self.lookups.get() + 1);
        &self.inner
    }

    /// Lookups and writes since the last call.
    fn spent(&self) -> (u32, u32) {
        (self.lookups.take(), self.writes.take())
    }
}

impl Tables for Counting {
    fn service(&self, key: &ServiceKey) -> Option<ServiceValue> {
        self.looked().service(key)
    }
    fn slot(&self, key: &SlotKey) -> Option<BackendKey> {
        self.looked().slot(key)
    }
    fn backend(&self, key: &BackendKey) -> Option<BackendValue> {
        self.looked().backend(key)
    }
    fn is_node_address(&self, address: &Address) -> bool {
        self.looked().is_node_address(address)
    }
    fn source_allowed(&self, list: u32, client: &Address) -> bool {
        self.looked().source_allowed(list, client)
    }
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.looked().affinity(key)
    }
    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        self.writes.set(self.writes.get() + 1);
        self.inner.remember(key, value);
    }
    fn random(&self) -> u32 {
        self.inner.random()
    }
    fn now_seconds(&self) -> u32 {
        self.inner.now_seconds()
    }
}

#[test]
fn finding_a_destination() {
    let tables = Counting::new(with_backends(50, TCP, 0).0);
    let elsewhere = Address::v4([8, 8, 8, 8]);
    let outside = |address, port| Destination { scope: SCOPE_EXTERNAL, ..to(address, port) };
    let rows = [
        ("a Service", to(VIP, 80), 1),
        ("a NodePort", to(NODE, 30080), 3),
        ("another port of the node", to(NODE, 22), 3),
        ("a port the Service lacks", to(VIP, 81), 3),
        ("nobody's, from a pod", to(elsewhere, 443), 3),
        ("nobody's, from outside", outside(elsewhere, 443), 2),
        ("a port of the node, from outside", outside(NODE, 22), 3),
    ];
    for (name, destination, lookups) in rows {
        find(&tables, &destination);
        assert_eq!(tables.spent(), (lookups, 0), "{name}");
    }
}

#[test]
fn finding_costs_the_same_however_many_services_and_endpoints_there_are() {
    for services in [1, 1_000] {
        let (mut memory, value) = with_backends(200, TCP, 0);
        for n in 0..services {
            let [high, low] = u16::to_be_bytes(n);
            memory.services.insert(key(Address::v4([10, 44, high, low]), 80, TCP, SCOPE_INTERNAL), value);
        }
        let tables = Counting::new(memory);
        let Found::Service(service) = find(&tables, &to(VIP, 80)) else { panic!("not found") };
        select(&tables, &service, &from([10, 0, 0, 1], 1));
        assert_eq!(tables.spent(), (2, 0));
    }
}

#[test]
fn choosing_a_backend() {
    let plain = from([10, 0, 0, 1], 4_000);
    let datagram = Client { datagram_socket: Some(Address::from_id(1)), port: None, ..plain };
    let rows = [
        ("at random", with_backends(50, TCP, 0), plain, (1, 0), (1, 0)),
        ("by hash", hashed(50, 0), plain, (1, 0), (1, 0)),
        ("with affinity", with_backends(50, TCP, 60), plain, (2, 1), (2, 0)),
        ("for a socket's datagrams", with_backends(50, UDP, 0), datagram, (2, 1), (2, 0)),
        ("from nothing", with_backends(0, TCP, 60), plain, (0, 0), (0, 0)),
    ];
    for (name, (memory, service), client, first, again) in rows {
        let tables = Counting::new(memory);
        select(&tables, &service, &client);
        assert_eq!(tables.spent(), first, "{name}");
        select(&tables, &service, &client);
        assert_eq!(tables.spent(), again, "{name}, once more within the second");
    }
}

#[test]
fn checks_that_a_service_does_not_want_cost_nothing() {
    let (memory, service) = with_backends(1, TCP, 0);
    let tables = Counting::new(memory);
    assert!(allows(&tables, &service, &VIP));
    assert_eq!(tables.spent(), (0, 0));
    flow_is_current(&tables, &super::backend(0, TCP), 1);
    assert_eq!(tables.spent(), (1, 0), "a packet of an established flow");
}
