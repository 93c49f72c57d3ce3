//! Packets of the plainest shape, read and translated in place: IPv4 without options, IPv6 without extensions, no fragments.
//!
//! A program sees a frame as it lies in memory. Frames begin at even addresses, so they are looked at in half-words as they stand in
//! memory; sums of these need no order of bytes (RFC 1071 §2B). Whatever is of another shape XDP leaves to the tc program, and that to
//! the kernel's helpers (`packet`).

pub mod shared;

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
    /// Whether the IP header has a checksum of its own.
    const HEADER_HAS_CHECKSUM: bool;
    /// Whether UDP may do without a checksum (RFC 768; with IPv6 it is not for us to judge, RFC 6936).
    const UDP_MAY_LACK_CHECKSUM: bool;

    /// Reads the addresses; answers the bytes from the IP header to the packet's end, which are no fewer than the header's. `None` for
    /// another shape. The half-words up to the transport must be there.
    fn header<const N: usize>(head: &Head<N>, key: &mut FlowKey) -> Option<u32>;
    /// The protocol, and nothing else.
    fn protocol<const N: usize>(head: &Head<N>) -> u8;
    /// The source and destination, whatever else the packet has.
    fn addresses<const N: usize>(head: &Head<N>) -> [Address; 2];
    /// The sum of an address' words, but for those that are the same in all addresses of the family and sum up to zero.
    fn sum(address: &Address) -> u64;
    /// Sets the addresses; `change` is the change of the header's sum.
    fn set_addresses<const N: usize>(head: &mut Head<N>, entry: &FlowValue, change: u32);
    /// Takes one off the hops that a packet has left, as a router does; answers the change of the packet's sum. `None` if it has none for
    /// that.
    fn hop<const N: usize>(head: &mut Head<N>) -> Option<u32>;
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

/// Half-words of a frame up to IPv4's options.
pub const IP4: usize = ETHERNET + 10;
/// Half-words of a frame up to IPv6's extensions.
pub const IP6: usize = ETHERNET + 20;
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
    const HEADER_HAS_CHECKSUM: bool = true;
    const UDP_MAY_LACK_CHECKSUM: bool = true;

    #[inline(always)]
    fn protocol<const N: usize>(head: &Head<N>) -> u8 {
        bytes(head[ETHERNET + 4])[1]
    }

    #[inline(always)]
    fn header<const N: usize>(head: &Head<N>, key: &mut FlowKey) -> Option<u32> {
        let [version, _] = bytes(head[ETHERNET]);
        if version != 0x45 || head[ETHERNET + 3] & !DO_NOT_FRAGMENT != 0 {
            return None;
        }
        let total_bytes = u32::from(u16::from_be(head[ETHERNET + 1]));
        [key.source, key.destination] = Self::addresses(head);
        if total_bytes < 20 { None } else { Some(total_bytes) }
    }

    #[inline(always)]
    fn addresses<const N: usize>(head: &Head<N>) -> [Address; 2] {
        [6, 8].map(|at| Address::from_words([0, 0, MAPPED, word(head, ETHERNET + at)]))
    }

    #[inline(always)]
    fn sum(address: &Address) -> u64 {
        u64::from(address.words()[3])
    }

    #[inline(always)]
    fn set_addresses<const N: usize>(head: &mut Head<N>, entry: &FlowValue, change: u32) {
        head[ETHERNET + 5] = corrected(head[ETHERNET + 5], change);
        set_word(head, ETHERNET + 6, entry.source.words()[3]);
        set_word(head, ETHERNET + 8, entry.destination.words()[3]);
    }

    #[inline(always)]
    fn hop<const N: usize>(head: &mut Head<N>) -> Option<u32> {
        let old = head[ETHERNET + 4];
        let [hops, protocol] = bytes(old);
        if hops <= 1 {
            return None;
        }
        let new = u16::from_ne_bytes([hops - 1, protocol]);
        head[ETHERNET + 4] = new;
        head[ETHERNET + 5] = corrected(head[ETHERNET + 5], u32::from(new) + u32::from(!old));
        // The header's checksum makes up for it.
        Some(0)
    }
}

impl Shape for Plain6 {
    const ETHERTYPE: u16 = u16::from_ne_bytes([0x86, 0xdd]);
    const TRANSPORT: usize = ETHERNET + 20;
    const HEADER_HAS_CHECKSUM: bool = false;
    const UDP_MAY_LACK_CHECKSUM: bool = false;

    #[inline(always)]
    fn protocol<const N: usize>(head: &Head<N>) -> u8 {
        bytes(head[ETHERNET + 3])[0]
    }

    #[inline(always)]
    fn header<const N: usize>(head: &Head<N>, key: &mut FlowKey) -> Option<u32> {
        let [version, _] = bytes(head[ETHERNET]);
        // A length of 0 is a jumbogram's (RFC 2675 §3), or that of segments which are yet to be cut.
        let payload = u32::from(u16::from_be(head[ETHERNET + 2]));
        if version >> 4 != 6 || payload == 0 {
            return None;
        }
        for (at, address) in [(ETHERNET + 4, &mut key.source), (ETHERNET + 12, &mut key.destination)] {
            let [a, b, c] = [word(head, at), word(head, at + 2), word(head, at + 4)];
            // On the wire it belongs to nobody, and the tables would take it for IPv4.
            if a == 0 && b == 0 && c == MAPPED {
                return None;
            }
            *address = Address::from_words([a, b, c, word(head, at + 6)]);
        }
        Some(payload + 40)
    }

    #[inline(always)]
    fn addresses<const N: usize>(head: &Head<N>) -> [Address; 2] {
        [4, 12].map(|at| Address::from_words([0, 2, 4, 6].map(|more| word(head, ETHERNET + at + more))))
    }

    #[inline(always)]
    fn sum(address: &Address) -> u64 {
        let [a, b, c, d] = address.words();
        u64::from(a) + u64::from(b) + u64::from(c) + u64::from(d)
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

    #[inline(always)]
    fn hop<const N: usize>(head: &mut Head<N>) -> Option<u32> {
        let old = head[ETHERNET + 3];
        let [next, hops] = bytes(old);
        if hops <= 1 {
            return None;
        }
        let new = u16::from_ne_bytes([next, hops - 1]);
        head[ETHERNET + 3] = new;
        Some(u32::from(new) + u32::from(!old))
    }
}

/// Reads a UDP packet. `None` for what is left to the tc program.
#[inline(always)]
pub fn udp<S: Shape, const N: usize>(head: &Head<N>, packet: &mut Plain) -> Option<()> {
    let checksum = head[S::TRANSPORT + 3];
    plain::<S, N>(head, UDP, packet)?;
    let finished = !is_unfinished::<S>(&packet.key, UDP, packet.transport_bytes, checksum);
    let carried = if checksum == 0 { S::UDP_MAY_LACK_CHECKSUM } else { finished };
    carried.then_some(())
}

/// Reads a TCP packet of an established connection. `None` for what is left to the tc program, as is all that begins or ends one.
#[inline(always)]
pub fn tcp<S: Shape, const N: usize>(head: &Head<N>, packet: &mut Plain) -> Option<()> {
    let [_, flags] = bytes(head[S::TRANSPORT + 6]);
    if flags & (SYN | FIN | RST) != 0 {
        return None;
    }
    plain::<S, N>(head, TCP, packet)?;
    (!is_unfinished::<S>(&packet.key, TCP, packet.transport_bytes, head[S::TRANSPORT + 8])).then_some(())
}

#[inline(always)]
fn plain<S: Shape, const N: usize>(head: &Head<N>, protocol: u8, packet: &mut Plain) -> Option<()> {
    packet.total_bytes = flow::<S, N>(head, protocol, &mut packet.key)?;
    packet.transport_bytes = packet.total_bytes - header_bytes::<S>();
    Some(())
}

/// Reads whose packet it is; answers its length.
#[inline(always)]
fn flow<S: Shape, const N: usize>(head: &Head<N>, protocol: u8, key: &mut FlowKey) -> Option<u32> {
    let total_bytes = S::header(head, key)?;
    let ports = [Port(bytes(head[S::TRANSPORT])), Port(bytes(head[S::TRANSPORT + 1]))];
    key.set_ports(ports, protocol);
    Some(total_bytes)
}

/// Bytes of the IP header.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "20 or 40")]
const fn header_bytes<S: Shape>() -> u32 {
    (S::TRANSPORT - ETHERNET) as u32 * 2
}

/// Whether a checksum is only begun: that of the pseudo-header, to be finished by a device. A packet that comes from a socket of the same
/// machine is like that, and nobody would finish it behind XDP. One in 65536 of the finished looks so as well.
#[inline(always)]
fn is_unfinished<S: Shape>(key: &FlowKey, protocol: u8, transport_bytes: u32, checksum: u16) -> bool {
    let numbers = u32::from(u16::from(protocol).to_be()) + halves(transport_bytes.to_be());
    let pseudo = folded(S::sum(&key.source) + S::sum(&key.destination) + u64::from(numbers));
    // 0 and 0xffff are the same number.
    pseudo == checksum || (pseudo == 0xffff && checksum == 0)
}

/// Makes a UDP packet what `entry` says.
#[inline(always)]
pub fn translate_udp<S: Shape, const N: usize>(head: &mut Head<N>, key: &FlowKey, entry: &FlowValue) {
    let change = set_ports_and_addresses::<S, N>(head, key, entry);
    let checksum = &mut head[S::TRANSPORT + 3];
    if *checksum != 0 {
        *checksum = corrected_udp(*checksum, change.all());
    }
}

/// Makes a TCP packet what `entry` says.
#[inline(always)]
pub fn translate_tcp<S: Shape, const N: usize>(head: &mut Head<N>, key: &FlowKey, entry: &FlowValue) {
    let change = set_ports_and_addresses::<S, N>(head, key, entry);
    head[S::TRANSPORT + 8] = corrected(head[S::TRANSPORT + 8], change.all());
}

/// By how much the sum has changed that a transport's checksum is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// By the addresses.
    pub addresses: u32,
    /// By the ports.
    pub ports: u32,
}

impl Change {
    #[inline(always)]
    const fn all(self) -> u32 {
        self.addresses + self.ports
    }
}

/// Zero in one's complement of 16 bits, larger than any sum of two addresses.
const ZERO: u64 = 0xffff_ffff << 4;

#[inline(always)]
fn set_ports_and_addresses<S: Shape, const N: usize>(
    head: &mut Head<N>,
    key: &FlowKey,
    entry: &FlowValue,
) -> Change {
    let old = S::sum(&key.source) + S::sum(&key.destination);
    let new = S::sum(&entry.source) + S::sum(&entry.destination);
    let addresses = u32::from(folded(new + (ZERO - old)));
    S::set_addresses(head, entry, addresses);
    let port = |port: Port| u16::from_ne_bytes(port.0);
    let ports = u32::from(port(entry.source_port))
        + u32::from(port(entry.destination_port))
        + u32::from(!port(key.source_port))
        + u32::from(!port(key.destination_port));
    head[S::TRANSPORT] = port(entry.source_port);
    head[S::TRANSPORT + 1] = port(entry.destination_port);
    Change { addresses, ports }
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

/// Has a frame that was sent to a router go on to `to` from there; one that was sent to `to` stays as it is.
#[inline(always)]
pub fn pass_on<const N: usize>(head: &mut Head<N>, to: &[u8; 6]) {
    let [a, b, c] = [0, 2, 4].map(|at| u16::from_ne_bytes([to[at], to[at + 1]]));
    if head[0] ^ a | head[1] ^ b | head[2] ^ c != 0 {
        [head[3], head[4], head[5]] = [head[0], head[1], head[2]];
        [head[0], head[1], head[2]] = [a, b, c];
    }
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
#[expect(clippy::cast_possible_truncation, reason = "folded, it has 16 bits")]
const fn corrected(checksum: u16, change: u32) -> u16 {
    // A change is that of a few half-words: its sum is far from 32 bits, and twice is enough.
    !(halves(halves(!checksum as u32 + change)) as u16)
}

/// Likewise of UDP, where 0 would say that there is none (RFC 768).
#[inline(always)]
const fn corrected_udp(checksum: u16, change: u32) -> u16 {
    match corrected(checksum, change) {
        0 => 0xffff,
        other => other,
    }
}

#[cfg(test)]
mod tests;
