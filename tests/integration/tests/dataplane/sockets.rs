//! The socket hooks, seen by real sockets.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Instant;

use weft_tests_harness::require;

use crate::NEEDS;
use crate::place::{GATEWAY, NODE, POD, Place, SOON, ask_tcp, ask_udp, serve, vip, within};

#[test]
fn a_process_of_the_node_reaches_services_by_every_address() {
    if !require("dataplane::sockets", &NEEDS) {
        return;
    }
    let place = Place::new("sk").unwrap();
    let pod = serve(&place.pod, POD, "pod");
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[pod]).unwrap();
    within(&place.node, || {
        let rows = [
            ("cluster address", vip(10)),
            ("NodePort at the node's address", SocketAddr::from((NODE, 30080))),
            ("NodePort at the bridge's address", SocketAddr::from((GATEWAY, 30080))),
            ("NodePort at loopback", SocketAddr::from(([127, 0, 0, 1], 30080))),
            (
                "IPv6 socket",
                SocketAddr::from((
                    vip(10).ip().to_string().parse::<std::net::Ipv4Addr>().unwrap().to_ipv6_mapped(),
                    80,
                )),
            ),
        ];
        for (name, to) in rows {
            assert_eq!(
                ask_tcp(to).map_err(|e| format!("{name}: {e}")).unwrap(),
                format!("pod {GATEWAY}"),
                "{name}"
            );
            let stream = TcpStream::connect_timeout(&to, SOON).unwrap();
            assert_eq!(stream.peer_addr().unwrap(), to, "{name}: getpeername");
        }
        for to in [vip(10), SocketAddr::from((NODE, 30080))] {
            assert_eq!(ask_udp(to).unwrap(), format!("pod {GATEWAY}"));
        }
    });
}

#[test]
fn unconnected_datagrams_come_back_from_the_service() {
    if !require("dataplane::datagrams", &NEEDS) {
        return;
    }
    let place = Place::new("dg").unwrap();
    let pod = serve(&place.pod, POD, "pod");
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[pod]).unwrap();
    running.service(11, 30081, &[pod]).unwrap();
    within(&place.node, || {
        for local in ["0.0.0.0:0", "[::]:0"] {
            let socket = UdpSocket::bind(local).unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            for last in [10, 11, 10] {
                let to = match (local, vip(last)) {
                    ("[::]:0", SocketAddr::V4(v4)) => SocketAddr::from((v4.ip().to_ipv6_mapped(), 80)),
                    (_, other) => other,
                };
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
    running.service(10, 30080, &[]).unwrap();
    within(&place.node, || {
        let begin = Instant::now();
        for to in [vip(10), SocketAddr::from((NODE, 30080)), SocketAddr::from(([10, 43, 0, 10], 81))] {
            let error = TcpStream::connect(to).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
        }
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        assert_eq!(socket.send_to(b"?", vip(10)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(socket.connect(vip(10)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert!(begin.elapsed() < SOON);
    });
    assert_eq!(running.drops("socket_no_endpoints"), 4);
    assert_eq!(running.drops("socket_unknown_port"), 1);
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
