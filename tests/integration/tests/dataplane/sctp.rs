//! SCTP to Services: associations that begin, go on and end, their checksums after a change of ports, refusals, errors and fragments. Rows of
//! packets where the kernel has no SCTP; sockets where it has.

use std::net::{IpAddr, SocketAddr};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData};
use weft_cni_netlink::{Netlink, Offloads};
use weft_ebpf_abi::policy::{IDENTITY_NONE, POLICY_INGRESS, PolicyPod, RuleData, RuleKey};
use weft_ebpf_abi::{Address, NAT_PORT_FIRST, SCTP, TCP, names};
use weft_tests_harness::require;
use zerocopy::IntoBytes as _;

use crate::NEEDS;
use crate::buffers::{SUMMED, finished, run_in, send, watch};
use crate::entries::{FAMILIES, Family};
use crate::frames::{Read, SCTP_CHECKSUM, checksum, crc32c, error, ethernet, packet, read, read_frame, sctp};
use crate::packets::{DROP, PASS, REDIRECT, client, error_kinds, run, run_program, set_up};
use crate::place::{Place, Running, within};
use crate::podedge;

mod sockets;

const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
const SHUTDOWN_ACK: u8 = 8;
const SHUTDOWN_COMPLETE: u8 = 14;
/// What an INIT says first: the tag that answers to it are to have, and a window.
const BODY: [u8; 16] = [0xaa, 0xbb, 0xcc, 0xdd, 0, 1, 0, 0, 0, 10, 0, 10, 0, 0, 0, 1];

/// A packet from outside, as it leaves the node.
fn asked(running: &Running, place: &Place, packet: &[u8]) -> Read {
    let (verdict, out) = run(running, place, packet);
    assert_eq!(verdict, REDIRECT);
    read_frame("request", &out)
}

/// Where an SCTP packet begins in a frame.
fn transport(family: &Family) -> usize {
    if family.node.is_ipv4() { 34 } else { 54 }
}

#[test]
fn associations_are_translated_and_their_answers_back() {
    if !require("dataplane::sctp-translated", &NEEDS) {
        return;
    }
    let (place, running) = set_up("st");
    for family in FAMILIES {
        let (pod, service) = (SocketAddr::new(family.pod, 8080), family.at_node(30080));
        let mut ports = std::collections::BTreeSet::new();
        for port in 5_000..5_050 {
            let from = client(&family, port);
            let init = sctp(from, service, INIT, &BODY);
            let request = asked(&running, &place, &init);
            assert_eq!((request.protocol, request.to, request.from.ip()), (SCTP, pod, family.gateway));
            assert!(request.from.port() >= NAT_PORT_FIRST);
            assert!(ports.insert(request.from.port()), "two associations share a port");
            assert_eq!(asked(&running, &place, &init), request, "a repeated INIT takes the same way");
            for (chunk, body) in [(INIT_ACK, &BODY[..]), (DATA, &[7; 1_000]), (SHUTDOWN_ACK, &[])] {
                let (verdict, out) = run(&running, &place, &sctp(pod, request.from, chunk, body));
                let answer = read_frame("answer", &out);
                assert_eq!((verdict, answer.from, answer.to), (REDIRECT, service, from));
            }
            for bytes in [0, 1, 2, 3, 4, 700, 1_440] {
                let data = sctp(from, service, DATA, &vec![9; bytes]);
                assert_eq!(asked(&running, &place, &data).from, request.from, "{bytes} bytes");
                let summed = run_in(&running, &place, &data, &[], SUMMED);
                let summed = summed.unwrap_or_else(|error| panic!("{bytes} bytes: {error}"));
                assert_eq!(summed, run(&running, &place, &data), "the sum that a device made follows");
            }
        }
    }
}

#[test]
fn a_checksum_that_a_device_is_to_make_stays_unmade() {
    if !require("dataplane::sctp-unmade", &NEEDS) {
        return;
    }
    let (place, running) = set_up("su");
    for family in FAMILIES {
        let mut init = sctp(client(&family, 5_000), family.at_node(30080), INIT, &BODY);
        let at = transport(&family);
        let field = at + SCTP_CHECKSUM.start..at + SCTP_CHECKSUM.end;
        init[field.clone()].fill(0);
        let (verdict, out) = run(&running, &place, &init);
        assert_eq!((verdict, &out[field]), (REDIRECT, [0; 4].as_slice()));
        assert_eq!(read("request", &out[14..], false).to, SocketAddr::new(family.pod, 8080));
    }
}

#[test]
fn refusals_are_aborts() {
    if !require("dataplane::sctp-refused", &NEEDS) {
        return;
    }
    let (place, running) = set_up("sr");
    for (n, family) in (0..).zip(FAMILIES) {
        let (from, nothing, service) = (client(&family, 5_000), family.at_node(30081), family.at_node(30080));
        let refused = |packet: &[u8]| {
            let (verdict, out) = run(&running, &place, packet);
            assert_eq!(verdict, REDIRECT);
            assert_eq!((&out[..6], &out[6..12]), (&packet[6..12], &packet[..6]), "back to the sender");
            read_frame("refusal", &out)
        };
        let answer = refused(&sctp(from, nothing, INIT, &BODY));
        assert_eq!((answer.from, answer.to), (nothing, from));
        assert_eq!(answer.payload[4..8], BODY[..4], "the tag that the INIT gives");
        assert_eq!(answer.payload[12..], [ABORT, 0, 0, 4]);
        let mut unsummed = sctp(from, nothing, INIT, &BODY);
        let at = transport(&family);
        unsummed[at + SCTP_CHECKSUM.start..at + SCTP_CHECKSUM.end].fill(0);
        // Whoever was to sum that one up, the refusal is.
        assert_eq!(refused(&unsummed).payload, answer.payload);
        assert_eq!(running.drops("packet_no_endpoints"), n * 2 + 2);
        // The second is shorter than an INIT.
        for (chunk, body) in [(DATA, &[1; 100][..]), (SHUTDOWN_ACK, &[])] {
            let answer = refused(&sctp(from, service, chunk, body));
            assert_eq!((answer.from, answer.to), (service, from));
            assert_eq!(answer.payload[4..8], [0, 0, 0, 1], "the tag of the packet, which the T bit says");
            assert_eq!(answer.payload[12..], [ABORT, 1, 0, 4]);
        }
        assert_eq!(running.drops("unknown_flow"), n * 4 + 2);
        for chunk in [ABORT, SHUTDOWN_COMPLETE] {
            assert_eq!(run(&running, &place, &sctp(from, service, chunk, &[])).0, DROP, "never answered");
        }
        assert_eq!(running.drops("unknown_flow"), n * 4 + 4, "counted all the same");
    }
}

#[test]
fn an_association_keeps_its_backend_until_it_is_over() {
    if !require("dataplane::sctp-over", &NEEDS) {
        return;
    }
    let (place, mut running) = set_up("so");
    for family in FAMILIES {
        let (old, new) = (SocketAddr::new(family.pod, 8080), SocketAddr::new(family.pod, 8081));
        let service = family.at_node(30080);
        let from = |port| client(&family, port);
        let ask = |running: &Running, port, chunk| {
            asked(running, &place, &sctp(from(port), service, chunk, &BODY)).to
        };
        for port in 5_000..5_004 {
            let request = asked(&running, &place, &sctp(from(port), service, INIT, &BODY));
            assert_eq!(request.to, old);
            assert_eq!(run(&running, &place, &sctp(old, request.from, INIT_ACK, &BODY)).0, REDIRECT);
            if port == 5_001 {
                let end = sctp(old, request.from, SHUTDOWN_COMPLETE, &[]);
                assert_eq!(run(&running, &place, &end).0, REDIRECT, "the end is passed on");
            }
        }
        assert_eq!(ask(&running, 5_002, ABORT), old, "likewise");
        running.plain(&family, 10, 30080, &[new]).unwrap();
        running.drain(old).unwrap();
        for chunk in [INIT, DATA] {
            assert_eq!(ask(&running, 5_000, chunk), old, "one that stands");
        }
        for port in [5_001, 5_002] {
            assert_eq!(ask(&running, port, INIT), new, "after its end");
        }
        running.withdraw(old).unwrap();
        let gone = running.drops("backend_gone");
        let (verdict, out) = run(&running, &place, &sctp(from(5_003), service, DATA, &BODY));
        let answer = read_frame("of a backend that is gone", &out);
        assert_eq!((verdict, answer.from, answer.payload[12]), (REDIRECT, service, ABORT));
        assert_eq!(running.drops("backend_gone"), gone + 1);
        assert_eq!(ask(&running, 5_000, INIT), new, "it is asked for again");
    }
}

#[test]
fn errors_about_associations_reach_the_other_end() {
    if !require("dataplane::sctp-errors", &NEEDS) {
        return;
    }
    let (place, running) = set_up("se");
    for family in FAMILIES {
        let (from, service) = (client(&family, 5_000), family.at_node(30080));
        let request = run(&running, &place, &sctp(from, service, INIT, &BODY)).1;
        let pod = read_frame("request", &request);
        for kind in error_kinds(&family) {
            // Down to the tag, which is all that a router must quote.
            for bytes in [request.len(), transport(&family) + 8] {
                let about = error(family.pod, family.gateway, kind, &request[14..bytes]);
                let (verdict, out) = run(&running, &place, &about);
                let message = read_frame("error", &out);
                assert_eq!((verdict, message.from.ip(), message.to.ip()), (REDIRECT, family.node, from.ip()));
                let inner = read("quote", &message.payload[8..], false);
                assert_eq!((inner.protocol, inner.from, inner.to), (SCTP, from, service));
            }
        }
        let (from, pod) = (pod.from, pod.to);
        let answer = run(&running, &place, &sctp(pod, from, INIT_ACK, &BODY)).1;
        let about = error(family.client, family.node, error_kinds(&family)[1], &answer[14..]);
        let message = read_frame("error", &run(&running, &place, &about).1);
        let inner = read("quote", &message.payload[8..], false);
        assert_eq!((message.to.ip(), inner.from, inner.to), (family.pod, pod, from));
    }
}

/// A part of an SCTP packet as a frame.
fn part(family: &Family, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    if family.node.is_ipv4() {
        let mut ip = packet(family.client, family.node, SCTP, payload);
        let [high, low] = (offset | if more { 0x2000 } else { 0 }).to_be_bytes();
        ip[4..8].copy_from_slice(&[7, 7, high, low]);
        ip[10..12].fill(0);
        let sum = checksum(&ip[..20]).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        ethernet(&ip)
    } else {
        let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
        let payload = [&[SCTP, 0, high, low, 0, 0, 7, 7], payload].concat();
        ethernet(&packet(family.client, family.node, 44, &payload))
    }
}

/// What a sender cuts that learns of a smaller link when its chunk is made already.
#[test]
fn fragments_of_a_large_chunk_make_a_packet_with_its_checksum() {
    if !require("dataplane::sctp-fragments", &NEEDS) {
        return;
    }
    let (place, running) = set_up("sf");
    for (n, family) in (1..).zip(FAMILIES) {
        let (from, service) = (client(&family, 5_000), family.at_node(30080));
        let begun = asked(&running, &place, &sctp(from, service, INIT, &BODY));
        let at = transport(&family);
        let data = sctp(from, service, DATA, &[5; 402])[at..].to_vec();
        assert_eq!(data.len() % 4, 2, "without the padding that its chunk needs");
        let whole = {
            let mut padded = [&data[..], &[0, 0]].concat();
            padded[SCTP_CHECKSUM].fill(0);
            let sum = crc32c(&padded);
            padded[SCTP_CHECKSUM].copy_from_slice(&sum);
            padded
        };
        let (first, later) = whole.split_at(200);
        let behind = at + if family.node.is_ipv4() { 0 } else { 8 };
        let [first, later] = [part(&family, 0, true, first), part(&family, 25, false, later)].map(|packet| {
            let (verdict, out) = run(&running, &place, &packet);
            assert_eq!((verdict, out.len()), (REDIRECT, packet.len()));
            out
        });
        let all = [&first[behind..], &later[behind..]].concat();
        let (pod, gateway) = (family.pod, family.gateway);
        let joined = read_frame("joined", &ethernet(&packet(gateway, pod, SCTP, &all)));
        assert_eq!((joined.from, joined.to), (begun.from, begun.to));

        // Chunks that end with the fragment: what else there is can't be known.
        let ends = sctp(from, service, DATA, &[5; 184])[at..].to_vec();
        assert_eq!(run(&running, &place, &part(&family, 0, true, &ends)).0, DROP);
        assert_eq!(running.drops("rewrite_failed"), n);
    }
}

#[test]
fn an_answer_of_the_node_itself_leaves_as_the_service() {
    if !require("dataplane::sctp-egress", &NEEDS) {
        return;
    }
    let (place, running) = set_up("sg");
    for family in FAMILIES {
        let (from, to, backend) = (client(&family, 5_000), family.at_node(30082), family.at_node(8080));
        let (verdict, request) = run(&running, &place, &sctp(from, to, INIT, &BODY));
        assert_eq!((verdict, read_frame("request", &request).to), (PASS, backend), "by the stack");
        let answer = sctp(backend, from, INIT_ACK, &BODY);
        let (verdict, out) = run_program(&running, &place, "weft_egress", &answer);
        assert_eq!((verdict, read_frame("answer", &out).from), (PASS, to));
    }
}

#[test]
fn the_nodes_own_associations_are_translated_as_they_leave() {
    if !require("dataplane::sctp-own", &NEEDS) {
        return;
    }
    let (place, running) = set_up("sn");
    for (n, family) in (1..).zip(FAMILIES) {
        let own = family.at_node(5_000);
        let leaves = |packet: &[u8]| {
            let (verdict, out) = run_program(&running, &place, "weft_egress", packet);
            (verdict, read_frame("leaves", &out))
        };
        for chunk in [INIT, DATA] {
            let (verdict, request) = leaves(&sctp(own, family.vip(10), chunk, &BODY));
            let pod = SocketAddr::new(family.pod, 8080);
            assert_eq!((verdict, request.to, request.from.ip()), (REDIRECT, pod, family.gateway));
            let (verdict, out) = run(&running, &place, &sctp(pod, request.from, chunk, &BODY));
            let answer = read_frame("answer", &out);
            assert_eq!((verdict, answer.from, answer.to), (PASS, family.vip(10), own), "by the stack");
        }
        let (verdict, refusal) = leaves(&sctp(own, family.vip(11), INIT, &BODY));
        assert_eq!((verdict, refusal.from, refusal.to), (REDIRECT, family.vip(11), own));
        assert_eq!(refusal.payload[12], ABORT);
        let itself = sctp(own, family.vip(12), INIT, &BODY);
        assert_eq!(leaves(&itself).0, DROP, "the stack takes nothing from itself");
        assert_eq!(running.drops("no_route"), n);
        let away = sctp(own, SocketAddr::new(family.client, 80), INIT, &BODY);
        assert_eq!(run_program(&running, &place, "weft_egress", &away), (PASS, away), "no Service");
    }
}

#[test]
fn policies_are_asked_about_what_a_packet_becomes() {
    if !require("dataplane::sctp-policy", &NEEDS) {
        return;
    }
    const SET: u64 = 7;
    let (place, _second, mut running) = podedge::set_up("sp");
    let all: Vec<IpAddr> = FAMILIES.iter().flat_map(|f| [f.pod, podedge::other(f)]).collect();
    let edges = podedge::edges(&place, &running, &all);
    let map = |name: &str| MapData::from_pin(place.pins.join("maps").join(name)).unwrap();
    let mut pods: HashMap<_, u32, [u8; size_of::<PolicyPod>()]> =
        HashMap::try_from(Map::HashMap(map(names::POLICY_PODS))).unwrap();
    let mut rules: LpmTrie<_, [u8; size_of::<RuleData>()], u32> =
        LpmTrie::try_from(Map::LpmTrie(map(names::RULES))).unwrap();
    let mut pod = [0; size_of::<PolicyPod>()];
    let isolated = PolicyPod { flags: POLICY_INGRESS, ingress: SET, ..PolicyPod::default() };
    pod.copy_from_slice(isolated.as_bytes());
    pods.insert(edges.attached()[&Address::from(FAMILIES[0].pod)], pod, 0).unwrap();
    // The pod's port by TCP, the Service's by SCTP, and at last what the packets become.
    for (n, (protocol, port, verdict)) in
        (5_000..).zip([(TCP, 8_080, DROP), (SCTP, 80, DROP), (SCTP, 8_080, REDIRECT)])
    {
        let rule = RuleKey::new(SET, IDENTITY_NONE, Some(protocol), Some((port, 16)));
        let mut data = [0; size_of::<RuleData>()];
        data.copy_from_slice(rule.data.as_bytes());
        rules.insert(&Key::new(rule.prefix_bits, data), 1, 0).unwrap();
        for family in FAMILIES {
            running.plain(&family, 10, 30080, &[SocketAddr::new(family.pod, 8_080)]).unwrap();
            let init = sctp(SocketAddr::new(podedge::other(&family), n), family.vip(10), INIT, &BODY);
            let (found, _) = run_program(&running, &place, "weft_pod_edge", &init);
            assert_eq!(found, verdict, "{protocol} {port} {}", family.pod);
        }
    }
}

/// From a device to a device: what comes out at the other end has its checksum, and the answer comes back.
#[test]
fn packets_on_the_wire_have_their_checksums() {
    if !require("dataplane::sctp-wire", &NEEDS) {
        return;
    }
    let (place, second, mut running) = podedge::set_up("sw");
    let all: Vec<IpAddr> = FAMILIES.iter().flat_map(|f| [f.pod, podedge::other(f)]).collect();
    let _edges = podedge::edges(&place, &running, &all);
    let mac =
        |device: &str| within(&place.node, || Netlink::open().unwrap().link(device).unwrap().mac.unwrap());
    for netns in [&place.client, &place.pod, &second] {
        within(netns, || Offloads::open().unwrap().finish_checksums("eth0", false).unwrap());
    }
    for family in FAMILIES {
        let pod = SocketAddr::new(family.pod, 8080);
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        let ways = [
            ("from outside", &place.client, client(&family, 5_000), family.at_node(30080), mac("up0")),
            (
                "from a pod",
                &second,
                SocketAddr::new(podedge::other(&family), 5_000),
                family.vip(10),
                mac("weft0"),
            ),
        ];
        for (name, netns, from, to, router) in ways {
            let (at_pod, at_client) = (watch(&place.pod), watch(netns));
            let mut init = sctp(from, to, INIT, &BODY);
            init[..6].copy_from_slice(&router.0);
            send(netns, "eth0", &init);
            let seen = std::cell::Cell::new(None);
            finished(&at_pod, name, 1, |read| {
                let is_request = read.protocol == SCTP && read.to == pod;
                if is_request {
                    seen.set(Some(read.from));
                }
                is_request
            });
            let seen = seen.take().unwrap();
            assert!(seen.port() >= NAT_PORT_FIRST, "{name}: {seen}");
            let mut answer = sctp(pod, seen, INIT_ACK, &BODY);
            answer[..6].copy_from_slice(&mac("weft0").0);
            send(&place.pod, "eth0", &answer);
            finished(&at_client, name, 1, |read| read.protocol == SCTP && read.from == to && read.to == from);
        }
    }
}
