//! What is about a flow but not of it: ICMP errors of the kernel's own making, and datagrams in fragments.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;

use weft_cni_netlink::Offloads;
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::{require, wait_until};

use crate::NEEDS;
use crate::entries::{FAMILIES, Family};
use crate::place::{Place, SOON, ask_datagram, connected_udp, within};

/// More than fits in a socket's buffers at once.
const BODY_BYTES: usize = 1 << 20;

/// A port of `address` where nothing listens.
fn closed(netns: &Netns, address: IpAddr) -> SocketAddr {
    within(netns, || UdpSocket::bind((address, 0)).unwrap().local_addr().unwrap())
}

#[test]
fn a_client_learns_that_a_backends_port_is_closed() {
    if !require("dataplane::errors-closed", &NEEDS) {
        return;
    }
    let place = Place::new("ec").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[closed(&place.pod, family.pod)]).unwrap();
        running.plain(&family, 11, 30081, &[closed(&place.node, family.node)]).unwrap();
        for (name, to) in [("a pod's", family.at_node(30080)), ("the node's own", family.at_node(30081))] {
            let socket = within(&place.client, || connected_udp(to));
            assert_eq!(ask_datagram(&socket).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{name}");
        }
    }
}

/// Echoes datagrams of any size.
fn echo(netns: &Netns, address: IpAddr) -> SocketAddr {
    let socket = within(netns, || UdpSocket::bind((address, 0)).unwrap());
    let at = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((count, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..count], from);
        }
    });
    at
}

fn ask_large(socket: &UdpSocket, bytes: usize) -> std::io::Result<()> {
    let sent: Vec<u8> = (0..bytes).map(|i| u8::try_from(i % 251).unwrap()).collect();
    socket.set_read_timeout(Some(SOON / 2))?;
    socket.send(&sent)?;
    let mut received = vec![0; 65_536];
    let count = socket.recv(&mut received)?;
    assert!(received[..count] == sent, "the datagram was damaged");
    Ok(())
}

#[test]
fn datagrams_in_fragments_cross_the_edge() {
    if !require("dataplane::errors-fragments", &NEEDS) {
        return;
    }
    let place = Place::new("ef").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[echo(&place.pod, family.pod)]).unwrap();
        running.plain(&family, 11, 30081, &[echo(&place.node, family.node)]).unwrap();
        for to in [family.at_node(30080), family.at_node(30081)] {
            let socket = within(&place.client, || connected_udp(to));
            for bytes in [1, 1_400, 1_473, 4_000, 30_000] {
                ask_large(&socket, bytes).unwrap_or_else(|e| panic!("{to}, {bytes} bytes: {e}"));
            }
        }
        // Through the pods' bridge, back to the pod that asks.
        let socket = within(&place.pod, || connected_udp(family.vip(10)));
        ask_large(&socket, 4_000).unwrap();
    }
}

/// A namespace behind the pod, on a link that takes less than the others, reached through the pod.
fn behind_the_pod(place: &Place) -> Netns {
    let far = Netns::new("fr").unwrap();
    let (n, p, f) = (place.node.name(), place.pod.name(), far.name());
    let commands = [
        format!("-n {p} link add far0 mtu 1300 type veth peer name eth0 mtu 1300 netns {f}"),
        format!("-n {p} addr add 10.99.0.1/24 dev far0"),
        format!("-n {p} addr add fd99::1/64 dev far0 nodad"),
        format!("-n {p} link set far0 up"),
        format!("-n {f} addr add 10.99.0.2/24 dev eth0"),
        format!("-n {f} addr add fd99::2/64 dev eth0 nodad"),
        format!("-n {f} link set eth0 up"),
        format!("-n {f} route add default via 10.99.0.1"),
        format!("-n {f} route add default via fd99::1"),
        format!("-n {n} route add 10.99.0.0/24 via {}", crate::place::POD),
        format!("-n {n} route add fd99::/64 via {}", crate::place::POD6),
    ];
    for command in &commands {
        ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
    }
    within(&place.pod, || {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    });
    far
}

/// What a connected socket takes for the path's MTU.
fn path_mtu(socket: &UdpSocket, family: &Family) -> i32 {
    let (level, name) = match family.node {
        IpAddr::V4(_) => (nix::libc::IPPROTO_IP, nix::libc::IP_MTU),
        IpAddr::V6(_) => (nix::libc::IPPROTO_IPV6, nix::libc::IPV6_MTU),
    };
    let (mut value, mut length) = (0_i32, 4_u32);
    // SAFETY: value and length are valid for the option, an int.
    let result = unsafe {
        nix::libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    value
}

#[test]
fn a_client_learns_of_a_narrow_link_behind_the_edge() {
    if !require("dataplane::errors-mtu", &NEEDS) {
        return;
    }
    let place = Place::new("em").unwrap();
    let far = behind_the_pod(&place);
    let mut running = place.start().unwrap();
    for (family, address) in FAMILIES.into_iter().zip(["10.99.0.2", "fd99::2"]) {
        running.plain(&family, 10, 30080, &[echo(&far, address.parse().unwrap())]).unwrap();
        let socket = within(&place.client, || connected_udp(family.at_node(30080)));
        ask_large(&socket, 1_000).unwrap();
        assert_eq!(path_mtu(&socket, &family), 1_500);
        let large = || ask_large(&socket, 1_440);
        wait_until("the datagram gets through in fragments", SOON * 3, || Ok(large().ok())).unwrap();
        assert_eq!(path_mtu(&socket, &family), 1_300, "the router's word reached the client");
    }
}

/// A place whose pods' side is narrower than the link to the client, as behind an overlay; whose devices finish checksums, or leave that to
/// the kernel, which does it as a packet leaves. Else a pair of devices passes them on as they are.
fn narrow_place(label: &str, finishes: bool) -> Place {
    let place = Place::new(label).unwrap();
    for device in ["weft0", "pod0"] {
        ip(&["-n", place.node.name(), "link", "set", device, "mtu", "1350"]).unwrap();
    }
    within(&place.node, || Offloads::open().unwrap().finish_checksums("up0", finishes).unwrap());
    place
}

#[test]
fn the_edge_tells_what_fits_where_the_stack_can_not() {
    if !require("dataplane::errors-too-big", &NEEDS) {
        return;
    }
    for finishes in [true, false] {
        tells_what_fits(finishes);
    }
}

fn tells_what_fits(finishes: bool) {
    let place = narrow_place("eb", finishes);
    ip(&["-n", place.pod.name(), "link", "set", "eth0", "mtu", "1350"]).unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[echo(&place.pod, family.pod)]).unwrap();
        let socket = within(&place.client, || connected_udp(family.at_node(30080)));
        ask_large(&socket, 1_440).unwrap_err();
        assert_eq!(path_mtu(&socket, &family), 1_350);
        ask_large(&socket, 1_440).unwrap();
        ask_large(&socket, 4_000).unwrap();
        // A datagram whose first fragment is too big; another address, so that nothing is known of the path yet.
        let socket = within(&place.client, || connected_udp(family.vip(10)));
        ask_large(&socket, 4_000).unwrap_err();
        ask_large(&socket, 4_000).unwrap();
    }
    assert_eq!(running.drops("packet_too_big"), 4);
}

#[test]
fn a_connection_learns_what_fits() {
    if !require("dataplane::errors-too-big-tcp", &NEEDS) {
        return;
    }
    for finishes in [true, false] {
        // The pod doesn't know, and takes segments that its link doesn't.
        let place = narrow_place("et", finishes);
        let mut running = place.start().unwrap();
        for family in FAMILIES {
            let listener = within(&place.pod, || TcpListener::bind((family.pod, 0)).unwrap());
            running.plain(&family, 10, 30080, &[listener.local_addr().unwrap()]).unwrap();
            let taken = std::thread::spawn(move || take(&listener));
            within(&place.client, || {
                let mut stream = TcpStream::connect_timeout(&family.at_node(30080), SOON).unwrap();
                stream.set_write_timeout(Some(SOON)).unwrap();
                stream.write_all(&vec![7; BODY_BYTES]).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                stream.set_read_timeout(Some(SOON)).unwrap();
                let mut said = String::new();
                stream.read_to_string(&mut said).unwrap();
                assert_eq!(said, BODY_BYTES.to_string(), "{}", family.pod);
            });
            taken.join().unwrap();
        }
        assert!(running.drops("packet_too_big") >= 2);
    }
}

/// Takes what comes over one connection, and says how much it was.
fn take(listener: &TcpListener) {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let count = std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
    stream.write_all(count.to_string().as_bytes()).unwrap();
}
