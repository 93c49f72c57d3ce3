//! XDP at the uplink: it carries on what the tc program began, passes all else untouched, and outlives the agent.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use aya::maps::{HashMap, Map, MapData};
use aya::programs::{Program, TestRun as _, TestRunOptions};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::node::{self, Devices};
use weft_agent_dataplane::overlay::{PORT, Tunnels};
use weft_agent_dataplane::xdp::{Carrier, Xdp};
use weft_agent_dataplane::{BRIDGE, ProxyConfig, programs, run};
use weft_cni_netlink::{Features, LinkChange, Mac, Neighbour, Netlink, Offloads, Shape};
use weft_ebpf_abi::policy::{POLICY_INGRESS, PolicyPod};
use weft_ebpf_abi::{Address, TCP, Tunnel, UDP, names};
use weft_tests_harness::netns::ip;
use weft_tests_harness::require;
use zerocopy::IntoBytes as _;

use crate::agent::{Api, config, eventually};
use crate::bodies::{exchange, send_back};
use crate::entries::{FAMILIES, Family, V4};
use crate::frames::{ACK, RST, SYN, error, frame, packet, read_frame};
use crate::place::{POD, POD6, Place, Running, SOON, ask_again, ask_datagram, connected_udp, serve, within};

const NEEDS_XDP: [&str; 5] = ["root", "bpf", "ip", "artifacts", "xdp"];

const PASS: u32 = 2;
const REDIRECT: u32 = 4;
const FIN: u8 = 1;

/// A place whose pod takes frames, and is known to the bridge as the CNI plugin makes it known.
fn prepared(label: &str) -> Place {
    let place = Place::new(label).unwrap();
    within(&place.pod, || Offloads::open().unwrap().receive_in_batches("eth0", true).unwrap());
    let pod = pod_mac(&place);
    within(&place.node, || {
        let mut netlink = Netlink::open().unwrap();
        let index = netlink.link(BRIDGE).unwrap().index;
        // As the plugin does: else it changes with the ports, and takes all neighbours with it.
        let mac = Some(Mac([2, 0, 0, 0, 0, 0x11]));
        netlink.change_link(index, &LinkChange { mac, ..LinkChange::default() }).unwrap();
        for address in [IpAddr::from(POD), IpAddr::from(POD6)] {
            netlink.put_neighbour(&Neighbour { index, address, mac: pod }).unwrap();
        }
    });
    place
}

fn pod_mac(place: &Place) -> Mac {
    within(&place.pod, || Netlink::open().unwrap().link("eth0").unwrap().mac.unwrap())
}

fn devices(place: &Place) -> Devices {
    within(&place.node, || node::devices(Some(BRIDGE)).unwrap())
}

fn uplink(place: &Place) -> u32 {
    within(&place.node, || Netlink::open().unwrap().link("up0").unwrap().index)
}

/// Attaches XDP as the agent does.
fn carry(place: &Place, running: &Running, mode: Xdp) -> Carrier {
    let mut carrier = Carrier::adopt(&running.programs, mode).unwrap();
    within(&place.node, || carrier.refresh(&running.programs, &devices(place)).unwrap());
    carrier
}

/// Takes the tc programs off the uplink, or puts them there again.
fn tc_at_uplink(place: &Place, running: &Running, there: bool) {
    let mut edges = devices(place).edge;
    if !there {
        edges.remove(&uplink(place));
    }
    within(&place.node, || running.programs.attach_edges(&edges).unwrap());
}

fn xdp_run(running: &Running, place: &Place, packet: &[u8]) -> (u32, Vec<u8>) {
    let Some(Program::Xdp(program)) = running.programs.program("weft_xdp") else { panic!("not there") };
    within(&place.node, || {
        let mut out = vec![0; 2_048];
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program.test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    })
}

/// What the tc program makes of a packet.
fn tc_run(running: &Running, place: &Place, packet: &[u8]) -> Vec<u8> {
    let Some(Program::SchedClassifier(program)) = running.programs.program("weft_ingress") else {
        panic!("not there")
    };
    within(&place.node, || {
        let mut out = vec![0; 2_048];
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program.test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        out
    })
}

fn client(family: &Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.client, port)
}

/// The flags of a packet that begins a flow, and of one in its middle.
const KINDS: [(u8, u8, u8); 2] = [(TCP, SYN, ACK), (UDP, 0, 0)];

#[test]
fn what_tc_began_is_carried_on_alike() {
    if !require("dataplane::xdp-carries", &NEEDS_XDP) {
        return;
    }
    let place = prepared("xc");
    let mut running = place.start().unwrap();
    let carrier = carry(&place, &running, Xdp::Always);
    assert_eq!(carrier.attached().values().collect::<Vec<_>>(), ["up0"]);
    assert_eq!(carrier.pods().len(), 2);
    let bridge = within(&place.node, || Netlink::open().unwrap().link(BRIDGE).unwrap().mac.unwrap());
    let pod_mac = pod_mac(&place);
    for family in FAMILIES {
        let pod = SocketAddr::new(family.pod, 8080);
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        for (protocol, begins, goes_on) in KINDS {
            for port in 5_000..5_020 {
                let (from, to) = (client(&family, port), family.at_node(30080));
                let first = frame(protocol, from, to, begins);
                assert_eq!(xdp_run(&running, &place, &first), (PASS, first.clone()), "tc begins flows");
                tc_run(&running, &place, &first);
                let more = frame(protocol, from, to, goes_on);
                let by_tc = tc_run(&running, &place, &more);
                let (verdict, by_xdp) = xdp_run(&running, &place, &more);
                assert_eq!((verdict, &by_xdp[12..]), (REDIRECT, &by_tc[12..]), "both translate alike");
                assert_eq!((&by_xdp[..6], &by_xdp[6..12]), (&pod_mac.0[..], &bridge.0[..]));
                assert_eq!(read_frame("request", &by_xdp).to, pod);
            }
        }
    }
}

#[test]
fn a_peers_tunnel_passes() {
    if !require("dataplane::xdp-tunnel", &NEEDS_XDP) {
        return;
    }
    let place = prepared("xt");
    let mut running = place.start().unwrap();
    let _carrier = carry(&place, &running, Xdp::Always);
    let mut tunnels = Tunnels::adopt(&running.programs).unwrap();
    for family in FAMILIES {
        running.plain(&family, 10, PORT, &[SocketAddr::new(family.pod, 8080)]).unwrap();
        let packet = frame(UDP, client(&family, 5_000), family.at_node(PORT), 0);
        tc_run(&running, &place, &packet);
        assert_eq!(xdp_run(&running, &place, &packet).0, REDIRECT, "of who is no peer");
        tunnels.set(&[Tunnel { own: family.node.into(), peer: family.client.into() }]).unwrap();
        assert_eq!(xdp_run(&running, &place, &packet), (PASS, packet));
    }
}

/// Entries of a pod's policy.
fn policies(place: &Place) -> HashMap<MapData, u32, [u8; 40]> {
    let data = MapData::from_pin(place.pins.join("maps").join(names::POLICY_PODS)).unwrap();
    HashMap::try_from(Map::HashMap(data)).unwrap()
}

/// As a socket of this machine leaves it, for a device to finish.
fn unfinished(family: &Family, datagram: &[u8]) -> Vec<u8> {
    let v4 = family.node.is_ipv4();
    let transport = if v4 { 34 } else { 54 };
    let length = u16::try_from(datagram.len() - transport).unwrap().to_be_bytes();
    let mut pseudo = if v4 { datagram[26..34].to_vec() } else { datagram[22..54].to_vec() };
    pseudo.extend([0, UDP, length[0], length[1]]);
    let begun = (!crate::frames::checksum(&pseudo)).to_be_bytes();
    let mut unfinished = datagram.to_vec();
    unfinished[transport + 6..transport + 8].copy_from_slice(&begun);
    unfinished
}

/// A datagram between the same ports that the pod's device would not take.
fn oversized(family: &Family, datagram: &[u8]) -> Vec<u8> {
    let transport = if family.node.is_ipv4() { 34 } else { 54 };
    let mut payload = datagram[transport..transport + 4].to_vec();
    payload.extend(1_500_u16.to_be_bytes());
    payload.extend([0x12, 0x34]);
    payload.resize(1_500, 0);
    crate::frames::ethernet(&packet(family.client, family.node, UDP, &payload))
}

/// Packets of a client with a known flow that XDP may not carry.
fn left_to_tc(family: &Family, datagram: &[u8], segment: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let v4 = family.node.is_ipv4();
    let from = client(family, 5_000);
    let (to, pod) = (family.at_node(30080), SocketAddr::new(family.pod, 8080));
    let flags = |flag| frame(TCP, from, to, flag);
    let mut fragment = datagram.to_vec();
    let mut arp = datagram.to_vec();
    arp[12..14].copy_from_slice(&[8, 6]);
    let mut tagged = datagram.to_vec();
    tagged.splice(12..12, [0x81, 0, 0, 1]);
    if v4 {
        fragment[20] = 0x20;
    } else {
        fragment[20] = 44;
    }
    let mut cut = segment.to_vec();
    cut.truncate(if v4 { 50 } else { 70 });
    let quote = error(family.client, family.node, if v4 { [3, 3] } else { [1, 4] }, &datagram[14..]);
    vec![
        ("a connection that begins", flags(SYN)),
        ("one that ends", flags(FIN | ACK)),
        ("one that is reset", flags(RST)),
        ("an unknown flow", frame(UDP, client(family, 5_999), to, 0)),
        ("another port", frame(UDP, from, family.at_node(22), 0)),
        ("an answer", frame(UDP, pod, SocketAddr::new(family.gateway, 61_000), 0)),
        ("a backend that is the node", frame(UDP, from, family.at_node(30081), 0)),
        ("a fragment", fragment),
        ("neither family", arp),
        ("a VLAN's", tagged),
        ("cut off", cut),
        ("an unfinished checksum", unfinished(family, datagram)),
        ("too big for the pod's device", oversized(family, datagram)),
        ("an ICMP error", quote),
    ]
}

#[test]
fn what_is_left_to_tc_passes_untouched() {
    if !require("dataplane::xdp-passes", &NEEDS_XDP) {
        return;
    }
    let place = prepared("xp");
    let mut running = place.start().unwrap();
    let mut carrier = carry(&place, &running, Xdp::Always);
    let device = within(&place.node, || Netlink::open().unwrap().link("pod0").unwrap().index);
    for family in FAMILIES {
        let pod = SocketAddr::new(family.pod, 8080);
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        running.plain(&family, 11, 30081, &[family.at_node(8080)]).unwrap();
        let to = family.at_node(30080);
        let known = |running: &Running, protocol, port, begins| {
            tc_run(running, &place, &frame(protocol, client(&family, port), to, begins));
        };
        known(&running, TCP, 5_000, SYN);
        known(&running, UDP, 5_000, 0);
        tc_run(&running, &place, &frame(UDP, client(&family, 5_000), family.at_node(30081), 0));
        let datagram = frame(UDP, client(&family, 5_000), to, 0);
        let segment = frame(TCP, client(&family, 5_000), to, ACK);
        assert_eq!(xdp_run(&running, &place, &datagram).0, REDIRECT);
        assert_eq!(xdp_run(&running, &place, &segment).0, REDIRECT);

        for (name, packet) in left_to_tc(&family, &datagram, &segment) {
            assert_eq!(xdp_run(&running, &place, &packet), (PASS, packet), "{name}");
        }

        let checked = PolicyPod { flags: POLICY_INGRESS, ..PolicyPod::default() };
        let mut value = [0; 40];
        value.copy_from_slice(checked.as_bytes());
        policies(&place).insert(device, value, 0).unwrap();
        assert_eq!(
            xdp_run(&running, &place, &datagram),
            (PASS, datagram.clone()),
            "policy is asked at the pod's edge"
        );
        policies(&place).remove(&device).unwrap();
        assert_eq!(xdp_run(&running, &place, &datagram).0, REDIRECT);

        running.withdraw(pod).unwrap();
        assert_eq!(xdp_run(&running, &place, &datagram), (PASS, datagram.clone()), "its backend is gone");
        assert_eq!(xdp_run(&running, &place, &segment), (PASS, segment.clone()), "its backend is gone");
    }
    // A pod whose end no longer takes frames, once the node's devices are looked at.
    within(&place.pod, || Offloads::open().unwrap().receive_in_batches("eth0", false).unwrap());
    within(&place.node, || carrier.refresh(&running.programs, &devices(&place)).unwrap());
    assert_eq!((carrier.pods().len(), carrier.attached().len()), (0, 1), "it stays for pods to come");
    drop(carrier);
    let carrier = carry(&place, &running, Xdp::Always);
    assert_eq!(carrier.attached().len(), 0, "of no use to a new agent");
}

#[test]
fn a_connection_that_ends_is_left_to_tc_from_then_on() {
    if !require("dataplane::xdp-closing", &NEEDS_XDP) {
        return;
    }
    let place = prepared("xe");
    let mut running = place.start().unwrap();
    let _carrier = carry(&place, &running, Xdp::Always);
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[SocketAddr::new(family.pod, 8080)]).unwrap();
        let of = |flags| frame(TCP, client(&family, 5_000), family.at_node(30080), flags);
        tc_run(&running, &place, &of(SYN));
        assert_eq!(xdp_run(&running, &place, &of(ACK)).0, REDIRECT);
        tc_run(&running, &place, &of(FIN | ACK));
        assert_eq!(xdp_run(&running, &place, &of(ACK)), (PASS, of(ACK)));
        tc_run(&running, &place, &of(SYN));
        assert_eq!(xdp_run(&running, &place, &of(ACK)).0, REDIRECT, "the next one with the same ports");
    }
}

/// The client's checksums are finished before they leave it, as those are that come from a real wire.
fn finished_checksums(place: &Place) {
    within(&place.client, || Offloads::open().unwrap().finish_checksums("eth0", false).unwrap());
}

#[test]
fn a_flow_is_carried_by_either_program_at_any_time() {
    if !require("dataplane::xdp-either", &NEEDS_XDP) {
        return;
    }
    let place = prepared("xi");
    finished_checksums(&place);
    let mut running = place.start().unwrap();
    let mut both = Vec::new();
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        let to = family.at_node(30080);
        let stream = within(&place.client, || TcpStream::connect_timeout(&to, SOON).unwrap());
        let datagrams = within(&place.client, || connected_udp(to));
        both.push((format!("pod {}", family.gateway), stream, datagrams));
    }
    let mut answered = |what: &str| {
        for (expected, stream, datagrams) in &mut both {
            assert_eq!(ask_again(stream).unwrap(), *expected, "{what}");
            assert_eq!(ask_datagram(datagrams).unwrap(), *expected, "{what}");
        }
    };
    answered("begun by tc");
    let carrier = carry(&place, &running, Xdp::Always);
    answered("with both");
    tc_at_uplink(&place, &running, false);
    answered("by XDP alone");
    tc_at_uplink(&place, &running, true);
    drop(carrier);
    carry(&place, &running, Xdp::Never);
    answered("by tc again");
    tc_at_uplink(&place, &running, false);
    let (_, _, datagrams) = &both[0];
    assert_eq!(ask_datagram(datagrams).unwrap_err().kind(), ErrorKind::ConnectionRefused, "by nobody");
}

/// Sends a megabyte through a Service and back.
fn echo(place: &Place, running: &mut Running, family: &Family) {
    let listener = within(&place.pod, || TcpListener::bind((family.pod, 0)).unwrap());
    running.plain(family, 10, 30080, &[listener.local_addr().unwrap()]).unwrap();
    let server = send_back(listener, 1 << 20, SOON);
    within(&place.client, || exchange(family.at_node(30080), 1 << 20, SOON));
    server.join().unwrap();
}

#[test]
fn large_bodies_arrive_whole_whoever_finishes_the_checksums() {
    if !require("dataplane::xdp-large", &NEEDS_XDP) {
        return;
    }
    let place = prepared("xl");
    let mut running = place.start().unwrap();
    let _carrier = carry(&place, &running, Xdp::Always);
    for family in FAMILIES {
        echo(&place, &mut running, &family);
    }
    finished_checksums(&place);
    for family in FAMILIES {
        echo(&place, &mut running, &family);
    }
}

/// Whether the uplink has a program in its driver, as the kernel tells everybody.
fn has_xdp(place: &Place) -> bool {
    let output = place.node.command("ip").unwrap().args(["link", "show", "up0"]).output().unwrap();
    assert!(output.status.success());
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(!shown.contains("xdpgeneric"), "{shown}");
    shown.contains(" xdp ")
}

fn pins(place: &Place) -> Vec<String> {
    let entries = std::fs::read_dir(place.pins.join("links")).unwrap().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with("xdp_"))
        .collect()
}

#[test]
fn it_outlives_the_agent_and_the_next_one_adopts_it() {
    if !require("dataplane::xdp-adopted", &NEEDS_XDP) {
        return;
    }
    let place = prepared("xa");
    finished_checksums(&place);
    let mut running = place.start().unwrap();
    let pod = serve(&place.pod, POD, "pod");
    running.plain(&V4, 10, 30080, &[pod]).unwrap();
    let datagrams = within(&place.client, || connected_udp(V4.at_node(30080)));
    ask_datagram(&datagrams).unwrap();
    let first = carry(&place, &running, Xdp::Always);
    tc_at_uplink(&place, &running, false);
    let (pods, links) = (first.pods(), pins(&place));
    assert_eq!(links, [format!("xdp_{}", uplink(&place))]);
    drop((first, running));
    ask_datagram(&datagrams).expect("without an agent");

    // A new agent attaches tc to all edges; XDP is what is looked at.
    let running = place.start().unwrap();
    tc_at_uplink(&place, &running, false);
    let adopted = Carrier::adopt(&running.programs, Xdp::Always).unwrap();
    assert_eq!(adopted.pods(), pods);
    ask_datagram(&datagrams).expect("before it has looked at the devices");
    let second = carry(&place, &running, Xdp::Always);
    assert_eq!((second.pods(), pins(&place)), (pods, links));
    assert!(has_xdp(&place));
    ask_datagram(&datagrams).expect("with the new program");
    drop((second, running));
    programs::remove(&place.pins).unwrap();
    assert!(!has_xdp(&place));
}

#[test]
fn pods_that_come_and_go_are_followed() {
    if !require("dataplane::xdp-pods", &NEEDS_XDP) {
        return;
    }
    let place = prepared("xf");
    let running = place.start().unwrap();
    let mut carrier = carry(&place, &running, Xdp::Always);
    let name = place.node.name();
    let run = |command: &str| ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
    let look = |carrier: &mut Carrier| {
        within(&place.node, || carrier.refresh(&running.programs, &devices(&place)).unwrap());
        carrier.pods()
    };
    let second = Address::v4([10, 42, 0, 3]);
    let other = weft_tests_harness::netns::Netns::new("xf").unwrap();
    run(&format!("-n {name} link add pod1 type veth peer name eth0 netns {}", other.name()));
    run(&format!("-n {} link set eth0 address 02:00:00:00:00:33 up", other.name()));
    run(&format!("-n {name} link set pod1 master weft0 up"));
    run(&format!("-n {name} neigh replace 10.42.0.3 lladdr 02:00:00:00:00:33 dev weft0 nud permanent"));
    assert_eq!(look(&mut carrier).len(), 2, "it takes no frames");
    within(&other, || Offloads::open().unwrap().receive_in_batches("eth0", true).unwrap());
    assert!(look(&mut carrier).contains(&second));
    within(&place.node, || {
        let mut netlink = Netlink::open().unwrap();
        let index = netlink.link("pod1").unwrap().index;
        let shape = Shape { bytes_per_second: 125_000, burst_bytes: 4_096, queue_bytes: 8_192 };
        netlink.shape(index, &shape).unwrap();
    });
    assert_eq!(look(&mut carrier).len(), 2, "its rate is bounded, which XDP would get around");
    run(&format!("-n {name} neigh del 10.42.0.3 dev weft0"));
    run(&format!("-n {name} link del pod1"));
    assert_eq!(look(&mut carrier).len(), 2);
}

#[test]
fn the_agent_attaches_it_where_it_is_told_to() {
    if !require("dataplane::xdp-agent", &NEEDS_XDP) {
        return;
    }
    for (mode, attached) in [(Xdp::Auto, false), (Xdp::Always, true)] {
        let place = prepared("xg");
        let api = Api::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        within(&place.node, || {
            runtime.block_on(async {
                let config = weft_agent_dataplane::Config {
                    proxy: ProxyConfig { xdp: mode, ..ProxyConfig::default() },
                    ..config(&place)
                };
                let (programmed, is_programmed) = watch::channel(false);
                let stop = CancellationToken::new();
                let running = tokio::spawn(run(config, api.client(), programmed, stop.clone()));
                eventually("it is programmed", || *is_programmed.borrow()).await;
                assert_eq!(
                    !pins(&place).is_empty(),
                    attached,
                    "{mode:?}: veth pairs are left out unless told"
                );
                stop.cancel();
                running.await.unwrap().unwrap();
            });
        });
        assert_eq!(has_xdp(&place), attached, "{mode:?}");
    }
}

#[test]
fn a_device_says_whether_it_takes_frames() {
    if !require("dataplane::xdp-features", &NEEDS_XDP) {
        return;
    }
    let place = Place::new("xt").unwrap();
    let takes = || {
        within(&place.node, || {
            let index = Netlink::open().unwrap().link("pod0").unwrap().index;
            Features::open().unwrap().that_take_frames().unwrap().contains(&index)
        })
    };
    let set = |on| within(&place.pod, || Offloads::open().unwrap().receive_in_batches("eth0", on).unwrap());
    assert!(!takes());
    set(true);
    assert!(takes());
    set(false);
    assert!(!takes());
    let refused = within(&place.node, || Offloads::open().unwrap().receive_in_batches("nobody", true));
    assert_eq!(refused.unwrap_err().class(), weft_cni_netlink::Class::NotFound);
}
