//! The tunnels' own packets: left alone at once, though a Service has their port, which others use as any port.

use std::net::{IpAddr, SocketAddr};

use aya::maps::{HashMap, Map, MapData};
use ipnetwork::IpNetwork;
use weft_agent_dataplane::node;
use weft_agent_dataplane::overlay::{PORT, Tunnels};
use weft_ebpf_abi::{Address, FLOW_REPLY, FlowKey, FlowValue, Port, TCP, Tunnel, UDP, names};
use weft_tests_harness::require;

use crate::NEEDS;
use crate::entries::{FAMILIES, Family};
use crate::frames::{SYN, frame, read_frame};
use crate::packets::{DROP, PASS, REDIRECT, client, run, run_program};
use crate::place::{Place, Running, identity, within};

fn tunnel(own: IpAddr, peer: IpAddr) -> Tunnel {
    Tunnel { own: own.into(), peer: peer.into() }
}

/// The place with a Service of both families at the tunnels' port.
fn set_up(label: &str) -> (Place, Running) {
    let place = Place::new(label).unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        running.plain(&family, 10, PORT, &[SocketAddr::new(family.pod, 8080)]).unwrap();
    }
    (place, running)
}

/// Another address of the client's network.
fn neighbour(family: &Family) -> IpAddr {
    match family.client {
        IpAddr::V4(ip) => std::net::Ipv4Addr::from(u32::from(ip) + 1).into(),
        IpAddr::V6(ip) => std::net::Ipv6Addr::from(u128::from(ip) + 1).into(),
    }
}

#[test]
fn a_peers_tunnel_is_not_taken_for_a_service() {
    if !require("dataplane::tunnels-in", &NEEDS) {
        return;
    }
    let (place, running) = set_up("ti");
    let mut tunnels = Tunnels::adopt(&running.programs).unwrap();
    for family in FAMILIES {
        let peers = |from: u16| frame(UDP, client(&family, from), family.at_node(PORT), 0);
        // A flow that is known is not asked for either.
        assert_eq!(run(&running, &place, &peers(5_000)).0, REDIRECT, "of who is no peer");
        tunnels.set(&[tunnel(family.node, family.client)]).unwrap();
        for port in [5_000, 5_001] {
            assert_eq!(run(&running, &place, &peers(port)), (PASS, peers(port)), "{port}");
        }
        let stranger = SocketAddr::new(neighbour(&family), 5_000);
        let others = [
            ("a stranger's", frame(UDP, stranger, family.at_node(PORT), 0)),
            (
                "to another address of the node",
                frame(UDP, client(&family, 5_002), SocketAddr::new(family.gateway, PORT), 0),
            ),
            ("a connection", frame(TCP, client(&family, 5_003), family.at_node(PORT), SYN)),
        ];
        for (name, packet) in others {
            assert_eq!(run(&running, &place, &packet).0, REDIRECT, "{name}");
        }
        tunnels.set(&[]).unwrap();
        assert_eq!(run(&running, &place, &peers(5_001)).0, REDIRECT, "of who is no peer any more");
    }
}

/// A packet that goes out is looked up for answers of a backend that is the node itself.
#[test]
fn what_goes_to_a_peer_is_not_taken_for_an_answer() {
    if !require("dataplane::tunnels-out", &NEEDS) {
        return;
    }
    let (place, running) = set_up("to");
    let mut tunnels = Tunnels::adopt(&running.programs).unwrap();
    let flows = MapData::from_pin(place.pins.join("maps").join(names::FLOWS)).unwrap();
    let mut flows: HashMap<_, [u8; size_of::<FlowKey>()], [u8; size_of::<FlowValue>()]> =
        HashMap::try_from(Map::LruHashMap(flows)).unwrap();
    for family in FAMILIES {
        let [source, destination] = [family.node, family.client].map(Address::from);
        let [source_port, destination_port] = [Port::new(40_000), Port::new(PORT)];
        let key = FlowKey { source, destination, source_port, destination_port, protocol: UDP, pad: [0; 3] };
        let value = FlowValue {
            source: family.vip(10).ip().into(),
            destination,
            source_port: Port::new(80),
            destination_port,
            ifindex: 0,
            generation: 0,
            flags: FLOW_REPLY,
            last_seen: 0,
        };
        let entry: ([u8; size_of::<FlowKey>()], [u8; size_of::<FlowValue>()]) =
            (zerocopy::transmute!(key), zerocopy::transmute!(value));
        flows.insert(entry.0, entry.1, 0).unwrap();
        let packet = frame(UDP, family.at_node(40_000), client(&family, PORT), 0);
        let out = |packet: &[u8]| run_program(&running, &place, "weft_egress", packet);
        let (verdict, translated) = out(&packet);
        assert_eq!((verdict, read_frame("answer", &translated).from), (PASS, family.vip(10)));
        tunnels.set(&[tunnel(family.node, family.client)]).unwrap();
        assert_eq!(out(&packet), (PASS, packet));
    }
}

/// As the node's own, such a packet would be taken for a peer's.
#[test]
fn no_service_leads_into_a_tunnel() {
    if !require("dataplane::tunnels-led", &NEEDS) {
        return;
    }
    let place = Place::new("tl").unwrap();
    let mut running = place.start().unwrap();
    let (unlike_pods, pods) =
        (["192.0.2.0/24", "2001:db8::/64"], FAMILIES.each_ref().map(|family| family.pod));
    let as_pods = pods.map(|pod| IpNetwork::from(pod).to_string());
    let mut config = within(&place.node, || {
        identity(&node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap(), &place.cgroup).unwrap()
    });
    let mut from = 5_000;
    let mut led = |running: &Running, protocol: u8| {
        from += 1;
        FAMILIES.each_ref().map(|family| {
            let asks = frame(protocol, client(family, from), family.at_node(30080), SYN);
            run(running, &place, &asks).0
        })
    };
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[SocketAddr::new(family.pod, PORT)]).unwrap();
    }
    running.programs.set_pod_ranges(&unlike_pods.map(|range| range.parse().unwrap())).unwrap();
    assert_eq!(led(&running, UDP), [REDIRECT; 2], "a node without tunnels of weft's");
    config.overlay_ifindex = 9_999;
    running.programs.configure(config).unwrap();
    assert_eq!(led(&running, UDP), [DROP; 2]);
    assert_eq!(led(&running, TCP), [REDIRECT; 2], "another protocol");
    running.programs.set_pod_ranges(&as_pods.map(|range| range.parse().unwrap())).unwrap();
    assert_eq!(led(&running, UDP), [REDIRECT; 2], "among pods it is a port as any other");
}

#[test]
fn the_tunnels_that_an_earlier_agent_knew_are_adopted() {
    if !require("dataplane::tunnels-adopted", &NEEDS) {
        return;
    }
    let (place, running) = set_up("ta");
    let all = FAMILIES.map(|family| tunnel(family.node, family.client));
    Tunnels::adopt(&running.programs).unwrap().set(&all).unwrap();
    drop(running);
    let running = place.start().unwrap();
    let is_left = |family: &Family| {
        let packet = frame(UDP, client(family, 5_000), family.at_node(PORT), 0);
        run(&running, &place, &packet) == (PASS, packet)
    };
    assert_eq!(FAMILIES.each_ref().map(is_left), [true, true]);
    let mut tunnels = Tunnels::adopt(&running.programs).unwrap();
    tunnels.set(&all[..1]).unwrap();
    assert_eq!(FAMILIES.each_ref().map(is_left), [true, false]);
    // Of two peers with one place one has it.
    let first = Tunnel { own: all[0].own, peer: Address::v4([10, 44, 0, 3]) };
    let mut alike = first.peer.words();
    alike[0] = 1;
    let second = Tunnel { peer: Address::from_words(alike), ..first };
    tunnels.set(&[first, second]).unwrap();
    let text = format!("{:?}", Tunnels::adopt(&running.programs).unwrap());
    assert!(text.contains(&format!("{second:?}")) && !text.contains(&format!("{first:?}")), "{text}");
}
