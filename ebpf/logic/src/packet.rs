//! Packets as bytes: parsing and checksums of both families. What refuses a packet is in [`answer`].

pub mod answer;
mod v4;
mod v6;

use weft_ebpf_abi::{Address, FlowKey, FragmentKey, FragmentValue, Port, SCTP, TCP, UDP};

pub use v4::V4;
pub use v6::V6;

use crate::sctp;

/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;
/// Bytes of an ICMP header.
pub const ICMP_BYTES: usize = 8;

/// TCP flag FIN.
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;

/// A frame to read from: the kernel's buffer, or a slice.
pub trait Bytes {
    /// `N` bytes from `at` on; `None` behind the end.
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]>;
}

impl Bytes for [u8] {
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.get(at..at.checked_add(N)?)?.try_into().ok()
    }
}

/// What differs between IPv4 and IPv6 in a packet.
pub trait Family {
    /// EtherType.
    const ETHERTYPE: [u8; 2];
    /// Bytes of the header without options and extensions.
    const HEADER_BYTES: usize;
    /// Protocol number of the family's ICMP.
    const ICMP: u8;
    /// ICMP type and code "port unreachable".
    const PORT_UNREACHABLE: [u8; 2];
    /// ICMP type and code "fragmentation needed", "packet too big".
    const TOO_BIG: [u8; 2];
    /// Whether the ICMP checksum covers the addresses.
    const ICMP_COVERS_ADDRESSES: bool;
    /// A header without options and extensions.
    type Header: Copy;
    /// What an ICMP error quotes of a packet at least: such a header and 8 bytes.
    type Quote: Quote;

    /// Reads the header at `at`, down to the transport's. `None` for what the programs leave alone: another
    /// version, a damaged header, extensions that change what the destination is.
    fn header<B: Bytes + ?Sized>(bytes: &B, at: usize) -> Option<Packet>;
    /// Whether ICMP messages of this type are errors that quote a packet.
    fn is_error(icmp_type: u8) -> bool;
    /// The header of an answer to a packet.
    fn answer(packet: &Packet, protocol: u8, payload_bytes: u16) -> Self::Header;
}

/// The beginning of a packet, as long as an ICMP error quotes it.
pub trait Quote: Copy {
    /// Sum of its words, not yet folded.
    fn sum(&self) -> u32;
}

impl<const N: usize> Quote for [u32; N] {
    #[inline(always)]
    fn sum(&self) -> u32 {
        sum(self)
    }
}

/// What is quoted of a packet that is too big: it has that much, and its ports are in it even behind a fragment header.
pub type LongQuote = [u32; 16];

/// Which part of a packet a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    /// All of it.
    Whole = 0,
    /// The first fragment, which has the ports.
    First,
    /// A later fragment, which has none.
    Later,
}

/// A packet as parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its flow; ports are 0 where it has none.
    pub key: FlowKey,
    /// Bytes from the IP header to the transport's: options and extensions included.
    pub header_bytes: u32,
    /// Bytes from the IP header to the packet's end.
    pub total_bytes: u32,
    /// Identification, if it is a fragment.
    pub fragment: FragmentId,
    /// TCP's flags, or what SCTP says in their words ([`sctp::flags`]); 0 for all else.
    pub flags: u8,
    /// Fragment or not.
    pub part: Part,
}

/// What tells fragmented packets between two addresses apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentId {
    /// Identification.
    pub id: u32,
    /// Protocol for IPv4, 0 for IPv6.
    pub protocol: u8,
}

impl Packet {
    /// A packet without ports.
    #[inline(always)]
    #[must_use]
    pub const fn between(source: Address, destination: Address) -> Self {
        let none = Port::new(0);
        let key = FlowKey {
            source,
            destination,
            source_port: none,
            destination_port: none,
            protocol: 0,
            pad: [0; 3],
        };
        let fragment = FragmentId { id: 0, protocol: 0 };
        Self { key, header_bytes: 0, total_bytes: 0, fragment, flags: 0, part: Part::Whole }
    }

    /// Where the transport begins in a frame.
    #[inline(always)]
    #[must_use]
    pub const fn transport(&self) -> usize {
        ETHERNET_BYTES + self.header_bytes as usize
    }

    /// Whether it is one of [`fast`](crate::fast)'s: no options or extensions, no fragment.
    #[inline(always)]
    #[must_use]
    pub const fn is_plain<F: Family>(&self) -> bool {
        self.header_bytes as usize == F::HEADER_BYTES && matches!(self.part, Part::Whole)
    }

    /// What its fragments share.
    #[inline(always)]
    #[must_use]
    pub const fn fragment_key(&self) -> FragmentKey {
        FragmentKey {
            source: self.key.source,
            destination: self.key.destination,
            id: self.fragment.id,
            protocol: self.fragment.protocol,
            pad: [0; 3],
        }
    }

    /// What a first fragment tells those behind it.
    #[inline(always)]
    #[must_use]
    pub const fn fragment_value(&self) -> FragmentValue {
        FragmentValue {
            source_port: self.key.source_port,
            destination_port: self.key.destination_port,
            protocol: self.key.protocol,
            pad: [0; 3],
        }
    }

    /// Takes from the first fragment what a later one lacks.
    #[inline(always)]
    pub const fn complete(&mut self, first: &FragmentValue) {
        self.key.source_port = first.source_port;
        self.key.destination_port = first.destination_port;
        self.key.protocol = first.protocol;
    }
}

/// Reads a frame. `None` for what the programs leave alone: another family, a protocol other than TCP, UDP and SCTP
/// (ICMP errors excepted), a frame that ends before the ports do. A later fragment has no ports yet.
#[inline(always)]
pub fn parse<F: Family, B: Bytes + ?Sized>(bytes: &B) -> Option<Packet> {
    let mut packet = F::header(bytes, ETHERNET_BYTES)?;
    if packet.part == Part::Later {
        return Some(packet);
    }
    if packet.key.protocol == F::ICMP {
        let [icmp_type] = bytes.read(packet.transport())?;
        return (packet.part == Part::Whole && F::is_error(icmp_type)).then_some(packet);
    }
    read_ports(bytes, &mut packet, ETHERNET_BYTES)?;
    if packet.key.protocol == TCP {
        [packet.flags] = bytes.read(packet.transport() + 13)?;
    } else if packet.key.protocol == SCTP {
        let [first_chunk] = bytes.read(packet.transport() + sctp::FIRST_CHUNK)?;
        packet.flags = sctp::flags(first_chunk);
    }
    Some(packet)
}

/// Reads the packet that an ICMP error quotes. `None` if it is none of TCP, UDP and SCTP, or quoted too short.
#[inline(always)]
pub fn parse_quote<F: Family, B: Bytes + ?Sized>(bytes: &B, error: &Packet) -> Option<Packet> {
    let at = error.transport() + ICMP_BYTES;
    let mut quoted = F::header(bytes, at)?;
    if quoted.part == Part::Later {
        return None;
    }
    read_ports(bytes, &mut quoted, at)?;
    Some(quoted)
}

#[inline(always)]
fn read_ports<B: Bytes + ?Sized>(bytes: &B, packet: &mut Packet, at: usize) -> Option<()> {
    if !matches!(packet.key.protocol, TCP | UDP | SCTP) {
        return None;
    }
    let ports: [u8; 4] = bytes.read(at + packet.header_bytes as usize)?;
    packet.key.source_port = Port([ports[0], ports[1]]);
    packet.key.destination_port = Port([ports[2], ports[3]]);
    Some(())
}

/// Sum of 16-bit words (RFC 1071), of bytes in words of 32 bits as they stand in memory; see [`Address`] for what single bytes
/// would cost. At most 16 bits.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "folded, it has 16 bits")]
pub const fn sum<const N: usize>(words: &[u32; N]) -> u32 {
    let mut total = 0_u64;
    let mut i = 0;
    while i < N {
        total += words[i] as u64;
        i += 1;
    }
    // The sum does not depend on the order of bytes (RFC 1071 §2B): it is taken in the host's and turned afterwards.
    let halves = (total & 0xffff) + ((total >> 16) & 0xffff) + (total >> 32);
    let folded = (halves & 0xffff) + (halves >> 16);
    u16::from_be_bytes((((folded & 0xffff) + (folded >> 16)) as u16).to_ne_bytes()) as u32
}

/// Sum of the pseudo-header, not yet folded. It is one for both families: what a mapped address has before the IPv4
/// address sums up to 0xffff, which is zero in one's complement.
#[inline(always)]
#[must_use]
pub const fn sum_pseudo(source: &Address, destination: &Address, protocol: u8, bytes: u16) -> u32 {
    sum(&source.words()) + sum(&destination.words()) + protocol as u32 + bytes as u32
}

/// The checksum of a sum: folded and inverted.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "folded twice, it has 16 bits")]
pub const fn fold(total: u32) -> [u8; 2] {
    let once = (total & 0xffff) + (total >> 16);
    let twice = (once & 0xffff) + (once >> 16);
    (!(twice as u16)).to_be_bytes()
}

/// Four bytes as a word that stands in memory as they do.
#[inline(always)]
const fn word(bytes: [u8; 4]) -> u32 {
    u32::from_ne_bytes(bytes)
}
