//! Policies: verdicts on packets, and policies as objects.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::json;
use weft_agent_dataplane::maps::memory::MemoryMaps;
use weft_agent_dataplane::policy::maps::PolicyTable;
use weft_agent_dataplane::policy::objects::{self as object, Name, Pod, Policy};
use weft_agent_dataplane::policy::planner::Planner;
use weft_agent_dataplane::policy::rules::prefixes;
use weft_ebpf_abi::policy::{
    IDENTITY_NONE, POLICY_DRY_EGRESS, POLICY_DRY_INGRESS, POLICY_EGRESS, POLICY_INGRESS, PolicyPod, TRACK_IN,
    TRACK_OUT, TrackKey, TrackValue,
};
use weft_ebpf_abi::{Address, Port, SCTP, TCP, UDP};
use weft_ebpf_logic::policy::{Edge, Packet, Peer, PolicyTables, check, check_fragment};

use crate::input::Input;

/// The longest that anything is let through as an answer.
const LONG_SECONDS: u32 = 432_000;

#[derive(Clone, Default)]
struct Memory {
    rules: Vec<(u64, u64, u8, u16)>,
    flows: RefCell<HashMap<TrackKey, TrackValue>>,
    would: RefCell<Vec<u64>>,
    now: u32,
}

impl PolicyTables for Memory {
    fn identity(&self, address: &Address) -> u64 {
        match address.low() {
            [_, _, _, last] if last < 8 => u64::from(last),
            _ => IDENTITY_NONE,
        }
    }
    fn allows(&self, set: u64, identity: u64, protocol: u8, port: Port) -> bool {
        self.rules.contains(&(set, identity, protocol, port.get()))
    }
    fn tracked(&self, key: &TrackKey) -> Option<TrackValue> {
        self.flows.borrow().get(key).copied()
    }
    fn track(&self, key: &TrackKey, value: &TrackValue) {
        self.flows.borrow_mut().insert(*key, *value);
    }
    fn would_drop(&self, set: u64) {
        self.would.borrow_mut().push(set);
    }
    fn now(&self) -> u32 {
        self.now
    }
}

fn packet(input: &mut Input<'_>) -> Packet {
    let address = |input: &mut Input<'_>| Address::v4([10, 42, 0, input.u8() % 10]);
    let protocol = input.pick(&[TCP, UDP, SCTP, 1, 58, 47]);
    let tcp_flags = if protocol == TCP { input.u8() & 0x1f } else { 0 };
    Packet {
        source: address(input),
        destination: address(input),
        source_port: Port::new(u16::from(input.u8() % 4)),
        destination_port: Port::new(u16::from(input.u8() % 4)),
        identification: [0, 0, 0, input.u8() % 4],
        protocol,
        tcp_flags,
        begins: tcp_flags & 0x12 == 0x02,
        error: input.u8().is_multiple_of(8),
        fragments: input.u8().is_multiple_of(8),
    }
}

fn edge(input: &mut Input<'_>) -> Edge {
    let pod = PolicyPod {
        ingress: u64::from(input.u8() % 3),
        egress: u64::from(input.u8() % 3),
        dry_ingress: 3,
        dry_egress: 4,
        flags: u32::from(input.u8())
            & (POLICY_INGRESS | POLICY_EGRESS | POLICY_DRY_INGRESS | POLICY_DRY_EGRESS),
        pad: 0,
    };
    Edge { pod, ifindex: u32::from(input.u8() % 3), way: input.pick(&[TRACK_OUT, TRACK_IN]) }
}

/// Packets at pods' edges, one after the other.
pub(crate) fn verdict(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut tables = Memory::default();
    for _ in 0..input.below(8) {
        let rule = (
            u64::from(input.u8() % 5),
            u64::from(input.u8() % 8),
            input.pick(&[TCP, UDP]),
            u16::from(input.u8() % 4),
        );
        tables.rules.push(rule);
    }
    for _ in 0..32 {
        if input.is_empty() {
            break;
        }
        let (packet, edge) = (packet(&mut input), edge(&mut input));
        let peer = if input.u8().is_multiple_of(8) {
            Peer::Exempt
        } else {
            Peer::At(if edge.way == TRACK_OUT { packet.destination } else { packet.source })
        };
        tables.now = tables.now.wrapping_add(u32::from(input.u8()));
        one(&tables, &edge, &packet, &peer);
    }
}

fn one(tables: &Memory, edge: &Edge, packet: &Packet, peer: &Peer) {
    let own = if edge.way == TRACK_OUT { POLICY_EGRESS } else { POLICY_INGRESS };
    let without_trial = Edge {
        pod: PolicyPod { flags: edge.pod.flags & (POLICY_INGRESS | POLICY_EGRESS), ..edge.pod },
        ..*edge
    };
    let (before, other) = (tables.clone(), tables.clone());
    let passes = check(tables, edge, packet, peer);
    assert_eq!(check(&other, &without_trial, packet, peer), passes, "a trial changes nothing");
    assert_eq!(*other.flows.borrow(), *tables.flows.borrow());
    if edge.pod.flags & own == 0 || *peer == Peer::Exempt {
        assert!(passes, "nothing is asked of it");
    }
    if !passes {
        assert_eq!(*before.flows.borrow(), *tables.flows.borrow(), "what is dropped leaves no trace");
        return;
    }
    if packet.fragments {
        assert!(check_fragment(tables, edge, packet), "the rest of a packet follows its first fragment");
    }
    let answer = Packet {
        source: packet.destination,
        destination: packet.source,
        source_port: packet.destination_port,
        destination_port: packet.source_port,
        tcp_flags: 0x10,
        begins: false,
        error: false,
        fragments: false,
        ..*packet
    };
    let back = Edge { way: if edge.way == TRACK_OUT { TRACK_IN } else { TRACK_OUT }, ..*edge };
    // An error opens no way, and what is an answer itself is answered only while its flow lasts.
    let is_known = tables.flows.borrow().keys().any(|key| {
        (key.source, key.source_port, key.way) == (packet.source, packet.source_port, edge.way)
            && (key.destination, key.protocol) == (packet.destination, packet.protocol)
            && (key.destination_port, key.ifindex) == (packet.destination_port, edge.ifindex)
    });
    if is_known && !packet.error {
        let closed = Edge { pod: PolicyPod { ingress: 99, egress: 99, flags: 3, ..back.pod }, ..back };
        let fresh = tables.flows.borrow().values().any(|value| value.last_seen == tables.now);
        if fresh && packet.begins {
            assert!(check(tables, &closed, &answer, &Peer::At(packet.source)), "its answer passes");
        }
    }
    let mut late = tables.clone();
    late.now = tables.now.wrapping_add(LONG_SECONDS + 1);
    let nobody = Edge { pod: PolicyPod { ingress: 99, egress: 99, flags: 3, ..back.pod }, ..back };
    if packet.source != packet.destination {
        assert!(!check(&late, &nobody, &answer, &Peer::At(answer.source)), "no way stays open for ever");
    }
}

fn name(name: &str) -> Name {
    Name { namespace: "default".to_owned(), name: name.to_owned() }
}

fn pod(number: u8) -> Option<Pod> {
    let labels: BTreeMap<_, _> =
        [("app".to_owned(), if number == 1 { "web" } else { "db" }.to_owned())].into();
    let object = json!({"metadata": {"namespace": "default", "name": "p", "uid": "u", "labels": labels},
        "spec": {"nodeName": "here", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 80}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": format!("10.42.0.{number}")}]}});
    Pod::new(&serde_json::from_value(object).ok()?, "here")
}

/// A NetworkPolicy as it comes, entered beside others and removed again; and what its ranges and ports become.
pub(crate) fn objects(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Some(range) = object::range(text.trim())
    {
        assert!(range.prefix_bits <= 128);
    }
    let (first, last) = (input.u16(), input.u16());
    let covered: Vec<_> = prefixes(first, last);
    assert!(covered.len() <= 30);
    let count: u32 = covered.iter().map(|(_, bits)| 1 << (16 - bits)).sum();
    assert_eq!(count, (u32::from(last) + 1).saturating_sub(u32::from(first)), "{first} to {last}");
    let Ok(mut object) = serde_json::from_slice::<NetworkPolicy>(bytes) else { return };
    object.metadata.namespace = Some("default".to_owned());
    let Some(policy) = Policy::new(&object) else { return };
    let (mut planner, mut maps) = (Planner::new(), MemoryMaps::<PolicyTable>::default());
    planner.apply_namespace("default", &BTreeMap::new());
    planner.set_devices((1..3).map(|n| (Address::v4([10, 42, 0, n]), 100 + u32::from(n))).collect());
    for number in 1..3 {
        planner.apply_pod(&name(&number.to_string()), pod(number));
    }
    planner.apply_policy(&name("one"), policy.clone());
    planner.sync(&mut maps).expect("maps in memory have room");
    planner.apply_policy(&name("one"), policy);
    assert!(planner.sync(&mut maps).is_ok() && !planner.is_dirty());
    planner.delete_policy(&name("one"));
    for number in 1..3 {
        planner.delete_pod(&name(&number.to_string()));
    }
    planner.set_devices(HashMap::new());
    planner.sync(&mut maps).expect("maps in memory have room");
    assert!(maps.tables.values().all(BTreeMap::is_empty), "left behind: {:?}", maps.tables);
}
