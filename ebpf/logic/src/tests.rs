//! Tables in memory, and what must hold for any of them.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use weft_ebpf_abi::*;

use crate::service::{Client, Destination, Found, allows, find, flow_is_current, scale, select};
use crate::{Tables, flow, hash};

mod cost;
mod packets;

#[derive(Default)]
struct Memory {
    services: HashMap<ServiceKey, ServiceValue>,
    slots: HashMap<SlotKey, BackendKey>,
    backends: HashMap<BackendKey, BackendValue>,
    node: HashSet<Address>,
    sources: HashSet<(u32, Address)>,
    affinity: RefCell<HashMap<AffinityKey, AffinityValue>>,
    random: Cell<u32>,
    now: Cell<u32>,
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
    fn source_allowed(&self, list: u32, client: &Address) -> bool {
        self.sources.contains(&(list, *client))
    }
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.borrow().get(key).copied()
    }
    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        self.affinity.borrow_mut().insert(*key, *value);
    }
    fn random(&self) -> u32 {
        self.random.set(self.random.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
        self.random.get()
    }
    fn now_seconds(&self) -> u32 {
        self.now.get()
    }
}

const VIP: Address = Address::v4([10, 43, 0, 10]);
const NODE: Address = Address::v4([192, 168, 0, 2]);

fn backend(i: u8, protocol: u8) -> BackendKey {
    BackendKey { address: Address::v4([10, 42, 0, i]), port: Port::new(8080), protocol, pad: 0 }
}

fn with_backends(count: u8, protocol: u8, affinity_seconds: u32) -> (Memory, ServiceValue) {
    let mut memory = Memory { random: Cell::new(7), ..Memory::default() };
    let value = ServiceValue { list: 1, count: u32::from(count), affinity_seconds, flags: 0 };
    memory.services.insert(key(VIP, 80, protocol, SCOPE_INTERNAL), value);
    memory.services.insert(key(VIP, 0, 0, SCOPE_INTERNAL), ServiceValue { count: 0, ..value });
    memory.services.insert(key(Address::ANY_V4, 30080, protocol, SCOPE_INTERNAL), value);
    for i in 0..count {
        memory.slots.insert(SlotKey { list: 1, index: u32::from(i) }, backend(i, protocol));
        let known = BackendValue { generation: u32::from(i) + 1, flags: BACKEND_ACTIVE, owner: 0 };
        memory.backends.insert(backend(i, protocol), known);
    }
    memory.node.insert(NODE);
    (memory, value)
}

fn key(address: Address, port: u16, protocol: u8, scope: u8) -> ServiceKey {
    ServiceKey { address, port: Port::new(port), protocol, scope }
}

fn to(address: Address, port: u16) -> Destination {
    Destination {
        address,
        port: Port::new(port),
        protocol: TCP,
        scope: SCOPE_INTERNAL,
        loopback_is_node: true,
    }
}

#[test]
fn destinations() {
    let (memory, value) = with_backends(2, TCP, 0);
    let loopback = Address::v4([127, 0, 0, 1]);
    let elsewhere = Address::v4([8, 8, 8, 8]);
    let rows = [
        ("cluster address", to(VIP, 80), Found::Service(value)),
        ("a port it does not serve", to(VIP, 81), Found::UnknownPort),
        (
            "its port over the other protocol",
            Destination { protocol: UDP, ..to(VIP, 80) },
            Found::UnknownPort,
        ),
        ("NodePort at the node", to(NODE, 30080), Found::Service(value)),
        ("NodePort at loopback", to(loopback, 30080), Found::Service(value)),
        ("loopback of a pod", Destination { loopback_is_node: false, ..to(loopback, 30080) }, Found::Nothing),
        ("another port of the node", to(NODE, 22), Found::Nothing),
        ("NodePort elsewhere", to(elsewhere, 30080), Found::Nothing),
        ("from outside", Destination { scope: SCOPE_EXTERNAL, ..to(VIP, 80) }, Found::Nothing),
        ("from outside, unknown", Destination { scope: SCOPE_EXTERNAL, ..to(VIP, 81) }, Found::Nothing),
    ];
    for (name, destination, wanted) in rows {
        assert_eq!(find(&memory, &destination), wanted, "{name}");
    }
}

const CLIENT: Client = Client { client: Address::from_id(1), port: None, datagram_socket: None };

#[test]
fn every_backend_is_picked_and_evenly() {
    let (memory, value) = with_backends(50, TCP, 0);
    let mut hits = HashMap::new();
    for _ in 0..10_000 {
        *hits.entry(select(&memory, &value, &CLIENT).unwrap()).or_insert(0_u32) += 1;
    }
    assert_eq!(hits.len(), 50);
    assert!(hits.values().all(|&n| (100..=300).contains(&n)), "{hits:?}");
}

#[test]
fn none_without_backends() {
    let (memory, value) = with_backends(0, TCP, 0);
    assert_eq!(select(&memory, &value, &CLIENT), None);
}

#[test]
fn overtaken_reader_falls_back_to_the_first_slot() {
    let (mut memory, value) = with_backends(9, TCP, 0);
    for index in 1..9 {
        memory.slots.remove(&SlotKey { list: 1, index });
    }
    for _ in 0..20 {
        assert_eq!(select(&memory, &value, &CLIENT), Some(backend(0, TCP)));
    }
}

#[test]
fn affinity_lasts_its_seconds_and_no_longer_than_the_backend() {
    let (mut memory, value) = with_backends(50, TCP, 10);
    let first = select(&memory, &value, &CLIENT).unwrap();
    for now in 1..40 {
        memory.now.set(now);
        assert_eq!(select(&memory, &value, &CLIENT), Some(first), "used every second, at {now}");
    }
    let later = |memory: &Memory| (0..8).map(|_| select(memory, &value, &CLIENT)).collect::<HashSet<_>>();
    assert_eq!(later(&memory).len(), 1);
    memory.backends.get_mut(&first).unwrap().flags = 0;
    assert_ne!(select(&memory, &value, &CLIENT), Some(first), "it drains");
    memory.now.set(1_000);
    let mut seen = HashSet::new();
    for round in 0..20 {
        memory.now.set(1_000 + round * 10);
        seen.insert(select(&memory, &value, &CLIENT));
    }
    assert!(seen.len() > 1, "it never expires");
}

#[test]
fn datagrams_of_a_socket_stay_together() {
    let (memory, value) = with_backends(50, UDP, 0);
    let client =
        |n| Client { client: Address::from_id(1), port: None, datagram_socket: Some(Address::from_id(n)) };
    let first = select(&memory, &value, &client(5));
    assert!((0..100).all(|_| select(&memory, &value, &client(5)) == first));
    let others: HashSet<_> = (10..40).map(|n| select(&memory, &value, &client(n))).collect();
    assert!(others.len() > 10);
}

#[test]
fn generations() {
    let (mut memory, _) = with_backends(2, TCP, 0);
    let tcp = backend(0, TCP);
    assert!(flow_is_current(&memory, &tcp, 1));
    assert!(!flow_is_current(&memory, &tcp, 2), "another endpoint on the same address");
    memory.backends.get_mut(&tcp).unwrap().flags = 0;
    assert!(flow_is_current(&memory, &tcp, 1), "a draining backend keeps its TCP flows");
    memory.backends.remove(&tcp);
    assert!(!flow_is_current(&memory, &tcp, 1), "gone");
    let (mut memory, _) = with_backends(2, SCTP, 0);
    memory.backends.get_mut(&backend(0, SCTP)).unwrap().flags = 0;
    assert!(flow_is_current(&memory, &backend(0, SCTP), 1), "and its associations");
    let (mut memory, _) = with_backends(2, UDP, 0);
    memory.backends.get_mut(&backend(0, UDP)).unwrap().flags = 0;
    assert!(!flow_is_current(&memory, &backend(0, UDP), 1), "UDP leaves a draining backend");
}

proptest! {
    #[test]
    fn scaling_stays_in_range(random: u32, count in 1_u32..) {
        prop_assert!(scale(random, count) < count);
    }

    #[test]
    fn a_reply_undoes_its_forward(a: [u8; 16], b: [u8; 16], ports: [u16; 3], nat: u32) {
        let key = FlowKey {
            source: Address(a), destination: Address(b), source_port: Port::new(ports[0]),
            destination_port: Port::new(ports[1]), protocol: TCP, pad: [0; 3],
        };
        let to = BackendKey { address: Address(b), port: Port::new(ports[2]), protocol: TCP, pad: 0 };
        let forward = flow::forward(&to, (Address(a), flow::nat_port(nat, 3)), 9, 1);
        let reply = flow::reply(&key, 4, 1);
        prop_assert_eq!(flow::forward_key(&reply, TCP), key);
        prop_assert!(flow::answers(&reply, &key));
        let other = FlowKey { destination_port: Port::new(ports[1].wrapping_add(1)), ..key };
        prop_assert!(!flow::answers(&reply, &other));
        prop_assert_eq!(flow::backend(&forward, TCP), to);
        let answer = flow::reply_key(&forward, TCP);
        prop_assert_eq!((answer.source, answer.source_port), (to.address, to.port));
        prop_assert_eq!(flow::reversed(&flow::reversed(&key)), key);
    }

    #[test]
    fn nat_ports_differ_and_stay_in_range(random: u32) {
        let ports: HashSet<u16> = (0..flow::NAT_PORT_TRIES).map(|n| flow::nat_port(random, n).get()).collect();
        prop_assert_eq!(ports.len(), flow::NAT_PORT_TRIES as usize);
        prop_assert!(ports.iter().all(|p| *p >= NAT_PORT_FIRST));
    }
}

#[test]
fn the_hash_is_murmur3() {
    // A published vector, which every node and every version must agree with.
    assert_eq!(hash::words(&[u32::from_le_bytes(*b"test")]), 0xba6b_d213);
}

fn hashed(count: u8, affinity_seconds: u32) -> (Memory, ServiceValue) {
    let (memory, value) = with_backends(count, TCP, affinity_seconds);
    (memory, ServiceValue { flags: SERVICE_HASHED, ..value })
}

fn from(address: [u8; 4], port: u16) -> Client {
    Client { client: Address::v4(address), port: Some(Port::new(port)), datagram_socket: None }
}

#[test]
fn hashed_choice_is_the_same_everywhere_and_even() {
    let (here, value) = hashed(50, 0);
    let (there, elsewhere) = hashed(50, 0);
    there.random.set(99);
    let elsewhere = ServiceValue { list: 1, ..elsewhere };
    let (mut by_port, mut by_address) = (HashMap::new(), HashMap::new());
    for n in 0..10_000_u16 {
        let [high, low] = n.to_be_bytes();
        for (client, hits) in [
            (from([192, 168, 0, 7], 32_768 + n), &mut by_port),
            (from([172, 16, high, low], 40_000), &mut by_address),
        ] {
            let chosen = select(&here, &value, &client).unwrap();
            assert_eq!(select(&there, &elsewhere, &client), Some(chosen));
            *hits.entry(chosen).or_insert(0_u32) += 1;
        }
    }
    for hits in [by_port, by_address] {
        assert_eq!(hits.len(), 50);
        // 200 expected, standard deviation 14.
        assert!(hits.values().all(|&n| (130..=270).contains(&n)), "{hits:?}");
    }
}

#[test]
fn hashed_choice_with_affinity_is_kept_for_its_seconds_only() {
    let (memory, value) = hashed(50, 10);
    let ask = |port| select(&memory, &value, &from([192, 168, 0, 7], port)).unwrap();
    let first = ask(1);
    assert!((2..100).all(|port| ask(port) == first));
    let mut seen = HashSet::new();
    for round in 1..50_u16 {
        memory.now.set(u32::from(round) * 10);
        seen.insert(ask(100 + round));
    }
    assert!(seen.len() > 20, "the choice after a time-out is open");
}

#[test]
fn sockets_of_a_hashed_list_choose_at_random() {
    let (memory, value) = hashed(50, 0);
    let hits: HashSet<_> = (0..1_000).map(|_| select(&memory, &value, &CLIENT)).collect();
    assert_eq!(hits.len(), 50);
}

#[test]
fn source_ranges() {
    let (mut memory, value) = with_backends(1, TCP, 0);
    let (inside, outside) = (Address::v4([10, 0, 0, 1]), Address::v4([10, 0, 0, 2]));
    memory.sources.insert((value.list, inside));
    let checked = ServiceValue { flags: SERVICE_CHECK_SOURCE, ..value };
    let other = ServiceValue { list: 2, ..checked };
    assert!(allows(&memory, &value, &outside), "it checks nobody");
    assert!(allows(&memory, &checked, &inside) && !allows(&memory, &checked, &outside));
    assert!(!allows(&memory, &other, &inside), "another list's range");
}

#[test]
fn who_keeps_its_address() {
    let (bridge, overlay, uplink) = (3, 4, 5);
    let pods = flow::PodDevices { bridge, overlay };
    let rows = [
        ("a pod to another node's pod", bridge, overlay, 0, true),
        ("another node's pod to one here", overlay, bridge, 0, true),
        ("two pods of one bridge", bridge, bridge, 0, false),
        ("a pod to who is none", bridge, uplink, 0, false),
        ("from outside", uplink, bridge, 0, false),
        ("from outside, if the Service wants it", uplink, bridge, SERVICE_KEEP_SOURCE, true),
    ];
    for (name, came_by, leaves_by, flags, wanted) in rows {
        assert_eq!(pods.keep_source(came_by, leaves_by, flags), wanted, "{name}");
    }
    let alone = flow::PodDevices { bridge, overlay: 0 };
    assert!(!alone.keep_source(bridge, 0, 0) && !alone.has(0), "no device is no overlay");
    let [a, b] = [Address::v4([10, 42, 0, 2]), Address::v4([10, 42, 0, 3])];
    let rows = [
        ("to a pod whose edge translates the answers", a, b, true, true),
        ("to one whose edge doesn't", a, b, false, false),
        ("to itself", a, a, true, false),
    ];
    for (name, client, backend, has_edge, wanted) in rows {
        assert_eq!(flow::keep_source_at_edge(&client, &backend, has_edge), wanted, "{name}");
    }
}

#[test]
fn idle_udp_begins_anew() {
    let key = FlowKey {
        source: VIP,
        destination: NODE,
        source_port: Port::new(1),
        destination_port: Port::new(2),
        protocol: UDP,
        pad: [0; 3],
    };
    let entry = FlowValue { last_seen: 10, ..flow::reply(&key, 0, 0) };
    assert!(!flow::is_idle(&entry, UDP, 100));
    assert!(flow::is_idle(&entry, UDP, 130));
    assert!(!flow::is_idle(&entry, TCP, 10_000));
    assert!(!flow::is_idle(&entry, SCTP, 10_000));
}
