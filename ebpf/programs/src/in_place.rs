//! The stack's packets in place: headers as they lie in the buffer, where other packets' would cost a call of the kernel for each field.
//!
//! The kernel makes a buffer's head the packet's own before a program that writes so runs (one that is shared with a packet socket, say),
//! and keeps notes on the transport's checksum that a program can't see: it may be only begun (CHECKSUM_PARTIAL: a device is to finish it),
//! or a device has summed up the whole packet (CHECKSUM_COMPLETE).

use core::marker::PhantomData;
use core::ptr::read_volatile;

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::{bpf_csum_update, bpf_skb_pull_data};
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::{FlowValue, TCP, UDP};
use weft_ebpf_logic::fast::shared::{self, Left};
use weft_ebpf_logic::fast::{self, Change, Head, Shape};
use weft_ebpf_logic::packet::Packet;

use crate::family::Family;
use crate::frame::raw;
use crate::rewrite::cover;

/// Half-words of an Ethernet header.
pub const ETHERNET: usize = 7;

/// The frame's beginning, if it is that long. Calls that change a packet make it unusable.
#[inline(always)]
pub fn head<const N: usize>(ctx: &TcContext) -> Option<&mut Head<N>> {
    if let Some(head) = linear(ctx) {
        return Some(head);
    }
    pull(ctx, N as u32 * 2)?;
    linear(ctx)
}

#[inline(always)]
fn linear<const N: usize>(ctx: &TcContext) -> Option<&mut Head<N>> {
    // Read here and now, as in the XDP program.
    // SAFETY: the kernel hands in a valid context.
    let (begin, end) = unsafe {
        (read_volatile(&raw const (*raw(ctx)).data), read_volatile(&raw const (*raw(ctx)).data_end))
    };
    let (begin, end) = (begin as usize, end as usize);
    if begin + N * 2 > end {
        return None;
    }
    // SAFETY: so many bytes are there, nobody else has them, and frames begin at even addresses.
    Some(unsafe { &mut *(begin as *mut Head<N>) })
}

/// Brings into one piece what lies in several, as some drivers leave it.
#[inline(never)]
fn pull(ctx: &TcContext, bytes: u32) -> Option<()> {
    // SAFETY: the context is valid.
    let is_there = unsafe { (*raw(ctx)).len >= bytes && bpf_skb_pull_data(raw(ctx), bytes) == 0 };
    is_there.then_some(())
}

/// What a packet of the plainest shape is of: UDP or TCP, of one family.
pub trait Plain {
    /// Its number.
    const PROTOCOL: u8;
    /// A frame as far as it is looked at.
    type Head: 'static;

    /// The frame's beginning.
    fn head(ctx: &TcContext) -> Option<&mut Self::Head>;
    /// Reads the packet. `None` for one of another shape.
    fn read(head: &Self::Head, packet: &mut Packet) -> Option<()>;
    /// Makes the packet what `entry` says.
    fn rewrite(ctx: &TcContext, head: &mut Self::Head, packet: &Packet, entry: &FlowValue) -> Option<()>;
}

/// UDP, up to half-word `N` of a frame.
pub struct Udp<F, const N: usize>(PhantomData<F>);

impl<F: Family, const N: usize> Plain for Udp<F, N> {
    const PROTOCOL: u8 = UDP;
    type Head = Head<N>;

    #[inline(always)]
    fn head(ctx: &TcContext) -> Option<&mut Head<N>> {
        head(ctx)
    }
    #[inline(always)]
    fn read(head: &Head<N>, packet: &mut Packet) -> Option<()> {
        shared::read_udp::<F::Shape, N>(head, packet)
    }
    #[inline(always)]
    fn rewrite(ctx: &TcContext, head: &mut Head<N>, packet: &Packet, entry: &FlowValue) -> Option<()> {
        let left = shared::rewrite_udp::<F::Shape, N>(head, packet, entry, is_segmented(ctx));
        settle::<F>(ctx, left, packet.transport() + 6, BPF_F_MARK_MANGLED_0.into())
    }
}

/// TCP, likewise.
pub struct Tcp<F, const N: usize>(PhantomData<F>);

impl<F: Family, const N: usize> Plain for Tcp<F, N> {
    const PROTOCOL: u8 = TCP;
    type Head = Head<N>;

    #[inline(always)]
    fn head(ctx: &TcContext) -> Option<&mut Head<N>> {
        head(ctx)
    }
    #[inline(always)]
    fn read(head: &Head<N>, packet: &mut Packet) -> Option<()> {
        shared::read_tcp::<F::Shape, N>(head, packet)
    }
    #[inline(always)]
    fn rewrite(ctx: &TcContext, head: &mut Head<N>, packet: &Packet, entry: &FlowValue) -> Option<()> {
        let left = shared::rewrite_tcp::<F::Shape, N>(head, packet, entry, is_segmented(ctx));
        settle::<F>(ctx, left, packet.transport() + 16, 0)
    }
}

/// Whether a frame is to be cut into segments.
#[inline(always)]
pub fn is_segmented(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid.
    unsafe { (*raw(ctx)).gso_size != 0 }
}

/// Reads a packet of the plainest shape. `None` for all others.
#[inline(always)]
pub fn read<F: Family>(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    match F::protocol(ctx)? {
        UDP => F::Udp::read(F::Udp::head(ctx)?, packet),
        TCP => F::Tcp::read(F::Tcp::head(ctx)?, packet),
        _ => None,
    }
}

/// Makes a packet of the plainest shape what `entry` says.
#[inline(always)]
pub fn rewrite<F: Family>(ctx: &TcContext, packet: &Packet, entry: &FlowValue) -> Option<()> {
    if packet.key.protocol == UDP {
        F::Udp::rewrite(ctx, F::Udp::head(ctx)?, packet, entry)
    } else {
        F::Tcp::rewrite(ctx, F::Tcp::head(ctx)?, packet, entry)
    }
}

#[inline(always)]
fn settle<F: Family>(ctx: &TcContext, left: Left, checksum: usize, flags: u64) -> Option<()> {
    match left {
        Left::Sum(change) => {
            summed(ctx, change);
            Some(())
        }
        Left::Checksum(Change { addresses, ports }) => {
            cover::<F>(ctx, checksum, addresses.into(), u64::from(BPF_F_PSEUDO_HDR) | flags)?;
            ctx.l4_csum_replace(checksum, 0, ports.into(), flags).ok()
        }
    }
}

/// Changes the sum that a device has made of the whole packet, if one has.
#[inline(always)]
pub fn summed(ctx: &TcContext, change: u32) {
    if change != 0 {
        // SAFETY: the context is valid. It refuses packets that have no such sum, which need no change then.
        unsafe { bpf_csum_update(raw(ctx), change) };
    }
}

/// Takes one off the hops that a packet has left.
#[inline(always)]
pub fn hop<S: Shape, const N: usize>(ctx: &TcContext) -> Option<()> {
    let change = S::hop(head::<N>(ctx)?)?;
    summed(ctx, change);
    Some(())
}

/// Sets the hardware addresses.
#[inline(always)]
pub fn set_ethernet(ctx: &TcContext, to: &[u8; 6], from: &[u8; 6]) -> Option<()> {
    fast::set_ethernet(head::<ETHERNET>(ctx)?, to, from);
    Some(())
}
