//! Golden tests of the whole pure part: YAML steps to map dumps, with and without seeded faults; and the cost of changes.

use std::collections::BTreeSet;
use std::path::Path;

use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};
use weft_ebpf_abi::{Address, BackendKey, Port, TCP};

use crate::maps::MapSet;
use crate::maps::faulty::FaultyMaps;
use crate::maps::memory::MemoryMaps;
use crate::reconcile::{Reconciler, dangling, render};
use crate::tables::{Tables, service_name, slice_name, wire};

mod changes;
mod services;

fn tables() -> Tables {
    Tables::new("node-a", vec![Address::v4([10, 43, 0, 99])])
}

fn object<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

fn decode<'a, T: serde::Deserialize<'a>>(text: &'a str) -> T {
    serde_json::from_str(text).unwrap()
}

fn apply<M: MapSet>(reconciler: &mut Reconciler<M>, value: &Value) {
    let text = value.to_string();
    match value["kind"].as_str().unwrap() {
        "Service" => {
            let changed = reconciler.tables.apply_service(&decode::<wire::Service<'_>>(&text));
            reconciler.mark(changed);
        }
        "EndpointSlice" => {
            let changed = reconciler.tables.apply_slice(&decode::<wire::Slice<'_>>(&text));
            reconciler.mark(changed);
        }
        other => panic!("unknown kind {other}"),
    }
}

fn delete<M: MapSet>(reconciler: &mut Reconciler<M>, value: &Value) {
    let text = value.to_string();
    match value["kind"].as_str().unwrap() {
        "Service" => {
            let name = service_name(&decode::<wire::Service<'_>>(&text)).unwrap();
            let changed = reconciler.tables.delete_service(&name);
            reconciler.mark(changed);
        }
        "EndpointSlice" => {
            let (namespace, name) = slice_name(&decode::<wire::Slice<'_>>(&text)).unwrap();
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
        assert_eq!(dangling(&reconciler.ledger()), Vec::<String>::new());
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
        } else if let Some(names) = step.get("silent") {
            let names = names.as_array().unwrap().iter().map(|name| name.as_str().unwrap());
            let changed = reconciler.tables.set_silent(names);
            reconciler.mark(changed);
        } else if let Some(backends) = step.get("ejected") {
            let backends = backends.as_array().unwrap().iter().map(|at| tcp(at.as_str().unwrap()));
            let changed = reconciler.tables.set_ejected(backends.collect());
            reconciler.mark(changed);
        } else if let Some(zone) = step.get("zone") {
            let labels = json!({"topology.kubernetes.io/zone": zone});
            let node = json!({"metadata": {"name": "node-a", "labels": labels}});
            let changed = reconciler.tables.apply_node(&object::<Node>(&node));
            reconciler.mark(changed);
        } else {
            settle(&mut reconciler);
            let found = reconciler.render().unwrap();
            assert_eq!(found, render(&reconciler.ledger()), "{file}, step {number}: belief and maps differ");
            let wanted = step["expect"].as_str().unwrap();
            assert_eq!(found, wanted, "{file}, step {number}\nfound:\n{found}");
            expectations += 1;
        }
    }
    assert!(expectations > 0, "{file} expects nothing");
    reconciler
}

fn tcp(at: &str) -> BackendKey {
    let at: std::net::SocketAddr = at.parse().unwrap();
    BackendKey { address: at.ip().into(), port: Port::new(at.port()), protocol: TCP, pad: 0 }
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
