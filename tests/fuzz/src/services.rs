//! Services: objects become maps, step by step, and whoever looks into the maps meanwhile finds a way that leads somewhere.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};
use weft_agent_dataplane::maps::faulty::FaultyMaps;
use weft_agent_dataplane::maps::memory::MemoryMaps;
use weft_agent_dataplane::maps::{MapSet, Table};
use weft_agent_dataplane::plan::Ledger;
use weft_agent_dataplane::reconcile::{Reconciler, dangling, render};
use weft_agent_dataplane::tables::{ServiceName, Tables, wire};
use weft_ebpf_abi::{
    Address, AffinityKey, AffinityValue, BACKEND_ACTIVE, BackendKey, BackendValue, Port, SCOPE_EXTERNAL,
    SCOPE_INTERNAL, ServiceKey, ServiceValue, SlotKey, TCP,
};
use weft_ebpf_logic::service::{Client, Destination, Found, find, select};

use crate::input::Input;

/// More rounds than it ever takes, even if a fifth of all operations fails.
const MAX_ROUNDS: usize = 2_000;

/// A ledger as programs see it.
struct View<'a> {
    ledger: &'a Ledger,
    affinity: RefCell<BTreeMap<(Address, u32), AffinityValue>>,
    random: u32,
}

impl weft_ebpf_logic::Tables for View<'_> {
    fn service(&self, key: &ServiceKey) -> Option<ServiceValue> {
        self.ledger.services.get(key).copied()
    }
    fn slot(&self, key: &SlotKey) -> Option<BackendKey> {
        self.ledger.lists.get(&key.list)?.get(key.index as usize).copied().flatten()
    }
    fn backend(&self, key: &BackendKey) -> Option<BackendValue> {
        self.ledger.backends.get(key).copied()
    }
    fn is_node_address(&self, address: &Address) -> bool {
        self.ledger.node_addresses.contains(address)
    }
    fn source_allowed(&self, _list: u32, _client: &Address) -> bool {
        true
    }
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.borrow().get(&(key.client, key.list)).copied()
    }
    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        self.affinity.borrow_mut().insert((key.client, key.list), *value);
    }
    fn random(&self) -> u32 {
        self.random
    }
    fn now_seconds(&self) -> u32 {
        7
    }
}

fn tables() -> Tables {
    Tables::new("node-a", vec![Address::v4([10, 43, 0, 99])])
}

fn service(input: &mut Input<'_>, number: usize) -> Value {
    let v4 = format!("10.43.0.{}", input.pick(&[1, 2, 3, 99]));
    let v6 = format!("fd43::{}", number + 1);
    let clusters: &[&[&str]] = &[&[&v4], &[&v6], &[&v4, &v6], &["None"], &[]];
    let cluster = input.pick(clusters);
    let ports: Vec<_> = (0..input.below(4))
        .map(|at| {
            let protocol = input.pick(&["TCP", "UDP", "SCTP"]);
            let port = input.pick(&[80_u16, 81, 443, 0]);
            let node_port = input.pick(&[0_u16, 30080, 30081]);
            json!({"name": format!("p{at}"), "port": port, "nodePort": node_port, "protocol": protocol})
        })
        .collect();
    let externals: &[&[&str]] = &[&[], &["203.0.113.7"], &["203.0.113.7", "2001:db8::7"], &["10.43.0.1"]];
    let balancers: &[&[&str]] = &[&[], &["203.0.113.7"], &["203.0.113.8", "2001:db8::8"]];
    let ranges: &[&[&str]] = &[&[], &["10.0.0.0/8"], &["10.0.0.0/8", "::/0", "0.0.0.0/0"], &["nonsense"]];
    let policies = ["Cluster", "Local"];
    let annotation = input.pick(&["", "8000-8003", "8000-8003/UDP, 80", "1-65535", "0-3", "9-8", "443/TCP"]);
    let ingress: Vec<_> = input.pick(balancers).iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "metadata": {"namespace": "default", "name": format!("s{number}"), "uid": format!("u{number}"),
            "annotations": {"weft.dev/port-ranges": annotation},
            "creationTimestamp": format!("2026-01-0{}T00:00:00Z", 1 + input.below(3))},
        "spec": {"type": input.pick(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]),
            "clusterIP": cluster.first(), "clusterIPs": cluster, "ports": ports,
            "externalIPs": input.pick(externals), "loadBalancerSourceRanges": input.pick(ranges),
            "sessionAffinity": input.pick(&["None", "ClientIP"]), "healthCheckNodePort": input.pick(&[0, 31000]),
            "internalTrafficPolicy": input.pick(&policies), "externalTrafficPolicy": input.pick(&policies)},
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}

fn slice(input: &mut Input<'_>, number: usize) -> Value {
    let v6 = input.u8().is_multiple_of(4);
    let endpoints: Vec<_> = (0..input.below(6))
        .map(|_| {
            let n = input.below(8);
            let address = if v6 { format!("fd42::{n}") } else { format!("10.42.0.{n}") };
            let ready = input.pick(&[true, true, false]);
            let zones = input.pick(&[None, Some("z1"), Some("z2")]);
            let hints = zones.map(|zone| json!({"forZones": [{"name": zone}]}));
            json!({"addresses": [address], "nodeName": input.pick(&["node-a", "node-b"]), "hints": hints,
                "targetRef": {"uid": format!("pod-{}", input.below(10))},
                "conditions": {"ready": ready, "serving": input.flag(), "terminating": input.flag()}})
        })
        .collect();
    let ports: Vec<_> = (0..input.below(4))
        .map(|at| {
            let protocol = input.pick(&["TCP", "UDP", "SCTP"]);
            json!({"name": format!("p{at}"), "port": input.pick(&[8080_u16, 8081, 80]), "protocol": protocol})
        })
        .collect();
    json!({
        "metadata": {"namespace": "default", "name": format!("e{number}"),
            "labels": {"kubernetes.io/service-name": format!("s{}", input.below(3))}},
        "addressType": if v6 { "IPv6" } else { "IPv4" }, "endpoints": endpoints, "ports": ports,
    })
}

fn object<'a, T: serde::Deserialize<'a>>(text: &'a str) -> T {
    serde_json::from_str(text).expect("the objects here are typed right")
}

/// One step.
fn step<M: MapSet>(input: &mut Input<'_>, reconciler: &mut Reconciler<M>) {
    match input.below(8) {
        0 | 1 => {
            let number = input.below(3);
            let text = service(input, number).to_string();
            let changed = reconciler.tables.apply_service(&object::<wire::Service<'_>>(&text));
            reconciler.mark(changed);
        }
        2 | 3 => {
            let number = input.below(4);
            let text = slice(input, number).to_string();
            let changed = reconciler.tables.apply_slice(&object::<wire::Slice<'_>>(&text));
            reconciler.mark(changed);
        }
        4 => {
            let name = ServiceName::new("default", &format!("s{}", input.below(3)));
            let changed = reconciler.tables.delete_service(&name);
            reconciler.mark(changed);
        }
        5 => {
            let changed = reconciler.tables.delete_slice("default", &format!("e{}", input.below(4)));
            reconciler.mark(changed);
        }
        6 => {
            let addresses = [[192, 168, 0, 1], [192, 168, 0, 2]].map(Address::v4);
            let count = input.below(3);
            reconciler.set_node_addresses(addresses.into_iter().take(count).collect());
        }
        _ => {
            let labels = json!({"topology.kubernetes.io/zone": input.pick(&["z1", "z2", ""])});
            let node = json!({"metadata": {"name": "node-a", "labels": labels}}).to_string();
            let changed = reconciler.tables.apply_node(&object::<Node>(&node));
            reconciler.mark(changed);
        }
    }
}

fn settle<M: MapSet>(reconciler: &mut Reconciler<M>) {
    for _ in 0..MAX_ROUNDS {
        if !reconciler.is_dirty() {
            return;
        }
        reconciler.sync();
        assert_eq!(dangling(&reconciler.ledger()), Vec::<String>::new());
    }
    panic!("it never settles: {:?}", reconciler.unprogrammed());
}

/// Whatever address is asked for, from wherever: a Service with backends leads to one of them, and it takes new flows.
fn look_up(ledger: &Ledger, random: u32) {
    let view = View { ledger, affinity: RefCell::default(), random };
    for (key, value) in ledger.services.iter().filter(|(key, _)| key.protocol != 0) {
        let to = Destination {
            address: key.address,
            port: key.port,
            protocol: key.protocol,
            scope: key.scope,
            loopback_is_node: true,
        };
        assert_eq!(find(&view, &to), Found::Service(*value));
        for port in [None, Some(Port::new(40_000))] {
            let client = Client { client: Address::v4([10, 42, 9, 9]), port, datagram_socket: None };
            let chosen = select(&view, value, &client);
            assert_eq!(chosen.is_some(), value.count > 0, "{key:?}");
            let Some(chosen) = chosen else { continue };
            assert_eq!(chosen.protocol, key.protocol);
            let known = ledger.backends.get(&chosen).expect("a list holds only known backends");
            assert!(known.flags & BACKEND_ACTIVE != 0, "{chosen:?} takes no new flows");
            assert_eq!(
                select(&view, value, &client),
                select(&view, value, &client),
                "affinity, or the same number"
            );
        }
    }
    for scope in [SCOPE_INTERNAL, SCOPE_EXTERNAL] {
        let address = Address::from(IpAddr::from([8, 8, 8, 8]));
        let to = Destination { address, port: Port::new(80), protocol: TCP, scope, loopback_is_node: true };
        assert_eq!(find(&view, &to), Found::Nothing);
    }
}

/// Steps made from bytes, some with maps that fail.
pub(crate) fn steps(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let percent = u64::from(input.pick(&[0_u8, 0, 10, 20]));
    let maps = FaultyMaps::new(MemoryMaps::default(), u64::from(input.u16()), percent);
    let mut reconciler = Reconciler::adopt(tables(), maps).expect("memory can be read");
    for _ in 0..24 {
        if input.is_empty() {
            break;
        }
        step(&mut input, &mut reconciler);
        if input.flag() {
            reconciler.sync();
            assert_eq!(dangling(&reconciler.ledger()), Vec::<String>::new());
        }
    }
    settle(&mut reconciler);
    let found = reconciler.render().expect("memory can be read");
    assert_eq!(found, render(&reconciler.ledger()), "belief and maps differ");
    for random in [0, 1 << 31, u32::MAX] {
        look_up(&reconciler.ledger(), random);
    }
    another_agent(reconciler, &found);
}

/// An agent that finds the maps and is told the same changes nothing; when all is gone, the maps are empty.
fn another_agent(mut reconciler: Reconciler<FaultyMaps<MemoryMaps>>, before: &str) {
    let known = std::mem::replace(&mut reconciler.tables, tables());
    let nodes = reconciler.ledger().node_addresses;
    let mut second = Reconciler::adopt(known, reconciler.maps).expect("memory can be read");
    second.mark(second.tables.service_names());
    second.set_node_addresses(nodes);
    second.sources_are_known();
    second.maps.inner.changes = 0;
    settle(&mut second);
    assert_eq!(second.render().ok().as_deref(), Some(before));
    assert_eq!(second.maps.inner.changes, 0, "a new agent changes nothing");
    for name in second.tables.service_names() {
        let changed = second.tables.delete_service(&name);
        second.mark(changed);
    }
    for (namespace, name) in second.tables.slice_names() {
        let changed = second.tables.delete_slice(&namespace, &name);
        second.mark(changed);
    }
    second.set_node_addresses(BTreeSet::new());
    settle(&mut second);
    let left: Vec<_> = Table::ALL.iter().map(|table| second.entries(*table)).collect();
    assert_eq!(left, [0; 5], "{}", second.render().unwrap_or_default());
}

/// A page of a list, or an event.
pub(crate) fn feed(bytes: &[u8]) {
    weft_agent_dataplane::feed::fuzz::answer(bytes);
}

/// Services and slices as they come, a JSON object a line.
pub(crate) fn objects(bytes: &[u8]) {
    let mut reconciler = Reconciler::adopt(tables(), MemoryMaps::default()).expect("memory can be read");
    for line in bytes.split(|byte| *byte == b'\n').take(16) {
        if let Ok(service) = serde_json::from_slice::<wire::Service<'_>>(line) {
            let changed = reconciler.tables.apply_service(&service);
            reconciler.mark(changed);
        }
        if let Ok(slice) = serde_json::from_slice::<wire::Slice<'_>>(line) {
            let changed = reconciler.tables.apply_slice(&slice);
            reconciler.mark(changed);
        }
    }
    settle(&mut reconciler);
    look_up(&reconciler.ledger(), 1 << 30);
}
