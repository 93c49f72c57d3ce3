//! IPv6: header and its extensions, fragments, ICMPv6 (RFC 8200, RFC 4443).

use weft_ebpf_abi::Address;

use super::{Bytes, Family, FragmentId, Packet, Part, word};

const HEADER_BYTES: usize = 40;
/// Extensions that are read over; RFC 8200 §4.1 recommends an order of at most one hop-by-hop, two of destination options and
/// one fragment.
const MAX_EXTENSIONS: u32 = 4;

const HOP_BY_HOP: u8 = 0;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// IPv6.
#[derive(Debug)]
pub enum V6 {}

#[inline(always)]
fn address(header: &[u8; HEADER_BYTES], at: usize) -> Address {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = header[at + i];
        i += 1;
    }
    Address(bytes)
}

impl Family for V6 {
    const ETHERTYPE: [u8; 2] = [0x86, 0xdd];
    const HEADER_BYTES: usize = HEADER_BYTES;
    const ICMP: u8 = 58;
    const PORT_UNREACHABLE: [u8; 2] = [1, 4];
    const TOO_BIG: [u8; 2] = [2, 0];
    const ICMP_COVERS_ADDRESSES: bool = true;
    type Header = [u32; HEADER_BYTES / 4];
    /// RFC 4443 §2.4 wants as much of the packet as fits; header and ports are what receivers look at.
    type Quote = [u32; (HEADER_BYTES + 8) / 4];

    /// A routing header, or one that is not known, ends the reading: whose the packet is can't be told from its destination.
    /// So does an IPv4-mapped address: on the wire it belongs to nobody, and the tables would take it for IPv4.
    #[inline(always)]
    fn header<B: Bytes + ?Sized>(bytes: &B, at: usize) -> Option<Packet> {
        let header: [u8; HEADER_BYTES] = bytes.read(at)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let (source, destination) = (address(&header, 8), address(&header, 24));
        if source.as_v4().is_some() || destination.as_v4().is_some() {
            return None;
        }
        let mut packet = Packet::between(source, destination);
        packet.header_bytes = 40;
        packet.total_bytes = u32::from(u16::from_be_bytes([header[4], header[5]])) + 40;
        packet.key.protocol = header[6];
        let mut count = 0;
        while matches!(packet.key.protocol, HOP_BY_HOP | FRAGMENT | DESTINATION_OPTIONS) {
            if count == MAX_EXTENSIONS {
                return None;
            }
            count += 1;
            let extension: [u8; 8] = bytes.read(at + packet.header_bytes as usize)?;
            let is_fragment = packet.key.protocol == FRAGMENT;
            packet.key.protocol = extension[0];
            if !is_fragment {
                packet.header_bytes += (u32::from(extension[1]) + 1) * 8;
                continue;
            }
            packet.header_bytes += 8;
            let offset = u16::from_be_bytes([extension[2], extension[3]]);
            // Offset 0 and none to follow: an atomic fragment, which is a whole packet (RFC 6946).
            if offset & !0b110 != 0 {
                let id = u32::from_be_bytes([extension[4], extension[5], extension[6], extension[7]]);
                packet.fragment = FragmentId { id, protocol: 0 };
                packet.part = if offset >> 3 == 0 { Part::First } else { Part::Later };
            }
            if packet.part == Part::Later {
                break;
            }
        }
        Some(packet)
    }

    /// All types below 128.
    #[inline(always)]
    fn is_error(icmp_type: u8) -> bool {
        icmp_type < 128
    }

    #[inline(always)]
    fn answer(packet: &Packet, protocol: u8, payload_bytes: u16) -> Self::Header {
        let [a, b] = payload_bytes.to_be_bytes();
        let [s0, s1, s2, s3] = packet.key.destination.words();
        let [d0, d1, d2, d3] = packet.key.source.words();
        [word([0x60, 0, 0, 0]), word([a, b, protocol, 64]), s0, s1, s2, s3, d0, d1, d2, d3]
    }
}
