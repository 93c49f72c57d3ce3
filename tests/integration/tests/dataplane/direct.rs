//! Clients outside that keep their address towards a pod of another node, which answers them past the node that they asked.
//!
//! ```text
//! client ─ router ─┬─ lan ─┬─ node 1        198.51.100.7, fd98::7    the client
//!                  │       └─ node 2 ─ pod 2, the only backend
//!                  └─ node 3
//! ```

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, SockaddrStorage, bind, connect,
    sendto, setsockopt, socket, sockopt,
};
use weft_agent_dataplane::node;
use weft_agent_dataplane::overlay::{Overlay, Ranges, Routing, mac};
use weft_ebpf_abi::policy::{POLICY_INGRESS, PolicyPod, RuleKey};
use weft_ebpf_abi::{ASKED_BYTES, MAC_ASKED, NODE_DIRECT, SERVICE_WATCHED, UDP, names};
use weft_ebpf_logic::direct;
use weft_tests_harness::netns::Netns;
use weft_tests_harness::{require, wait_until};
use zerocopy::IntoBytes as _;

use crate::NEEDS;
use crate::bodies::{exchange, send_back};
use crate::crossing::Side;
use crate::entries::{FAMILIES, Service};
use crate::frames::frame;
use crate::links::{Links, Number, address, pod, run};
use crate::place::{self, SOON, ask_again, ask_datagram, ask_tcp, ask_udp, connected_udp, serve, within};
use crate::podedge::received;

/// A bound against waiting for ever.
const PATIENCE: Duration = Duration::from_secs(10);
/// What a tunnel of IPv4 takes.
const TUNNEL_BYTES: usize = 1_450;
const BODY_BYTES: usize = 4 << 20;
const NODE_PORT: u16 = 30_080;

/// The client's addresses.
fn client_at() -> [IpAddr; 2] {
    ["198.51.100.7", "fd98::7"].map(|ip| ip.parse().unwrap())
}

/// Nodes with their programs, from the first on, and the client.
struct Place {
    links: Links,
    client: Netns,
    overlays: Vec<Overlay>,
    sides: Vec<Side>,
}

impl Place {
    fn new(nodes: Number) -> Self {
        let links = Links::new();
        let client = Netns::new("dc").unwrap();
        let (r, c) = (links.router.name(), client.name());
        within(&client, || std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")).unwrap();
        run(&format!("-n {r} link add r2 type veth peer name eth0 netns {c}"));
        for (netns, device, last) in [(r, "r2", "fe"), (c, "eth0", "7")] {
            let last4 = if last == "7" { 7 } else { 254 };
            run(&format!("-n {netns} addr add 198.51.100.{last4}/24 dev {device}"));
            run(&format!("-n {netns} addr add fd98::{last}/64 dev {device} nodad"));
            run(&format!("-n {netns} link set {device} up"));
        }
        run(&format!("-n {c} route add default via 198.51.100.254"));
        run(&format!("-n {c} route add default via fd98::fe"));
        let overlays = (1..=nodes).map(|number| links.overlay(number, Routing::Tunnel)).collect();
        let sides = (1..=nodes).map(|number| Side::start(links.node(number))).collect();
        let mut place = Self { links, client, overlays, sides };
        for number in 1..=nodes {
            place.tell(number, NODE_DIRECT);
        }
        place
    }

    /// With the pods' own programs.
    fn with_edges(nodes: Number) -> Self {
        let mut place = Self::new(nodes);
        (1..=nodes).for_each(|number| place.publish(number));
        place
    }

    fn publish(&mut self, number: Number) {
        self.sides[usize::from(number) - 1].publish(self.links.node(number), pod(number), &[]);
    }

    /// Tells a node's programs what the agent does.
    fn tell(&mut self, number: Number, flags: u16) {
        let at = usize::from(number) - 1;
        let (side, overlay) = (&mut self.sides[at], &self.overlays[at]);
        let ranges = ["10.42.0.0/16", "fd42::/16"].map(|range| range.parse().unwrap());
        side.running.programs.set_pod_ranges(&ranges).unwrap();
        let mut known = Ranges::adopt(&side.running.programs, names::DIRECT).unwrap();
        known.set(&overlay.direct()).unwrap();
        within(self.links.node(number), || {
            let devices = node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap();
            let identity = place::identity(&devices, &side.cgroup).unwrap();
            let identity = weft_ebpf_abi::NodeConfig { flags, ..identity };
            side.running.programs.configure(overlay.describe(identity)).unwrap();
        });
    }

    /// A port of the nodes that leads to these pods.
    fn service(&mut self, backends: [SocketAddr; 2], flags: u32) -> [SocketAddr; 2] {
        for side in &mut self.sides {
            for (family, backend) in FAMILIES.iter().zip(&backends) {
                let backends = std::slice::from_ref(backend);
                let service =
                    Service { last: 10, node_port: NODE_PORT, flags, backends, ..Service::default() };
                side.running.enter(family, &service).unwrap();
            }
        }
        address(1).map(|ip| SocketAddr::new(ip, NODE_PORT))
    }

    fn servers(&self) -> [SocketAddr; 2] {
        pod(2).map(|ip| serve(self.links.pod(2), ip, "far"))
    }

    /// The flow table of the second node.
    fn flow_table(&self) -> HashMap<MapData, [u8; 40], [u8; 52]> {
        let data = MapData::from_pin(self.sides[1].pins.join("maps").join(names::FLOWS)).unwrap();
        HashMap::try_from(Map::LruHashMap(data)).unwrap()
    }

    fn flows(&self) -> usize {
        self.flow_table().keys().count()
    }
}

/// What the first node's overlay has got: nothing of an answer that went straight.
fn came_back(links: &Links) -> u64 {
    received(links.node(1), "weft.vx")
}

#[test]
fn a_client_keeps_its_address_and_is_answered_by_the_other_node() {
    if !require("dataplane::direct", &NEEDS) {
        return;
    }
    let mut place = Place::new(2);
    let servers = place.servers();
    let frontends = place.service(servers, 0);
    let before = came_back(&place.links);
    // By the bridge and back by it, and then past it.
    for edges in [false, true] {
        for (to, own) in frontends.into_iter().zip(client_at()) {
            within(&place.client, || {
                for _ in 0..20 {
                    assert_eq!(ask_tcp(to).unwrap(), format!("far {own}"), "with edges: {edges}");
                    assert_eq!(ask_udp(to).unwrap(), format!("far {own}"), "with edges: {edges}");
                }
            });
        }
        place.publish(2);
    }
    assert_eq!(came_back(&place.links), before, "the answers came back through the first node");
    assert_eq!(place.sides.iter().map(|side| side.running.drops("no_route")).sum::<u64>(), 0);
}

#[test]
fn bodies_get_through_both_ways() {
    if !require("dataplane::direct-body", &NEEDS) {
        return;
    }
    let mut place = Place::with_edges(2);
    // What the first node is told of, as the answers bear its address: the pod has to hear it. The way to the client is narrow and not the link:
    // the narrow end of a pair drops what the wide one sends, and nobody is told.
    for to in client_at() {
        run(&format!("-n {} route add {to} dev r2 mtu 1400", place.links.router.name()));
    }
    let listeners = pod(2).map(|ip| within(place.links.pod(2), || TcpListener::bind((ip, 0)).unwrap()));
    let frontends = place.service([0, 1].map(|at: usize| listeners[at].local_addr().unwrap()), 0);
    for (to, listener) in frontends.into_iter().zip(listeners) {
        let server = send_back(listener, BODY_BYTES, PATIENCE);
        within(&place.client, || exchange(to, BODY_BYTES, PATIENCE));
        assert_eq!(server.join().unwrap(), client_at()[usize::from(to.is_ipv6())]);
    }
}

/// A datagram of this many bytes with its IP header, and what it is answered.
fn ask_sized(socket: &UdpSocket, packet_bytes: usize) -> String {
    let headers = if socket.peer_addr().unwrap().is_ipv4() { 28 } else { 48 };
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket.send(&vec![7; packet_bytes - headers]).unwrap();
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

#[test]
fn a_datagram_that_leaves_no_room_decides_for_its_flow() {
    if !require("dataplane::direct-large", &NEEDS) {
        return;
    }
    let mut place = Place::with_edges(2);
    let servers = place.servers();
    let frontends = place.service(servers, 0);
    let largest = TUNNEL_BYTES - usize::try_from(ASKED_BYTES).unwrap();
    for (to, own) in frontends.into_iter().zip(client_at()) {
        let bridge = if own.is_ipv4() { "far 10.42.1.1" } else { "far fd42:0:0:1::1" };
        within(&place.client, || {
            let (fits, over) = (connected_udp(to), connected_udp(to));
            for size in [largest, TUNNEL_BYTES, 100] {
                assert_eq!(ask_sized(&fits, size), format!("far {own}"), "{size} behind one that fits");
            }
            for size in [largest + 1, 100, TUNNEL_BYTES] {
                assert_eq!(ask_sized(&over, size), bridge, "{size} behind one that does not fit");
            }
        });
    }
}

#[test]
fn what_has_rules_of_its_own_is_masqueraded() {
    if !require("dataplane::direct-others", &NEEDS) {
        return;
    }
    let mut place = Place::with_edges(2);
    let servers = place.servers();
    let bridges = ["far 10.42.1.1", "far fd42:0:0:1::1"];
    let frontends = place.service(servers, SERVICE_WATCHED);
    for ((to, bridge), own) in frontends.into_iter().zip(bridges).zip(client_at()) {
        within(&place.client, || {
            assert_eq!(ask_tcp(to).unwrap(), bridge, "connections that are watched");
            assert_eq!(ask_udp(to).unwrap(), format!("far {own}"));
        });
    }
    let frontends = place.service(servers, 0);
    for (to, bridge) in frontends.into_iter().zip(bridges) {
        // The third node is in the cluster.
        within(place.links.node(3), || {
            assert_eq!(ask_tcp(to).unwrap(), bridge, "another node");
            assert_eq!(ask_udp(to).unwrap(), bridge, "another node");
        });
    }
    place.tell(1, 0);
    for (to, bridge) in frontends.into_iter().zip(bridges) {
        within(&place.client, || assert_eq!(ask_tcp(to).unwrap(), bridge, "switched off"));
    }
}

#[test]
fn flows_outlive_the_agents() {
    if !require("dataplane::direct-restart", &NEEDS) {
        return;
    }
    let mut place = Place::with_edges(2);
    let servers = place.servers();
    let frontends = place.service(servers, 0);
    let mut flows = frontends.map(|to| {
        within(&place.client, || (TcpStream::connect_timeout(&to, SOON).unwrap(), connected_udp(to)))
    });
    let mut ask = |when: &str| {
        for ((stream, datagrams), own) in flows.iter_mut().zip(client_at()) {
            assert_eq!(ask_again(stream).unwrap(), format!("far {own}"), "{when}");
            assert_eq!(ask_datagram(datagrams).unwrap(), format!("far {own}"), "{when}");
        }
    };
    ask("as it was");
    for number in [1, 2] {
        let side = &mut place.sides[usize::from(number) - 1];
        side.running = place::start(place.links.node(number), &side.pins, &side.cgroup).unwrap();
        ask("before the agent knows anything");
        place.tell(number, NODE_DIRECT);
        place.publish(number);
        ask("as it knows");
    }
}

/// A connection whose flow the pod's node has forgotten goes on: each second a packet tells.
#[test]
fn what_is_forgotten_is_learned_again() {
    if !require("dataplane::direct-forgotten", &NEEDS) {
        return;
    }
    let mut place = Place::with_edges(2);
    let servers = place.servers();
    let frontends = place.service(servers, 0);
    for (to, own) in frontends.into_iter().zip(client_at()) {
        let mut stream = within(&place.client, || TcpStream::connect_timeout(&to, SOON).unwrap());
        assert_eq!(ask_again(&mut stream).unwrap(), format!("far {own}"));
        let mut flows = place.flow_table();
        let keys: Vec<_> = flows.keys().map(Result::unwrap).collect();
        assert!(keys.len() >= 2, "both directions of the flow");
        keys.iter().for_each(|key| flows.remove(key).unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"?").unwrap();
        let mut answer = [0; 64];
        let length = stream.read(&mut answer).unwrap();
        assert_eq!(answer[..length], *format!("far {own}").as_bytes());
    }
}

#[test]
fn what_nobody_listens_for_is_refused_as_from_the_frontend() {
    if !require("dataplane::direct-refused", &NEEDS) {
        return;
    }
    let mut place = Place::with_edges(2);
    let nobody = pod(2).map(|ip| SocketAddr::new(ip, 9));
    let frontends = place.service(nobody, 0);
    for to in frontends {
        within(&place.client, || {
            assert_eq!(ask_tcp(to).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
            assert_eq!(ask_udp(to).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
        });
    }
}

#[test]
fn two_nodes_may_hand_on_one_port_of_a_client() {
    if !require("dataplane::direct-two", &NEEDS) {
        return;
    }
    let mut place = Place::with_edges(3);
    let servers = place.servers();
    place.service(servers, 0);
    for (at, own) in client_at().into_iter().enumerate() {
        within(&place.client, || {
            let socket = UdpSocket::bind((own, 0)).unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            // The second node has the pod itself, and its own address to show it.
            let expected = [(1, true), (3, true), (2, false)];
            for (number, kept) in expected.into_iter().chain(expected) {
                let to = SocketAddr::new(address(number)[at], NODE_PORT);
                socket.send_to(b"?", to).unwrap();
                let mut answer = [0; 64];
                let (length, from) = socket.recv_from(&mut answer).unwrap();
                assert_eq!(from, to);
                let says = std::str::from_utf8(&answer[..length]).unwrap();
                assert_eq!(says == format!("far {own}"), kept, "by node {number}: {says}");
            }
        });
        // Streams of one port, too.
        let mut streams = within(&place.client, || one_port(own, [1, 3].map(|number| address(number)[at])));
        for at in [0, 1, 0, 1] {
            assert_eq!(ask_again(&mut streams[at]).unwrap(), format!("far {own}"));
        }
    }
}

/// Connections from one port of a client to the port of two nodes.
fn one_port(own: IpAddr, nodes: [IpAddr; 2]) -> [TcpStream; 2] {
    let mut port = 0;
    nodes.map(|node| {
        let family = if own.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket = socket(family, SockType::Stream, SockFlag::empty(), None).unwrap();
        setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
        bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(own, port))).unwrap();
        let stream = TcpStream::from(socket);
        // Linux bounds connecting by the time-out for sending.
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        connect(stream.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(node, NODE_PORT))).unwrap();
        port = stream.local_addr().unwrap().port();
        stream
    })
}

/// Whoever is kept out by policies of the pod's node is known by his own address.
#[test]
fn policies_see_the_client() {
    if !require("dataplane::direct-policy", &NEEDS) {
        return;
    }
    let mut place = Place::with_edges(2);
    let servers = place.servers();
    let frontends = place.service(servers, 0);
    let maps = place.sides[1].pins.join("maps");
    let data = MapData::from_pin(maps.join(names::POLICY_PODS)).unwrap();
    let mut isolated: HashMap<_, u32, [u8; size_of::<PolicyPod>()]> =
        HashMap::try_from(Map::HashMap(data)).unwrap();
    let data = MapData::from_pin(maps.join(names::IDENTITIES)).unwrap();
    let mut identities: HashMap<_, [u8; 16], u64> = HashMap::try_from(Map::HashMap(data)).unwrap();
    let data = MapData::from_pin(maps.join(names::RULES)).unwrap();
    let mut rules: LpmTrie<_, [u8; 20], u32> = LpmTrie::try_from(Map::LpmTrie(data)).unwrap();
    let rule = RuleKey::new(7, 8, None, None);
    let mut bytes = [0; 20];
    bytes.copy_from_slice(rule.data.as_bytes());
    rules.insert(&Key::new(rule.prefix_bits, bytes), 1, 0).unwrap();
    let index = place.sides[1].edges.attached()[&servers[0].ip().into()];
    let mut pod = [0; size_of::<PolicyPod>()];
    pod.copy_from_slice(PolicyPod { flags: POLICY_INGRESS, ingress: 7, ..PolicyPod::default() }.as_bytes());
    isolated.insert(index, pod, 0).unwrap();
    for (to, own) in frontends.into_iter().zip(client_at()) {
        let before = place.sides[1].running.drops("policy_ingress");
        within(&place.client, || assert_eq!(ask_udp(to).unwrap_err().kind(), ErrorKind::WouldBlock));
        assert_eq!(place.sides[1].running.drops("policy_ingress"), before + 1);
        identities.insert(weft_ebpf_abi::Address::from(own).0, 8, 0).unwrap();
        within(&place.client, || {
            assert_eq!(ask_udp(to).unwrap(), format!("far {own}"));
            assert_eq!(ask_tcp(to).unwrap(), format!("far {own}"));
        });
    }
}

#[test]
fn fragments_follow_the_first() {
    if !require("dataplane::direct-fragments", &NEEDS) {
        return;
    }
    let mut place = Place::with_edges(2);
    let servers = place.servers();
    let frontends = place.service(servers, 0);
    for (to, own) in frontends.into_iter().zip(client_at()) {
        within(&place.client, || {
            let socket = connected_udp(to);
            assert_eq!(ask_datagram(&socket).unwrap(), format!("far {own}"));
            socket.set_read_timeout(Some(SOON / 4)).unwrap();
            let answered = |socket: &UdpSocket| {
                socket.send(&[7; 3_000]).ok()?;
                let mut answer = [0; 64];
                let length = socket.recv(&mut answer).ok()?;
                Some(String::from_utf8_lossy(&answer[..length]).into_owned())
            };
            // The first ones are cut for the client's own link, and too large for the tunnel: it is told.
            let answer =
                wait_until("the client knows how to cut", PATIENCE, || Ok(answered(&socket))).unwrap();
            assert_eq!(answer, format!("far {own}"));
        });
    }
}

/// A frame as the first node makes it for the overlay: a client's datagram to a pod of the second, with what it asked for.
fn told(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut frame = frame(UDP, from, to, 0);
    let [[_, _, a, b, c, d], [_, _, e, f, g, h]] = [2, 1].map(|number| mac(address(number)[0]).0);
    frame[..12].copy_from_slice(&[2, 0x77, a, b, c, d, 2 | MAC_ASKED, 0x77, e, f, g, h]);
    let key = weft_ebpf_abi::FlowKey {
        source: from.ip().into(),
        destination: IpAddr::from([203, 0, 113, 66]).into(),
        source_port: weft_ebpf_abi::Port::new(from.port()),
        destination_port: weft_ebpf_abi::Port::new(53),
        protocol: UDP,
        pad: [0; 3],
    };
    frame.extend_from_slice(direct::asked(&key).as_bytes());
    frame
}

fn send_frame(netns: &Netns, device: &str, bytes: &[u8]) {
    within(netns, || {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).unwrap();
        let index = nix::net::if_::if_nametoindex(device).unwrap();
        // SAFETY: all zeros are a valid address of this kind, which is as long as it says.
        let to = unsafe {
            let mut to: nix::libc::sockaddr_ll = std::mem::zeroed();
            to.sll_family = u16::try_from(nix::libc::AF_PACKET).unwrap();
            to.sll_ifindex = i32::try_from(index).unwrap();
            let size = u32::try_from(size_of_val(&to)).unwrap();
            <LinkAddr as SockaddrLike>::from_raw((&raw const to).cast(), Some(size)).unwrap()
        };
        sendto(socket.as_raw_fd(), bytes, &to, MsgFlags::empty()).unwrap();
    });
}

#[test]
fn a_pod_cannot_say_what_a_client_asked_for() {
    if !require("dataplane::direct-smuggled", &NEEDS) {
        return;
    }
    let place = Place::with_edges(2);
    let server = place.servers()[0];
    let own = SocketAddr::new(pod(1)[0], 5_000);
    let foreign = SocketAddr::new(client_at()[0], 5_000);
    let heard = || received(place.links.node(2), "weft.vx");
    for from in [own, foreign] {
        let mut frame = told(from, server);
        let before = heard();
        // To the router, as the pod's kernel would; its own hardware address says what the first node's would.
        frame[..6].copy_from_slice(&router_mac(place.links.node(1)));
        send_frame(place.links.pod(1), "eth0", &frame);
        wait_until("the frame is there", PATIENCE, || Ok((heard() > before).then_some(()))).unwrap();
        assert_eq!(place.flows(), 0, "from {from}");
    }
    // The same from the node itself is believed.
    send_frame(place.links.node(1), "weft.vx", &told(foreign, server));
    wait_until("a flow is there", PATIENCE, || Ok((place.flows() == 2).then_some(()))).unwrap();
}

fn router_mac(node: &Netns) -> [u8; 6] {
    within(node, || weft_cni_netlink::Netlink::open().unwrap().link("weft0").unwrap().mac.unwrap().0)
}
