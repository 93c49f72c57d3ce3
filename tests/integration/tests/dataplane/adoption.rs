//! Restarts: Services go on without an agent, a new one takes over, and a removed node leaves nothing.

use std::io::ErrorKind;
use std::net::SocketAddr;

use aya::maps::MapData;
use serde_json::json;
use weft_agent_dataplane::maps::{MapSet as _, Table};
use weft_agent_dataplane::programs;
use weft_agent_dataplane::reconcile::render;
use weft_ebpf_abi::{names, sizes};
use weft_tests_harness::require;

use crate::NEEDS;
use crate::place::{NODE, POD, Place, ask_tcp, serve, vip, within};

fn pins(folder: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> = ["maps", "links"]
        .iter()
        .flat_map(|sub| std::fs::read_dir(folder.join(sub)).into_iter().flatten().flatten())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn services_outlive_the_agent_and_a_new_one_adopts_them() {
    if !require("dataplane::adoption", &NEEDS) {
        return;
    }
    let place = Place::new("ad").unwrap();
    let pod = serve(&place.pod, POD, "pod");
    let mut first = place.start().unwrap();
    first.service(10, 30080, &[pod]).unwrap();
    let (ledger, before) = (first.reconciler.ledger(), pins(&place.pins));
    assert_eq!(before.len(), names::ALL.len() + 8 + 4, "{before:?}");
    drop(first);

    let outside = SocketAddr::from((NODE, 30080));
    let answers = || {
        within(&place.node, || ask_tcp(vip(10))).unwrap();
        within(&place.client, || ask_tcp(outside)).unwrap();
    };
    answers();
    let mut second = place.start().unwrap();
    assert_eq!(second.reconciler.ledger(), ledger);
    assert_eq!(pins(&place.pins), before, "programs were replaced in place");
    answers();
    second.service(11, 30081, &[pod]).unwrap();
    within(&place.node, || ask_tcp(vip(11))).unwrap();
    second.reconciler.sources_are_known();
    second.sync().unwrap();
    assert_eq!(within(&place.node, || ask_tcp(vip(10))).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    drop(second);

    programs::remove(&place.pins).unwrap();
    assert_eq!(pins(&place.pins), Vec::<String>::new());
    let error = within(&place.node, || ask_tcp(vip(11))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NetworkUnreachable, "nothing translates any more");
}

/// A machine of 8 GiB or more has larger ones than the programs ask for.
#[test]
fn maps_of_flows_are_as_large_as_the_machine_wants() {
    if !require("dataplane::sizes", &NEEDS) {
        return;
    }
    let place = Place::new("sz").unwrap();
    let size = |name: &str| {
        let map = MapData::from_pin(place.pins.join("maps").join(name)).unwrap();
        map.info().unwrap().max_entries()
    };
    let _running = place.start().unwrap();
    let (flows, tracked) = (size(names::FLOWS), size(names::TRACKED));
    assert!(flows >= sizes::FLOWS && flows.is_power_of_two() && tracked == flows, "{flows} {tracked}");
    let pages = nix::unistd::sysconf(nix::unistd::SysconfVar::_PHYS_PAGES).unwrap().unwrap();
    assert_eq!(flows > sizes::FLOWS, pages >= (8 << 30) / 4_096, "{pages} pages");
}

/// Ranges stand in a trie, whose batches work otherwise than a hash map's.
#[test]
fn ranges_of_clients_are_kept_and_adopted() {
    if !require("dataplane::ranges", &NEEDS) {
        return;
    }
    let place = Place::new("sr").unwrap();
    let front = |ranges: &[String]| {
        json!({"metadata": {"namespace": "default", "name": "front"},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.43.0.30", "clusterIPs": ["10.43.0.30", "fd00:43::30"],
                "loadBalancerSourceRanges": ranges, "ports": [{"port": 80, "nodePort": 30030, "protocol": "TCP"}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.30"}, {"ip": "2001:db8::30"}]}}})
    };
    let of = |count: u16| -> Vec<String> {
        let v4 = (0..count).map(|i| format!("10.{}.{}.0/24", i / 250, i % 250));
        v4.chain((0..count).map(|i| format!("2001:db8:{i:x}::/48"))).collect()
    };
    let mut first = place.start().unwrap();
    first.apply(front(&of(300))).unwrap();
    // Two lists of each family: for clients inside and outside.
    assert_eq!(first.reconciler.entries(Table::Sources), 4 * 300);
    let text = first.reconciler.render().unwrap();
    assert_eq!(text, render(&first.reconciler.ledger()), "belief and maps");
    drop(first);

    let mut second = place.start().unwrap();
    assert_eq!(second.reconciler.render().unwrap(), text);
    second.apply(front(&of(3))).unwrap();
    assert_eq!(second.reconciler.entries(Table::Sources), 4 * 3);
    assert_eq!(second.reconciler.render().unwrap(), render(&second.reconciler.ledger()));
    second.apply(front(&[])).unwrap();
    assert_eq!(second.reconciler.maps.dump(Table::Sources).unwrap(), []);
}

#[test]
fn devices_that_come_and_go_are_followed() {
    if !require("dataplane::devices", &NEEDS) {
        return;
    }
    let place = Place::new("dv").unwrap();
    let running = place.start().unwrap();
    let node = place.node.name();
    let ip = |command: &str| weft_tests_harness::netns::ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
    let attach = || {
        within(&place.node, || {
            let devices = weft_agent_dataplane::node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap();
            running.programs.attach_edges(&devices.edge).unwrap();
            devices.edge.len()
        })
    };
    let edges = || pins(&place.pins).iter().filter(|name| name.starts_with("edge_")).count();
    ip(&format!("-n {node} link add extra0 type veth peer name extra1"));
    assert_eq!((attach(), edges()), (2, 4), "without an address it is no edge");
    ip(&format!("-n {node} addr add 192.168.78.1/24 dev extra0"));
    assert_eq!((attach(), edges()), (3, 6));
    ip(&format!("-n {node} link del extra0"));
    assert_eq!((attach(), edges()), (2, 4));
}
