//! Packets of a tunnel that a pod makes up: what is within would get past every policy, from whomever it says.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use weft_agent_dataplane::overlay::{PORT, VNI};
use weft_agent_dataplane::{BRIDGE, OVERLAY};
use weft_cni_netlink::{Netlink, guard, masquerade};
use weft_ebpf_abi::UDP;
use weft_tests_harness::netns::Netns;
use weft_tests_harness::require;

use crate::NEEDS;
use crate::crossing::{UNDERLAY, pods};
use crate::frames;
use crate::overlay::{overlay, two_nodes};
use crate::place::within;

/// How long what should not come is waited for.
const MOMENT: Duration = Duration::from_millis(300);
/// A pod of no node.
const NOBODY: &str = "10.42.7.7:9";

/// Whether a pod's own datagram to an address of a node and the tunnels' port gets what it carries to a socket.
fn carried(sender: &Netns, node: (&Netns, IpAddr), victim: &UdpSocket) -> bool {
    let mac = within(node.0, || Netlink::open().unwrap().link(OVERLAY).unwrap().mac.unwrap());
    let mut forged = [&[8, 0, 0, 0][..], &(VNI << 8).to_be_bytes()].concat();
    let mut inner = frames::frame(UDP, NOBODY.parse().unwrap(), victim.local_addr().unwrap(), 0);
    inner[..6].copy_from_slice(&mac.0);
    forged.extend(inner);
    within(sender, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(&forged, SocketAddr::new(node.1, PORT)).unwrap();
    });
    match victim.recv_from(&mut [0; 256]) {
        Ok((_, from)) => {
            assert_eq!(from, NOBODY.parse().unwrap());
            true
        }
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
            false
        }
    }
}

fn listen(netns: &Netns, address: IpAddr, port: u16) -> UdpSocket {
    within(netns, || {
        let socket = UdpSocket::bind((address, port)).unwrap();
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        socket
    })
}

#[test]
fn a_pod_can_not_speak_as_a_node() {
    if !require("dataplane::forged", &NEEDS) {
        return;
    }
    let (netns, there) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let _overlays = [overlay(1, (&netns[0], UNDERLAY), &both), overlay(2, (&netns[1], UNDERLAY), &both)];
    let ranges = ["10.42.0.0/16", "fd42::/48"].map(|range| range.parse().unwrap());
    within(&netns[0], || masquerade::ensure(&ranges, &[]).unwrap());
    let address = |number: u8| format!("{UNDERLAY}{number}").parse::<IpAddr>().unwrap();
    let gateway = |number: u8| format!("10.42.{number}.1").parse::<IpAddr>().unwrap();
    let ends = [(0, address(1)), (1, address(2)), (0, gateway(1)), (1, gateway(2))];
    let victims = [listen(&there[0], pods(1)[0], 0), listen(&there[1], pods(2)[0], 0)];
    let got = || ends.map(|(at, end): (usize, _)| carried(&there[0], (&netns[at], end), &victims[at]));
    // The kernel asks nobody who sends it: to the pod's own node, and by its masquerade to another as if from the node. The bridges' addresses
    // are nodes' too, and another's is reached by the overlay.
    assert_eq!(got(), [true; 4], "what the guard is for");
    let guarded = |node: usize| within(&netns[node], || guard::ensure(BRIDGE, &ranges, PORT).unwrap());
    guarded(0);
    assert_eq!(got(), [false, false, false, true], "the other node's bridge is the other node's to guard");
    guarded(1);
    assert_eq!(got(), [false; 4]);
    // Among pods it is a port as any other.
    let server = listen(&there[1], pods(2)[0], PORT);
    within(&there[0], || {
        UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"?", server.local_addr().unwrap()).unwrap()
    });
    assert_eq!(server.recv_from(&mut [0; 8]).unwrap().0, 1);
    netns.iter().for_each(|node| within(node, || guard::remove().unwrap()));
    assert_eq!(got(), [true; 4]);
}
