//! Answers that refuse a packet: TCP resets, SCTP's aborts, and ICMP errors of both families.

use weft_ebpf_abi::TCP;

use super::{ACK, FIN, Family, ICMP_BYTES, Packet, Quote, RST, SYN, fold, sum, sum_pseudo, word};
use crate::sctp::{self, ABORT, INITIATE_TAG, TAG};

/// Words of a TCP header without options.
pub const TCP_WORDS: usize = 5;
/// Bytes of it.
pub const TCP_BYTES: u16 = 20;

/// The TCP segment that resets a packet's connection, as RFC 9293 §3.10.7.1 wants it: with ACK, its sequence number is
/// that acknowledgement; without, it acknowledges all the segment occupies. In words, as is the packet's TCP header.
#[inline(always)]
#[must_use]
pub fn tcp_reset(packet: &Packet, tcp: &[u32; TCP_WORDS]) -> [u32; TCP_WORDS] {
    let [offset, flags, ..] = tcp[3].to_ne_bytes();
    let (sequence, acknowledged, answer) = if flags & ACK != 0 {
        (tcp[2], 0, RST)
    } else {
        let occupied = packet
            .total_bytes
            .wrapping_sub(packet.header_bytes)
            .wrapping_sub(u32::from(offset >> 4) * 4)
            .wrapping_add(u32::from(flags & SYN != 0))
            .wrapping_add(u32::from(flags & FIN != 0));
        (0, u32::from_be(tcp[1]).wrapping_add(occupied).to_be(), RST | ACK)
    };
    let (from, to) = (packet.key.destination_port.0, packet.key.source_port.0);
    let mut out =
        [word([from[0], from[1], to[0], to[1]]), sequence, acknowledged, word([0x50, answer, 0, 0]), 0];
    let pseudo = sum_pseudo(&packet.key.destination, &packet.key.source, TCP, TCP_BYTES);
    let [a, b] = fold(pseudo + sum(&out));
    out[4] = word([a, b, 0, 0]);
    out
}

/// Words of an SCTP packet with an ABORT.
pub const ABORT_WORDS: usize = 4;
/// Bytes of it.
pub const ABORT_BYTES: u16 = 16;

/// Where a packet has the tag that an ABORT in answer to it needs: an INIT gives the one that its sender wants.
#[inline(always)]
#[must_use]
pub const fn abort_tag(packet: &Packet) -> usize {
    if is_init(packet) { INITIATE_TAG } else { TAG }
}

#[inline(always)]
const fn is_init(packet: &Packet) -> bool {
    packet.flags & (SYN | ACK) == SYN
}

/// The SCTP packet that aborts a packet's association, as who knows nothing of it sends it (RFC 9260 §8.4). The tag is as it stands in memory:
/// the sender's own, or one that it has for its peer, which the T bit says.
#[inline(always)]
#[must_use]
pub fn sctp_abort(packet: &Packet, tag: u32) -> [u32; ABORT_WORDS] {
    let (from, to) = (packet.key.destination_port.0, packet.key.source_port.0);
    let t_bit = if is_init(packet) { 0 } else { 1 };
    let mut out = [word([from[0], from[1], to[0], to[1]]), tag, 0, word([ABORT, t_bit, 0, 4])];
    out[2] = sctp::checksum(&out).to_le();
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
pub fn icmp_error<F: Family, Q: Quote>(packet: &Packet, quote: &Q, error: Error) -> [u32; ICMP_BYTES / 4] {
    let [kind, code] = error.kind;
    // IPv4 has it in these two bytes, IPv6 in four that end with them.
    let [high, low] = error.mtu_bytes.to_be_bytes();
    let mut out = [word([kind, code, 0, 0]), word([0, 0, high, low])];
    let mut total = sum(&out) + quote.sum();
    if F::ICMP_COVERS_ADDRESSES {
        let (source, destination) = (&packet.key.destination, &packet.key.source);
        total += sum_pseudo(source, destination, F::ICMP, icmp_bytes::<Q>());
    }
    let [a, b] = fold(total);
    out[0] = word([kind, code, a, b]);
    out
}

/// Bytes of such a message with its quote.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a constant below 200")]
pub const fn icmp_bytes<Q: Quote>() -> u16 {
    (ICMP_BYTES + size_of::<Q>()) as u16
}
