//! Golden tests of the whole pure part: YAML steps to map dumps, with and without seeded faults; and the cost of changes.

use std::collections::BTreeSet;
use std::path::Path;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};
use weft_ebpf_abi::Address;

use crate::maps::MapSet;
use crate::maps::faulty::FaultyMaps;
use crate::maps::memory::MemoryMaps;
use crate::reconcile::{Reconciler, dangling, render};
use crate::tables::{Tables, service_name, slice_name};

fn tables() -> Tables {
    Tables::new("node-a", vec![Address::v4([10, 43, 0, 99])])
}

fn object<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

fn apply<M: MapSet>(reconciler: &mut Reconciler<M>, value: &Value) {
    match value["kind"].as_str().unwrap() {
        "Service" => {
            let changed = reconciler.tables.apply_service(&object::<Service>(value));
            reconciler.mark(changed);
        }
        "EndpointSlice" => {
            let changed = reconciler.tables.apply_slice(&object::<EndpointSlice>(value));
            reconciler.mark(changed);
        }
        other => panic!("unknown kind {other}"),
    }
}

fn delete<M: MapSet>(reconciler: &mut Reconciler<M>, value: &Value) {
    match value["kind"].as_str().unwrap() {
        "Service" => {
            let name = service_name(&object::<Service>(value)).unwrap();
            let changed = reconciler.tables.delete_service(&name);
            reconciler.mark(changed);
        }
        "EndpointSlice" => {
            let (namespace, name) = slice_name(&object::<EndpointSlice>(value)).unwrap();
            let changed = reconciler.tables.delete_slice(&namespace, &name);
            reconciler.mark(changed);
        }
        other => panic!("unknown kind {other}"),
    }
}

/// Synchronises until nothing is dirty. At no point may a reader meet a place that leads nowhere.
fn settle<M: MapSet>(reconciler: &mut Reconciler<M>) {
    for _ in 0..500 {
        reconciler.sync();
        assert_eq!(dangling(reconciler.ledger()), Vec::<String>::new());
        if !reconciler.is_dirty() {
            return;
        }
    }
    panic!("never settles: {reconciler:?}", reconciler = reconciler.ledger());
}

/// Runs the steps of a file; every `expect` is compared with the maps themselves.
fn play<M: MapSet>(file: &str, text: &str, maps: M) -> Reconciler<M> {
    let steps: Vec<Value> = serde_saphyr::from_str(text).unwrap();
    let mut reconciler = Reconciler::adopt(tables(), maps).unwrap();
    let mut expectations = 0;
    for (number, step) in steps.iter().enumerate() {
        if let Some(value) = step.get("apply") {
            apply(&mut reconciler, value);
        } else if let Some(value) = step.get("delete") {
            delete(&mut reconciler, value);
        } else if let Some(addresses) = step.get("node") {
            let parsed: BTreeSet<_> = addresses
                .as_array()
                .unwrap()
                .iter()
                .map(|a| a.as_str().unwrap().parse::<std::net::IpAddr>().unwrap().into())
                .collect();
            reconciler.set_node_addresses(parsed);
        } else {
            settle(&mut reconciler);
            let found = reconciler.render().unwrap();
            assert_eq!(found, render(reconciler.ledger()), "{file}, step {number}: belief and maps differ");
            let wanted = step["expect"].as_str().unwrap();
            assert_eq!(found, wanted, "{file}, step {number}\nfound:\n{found}");
            expectations += 1;
        }
    }
    assert!(expectations > 0, "{file} expects nothing");
    reconciler
}

fn golden_files() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let read = |p: std::path::PathBuf| {
        (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read_to_string(&p).unwrap())
    };
    files.into_iter().map(read).collect()
}

#[test]
fn golden() {
    let files = golden_files();
    assert!(files.len() >= 3);
    for (file, text) in files {
        assert!(text.trim_end().ends_with("maps empty"), "{file} must end in empty maps");
        play(&file, &text, MemoryMaps::default());
    }
}

#[test]
fn golden_while_one_operation_in_ten_fails() {
    let mut failures = 0;
    for (file, text) in golden_files() {
        for seed in 1..=50 {
            let reconciler = play(&file, &text, FaultyMaps::new(MemoryMaps::default(), seed * 7_919, 10));
            failures += reconciler.maps.failures;
        }
    }
    assert!(failures > 500, "only {failures} operations failed");
}

fn service(name: &str, ip: &str) -> Value {
    json!({"kind": "Service", "metadata": {"namespace": "default", "name": name},
        "spec": {"clusterIP": ip, "type": "NodePort", "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}]}})
}

fn slice(service: &str, pods: std::ops::Range<u16>) -> Value {
    let endpoints: Vec<_> = pods
        .map(|i| {
            json!({"addresses": [format!("10.42.{}.{}", i / 250, i % 250 + 2)],
            "conditions": {"ready": true}, "targetRef": {"uid": format!("uid-{i}")}})
        })
        .collect();
    json!({"kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
        "metadata": {"namespace": "default", "name": format!("{service}-1"), "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}]})
}

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
    let before = first.ledger().clone();

    let mut second = Reconciler::adopt(tables(), first.maps).unwrap();
    assert_eq!(*second.ledger(), before);
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
