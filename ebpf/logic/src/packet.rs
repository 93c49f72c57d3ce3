//! Packets as bytes: parsing, checksums, and the answers that refuse them.

use weft_ebpf_abi::{Address, FlowKey, Port, TCP, UDP};

/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4_BYTES: usize = 20;
/// Bytes of a TCP header without options.
pub const TCP_BYTES: usize = 20;
/// Bytes of an ICMP header.
pub const ICMP_BYTES: usize = 8;
/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
/// What an ICMP error quotes of the packet: its IPv4 header and 8 bytes (RFC 792).
pub const ICMP_QUOTE_BYTES: usize = IPV4_BYTES + 8;

/// TCP flag FIN.
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;

/// What is needed of an IPv4 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    /// Source.
    pub source: [u8; 4],
    /// Destination.
    pub destination: [u8; 4],
    /// Protocol.
    pub protocol: u8,
    /// Bytes of the header with its options.
    pub header_bytes: u8,
    /// Bytes of the whole packet.
    pub total_bytes: u16,
}

/// Reads an IPv4 header. `None` for what the programs leave alone: other versions, a header shorter than the
/// minimum, a protocol other than TCP and UDP, a fragment after the first (it has no ports).
#[inline(always)]
#[must_use]
pub fn ipv4(header: &[u8; IPV4_BYTES]) -> Option<Ipv4> {
    let header_bytes = (header[0] & 0x0f) * 4;
    let protocol = header[9];
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
    if header[0] >> 4 != 4 || header_bytes < 20 || fragment != 0 || (protocol != TCP && protocol != UDP) {
        return None;
    }
    Some(Ipv4 {
        source: [header[12], header[13], header[14], header[15]],
        destination: [header[16], header[17], header[18], header[19]],
        protocol,
        header_bytes,
        total_bytes: u16::from_be_bytes([header[2], header[3]]),
    })
}

/// The key of a packet's flow. `ports` are the first four bytes behind the IPv4 header.
#[inline(always)]
#[must_use]
pub const fn flow_key(ip: &Ipv4, ports: [u8; 4]) -> FlowKey {
    FlowKey {
        source: Address::v4(ip.source),
        destination: Address::v4(ip.destination),
        source_port: Port([ports[0], ports[1]]),
        destination_port: Port([ports[2], ports[3]]),
        protocol: ip.protocol,
        pad: [0; 3],
    }
}

/// Sum of 16-bit words, not yet folded (RFC 1071).
#[inline(always)]
#[must_use]
pub fn sum<const N: usize>(bytes: &[u8; N]) -> u32 {
    let mut total = 0_u32;
    let mut i = 0;
    while i + 1 < N {
        total += u32::from(u16::from_be_bytes([bytes[i], bytes[i + 1]]));
        i += 2;
    }
    if N % 2 == 1 {
        total += u32::from(bytes[N - 1]) << 8;
    }
    total
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

#[inline(always)]
fn write<const N: usize>(to: &mut [u8], at: usize, bytes: [u8; N]) {
    let mut i = 0;
    while i < N {
        to[at + i] = bytes[i];
        i += 1;
    }
}

#[inline(always)]
fn ipv4_header(source: [u8; 4], destination: [u8; 4], protocol: u8, total_bytes: u16) -> [u8; IPV4_BYTES] {
    let mut header = [0_u8; IPV4_BYTES];
    header[0] = 0x45;
    write(&mut header, 2, total_bytes.to_be_bytes());
    header[6] = 0x40;
    header[8] = 64;
    header[9] = protocol;
    write(&mut header, 12, source);
    write(&mut header, 16, destination);
    let checksum = fold(sum(&header));
    write(&mut header, 10, checksum);
    header
}

/// A TCP reset that refuses a packet, from IPv4 header to end, as RFC 9293 §3.10.7.1 wants it: with ACK, its
/// sequence number is that acknowledgement; without, it acknowledges all the segment occupies.
#[inline(always)]
#[must_use]
pub fn tcp_reset(ip: &Ipv4, tcp: &[u8; TCP_BYTES]) -> [u8; IPV4_BYTES + TCP_BYTES] {
    let mut out = [0_u8; IPV4_BYTES + TCP_BYTES];
    write(&mut out, 0, ipv4_header(ip.destination, ip.source, TCP, 40));
    write(&mut out, 20, [tcp[2], tcp[3], tcp[0], tcp[1]]);
    let flags = tcp[13];
    if flags & ACK != 0 {
        write(&mut out, 24, [tcp[8], tcp[9], tcp[10], tcp[11]]);
        out[33] = RST;
    } else {
        let occupied = u32::from(ip.total_bytes)
            .wrapping_sub(u32::from(ip.header_bytes))
            .wrapping_sub(u32::from(tcp[12] >> 4) * 4)
            .wrapping_add(u32::from(flags & SYN != 0))
            .wrapping_add(u32::from(flags & FIN != 0));
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        write(&mut out, 28, sequence.wrapping_add(occupied).to_be_bytes());
        out[33] = RST | ACK;
    }
    out[32] = 0x50;
    let mut segment = [0_u8; TCP_BYTES + 12];
    write(&mut segment, 0, ip.destination);
    write(&mut segment, 4, ip.source);
    segment[9] = TCP;
    segment[11] = 20;
    let mut i = 0;
    while i < TCP_BYTES {
        segment[12 + i] = out[20 + i];
        i += 1;
    }
    let checksum = fold(sum(&segment));
    write(&mut out, 36, checksum);
    out
}

/// ICMP "port unreachable" for a packet, from IPv4 header to the end of its own header; `quote` follows it.
#[inline(always)]
#[must_use]
pub fn port_unreachable(ip: &Ipv4, quote: &[u8; ICMP_QUOTE_BYTES]) -> [u8; IPV4_BYTES + ICMP_BYTES] {
    let mut out = [0_u8; IPV4_BYTES + ICMP_BYTES];
    write(&mut out, 0, ipv4_header(ip.destination, ip.source, 1, 56));
    out[20] = 3;
    out[21] = 3;
    let checksum = fold(0x0303 + sum(quote));
    write(&mut out, 22, checksum);
    out
}
