//! Packets of the plainest shape, read and translated in place: IPv4 without options, IPv6 without extensions, no fragments.
//!
//! XDP sees a frame as it lies in memory. Frames begin at even addresses, so they are looked at in half-words as they stand in
//! memory; sums of these need no order of bytes (RFC 1071 §2B). Whatever is of another shape is left to the tc program.

use weft_ebpf_abi::{Address, FlowKey, FlowValue, Port, TCP, UDP};

use crate::packet::{FIN, RST, SYN};

/// Half-words of an Ethernet header.
const ETHERNET: usize = 7;
/// The flag "do not fragment", which may be set.
const DO_NOT_FRAGMENT: u16 = u16::from_ne_bytes([0x40, 0]);

/// A frame's beginning: Ethernet, IP and the transport as far as it is looked at.
pub type Head<const N: usize> = [u16; N];

/// What one shape of frames has where.
pub trait Shape {
    /// EtherType, as it stands in memory.
    const ETHERTYPE: u16;
    /// Half-word at which the transport begins.
    const TRANSPORT: usize;
    /// Whether UDP may do without a checksum (RFC 768; with IPv6 it is not for us to judge, RFC 6936).
    const UDP_MAY_LACK_CHECKSUM: bool;

    /// Reads addresses and length. `None` for another shape. The half-words up to the transport must be there.
    fn header<const N: usize>(head: &Head<N>, packet: &mut Plain) -> Option<()>;
    /// The protocol, and nothing else.
    fn protocol<const N: usize>(head: &Head<N>) -> u8;
    /// Sets the addresses; `change` is the change of the header's sum.
    fn set_addresses<const N: usize>(head: &mut Head<N>, entry: &FlowValue, change: u32);
}

/// A packet of the plainest shape. (Functions write it where it stays: returned, it would pass through a BPF program's stack.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plain {
    /// Its flow.
    pub key: FlowKey,
    /// Bytes from the IP header to the packet's end.
    pub total_bytes: u32,
    /// Bytes from the transport's header to the packet's end.
    pub transport_bytes: u32,
}

impl Plain {
    /// No packet yet.
    #[must_use]
    pub const fn empty() -> Self {
        let port = Port::new(0);
        let key = FlowKey {
            source: Address::ANY,
            destination: Address::ANY,
            source_port: port,
            destination_port: port,
            protocol: 0,
            pad: [0; 3],
        };
        Self { key, total_bytes: 0, transport_bytes: 0 }
    }
}

/// IPv4 without options.
#[derive(Debug)]
pub enum Plain4 {}

/// IPv6 without extensions.
#[derive(Debug)]
pub enum Plain6 {}

/// Half-words that a UDP packet of IPv4 needs.
pub const UDP4: usize = ETHERNET + 10 + 4;
/// Half-words that a TCP packet of IPv4 needs.
pub const TCP4: usize = ETHERNET + 10 + 10;
/// Half-words that a UDP packet of IPv6 needs.
pub const UDP6: usize = ETHERNET + 20 + 4;
/// Half-words that a TCP packet of IPv6 needs.
pub const TCP6: usize = ETHERNET + 20 + 10;

#[inline(always)]
const fn bytes(half: u16) -> [u8; 2] {
    half.to_ne_bytes()
}

/// The third word of an IPv4-mapped address.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// Two half-words as a word that stands in memory as they do. By arithmetic: of single bytes a BPF compiler makes words of the
/// stack, more than there are.
#[inline(always)]
const fn word<const N: usize>(head: &Head<N>, at: usize) -> u32 {
    let (first, second) = (head[at] as u32, head[at + 1] as u32);
    if cfg!(target_endian = "little") { first | second << 16 } else { first << 16 | second }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "it is taken apart")]
const fn set_word<const N: usize>(head: &mut Head<N>, at: usize, word: u32) {
    let (low, high) = (word as u16, (word >> 16) as u16);
    (head[at], head[at + 1]) = if cfg!(target_endian = "little") { (low, high) } else { (high, low) };
}

impl Shape for Plain4 {
    const ETHERTYPE: u16 = u16::from_ne_bytes([8, 0]);
    const TRANSPORT: usize = ETHERNET + 10;
    const UDP_MAY_LACK_CHECKSUM: bool = true;

    #[inline(always)]
    fn protocol<const N: usize>(head: &Head<N>) -> u8 {
        bytes(head[ETHERNET + 4])[1]
    }

    #[inline(always)]
    fn header<const N: usize>(head: &Head<N>, packet: &mut Plain) -> Option<()> {
        let [version, _] = bytes(head[ETHERNET]);
        if version != 0x45 || head[ETHERNET + 3] & !DO_NOT_FRAGMENT != 0 {
            return None;
        }
        let total_bytes = u32::from(u16::from_be(head[ETHERNET + 1]));
        packet.total_bytes = total_bytes;
        packet.transport_bytes = total_bytes.checked_sub(20)?;
        packet.key.source = Address::from_words([0, 0, MAPPED, word(head, ETHERNET + 6)]);
        packet.key.destination = Address::from_words([0, 0, MAPPED, word(head, ETHERNET + 8)]);
        Some(())
    }

    #[inline(always)]
    fn set_addresses<const N: usize>(head: &mut Head<N>, entry: &FlowValue, change: u32) {
        head[ETHERNET + 5] = corrected(head[ETHERNET + 5], change);
        set_word(head, ETHERNET + 6, entry.source.words()[3]);
        set_word(head, ETHERNET + 8, entry.destination.words()[3]);
    }
}

impl Shape for Plain6 {
    const ETHERTYPE: u16 = u16::from_ne_bytes([0x86, 0xdd]);
    const TRANSPORT: usize = ETHERNET + 20;
    const UDP_MAY_LACK_CHECKSUM: bool = false;

    #[inline(always)]
    fn protocol<const N: usize>(head: &Head<N>) -> u8 {
        bytes(head[ETHERNET + 3])[0]
    }

    #[inline(always)]
    fn header<const N: usize>(head: &Head<N>, packet: &mut Plain) -> Option<()> {
        let [version, _] = bytes(head[ETHERNET]);
        // A length of 0 is a jumbogram's (RFC 2675 §3), or that of segments which are yet to be cut.
        let payload = u32::from(u16::from_be(head[ETHERNET + 2]));
        if version >> 4 != 6 || payload == 0 {
            return None;
        }
        packet.total_bytes = payload + 40;
        packet.transport_bytes = payload;
        for (at, address) in
            [(ETHERNET + 4, &mut packet.key.source), (ETHERNET + 12, &mut packet.key.destination)]
        {
            let [a, b, c] = [word(head, at), word(head, at + 2), word(head, at + 4)];
            // On the wire it belongs to nobody, and the tables would take it for IPv4.
            if a == 0 && b == 0 && c == MAPPED {
                return None;
            }
            *address = Address::from_words([a, b, c, word(head, at + 6)]);
        }
        Some(())
    }

    #[inline(always)]
    fn set_addresses<const N: usize>(head: &mut Head<N>, entry: &FlowValue, _: u32) {
        let (source, destination) = (entry.source.words(), entry.destination.words());
        let mut i = 0;
        while i < 4 {
            set_word(head, ETHERNET + 4 + i * 2, source[i]);
            set_word(head, ETHERNET + 12 + i * 2, destination[i]);
            i += 1;
        }
    }
}

/// Reads a UDP packet. `None` for what is left to the tc program.
#[inline(always)]
pub fn udp<S: Shape, const N: usize>(head: &Head<N>, packet: &mut Plain) -> Option<()> {
    let checksum = head[S::TRANSPORT + 3];
    ports::<S, N>(head, UDP, packet)?;
    let carried = if checksum == 0 { S::UDP_MAY_LACK_CHECKSUM } else { !is_unfinished(packet, checksum) };
    carried.then_some(())
}

/// Reads a TCP packet of an established connection. `None` for what is left to the tc program, as is all that begins or ends one.
#[inline(always)]
pub fn tcp<S: Shape, const N: usize>(head: &Head<N>, packet: &mut Plain) -> Option<()> {
    let [_, flags] = bytes(head[S::TRANSPORT + 6]);
    if flags & (SYN | FIN | RST) != 0 {
        return None;
    }
    ports::<S, N>(head, TCP, packet)?;
    (!is_unfinished(packet, head[S::TRANSPORT + 8])).then_some(())
}

#[inline(always)]
fn ports<S: Shape, const N: usize>(head: &Head<N>, protocol: u8, packet: &mut Plain) -> Option<()> {
    S::header(head, packet)?;
    packet.key.protocol = protocol;
    packet.key.pad = [0; 3];
    packet.key.source_port = Port(bytes(head[S::TRANSPORT]));
    packet.key.destination_port = Port(bytes(head[S::TRANSPORT + 1]));
    Some(())
}

/// Whether a checksum is only begun: that of the pseudo-header, to be finished by a device. A packet that comes from a socket of the same
/// machine is like that, and nobody would finish it behind XDP. One in 65536 of the finished looks so as well.
#[inline(always)]
fn is_unfinished(packet: &Plain, checksum: u16) -> bool {
    let numbers = u32::from(u16::from(packet.key.protocol).to_be()) + halves(packet.transport_bytes.to_be());
    let pseudo = folded(words(&packet.key.source) + words(&packet.key.destination) + u64::from(numbers));
    // 0 and 0xffff are the same number.
    pseudo == checksum || (pseudo == 0xffff && checksum == 0)
}

/// Makes a UDP packet what `entry` says.
#[inline(always)]
pub fn translate_udp<S: Shape, const N: usize>(head: &mut Head<N>, key: &FlowKey, entry: &FlowValue) {
    let change = set_ports_and_addresses::<S, N>(head, key, entry);
    let checksum = &mut head[S::TRANSPORT + 3];
    if *checksum != 0 {
        *checksum = match corrected(*checksum, change) {
            // It would say that there is none (RFC 768).
            0 => 0xffff,
            other => other,
        };
    }
}

/// Makes a TCP packet what `entry` says.
#[inline(always)]
pub fn translate_tcp<S: Shape, const N: usize>(head: &mut Head<N>, key: &FlowKey, entry: &FlowValue) {
    let change = set_ports_and_addresses::<S, N>(head, key, entry);
    head[S::TRANSPORT + 8] = corrected(head[S::TRANSPORT + 8], change);
}

/// Answers by how much the sum that the transport's checksum is of has changed.
#[inline(always)]
fn set_ports_and_addresses<S: Shape, const N: usize>(
    head: &mut Head<N>,
    key: &FlowKey,
    entry: &FlowValue,
) -> u32 {
    let (old, new) =
        (words(&key.source) + words(&key.destination), words(&entry.source) + words(&entry.destination));
    // What stands before an IPv4 address is the same in both, and cancels out.
    let addresses = u32::from(folded(new)) + u32::from(!folded(old));
    S::set_addresses(head, entry, addresses);
    let port = |port: Port| u16::from_ne_bytes(port.0);
    let ports = u32::from(port(entry.source_port))
        + u32::from(port(entry.destination_port))
        + u32::from(!port(key.source_port))
        + u32::from(!port(key.destination_port));
    head[S::TRANSPORT] = port(entry.source_port);
    head[S::TRANSPORT + 1] = port(entry.destination_port);
    addresses + ports
}

/// Sets the hardware addresses.
#[inline(always)]
pub fn set_ethernet<const N: usize>(head: &mut Head<N>, to: &[u8; 6], from: &[u8; 6]) {
    let mut i = 0;
    while i < 3 {
        head[i] = u16::from_ne_bytes([to[i * 2], to[i * 2 + 1]]);
        head[i + 3] = u16::from_ne_bytes([from[i * 2], from[i * 2 + 1]]);
        i += 1;
    }
}

/// The sum of an address' words.
#[inline(always)]
fn words(address: &Address) -> u64 {
    let [a, b, c, d] = address.words();
    u64::from(a) + u64::from(b) + u64::from(c) + u64::from(d)
}

#[inline(always)]
const fn halves(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

/// A sum in 16 bits.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "folded, it has 16 bits")]
const fn folded(total: u64) -> u16 {
    let once = (total & 0xffff) + ((total >> 16) & 0xffff) + (total >> 32);
    let twice = (once & 0xffff) + (once >> 16);
    ((twice & 0xffff) + (twice >> 16)) as u16
}

/// A checksum after a change of what it is of (RFC 1624 §3).
#[inline(always)]
const fn corrected(checksum: u16, change: u32) -> u16 {
    !folded(!checksum as u64 + change as u64)
}

#[cfg(test)]
mod tests;
