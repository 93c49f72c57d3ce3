//! A packet as policy sees it: both families, what an ICMP error is about, fragments.

use weft_ebpf_abi::policy::TrackKey;
use weft_ebpf_abi::{Address, Port, SCTP, TCP, UDP};

use super::{ICMP, ICMPV6, fragment_key};
use crate::packet::ETHERNET_BYTES;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// Extension headers that are stepped over; more of them have no honest use.
const MAX_EXTENSIONS: usize = 4;

/// Bytes of a packet, from its Ethernet header on.
pub trait Bytes {
    /// Reads `N` bytes; `None` behind the end.
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]>;
}

impl Bytes for [u8] {
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.get(at..at + N)?.try_into().ok()
    }
}

/// A packet of a flow. For an ICMP error these are addresses and ports as an answer to the packet it is about would have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port; ICMP's identifier; 0 for other protocols.
    pub source_port: Port,
    /// Destination port, likewise.
    pub destination_port: Port,
    /// Protocol.
    pub protocol: u8,
    /// TCP's flags.
    pub tcp_flags: u8,
    /// It is an ICMP error about such a flow.
    pub error: bool,
    /// It is the first fragment of several.
    pub fragments: bool,
    /// What joins the fragments.
    pub identification: [u8; 4],
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Not IP, or what IPv6 needs to find its neighbours: no matter of policy.
    Free,
    /// Cut off, or made to confuse.
    Broken,
    /// A packet.
    Packet(Packet),
    /// A fragment after the first: what joins it to that.
    Fragment(TrackKey),
}

/// Reads a frame.
#[inline(always)]
pub fn parse<B: Bytes + ?Sized>(bytes: &B) -> Parsed {
    let parsed = match bytes.load(12) {
        Some(ETHERTYPE_IPV4) => ipv4(bytes),
        Some(ETHERTYPE_IPV6) => ipv6(bytes),
        Some(_) => return Parsed::Free,
        None => None,
    };
    parsed.unwrap_or(Parsed::Broken)
}

struct Header {
    source: Address,
    destination: Address,
    protocol: u8,
    fragments: bool,
    identification: [u8; 4],
    /// Where the transport's header begins.
    at: usize,
}

#[inline(always)]
fn v4(word: [u8; 4]) -> Address {
    Address::v4(word)
}

#[inline(always)]
fn ipv4<B: Bytes + ?Sized>(bytes: &B) -> Option<Parsed> {
    let [first, _, _, _, id_a, id_b, frag_a, frag_b, _, protocol, _, _]: [u8; 12] =
        bytes.load(ETHERNET_BYTES)?;
    let header_bytes = usize::from(first & 0x0f) * 4;
    if first >> 4 != 4 || header_bytes < 20 {
        return None;
    }
    let (source, destination) =
        (v4(bytes.load(ETHERNET_BYTES + 12)?), v4(bytes.load(ETHERNET_BYTES + 16)?));
    let fragment = u16::from_be_bytes([frag_a, frag_b]);
    let identification = [0, 0, id_a, id_b];
    if fragment & 0x1fff != 0 {
        return Some(Parsed::Fragment(fragment_key(source, destination, identification)));
    }
    let header = Header {
        source,
        destination,
        protocol,
        fragments: fragment & 0x2000 != 0,
        identification,
        at: ETHERNET_BYTES + header_bytes,
    };
    transport(bytes, &header)
}

#[inline(always)]
fn ipv6<B: Bytes + ?Sized>(bytes: &B) -> Option<Parsed> {
    let source = Address(bytes.load(ETHERNET_BYTES + 8)?);
    let destination = Address(bytes.load(ETHERNET_BYTES + 24)?);
    let [mut next]: [u8; 1] = bytes.load(ETHERNET_BYTES + 6)?;
    let mut at = ETHERNET_BYTES + 40;
    let (mut fragments, mut identification) = (false, [0; 4]);
    let mut known = false;
    for _ in 0..=MAX_EXTENSIONS {
        match next {
            // Hop-by-hop options, routing, destination options (RFC 8200 §4).
            0 | 43 | 60 => {
                let [following, length]: [u8; 2] = bytes.load(at)?;
                next = following;
                at += (usize::from(length) + 1) * 8;
            }
            // Fragment header.
            44 => {
                let header: [u8; 8] = bytes.load(at)?;
                identification = [header[4], header[5], header[6], header[7]];
                let offset = u16::from_be_bytes([header[2], header[3]]);
                if offset & 0xfff8 != 0 {
                    return Some(Parsed::Fragment(fragment_key(source, destination, identification)));
                }
                fragments = offset & 1 != 0;
                next = header[0];
                at += 8;
            }
            _ => {
                known = true;
                break;
            }
        }
    }
    if !known {
        return None;
    }
    transport(bytes, &Header { source, destination, protocol: next, fragments, identification, at })
}

#[inline(always)]
fn transport<B: Bytes + ?Sized>(bytes: &B, header: &Header) -> Option<Parsed> {
    let mut packet = Packet {
        source: header.source,
        destination: header.destination,
        source_port: Port::new(0),
        destination_port: Port::new(0),
        protocol: header.protocol,
        tcp_flags: 0,
        error: false,
        fragments: header.fragments,
        identification: header.identification,
    };
    match header.protocol {
        TCP | UDP | SCTP => {
            let [a, b, c, d]: [u8; 4] = bytes.load(header.at)?;
            packet.source_port = Port([a, b]);
            packet.destination_port = Port([c, d]);
            if header.protocol == TCP {
                let [flags]: [u8; 1] = bytes.load(header.at + 13)?;
                packet.tcp_flags = flags;
            }
        }
        ICMP | ICMPV6 => return icmp(bytes, header, packet),
        _ => {}
    }
    Some(Parsed::Packet(packet))
}

#[inline(always)]
fn icmp<B: Bytes + ?Sized>(bytes: &B, header: &Header, mut packet: Packet) -> Option<Parsed> {
    let start: [u8; 6] = bytes.load(header.at)?;
    let kind = start[0];
    let (error, free) = if header.protocol == ICMP {
        (matches!(kind, 3 | 11 | 12), false)
    } else {
        // Router and neighbour discovery, and who listens to which multicast address (RFC 4861, 2710, 3810).
        (matches!(kind, 1..=4), matches!(kind, 130..=137 | 143))
    };
    if free {
        return Some(Parsed::Free);
    }
    if error {
        return quoted(bytes, header, packet);
    }
    packet.source_port = Port([start[4], start[5]]);
    packet.destination_port = packet.source_port;
    Some(Parsed::Packet(packet))
}

/// What an error quotes, turned round: it comes the way that an answer would.
#[inline(always)]
fn quoted<B: Bytes + ?Sized>(bytes: &B, header: &Header, mut packet: Packet) -> Option<Parsed> {
    let quote = header.at + 8;
    let at = if header.protocol == ICMP {
        let [first]: [u8; 1] = bytes.load(quote)?;
        let [protocol]: [u8; 1] = bytes.load(quote + 9)?;
        packet.protocol = protocol;
        packet.destination = v4(bytes.load(quote + 12)?);
        packet.source = v4(bytes.load(quote + 16)?);
        quote + usize::from(first & 0x0f) * 4
    } else {
        let [protocol]: [u8; 1] = bytes.load(quote + 6)?;
        packet.protocol = protocol;
        packet.destination = Address(bytes.load(quote + 8)?);
        packet.source = Address(bytes.load(quote + 24)?);
        quote + 40
    };
    (packet.error, packet.fragments) = (true, false);
    let [a, b, c, d]: [u8; 4] = bytes.load(at)?;
    match packet.protocol {
        TCP | UDP | SCTP => {
            packet.source_port = Port([c, d]);
            packet.destination_port = Port([a, b]);
        }
        ICMP | ICMPV6 => {
            let [c, d]: [u8; 2] = bytes.load(at + 4)?;
            packet.source_port = Port([c, d]);
            packet.destination_port = packet.source_port;
        }
        _ => {}
    }
    Some(Parsed::Packet(packet))
}
