//! The pods' edges: Services that no socket hook saw, and the short way between pods of one node.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};

use aya::maps::{HashMap, Map, MapData};
use weft_agent_dataplane::policy::edges::Edges;
use weft_cni_netlink::{Class, Netlink, Shape};
use weft_ebpf_abi::policy::{POLICY_INGRESS, PolicyPod};
use weft_ebpf_abi::{Address, LocalPod, NAT_PORT_FIRST, TCP, UDP, names};
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::require;
use zerocopy::IntoBytes as _;

use crate::NEEDS;
use crate::entries::{FAMILIES, Family};
use crate::frames::{ACK, SYN, frame, read_frame};
use crate::packets::{DROP, REDIRECT, run_program};
use crate::place::{
    GATEWAY, GATEWAY6, POD, Place, Running, SOON, ask_again, ask_tcp, ask_udp, connected_udp, hook_pins,
    serve, within,
};

/// The other pod's addresses.
const OTHER: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 42, 0, 3)), IpAddr::V6(Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 3))];
/// TCX_NEXT.
const NEXT: u32 = u32::MAX;
/// Datagrams of a look at counters; other packets are far fewer.
const MANY: u64 = 200;

/// The place with a second pod, and Services' programs at work.
pub(crate) fn set_up(label: &str) -> (Place, Netns, Running) {
    let place = Place::new(label).unwrap();
    let other = Netns::new(label).unwrap();
    let (n, o) = (place.node.name(), other.name());
    for command in [
        format!("-n {n} link add pod1 type veth peer name eth0 netns {o}"),
        format!("-n {n} link set pod1 master weft0 up"),
        format!("-n {o} addr add {}/24 dev eth0", OTHER[0]),
        format!("-n {o} addr add {}/64 dev eth0 nodad", OTHER[1]),
        format!("-n {o} link set eth0 up"),
        format!("-n {o} route add default via {GATEWAY}"),
        format!("-n {o} route add default via {GATEWAY6}"),
        // A bridge refuses what would leave by the port that it came in by.
        format!("-n {n} link set pod0 type bridge_slave hairpin on"),
    ] {
        ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let running = place.start().unwrap();
    (place, other, running)
}

pub(crate) fn other(family: &Family) -> IpAddr {
    OTHER[usize::from(family.pod.is_ipv6())]
}

/// Puts programs at the edges of the pods with these addresses.
pub(crate) fn edges(place: &Place, running: &Running, addresses: &[IpAddr]) -> Edges {
    let mut edges = Edges::new(&running.programs).unwrap();
    take_in(place, &mut edges, addresses);
    edges
}

fn take_in(place: &Place, edges: &mut Edges, addresses: &[IpAddr]) {
    let wanted: Vec<Address> = addresses.iter().copied().map(Address::from).collect();
    within(&place.node, || {
        edges.refresh(&wanted).unwrap();
        edges.publish(&BTreeSet::new()).unwrap();
    });
    assert!(wanted.iter().all(|address| edges.attached().contains_key(address)));
}

/// Packets that a device has sent.
pub(crate) fn sent(netns: &Netns, device: &str) -> u64 {
    packets(netns, device, "tx")
}

/// Packets that a device of a namespace has received.
pub(crate) fn received(netns: &Netns, device: &str) -> u64 {
    packets(netns, device, "rx")
}

fn packets(netns: &Netns, device: &str, direction: &str) -> u64 {
    let output = std::process::Command::new("ip")
        .args(["-j", "-s", "-n", netns.name(), "link", "show", "dev", device])
        .output()
        .unwrap();
    let links: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    links[0]["stats64"][direction]["packets"].as_u64().unwrap()
}

#[test]
fn a_pod_that_comes_and_goes_makes_no_link() {
    if !require("dataplane::podedge-filters", &NEEDS) {
        return;
    }
    let (place, client, running) = set_up("pf");
    let mut edges = edges(&place, &running, &[POD.into(), OTHER[0]]);
    let pins = hook_pins(&place.pins, "pod_");
    assert_eq!(pins.len(), 6, "{pins:?}");
    assert!(pins.iter().all(|pin| pin.contains("-filter")), "{pins:?}");
    ip(&["-n", place.node.name(), "link", "del", "pod1"]).unwrap();
    take_in(&place, &mut edges, &[POD.into()]);
    let rest = hook_pins(&place.pins, "pod_");
    assert!(rest.is_subset(&pins) && rest.len() == 3, "{rest:?}");
    drop(client);
}

#[test]
fn unhooked_clients_keep_their_address_on_their_own_node() {
    if !require("dataplane::podedge-kept", &NEEDS) {
        return;
    }
    let (place, client, mut running) = set_up("pk");
    let all: Vec<IpAddr> = FAMILIES.iter().flat_map(|f| [f.pod, other(f)]).collect();
    let _edges = edges(&place, &running, &all);
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        let nobody = SocketAddr::new(family.pod, 9);
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        running.plain(&family, 11, 30081, &[nobody]).unwrap();
        let kept = format!("pod {}", other(&family));
        within(&client, || {
            for to in [pod, family.vip(10), family.at_node(30080), pod] {
                for _ in 0..20 {
                    assert_eq!(ask_tcp(to).unwrap(), kept, "{to}");
                    assert_eq!(ask_udp(to).unwrap(), kept, "{to}");
                }
            }
            one_port_many_ways(other(&family), &[pod, family.vip(10), family.at_node(30080)], &kept);
            // The pod's ICMP error comes back as the Service's.
            let socket = connected_udp(family.vip(11));
            socket.set_read_timeout(Some(SOON)).unwrap();
            socket.send(b"?").unwrap();
            let refused = socket.recv(&mut [0; 8]).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
            assert_eq!(ask_tcp(family.vip(11)).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        });
        within(&place.pod, || {
            let by_node = format!("pod {}", family.gateway);
            assert_eq!(ask_tcp(family.vip(10)).unwrap(), by_node, "itself, by the node");
            assert_eq!(ask_udp(family.vip(10)).unwrap(), by_node);
        });
        within(&place.client, || {
            let by_node = format!("pod {}", family.gateway);
            assert_eq!(ask_tcp(family.at_node(30080)).unwrap(), by_node, "from outside");
            assert_eq!(ask_udp(family.at_node(30080)).unwrap(), by_node);
        });
        within(&place.node, || assert!(ask_tcp(pod).is_ok() && ask_udp(family.vip(10)).is_ok()));
    }
}

/// Whoever uses one port towards a pod and towards Services that lead to it gets each answer from where he asked.
fn one_port_many_ways(own: IpAddr, ways: &[SocketAddr], answer: &str) {
    let socket = UdpSocket::bind((own, 0)).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    for to in ways.iter().chain(ways) {
        socket.send_to(b"?", to).unwrap();
        let mut buffer = [0; 64];
        let (count, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((std::str::from_utf8(&buffer[..count]).unwrap(), from), (answer, *to));
    }
}

/// What the edges of both pods do must not be left to one: without the other's, answers would come back untranslated.
#[test]
fn a_flow_outlives_the_coming_of_an_edge() {
    if !require("dataplane::podedge-coming", &NEEDS) {
        return;
    }
    let (place, client, mut running) = set_up("pc");
    let clients: Vec<IpAddr> = FAMILIES.iter().map(other).collect();
    let servers: Vec<IpAddr> = FAMILIES.iter().map(|family| family.pod).collect();
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        running.plain(&family, 10, 30080, &[pod]).unwrap();
    }
    let connect = || -> Vec<(TcpStream, UdpSocket)> {
        let open = |family: &Family| {
            let to = family.vip(10);
            (TcpStream::connect_timeout(&to, SOON).unwrap(), connected_udp(to))
        };
        within(&client, || FAMILIES.iter().map(open).collect())
    };
    let ask = |flows: &mut [(TcpStream, UdpSocket)], kept: bool| {
        for ((stream, datagrams), family) in flows.iter_mut().zip(FAMILIES) {
            let from = if kept { other(&family) } else { family.gateway };
            assert_eq!(ask_again(stream).unwrap(), format!("pod {from}"));
            assert_eq!(crate::place::ask_datagram(datagrams).unwrap(), format!("pod {from}"));
        }
    };
    let mut none = connect();
    ask(&mut none, false);
    let mut edges = edges(&place, &running, &clients);
    ask(&mut none, false);
    let mut one = connect();
    ask(&mut one, false);
    take_in(&place, &mut edges, &servers);
    let mut both = connect();
    for _ in 0..5 {
        ask(&mut both, true);
        ask(&mut one, false);
        ask(&mut none, false);
    }
    // An agent that starts again finds what the programs noted.
    drop(edges);
    let all = [clients, servers].concat();
    let _edges = self::edges(&place, &running, &all);
    ask(&mut both, true);
    ask(&mut one, false);
}

#[test]
fn packets_between_pods_of_a_node_skip_the_bridge() {
    if !require("dataplane::podedge-straight", &NEEDS) {
        return;
    }
    let (place, client, running) = set_up("pb");
    let servers = FAMILIES.map(|family| serve(&place.pod, family.pod, "pod"));
    let work = |to: SocketAddr| {
        let before = sent(&place.node, "pod0");
        within(&client, || (0..MANY).for_each(|_| assert!(ask_udp(to).is_ok())));
        sent(&place.node, "pod0") - before
    };
    for server in servers {
        assert!(work(server) >= MANY, "by the bridge");
    }
    let all: Vec<IpAddr> = FAMILIES.iter().flat_map(|f| [f.pod, other(f)]).collect();
    let edges = edges(&place, &running, &all);
    for server in servers {
        let by_device = work(server);
        assert!(by_device < MANY / 2, "{by_device} packets went by the pod's device");
    }
    // A bound on bandwidth is at the device: nothing may go past it.
    let index = edges.attached()[&Address::from(FAMILIES[0].pod)];
    let shape = Shape { bytes_per_second: 100_000_000, burst_bytes: 100_000, queue_bytes: 1_000_000 };
    match within(&place.node, || Netlink::open().unwrap().shape(index, &shape)) {
        Err(error) if error.class() == Class::NotFound => {
            eprintln!("this kernel has no token bucket: no look at queues");
            return;
        }
        shaped => shaped.unwrap(),
    }
    drop(edges);
    let _edges = self::edges(&place, &running, &all);
    for server in servers {
        assert!(work(server) >= MANY, "by the queue");
    }
}

/// What stands in a map of the place for a key.
fn pinned<K: aya::Pod, V: aya::Pod>(place: &Place, name: &str) -> HashMap<MapData, K, V> {
    let data = MapData::from_pin(place.pins.join("maps").join(name)).unwrap();
    HashMap::try_from(Map::HashMap(data)).unwrap()
}

#[test]
fn the_edges_rows() {
    if !require("dataplane::podedge-rows", &NEEDS) {
        return;
    }
    let (place, _client, mut running) = set_up("pw");
    let mac = [2, 9, 9, 9, 9, 9];
    let entry = |ifindex| {
        let mut bytes = [0; size_of::<LocalPod>()];
        bytes.copy_from_slice(LocalPod { ifindex, mac, ..LocalPod::default() }.as_bytes());
        bytes
    };
    let mut local = pinned::<[u8; 16], [u8; 16]>(&place, names::LOCAL_PODS);
    let mut isolated = pinned::<u32, [u8; size_of::<PolicyPod>()]>(&place, names::POLICY_PODS);
    for family in FAMILIES {
        let client = SocketAddr::new(other(&family), 5000);
        let pod = SocketAddr::new(family.pod, 8080);
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        running.plain(&family, 11, 30081, &[]).unwrap();
        local.insert(Address::from(client.ip()).0, entry(70), 0).unwrap();
        let run = |packet: &[u8]| run_program(&running, &place, "weft_pod_edge", packet);
        let plain = frame(UDP, client, pod, 0);
        assert_eq!(run(&plain), (NEXT, plain.clone()), "who has no entry is reached by the bridge");
        let (verdict, out) = run(&frame(UDP, client, family.vip(10), 0));
        let by_bridge = read_frame("by the bridge", &out);
        assert_eq!((verdict, by_bridge.to, by_bridge.from.ip()), (REDIRECT, pod, family.gateway));

        local.insert(Address::from(pod.ip()).0, entry(71), 0).unwrap();
        let (verdict, out) = run(&plain);
        assert_eq!((verdict, &out[..6], &out[6..12]), (REDIRECT, &mac[..], &plain[..6]));
        assert_eq!(out[12..], plain[12..], "but for hardware addresses it is as it was, hops included");
        let (verdict, out) = run(&frame(TCP, SocketAddr::new(client.ip(), 5001), family.vip(10), SYN));
        let request = read_frame("request", &out);
        assert_eq!((verdict, request.to), (REDIRECT, pod));
        assert_eq!((request.from.ip(), &out[..6]), (client.ip(), &mac[..]));
        assert!(request.from.port() >= NAT_PORT_FIRST, "its own port may lead there directly");
        let (verdict, out) = run(&frame(TCP, pod, request.from, SYN | ACK));
        let answer = read_frame("answer", &out);
        assert_eq!(
            (verdict, answer.from, answer.to),
            (REDIRECT, family.vip(10), SocketAddr::new(client.ip(), 5001))
        );
        let (verdict, out) = run(&frame(TCP, pod, SocketAddr::new(client.ip(), 5002), SYN | ACK));
        assert_eq!(
            (verdict, read_frame("no answer", &out).from),
            (REDIRECT, pod),
            "another flow of the same pods"
        );
        let (verdict, out) = run(&frame(TCP, client, family.vip(11), SYN));
        assert_eq!((verdict, read_frame("refusal", &out).to), (REDIRECT, client));
        let away = frame(UDP, client, SocketAddr::new(family.client, 53), 0);
        assert_eq!(run(&away), (NEXT, away.clone()), "out of the node by the stack");

        let keeps_out = PolicyPod { flags: POLICY_INGRESS, ingress: 7, ..PolicyPod::default() };
        let mut bytes = [0; size_of::<PolicyPod>()];
        bytes.copy_from_slice(keeps_out.as_bytes());
        isolated.insert(71, bytes, 0).unwrap();
        let before = running.drops("policy_ingress");
        assert_eq!(run(&plain).0, DROP);
        assert_eq!(run(&frame(TCP, SocketAddr::new(client.ip(), 5001), family.vip(10), ACK)).0, DROP);
        assert_eq!(running.drops("policy_ingress"), before + 2);
        isolated.remove(&71).unwrap();
    }
}

#[test]
fn looking_for_one_pod_takes_nothing_from_the_others() {
    if !require("dataplane::podedge-again", &NEEDS) {
        return;
    }
    let (place, client, mut running) = set_up("pl");
    let all: Vec<IpAddr> = FAMILIES.iter().flat_map(|f| [f.pod, other(f)]).collect();
    let mut edges = edges(&place, &running, &all);
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        within(&client, || ask_tcp(family.vip(10)).unwrap());
    }
    let entries = || {
        let map = pinned::<[u8; 16], [u8; 16]>(&place, names::LOCAL_PODS);
        map.iter().map(Result::unwrap).collect::<std::collections::BTreeMap<_, _>>()
    };
    let before = entries();
    assert_eq!(before.len(), all.len());
    let noted = before.values().filter(|entry| entry[14] != 0).count();
    assert_eq!(noted, FAMILIES.len(), "the client has a flow that was translated, in each family");
    // Another pod is on its way; until its device is there, each look is at all of them.
    let nobodys = Address::from(IpAddr::V4(Ipv4Addr::new(10, 42, 0, 99)));
    within(&place.node, || {
        edges.refresh(&[nobodys]).unwrap();
        edges.publish(&BTreeSet::new()).unwrap();
    });
    assert_eq!(entries(), before);
}
