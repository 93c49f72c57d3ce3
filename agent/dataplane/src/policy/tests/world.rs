//! A cluster in a test: objects on one side, planner and maps on the other, and a kernel that decides by the maps.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use serde_json::{Value, json};
use weft_ebpf_abi::policy::{
    PolicyPod, RangeKey, RuleData, RuleKey, TRACK_IN, TRACK_OUT, TrackKey, TrackValue,
};
use weft_ebpf_abi::{Address, Port, SCTP, TCP, UDP};
use weft_ebpf_logic::policy::{Edge, Packet, Peer, PolicyTables, check};
use zerocopy::{FromBytes, IntoBytes};

use super::super::maps::PolicyTable;
use super::super::objects::{Name, Pod, Policy};
use super::super::planner::Planner;
use super::naive::{self, End};
use crate::maps::faulty::FaultyMaps;
use crate::maps::memory::MemoryMaps;

/// Maps in memory, of whose changes a share may fail.
type Maps = FaultyMaps<MemoryMaps<PolicyTable>>;

#[derive(Clone)]
struct TestPod {
    labels: Value,
    addresses: [IpAddr; 2],
    ports: Vec<(u8, String, u16)>,
    device: u32,
}

pub(super) struct World {
    namespaces: BTreeMap<String, Value>,
    pods: BTreeMap<String, TestPod>,
    policies: BTreeMap<(String, String), Value>,
    planner: Planner,
    pub(super) maps: Maps,
    devices: HashMap<Address, u32>,
    count: u8,
    /// Sets on trial that a packet met, and that do not cover it.
    would: RefCell<Vec<u64>>,
}

fn name(namespace: &str, name: &str) -> Name {
    Name { namespace: namespace.to_owned(), name: name.to_owned() }
}

impl World {
    pub(super) fn new() -> Self {
        Self::failing(0, 0)
    }

    /// Entries of a map.
    pub(super) fn count(&self, table: PolicyTable) -> usize {
        self.maps.inner.tables.get(&table).map_or(0, BTreeMap::len)
    }

    /// A share of all changes of the maps fails; the same seed fails the same ones.
    pub(super) fn failing(seed: u64, percent: u64) -> Self {
        Self {
            namespaces: BTreeMap::new(),
            pods: BTreeMap::new(),
            policies: BTreeMap::new(),
            planner: Planner::new(),
            maps: FaultyMaps::new(MemoryMaps::default(), seed, percent),
            devices: HashMap::new(),
            count: 0,
            would: RefCell::default(),
        }
    }

    pub(super) fn namespace(&mut self, name: &str, labels: &Value) {
        self.namespaces.insert(name.to_owned(), labels.clone());
        self.planner.apply_namespace(name, &serde_json::from_value(labels.clone()).unwrap());
    }

    /// Enters a pod, or changes its labels. It serves ports 80 and 81 by TCP, UDP and SCTP, and has names for them.
    pub(super) fn pod(&mut self, namespace: &str, pod: &str, labels: &Value) {
        self.pod_with(namespace, pod, labels, &[]);
    }

    pub(super) fn pod_with(&mut self, namespace: &str, pod: &str, labels: &Value, ports: &[(&str, u16)]) {
        let key = format!("{namespace}/{pod}");
        let known = self.pods.get(&key).map(|p| (p.addresses, p.device));
        let (addresses, device) = known.unwrap_or_else(|| {
            self.count += 1;
            let n = self.count;
            (
                [IpAddr::from([10, 42, 0, n]), IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n.into()])],
                100 + u32::from(n),
            )
        });
        let mut named: Vec<_> =
            ports.iter().map(|(name, number)| (TCP, (*name).to_owned(), *number)).collect();
        for (protocol, text) in [(TCP, "tcp"), (UDP, "udp"), (SCTP, "sctp")] {
            named.extend([80, 81].map(|number| (protocol, format!("serve-{number}-{text}"), number)));
        }
        self.pods.insert(key.clone(), TestPod { labels: labels.clone(), addresses, ports: named, device });
        self.enter(&key);
    }

    fn enter(&mut self, key: &str) {
        let pod = &self.pods[key];
        let (namespace, short) = key.split_once('/').unwrap();
        for address in pod.addresses {
            self.devices.insert(address.into(), pod.device);
        }
        let text = |p: u8| {
            if p == TCP {
                "TCP"
            } else if p == UDP {
                "UDP"
            } else {
                "SCTP"
            }
        };
        let ports: Vec<_> = pod
            .ports
            .iter()
            .map(|(p, name, number)| json!({"name": name, "protocol": text(*p), "containerPort": number}))
            .collect();
        let ips: Vec<_> = pod.addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let object = json!({"metadata": {"namespace": namespace, "name": short, "uid": key, "labels": pod.labels},
            "spec": {"nodeName": "here", "containers": [{"name": "c", "ports": ports}]}, "status": {"podIPs": ips, "phase": "Running"}});
        let object = Pod::new(&serde_json::from_value(object).unwrap(), "here");
        self.planner.apply_pod(&name(namespace, short), object);
        self.planner.set_devices(self.devices.clone());
    }

    pub(super) fn move_pod(&mut self, namespace: &str, pod: &str, to: [IpAddr; 2]) {
        let key = format!("{namespace}/{pod}");
        self.pods.get_mut(&key).unwrap().addresses = to;
        self.enter(&key);
        self.sync();
    }

    pub(super) fn delete_pod(&mut self, namespace: &str, pod: &str) {
        let gone = self.pods.remove(&format!("{namespace}/{pod}"));
        self.planner.delete_pod(&name(namespace, pod));
        if let Some(gone) = gone {
            self.remove_device(gone.device);
        }
    }

    /// Its object goes, its device stays.
    pub(super) fn forget_pod(&mut self, namespace: &str, pod: &str) {
        self.pods.remove(&format!("{namespace}/{pod}"));
        self.planner.delete_pod(&name(namespace, pod));
    }

    pub(super) fn remove_device(&mut self, device: u32) {
        self.devices.retain(|_, d| *d != device);
        self.planner.set_devices(self.devices.clone());
    }

    pub(super) fn policy(&mut self, namespace: &str, policy: &str, spec: &Value) {
        self.policies.insert((namespace.to_owned(), policy.to_owned()), spec.clone());
        let object = json!({"metadata": {"namespace": namespace, "name": policy}, "spec": spec});
        let object = Policy::new(&serde_json::from_value(object).unwrap()).unwrap();
        self.planner.apply_policy(&name(namespace, policy), object);
    }

    /// Enters a policy on trial, which the naive evaluator is not told of.
    pub(super) fn try_policy(&mut self, namespace: &str, policy: &str, spec: &Value) {
        let object = json!({"spec": spec, "metadata": {"namespace": namespace, "name": policy,
            "annotations": {"weft.dev/dry-run": "true"}}});
        let object = Policy::new(&serde_json::from_value(object).unwrap()).unwrap();
        self.planner.apply_policy(&name(namespace, policy), object);
    }

    /// The policies on trial that would drop a packet.
    pub(super) fn would_drop(&self, from: &str, to: &str, protocol: u8, port: u16) -> Vec<String> {
        self.would.borrow_mut().clear();
        self.allowed_in(from, to, protocol, port, 0);
        let trials = self.planner.trials();
        let sets = self.would.borrow();
        let named = sets.iter().flat_map(|set| trials[set].policies.iter());
        named.map(|name| format!("{name:?}")).collect()
    }

    pub(super) fn delete_policy(&mut self, namespace: &str, policy: &str) {
        self.policies.remove(&(namespace.to_owned(), policy.to_owned()));
        self.planner.delete_policy(&name(namespace, policy));
    }

    pub(super) fn sync(&mut self) {
        // What fails is tried again, as the agent does.
        for _ in 0..10_000 {
            if self.planner.sync(&mut self.maps).is_ok() {
                assert!(!self.planner.is_dirty());
                return;
            }
        }
        panic!("it never gets done");
    }

    /// Another agent, which finds the maps.
    pub(super) fn restart(&mut self) {
        self.planner = Planner::new();
        self.planner.adopt(&mut self.maps).unwrap();
        for (namespace, labels) in self.namespaces.clone() {
            self.namespace(&namespace, &labels);
        }
        for ((namespace, policy), spec) in self.policies.clone() {
            self.policy(&namespace, &policy, &spec);
        }
        for key in self.pods.keys().cloned().collect::<Vec<_>>() {
            self.enter(&key);
        }
    }

    /// Likewise, after a policy went while nobody looked.
    pub(super) fn restart_without(&mut self, namespace: &str, policy: &str) {
        self.policies.remove(&(namespace.to_owned(), policy.to_owned()));
        self.restart();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.maps.inner.tables.values().all(BTreeMap::is_empty)
    }

    pub(super) fn address_of(&self, pod: &str) -> [IpAddr; 2] {
        self.pods[pod].addresses
    }

    pub(super) fn device_of(&self, pod: &str) -> u32 {
        self.pods[pod].device
    }

    pub(super) fn is_isolated(&self, device: u32) -> bool {
        self.maps.inner.tables.get(&PolicyTable::Pods).is_some_and(|t| t.contains_key(device.as_bytes()))
    }

    /// Whether the kernel would let a packet through both pods' edges, in both families.
    pub(super) fn allowed(&self, from: &str, to: &str, protocol: u8, port: u16) -> bool {
        let answers = [0, 1].map(|family| self.allowed_in(from, to, protocol, port, family));
        assert_eq!(answers[0], answers[1], "families differ: {from} to {to}");
        answers[0]
    }

    fn allowed_in(&self, from: &str, to: &str, protocol: u8, port: u16, family: usize) -> bool {
        let (from, to) = (&self.pods[from], &self.pods[to]);
        let kernel = Kernel { maps: &self.maps, tracked: RefCell::default(), would: &self.would };
        let packet = Packet {
            source: from.addresses[family].into(),
            destination: to.addresses[family].into(),
            source_port: Port::new(40_000),
            destination_port: Port::new(port),
            protocol,
            tcp_flags: 2,
            begins: true,
            error: false,
            fragments: false,
            identification: [0; 4],
        };
        let edge = |pod: &TestPod, way| {
            let table = self.maps.inner.tables.get(&PolicyTable::Pods);
            let value = table.and_then(|t| t.get(pod.device.as_bytes()));
            let pod_value = value.map_or_else(PolicyPod::default, |v| PolicyPod::read_from_bytes(v).unwrap());
            Edge { pod: pod_value, ifindex: pod.device, way }
        };
        check(&kernel, &edge(from, TRACK_OUT), &packet, &Peer::At(packet.destination))
            && check(&kernel, &edge(to, TRACK_IN), &packet, &Peer::At(packet.source))
    }

    /// Syncs, and compares every pair on every port with the naive evaluator.
    pub(super) fn check(&mut self) {
        self.sync();
        let policies: Vec<(&str, &Value)> =
            self.policies.iter().map(|((ns, _), spec)| (ns.as_str(), spec)).collect();
        let none = json!({});
        let end = |key: &'_ str, family: usize| {
            let pod = &self.pods[key];
            let namespace = self.pods.get_key_value(key).unwrap().0.split_once('/').unwrap().0;
            End {
                namespace,
                namespace_labels: self.namespaces.get(namespace).unwrap_or(&none),
                labels: &pod.labels,
                ip: pod.addresses[family],
                ports: &pod.ports,
            }
        };
        let ports = [(TCP, 80), (TCP, 81), (UDP, 80), (UDP, 81), (SCTP, 80), (1, 0)];
        for from in self.pods.keys() {
            for to in self.pods.keys() {
                for family in [0, 1] {
                    for (protocol, port) in ports {
                        let wanted =
                            naive::allowed(&policies, &end(from, family), &end(to, family), (protocol, port));
                        let found = self.allowed_in(from, to, protocol, port, family);
                        assert_eq!(
                            found, wanted,
                            "{from} to {to} family {family} protocol {protocol} port {port}: {policies:#?}"
                        );
                    }
                }
            }
        }
    }
}

struct Kernel<'a> {
    maps: &'a Maps,
    tracked: RefCell<HashMap<TrackKey, TrackValue>>,
    would: &'a RefCell<Vec<u64>>,
}

/// Whether the first bits are the same.
fn same(a: &[u8], b: &[u8], count: u32) -> bool {
    (0..count as usize).all(|bit| (a[bit / 8] ^ b[bit / 8]) & (0x80 >> (bit % 8)) == 0)
}

impl PolicyTables for Kernel<'_> {
    fn identity(&self, address: &Address) -> u64 {
        let number = |bytes: &Vec<u8>| u64::read_from_bytes(bytes).unwrap();
        if let Some(value) =
            self.maps.inner.tables.get(&PolicyTable::Identities).and_then(|t| t.get(address.as_bytes()))
        {
            return number(value);
        }
        let ranges = self.maps.inner.tables.get(&PolicyTable::Ranges).into_iter().flatten();
        let ranges = ranges.map(|(key, value)| (RangeKey::read_from_bytes(key).unwrap(), value));
        let around =
            ranges.filter(|(range, _)| same(range.address.as_bytes(), address.as_bytes(), range.prefix_bits));
        around.max_by_key(|(range, _)| range.prefix_bits).map_or(0, |(_, value)| number(value))
    }

    fn allows(&self, set: u64, identity: u64, protocol: u8, port: Port) -> bool {
        let asked =
            RuleData { set: set.to_be_bytes(), identity: identity.to_be_bytes(), protocol, pad: 0, port };
        let mut rules = self.maps.inner.tables.get(&PolicyTable::Rules).into_iter().flat_map(BTreeMap::keys);
        rules.any(|key| {
            let rule = RuleKey::read_from_bytes(key).unwrap();
            same(rule.data.as_bytes(), asked.as_bytes(), rule.prefix_bits)
        })
    }

    fn tracked(&self, key: &TrackKey) -> Option<TrackValue> {
        self.tracked.borrow().get(key).copied()
    }

    fn track(&self, key: &TrackKey, value: &TrackValue) {
        self.tracked.borrow_mut().insert(*key, *value);
    }

    fn would_drop(&self, set: u64) {
        self.would.borrow_mut().push(set);
    }

    fn now(&self) -> u32 {
        7
    }
}
