//! Services that are large, contested, or do not fit.

use serde_json::{Value, json};

use super::{apply, delete, service, settle, slice, tables};
use crate::desired::Health;
use crate::maps::memory::MemoryMaps;
use crate::maps::{MapSet, Table};
use crate::plan::Totals;
use crate::reconcile::Reconciler;

fn reconciler() -> Reconciler<MemoryMaps> {
    Reconciler::adopt(tables(), MemoryMaps::default()).unwrap()
}

/// A Service with a cluster address alone.
fn plain(name: &str, ip: &str) -> Value {
    let mut object = service(name, ip);
    object["spec"]["type"] = "ClusterIP".into();
    object["spec"]["ports"][0]["nodePort"] = Value::Null;
    object
}

#[test]
fn thousands_of_endpoints_come_in_many_slices() {
    let mut reconciler = reconciler();
    apply(&mut reconciler, &service("web", "10.43.0.1"));
    for i in 0..5_u16 {
        let mut part = slice("web", i * 500..(i + 1) * 500);
        part["metadata"]["name"] = format!("web-{i}").into();
        apply(&mut reconciler, &part);
    }
    settle(&mut reconciler);
    let counts: Vec<_> = reconciler.ledger().services.values().map(|v| v.count).collect();
    // NodePort inside and outside, the address itself, its port.
    assert_eq!(counts, [2_500, 16_381, 0, 2_500]);
    assert_eq!(reconciler.ledger().backends.len(), 2_500);
    // An endpoint that moves from one slice to another is there all the time.
    reconciler.maps.changes = 0;
    let mut both = slice("web", 2_000..2_500);
    both["metadata"]["name"] = "web-new".into();
    apply(&mut reconciler, &both);
    settle(&mut reconciler);
    assert_eq!(reconciler.maps.changes, 0);
}

#[test]
fn one_backend_less_moves_few_places_of_a_table() {
    let mut reconciler = reconciler();
    apply(&mut reconciler, &service("web", "10.43.0.1"));
    apply(&mut reconciler, &slice("web", 0..100));
    settle(&mut reconciler);
    reconciler.maps.changes = 0;
    apply(&mut reconciler, &slice("web", 0..99));
    settle(&mut reconciler);
    // 11 places of the one that went, those that it pushed aside, and a handful of other entries.
    assert!(reconciler.maps.changes < 1_021 / 8, "{} entries changed", reconciler.maps.changes);
}

#[test]
fn a_new_agent_decides_a_contest_alike() {
    let objects = || {
        let at = |name: &str, ip: &str, made: &str| {
            let mut object = plain(name, ip);
            object["metadata"]["creationTimestamp"] = made.into();
            object["spec"]["externalIPs"] = json!(["203.0.113.7"]);
            object
        };
        [at("a", "10.43.0.1", "2026-02-01T00:00:00Z"), at("b", "10.43.0.2", "2026-01-01T00:00:00Z")]
    };
    let mut first = reconciler();
    for object in &objects() {
        apply(&mut first, object);
        settle(&mut first);
    }
    let before = first.ledger();
    let mut second = Reconciler::adopt(tables(), first.maps).unwrap();
    second.maps.changes = 0;
    for object in &objects() {
        apply(&mut second, object);
    }
    settle(&mut second);
    assert_eq!((second.maps.changes, second.ledger()), (0, before));
}

#[test]
fn a_service_that_does_not_fit_is_named_and_keeps_no_other_out() {
    let mut reconciler = reconciler();
    apply(&mut reconciler, &plain("good", "10.43.0.1"));
    apply(&mut reconciler, &slice("good", 0..2));
    settle(&mut reconciler);
    reconciler.maps.capacity.insert(Table::Slots, 10);
    for i in 0..50 {
        let name = format!("big{i}");
        apply(&mut reconciler, &plain(&name, &format!("10.43.1.{i}")));
        apply(&mut reconciler, &slice(&name, 0..20));
    }
    let report = reconciler.sync();
    assert!(report.failed > 0 && reconciler.is_dirty());
    assert_eq!(reconciler.unprogrammed().len(), 50);
    let (name, state) = reconciler.unprogrammed().first_key_value().unwrap();
    assert_eq!(name.to_string(), "default/big0");
    assert!(state.failures == 1 && state.reason.contains("weft_slot"), "{state:?}");
    assert_eq!(reconciler.entries(Table::Slots), 10);
    assert_eq!(reconciler.maps.dump(Table::Slots).unwrap().len(), 10);

    // Another that fits, and a change of the first: neither waits for those that fail.
    apply(&mut reconciler, &plain("small", "10.43.0.2"));
    apply(&mut reconciler, &slice("good", 1..2));
    reconciler.sync();
    assert_eq!(reconciler.unprogrammed().len(), 50);
    let text = reconciler.render().unwrap();
    assert!(text.contains("10.43.0.2:80/TCP") && text.contains("10.43.0.1:80/TCP list 1 of 1"), "{text}");

    // There is room again.
    for i in 1..50 {
        delete(&mut reconciler, &plain(&format!("big{i}"), &format!("10.43.1.{i}")));
    }
    reconciler.maps.capacity.insert(Table::Slots, 21);
    settle(&mut reconciler);
    assert!(reconciler.unprogrammed().is_empty());
    assert!(reconciler.render().unwrap().contains("10.43.1.0:80/TCP list 3 of 20"));
}

fn told(reconciler: &mut Reconciler<MemoryMaps>) -> Vec<Option<Health>> {
    reconciler.take_health_changes().into_iter().map(|(_, health)| health).collect()
}

#[test]
fn what_load_balancers_are_told_follows_the_endpoints() {
    let mut reconciler = reconciler();
    let mut front = service("front", "10.43.0.1");
    front["spec"]["type"] = "LoadBalancer".into();
    front["spec"]["externalTrafficPolicy"] = "Local".into();
    front["spec"]["healthCheckNodePort"] = 32_000.into();
    let mut endpoints = slice("front", 0..3);
    for (i, node) in ["node-a", "node-a", "node-b"].into_iter().enumerate() {
        endpoints["endpoints"][i]["nodeName"] = node.into();
    }
    apply(&mut reconciler, &front);
    apply(&mut reconciler, &endpoints);
    settle(&mut reconciler);
    assert_eq!(told(&mut reconciler), [Some(Health { port: 32_000, local_endpoints: 2 })]);
    assert_eq!(told(&mut reconciler), []);
    endpoints["endpoints"][0]["conditions"]["ready"] = false.into();
    endpoints["endpoints"][1]["nodeName"] = "node-b".into();
    apply(&mut reconciler, &endpoints);
    settle(&mut reconciler);
    assert_eq!(told(&mut reconciler), [Some(Health { port: 32_000, local_endpoints: 0 })]);
    assert_eq!(reconciler.totals(), Totals { services: 1, no_local_external: 1, ..Totals::default() });
    front["spec"]["externalTrafficPolicy"] = "Cluster".into();
    apply(&mut reconciler, &front);
    settle(&mut reconciler);
    assert_eq!(told(&mut reconciler), [None]);
    assert_eq!(reconciler.totals(), Totals { services: 1, ..Totals::default() });
    delete(&mut reconciler, &front);
    settle(&mut reconciler);
    assert_eq!(reconciler.totals(), Totals::default());
}
