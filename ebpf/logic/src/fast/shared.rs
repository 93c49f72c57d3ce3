//! Packets of the plainest shape in the stack's buffers, as the tc programs have them: what is read and rewritten in place, and what is
//! left to the kernel, which keeps notes of its own on a packet's checksum.

use weft_ebpf_abi::{FlowValue, TCP, UDP};

use super::{
    Change, Head, Shape, bytes, corrected, corrected_udp, flow, folded, header_bytes, is_unfinished,
    set_ports_and_addresses,
};
use crate::packet::{FragmentId, Packet, Part};

/// Reads a UDP packet. `None` for another shape.
#[inline(always)]
pub fn read_udp<S: Shape, const N: usize>(head: &Head<N>, packet: &mut Packet) -> Option<()> {
    read::<S, N>(head, UDP, packet)?;
    packet.flags = 0;
    Some(())
}

/// Reads a TCP packet. `None` for another shape.
#[inline(always)]
pub fn read_tcp<S: Shape, const N: usize>(head: &Head<N>, packet: &mut Packet) -> Option<()> {
    read::<S, N>(head, TCP, packet)?;
    [_, packet.flags] = bytes(head[S::TRANSPORT + 6]);
    Some(())
}

#[inline(always)]
fn read<S: Shape, const N: usize>(head: &Head<N>, protocol: u8, packet: &mut Packet) -> Option<()> {
    packet.total_bytes = flow::<S, N>(head, protocol, &mut packet.key)?;
    packet.header_bytes = header_bytes::<S>();
    packet.fragment = FragmentId { id: 0, protocol: 0 };
    packet.part = Part::Whole;
    Some(())
}

/// What is left to do about the transport's checksum, once the packet is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It is as it should be. If the device has summed up the packet, that sum is to be changed by this.
    Sum(u32),
    /// It may be only begun, which the kernel knows: it is to apply the change.
    Checksum(Change),
}

/// Makes a UDP packet what `entry` says. One that is to be cut into segments has a checksum that is only begun.
#[inline(always)]
pub fn rewrite_udp<S: Shape, const N: usize>(
    head: &mut Head<N>,
    packet: &Packet,
    entry: &FlowValue,
    is_segmented: bool,
) -> Left {
    let checksum = head[S::TRANSPORT + 3];
    let change = set_ports_and_addresses::<S, N>(head, &packet.key, entry);
    if is_segmented || is_begun::<S>(packet, UDP, checksum) {
        return Left::Checksum(change);
    }
    if checksum == 0 {
        return Left::Sum(unmade::<S>(change));
    }
    head[S::TRANSPORT + 3] = corrected_udp(checksum, change.all());
    Left::Sum(made::<S>(change))
}

/// Makes a TCP packet what `entry` says.
#[inline(always)]
pub fn rewrite_tcp<S: Shape, const N: usize>(
    head: &mut Head<N>,
    packet: &Packet,
    entry: &FlowValue,
    is_segmented: bool,
) -> Left {
    let checksum = head[S::TRANSPORT + 8];
    let change = set_ports_and_addresses::<S, N>(head, &packet.key, entry);
    if is_segmented || is_begun::<S>(packet, TCP, checksum) {
        return Left::Checksum(change);
    }
    head[S::TRANSPORT + 8] = corrected(checksum, change.all());
    Left::Sum(made::<S>(change))
}

#[inline(always)]
fn is_begun<S: Shape>(packet: &Packet, protocol: u8, checksum: u16) -> bool {
    is_unfinished::<S>(&packet.key, protocol, packet.total_bytes - header_bytes::<S>(), checksum)
}

/// The change of the whole packet's sum if the transport's checksum makes up for ports and addresses: of IPv4, the header's has made up for
/// the addresses as well.
#[inline(always)]
fn made<S: Shape>(change: Change) -> u32 {
    if S::HEADER_HAS_CHECKSUM { u32::from(!folded(change.addresses as u64)) } else { 0 }
}

/// Likewise if there is no checksum of the transport.
#[inline(always)]
fn unmade<S: Shape>(change: Change) -> u32 {
    if S::HEADER_HAS_CHECKSUM { change.ports } else { change.all() }
}
