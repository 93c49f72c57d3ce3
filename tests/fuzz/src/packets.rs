//! Frames: read as they are, read as they were written, and what answers them.

use weft_ebpf_abi::{Address, Port, SCTP, TCP, UDP};
use weft_ebpf_logic::packet::answer::{self, Error};
use weft_ebpf_logic::packet::{self, Family, LongQuote, Packet, Part, Quote, V4, V6};
use weft_ebpf_logic::policy::{self, Parsed};

use crate::input::Input;

const ETHERNET_BYTES: usize = packet::ETHERNET_BYTES;
const ICMPV6: u8 = 58;

/// Any bytes: the two parsers agree on what both can read.
pub(crate) fn bytes(frame: &[u8]) {
    let mut seen = policy::Packet::EMPTY;
    let parsed = policy::parse(frame, &mut seen);
    match frame.get(12..14) {
        Some([0x08, 0x00]) => agree::<V4>(frame, parsed, &seen),
        Some([0x86, 0xdd]) => agree::<V6>(frame, parsed, &seen),
        Some(_) => assert_eq!(parsed, Parsed::Free, "not IP"),
        None => assert_eq!(parsed, Parsed::Broken, "no frame"),
    }
    if parsed == Parsed::Free && frame[12..14] == V4::ETHERTYPE {
        panic!("all of IPv4 is a matter of policy");
    }
    // Whatever the EtherType says, a program may be asked.
    packet::parse::<V4, _>(frame);
    packet::parse::<V6, _>(frame);
}

fn agree<F: Family>(frame: &[u8], parsed: Parsed, seen: &policy::Packet) {
    let Some(read) = packet::parse::<F, _>(frame) else { return };
    assert!(read.header_bytes as usize >= F::HEADER_BYTES);
    if read.part == Part::Later {
        assert_eq!(parsed, Parsed::Fragment);
        assert_eq!((seen.source, seen.destination), (read.key.source, read.key.destination));
        return;
    }
    if read.key.protocol == F::ICMP {
        let Some(quoted) = packet::parse_quote::<F, _>(frame, &read) else { return };
        // Policy takes the quote of an IPv6 packet for one without extensions, and knows the errors that there are, where
        // Services' packets take all types that are kept for errors.
        let known = matches!(frame.get(read.transport()), Some(1..=4));
        let plain = quoted.header_bytes as usize == F::HEADER_BYTES && known;
        if F::ETHERTYPE == V4::ETHERTYPE || plain {
            assert_eq!(parsed, Parsed::Packet);
            assert!(seen.error);
            let key = packet_key(&quoted);
            let turned = (seen.destination, seen.source, seen.destination_port, seen.source_port);
            assert_eq!((key.0, key.1, key.2, key.3), turned);
            assert_eq!(seen.protocol, quoted.key.protocol);
        }
        return;
    }
    // TCP's flags are read by both, and a frame that ends before them is none to both.
    assert_eq!(parsed, Parsed::Packet);
    assert_eq!(packet_key(&read), (seen.source, seen.destination, seen.source_port, seen.destination_port));
    assert_eq!((seen.protocol, seen.tcp_flags), (read.key.protocol, read.flags));
    assert_eq!(seen.fragments, read.part == Part::First);
}

fn packet_key(packet: &Packet) -> (Address, Address, Port, Port) {
    let key = packet.key;
    (key.source, key.destination, key.source_port, key.destination_port)
}

/// A packet as it is meant.
struct Meant {
    source: Address,
    destination: Address,
    protocol: u8,
    ports: [u16; 2],
    flags: u8,
    /// Offset in units of eight bytes, whether more follow, identification.
    fragment: Option<(u16, bool, u32)>,
    /// Extension headers of IPv6 (kind and length in units of eight bytes), or words of options of IPv4.
    extensions: Vec<(u8, u8)>,
    payload: Vec<u8>,
}

impl Meant {
    fn of(input: &mut Input<'_>, v6: bool) -> Self {
        let address = |input: &mut Input<'_>| {
            let bytes: [u8; 16] = input.array();
            if v6 { Address(bytes) } else { Address::v4([bytes[0], bytes[1], bytes[2], bytes[3]]) }
        };
        let (source, destination) = (address(input), address(input));
        let fragment = input.flag().then(|| (input.u16() & 0x1fff, input.flag(), input.u32()));
        let kinds: &[u8] = if v6 { &[0, 60, 43] } else { &[0] };
        let extensions = (0..input.below(6)).map(|_| (input.pick(kinds), input.pick(&[0, 1, 2]))).collect();
        Self {
            source,
            destination,
            protocol: input.pick(&[TCP, UDP, SCTP, 1, ICMPV6, 47, 6, 17]),
            ports: [input.u16(), input.u16()],
            flags: input.u8(),
            fragment,
            extensions,
            payload: input.bytes(64),
        }
    }

    fn transport(&self) -> Vec<u8> {
        let mut out = [self.ports[0].to_be_bytes(), self.ports[1].to_be_bytes()].concat();
        out.extend([0; 9]);
        out.extend([self.flags, 0, 0, 0, 0, 0, 0]);
        out.extend(&self.payload);
        out
    }

    fn v4(&self) -> Vec<u8> {
        let words = self.extensions.len().min(10);
        let transport = self.transport();
        let total = u16::try_from(20 + words * 4 + transport.len()).unwrap_or(u16::MAX);
        let (offset, more, id) = self.fragment.unwrap_or_default();
        let flags = offset | if more { 0x2000 } else { 0 };
        let first = 0x45 + u8::try_from(words).unwrap_or(0);
        let [a, b] = total.to_be_bytes();
        let [_, _, c, d] = id.to_be_bytes();
        let [e, f] = flags.to_be_bytes();
        let mut out = vec![0; 12];
        out.extend([8, 0, first, 0, a, b, c, d, e, f, 64, self.protocol, 0, 0]);
        out.extend(self.source.low());
        out.extend(self.destination.low());
        out.extend(vec![1; words * 4]);
        out.extend(transport);
        out
    }

    fn v6(&self) -> Vec<u8> {
        let mut headers: Vec<(u8, Vec<u8>)> = Vec::new();
        for (kind, length) in &self.extensions {
            let mut body = vec![0, *length];
            body.resize((usize::from(*length) + 1) * 8, 0);
            headers.push((*kind, body));
        }
        if let Some((offset, more, id)) = self.fragment {
            let [a, b] = (offset << 3 | u16::from(more)).to_be_bytes();
            headers.push((44, [&[0, 0, a, b][..], &id.to_be_bytes()].concat()));
        }
        for at in 0..headers.len() {
            headers[at].1[0] = headers.get(at + 1).map_or(self.protocol, |next| next.0);
        }
        let first = headers.first().map_or(self.protocol, |header| header.0);
        let payload = [headers.into_iter().flat_map(|header| header.1).collect(), self.transport()].concat();
        let [a, b] = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
        let mut out = vec![0; 12];
        out.extend([0x86, 0xdd, 0x60, 0, 0, 0, a, b, first, 64]);
        out.extend(self.source.0);
        out.extend(self.destination.0);
        out.extend(payload);
        out
    }

    /// What a fragment is called; one that is all of its packet is none in IPv6, and can't be written in IPv4.
    fn part(&self) -> Part {
        match self.fragment {
            None | Some((0, false, _)) => Part::Whole,
            Some((0, true, _)) => Part::First,
            Some(_) => Part::Later,
        }
    }
}

/// A packet that is written and read again.
pub(crate) fn built(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let v6 = input.flag();
    let meant = Meant::of(&mut input, v6);
    if v6 {
        let routed = meant.extensions.iter().any(|(kind, _)| *kind == 43);
        let count = meant.extensions.len() + usize::from(meant.fragment.is_some());
        let mapped = [meant.source, meant.destination].iter().any(|address| address.as_v4().is_some());
        let frame = meant.v6();
        let header = 40
            + meant.extensions.iter().map(|(_, length)| (usize::from(*length) + 1) * 8).sum::<usize>()
            + if meant.fragment.is_some() { 8 } else { 0 };
        let readable = !routed && !mapped && count <= 4;
        check::<V6>(&meant, &frame, header, readable);
        check_policy(&meant, &frame, count <= 4);
    } else {
        let frame = meant.v4();
        let header = 20 + meant.extensions.len().min(10) * 4;
        check::<V4>(&meant, &frame, header, true);
        check_policy(&meant, &frame, true);
    }
}

fn check<F: Family>(meant: &Meant, frame: &[u8], header_bytes: usize, readable: bool) {
    let read = packet::parse::<F, _>(frame);
    let part = meant.part();
    let is_ours = part == Part::Later || [TCP, UDP, SCTP].contains(&meant.protocol);
    if !readable || !is_ours {
        // An ICMP message of an error's type is read; its type is the first byte of what would be ports.
        let error = meant.protocol == F::ICMP && readable;
        assert!(read.is_none() || error, "{read:?}");
        return;
    }
    let Some(read) = read else { panic!("not read") };
    assert_eq!((read.key.source, read.key.destination), (meant.source, meant.destination));
    assert_eq!(read.part, part);
    assert_eq!(read.header_bytes as usize, header_bytes);
    assert_eq!(read.total_bytes as usize, frame.len() - ETHERNET_BYTES);
    if let (Some((_, _, id)), true) = (meant.fragment, part != Part::Whole) {
        let mask = if F::ETHERTYPE == V4::ETHERTYPE { 0xffff } else { u32::MAX };
        assert_eq!(read.fragment.id, id & mask);
    }
    if part != Part::Later {
        let ports = [read.key.source_port.get(), read.key.destination_port.get()];
        assert_eq!((ports, read.key.protocol), (meant.ports, meant.protocol));
        assert_eq!(read.flags, if meant.protocol == TCP { meant.flags } else { 0 });
    }
}

fn check_policy(meant: &Meant, frame: &[u8], readable: bool) {
    let mut seen = policy::Packet::EMPTY;
    let parsed = policy::parse(frame, &mut seen);
    if !readable {
        // What follows so many extensions is not looked at, unless a fragment comes first.
        assert!(parsed == Parsed::Broken || meant.part() == Part::Later, "{parsed:?}");
        return;
    }
    // An error shows the addresses of what it quotes; what is cut off within shows any.
    if !seen.error && parsed != Parsed::Broken {
        assert_eq!((seen.source, seen.destination), (meant.source, meant.destination));
    }
    match (meant.part(), meant.protocol) {
        (Part::Later, _) => assert_eq!(parsed, Parsed::Fragment),
        (part, TCP | UDP | SCTP) => {
            assert_eq!(parsed, Parsed::Packet);
            assert_eq!([seen.source_port.get(), seen.destination_port.get()], meant.ports);
            assert_eq!((seen.protocol, seen.fragments), (meant.protocol, part == Part::First));
        }
        _ => assert_ne!(parsed, Parsed::Fragment),
    }
}

/// The Internet checksum as RFC 1071 has it, word by word: 0xffff if it is right.
fn rfc1071(parts: &[&[u8]]) -> u16 {
    let mut total = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            total += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap_or(0)
}

fn in_memory(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// What is sent in place of a packet has the checksums that whoever gets it computes.
pub(crate) fn answer(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let v6 = input.flag();
    let meant = Meant::of(&mut input, v6);
    let frame = if v6 { meant.v6() } else { meant.v4() };
    let words: [u32; 16] = std::array::from_fn(|_| input.u32());
    assert_eq!(packet::sum(&words), u32::from(rfc1071(&[&in_memory(&words)])), "{words:?}");
    if v6 {
        if let Some(packet) = packet::parse::<V6, _>(frame.as_slice()) {
            refuse::<V6>(&packet, &words);
        }
    } else if let Some(packet) = packet::parse::<V4, _>(frame.as_slice()) {
        refuse::<V4>(&packet, &words);
        let header = in_memory(&V4::answer(&packet, TCP, answer::TCP_BYTES));
        assert_eq!(rfc1071(&[&header]), 0xffff);
        assert_eq!(header[12..16], packet.key.destination.low());
        assert_eq!(header[16..20], packet.key.source.low());
    }
}

fn refuse<F: Family>(packet: &Packet, words: &LongQuote) {
    let pseudo = |protocol: u8, bytes: usize| {
        let length = u32::try_from(bytes).unwrap_or(0).to_be_bytes();
        let addresses = if F::ICMP_COVERS_ADDRESSES {
            [packet.key.destination.0.to_vec(), packet.key.source.0.to_vec()]
        } else {
            [packet.key.destination.low().to_vec(), packet.key.source.low().to_vec()]
        };
        [addresses.concat(), length.to_vec(), vec![0, 0, 0, protocol]].concat()
    };
    let tcp = [words[0], words[1], words[2], words[3], words[4]];
    let reset = in_memory(&answer::tcp_reset(packet, &tcp));
    assert_eq!(rfc1071(&[&pseudo(TCP, reset.len()), &reset]), 0xffff);
    assert_eq!(reset[..2], packet.key.destination_port.0);
    assert_eq!(reset[2..4], packet.key.source_port.0);
    let mtu_bytes = packet.key.source_port.get();
    for error in [Error::port_unreachable::<F>(), Error::too_big::<F>(mtu_bytes)] {
        let header = in_memory(&answer::icmp_error::<F, LongQuote>(packet, words, error));
        let quote = in_memory(words);
        assert_eq!(usize::from(answer::icmp_bytes::<LongQuote>()), header.len() + quote.len());
        let covered = if F::ICMP_COVERS_ADDRESSES { pseudo(F::ICMP, 8 + quote.len()) } else { Vec::new() };
        assert_eq!(rfc1071(&[&covered, &header, &quote]), 0xffff);
        assert_eq!(words.sum(), u32::from(rfc1071(&[&quote])));
    }
}
