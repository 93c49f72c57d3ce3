//! Sockets of SCTP, where the kernel has them: one-to-one ones, which are read and written as TCP's are.

use std::io::{Error, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::sockopt::{Ipv6V6Only, SendTimeout};
use nix::sys::socket::{Backlog, SockaddrStorage, bind, connect, listen, setsockopt};
use nix::sys::time::TimeVal;
use weft_cni_netlink::hostport::{self, HostPort};
use weft_cni_netlink::{Offloads, masquerade};
use weft_ebpf_abi::{SCTP, SERVICE_KEEP_SOURCE};
use weft_tests_harness::netns::ip;
use weft_tests_harness::require;

use crate::NEEDS;
use crate::bodies::{exchange_over, send_back};
use crate::crossing::{Side, UNDERLAY, pods};
use crate::entries::{FAMILIES, Family, Service};
use crate::overlay::{overlay, two_nodes};
use crate::place::{Place, within};
use crate::podedge;

/// A bound against waiting for ever.
const PATIENCE: Duration = Duration::from_secs(20);
const BODY_BYTES: usize = 300_000;

/// A socket for addresses of `like`'s family, and for no other: an association names all addresses that its socket has.
fn socket(like: SocketAddr) -> OwnedFd {
    let family = if like.is_ipv4() { nix::libc::AF_INET } else { nix::libc::AF_INET6 };
    let kind = nix::libc::SOCK_STREAM | nix::libc::SOCK_CLOEXEC;
    // SAFETY: a call with numbers.
    let fd = unsafe { nix::libc::socket(family, kind, nix::libc::IPPROTO_SCTP) };
    assert!(fd >= 0, "{}", Error::last_os_error());
    // SAFETY: it was just opened, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if like.is_ipv6() {
        setsockopt(&fd, Ipv6V6Only, &true).unwrap();
    }
    // It bounds how long a connection may take.
    setsockopt(&fd, SendTimeout, &TimeVal::new(PATIENCE.as_secs().cast_signed(), 0)).unwrap();
    fd
}

fn listener(at: SocketAddr) -> TcpListener {
    let fd = socket(at);
    bind(fd.as_raw_fd(), &SockaddrStorage::from(at)).unwrap();
    listen(&fd, Backlog::new(8).unwrap()).unwrap();
    TcpListener::from(fd)
}

fn associate(to: SocketAddr) -> std::io::Result<TcpStream> {
    let fd = socket(to);
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(TcpStream::from(fd))
}

/// A body to a Service and back; answers as whom the endpoint saw its client.
fn ask(server: &TcpListener, to: SocketAddr) -> IpAddr {
    let server = send_back(server.try_clone().unwrap(), BODY_BYTES, PATIENCE);
    exchange_over(associate(to).unwrap(), BODY_BYTES, PATIENCE);
    server.join().unwrap()
}

/// Who finishes a checksum: nobody, as pairs of devices don't lose anything; the node's devices; the sockets.
fn finish(place: &Place, who: &str) {
    let set = |netns, devices: &[&str]| {
        within(netns, || {
            for device in devices {
                Offloads::open().unwrap().finish_checksums(device, false).unwrap();
            }
        });
    };
    match who {
        "the node" => set(&place.node, &["up0", "pod0", "pod1"]),
        "the sockets" => [&place.client, &place.pod].into_iter().for_each(|netns| set(netns, &["eth0"])),
        _ => {}
    }
}

#[test]
fn associations_carry_bodies_both_ways_and_close() {
    if !require("dataplane::sctp-sockets", &[NEEDS.as_slice(), &["sctp"]].concat()) {
        return;
    }
    let (place, second, mut running) = podedge::set_up("sk");
    let all: Vec<IpAddr> = FAMILIES.iter().flat_map(|f| [f.pod, podedge::other(f)]).collect();
    let _edges = podedge::edges(&place, &running, &all);
    let node = place.node.name();
    for family in FAMILIES {
        // What the node asks for leaves by some way; here, the one to the client.
        ip(&["-n", node, "route", "add", "default", "via", &family.client.to_string()]).unwrap();
    }
    for who in ["nobody", "the node", "the sockets"] {
        finish(&place, who);
        for family in FAMILIES {
            let pod = SocketAddr::new(family.pod, 8080);
            let server = within(&place.pod, || listener(pod));
            running.plain(&family, 10, 30080, &[pod]).unwrap();
            running.plain(&family, 11, 30081, &[]).unwrap();
            let kept = Service {
                last: 12,
                node_port: 30082,
                flags: SERVICE_KEEP_SOURCE,
                backends: &[pod],
                ..Service::default()
            };
            running.enter(&family, &kept).unwrap();
            let other = podedge::other(&family);
            let ways = [
                ("a NodePort from outside", &place.client, family.at_node(30080), family.gateway),
                ("one that keeps the client's address", &place.client, family.at_node(30082), family.client),
                ("a cluster address from a pod", &second, family.vip(10), other),
                ("the pod itself by it", &place.pod, family.vip(10), family.gateway),
                ("the node itself", &place.node, family.vip(10), family.gateway),
                ("the pod without a Service", &second, pod, other),
            ];
            for (way, netns, to, seen) in ways {
                // Again: the first association has closed, and its ports with it.
                for _ in 0..2 {
                    assert_eq!(within(netns, || ask(&server, to)), seen, "{way}, {who} finishes checksums");
                }
            }
            let nothing = [
                (&place.client, family.at_node(30081)),
                (&second, family.vip(11)),
                (&place.node, family.vip(11)),
            ];
            for (netns, to) in nothing {
                let refused = within(netns, || associate(to)).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{to}, {who} finishes checksums");
            }
        }
    }
}

#[test]
fn an_association_ends_with_its_backend() {
    if !require("dataplane::sctp-ends", &[NEEDS.as_slice(), &["sctp"]].concat()) {
        return;
    }
    let place = Place::new("sd").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        use std::io::{Read as _, Write as _};

        let pod = SocketAddr::new(family.pod, 8080);
        let server = within(&place.pod, || listener(pod));
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        let mut client = within(&place.client, || associate(family.at_node(30080))).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut taken, _) = server.accept().unwrap();
        taken.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"?").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(taken.read(&mut buffer).unwrap(), 1);
        running.withdraw(pod).unwrap();
        // The message is answered with an ABORT.
        client.write_all(b"?").unwrap();
        assert_eq!(client.read(&mut buffer).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn associations_cross_the_overlay() {
    if !require("dataplane::sctp-overlay", &[NEEDS.as_slice(), &["sctp"]].concat()) {
        return;
    }
    let (netns, there) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let _overlays = [overlay(1, (&netns[0], UNDERLAY), &both), overlay(2, (&netns[1], UNDERLAY), &both)];
    let mut sides = [Side::start(&netns[0]), Side::start(&netns[1])];
    let far = |family: &Family| SocketAddr::new(pods(2)[usize::from(family.pod.is_ipv6())], 8080);
    let servers = FAMILIES.map(|family| within(&there[1], || listener(far(&family))));
    for family in FAMILIES {
        sides[0].running.plain(&family, 10, 30080, &[far(&family)]).unwrap();
    }
    for with_edges in [false, true] {
        if with_edges {
            for (n, side) in (1_u8..).zip(&mut sides) {
                side.publish(&netns[usize::from(n) - 1], pods(n), &[]);
            }
        }
        for (family, server) in FAMILIES.iter().zip(&servers) {
            let own = pods(1)[usize::from(family.pod.is_ipv6())];
            let seen = within(&there[0], || ask(server, family.vip(10)));
            assert_eq!(seen, own, "the client keeps its address; programs at the pods' edges: {with_edges}");
        }
    }
}

/// What no program of ours does: netfilter's rules are for every protocol that has ports.
#[test]
fn host_ports_lead_to_a_pod_and_pods_leave_by_their_nodes_address() {
    if !require("dataplane::sctp-netfilter", &[NEEDS.as_slice(), &["sctp"]].concat()) {
        return;
    }
    let place = Place::new("sh").unwrap();
    let _running = place.start().unwrap();
    within(&place.node, || {
        let pod = |family: Family| family.pod;
        let port = |pod| HostPort { host: None, port: 7_000, protocol: SCTP, pod, pod_port: 8_080 };
        hostport::add(&FAMILIES.map(pod).map(port), weft_agent_dataplane::BRIDGE).unwrap();
        masquerade::ensure(&["10.42.0.0/16", "fd42::/56"].map(|range| range.parse().unwrap()), &[]).unwrap();
    });
    for family in FAMILIES {
        let server = within(&place.pod, || listener(SocketAddr::new(family.pod, 8_080)));
        assert_eq!(within(&place.client, || ask(&server, family.at_node(7_000))), family.client);
        let outside = SocketAddr::new(family.client, 9_000);
        let server = within(&place.client, || listener(outside));
        assert_eq!(within(&place.pod, || ask(&server, outside)), family.node);
    }
}
