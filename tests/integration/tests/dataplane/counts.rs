//! What the programs count of each Service: connections, and what is turned away. Failures are counted in `ejection.rs`.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream, UdpSocket};

use serde_json::json;
use weft_agent_dataplane::counts::Counters;
use weft_ebpf_abi::{CONNECTIONS, DropReason};
use weft_tests_harness::require;

use crate::NEEDS;
use crate::entries::{FAMILIES, Family};
use crate::place::{Place, Running, SOON, ask_datagram, ask_tcp, connected_udp, serve, within};

/// Enters a Service of one family, over TCP and UDP.
fn publish(
    running: &mut Running,
    family: &Family,
    name: &str,
    last: u8,
    node_port: u16,
    endpoints: &[SocketAddr],
) {
    let address_type = if family.node.is_ipv4() { "IPv4" } else { "IPv6" };
    let port =
        |protocol: &str| json!({"name": protocol, "port": 80, "nodePort": node_port, "protocol": protocol});
    let service = json!({"metadata": {"namespace": "shop", "name": name}, "spec": {"type": "NodePort",
        "clusterIP": family.vip(last).ip(), "ipFamilies": [address_type], "ports": [port("TCP"), port("UDP")]}});
    running.apply(service).unwrap();
    let target = endpoints.first().map_or(1, SocketAddr::port);
    let target = |protocol: &str| json!({"name": protocol, "port": target, "protocol": protocol});
    let endpoints: Vec<_> =
        endpoints.iter().map(|e| json!({"addresses": [e.ip()], "nodeName": "node-a"})).collect();
    let slice = json!({"addressType": address_type, "endpoints": endpoints, "ports": [target("TCP"), target("UDP")],
        "metadata": {"namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": name}}});
    running.apply(slice).unwrap();
}

/// What was counted of a Service, by what.
pub(crate) fn counted(running: &Running, name: &str) -> BTreeMap<u32, u64> {
    let mut counts = BTreeMap::new();
    for (key, count) in Counters::of(&running.programs).unwrap().read().unwrap() {
        let owner = running.reconciler.owner_of_list(key.list);
        if owner.is_some_and(|owner| owner.name() == name) {
            *counts.entry(key.what).or_default() += count;
        }
    }
    counts
}

#[test]
fn connections_are_counted_once_whoever_translates_them() {
    if !require("dataplane::counts", &NEEDS) {
        return;
    }
    let place = Place::new("cn").unwrap();
    let mut running = place.start().unwrap();
    for (family, name) in FAMILIES.into_iter().zip(["web4", "web6"]) {
        let pod = serve(&place.pod, family.pod, "pod");
        publish(&mut running, &family, name, 10, 30080, &[pod]);
        assert_eq!(counted(&running, name), BTreeMap::new(), "without traffic there is nothing");
        within(&place.node, || {
            for _ in 0..3 {
                ask_tcp(family.vip(10)).unwrap();
            }
            ask_tcp(family.at_node(30080)).unwrap();
            // However many datagrams: one socket with one backend.
            let socket = UdpSocket::bind((if family.node.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            for _ in 0..5 {
                socket.send_to(b"?", family.vip(10)).unwrap();
                socket.recv_from(&mut [0; 64]).unwrap();
            }
        });
        assert_eq!(counted(&running, name), BTreeMap::from([(CONNECTIONS, 5)]), "by sockets");
        within(&place.client, || {
            ask_tcp(family.at_node(30080)).unwrap();
            let socket = connected_udp(family.at_node(30080));
            for _ in 0..5 {
                ask_datagram(&socket).unwrap();
            }
        });
        within(&place.pod, || ask_tcp(family.vip(10)).unwrap());
        assert_eq!(counted(&running, name), BTreeMap::from([(CONNECTIONS, 8)]), "and by packets");
    }
}

#[test]
fn what_is_turned_away_is_counted_where_it_was_asked_for() {
    if !require("dataplane::counts-drops", &NEEDS) {
        return;
    }
    let place = Place::new("cd").unwrap();
    let mut running = place.start().unwrap();
    for (family, name) in FAMILIES.into_iter().zip(["none4", "none6"]) {
        let other = serve(&place.pod, family.pod, "pod");
        publish(&mut running, &family, "other", 11, 30081, &[other]);
        publish(&mut running, &family, name, 10, 30080, &[]);
        within(&place.node, || {
            TcpStream::connect(family.vip(10)).unwrap_err();
            TcpStream::connect(family.at_node(30080)).unwrap_err();
        });
        within(&place.client, || {
            ask_tcp(family.at_node(30080)).unwrap_err();
            ask_tcp(family.at_node(30081)).unwrap();
        });
        let wanted = BTreeMap::from([
            (DropReason::SocketNoEndpoints as u32, 2),
            (DropReason::PacketNoEndpoints as u32, 1),
        ]);
        assert_eq!(counted(&running, name), wanted);
        assert_eq!(counted(&running, "other"), BTreeMap::from([(CONNECTIONS, 1)]));
        running
            .apply(json!({"metadata": {"namespace": "shop", "name": "other"}, "spec": {"clusterIP": "None"}}))
            .unwrap();
        assert_eq!(counted(&running, "other"), BTreeMap::new(), "its lists are nobody's any more");
    }
}
