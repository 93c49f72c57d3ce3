//! A packet as policy sees it: both families, what an ICMP error is about, fragments.

use weft_ebpf_abi::{Address, Port, SCTP, TCP, UDP};

use super::{ICMP, ICMPV6};
use crate::packet::{ACK, ETHERNET_BYTES, SYN};

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
#[repr(C)]
pub struct Packet {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port; ICMP's identifier; 0 for other protocols.
    pub source_port: Port,
    /// Destination port, likewise.
    pub destination_port: Port,
    /// What joins the fragments of a packet.
    pub identification: [u8; 4],
    /// Protocol.
    pub protocol: u8,
    /// TCP's flags.
    pub tcp_flags: u8,
    /// It can't be an answer: a bare SYN, or a question of ICMP.
    pub begins: bool,
    /// It is an ICMP error about such a flow.
    pub error: bool,
    /// It is the first fragment of several.
    pub fragments: bool,
}

impl Packet {
    /// Nothing yet.
    pub const EMPTY: Self = Self {
        source: Address::ANY,
        destination: Address::ANY,
        source_port: Port::new(0),
        destination_port: Port::new(0),
        identification: [0; 4],
        protocol: 0,
        tcp_flags: 0,
        begins: false,
        error: false,
        fragments: false,
    };
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Not IP, or what IPv6 needs to find its neighbours: no matter of policy.
    Free,
    /// Cut off, or made to confuse.
    Broken,
    /// A packet.
    Packet,
    /// A fragment after the first: only addresses and identification are known of it.
    Fragment,
}

/// Reads a frame into `out`, which need not lie on the stack: the kernel gives programs 512 bytes of that.
#[inline(always)]
pub fn parse<B: Bytes + ?Sized>(bytes: &B, out: &mut Packet) -> Parsed {
    *out = Packet::EMPTY;
    let parsed = match bytes.load(12) {
        Some(ETHERTYPE_IPV4) => ipv4(bytes, out),
        Some(ETHERTYPE_IPV6) => ipv6(bytes, out),
        Some(_) => return Parsed::Free,
        None => None,
    };
    match parsed {
        Some(parsed) => parsed,
        None => Parsed::Broken,
    }
}

#[inline(always)]
fn ipv4<B: Bytes + ?Sized>(bytes: &B, out: &mut Packet) -> Option<Parsed> {
    let [first, _, _, _, id_a, id_b, frag_a, frag_b, _, protocol]: [u8; 10] = bytes.load(ETHERNET_BYTES)?;
    let header_bytes = usize::from(first & 0x0f) * 4;
    if first >> 4 != 4 || header_bytes < 20 {
        return None;
    }
    out.source = Address::v4(bytes.load(ETHERNET_BYTES + 12)?);
    out.destination = Address::v4(bytes.load(ETHERNET_BYTES + 16)?);
    out.identification = [0, 0, id_a, id_b];
    let fragment = u16::from_be_bytes([frag_a, frag_b]);
    if fragment & 0x1fff != 0 {
        return Some(Parsed::Fragment);
    }
    out.fragments = fragment & 0x2000 != 0;
    out.protocol = protocol;
    transport(bytes, ETHERNET_BYTES + header_bytes, ICMP, out)
}

#[inline(always)]
fn ipv6<B: Bytes + ?Sized>(bytes: &B, out: &mut Packet) -> Option<Parsed> {
    out.source = Address(bytes.load(ETHERNET_BYTES + 8)?);
    out.destination = Address(bytes.load(ETHERNET_BYTES + 24)?);
    let [mut next]: [u8; 1] = bytes.load(ETHERNET_BYTES + 6)?;
    let mut at = ETHERNET_BYTES + 40;
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
                let [following, _, offset_a, offset_b]: [u8; 4] = bytes.load(at)?;
                out.identification = bytes.load(at + 4)?;
                let offset = u16::from_be_bytes([offset_a, offset_b]);
                if offset & 0xfff8 != 0 {
                    return Some(Parsed::Fragment);
                }
                out.fragments = offset & 1 != 0;
                next = following;
                at += 8;
            }
            _ => {
                out.protocol = next;
                return transport(bytes, at, ICMPV6, out);
            }
        }
    }
    None
}

#[inline(always)]
fn transport<B: Bytes + ?Sized>(
    bytes: &B,
    at: usize,
    icmp_of_family: u8,
    out: &mut Packet,
) -> Option<Parsed> {
    match out.protocol {
        TCP | UDP | SCTP => {
            let [a, b, c, d]: [u8; 4] = bytes.load(at)?;
            out.source_port = Port([a, b]);
            out.destination_port = Port([c, d]);
            if out.protocol == TCP {
                let [flags]: [u8; 1] = bytes.load(at + 13)?;
                out.tcp_flags = flags;
                out.begins = flags & (SYN | ACK) == SYN;
            }
        }
        // The other family's is a protocol like any: no host takes it for neighbour discovery.
        protocol if protocol == icmp_of_family => return icmp(bytes, at, out),
        _ => {}
    }
    Some(Parsed::Packet)
}

#[inline(always)]
fn icmp<B: Bytes + ?Sized>(bytes: &B, at: usize, out: &mut Packet) -> Option<Parsed> {
    let [kind, _, _, _, a, b]: [u8; 6] = bytes.load(at)?;
    let (error, free, begins) = if out.protocol == ICMP {
        // Begins: echo, timestamp, information, address mask.
        (matches!(kind, 3 | 11 | 12), false, matches!(kind, 8 | 13 | 15 | 17))
    } else {
        // Free: router and neighbour discovery, and who listens to which multicast address (RFC 4861, 2710, 3810).
        (matches!(kind, 1..=4), matches!(kind, 130..=137 | 143), kind == 128)
    };
    if free {
        return Some(Parsed::Free);
    }
    if error {
        return quoted(bytes, at + 8, out);
    }
    out.begins = begins;
    out.source_port = Port([a, b]);
    out.destination_port = Port([a, b]);
    Some(Parsed::Packet)
}

/// What an error quotes, turned round: it comes the way that an answer would.
#[inline(always)]
fn quoted<B: Bytes + ?Sized>(bytes: &B, quote: usize, out: &mut Packet) -> Option<Parsed> {
    let at = if out.protocol == ICMP {
        let [first]: [u8; 1] = bytes.load(quote)?;
        [out.protocol] = bytes.load(quote + 9)?;
        out.destination = Address::v4(bytes.load(quote + 12)?);
        out.source = Address::v4(bytes.load(quote + 16)?);
        quote + usize::from(first & 0x0f) * 4
    } else {
        [out.protocol] = bytes.load(quote + 6)?;
        out.destination = Address(bytes.load(quote + 8)?);
        out.source = Address(bytes.load(quote + 24)?);
        quote + 40
    };
    (out.error, out.fragments) = (true, false);
    let [a, b, c, d]: [u8; 4] = bytes.load(at)?;
    match out.protocol {
        TCP | UDP | SCTP => {
            out.source_port = Port([c, d]);
            out.destination_port = Port([a, b]);
        }
        ICMP | ICMPV6 => {
            let [c, d]: [u8; 2] = bytes.load(at + 4)?;
            out.source_port = Port([c, d]);
            out.destination_port = Port([c, d]);
        }
        _ => {}
    }
    Some(Parsed::Packet)
}
