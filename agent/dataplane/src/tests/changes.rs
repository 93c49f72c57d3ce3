//! What changes cost, and what a new agent does with the maps it finds.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{apply, service, settle, slice, tables};
use crate::maps::faulty::FaultyMaps;
use crate::maps::memory::MemoryMaps;
use crate::maps::{MapSet, Table};
use crate::reconcile::{Reconciler, dangling};

#[test]
fn the_cost_of_a_change_is_its_size() {
    let mut reconciler = Reconciler::adopt(tables(), MemoryMaps::default()).unwrap();
    for i in 0..200_u8 {
        let mut one = service(&format!("s{i}"), &format!("10.43.0.{i}"));
        one["spec"]["type"] = "ClusterIP".into();
        one["spec"]["ports"][0]["nodePort"] = Value::Null;
        apply(&mut reconciler, &one);
        apply(&mut reconciler, &slice(&format!("s{i}"), 0..100));
    }
    settle(&mut reconciler);
    assert!(reconciler.maps.calls < 10, "{} calls for the first synchronisation", reconciler.maps.calls);
    reconciler.maps.changes = 0;
    apply(&mut reconciler, &slice("s7", 0..101));
    settle(&mut reconciler);
    // One backend, one place, one Service address.
    assert_eq!(reconciler.maps.changes, 3);
    reconciler.maps.changes = 0;
    apply(&mut reconciler, &slice("s7", 1..101));
    settle(&mut reconciler);
    // The last moves to the first place; one Service address; one place. The backend still serves the other Services.
    assert_eq!(reconciler.maps.changes, 3);
    reconciler.maps.changes = 0;
    apply(&mut reconciler, &slice("s7", 1..101));
    settle(&mut reconciler);
    assert_eq!(reconciler.maps.changes, 0, "an object that says the same changes nothing");
}

#[test]
fn a_new_agent_adopts_and_prunes() {
    let mut first = Reconciler::adopt(tables(), MemoryMaps::default()).unwrap();
    apply(&mut first, &service("web", "10.43.0.1"));
    apply(&mut first, &slice("web", 0..50));
    let mut doomed = service("old", "10.43.0.2");
    doomed["spec"]["ports"][0]["nodePort"] = 30081.into();
    apply(&mut first, &doomed);
    apply(&mut first, &slice("old", 60..70));
    settle(&mut first);
    let before = first.ledger();

    let mut second = Reconciler::adopt(tables(), first.maps).unwrap();
    assert_eq!(second.ledger(), before);
    second.maps.changes = 0;
    apply(&mut second, &service("web", "10.43.0.1"));
    apply(&mut second, &slice("web", 0..50));
    settle(&mut second);
    assert_eq!(second.maps.changes, 0, "what is right already is left alone");
    second.sources_are_known();
    settle(&mut second);
    let left = second.render().unwrap();
    assert!(!left.contains("10.43.0.2") && !left.contains(":30081"), "{left}");
    for (key, value) in &second.ledger().backends {
        assert_eq!(before.backends.get(key), Some(value), "generations are restored");
    }
    // A new Service gets numbers that none before it had.
    apply(&mut second, &service("new", "10.43.0.3"));
    settle(&mut second);
    let lists: BTreeSet<_> = second.ledger().services.values().map(|v| v.list).collect();
    assert!(lists.last() > before.services.values().map(|v| v.list).max().as_ref());
}

#[test]
fn another_pod_on_the_same_address_is_another_generation() {
    let mut reconciler = Reconciler::adopt(tables(), MemoryMaps::default()).unwrap();
    apply(&mut reconciler, &service("web", "10.43.0.1"));
    apply(&mut reconciler, &slice("web", 0..1));
    settle(&mut reconciler);
    let generation = |r: &Reconciler<MemoryMaps>| r.ledger().backends.values().next().unwrap().generation;
    let first = generation(&reconciler);
    let mut other = slice("web", 0..1);
    other["endpoints"][0]["targetRef"]["uid"] = "another".into();
    apply(&mut reconciler, &other);
    settle(&mut reconciler);
    assert!(generation(&reconciler) > first);
}

#[test]
fn what_the_node_answers_itself_is_no_service() {
    let mut reconciler = Reconciler::adopt(tables(), MemoryMaps::default()).unwrap();
    let mut dns = service("kube-dns", "10.43.0.99");
    dns["spec"]["type"] = "ClusterIP".into();
    apply(&mut reconciler, &dns);
    settle(&mut reconciler);
    assert_eq!(reconciler.render().unwrap(), "maps empty\n");
}

#[test]
fn what_is_null_is_nothing() {
    let mut reconciler = Reconciler::adopt(tables(), MemoryMaps::default()).unwrap();
    let mut web = service("web", "10.43.0.1");
    web["spec"]["externalIPs"] = Value::Null;
    web["spec"]["sessionAffinityConfig"] = Value::Null;
    web["status"] = json!({"loadBalancer": {"ingress": null}, "conditions": null});
    apply(&mut reconciler, &web);
    let mut endpoints = slice("web", 0..2);
    endpoints["endpoints"][0]["conditions"] = json!({});
    endpoints["endpoints"][1]["conditions"] = json!({"ready": null, "serving": null, "terminating": null});
    endpoints["endpoints"][1]["targetRef"] = Value::Null;
    apply(&mut reconciler, &endpoints);
    settle(&mut reconciler);
    let most =
        |reconciler: &Reconciler<MemoryMaps>| reconciler.ledger().services.values().map(|v| v.count).max();
    assert!(most(&reconciler) > Some(0) && reconciler.ledger().backends.len() == 2, "both are ready");
    endpoints["endpoints"] = Value::Null;
    endpoints["ports"] = Value::Null;
    apply(&mut reconciler, &endpoints);
    settle(&mut reconciler);
    assert!(most(&reconciler) == Some(0) && reconciler.ledger().backends.is_empty());
}

/// Maps that hold a Service which is gone and one that has other endpoints now.
fn left_behind() -> MemoryMaps {
    let mut first = Reconciler::adopt(tables(), MemoryMaps::default()).unwrap();
    apply(&mut first, &service("web", "10.43.0.1"));
    apply(&mut first, &slice("web", 0..20));
    let mut doomed = service("old", "10.43.0.2");
    doomed["spec"]["ports"][0]["nodePort"] = 30081.into();
    apply(&mut first, &doomed);
    apply(&mut first, &slice("old", 60..70));
    settle(&mut first);
    first.maps
}

#[test]
fn what_is_left_goes_although_operations_fail() {
    for seed in 1..=50 {
        let maps = FaultyMaps::new(left_behind(), seed * 7_919, 20);
        let mut second = Reconciler::adopt(tables(), maps).unwrap();
        apply(&mut second, &service("web", "10.43.0.1"));
        apply(&mut second, &slice("web", 30..40));
        second.sources_are_known();
        settle(&mut second);
        let ledger = second.ledger();
        assert_eq!((ledger.services.len(), ledger.backends.len()), (4, 10), "{}", second.render().unwrap());
        assert!(second.is_settled());
    }
}

/// The agent of a node goes on, and says whose error it is.
#[test]
fn a_service_that_never_fits_keeps_nothing_waiting() {
    let mut second = Reconciler::adopt(tables(), left_behind()).unwrap();
    let full = second.maps.dump(Table::Slots).unwrap().len();
    second.maps.capacity.insert(Table::Slots, full);
    apply(&mut second, &service("web", "10.43.0.1"));
    apply(&mut second, &slice("web", 30..1_000));
    second.sources_are_known();
    for round in 1..5 {
        second.sync();
        assert_eq!(dangling(&second.ledger()), Vec::<String>::new());
        assert!(second.is_dirty());
        assert_eq!(second.is_settled(), round >= 3, "round {round}");
    }
    let text = second.render().unwrap();
    assert!(!text.contains("10.43.0.2") && text.contains("10.43.0.1:80/TCP list"), "{text}");
    assert_eq!(second.unprogrammed().len(), 1);
    // Backends stay as long as the failing Service may lead to them.
    apply(&mut second, &slice("web", 30..40));
    settle(&mut second);
    assert_eq!((second.ledger().backends.len(), second.unprogrammed().len()), (10, 0));
}
