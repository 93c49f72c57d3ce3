//! Frames in, what policy sees of them; packets and flows, verdicts.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use weft_ebpf_abi::SCTP;

use super::*;

const A: [u8; 4] = [10, 0, 0, 1];
const B: [u8; 4] = [10, 0, 0, 2];
/// A set that allows B at port 80 of TCP, and nothing else.
const SET: u64 = 5;
const BOTH: u32 = POLICY_INGRESS | POLICY_EGRESS;

#[derive(Default)]
struct Fake {
    flows: RefCell<HashMap<TrackKey, TrackValue>>,
    now: Cell<u32>,
    closed: Cell<bool>,
    would: RefCell<Vec<u64>>,
}

impl PolicyTables for Fake {
    fn identity(&self, address: &Address) -> u64 {
        if *address == Address::v4(B) { 7 } else { IDENTITY_NONE }
    }
    fn allows(&self, set: u64, identity: u64, protocol: u8, port: Port) -> bool {
        !self.closed.get() && (set, identity, protocol, port.get()) == (SET, 7, TCP, 80)
    }
    fn tracked(&self, key: &TrackKey) -> Option<TrackValue> {
        self.flows.borrow().get(key).copied()
    }
    fn track(&self, key: &TrackKey, value: &TrackValue) {
        self.flows.borrow_mut().insert(*key, *value);
    }
    fn would_drop(&self, set: u64) {
        self.would.borrow_mut().push(set);
    }
    fn now(&self) -> u32 {
        self.now.get()
    }
}

fn ipv4(protocol: u8, from: [u8; 4], to: [u8; 4], fragment: u16, rest: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0, 0, 0, 0xab, 0xcd]);
    frame.extend(fragment.to_be_bytes());
    frame.extend([64, protocol, 0, 0]);
    frame.extend(from);
    frame.extend(to);
    frame.extend(rest);
    frame
}

fn ipv6(next: u8, from: u8, to: u8, rest: &[u8]) -> Vec<u8> {
    let address = |last: u8| [[0xfd; 15].as_slice(), &[last]].concat();
    [&[0; 12], [0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, next, 64].as_slice(), &address(from), &address(to), rest]
        .concat()
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    [source.to_be_bytes(), destination.to_be_bytes()].concat()
}

fn tcp(source: u16, destination: u16, flags: u8) -> Vec<u8> {
    [ports(source, destination), vec![0; 9], vec![flags], vec![0; 6]].concat()
}

fn read(frame: &[u8]) -> (Parsed, Packet) {
    let mut packet = Packet::EMPTY;
    (parse(frame, &mut packet), packet)
}

fn packet(frame: &[u8]) -> Packet {
    let (parsed, packet) = read(frame);
    assert_eq!(parsed, Parsed::Packet);
    packet
}

fn edge(flags: u32, way: u8) -> Edge {
    Edge {
        pod: PolicyPod { ingress: SET, egress: SET, dry_ingress: SET, dry_egress: SET + 1, flags, pad: 0 },
        ifindex: 3,
        way,
    }
}

fn passes(fake: &Fake, flags: u32, way: u8, frame: &[u8]) -> bool {
    let packet = packet(frame);
    let peer = if way == TRACK_OUT { packet.destination } else { packet.source };
    check(fake, &edge(flags, way), &packet, &Peer::At(peer))
}

#[test]
fn frames_are_told_apart() {
    let rows: [(&str, Parsed, Vec<u8>); 12] = [
        ("ARP", Parsed::Free, [vec![0; 12], vec![8, 6], vec![0; 28]].concat()),
        ("neighbour solicitation", Parsed::Free, ipv6(ICMPV6, 1, 2, &[135, 0, 0, 0, 0, 0])),
        (
            "listener report behind options",
            Parsed::Free,
            ipv6(0, 1, 2, &[ICMPV6, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0, 0, 0]),
        ),
        ("cut off", Parsed::Broken, ipv4(UDP, A, B, 0, &[0, 1])),
        ("no frame", Parsed::Broken, vec![0; 13]),
        ("version 5", Parsed::Broken, {
            let mut f = ipv4(UDP, A, B, 0, &ports(1, 2));
            f[14] = 0x55;
            f
        }),
        ("options without end", Parsed::Broken, ipv6(0, 1, 2, &[0; 64])),
        ("later fragment", Parsed::Fragment, ipv4(UDP, A, B, 0x2010, &[])),
        ("later fragment of IPv6", Parsed::Fragment, ipv6(44, 1, 2, &[UDP, 0, 0, 8, 1, 2, 3, 4])),
        ("another protocol", Parsed::Packet, ipv4(47, A, B, 0, &[])),
        ("ICMPv6 within IPv4", Parsed::Packet, ipv4(ICMPV6, A, B, 0, &[135, 0, 0, 0, 0, 0])),
        ("ICMP within IPv6", Parsed::Packet, ipv6(ICMP, 1, 2, &[3, 0, 0, 0, 0, 0, 0, 0])),
    ];
    for (name, wanted, frame) in rows {
        assert_eq!(read(&frame).0, wanted, "{name}");
    }
}

#[test]
fn packets_are_read_in_both_families() {
    let syn = packet(&ipv4(TCP, A, B, 0, &tcp(1_000, 80, SYN)));
    assert_eq!((syn.source, syn.destination), (Address::v4(A), Address::v4(B)));
    assert_eq!((syn.source_port.get(), syn.destination_port.get(), syn.begins), (1_000, 80, true));
    assert!(!packet(&ipv4(TCP, A, B, 0, &tcp(1_000, 80, SYN | 0x10))).begins);
    let first = packet(&ipv4(UDP, A, B, 0x2000, &ports(5, 6)));
    assert_eq!((first.fragments, first.identification), (true, [0, 0, 0xab, 0xcd]));
    let first = packet(&ipv6(44, 1, 2, &[&[UDP, 0, 0, 1, 1, 2, 3, 4], ports(5, 6).as_slice()].concat()));
    assert_eq!(
        (first.fragments, first.identification, first.destination_port.get()),
        (true, [1, 2, 3, 4], 6)
    );
    let routed = packet(&ipv6(43, 1, 2, &[&[SCTP, 1, 0, 0], [0; 12].as_slice(), &ports(7, 8)].concat()));
    assert_eq!((routed.protocol, routed.source_port.get()), (SCTP, 7));
    let echo = packet(&ipv4(ICMP, A, B, 0, &[8, 0, 0, 0, 1, 2]));
    assert_eq!((echo.begins, echo.source_port.get(), echo.destination_port.get()), (true, 0x102, 0x102));
}

#[test]
fn an_error_is_read_as_an_answer_to_what_it_quotes() {
    let quote = ipv4(UDP, A, B, 0, &ports(5, 6));
    let error = packet(&ipv4(ICMP, [10, 9, 9, 9], A, 0, &[&[3, 3, 0, 0, 0, 0, 0, 0], &quote[14..]].concat()));
    assert!(error.error && !error.begins);
    assert_eq!((error.source, error.destination), (Address::v4(B), Address::v4(A)));
    assert_eq!((error.source_port.get(), error.destination_port.get(), error.protocol), (6, 5, UDP));
    let quote = ipv6(TCP, 1, 2, &ports(5, 6));
    let error = packet(&ipv6(ICMPV6, 9, 1, &[&[2, 0, 0, 0, 0, 0, 0, 0], &quote[14..]].concat()));
    assert_eq!((error.error, error.protocol, error.source_port.get()), (true, TCP, 6));
    assert_eq!(error.source.0[15], 2);
}

#[test]
fn rules_and_answers() {
    let fake = Fake::default();
    let syn = ipv4(TCP, A, B, 0, &tcp(1_000, 80, SYN));
    let answer = ipv4(TCP, B, A, 0, &tcp(80, 1_000, SYN | 0x10));
    assert!(!passes(&fake, BOTH, TRACK_IN, &answer), "nobody asked");
    assert!(passes(&fake, BOTH, TRACK_OUT, &syn));
    assert!(passes(&fake, BOTH, TRACK_IN, &answer));
    assert!(
        !passes(&fake, BOTH, TRACK_IN, &ipv4(TCP, B, A, 0, &tcp(80, 1_000, SYN))),
        "a bare SYN is no answer"
    );
    assert!(!passes(&fake, BOTH, TRACK_IN, &ipv4(TCP, B, A, 0, &tcp(80, 1_001, 0x10))), "another port");
    assert!(!passes(&fake, BOTH, TRACK_OUT, &ipv4(TCP, A, B, 0, &tcp(1_000, 81, SYN))));
    assert!(!passes(&fake, BOTH, TRACK_OUT, &ipv4(UDP, A, B, 0, &ports(1_000, 80))));
    assert!(!passes(&fake, BOTH, TRACK_OUT, &ipv4(TCP, A, [10, 0, 0, 3], 0, &tcp(1_000, 80, SYN))));
    assert!(passes(&fake, BOTH, TRACK_OUT, &ipv4(UDP, A, A, 0, &ports(1, 2))), "a pod reaches itself");
    fake.closed.set(true);
    assert!(!passes(&fake, BOTH, TRACK_OUT, &syn), "a rule that goes takes the flow with it");
    fake.now.set(TCP_SECONDS + 1);
    assert!(!passes(&fake, BOTH, TRACK_IN, &answer), "after days of silence");
}

#[test]
fn a_way_that_is_not_isolated_is_remembered_for_the_other() {
    let fake = Fake::default();
    let out = ipv4(UDP, A, [10, 0, 0, 3], 0, &ports(1_000, 53));
    let back = ipv4(UDP, [10, 0, 0, 3], A, 0, &ports(53, 1_000));
    assert!(passes(&fake, POLICY_INGRESS, TRACK_OUT, &out) && passes(&fake, POLICY_INGRESS, TRACK_IN, &back));
    fake.now.set(UDP_SECONDS + 1);
    assert!(!passes(&fake, POLICY_INGRESS, TRACK_IN, &back));
    // The pod answers: that must not open the way to it once the rule is gone.
    let ask = ipv4(TCP, B, A, 0, &tcp(9, 80, SYN));
    assert!(passes(&fake, POLICY_INGRESS, TRACK_IN, &ask));
    assert!(passes(&fake, POLICY_INGRESS, TRACK_OUT, &ipv4(TCP, A, B, 0, &tcp(80, 9, SYN | 0x10))));
    fake.closed.set(true);
    assert!(!passes(&fake, POLICY_INGRESS, TRACK_IN, &ipv4(TCP, B, A, 0, &tcp(9, 80, 0x10))));
}

#[test]
fn errors_come_back_and_begin_nothing() {
    let fake = Fake::default();
    let out = ipv4(UDP, A, [10, 0, 0, 3], 0, &ports(1_000, 53));
    let error =
        |quote: &[u8]| ipv4(ICMP, [10, 9, 9, 9], A, 0, &[&[3, 3, 0, 0, 0, 0, 0, 0], &quote[14..]].concat());
    assert!(!passes(&fake, BOTH & POLICY_INGRESS, TRACK_IN, &error(&out)));
    assert!(fake.flows.borrow().is_empty());
    assert!(passes(&fake, POLICY_INGRESS, TRACK_OUT, &out));
    assert!(passes(&fake, POLICY_INGRESS, TRACK_IN, &error(&out)));
    let other = ipv4(UDP, A, [10, 0, 0, 3], 0, &ports(1_001, 53));
    assert!(!passes(&fake, POLICY_INGRESS, TRACK_IN, &error(&other)));
}

#[test]
fn later_fragments_follow_the_first() {
    let fake = Fake::default();
    let (_, later) = read(&ipv4(TCP, B, A, 0x2010, &[]));
    assert!(!check_fragment(&fake, &edge(POLICY_INGRESS, TRACK_IN), &later));
    assert!(passes(&fake, POLICY_INGRESS, TRACK_IN, &ipv4(TCP, B, A, 0x2000, &tcp(9, 80, 0))));
    assert!(check_fragment(&fake, &edge(POLICY_INGRESS, TRACK_IN), &later));
    assert!(
        !check_fragment(&fake, &edge(POLICY_EGRESS, TRACK_OUT), &later),
        "the other way is another matter"
    );
    assert!(check_fragment(&fake, &edge(POLICY_EGRESS, TRACK_IN), &later), "a way that is not isolated");
}

#[test]
fn an_ended_connection_is_forgotten_soon_and_may_begin_again() {
    let fake = Fake::default();
    let out = |flags| ipv4(TCP, A, B, 0, &tcp(1_000, 80, flags));
    let back = ipv4(TCP, B, A, 0, &tcp(80, 1_000, 0x10));
    assert!(passes(&fake, BOTH, TRACK_OUT, &out(SYN)) && passes(&fake, BOTH, TRACK_OUT, &out(FIN | 0x10)));
    assert!(passes(&fake, BOTH, TRACK_IN, &back));
    fake.now.set(TCP_CLOSING_SECONDS + 1);
    assert!(!passes(&fake, BOTH, TRACK_IN, &back));
    assert!(passes(&fake, BOTH, TRACK_OUT, &out(SYN)));
    fake.now.set(3 * TCP_CLOSING_SECONDS);
    assert!(passes(&fake, BOTH, TRACK_IN, &back));
}

#[test]
fn what_is_on_trial_only_counts() {
    let fake = Fake::default();
    let syn = ipv4(TCP, A, B, 0, &tcp(1_000, 80, SYN));
    let answer = ipv4(TCP, B, A, 0, &tcp(80, 1_000, SYN | 0x10));
    let dry = POLICY_DRY_EGRESS | POLICY_DRY_INGRESS;
    assert!(passes(&fake, dry, TRACK_OUT, &syn) && passes(&fake, dry, TRACK_IN, &answer));
    assert_eq!(*fake.would.borrow(), [SET + 1], "answers are no packets of their own");
    assert!(passes(&fake, dry, TRACK_IN, &ipv4(TCP, B, A, 0, &tcp(9, 80, SYN))));
    assert!(passes(&fake, dry, TRACK_IN, &ipv4(TCP, B, A, 0, &tcp(9, 81, SYN))));
    assert_eq!(*fake.would.borrow(), [SET + 1, SET]);
    assert!(!passes(&fake, POLICY_EGRESS | dry, TRACK_OUT, &ipv4(UDP, A, B, 0, &ports(5, 6))));
    assert_eq!(fake.would.borrow().len(), 2, "what is dropped anyway is not counted");
}
