//! Answers that refuse a packet: TCP resets and ICMP errors of both families.

use weft_ebpf_abi::TCP;

use super::{ACK, FIN, Family, ICMP_BYTES, Packet, Quote, RST, SYN, TCP_BYTES, fold, sum, sum_pseudo, write};

/// The TCP segment that resets a packet's connection, as RFC 9293 §3.10.7.1 wants it: with ACK, its sequence number is
/// that acknowledgement; without, it acknowledges all the segment occupies.
#[inline(always)]
#[must_use]
pub fn tcp_reset(packet: &Packet, tcp: &[u8; TCP_BYTES]) -> [u8; TCP_BYTES] {
    let mut out = [0_u8; TCP_BYTES];
    write(&mut out, 0, [tcp[2], tcp[3], tcp[0], tcp[1]]);
    let flags = tcp[13];
    if flags & ACK != 0 {
        write(&mut out, 4, [tcp[8], tcp[9], tcp[10], tcp[11]]);
        out[13] = RST;
    } else {
        let occupied = packet
            .total_bytes
            .wrapping_sub(packet.header_bytes)
            .wrapping_sub(u32::from(tcp[12] >> 4) * 4)
            .wrapping_add(u32::from(flags & SYN != 0))
            .wrapping_add(u32::from(flags & FIN != 0));
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        write(&mut out, 8, sequence.wrapping_add(occupied).to_be_bytes());
        out[13] = RST | ACK;
    }
    out[12] = 0x50;
    let pseudo = sum_pseudo(&packet.key.destination, &packet.key.source, TCP, 20);
    let checksum = fold(pseudo + sum(&out));
    write(&mut out, 16, checksum);
    out
}

/// What an ICMP error says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// Type and code.
    pub kind: [u8; 2],
    /// The next hop's MTU, if it is about that.
    pub mtu_bytes: u16,
}

impl Error {
    /// Nobody listens there.
    #[inline(always)]
    #[must_use]
    pub const fn port_unreachable<F: Family>() -> Self {
        Self { kind: F::PORT_UNREACHABLE, mtu_bytes: 0 }
    }

    /// The packet does not fit through the next link (RFC 1191 §4, RFC 8201).
    #[inline(always)]
    #[must_use]
    pub const fn too_big<F: Family>(mtu_bytes: u16) -> Self {
        Self { kind: F::TOO_BIG, mtu_bytes }
    }
}

/// The ICMP header of an error about a packet; `quote` follows it, the packet's beginning.
#[inline(always)]
#[must_use]
pub fn icmp_error<F: Family, Q: Quote>(packet: &Packet, quote: &Q, error: Error) -> [u8; ICMP_BYTES] {
    let mut out = [0_u8; ICMP_BYTES];
    write(&mut out, 0, error.kind);
    // IPv4 has it in these two bytes, IPv6 in four that end with them.
    write(&mut out, 6, error.mtu_bytes.to_be_bytes());
    let mut total = sum(&out) + quote.sum();
    if F::ICMP_COVERS_ADDRESSES {
        let (source, destination) = (&packet.key.destination, &packet.key.source);
        total += sum_pseudo(source, destination, F::ICMP, icmp_bytes::<Q>());
    }
    write(&mut out, 2, fold(total));
    out
}

/// Bytes of such a message with its quote.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a constant below 200")]
pub const fn icmp_bytes<Q: Quote>() -> u16 {
    (ICMP_BYTES + size_of::<Q>()) as u16
}
