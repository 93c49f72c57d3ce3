//! Rows of packet in, verdict and packet out, through BPF_PROG_TEST_RUN, in both families.

use std::net::{IpAddr, SocketAddr};

use aya::programs::{Program, TestRun as _, TestRunOptions};
use weft_ebpf_abi::{NAT_PORT_FIRST, TCP, UDP};
use weft_tests_harness::require;

use crate::NEEDS;
use crate::entries::{FAMILIES, Family, V4, V6};
use crate::frames::{ACK, RST, SYN, error, ethernet, frame, packet, read, read_frame};
use crate::place::{Place, Running, within};

pub(crate) const PASS: u32 = 0;
pub(crate) const DROP: u32 = 2;
pub(crate) const REDIRECT: u32 = 7;

pub(crate) fn run(running: &Running, place: &Place, packet: &[u8]) -> (u32, Vec<u8>) {
    run_program(running, place, "weft_ingress", packet)
}

pub(crate) fn run_program(running: &Running, place: &Place, name: &str, packet: &[u8]) -> (u32, Vec<u8>) {
    let Some(Program::SchedClassifier(program)) = running.programs.program(name) else { panic!("not there") };
    within(&place.node, || {
        let mut out = vec![0; 2_048];
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program.test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    })
}

/// NodePort 30080 leads to the pod, 30081 to nothing, 30082 to the node itself.
pub(crate) fn set_up(label: &str) -> (Place, Running) {
    let place = Place::new(label).unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[SocketAddr::new(family.pod, 8080)]).unwrap();
        running.plain(&family, 11, 30081, &[]).unwrap();
        running.plain(&family, 12, 30082, &[family.at_node(8080)]).unwrap();
    }
    (place, running)
}

pub(crate) fn client(family: &Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.client, port)
}

#[test]
fn packets_that_are_nobodys_pass_untouched() {
    if !require("dataplane::packets-pass", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pp");
    for family in FAMILIES {
        let from = client(&family, 5000);
        let to_service = |protocol| frame(protocol, from, family.at_node(30080), SYN);
        let transport = if family.node.is_ipv4() { 34 } else { 54 };
        let mut arp = to_service(UDP);
        arp[12..14].copy_from_slice(&[8, 6]);
        let mut other = to_service(UDP);
        other[if family.node.is_ipv4() { 23 } else { 20 }] = 99;
        let mut short = to_service(TCP);
        short.truncate(transport + 2);
        let nobody: IpAddr = if family.node.is_ipv4() { [8, 8, 8, 8].into() } else { [0x2001; 8].into() };
        let unknown =
            &frame(UDP, SocketAddr::new(family.gateway, 61_000), SocketAddr::new(family.pod, 1), 0)[14..];
        let rows = [
            ("another port of the node", frame(TCP, from, family.at_node(22), SYN)),
            ("through the node", frame(TCP, from, SocketAddr::new(family.pod, 30080), SYN)),
            ("to nobody", frame(UDP, SocketAddr::new(family.pod, 5000), SocketAddr::new(nobody, 53), 0)),
            ("neither family", arp),
            ("of another protocol", other),
            ("cut off", short),
            ("error about a stranger", error(family.pod, family.gateway, [3, 4], unknown)),
        ];
        for (name, packet) in rows {
            assert_eq!(run(&running, &place, &packet), (PASS, packet), "{name}");
        }
    }
    let mut fragment = frame(UDP, client(&V4, 5000), V4.at_node(30080), 0);
    fragment[20..22].copy_from_slice(&[0, 10]);
    assert_eq!(run(&running, &place, &fragment), (PASS, fragment), "a later fragment without a first");
}

#[test]
fn packets_to_services_are_translated_and_their_answers_back() {
    if !require("dataplane::packets-translated", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pt");
    for family in FAMILIES {
        let mut ports = std::collections::BTreeSet::new();
        for (protocol, flags, answer_flags) in [(TCP, SYN, SYN | ACK), (UDP, 0, 0)] {
            for port in 5_000..5_050 {
                let packet = frame(protocol, client(&family, port), family.at_node(30080), flags);
                let (verdict, out) = run(&running, &place, &packet);
                assert_eq!(verdict, REDIRECT);
                let request = read_frame("request", &out);
                let pod = SocketAddr::new(family.pod, 8080);
                assert_eq!((request.to, request.from.ip()), (pod, family.gateway));
                assert!(request.from.port() >= NAT_PORT_FIRST);
                assert!(ports.insert((protocol, request.from.port())), "two flows share a port");
                let (_, again) = run(&running, &place, &packet);
                assert_eq!(again, out, "a repeated packet takes the same way");
                let answer = frame(protocol, pod, request.from, answer_flags);
                let (verdict, out) = run(&running, &place, &answer);
                assert_eq!(verdict, REDIRECT);
                let answer = read_frame("answer", &out);
                assert_eq!((answer.from, answer.to), (family.at_node(30080), client(&family, port)));
            }
        }
    }
}

#[test]
fn a_connection_that_was_never_answered_leaves_a_backend_that_drains() {
    if !require("dataplane::packets-unanswered", &NEEDS) {
        return;
    }
    let (place, mut running) = set_up("pn");
    for family in FAMILIES {
        let (old, new) = (SocketAddr::new(family.pod, 8080), SocketAddr::new(family.pod, 8081));
        let (unanswered, answered) = (client(&family, 5_000), client(&family, 5_001));
        let asked = |running: &Running, from, flags| {
            let (verdict, out) = run(running, &place, &frame(TCP, from, family.at_node(30080), flags));
            assert_eq!(verdict, REDIRECT);
            read_frame("request", &out)
        };
        for from in [unanswered, answered] {
            assert_eq!(asked(&running, from, SYN).to, old);
        }
        let back = asked(&running, answered, SYN).from;
        assert_eq!(run(&running, &place, &frame(TCP, old, back, SYN | ACK)).0, REDIRECT);
        // The other Service's backends are entered as active: it has to drain after that.
        running.plain(&family, 10, 30080, &[new]).unwrap();
        assert_eq!(
            asked(&running, unanswered, SYN).to,
            old,
            "it takes new flows, of another Service's clients"
        );
        running.drain(old).unwrap();
        assert_eq!(asked(&running, answered, SYN).to, old, "asked again before the answer came");
        assert_eq!(asked(&running, answered, ACK).to, old);
        let request = asked(&running, unanswered, SYN);
        assert_eq!(request.to, new);
        let (verdict, out) = run(&running, &place, &frame(TCP, new, request.from, SYN | ACK));
        assert_eq!(verdict, REDIRECT);
        assert_eq!(read_frame("answer", &out).to, unanswered);
        assert_eq!(asked(&running, unanswered, ACK).to, new);
    }
}

#[test]
fn a_datagram_without_a_checksum_stays_without() {
    if !require("dataplane::packets-unsummed", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pu");
    let mut packet = frame(UDP, client(&V4, 5000), V4.at_node(30080), 0);
    packet[40..42].fill(0);
    let (verdict, out) = run(&running, &place, &packet);
    assert_eq!((verdict, &out[40..42]), (REDIRECT, [0, 0].as_slice()));
}

#[test]
fn extension_headers_do_not_hide_a_flow() {
    if !require("dataplane::packets-extensions", &NEEDS) {
        return;
    }
    let (place, running) = set_up("px");
    let plain = frame(UDP, client(&V6, 5000), V6.at_node(30080), 0);
    let mut payload = vec![UDP, 0, 1, 4, 0, 0, 0, 0];
    payload.extend(&plain[54..]);
    let packet = ethernet(&packet(V6.client, V6.node, 60, &payload));
    let (verdict, out) = run(&running, &place, &packet);
    assert_eq!((verdict, out.len()), (REDIRECT, packet.len()));
    let mut without = out[..54].to_vec();
    (without[18..20]).copy_from_slice(&u16::try_from(out.len() - 62).unwrap().to_be_bytes());
    without[20] = UDP;
    without.extend(&out[62..]);
    assert_eq!(read_frame("its datagram", &without).to, SocketAddr::new(V6.pod, 8080));
}

#[test]
fn refusals_are_valid_packets() {
    if !require("dataplane::packets-refused", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pr");
    for (n, family) in (0..).zip(FAMILIES) {
        let nothing = family.at_node(30081);
        let syn = frame(TCP, client(&family, 5000), nothing, SYN);
        let (verdict, out) = run(&running, &place, &syn);
        assert_eq!(verdict, REDIRECT);
        let answer = read_frame("reset of a SYN", &out);
        assert_eq!((answer.from, answer.to), (nothing, client(&family, 5000)));
        let tcp = &answer.payload;
        assert_eq!((tcp[13], &tcp[8..12]), (RST | ACK, [0, 0, 0, 2].as_slice()), "it acknowledges the SYN");
        assert_eq!((&out[..6], &out[6..12]), (&syn[6..12], &syn[..6]), "back to the sender");

        let middle = frame(TCP, client(&family, 5001), family.at_node(30080), ACK);
        let (verdict, out) = run(&running, &place, &middle);
        assert_eq!(verdict, REDIRECT);
        let tcp = read_frame("reset of an unknown flow", &out).payload;
        assert_eq!(
            (tcp[13], &tcp[4..8]),
            (RST, [0, 0, 0, 2].as_slice()),
            "its number is what was acknowledged"
        );
        assert_eq!(running.drops("unknown_flow"), 2 * n + 1);

        let datagram = frame(UDP, client(&family, 5002), nothing, 0);
        let (verdict, out) = run(&running, &place, &datagram);
        assert_eq!(verdict, REDIRECT);
        let message = read_frame("port unreachable", &out);
        assert_eq!((message.from.ip(), message.to.ip()), (family.node, family.client));
        assert_eq!(message.payload[..2], if family.node.is_ipv4() { [3, 3] } else { [1, 4] });
        let quote = &message.payload[8..];
        assert_eq!(*quote, datagram[14..14 + quote.len()], "it quotes the packet");
        assert_eq!(running.drops("packet_no_endpoints"), 2 * n + 2);

        let reset = frame(TCP, client(&family, 5003), family.at_node(30080), RST);
        assert_eq!(run(&running, &place, &reset).0, DROP, "a reset is never answered");
    }
}

/// Unreachable, "too big", time exceeded.
pub(crate) fn error_kinds(family: &Family) -> [[u8; 2]; 3] {
    if family.node.is_ipv4() { [[3, 3], [3, 4], [11, 0]] } else { [[1, 4], [2, 0], [3, 0]] }
}

#[test]
fn errors_about_translated_packets_reach_the_other_end() {
    if !require("dataplane::packets-errors", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pe");
    for family in FAMILIES {
        for (protocol, flags, answer_flags) in [(TCP, SYN, SYN | ACK), (UDP, 0, 0)] {
            let (from, to) = (client(&family, 5000), family.at_node(30080));
            let request = run(&running, &place, &frame(protocol, from, to, flags)).1;
            let nat = read_frame("request", &request).from;
            let pod = SocketAddr::new(family.pod, 8080);
            let answer = run(&running, &place, &frame(protocol, pod, nat, answer_flags)).1;
            // A router behind the pod or before the client, the pod, the client.
            let router: IpAddr =
                if family.node.is_ipv4() { [10, 9, 9, 9].into() } else { [0xfd99; 8].into() };
            for kind in error_kinds(&family) {
                for (sender, about) in
                    [(family.pod, &request), (router, &request), (family.client, &answer), (router, &answer)]
                {
                    let of_request = about == &request;
                    let to_whom = if of_request { family.gateway } else { family.node };
                    // Cut off, as a router may do that sends no more than it must.
                    for quote in [&about[14..], &about[14..if family.node.is_ipv4() { 42 } else { 62 }]] {
                        let (verdict, out) = run(&running, &place, &error(sender, to_whom, kind, quote));
                        assert_eq!(verdict, REDIRECT);
                        let message = read_frame("error", &out);
                        let inner = read("quote", &message.payload[8..], false);
                        assert_eq!(
                            (&message.payload[..2], &message.payload[4..8]),
                            (&kind[..], &[0, 0, 5, 120][..])
                        );
                        if of_request {
                            assert_eq!((message.from.ip(), message.to.ip()), (family.node, family.client));
                            assert_eq!((inner.from, inner.to), (from, to), "what the client sent");
                        } else {
                            assert_eq!((message.from.ip(), message.to.ip()), (family.gateway, family.pod));
                            assert_eq!((inner.from, inner.to), (pod, nat), "what the pod sent");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn fragments_follow_the_first() {
    if !require("dataplane::packets-fragments", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pf");
    for family in FAMILIES {
        let whole = frame(UDP, client(&family, 5000), family.at_node(30080), 0);
        let part = |number: u16, more: bool, payload: &[u8], id: u8| {
            if family.node.is_ipv4() {
                let mut ip = packet(family.client, family.node, UDP, payload);
                let [high, low] = (number | if more { 0x2000 } else { 0 }).to_be_bytes();
                (ip[4..8]).copy_from_slice(&[7, id, high, low]);
                ip[10..12].fill(0);
                let sum = crate::frames::checksum(&ip[..20]).to_be_bytes();
                ip[10..12].copy_from_slice(&sum);
                ethernet(&ip)
            } else {
                let [high, low] = (number << 3 | u16::from(more)).to_be_bytes();
                let payload = [&[UDP, 0, high, low, 0, 0, 7, id], payload].concat();
                ethernet(&packet(family.client, family.node, 44, &payload))
            }
        };
        let datagram = &whole[if family.node.is_ipv4() { 34 } else { 54 }..];
        let later = part(1, false, b"later part", 1);
        assert_eq!(run(&running, &place, &later).0, PASS, "the first was not seen");
        let (verdict, first) = run(&running, &place, &part(0, true, datagram, 1));
        assert_eq!(verdict, REDIRECT);
        let (verdict, out) = run(&running, &place, &later);
        assert_eq!(verdict, REDIRECT);
        let addresses = |frame: &[u8]| {
            if family.node.is_ipv4() { frame[26..34].to_vec() } else { frame[22..54].to_vec() }
        };
        assert_eq!(addresses(&out), addresses(&first));
        assert!(out.ends_with(b"later part"), "its bytes are not ports");
        if family.node.is_ipv4() {
            assert_eq!(crate::frames::checksum(&out[14..34]), 0);
        }
        assert_eq!(run(&running, &place, &part(1, false, b"later part", 2)).0, PASS, "another packet's");
    }
}

#[test]
fn answers_of_the_node_itself_leave_as_the_service() {
    if !require("dataplane::packets-egress", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pg");
    for family in FAMILIES {
        let (from, to, backend) = (client(&family, 5000), family.at_node(30082), family.at_node(8080));
        let (verdict, request) = run(&running, &place, &frame(UDP, from, to, 0));
        assert_eq!((verdict, read_frame("request", &request).to), (PASS, backend), "by the stack");
        let egress = |packet: &[u8]| run_program(&running, &place, "weft_egress", packet);
        let (verdict, answer) = egress(&frame(UDP, backend, from, 0));
        assert_eq!((verdict, read_frame("answer", &answer).from), (PASS, to));
        let (verdict, out) =
            egress(&error(family.node, family.client, error_kinds(&family)[0], &request[14..]));
        let message = read_frame("error", &out);
        let inner = read("quote", &message.payload[8..], false);
        assert_eq!((verdict, inner.from, inner.to), (PASS, from, to));
        let other = frame(UDP, family.at_node(53), from, 0);
        assert_eq!(egress(&other), (PASS, other), "what the node says for itself");
    }
}

#[test]
fn programs_stay_far_from_the_verifiers_limit() {
    if !require("dataplane::packets-size", &NEEDS) {
        return;
    }
    let place = Place::new("ps").unwrap();
    let running = place.start().unwrap();
    // The verifier gives up at a million instructions; a tenth of it leaves room for kernels that look closer.
    const BOUND: u32 = 100_000;
    let info = |name: &str| match running.programs.program(name) {
        Some(Program::SchedClassifier(program)) => program.info().unwrap(),
        Some(Program::CgroupSockAddr(program)) => program.info().unwrap(),
        _ => panic!("{name} is not there"),
    };
    for name in [
        "weft_ingress",
        "weft_egress",
        "weft_pod_edge",
        "weft_from_pod",
        "weft_to_pod",
        "weft_connect4",
        "weft_connect6",
        "weft_sendmsg6",
        "weft_recvmsg6",
    ] {
        let Some(verified) = info(name).verified_instruction_count() else { continue };
        println!("{name}: {verified} instructions verified");
        assert!(verified <= BOUND, "{name}: {verified}");
    }
}
