//! Rows of packet in, verdict and packet out, through BPF_PROG_TEST_RUN.

use std::net::{Ipv4Addr, SocketAddr};

use aya::programs::{Program, TestRun as _, TestRunOptions};
use weft_ebpf_abi::{NAT_PORT_FIRST, TCP, UDP};
use weft_tests_harness::require;

use crate::NEEDS;
use crate::place::{CLIENT, GATEWAY, NODE, POD, Place, Running, within};

const PASS: u32 = 0;
const REDIRECT: u32 = 7;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

fn checksum(bytes: &[u8]) -> u16 {
    let mut total: u32 =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !u16::try_from(total).unwrap()
}

fn pseudo(ip: &[u8]) -> Vec<u8> {
    let length = u16::try_from(ip.len() - 20).unwrap();
    [&ip[12..20], &[0, ip[9]], &length.to_be_bytes(), &ip[20..]].concat()
}

/// An Ethernet frame with valid checksums.
fn frame(protocol: u8, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), flags: u8) -> Vec<u8> {
    let mut transport = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    let payload = b"hello";
    if protocol == TCP {
        transport.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    } else {
        transport.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
        transport.extend([0, 0]);
    }
    if protocol == UDP || flags & SYN == 0 {
        transport.extend(payload);
    }
    let total = u16::try_from(20 + transport.len()).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, protocol, 0, 0];
    ip.extend(from.0.octets());
    ip.extend(to.0.octets());
    let sum = checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    ip.extend(transport);
    let at = 20 + if protocol == TCP { 16 } else { 6 };
    let sum = checksum(&pseudo(&ip)).to_be_bytes();
    ip[at..at + 2].copy_from_slice(&sum);
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0], ip.as_slice()].concat()
}

fn run(running: &Running, place: &Place, packet: &[u8]) -> (u32, Vec<u8>) {
    let Some(Program::SchedClassifier(program)) = running.programs.program("weft_ingress") else {
        panic!("not there")
    };
    within(&place.node, || {
        let mut out = vec![0; 2_048];
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program.test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    })
}

fn assert_valid(name: &str, packet: &[u8]) {
    let total = usize::from(u16::from_be_bytes([packet[16], packet[17]]));
    assert_eq!(packet.len(), 14 + total, "{name}: length");
    assert_eq!(checksum(&packet[14..34]), 0, "{name}: IPv4 checksum");
    let covered = if packet[23] == 1 { packet[34..].to_vec() } else { pseudo(&packet[14..]) };
    assert_eq!(checksum(&covered), 0, "{name}: checksum");
}

fn source(packet: &[u8]) -> (Ipv4Addr, u16) {
    let ip = Ipv4Addr::new(packet[26], packet[27], packet[28], packet[29]);
    (ip, u16::from_be_bytes([packet[34], packet[35]]))
}

fn destination(packet: &[u8]) -> (Ipv4Addr, u16) {
    let ip = Ipv4Addr::new(packet[30], packet[31], packet[32], packet[33]);
    (ip, u16::from_be_bytes([packet[36], packet[37]]))
}

fn set_up(label: &str) -> (Place, Running) {
    let place = Place::new(label).unwrap();
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[SocketAddr::from((POD, 8080))]).unwrap();
    running.service(11, 30081, &[]).unwrap();
    (place, running)
}

#[test]
fn packets_that_are_nobodys_pass_untouched() {
    if !require("dataplane::packets-pass", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pp");
    let mut fragment = frame(UDP, (CLIENT, 5000), (NODE, 30080), 0);
    fragment[20..22].copy_from_slice(&[0, 10]);
    let mut arp = frame(UDP, (CLIENT, 5000), (NODE, 30080), 0);
    arp[12..14].copy_from_slice(&[8, 6]);
    let mut icmp = frame(UDP, (CLIENT, 5000), (NODE, 30080), 0);
    icmp[23] = 1;
    let mut short = frame(TCP, (CLIENT, 5000), (NODE, 30080), SYN);
    short.truncate(14 + 20 + 2);
    let rows = [
        ("another port of the node", frame(TCP, (CLIENT, 5000), (NODE, 22), SYN)),
        ("through the node", frame(TCP, (CLIENT, 5000), (POD, 30080), SYN)),
        ("to nobody", frame(UDP, (POD, 5000), (Ipv4Addr::new(8, 8, 8, 8), 53), 0)),
        ("later fragment", fragment),
        ("no IPv4", arp),
        ("neither TCP nor UDP", icmp),
        ("cut off", short),
    ];
    for (name, packet) in rows {
        assert_eq!(run(&running, &place, &packet), (PASS, packet), "{name}");
    }
}

#[test]
fn packets_to_services_are_translated_and_their_answers_back() {
    if !require("dataplane::packets-translated", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pt");
    let mut ports = std::collections::BTreeSet::new();
    for (protocol, flags, answer_flags) in [(TCP, SYN, SYN | ACK), (UDP, 0, 0)] {
        for port in 5_000..5_050 {
            let packet = frame(protocol, (CLIENT, port), (NODE, 30080), flags);
            let (verdict, out) = run(&running, &place, &packet);
            assert_eq!(verdict, REDIRECT);
            assert_valid("request", &out);
            assert_eq!(destination(&out), (POD, 8080));
            let (address, nat) = source(&out);
            assert_eq!(address, GATEWAY);
            assert!(nat >= NAT_PORT_FIRST);
            assert!(ports.insert((protocol, nat)), "two flows share a port");
            let (_, again) = run(&running, &place, &packet);
            assert_eq!(again, out, "a repeated packet takes the same way");
            let answer = frame(protocol, (POD, 8080), (GATEWAY, nat), answer_flags);
            let (verdict, out) = run(&running, &place, &answer);
            assert_eq!(verdict, REDIRECT);
            assert_valid("answer", &out);
            assert_eq!((source(&out), destination(&out)), ((NODE, 30080), (CLIENT, port)));
        }
    }
}

#[test]
fn refusals_are_valid_packets() {
    if !require("dataplane::packets-refused", &NEEDS) {
        return;
    }
    let (place, running) = set_up("pr");
    let syn = frame(TCP, (CLIENT, 5000), (NODE, 30081), SYN);
    let (verdict, out) = run(&running, &place, &syn);
    assert_eq!(verdict, REDIRECT);
    assert_valid("reset of a SYN", &out);
    assert_eq!((source(&out), destination(&out)), ((NODE, 30081), (CLIENT, 5000)));
    assert_eq!((out[47], &out[42..46]), (RST | ACK, [0, 0, 0, 2].as_slice()), "it acknowledges the SYN");
    assert_eq!((&out[..6], &out[6..12]), (&syn[6..12], &syn[..6]), "back to the sender");

    let (verdict, out) = run(&running, &place, &frame(TCP, (CLIENT, 5001), (NODE, 30080), ACK));
    assert_eq!(verdict, REDIRECT);
    assert_valid("reset of an unknown flow", &out);
    assert_eq!(
        (out[47], &out[38..42]),
        (RST, [0, 0, 0, 2].as_slice()),
        "its number is what was acknowledged"
    );
    assert_eq!(running.drops("unknown_flow"), 1);

    let datagram = frame(UDP, (CLIENT, 5002), (NODE, 30081), 0);
    let (verdict, out) = run(&running, &place, &datagram);
    assert_eq!(verdict, REDIRECT);
    assert_valid("port unreachable", &out);
    assert_eq!(&out[34..36], [3, 3]);
    assert_eq!(out[42..], datagram[14..42], "it quotes the packet");
    assert_eq!(running.drops("packet_no_endpoints"), 2);

    let mut reset = frame(TCP, (CLIENT, 5003), (NODE, 30080), RST);
    reset.truncate(14 + 40);
    assert_eq!(run(&running, &place, &reset).0, 2, "a reset is never answered");
}
