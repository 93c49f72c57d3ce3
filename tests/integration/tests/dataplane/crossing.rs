//! The short way between pods of two nodes: into the overlay and out of it past bridge and stack, or by them, with one outcome.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use weft_agent_dataplane::node;
use weft_agent_dataplane::policy::edges::Edges;
use weft_ebpf_abi::policy::{POLICY_INGRESS, PolicyPod};
use weft_ebpf_abi::{Address, names};
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::require;
use zerocopy::IntoBytes as _;

use crate::NEEDS;
use crate::bodies::{exchange, send_back};
use crate::overlay::{bodies_get_through_a_narrow_way, overlay, repair, two_nodes};
use crate::place::{self, Running, ask_udp, serve, within};
use crate::podedge::sent;

pub(crate) const UNDERLAY: &str = "192.168.79.";
/// A bound against waiting for ever.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a datagram's answer may take that should not come.
const MOMENT: Duration = Duration::from_millis(300);
/// Datagrams of a look at counters; other packets are far fewer.
const MANY: u64 = 200;
/// Many segments of the largest size.
const BODY_BYTES: usize = 4 << 20;

/// The programs of one node, with one pod.
pub(crate) struct Side {
    pub(crate) running: Running,
    pub(crate) edges: Edges,
    pub(crate) pins: PathBuf,
    pub(crate) cgroup: PathBuf,
    _folder: tempfile::TempDir,
}

/// The addresses of the pod of a node.
pub(crate) fn pods(number: u8) -> [IpAddr; 2] {
    [format!("10.42.{number}.2"), format!("fd42:0:0:{number}::2")].map(|ip| ip.parse().unwrap())
}

impl Side {
    pub(crate) fn start(netns: &Netns) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pins = folder.path().join("bpf");
        node::ensure_bpffs(&pins).unwrap();
        let cgroup = node::cgroup2_mount().unwrap().join("weft").join(netns.name());
        let running = place::start(netns, &pins, &cgroup).unwrap();
        let edges = Edges::new(&running.programs).unwrap();
        Self { running, edges, pins, cgroup, _folder: folder }
    }

    pub(crate) fn publish(&mut self, netns: &Netns, pod: [IpAddr; 2], host_ports: &[IpAddr]) {
        let host_ports: BTreeSet<Address> = host_ports.iter().copied().map(Address::from).collect();
        within(netns, || {
            self.edges.refresh(&pod.map(Address::from)).unwrap();
            self.edges.publish(&host_ports).unwrap();
        });
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        place::remove(&self.pins, &self.cgroup);
    }
}

/// Whether a datagram with so many hops is answered.
fn reaches(to: SocketAddr, hops: u8) -> bool {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
    if to.is_ipv4() {
        socket.set_ttl(hops.into()).unwrap();
    } else {
        setsockopt(&socket, sockopt::Ipv6Ttl, &hops.into()).unwrap();
    }
    socket.set_read_timeout(Some(if hops > 2 { PATIENCE } else { MOMENT })).unwrap();
    socket.send_to(b"?", to).unwrap();
    socket.recv(&mut [0; 64]).is_ok()
}

/// A body there, and the same body back.
pub(crate) fn echo(from: &Netns, at: &Netns, address: IpAddr) {
    let listener = within(at, || TcpListener::bind((address, 0)).unwrap());
    let to = listener.local_addr().unwrap();
    let server = send_back(listener, BODY_BYTES, PATIENCE);
    within(from, || exchange(to, BODY_BYTES, PATIENCE));
    server.join().unwrap();
}

/// Packets that the first node's bridge and pod's device send while the pods ask: what comes in from the overlay by the stack.
fn by_stack(netns: &[Netns], pods: &[Netns], to: SocketAddr) -> u64 {
    let before = sent(&netns[0], "pod0") + sent(&netns[1], "pod0");
    within(&pods[0], || (0..MANY).for_each(|_| assert!(ask_udp(to).is_ok())));
    sent(&netns[0], "pod0") + sent(&netns[1], "pod0") - before
}

#[test]
fn the_short_way_and_the_long_one_are_alike() {
    if !require("dataplane::crossing", &NEEDS) {
        return;
    }
    let (netns, there) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let _overlays = [overlay(1, (&netns[0], UNDERLAY), &both), overlay(2, (&netns[1], UNDERLAY), &both)];
    let servers = pods(2).map(|pod| serve(&there[1], pod, "far"));
    let alike = || {
        for server in servers {
            within(&there[0], || {
                assert!(ask_udp(server).unwrap().starts_with("far "), "{server}");
                assert!(reaches(server, 3) && !reaches(server, 2), "{server}: two routers are on the way");
            });
            echo(&there[0], &there[1], server.ip());
        }
    };
    alike();
    assert!(by_stack(&netns, &there, servers[0]) >= 2 * MANY);
    let mut first = Side::start(&netns[0]);
    let mut second = Side::start(&netns[1]);
    first.publish(&netns[0], pods(1), &[]);
    // One node's programs, and another's stack.
    alike();
    second.publish(&netns[1], pods(2), &[]);
    alike();
    for server in servers {
        let by_stack = by_stack(&netns, &there, server);
        assert!(by_stack < MANY / 2, "{by_stack} packets went by the pods' devices");
    }
    kept_out(&first, &second, &there, servers);
}

/// What policies keep out of a pod does not get in from the overlay either.
fn kept_out(first: &Side, second: &Side, pods: &[Netns], servers: [SocketAddr; 2]) {
    let data = MapData::from_pin(second.pins.join("maps").join(names::POLICY_PODS)).unwrap();
    let mut isolated: HashMap<_, u32, [u8; size_of::<PolicyPod>()]> =
        HashMap::try_from(Map::HashMap(data)).unwrap();
    let index = second.edges.attached()[&Address::from(servers[0].ip())];
    let mut nobody = [0; size_of::<PolicyPod>()];
    nobody
        .copy_from_slice(PolicyPod { flags: POLICY_INGRESS, ingress: 7, ..PolicyPod::default() }.as_bytes());
    isolated.insert(index, nobody, 0).unwrap();
    for server in servers {
        let before = second.running.drops("policy_ingress");
        within(&pods[0], || assert!(!reaches(server, 1) && ask_udp(server).is_err()));
        assert!(second.running.drops("policy_ingress") > before, "{server}");
    }
    isolated.remove(&index).unwrap();
    within(&pods[0], || assert!(servers.iter().all(|server| ask_udp(*server).is_ok())));
    assert_eq!(first.running.drops("policy_ingress"), 0);
}

#[test]
fn what_the_stack_translates_is_left_to_it() {
    if !require("dataplane::crossing-host-ports", &[NEEDS.as_slice(), &["nft"]].concat()) {
        return;
    }
    let (netns, there) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let _overlays = [overlay(1, (&netns[0], UNDERLAY), &both), overlay(2, (&netns[1], UNDERLAY), &both)];
    let server = serve(&there[1], pods(2)[0], "far");
    let (mut first, mut second) = (Side::start(&netns[0]), Side::start(&netns[1]));
    first.publish(&netns[0], pods(1), &[]);
    second.publish(&netns[1], pods(2), &pods(2)[..1]);
    // A port of the second node, as the plugin's port mappings make it: the pod's answers must find the way back through it.
    let to = format!("dnat to {server}");
    for rule in [
        vec!["add", "table", "ip", "test"],
        vec!["add", "chain", "ip", "test", "c", "{ type nat hook prerouting priority -100 ; }"],
        vec!["add", "rule", "ip", "test", "c", "ip daddr 192.168.79.2 udp dport 8080", &to],
    ] {
        assert!(netns[1].command("nft").unwrap().args(rule).status().unwrap().success());
    }
    within(&there[0], || {
        let answer = ask_udp(SocketAddr::from(([192, 168, 79, 2], 8080))).unwrap();
        assert_eq!(answer, format!("far {}", pods(1)[0]));
    });
}

/// A connection from an address.
fn connect_from(own: IpAddr, to: SocketAddr) -> TcpStream {
    let family = if own.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::empty(), None).unwrap();
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(own, 0))).unwrap();
    let stream = TcpStream::from(socket);
    // Linux bounds connecting by the time-out for sending.
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    connect(stream.as_raw_fd(), &SockaddrStorage::from(to)).unwrap();
    stream
}

/// A process of the first node that has bound its address of the link asks a pod of the second: the way there is the overlay, the way back the
/// link, and the second node's stack must see both, or takes the answers for new flows of the pod and puts its own address on them.
#[test]
fn answers_to_a_nodes_own_address_keep_the_pods() {
    if !require("dataplane::crossing-node", &NEEDS) {
        return;
    }
    let (netns, there) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let _overlays = [overlay(1, (&netns[0], UNDERLAY), &both), overlay(2, (&netns[1], UNDERLAY), &both)];
    let mut second = Side::start(&netns[1]);
    let ranges = ["10.42.0.0/16", "fd42::/48"].map(|range| range.parse().unwrap());
    second.running.programs.set_pod_ranges(&ranges).unwrap();
    within(&netns[1], || weft_cni_netlink::masquerade::ensure(&ranges, &[]).unwrap());
    second.publish(&netns[1], pods(2), &[]);
    for (pod, own) in pods(2).into_iter().zip(["192.168.79.1", "fd79::1"]) {
        let server = serve(&there[1], pod, "far");
        let own: IpAddr = own.parse().unwrap();
        within(&netns[0], || {
            let socket = UdpSocket::bind((own, 0)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect(server).unwrap();
            let mut stream = connect_from(own, server);
            // The second answer is one of a flow that is there already.
            for _ in 0..2 {
                let mut answer = [0; 64];
                socket.send(b"?").unwrap();
                let length = socket.recv(&mut answer).unwrap();
                assert_eq!(answer[..length], *format!("far {own}").as_bytes());
                stream.write_all(b"?").unwrap();
                let length = stream.read(&mut answer).unwrap();
                assert_eq!(answer[..length], *format!("far {own}").as_bytes());
            }
        });
    }
    // Pods have the short way as before.
    let mut first = Side::start(&netns[0]);
    first.running.programs.set_pod_ranges(&ranges).unwrap();
    first.publish(&netns[0], pods(1), &[]);
    let by_stack = by_stack(&netns, &there, serve(&there[1], pods(2)[0], "near"));
    assert!(by_stack < MANY / 2, "{by_stack} packets went by the pods' devices");
}

#[test]
fn the_short_way_knows_a_narrow_one() {
    if !require("dataplane::crossing-mtu", &NEEDS) {
        return;
    }
    let (netns, there) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let mut overlay_of_first = overlay(1, (&netns[0], UNDERLAY), &both);
    let _second = overlay(2, (&netns[1], UNDERLAY), &both);
    let mut sides = [Side::start(&netns[0]), Side::start(&netns[1])];
    sides[0].publish(&netns[0], pods(1), &[]);
    sides[1].publish(&netns[1], pods(2), &[]);
    let narrow = ["-n", netns[0].name(), "route", "add", "192.168.79.2/32", "dev", "up0", "mtu", "1400"];
    repair(&mut overlay_of_first, &netns[0], "a narrow way", || ip(&narrow).unwrap());
    within(&netns[0], || {
        let devices = node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap();
        let identity = place::identity(&devices, &sides[0].cgroup).unwrap();
        let identity = overlay_of_first.describe(identity);
        assert_eq!(identity.narrowest_bytes, 1_350);
        sides[0].running.programs.configure(identity).unwrap();
    });
    bodies_get_through_a_narrow_way(&there);
}
