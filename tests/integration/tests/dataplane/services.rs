//! Services as objects of the API, over every address they have, in a real kernel.

use std::io::ErrorKind;
use std::net::SocketAddr;

use serde_json::{Value, json};
use weft_tests_harness::require;

use crate::NEEDS;
use crate::place::{CLIENT, NODE, NODE6, POD, POD6, Place, Running, ask_tcp, ask_udp, serve, within};

const NODE_PORT: u16 = 30_033;

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// A Service with all kinds of addresses of these families; `change` makes it another.
fn service(families: &[&str], change: impl FnOnce(&mut Value)) -> Value {
    let of = |v4: &str, v6: &str| -> Vec<String> {
        families.iter().map(|f| if *f == "IPv4" { v4 } else { v6 }.to_owned()).collect()
    };
    let cluster = of("10.43.0.33", "fd43::33");
    let balancer: Vec<_> =
        of("203.0.113.33", "2001:db8::33").into_iter().map(|ip| json!({"ip": ip})).collect();
    let port = |name: &str, protocol: &str, port: u16| json!({"name": name, "port": port, "targetPort": name, "nodePort": NODE_PORT, "protocol": protocol});
    let mut object = json!({"metadata": {"namespace": "default", "name": "front"},
        "spec": {"type": "LoadBalancer", "clusterIP": cluster[0], "clusterIPs": cluster, "ipFamilies": families,
            "externalIPs": of("203.0.113.44", "2001:db8::44"), "ports": [port("web", "TCP", 80), port("ask", "UDP", 53)]},
        "status": {"loadBalancer": {"ingress": balancer}}});
    change(&mut object);
    object
}

fn slice(family: &str, endpoints: &[(SocketAddr, &str)]) -> Value {
    let target = endpoints.first().map_or(1, |(at, _)| at.port());
    let endpoints: Vec<_> =
        endpoints.iter().map(|(at, node)| json!({"addresses": [at.ip()], "nodeName": node})).collect();
    json!({"addressType": family, "endpoints": endpoints,
        "ports": [{"name": "web", "port": target, "protocol": "TCP"}, {"name": "ask", "port": target, "protocol": "UDP"}],
        "metadata": {"namespace": "default", "name": format!("front-{}", family.to_lowercase()),
            "labels": {"kubernetes.io/service-name": "front"}}})
}

/// Where a client outside asks, and where a process of the node asks.
fn outside() -> [(&'static str, [SocketAddr; 3]); 2] {
    [
        ("IPv4", [at("203.0.113.33", 80), at("203.0.113.44", 80), SocketAddr::new(NODE.into(), NODE_PORT)]),
        ("IPv6", [at("2001:db8::33", 80), at("2001:db8::44", 80), SocketAddr::new(NODE6.into(), NODE_PORT)]),
    ]
}

fn cluster_address(family: &str) -> SocketAddr {
    if family == "IPv4" { at("10.43.0.33", 80) } else { at("fd43::33", 80) }
}

fn everywhere(place: &Place, family: &str, check: impl Fn(&str, std::io::Result<String>) + Sync) {
    let (_, addresses) = outside().into_iter().find(|(of, _)| *of == family).unwrap();
    for address in addresses {
        within(&place.client, || check(&format!("client → {address}"), ask_tcp(address)));
        within(&place.node, || check(&format!("node → {address}"), ask_tcp(address)));
    }
    let address = cluster_address(family);
    within(&place.node, || check(&format!("node → {address}"), ask_tcp(address)));
}

fn answers(what: &str, outcome: std::io::Result<String>) {
    assert!(outcome.as_ref().is_ok_and(|text| text.starts_with("pod")), "{what}: {outcome:?}");
}

fn start(label: &str) -> (Place, Running, [(SocketAddr, &'static str); 2]) {
    let place = Place::new(label).unwrap();
    let pods = [serve(&place.pod, POD, "pod"), serve(&place.pod, POD6, "pod")].map(|at| (at, "node-a"));
    let running = place.start().unwrap();
    (place, running, pods)
}

#[test]
fn every_address_of_both_families_answers_and_families_change_live() {
    if !require("dataplane::families", &NEEDS) {
        return;
    }
    let (place, mut running, [pod, pod6]) = start("fa");
    running.apply(slice("IPv4", &[pod])).unwrap();
    running.apply(slice("IPv6", &[pod6])).unwrap();
    for families in [&["IPv4", "IPv6"][..], &["IPv4"], &["IPv6", "IPv4"], &["IPv6"]] {
        running.apply(service(families, |_| {})).unwrap();
        for (family, addresses) in outside() {
            if families.contains(&family) {
                everywhere(&place, family, answers);
                let dns = SocketAddr::new(addresses[0].ip(), 53);
                within(&place.client, || answers("client over UDP", ask_udp(dns)));
                within(&place.node, || answers("node over UDP", ask_udp(dns)));
            } else {
                let node_port = addresses[2];
                let error = within(&place.client, || ask_tcp(node_port)).unwrap_err();
                assert_eq!(
                    error.kind(),
                    ErrorKind::ConnectionRefused,
                    "{node_port} is no port of {families:?}"
                );
            }
        }
    }
}

#[test]
fn source_ranges_guard_the_balancers_address_alone() {
    if !require("dataplane::source_ranges", &NEEDS) {
        return;
    }
    let (place, mut running, [pod, _]) = start("gu");
    running.apply(slice("IPv4", &[pod])).unwrap();
    let guarded = |ranges: &[&str]| {
        let ranges = json!(ranges);
        service(&["IPv4"], move |object| object["spec"]["loadBalancerSourceRanges"] = ranges)
    };
    let balancer = at("203.0.113.33", 80);
    running.apply(guarded(&["198.51.100.0/24", "2001:db8::/32"])).unwrap();
    let before = running.drops("source_not_allowed");
    let error = within(&place.client, || ask_tcp(balancer)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(running.drops("source_not_allowed") > before);
    for open in [at("203.0.113.44", 80), SocketAddr::new(NODE.into(), NODE_PORT)] {
        within(&place.client, || answers("client", ask_tcp(open)));
    }
    within(&place.node, || answers("node", ask_tcp(cluster_address("IPv4"))));
    running.apply(guarded(&["198.51.100.0/24", &format!("{CLIENT}/32")])).unwrap();
    within(&place.client, || answers("allowed client", ask_tcp(balancer)));
    running.apply(guarded(&[])).unwrap();
    within(&place.client, || answers("any client", ask_tcp(balancer)));
}

#[test]
fn local_policies_keep_to_the_node_and_tell_apart_elsewhere_and_nowhere() {
    if !require("dataplane::local_policies", &NEEDS) {
        return;
    }
    let (place, mut running, [pod, _]) = start("lp");
    let local = |external: &str, internal: &str| {
        let (external, internal) = (external.to_owned(), internal.to_owned());
        service(&["IPv4"], move |object| {
            object["spec"]["externalTrafficPolicy"] = external.into();
            object["spec"]["internalTrafficPolicy"] = internal.into();
        })
    };
    let (node_port, cluster) = (SocketAddr::new(NODE.into(), NODE_PORT), cluster_address("IPv4"));
    running.apply(local("Local", "Local")).unwrap();
    running.apply(slice("IPv4", &[(at("10.42.9.9", pod.0.port()), "node-b"), pod])).unwrap();
    // Never the other one, whose address leads nowhere; and the client's own address arrives.
    for _ in 0..10 {
        assert_eq!(within(&place.client, || ask_tcp(node_port)).unwrap(), format!("pod {CLIENT}"));
        within(&place.node, || answers("node", ask_tcp(cluster)));
    }
    // Elsewhere only: silence outside, while the node itself may go there by the external address.
    running.apply(slice("IPv4", &[(pod.0, "node-b")])).unwrap();
    let before = running.drops("no_local_endpoints");
    assert_eq!(within(&place.client, || ask_tcp(node_port)).unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(running.drops("no_local_endpoints") > before);
    within(&place.node, || ask_tcp(cluster)).unwrap_err();
    within(&place.node, || answers("node", ask_tcp(at("203.0.113.33", 80))));
    running.apply(local("Local", "Cluster")).unwrap();
    within(&place.node, || answers("node", ask_tcp(cluster)));
    // Nowhere: refused at once.
    running.apply(slice("IPv4", &[])).unwrap();
    assert_eq!(
        within(&place.client, || ask_tcp(node_port)).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
}

#[test]
fn a_range_of_ports_leads_to_the_same_ports() {
    if !require("dataplane::port_ranges", &NEEDS) {
        return;
    }
    let (place, mut running, [pod, _]) = start("pr");
    let number = pod.0.port();
    let (first, last) = (number - 3, number.saturating_add(3));
    let ranges = format!("{first}-{last}, {first}-{last}/UDP");
    let object = service(&["IPv4"], |object| {
        object["metadata"]["annotations"] = json!({"weft.dev/port-ranges": ranges})
    });
    running.apply(slice("IPv4", &[pod])).unwrap();
    running.apply(object).unwrap();
    for address in ["10.43.0.33", "203.0.113.33", "203.0.113.44"].map(|ip| at(ip, number)) {
        within(&place.node, || answers("node", ask_tcp(address)));
        within(&place.node, || answers("node over UDP", ask_udp(address)));
    }
    within(&place.client, || answers("client", ask_tcp(at("203.0.113.33", number))));
    within(&place.client, || answers("client over UDP", ask_udp(at("203.0.113.44", number))));
    // Nobody listens there in the pod.
    let closed = within(&place.node, || ask_tcp(at("10.43.0.33", first))).unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::ConnectionRefused);
    within(&place.node, || answers("written out", ask_tcp(cluster_address("IPv4"))));
}
