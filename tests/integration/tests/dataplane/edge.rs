//! The edge programs, seen by real connections: from outside, from pods that no socket hook sees, to the node itself.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use serde_json::json;
use weft_tests_harness::{require, wait_until};

use crate::NEEDS;
use crate::place::{
    CLIENT, GATEWAY, NODE, POD, Place, SOON, ask_again, ask_tcp, ask_udp, serve, vip, within,
};

#[test]
fn a_client_outside_reaches_a_pod_by_the_node_port() {
    if !require("dataplane::edge", &NEEDS) {
        return;
    }
    let place = Place::new("np").unwrap();
    let pod = serve(&place.pod, POD, "pod");
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[pod]).unwrap();
    within(&place.client, || {
        let to = SocketAddr::from((NODE, 30080));
        for _ in 0..200 {
            assert_eq!(ask_tcp(to).unwrap(), format!("pod {GATEWAY}"));
        }
        assert_eq!(ask_udp(to).unwrap(), format!("pod {GATEWAY}"));
    });
    let _ = running;
}

#[test]
fn a_large_body_crosses_the_edge() {
    if !require("dataplane::edge-large", &NEEDS) {
        return;
    }
    use std::io::{Read as _, Write as _};
    let place = Place::new("lb").unwrap();
    let listener = within(&place.pod, || std::net::TcpListener::bind((POD, 0)).unwrap());
    let pod = listener.local_addr().unwrap();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut body = vec![0; 1 << 20];
        stream.read_exact(&mut body).unwrap();
        stream.write_all(&body).unwrap();
    });
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[pod]).unwrap();
    let sent: Vec<u8> = (0..1_u32 << 20).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let received = within(&place.client, || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((NODE, 30080)), SOON).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(&sent).unwrap();
        let mut received = vec![0; sent.len()];
        stream.read_exact(&mut received).unwrap();
        received
    });
    echo.join().unwrap();
    assert!(received == sent, "the body was damaged");
}

#[test]
fn a_pod_that_no_hook_sees_reaches_itself_and_the_node() {
    if !require("dataplane::hairpin", &NEEDS) {
        return;
    }
    let place = Place::new("hp").unwrap();
    let pod = serve(&place.pod, POD, "pod");
    let host = serve(&place.node, NODE, "host");
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[pod]).unwrap();
    running.service(11, 30081, &[host]).unwrap();
    within(&place.pod, || {
        // The test's own thread is in no cgroup of the node: only the edge translates.
        assert_eq!(ask_tcp(vip(10)).unwrap(), format!("pod {GATEWAY}"), "itself, through the node");
        assert_eq!(ask_udp(vip(10)).unwrap(), format!("pod {GATEWAY}"));
        assert_eq!(ask_tcp(SocketAddr::from((GATEWAY, 30080))).unwrap(), format!("pod {GATEWAY}"));
        assert_eq!(
            ask_tcp(vip(11)).unwrap(),
            format!("host {POD}"),
            "the node itself, with the pod's address"
        );
        assert_eq!(ask_udp(vip(11)).unwrap(), format!("host {POD}"));
    });
    within(&place.client, || {
        assert_eq!(ask_tcp(SocketAddr::from((NODE, 30081))).unwrap(), format!("host {CLIENT}"));
    });
}

#[test]
fn what_has_no_endpoints_is_refused_at_once_from_outside_too() {
    if !require("dataplane::edge-refused", &NEEDS) {
        return;
    }
    let place = Place::new("er").unwrap();
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[]).unwrap();
    let begin = Instant::now();
    within(&place.client, || {
        let to = SocketAddr::from((NODE, 30080));
        assert_eq!(ask_tcp(to).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(ask_udp(to).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
    within(&place.pod, || {
        assert_eq!(ask_tcp(vip(10)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(ask_udp(vip(10)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let unknown = SocketAddr::from(([10, 43, 0, 10], 81));
        assert_eq!(ask_tcp(unknown).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
    assert!(begin.elapsed() < SOON);
    assert_eq!(running.drops("packet_no_endpoints"), 4);
    assert_eq!(running.drops("packet_unknown_port"), 1);
}

#[test]
fn a_flow_ends_with_its_backend_and_the_next_finds_another() {
    if !require("dataplane::generation", &NEEDS) {
        return;
    }
    let place = Place::new("gn").unwrap();
    let first = serve(&place.pod, POD, "first");
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[first]).unwrap();
    let to = SocketAddr::from((NODE, 30080));
    let mut stream = within(&place.client, || TcpStream::connect_timeout(&to, SOON).unwrap());
    assert!(ask_again(&mut stream).unwrap().starts_with("first"));
    let second = serve(&place.pod, POD, "second");
    running.service(10, 30080, &[second]).unwrap();
    // The reset answers the packet; the socket reports it with the read or a later write.
    let ended = wait_until("the connection is reset", SOON, || Ok(ask_again(&mut stream).err())).unwrap();
    assert!(matches!(ended.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{ended}");
    assert!(running.drops("backend_gone") >= 1);
    within(&place.client, || assert!(ask_tcp(to).unwrap().starts_with("second")));
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
    let changed = running.reconciler.tables.apply_service(&serde_json::from_value(service).unwrap());
    running.reconciler.mark(changed);
    running.sync().unwrap();
    within(&place.client, || {
        assert_eq!(ask_tcp(SocketAddr::from((NODE, 30080))).unwrap(), format!("pod {CLIENT}"));
    });
}
