//! Packets of both families: what is read from them, and that answers are valid.

use proptest::prelude::*;
use weft_ebpf_abi::*;

use crate::packet::answer::{Error, icmp_bytes, icmp_error, tcp_reset};
use crate::packet::{
    self, Bytes, ETHERNET_BYTES, Family, FragmentId, Packet, Part, RST, V4, V6, parse, parse_quote,
};

/// The checksum as RFC 1071 words it, for comparison.
fn reference_checksum(bytes: &[u8]) -> u16 {
    let mut total: u64 =
        bytes.chunks(2).map(|c| u64::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !u16::try_from(total).unwrap()
}

/// Pseudo-header and payload, as RFC 9293 §3.1 and RFC 8200 §8.1 word them.
fn pseudo(source: &Address, destination: &Address, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let mut all = Vec::new();
    match (source.as_v4(), destination.as_v4()) {
        (Some(s), Some(d)) => all.extend([s.as_slice(), &d, &[0, protocol], &length].concat()),
        _ => all.extend([&source.0, &destination.0, &[0, 0][..], &length, &[0, 0, 0, protocol]].concat()),
    }
    all.extend(payload);
    all
}

fn packet_between(
    source: Address,
    destination: Address,
    protocol: u8,
    total_bytes: u32,
    header_bytes: u32,
) -> Packet {
    let mut packet = Packet::between(source, destination);
    packet.key.protocol = protocol;
    packet.total_bytes = total_bytes;
    packet.header_bytes = header_bytes;
    packet
}

fn v6(low: u8) -> Address {
    let mut bytes = [0; 16];
    (bytes[0], bytes[1], bytes[15]) = (0xfd, 0x42, low);
    Address(bytes)
}

/// A frame: Ethernet, an IPv6 header that says `next`, and what follows it.
fn frame6(next: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
    let mut frame = vec![0; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, length[0], length[1], next, 64]);
    frame.extend(v6(1).0);
    frame.extend(v6(2).0);
    frame.extend(rest);
    frame
}

/// A frame: Ethernet, an IPv4 header with a fragment field, and what follows it.
fn frame4(protocol: u8, fragment: u16, rest: &[u8]) -> Vec<u8> {
    let (length, fragment) = (u16::try_from(20 + rest.len()).unwrap().to_be_bytes(), fragment.to_be_bytes());
    let mut frame = vec![0; 12];
    frame.extend([
        8,
        0,
        0x45,
        0,
        length[0],
        length[1],
        0x12,
        0x34,
        fragment[0],
        fragment[1],
        64,
        protocol,
        0,
        0,
    ]);
    frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(rest);
    frame
}

const PORTS: [u8; 8] = [0, 80, 1, 0, 0, 8, 0, 0];

fn with(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn extension_headers_are_read_over() {
    let options = |next: u8, units: u8| {
        let mut bytes = vec![0; 8 * (usize::from(units) + 1)];
        (bytes[0], bytes[1]) = (next, units);
        bytes
    };
    let fragment = |next: u8, offset: u16| {
        let [a, b] = offset.to_be_bytes();
        vec![next, 0, a, b, 0, 1, 2, 3]
    };
    let rows = [
        ("none", UDP, with(&[&PORTS]), Some((40, Part::Whole))),
        ("hop by hop", 0, with(&[&options(UDP, 0), &PORTS]), Some((48, Part::Whole))),
        ("long options", 60, with(&[&options(UDP, 3), &PORTS]), Some((72, Part::Whole))),
        ("atomic fragment", 44, with(&[&fragment(UDP, 0), &PORTS]), Some((48, Part::Whole))),
        ("first fragment", 44, with(&[&fragment(UDP, 1), &PORTS]), Some((48, Part::First))),
        ("later fragment", 44, with(&[&fragment(UDP, 185 << 3 | 1), &PORTS]), Some((48, Part::Later))),
        ("last fragment", 44, with(&[&fragment(UDP, 185 << 3), &PORTS]), Some((48, Part::Later))),
        (
            "all that RFC 8200 puts in a row",
            0,
            with(&[&options(60, 0), &options(44, 0), &fragment(60, 1), &options(UDP, 0), &PORTS]),
            Some((72, Part::First)),
        ),
        (
            "one more",
            0,
            with(&[
                &options(60, 0),
                &options(60, 0),
                &options(60, 0),
                &options(60, 0),
                &options(UDP, 0),
                &PORTS,
            ]),
            None,
        ),
        ("routing header", 43, with(&[&options(UDP, 0), &PORTS]), None),
        ("authentication", 51, with(&[&options(UDP, 0), &PORTS]), None),
        ("cut off", 60, with(&[&options(UDP, 9)[..8]]), None),
        ("echo request", 58, with(&[&[128, 0, 0, 0, 0, 0, 0, 0]]), None),
        ("neighbour solicitation", 58, with(&[&[135, 0, 0, 0, 0, 0, 0, 0]]), None),
        ("packet too big", 58, with(&[&[2, 0, 0, 0, 0, 0, 5, 0]]), Some((40, Part::Whole))),
    ];
    for (name, next, rest, wanted) in rows {
        let read = parse::<V6, _>(frame6(next, &rest).as_slice());
        assert_eq!(read.map(|p| (p.header_bytes, p.part)), wanted, "{name}");
        if let Some(packet) = read.filter(|p| p.key.protocol == UDP && p.part != Part::Later) {
            assert_eq!(
                (packet.key.source_port.get(), packet.key.destination_port.get()),
                (80, 256),
                "{name}"
            );
            assert_eq!((packet.key.source, packet.key.destination), (v6(1), v6(2)), "{name}");
        }
    }
}

#[test]
fn a_mapped_address_on_the_wire_is_nobodys() {
    let mut frame = frame6(UDP, &PORTS);
    frame[14 + 8..14 + 24].copy_from_slice(&Address::v4([10, 43, 0, 1]).0);
    assert_eq!(parse::<V6, _>(frame.as_slice()), None);
}

#[test]
fn fragments_of_one_packet_have_one_key() {
    let first = parse::<V4, _>(frame4(UDP, 0x2000, &PORTS).as_slice()).unwrap();
    let mut later = parse::<V4, _>(frame4(UDP, 185, b"payload!").as_slice()).unwrap();
    assert_eq!((first.part, later.part), (Part::First, Part::Later));
    assert_eq!(first.fragment, FragmentId { id: 0x1234, protocol: UDP });
    assert_eq!(first.fragment_key(), later.fragment_key());
    assert_ne!(first.key, later.key);
    later.complete(&first.fragment_value());
    assert_eq!(first.key, later.key);
    let whole = parse::<V4, _>(frame4(UDP, 0x4000, &PORTS).as_slice()).unwrap();
    assert_eq!(whole.part, Part::Whole, "don't fragment");

    let in_v6 = |offset: u16, next: u8| {
        let [a, b] = offset.to_be_bytes();
        parse::<V6, _>(frame6(44, &with(&[&[next, 0, a, b, 9, 9, 9, 9], &PORTS])).as_slice()).unwrap()
    };
    let (first, mut later) = (in_v6(1, UDP), in_v6(80, UDP));
    assert_eq!(first.fragment_key(), later.fragment_key());
    later.complete(&first.fragment_value());
    assert_eq!(first.key, later.key);
}

#[test]
fn errors_quote_what_was_sent() {
    let quoted = &frame4(TCP, 0x4000, &PORTS)[ETHERNET_BYTES..];
    let error = frame4(1, 0, &with(&[&[3, 4, 0, 0, 0, 0, 5, 0], quoted]));
    let outer = parse::<V4, _>(error.as_slice()).unwrap();
    let inner = parse_quote::<V4, _>(error.as_slice(), &outer).unwrap();
    assert_eq!((inner.key.source_port.get(), inner.key.protocol), (80, TCP));
    assert_eq!(inner.key.source, Address::v4([10, 0, 0, 1]));

    let quoted = &frame6(UDP, &PORTS)[ETHERNET_BYTES..];
    let error = frame6(58, &with(&[&[1, 4, 0, 0, 0, 0, 0, 0], quoted]));
    let outer = parse::<V6, _>(error.as_slice()).unwrap();
    let inner = parse_quote::<V6, _>(error.as_slice(), &outer).unwrap();
    assert_eq!((inner.key.source, inner.key.destination_port.get()), (v6(1), 256));

    let short = &error[..error.len() - 6];
    assert_eq!(parse_quote::<V6, _>(short, &outer), None, "cut off before the ports");
    let ping = frame4(1, 0, &[8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(parse::<V4, _>(ping.as_slice()), None, "no error");
    let about_ping = frame4(1, 0, &with(&[&[3, 1, 0, 0, 0, 0, 0, 0], &ping[ETHERNET_BYTES..]]));
    let outer = parse::<V4, _>(about_ping.as_slice()).unwrap();
    assert_eq!(parse_quote::<V4, _>(about_ping.as_slice(), &outer), None, "about neither TCP nor UDP");
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    std::array::from_fn(|i| u32::from_ne_bytes(bytes[i * 4..i * 4 + 4].try_into().unwrap()))
}

/// A refusal is addressed back and its checksums hold.
fn check_answers<F: Family>(packet: &Packet, tcp: &[u8; 20], quote: &F::Quote)
where
    F::Header: AsRef<[u32]>,
    F::Quote: AsRef<[u32]>,
{
    let (back, to) = (packet.key.destination, packet.key.source);
    let (back_port, to_port) = (packet.key.destination_port.0, packet.key.source_port.0);
    let segment = bytes(&tcp_reset(packet, &words(tcp)));
    assert_eq!(reference_checksum(&pseudo(&back, &to, TCP, &segment)), 0);
    assert_eq!(segment[..4], [back_port[0], back_port[1], to_port[0], to_port[1]]);
    assert!(segment[13] & RST != 0);
    let long: packet::LongQuote = std::array::from_fn(|i| u32::from(tcp[i % 20]) << i);
    for message in [
        [bytes(&icmp_error::<F, _>(packet, quote, Error::port_unreachable::<F>())), bytes(quote.as_ref())],
        [bytes(&icmp_error::<F, _>(packet, &long, Error::too_big::<F>(1_400))), bytes(&long)],
    ] {
        let message = message.concat();
        let big = message[..2] == F::TOO_BIG;
        assert!(big || message[..2] == F::PORT_UNREACHABLE);
        assert_eq!(message[4..8], if big { 1_400_u32.to_be_bytes() } else { [0; 4] });
        let covered = if F::ICMP_COVERS_ADDRESSES { pseudo(&back, &to, F::ICMP, &message) } else { message };
        assert_eq!(reference_checksum(&covered), 0);
    }
    let header = bytes(F::answer(packet, F::ICMP, icmp_bytes::<F::Quote>()).as_ref());
    assert_eq!(header.len(), F::HEADER_BYTES);
    let read = F::header(header.as_slice(), 0).unwrap();
    assert_eq!((read.key.source, read.key.destination, read.key.protocol), (back, to, F::ICMP));
    assert_eq!(read.total_bytes as usize, F::HEADER_BYTES + usize::from(icmp_bytes::<F::Quote>()));
    if !F::ICMP_COVERS_ADDRESSES {
        assert_eq!(reference_checksum(&header), 0);
    }
}

proptest! {
    #[test]
    fn checksums(bytes: [u8; 32]) {
        let ours = packet::fold(packet::sum(&words::<8>(&bytes)));
        prop_assert_eq!(ours, reference_checksum(&bytes).to_be_bytes());
    }

    #[test]
    fn pseudo_headers(a: [u8; 16], b: [u8; 16], c: [u8; 4], d: [u8; 4], length: u16, protocol: u8) {
        for (source, destination) in [(Address(a), Address(b)), (Address::v4(c), Address::v4(d))] {
            let mut reference = pseudo(&source, &destination, protocol, &[]);
            let at = if source.as_v4().is_some() && destination.as_v4().is_some() { 10 } else { 34 };
            reference[at..at + 2].copy_from_slice(&length.to_be_bytes());
            let ours = packet::fold(packet::sum_pseudo(&source, &destination, protocol, length));
            prop_assert_eq!(ours, reference_checksum(&reference).to_be_bytes());
        }
    }

    #[test]
    fn parsing_never_panics(bytes: Vec<u8>, kind in 0..2_usize) {
        let mut frame = vec![0; 12];
        frame.extend([V4::ETHERTYPE, V6::ETHERTYPE][kind]);
        frame.extend(bytes);
        let frame = frame.as_slice();
        for read in [parse::<V4, _>(frame), parse::<V6, _>(frame)].into_iter().flatten() {
            let known = [TCP, UDP, SCTP, V4::ICMP, V6::ICMP].contains(&read.key.protocol);
            prop_assert!(known || read.part == Part::Later);
            let _ = (parse_quote::<V4, _>(frame, &read), parse_quote::<V6, _>(frame, &read));
        }
    }

    #[test]
    fn parsing_shaped_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 60..200), first in 0..7_usize) {
        // The bytes after the header are chains of extensions as often as chance has it.
        let mut bytes = bytes;
        bytes[0] = 0x60;
        bytes[6] = [0, 44, 60, TCP, UDP, 58, SCTP][first];
        let frame = [vec![0; 14], bytes].concat();
        if let Some(read) = parse::<V6, _>(frame.as_slice()) {
            prop_assert!(read.part == Part::Later || frame.as_slice().read::<1>(read.transport()).is_some());
            let _ = parse_quote::<V6, _>(frame.as_slice(), &read);
        }
    }

    #[test]
    fn answers_are_valid(
        (a, b, tcp) in any::<([u8; 4], [u8; 4], [u8; 20])>(),
        total in 40_u32..1_500,
        quote4: [u32; 7],
        (c, d) in any::<([u8; 16], [u8; 16])>(),
        quote6: [u32; 12],
    ) {
        let packet = packet_between(Address::v4(a), Address::v4(b), TCP, total, 20);
        check_answers::<V4>(&packet, &tcp, &quote4);
        let (c, d) = (Address(c), Address(d));
        prop_assume!(c.as_v4().is_none() && d.as_v4().is_none());
        check_answers::<V6>(&packet_between(c, d, TCP, total + 20, 40), &tcp, &quote6);
    }
}
