//! The edge programs, seen by real connections: from outside, from pods that no socket hook sees, to the node itself.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Instant;

use serde_json::json;
use weft_ebpf_abi::{SERVICE_CHECK_SOURCE, SERVICE_DROP_EMPTY, SERVICE_HASHED, SERVICE_KEEP_SOURCE};
use weft_tests_harness::{require, wait_until};

use crate::NEEDS;
use crate::bodies::{exchange, send_back};
use crate::entries::{FAMILIES, Service};
use crate::place::{
    CLIENT, NODE, POD, Place, SOON, ask_again, ask_datagram, ask_tcp, ask_udp, connected_udp, serve, within,
};

#[test]
fn a_client_outside_reaches_a_pod_by_the_node_port() {
    if !require("dataplane::edge", &NEEDS) {
        return;
    }
    let place = Place::new("np").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        within(&place.client, || {
            for to in [family.at_node(30080), family.vip(10)] {
                for _ in 0..100 {
                    assert_eq!(ask_tcp(to).unwrap(), format!("pod {}", family.gateway));
                }
                assert_eq!(ask_udp(to).unwrap(), format!("pod {}", family.gateway));
            }
        });
    }
}

#[test]
fn a_large_body_crosses_the_edge() {
    if !require("dataplane::edge-large", &NEEDS) {
        return;
    }
    let place = Place::new("lb").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let listener = within(&place.pod, || TcpListener::bind((family.pod, 0)).unwrap());
        running.plain(&family, 10, 30080, &[listener.local_addr().unwrap()]).unwrap();
        let server = send_back(listener, 1 << 20, SOON);
        within(&place.client, || exchange(family.at_node(30080), 1 << 20, SOON));
        server.join().unwrap();
    }
}

#[test]
fn a_pod_that_no_hook_sees_reaches_itself_and_the_node() {
    if !require("dataplane::hairpin", &NEEDS) {
        return;
    }
    let place = Place::new("hp").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let (gateway, itself) = (format!("pod {}", family.gateway), format!("host {}", family.pod));
        let pod = serve(&place.pod, family.pod, "pod");
        let host = serve(&place.node, family.node, "host");
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        running.plain(&family, 11, 30081, &[host]).unwrap();
        within(&place.pod, || {
            // The test's own thread is in no cgroup of the node: only the edge translates.
            assert_eq!(ask_tcp(family.vip(10)).unwrap(), gateway, "itself, through the node");
            assert_eq!(ask_udp(family.vip(10)).unwrap(), gateway);
            assert_eq!(ask_tcp(SocketAddr::new(family.gateway, 30080)).unwrap(), gateway);
            assert_eq!(ask_tcp(family.vip(11)).unwrap(), itself, "the node itself, with the pod's address");
            assert_eq!(ask_udp(family.vip(11)).unwrap(), itself);
        });
        within(&place.client, || {
            assert_eq!(ask_tcp(family.at_node(30081)).unwrap(), format!("host {}", family.client));
        });
    }
}

#[test]
fn what_has_no_endpoints_is_refused_at_once_from_outside_too() {
    if !require("dataplane::edge-refused", &NEEDS) {
        return;
    }
    let place = Place::new("er").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[]).unwrap();
        let begin = Instant::now();
        let refused = |answer: std::io::Result<String>| {
            assert_eq!(answer.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        };
        within(&place.client, || {
            refused(ask_tcp(family.at_node(30080)));
            refused(ask_udp(family.at_node(30080)));
        });
        within(&place.pod, || {
            refused(ask_tcp(family.vip(10)));
            refused(ask_udp(family.vip(10)));
            refused(ask_tcp(SocketAddr::new(family.vip(10).ip(), 81)));
        });
        assert!(begin.elapsed() < SOON, "it waited for a time-out");
    }
    assert_eq!(running.drops("packet_no_endpoints"), 8);
    assert_eq!(running.drops("packet_unknown_port"), 2);
}

#[test]
fn a_flow_ends_with_its_backend_and_the_next_finds_another() {
    if !require("dataplane::generation", &NEEDS) {
        return;
    }
    let place = Place::new("gn").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let first = serve(&place.pod, family.pod, "first");
        running.plain(&family, 10, 30080, &[first]).unwrap();
        let to = family.at_node(30080);
        let mut stream = within(&place.client, || TcpStream::connect_timeout(&to, SOON).unwrap());
        assert!(ask_again(&mut stream).unwrap().starts_with("first"));
        let datagrams = within(&place.client, || connected_udp(to));
        assert!(ask_datagram(&datagrams).unwrap().starts_with("first"));

        let second = serve(&place.pod, family.pod, "second");
        running.plain(&family, 10, 30080, &[second]).unwrap();
        running.withdraw(first).unwrap();
        // The reset answers the packet; the socket reports it with the read or a later write.
        let ended = wait_until("the connection is reset", SOON, || Ok(ask_again(&mut stream).err())).unwrap();
        assert!(matches!(ended.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{ended}");
        assert!(running.drops("backend_gone") >= 1);
        assert!(
            ask_datagram(&datagrams).unwrap().starts_with("second"),
            "UDP finds another at its next packet"
        );
        within(&place.client, || assert!(ask_tcp(to).unwrap().starts_with("second")));
    }
}

#[test]
fn local_policy_keeps_the_clients_address() {
    if !require("dataplane::local-policy", &NEEDS) {
        return;
    }
    let place = Place::new("lp").unwrap();
    let pod = serve(&place.pod, POD, "pod");
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[pod]).unwrap();
    let service = json!({"metadata": {"namespace": "default", "name": "s10"}, "spec": {"type": "NodePort",
        "clusterIP": "10.43.0.10", "externalTrafficPolicy": "Local",
        "ports": [{"name": "TCP", "port": 80, "nodePort": 30080, "protocol": "TCP"}]}});
    let changed =
        running.reconciler.tables.apply_service(&serde_json::from_str(&service.to_string()).unwrap());
    running.reconciler.mark(changed);
    running.sync().unwrap();
    within(&place.client, || {
        assert_eq!(ask_tcp(SocketAddr::from((NODE, 30080))).unwrap(), format!("pod {CLIENT}"));
    });
}

#[test]
fn flags_of_a_service_decide_before_its_backends() {
    if !require("dataplane::flags", &NEEDS) {
        return;
    }
    let place = Place::new("fl").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        let service = Service { last: 10, node_port: 30080, backends: &[pod], ..Service::default() };
        let to = family.vip(10);

        running.enter(&family, &Service { flags: SERVICE_KEEP_SOURCE, ..service }).unwrap();
        within(&place.client, || {
            assert_eq!(ask_tcp(to).unwrap(), format!("pod {}", family.client));
            assert_eq!(ask_udp(to).unwrap(), format!("pod {}", family.client));
        });

        let empty = Service { flags: SERVICE_DROP_EMPTY, backends: &[], ..service };
        running.enter(&family, &empty).unwrap();
        let before = running.drops("no_local_endpoints");
        within(&place.client, || {
            assert_eq!(ask_udp(to).unwrap_err().kind(), ErrorKind::WouldBlock, "no answer")
        });
        assert_eq!(running.drops("no_local_endpoints"), before + 1);

        running.enter(&family, &Service { flags: SERVICE_CHECK_SOURCE, ..service }).unwrap();
        let before = running.drops("source_not_allowed");
        within(&place.client, || {
            assert_eq!(ask_udp(to).unwrap_err().kind(), ErrorKind::WouldBlock, "no answer")
        });
        within(&place.pod, || {
            assert_eq!(ask_udp(to).unwrap_err().kind(), ErrorKind::WouldBlock, "no answer")
        });
        assert_eq!(running.drops("source_not_allowed"), before + 2);
        place.allow(&family, 10, &[(family.client, 0)]).unwrap();
        within(&place.client, || {
            assert_eq!(ask_tcp(to).unwrap(), format!("pod {}", family.gateway));
            assert_eq!(ask_udp(to).unwrap(), format!("pod {}", family.gateway));
        });
        within(&place.pod, || assert!(ask_udp(to).is_err(), "another range"));
        place.allow(&family, 10, &[(family.gateway, 8)]).unwrap();
        within(&place.pod, || assert!(ask_tcp(to).is_ok(), "its range"));
    }
}

#[test]
fn a_hashed_list_gives_a_client_the_same_backend_whichever_node_it_asks() {
    if !require("dataplane::hashed", &NEEDS) {
        return;
    }
    let place = Place::new("hs").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        let backends = names.map(|name| serve(&place.pod, family.pod, name));
        let service = Service { flags: SERVICE_HASHED, backends: &backends, ..Service::default() };
        running.enter(&family, &Service { last: 10, node_port: 30080, ..service }).unwrap();
        running.enter(&family, &Service { last: 11, node_port: 30081, ..service }).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        within(&place.client, || {
            for port in 40_000..40_040 {
                let socket = UdpSocket::bind((family.client, port)).unwrap();
                let answers = [family.vip(10), family.vip(11), family.at_node(30080)].map(|to| {
                    socket.connect(to).unwrap();
                    ask_datagram(&socket).unwrap()
                });
                assert!(answers.iter().all(|a| *a == answers[0]), "{answers:?}");
                seen.insert(answers[0].clone());
            }
        });
        assert!(seen.len() >= 5, "{seen:?}");
    }
}
