//! Ethernet frames of both families: made with valid checksums, and read again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use weft_ebpf_abi::{SCTP, TCP, UDP};

pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;
/// ICMP and ICMPv6.
pub(crate) const ICMP: [u8; 2] = [1, 58];

pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut total: u32 =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !u16::try_from(total).unwrap()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn pseudo(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    [&octets(from), &octets(to), &[0, protocol][..], &length, payload].concat()
}

/// An IP packet.
pub(crate) fn packet(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut ip = if from.is_ipv4() {
        let total = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        vec![0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, protocol, 0, 0]
    } else {
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64]
    };
    ip.extend([octets(from), octets(to)].concat());
    if from.is_ipv4() {
        let sum = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
    }
    ip.extend(payload);
    ip
}

/// Puts an Ethernet header before an IP packet.
pub(crate) fn ethernet(ip: &[u8]) -> Vec<u8> {
    let kind = if ip[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2], &kind[..], ip].concat()
}

/// A TCP segment, or a datagram.
pub(crate) fn frame(protocol: u8, from: SocketAddr, to: SocketAddr, flags: u8) -> Vec<u8> {
    frame_with(protocol, from, to, flags, b"hello")
}

/// The same with a payload, unless it is a SYN.
pub(crate) fn frame_with(
    protocol: u8,
    from: SocketAddr,
    to: SocketAddr,
    flags: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut transport = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    if protocol == TCP {
        transport.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    } else {
        transport.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
        transport.extend([0, 0]);
    }
    if protocol == UDP || flags & SYN == 0 {
        transport.extend(payload);
    }
    let at = if protocol == TCP { 16 } else { 6 };
    let sum = checksum(&pseudo(from.ip(), to.ip(), protocol, &transport)).to_be_bytes();
    transport[at..at + 2].copy_from_slice(&sum);
    ethernet(&packet(from.ip(), to.ip(), protocol, &transport))
}

/// CRC32c of an SCTP packet whose checksum is 0 (RFC 9260 appendix A).
fn crc32c(bytes: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
        }
    }
    (!crc).to_le_bytes()
}

/// Where SCTP's checksum stands.
pub(crate) const SCTP_CHECKSUM: std::ops::Range<usize> = 8..12;

/// An SCTP packet of one chunk, of a type and with a body. Its verification tag is 1, an INIT's 0.
pub(crate) fn sctp(from: SocketAddr, to: SocketAddr, chunk: u8, body: &[u8]) -> Vec<u8> {
    let tag = [0, 0, 0, u8::from(chunk != 1)];
    let [a, b] = u16::try_from(4 + body.len()).unwrap().to_be_bytes();
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let mut packet = [&ports, &tag[..], &[0; 4], &[chunk, 0, a, b], body].concat();
    let sum = crc32c(&packet);
    packet[SCTP_CHECKSUM].copy_from_slice(&sum);
    ethernet(&self::packet(from.ip(), to.ip(), SCTP, &packet))
}

/// An ICMP error of a type and code, about an IP packet.
pub(crate) fn error(from: IpAddr, to: IpAddr, kind: [u8; 2], about: &[u8]) -> Vec<u8> {
    let mut message = [&kind[..], &[0, 0, 0, 0, 5, 120], about].concat();
    let protocol = ICMP[usize::from(from.is_ipv6())];
    let sum =
        if from.is_ipv4() { checksum(&message) } else { checksum(&pseudo(from, to, protocol, &message)) };
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ethernet(&packet(from, to, protocol, &message))
}

/// A packet as read from bytes that begin with its IP header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) protocol: u8,
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    /// From the transport's header on.
    pub(crate) payload: Vec<u8>,
}

/// Reads an IP packet without options; ports are 0 for ICMP. `whole` if its checksums and length must hold; what an error quotes is cut off.
pub(crate) fn read(name: &str, ip: &[u8], whole: bool) -> Read {
    let v4 = ip[0] >> 4 == 4;
    let header = if v4 { 20 } else { 40 };
    let (protocol, length) = if v4 { (ip[9], [ip[2], ip[3]]) } else { (ip[6], [ip[4], ip[5]]) };
    let address = |n: usize| -> IpAddr {
        if v4 {
            Ipv4Addr::from(<[u8; 4]>::try_from(&ip[12 + n * 4..16 + n * 4]).unwrap()).into()
        } else {
            Ipv6Addr::from(<[u8; 16]>::try_from(&ip[8 + n * 16..24 + n * 16]).unwrap()).into()
        }
    };
    let (from, to, payload) = (address(0), address(1), ip[header..].to_vec());
    if v4 {
        assert_eq!(checksum(&ip[..20]), 0, "{name}: IPv4 checksum");
    }
    if whole {
        let length = usize::from(u16::from_be_bytes(length));
        assert_eq!(ip.len(), if v4 { length } else { length + 40 }, "{name}: length");
        if protocol == SCTP {
            let mut unsummed = payload.clone();
            unsummed[SCTP_CHECKSUM].fill(0);
            assert_eq!(crc32c(&unsummed), payload[SCTP_CHECKSUM], "{name}: checksum");
        } else {
            let covered =
                if protocol == ICMP[0] { payload.clone() } else { pseudo(from, to, protocol, &payload) };
            assert_eq!(checksum(&covered), 0, "{name}: checksum");
        }
    }
    let port = |at: usize| {
        if ICMP.contains(&protocol) { 0 } else { u16::from_be_bytes([payload[at], payload[at + 1]]) }
    };
    let (from, to) = (SocketAddr::new(from, port(0)), SocketAddr::new(to, port(2)));
    Read { protocol, from, to, payload }
}

/// Reads a whole frame.
pub(crate) fn read_frame(name: &str, frame: &[u8]) -> Read {
    read(name, &frame[14..], true)
}
