//! Decisions on tables in memory.

use std::collections::{HashMap, HashSet};

use weft_ebpf_abi::{
    AffinityKey, AffinityValue, BACKEND_ACTIVE, BackendKey, BackendValue, SERVICE_KEEP_SOURCE, SlotKey, TCP,
};

use super::*;

#[derive(Default)]
struct Memory {
    services: HashMap<ServiceKey, ServiceValue>,
    slots: HashMap<SlotKey, BackendKey>,
    backends: HashMap<BackendKey, BackendValue>,
    node: HashSet<Address>,
    affinity: HashMap<AffinityKey, AffinityValue>,
}

impl Tables for Memory {
    fn service(&self, key: &ServiceKey) -> Option<ServiceValue> {
        self.services.get(key).copied()
    }
    fn slot(&self, key: &SlotKey) -> Option<BackendKey> {
        self.slots.get(key).copied()
    }
    fn backend(&self, key: &BackendKey) -> Option<BackendValue> {
        self.backends.get(key).copied()
    }
    fn is_node_address(&self, address: &Address) -> bool {
        self.node.contains(address)
    }
    fn source_allowed(&self, _: u32, client: &Address) -> bool {
        *client == CLIENT
    }
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.get(key).copied()
    }
    fn remember(&self, _: &AffinityKey, _: &AffinityValue) {}
    fn random(&self) -> u32 {
        0
    }
    fn now_seconds(&self) -> u32 {
        100
    }
}

const VIP: Address = Address::v4([10, 43, 0, 10]);
const NODE: Address = Address::v4([10, 44, 0, 2]);
const CLIENT: Address = Address::v4([192, 0, 2, 1]);

fn service(address: Address, port: u16, scope: u8) -> ServiceKey {
    ServiceKey { address, port: Port::new(port), protocol: TCP, scope }
}

fn backend(last: u8) -> BackendKey {
    BackendKey { address: Address::v4([10, 42, 0, last]), port: Port::new(8080), protocol: TCP, pad: 0 }
}

/// A Service with two backends, a NodePort from outside with `flags`, and an address that refuses the rest.
fn memory(flags: u32, outside: u32) -> Memory {
    let value = ServiceValue { list: 1, count: 2, affinity_seconds: 0, flags: 0 };
    let mut memory = Memory::default();
    memory.services.insert(service(VIP, 80, SCOPE_INTERNAL), value);
    memory.services.insert(
        ServiceKey { address: VIP, port: Port::new(0), protocol: 0, scope: SCOPE_INTERNAL },
        ServiceValue { list: 0, count: 0, ..value },
    );
    let external = ServiceValue { list: 2, count: outside, flags, ..value };
    memory.services.insert(service(Address::ANY_V4, 30080, SCOPE_EXTERNAL), external);
    for list in [1, 2] {
        for (index, last) in [(0, 5), (1, 6)] {
            memory.slots.insert(SlotKey { list, index }, backend(last));
            let known = BackendValue { generation: 1, flags: BACKEND_ACTIVE, owner: 0 };
            memory.backends.insert(backend(last), known);
        }
    }
    memory.node.insert(NODE);
    memory
}

fn query(hook: Hook, to: Address, port: u16) -> Query {
    let from = CLIENT.into();
    Query { hook, from, pod_uid: None, to: to.into(), port, protocol: Protocol::Tcp }
}

fn decision(memory: &Memory, query: &Query) -> Decision {
    decide(memory, query, CLIENT).0
}

#[test]
fn a_service_is_found_by_address_and_by_node_port() {
    let memory = memory(0, 2);
    let any = Decision::Backend { kept: None };
    assert_eq!(decision(&memory, &query(Hook::PodSocket, VIP, 80)), any);
    let (outcome, entry) = decide(&memory, &query(Hook::Edge, NODE, 30080), CLIENT);
    assert_eq!(outcome, any);
    assert_eq!(entry.unwrap().0, service(Address::ANY_V4, 30080, SCOPE_EXTERNAL));
    assert_eq!(decision(&memory, &query(Hook::PodSocket, CLIENT, 80)), Decision::Direct);
}

#[test]
fn what_is_refused_names_the_hook() {
    let memory = memory(0, 0);
    assert_eq!(decision(&memory, &query(Hook::PodSocket, VIP, 81)), refused(DropReason::SocketUnknownPort));
    assert_eq!(decision(&memory, &query(Hook::Edge, NODE, 30080)), refused(DropReason::PacketNoEndpoints));
    let by_sctp = Query { protocol: Protocol::Sctp, ..query(Hook::PodSocket, VIP, 81) };
    assert_eq!(
        decision(&memory, &by_sctp),
        refused(DropReason::PacketUnknownPort),
        "no hook sees its sockets"
    );
    let by_loopback = Query { protocol: Protocol::Sctp, ..query(Hook::NodeSocket, NODE, 30080) };
    assert_eq!(decision(&memory, &by_loopback), Decision::Direct, "nor what the node sends to itself");
    // From outside the address of the cluster is none: the packet goes where the routes say.
    assert_eq!(decision(&memory, &query(Hook::Edge, VIP, 81)), Decision::Direct);
}

#[test]
fn what_is_dropped_names_the_policy() {
    let local = memory(SERVICE_KEEP_SOURCE | SERVICE_DROP_EMPTY, 0);
    assert_eq!(decision(&local, &query(Hook::Edge, NODE, 30080)), dropped(DropReason::NoLocalEndpoints));
    let ranges = memory(SERVICE_CHECK_SOURCE, 2);
    let mut stranger = query(Hook::Edge, NODE, 30080);
    assert_eq!(decision(&ranges, &stranger), Decision::Backend { kept: None });
    stranger.from = IpAddr::from([198, 51, 100, 1]);
    let outcome = decide(&ranges, &stranger, Address::from(stranger.from)).0;
    assert_eq!(outcome, dropped(DropReason::SourceNotAllowed));
}

#[test]
fn a_client_with_affinity_is_told_its_backend() {
    let mut memory = memory(0, 2);
    let key = service(VIP, 80, SCOPE_INTERNAL);
    memory.services.get_mut(&key).unwrap().affinity_seconds = 60;
    assert_eq!(
        decision(&memory, &query(Hook::PodSocket, VIP, 80)),
        Decision::Backend { kept: None },
        "a new client"
    );
    let last = AffinityValue { backend: backend(6), last_used: 90 };
    memory.affinity.insert(AffinityKey { client: CLIENT, list: 1 }, last);
    let Decision::Backend { kept: Some(kept) } = decision(&memory, &query(Hook::PodSocket, VIP, 80)) else {
        panic!("the client is known");
    };
    assert_eq!(kept.to_string(), "10.42.0.6:8080");
}
