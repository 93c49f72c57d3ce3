//! When a flow is answered by its backend's node, and what its packets tell.

use std::collections::HashMap;

use proptest::prelude::*;
use weft_ebpf_abi::*;

use super::*;
use crate::packet::{V4, V6, parse};

const CLIENT: Address = Address::v4([198, 51, 100, 7]);
const NODE: Address = Address::v4([192, 0, 2, 1]);
const POD: Address = Address::v4([10, 42, 1, 2]);
const OLD_POD: Address = Address::v4([10, 42, 2, 2]);
const TAKES_BYTES: u32 = 1_450;

/// One backend, and nodes: one that answers by itself, one that doesn't.
struct Cluster {
    active: bool,
    now: u32,
    nodes: HashMap<Address, u32>,
}

impl Cluster {
    fn new() -> Self {
        let other_node = Address::v4([192, 0, 2, 2]);
        let nodes = [(POD, TAKES_BYTES), (OLD_POD, 0), (other_node, 0)].into_iter().collect();
        Self { active: true, now: 1_000, nodes }
    }
}

impl Nodes for Cluster {
    fn takes_bytes(&self, address: &Address) -> Option<u32> {
        self.nodes.get(address).copied()
    }
}

impl Tables for Cluster {
    fn service(&self, _: &ServiceKey) -> Option<ServiceValue> {
        None
    }
    fn slot(&self, _: &SlotKey) -> Option<BackendKey> {
        None
    }
    fn backend(&self, _: &BackendKey) -> Option<BackendValue> {
        let flags = if self.active { BACKEND_ACTIVE } else { 0 };
        Some(BackendValue { generation: 1, flags, owner: 0 })
    }
    fn is_node_address(&self, _: &Address) -> bool {
        false
    }
    fn source_allowed(&self, _: u32, _: &Address) -> bool {
        true
    }
    fn affinity(&self, _: &AffinityKey) -> Option<AffinityValue> {
        None
    }
    fn remember(&self, _: &AffinityKey, _: &AffinityValue) {}
    fn random(&self) -> u32 {
        0
    }
    fn now_seconds(&self) -> u32 {
        self.now
    }
}

fn packet(protocol: u8, total_bytes: u32) -> Packet {
    let mut packet = Packet::between(CLIENT, NODE);
    packet.key.source_port = Port::new(40_000);
    packet.key.destination_port = Port::new(30_080);
    packet.key.protocol = protocol;
    packet.total_bytes = total_bytes;
    packet
}

#[test]
fn only_a_client_outside_and_a_node_that_knows_of_it_suit() {
    let cluster = Cluster::new();
    let suits = |packet: &Packet, flags, pod: &Address| suits(&cluster, packet, flags, pod);
    let largest = TAKES_BYTES - ASKED_BYTES;
    let (small, fits, over) = (packet(TCP, 60), packet(UDP, largest), packet(UDP, largest + 1));
    assert!(suits(&small, 0, &POD) && suits(&fits, 0, &POD) && !suits(&over, 0, &POD));
    assert!(!suits(&small, 0, &OLD_POD), "its node does not answer by itself");
    assert!(!suits(&small, 0, &Address::v4([10, 42, 9, 2])), "nobody's pod");
    assert!(!suits(&small, SERVICE_KEEP_SOURCE, &POD), "its backends are this node's");
    assert!(
        !suits(&small, SERVICE_WATCHED, &POD) && suits(&fits, SERVICE_WATCHED, &POD),
        "no answer would count"
    );
    assert!(suits(&small, SERVICE_HASHED | SERVICE_CHECK_SOURCE, &POD));
    for inside in [POD, OLD_POD, Address::v4([192, 0, 2, 2])] {
        let mut from_inside = small;
        from_inside.key.source = inside;
        assert!(!suits(&from_inside, 0, &POD), "{inside:?}");
    }
    assert!(!suits(&packet(SCTP, 60), 0, &POD), "its checksum would be of what is behind it, too");
    for part in [Part::First, Part::Later] {
        assert!(!suits(&Packet { part, ..fits }, 0, &POD), "{part:?}");
    }
}

#[test]
fn what_may_arrive_first_tells_and_once_a_second_another_does() {
    let rows = [(UDP, 0, 9, true), (TCP, SYN, 9, true), (TCP, 0, 9, false), (TCP, 0, 8, true)];
    for (protocol, flags, last_seen, expected) in rows {
        let packet = Packet { flags, ..packet(protocol, 60) };
        assert_eq!(tells(&packet, last_seen, 9), expected, "{protocol} {flags} {last_seen}");
        assert!(
            !tells(&Packet { part: Part::First, ..packet }, last_seen, 9),
            "it is of the fragment's length"
        );
    }
}

#[test]
fn a_syn_begins_anew_once_it_can_be_no_repetition() {
    let mut cluster = Cluster::new();
    let backend = BackendKey { address: POD, port: Port::new(80), protocol: TCP, pad: 0 };
    let mut entry = flow::forward(&backend, (CLIENT, Port::new(40_000)), 3, 1);
    entry.flags = FLOW_DIRECT;
    entry.last_seen = cluster.now - (UDP_STICKY_SECONDS - 1);
    let syn = Packet { flags: SYN, ..packet(TCP, 60) };
    assert!(!begins_anew(&cluster, &syn, &entry), "it may be sent again");
    assert!(!begins_anew(&cluster, &Packet { flags: 0, ..syn }, &FlowValue { last_seen: 0, ..entry }));
    cluster.now += 1;
    assert!(begins_anew(&cluster, &syn, &entry));
    assert!(!begins_anew(&cluster, &syn, &FlowValue { flags: 0, ..entry }), "whose end this node sees");
    entry.last_seen = cluster.now;
    cluster.active = false;
    assert!(begins_anew(&cluster, &syn, &entry), "a backend that drains takes no others");
    cluster.active = true;
    cluster.nodes.insert(POD, 0);
    assert!(begins_anew(&cluster, &syn, &entry), "its node does not answer by itself any more");
}

#[test]
fn nodes_differ_and_none_is_no_node() {
    assert_eq!(by_node([6, 0x77, 10, 44, 0, 2]), [44, 0, 2]);
    assert_ne!(by_node([6, 0x78, 7, 0, 0, 0]), [0; 3]);
}

/// Sum of 16-bit words as RFC 1071 words it.
fn sum_of(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)])));
    let mut total: u32 = words.sum();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap()
}

fn bytes_of(asked: &Asked) -> Vec<u8> {
    asked.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn key() -> impl Strategy<Value = FlowKey> {
    let address = prop_oneof![any::<[u8; 16]>().prop_map(Address), any::<[u8; 4]>().prop_map(Address::v4)];
    (address.clone(), address, any::<[u16; 2]>(), prop_oneof![Just(TCP), Just(UDP)]).prop_map(
        |(source, destination, [from, to], protocol)| FlowKey {
            source,
            destination,
            source_port: Port::new(from),
            destination_port: Port::new(to),
            protocol,
            pad: [0; 3],
        },
    )
}

proptest! {
    #[test]
    fn what_is_told_is_read(key in key(), arrives_from in any::<u16>(), pad in any::<[u8; 3]>()) {
        let on_the_way = FlowKey { source_port: Port::new(arrives_from), pad, ..key };
        let mut read = on_the_way;
        read.destination = Address::ANY;
        prop_assert_eq!(read_asked(&asked(&key), &on_the_way, &mut read), Some(()));
        prop_assert_eq!(read, key);
    }

    #[test]
    fn it_adds_nothing_to_a_checksum(key in key(), payload in prop::collection::vec(any::<u8>(), 1..64)) {
        // A sum of all zeros is zero in one way, and that of anything else with it in another.
        prop_assume!(sum_of(&payload) != 0);
        let with = [payload.clone(), bytes_of(&asked(&key))].concat();
        prop_assert_eq!(sum_of(&with), sum_of(&payload));
    }

    #[test]
    fn a_damaged_one_is_refused(key in key(), at in 0_usize..24, bit in 0_u8..8) {
        let mut bytes = bytes_of(&asked(&key));
        bytes[at] ^= 1 << bit;
        let mut words = [0; 6];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks(4)) {
            *word = u32::from_ne_bytes(bytes.try_into().unwrap());
        }
        let mut read = key;
        prop_assert_eq!(read_asked(&words, &key, &mut read), None);
        prop_assert_eq!(read, key);
    }
}

#[test]
fn a_packet_is_read_as_without_it() {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0, 0, 28, 0, 1, 0, 0, 64, UDP, 0, 0, 198, 51, 100, 7, 10, 42, 1, 2]);
    frame.extend([0x9c, 0x40, 0, 80, 0, 8, 0, 0]);
    let plain = parse::<V4, _>(&frame[..]).unwrap();
    frame.extend(bytes_of(&asked(&plain.key)));
    assert_eq!(parse::<V4, _>(&frame[..]), Some(plain));
    assert_eq!(plain.total_bytes, 28, "where it is found");
    assert_eq!(parse::<V6, _>(&frame[..]), None);
}
