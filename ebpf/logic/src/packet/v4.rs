//! IPv4: header, fragments, ICMP (RFC 791, RFC 792).

use weft_ebpf_abi::Address;

use super::{Bytes, Family, FragmentId, Packet, Part, fold, sum, word};

const HEADER_BYTES: usize = 20;
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// IPv4.
#[derive(Debug)]
pub enum V4 {}

impl Family for V4 {
    const ETHERTYPE: [u8; 2] = [0x08, 0x00];
    const HEADER_BYTES: usize = HEADER_BYTES;
    const ICMP: u8 = 1;
    const PORT_UNREACHABLE: [u8; 2] = [3, 3];
    const TOO_BIG: [u8; 2] = [3, 4];
    const ICMP_COVERS_ADDRESSES: bool = false;
    type Header = [u32; HEADER_BYTES / 4];
    type Quote = [u32; (HEADER_BYTES + 8) / 4];

    #[inline(always)]
    fn header<B: Bytes + ?Sized>(bytes: &B, at: usize) -> Option<Packet> {
        let header: [u8; HEADER_BYTES] = bytes.read(at)?;
        let header_bytes = u32::from(header[0] & 0x0f) * 4;
        if header[0] >> 4 != 4 || header_bytes < 20 {
            return None;
        }
        let source = Address::v4([header[12], header[13], header[14], header[15]]);
        let destination = Address::v4([header[16], header[17], header[18], header[19]]);
        let mut packet = Packet::between(source, destination);
        packet.key.protocol = header[9];
        packet.header_bytes = header_bytes;
        packet.total_bytes = u32::from(u16::from_be_bytes([header[2], header[3]]));
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        if fragment & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0 {
            let id = u32::from(u16::from_be_bytes([header[4], header[5]]));
            packet.fragment = FragmentId { id, protocol: header[9] };
            packet.part = if fragment & FRAGMENT_OFFSET == 0 { Part::First } else { Part::Later };
        }
        Some(packet)
    }

    /// Unreachable, time exceeded, parameter problem.
    #[inline(always)]
    fn is_error(icmp_type: u8) -> bool {
        matches!(icmp_type, 3 | 11 | 12)
    }

    #[inline(always)]
    fn answer(packet: &Packet, protocol: u8, payload_bytes: u16) -> Self::Header {
        let [a, b] = (payload_bytes + 20).to_be_bytes();
        let (source, destination) = (packet.key.destination.words()[3], packet.key.source.words()[3]);
        let mut header =
            [word([0x45, 0, a, b]), word([0, 0, 0x40, 0]), word([64, protocol, 0, 0]), source, destination];
        let [c, d] = fold(sum(&header));
        header[2] = word([64, protocol, c, d]);
        header
    }
}
