//! The socket hooks, seen by real sockets.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Instant;

use weft_tests_harness::require;

use crate::NEEDS;
use crate::entries::{FAMILIES, V4, V6};
use crate::place::{POD, Place, SOON, ask_tcp, ask_udp, serve, vip, within};

#[test]
fn a_process_of_the_node_reaches_services_by_every_address() {
    if !require("dataplane::sockets", &NEEDS) {
        return;
    }
    let place = Place::new("sk").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        let mut rows = vec![
            ("cluster address", family.vip(10)),
            ("NodePort at the node's address", family.at_node(30080)),
            ("NodePort at the bridge's address", SocketAddr::new(family.gateway, 30080)),
        ];
        if let IpAddr::V4(vip) = family.vip(10).ip() {
            rows.push(("NodePort at loopback", SocketAddr::from(([127, 0, 0, 1], 30080))));
            rows.push(("IPv6 socket", SocketAddr::from((vip.to_ipv6_mapped(), 80))));
        }
        within(&place.node, || {
            for (name, to) in rows {
                let answer = format!("pod {}", family.gateway);
                assert_eq!(ask_tcp(to).map_err(|e| format!("{name}: {e}")).unwrap(), answer, "{name}");
                assert_eq!(ask_udp(to).map_err(|e| format!("{name}: {e}")).unwrap(), answer, "{name}");
                let stream = TcpStream::connect_timeout(&to, SOON).unwrap();
                assert_eq!(stream.peer_addr().unwrap(), to, "{name}: getpeername");
            }
        });
    }
}

#[test]
fn unconnected_datagrams_come_back_from_the_service() {
    if !require("dataplane::datagrams", &NEEDS) {
        return;
    }
    let place = Place::new("dg").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        running.plain(&family, 11, 30081, &[pod]).unwrap();
    }
    let mapped = |to: SocketAddr| match to {
        SocketAddr::V4(v4) => SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port())),
        SocketAddr::V6(_) => to,
    };
    let rows = [("0.0.0.0:0", V4.vip(10), V4.vip(11)), ("[::]:0", V6.vip(10), V6.vip(11)), {
        ("[::]:0", mapped(V4.vip(10)), mapped(V4.vip(11)))
    }];
    within(&place.node, || {
        for (local, one, other) in rows {
            let socket = UdpSocket::bind(local).unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            for to in [one, other, one] {
                socket.send_to(b"?", to).unwrap();
                let mut buffer = [0; 64];
                let (count, from) = socket.recv_from(&mut buffer).unwrap();
                assert!(buffer[..count].starts_with(b"pod"));
                // Two Services with one backend: the last that was asked is the one that answers.
                assert_eq!(from, to);
            }
        }
    });
}

#[test]
fn what_has_no_endpoints_is_refused_at_once() {
    if !require("dataplane::refused", &NEEDS) {
        return;
    }
    let place = Place::new("rf").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[]).unwrap();
        let unknown = SocketAddr::new(family.vip(10).ip(), 81);
        within(&place.node, || {
            let begin = Instant::now();
            for to in [family.vip(10), family.at_node(30080), unknown] {
                let error = TcpStream::connect(to).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
            }
            let socket = UdpSocket::bind((if family.node.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
            let refused = ErrorKind::ConnectionRefused;
            assert_eq!(socket.send_to(b"?", family.vip(10)).unwrap_err().kind(), refused);
            assert_eq!(socket.connect(family.vip(10)).unwrap_err().kind(), refused);
            assert!(begin.elapsed() < SOON, "it waited for a time-out");
        });
    }
    assert_eq!(running.drops("socket_no_endpoints"), 8);
    assert_eq!(running.drops("socket_unknown_port"), 2);
}

/// Runs a connection in the pod's namespace, in a cgroup; prints what it was told.
fn from_pod(place: &Place, cgroup: &std::path::Path) -> String {
    let program = "import socket,sys\ns=socket.create_connection(('10.43.0.10',80),2)\ns.send(b'?')\nprint(s.recv(64).decode(),s.getpeername()[0])";
    let script = format!("echo 0 > {}/cgroup.procs && exec python3 -c \"$0\"", cgroup.display());
    let output = place.pod.command("sh").unwrap().args(["-c", &script, program]).output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn a_pod_is_served_by_its_cgroup_and_strangers_are_left_alone() {
    if !require("dataplane::cgroup", &[NEEDS.as_slice(), &["python3"]].concat()) {
        return;
    }
    let place = Place::new("cg").unwrap();
    let pod = serve(&place.pod, POD, "pod");
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[pod]).unwrap();
    let inner = place.cgroup.join("burstable");
    std::fs::create_dir_all(&inner).unwrap();
    let told = from_pod(&place, &inner);
    std::fs::remove_dir(&inner).unwrap();
    assert_eq!(told, format!("pod {POD} 10.43.0.10\n"), "connected straight to the pod, which is itself");
    // A process of no node, in a namespace of no node: the packet leaves as it is, and nobody answers it.
    let other = weft_tests_harness::netns::Netns::new("st").unwrap();
    let stranger = within(&other, || ask_tcp(vip(10)));
    assert_eq!(stranger.unwrap_err().kind(), ErrorKind::NetworkUnreachable);
}
