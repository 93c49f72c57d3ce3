//! The planner against the API's own words: a naive evaluator decides each packet from the objects, the maps decide it as the
//! kernel would.

mod naive;
mod random;
mod world;

use serde_json::json;
use weft_ebpf_abi::{SCTP, TCP, UDP};

use super::maps::PolicyTable;
use super::rules::prefixes;
use world::World;

/// Pods a, b and c in each of namespaces x, y and z, as upstream's tests have them.
fn cluster() -> World {
    let mut world = World::new();
    for namespace in ["x", "y", "z"] {
        world.namespace(namespace, &json!({"ns": namespace, "kubernetes.io/metadata.name": namespace}));
        for pod in ["a", "b", "c"] {
            world.pod(namespace, pod, &json!({"pod": pod}));
        }
    }
    world
}

#[test]
fn default_deny_isolates_one_way_only() {
    let mut world = cluster();
    world.policy("x", "deny-in", &json!({"podSelector": {}, "policyTypes": ["Ingress"]}));
    world.check();
    assert!(!world.allowed("y/a", "x/a", TCP, 80));
    assert!(!world.allowed("x/b", "x/a", TCP, 80));
    assert!(world.allowed("x/a", "y/a", UDP, 81));
    world.policy(
        "x",
        "deny-out",
        &json!({"podSelector": {"matchLabels": {"pod": "a"}}, "policyTypes": ["Egress"]}),
    );
    world.check();
    assert!(!world.allowed("x/a", "y/a", UDP, 81));
    assert!(world.allowed("x/b", "y/a", UDP, 81));
    world.delete_policy("x", "deny-in");
    world.delete_policy("x", "deny-out");
    world.check();
    assert!(world.is_empty(), "{:?}", world.maps.inner.tables);
}

#[test]
fn every_kind_of_rule() {
    let b_of_y = json!({"namespaceSelector": {"matchLabels": {"ns": "y"}}, "podSelector": {"matchLabels": {"pod": "b"}}});
    let specs = [
        json!({"podSelector": {}, "ingress": [{}]}),
        json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "b"}}}]}]}),
        json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}),
        json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]}),
        json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchExpressions": [{"key": "ns", "operator": "NotIn", "values": ["x"]}]}}]}]}),
        json!({"podSelector": {}, "ingress": [{"from": [b_of_y]}]}),
        json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"ns": "y"}}}, {"podSelector": {"matchLabels": {"pod": "b"}}}]}]}),
        json!({"podSelector": {"matchLabels": {"pod": "a"}}, "ingress": [{"ports": [{"port": 80}]}]}),
        json!({"podSelector": {}, "ingress": [{"ports": [{"port": 80, "endPort": 81, "protocol": "UDP"}], "from": [{"podSelector": {}}]}]}),
        json!({"podSelector": {}, "ingress": [{"ports": [{"port": "serve-81-tcp"}]}]}),
        json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"ports": [{"port": "serve-80-udp", "protocol": "UDP"}]}]}),
        json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"ports": [{"port": "serve-80-tcp"}], "to": [b_of_y]}]}),
        json!({"podSelector": {}, "egress": [{"ports": [{"protocol": "SCTP"}]}], "policyTypes": ["Egress"]}),
        json!({"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "10.42.0.0/16", "except": ["10.42.0.0/30"]}}]}]}),
        json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.42.0.0/30", "except": ["10.42.0.2/32"]}}, {"ipBlock": {"cidr": "10.42.0.2/32"}}]}]}),
        json!({"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "fd00::/16", "except": ["fd00::4/126"]}}]}]}),
        json!({"podSelector": {}, "ingress": [], "egress": [{"to": []}]}),
        json!({"podSelector": {"matchExpressions": [{"key": "pod", "operator": "DoesNotExist"}]}, "ingress": []}),
    ];
    for spec in &specs {
        let mut world = cluster();
        world.policy("x", "one", spec);
        world.check();
        world.policy("x", "two", &specs[1]);
        world.check();
        world.delete_policy("x", "one");
        world.delete_policy("x", "two");
        world.check();
        assert!(world.is_empty(), "{spec}: {:?}", world.maps.inner.tables);
    }
}

#[test]
fn named_ports_are_each_destinations_own() {
    let mut world = cluster();
    world.pod_with("y", "a", &json!({"pod": "a"}), &[("web", 8080)]);
    world.pod_with("y", "b", &json!({"pod": "b"}), &[("web", 9090)]);
    world.policy(
        "x",
        "web",
        &json!({"podSelector": {}, "egress": [{"ports": [{"port": "web"}]}], "policyTypes": ["Egress"]}),
    );
    world.check();
    assert!(world.allowed("x/a", "y/a", TCP, 8080) && !world.allowed("x/a", "y/a", TCP, 9090));
    assert!(world.allowed("x/a", "y/b", TCP, 9090) && !world.allowed("x/a", "y/b", TCP, 8080));
    assert!(!world.allowed("x/a", "y/c", TCP, 8080));
}

#[test]
fn a_change_costs_what_it_touches() {
    let mut world = cluster();
    for n in 0..50 {
        let name = format!("p{n}");
        world.policy("y", &name, &json!({"podSelector": {"matchLabels": {"pod": "b"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"client": name}}}], "ports": [{"port": 80}]}]}));
    }
    world.check();
    assert_eq!(world.count(PolicyTable::Rules), 0, "nobody is selected yet, and the pod's set is empty");
    let before = world.maps.inner.changes;
    world.pod("z", "c", &json!({"pod": "c", "client": "p7"}));
    world.check();
    assert_eq!(world.maps.inner.changes - before, 0, "z is no namespace that the policies name");
    world.pod("y", "c", &json!({"pod": "c", "client": "p7"}));
    world.check();
    assert_eq!(world.maps.inner.changes - before, 3, "one rule, and the identity of two addresses");
    assert!(world.allowed("y/c", "y/b", TCP, 80) && !world.allowed("y/c", "y/b", TCP, 81));
    let before = world.maps.inner.changes;
    world.policy(
        "x",
        "unrelated",
        &json!({"podSelector": {"matchLabels": {"pod": "nobody"}}, "ingress": []}),
    );
    world.check();
    assert_eq!(world.maps.inner.changes, before, "a policy that selects no pod of the node costs nothing");
}

#[test]
fn a_new_planner_adopts_what_it_finds() {
    let mut world = cluster();
    world.policy("x", "in", &json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}));
    world.check();
    let before = world.maps.inner.changes;
    world.restart();
    world.check();
    assert_eq!(world.maps.inner.changes, before, "numbers are the same, so nothing is written");
    world.restart_without("x", "in");
    world.check();
    assert!(world.is_empty());
}

#[test]
fn addresses_are_released_and_granted() {
    let mut world = cluster();
    world.policy(
        "x",
        "in",
        &json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "b"}}}]}]}),
    );
    world.check();
    assert!(world.allowed("x/b", "x/a", TCP, 80));
    // c comes to the address of b, which has ended but is still there.
    let address = world.address_of("x/b");
    world.move_pod("x", "c", address);
    assert!(!world.allowed("x/c", "x/a", TCP, 80));
    world.delete_pod("x", "b");
    assert!(!world.allowed("x/c", "x/a", TCP, 80), "the old owner's end takes nothing from the new one");
    world.delete_pod("x", "c");
    world.delete_pod("x", "a");
    world.sync();
    assert!(world.count(PolicyTable::Pods) == 0, "their devices went with them");
}

#[test]
fn a_pod_that_is_being_killed_stays_isolated() {
    let mut world = cluster();
    world.policy("x", "out", &json!({"podSelector": {}, "policyTypes": ["Egress"]}));
    world.sync();
    let device = world.device_of("x/a");
    world.forget_pod("x", "a");
    world.sync();
    assert!(world.is_isolated(device));
    world.delete_policy("x", "out");
    world.sync();
    assert!(world.is_isolated(device), "nobody selects it any more, but nobody frees it either");
    world.remove_device(device);
    world.sync();
    assert!(world.is_empty());
}

#[test]
fn ranges_of_ports_are_few_prefixes() {
    for (first, last) in
        [(0, 65_535), (1, 65_535), (80, 80), (80, 81), (1_024, 2_047), (32_768, 65_535), (1, 65_534), (9, 6)]
    {
        let all = prefixes(first, last);
        assert!(all.len() <= 30, "{first}-{last}: {all:?}");
        for port in 0..=u16::MAX {
            let covered = all.iter().filter(|(at, bits)| {
                let mask = u16::MAX.checked_shl(16 - bits).unwrap_or(0);
                port & mask == *at
            });
            assert_eq!(
                covered.count(),
                usize::from((first..=last).contains(&port)),
                "{first}-{last}: {port}"
            );
        }
    }
}

#[test]
fn protocols_are_kept_apart() {
    let mut world = cluster();
    world.policy("x", "udp", &json!({"podSelector": {}, "ingress": [{"ports": [{"protocol": "UDP"}, {"protocol": "SCTP", "port": 80}]}]}));
    world.check();
    assert!(world.allowed("y/a", "x/a", UDP, 5) && !world.allowed("y/a", "x/a", TCP, 5));
    assert!(world.allowed("y/a", "x/a", SCTP, 80) && !world.allowed("y/a", "x/a", SCTP, 81));
    assert!(!world.allowed("y/a", "x/a", 1, 0), "a rule about ports is none about ICMP");
}

#[test]
fn a_policy_on_trial_counts_and_drops_nothing() {
    let mut world = cluster();
    world.try_policy("x", "trial", &json!({"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]}));
    world.check();
    assert_eq!(world.would_drop("y/a", "x/a", TCP, 81), ["x/trial"]);
    assert_eq!(world.would_drop("y/a", "x/a", TCP, 80), [""; 0]);
    assert_eq!(world.would_drop("x/a", "y/a", TCP, 81), [""; 0], "it is not about that way");
    // One in force allows what the one on trial does not; together they would.
    world.policy("x", "real", &json!({"podSelector": {}, "ingress": [{"ports": [{"port": 81}]}]}));
    world.check();
    assert_eq!(world.would_drop("y/a", "x/a", TCP, 81), [""; 0]);
    world.delete_policy("x", "real");
    world.delete_policy("x", "trial");
    world.check();
    assert!(world.is_empty());
}
