//! Random objects and changes of them, with maps that fail now and then.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::world::World;

#[derive(Clone, Debug)]
enum Change {
    Policy(&'static str, u8, Value),
    NoPolicy(&'static str, u8),
    Pod(&'static str, &'static str, Value),
    NoPod(&'static str, &'static str),
    Namespace(&'static str, Value),
    Restart,
}

fn namespace() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["x", "y", "z"])
}

fn labels() -> impl Strategy<Value = Value> {
    let values = prop::sample::select(vec!["1", "2"]);
    (prop::option::of(values.clone()), prop::option::of(values)).prop_map(|(a, b)| {
        let mut labels = json!({});
        for (key, value) in [("a", a), ("b", b)] {
            if let Some(value) = value {
                labels[key] = json!(value);
            }
        }
        labels
    })
}

fn selector() -> impl Strategy<Value = Value> {
    let operator = prop::sample::select(vec!["In", "NotIn", "Exists", "DoesNotExist"]);
    let expression = (operator, prop::sample::select(vec!["a", "b"])).prop_map(|(operator, key)| {
        let values = if operator.ends_with("In") { json!(["1"]) } else { json!([]) };
        json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]})
    });
    prop_oneof![Just(json!({})), labels().prop_map(|labels| json!({"matchLabels": labels})), expression]
}

fn peer() -> impl Strategy<Value = Value> {
    let block = prop::sample::select(vec![
        json!({"cidr": "10.42.0.0/16"}),
        json!({"cidr": "10.42.0.0/29", "except": ["10.42.0.4/31", "10.42.0.1/32"]}),
        json!({"cidr": "10.42.0.4/30"}),
        json!({"cidr": "fd00::/64", "except": ["fd00::4/126"]}),
        json!({"cidr": "0.0.0.0/0", "except": ["10.42.0.0/30"]}),
        json!({"cidr": "::/0"}),
    ]);
    prop_oneof![
        selector().prop_map(|pods| json!({"podSelector": pods})),
        selector().prop_map(|namespaces| json!({"namespaceSelector": namespaces})),
        (selector(), selector()).prop_map(|(n, p)| json!({"namespaceSelector": n, "podSelector": p})),
        block.prop_map(|block| json!({"ipBlock": block})),
    ]
}

fn port() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!({"port": 80}),
        json!({"port": 81, "protocol": "UDP"}),
        json!({"port": 1, "endPort": 80}),
        json!({"port": 79, "endPort": 81, "protocol": "UDP"}),
        json!({"protocol": "SCTP"}),
        json!({"port": "serve-80-tcp"}),
        json!({"port": "serve-81-udp", "protocol": "UDP"}),
        json!({"port": "nobody"}),
    ])
}

fn rules(peers: &'static str) -> impl Strategy<Value = Value> {
    let rule = (prop::collection::vec(peer(), 0..3), prop::collection::vec(port(), 0..3));
    let rule = rule.prop_map(move |(from, ports)| json!({peers: from, "ports": ports}));
    prop::collection::vec(rule, 0..3).prop_map(Value::from)
}

fn policy() -> impl Strategy<Value = Value> {
    let types = prop::sample::select(vec![
        json!([]),
        json!(["Ingress"]),
        json!(["Egress"]),
        json!(["Ingress", "Egress"]),
    ]);
    (selector(), types, rules("from"), rules("to")).prop_map(|(pods, types, ingress, egress)| {
        json!({"podSelector": pods, "policyTypes": types, "ingress": ingress, "egress": egress})
    })
}

fn change() -> impl Strategy<Value = Change> {
    let pod = || prop::sample::select(vec!["a", "b", "c"]);
    prop_oneof![
        4 => (namespace(), 0..3_u8, policy()).prop_map(|(ns, n, spec)| Change::Policy(ns, n, spec)),
        2 => (namespace(), 0..3_u8).prop_map(|(ns, n)| Change::NoPolicy(ns, n)),
        3 => (namespace(), pod(), labels()).prop_map(|(ns, pod, labels)| Change::Pod(ns, pod, labels)),
        1 => (namespace(), pod()).prop_map(|(ns, pod)| Change::NoPod(ns, pod)),
        2 => (namespace(), labels()).prop_map(|(ns, labels)| Change::Namespace(ns, labels)),
        1 => Just(Change::Restart),
    ]
}

fn apply(world: &mut World, change: &Change) {
    match change {
        Change::Policy(ns, n, spec) => world.policy(ns, &n.to_string(), spec),
        Change::NoPolicy(ns, n) => world.delete_policy(ns, &n.to_string()),
        Change::Pod(ns, pod, labels) => world.pod(ns, pod, labels),
        Change::NoPod(ns, pod) => world.delete_pod(ns, pod),
        Change::Namespace(ns, labels) => world.namespace(ns, labels),
        Change::Restart => world.restart(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_maps_decide_as_the_objects_say(changes in prop::collection::vec(change(), 1..25), seed in any::<u64>()) {
        let mut world = World::failing(seed, 10);
        for change in &changes {
            apply(&mut world, change);
            world.check();
        }
        for namespace in ["x", "y", "z"] {
            (0..3).for_each(|n| world.delete_policy(namespace, &n.to_string()));
        }
        world.check();
        prop_assert!(world.is_empty(), "{:?}", world.maps.inner.tables);
    }
}
