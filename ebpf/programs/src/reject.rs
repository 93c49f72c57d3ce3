//! Refusals: the packet itself is turned into the answer and sent back where it came from.

use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::{bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::{DropReason, SCTP, TCP};
use weft_ebpf_logic::packet::answer::{
    ABORT_BYTES, Error, TCP_BYTES, TCP_WORDS, abort_tag, icmp_bytes, icmp_error, sctp_abort, tcp_reset,
};
use weft_ebpf_logic::packet::{ETHERNET_BYTES, FIN, ICMP_BYTES, LongQuote, Packet, Part, Quote, RST};

use crate::events;
use crate::family::Family;
use crate::frame::raw;
use crate::maps::count;
use crate::verdict::DROP;

/// The checksum that a device is to finish begins within so many bytes of a frame, also of a packet in a tunnel.
const NOTED_BYTES: i32 = 256;

/// Counts the reason and answers with a TCP reset, an ABORT of SCTP, or ICMP "port unreachable" for UDP. (Of that, an SCTP socket of Linux only
/// takes a note, and goes on asking.)
#[inline(never)]
pub fn reject<F: Family>(ctx: &TcContext, packet: &Packet, reason: DropReason, sender: Sender) -> i32 {
    count(reason);
    events::dropped(&packet.key, reason);
    let answered = match packet.key.protocol {
        _ if packet.part == Part::Later => None,
        TCP => reset::<F>(ctx, packet),
        SCTP => abort::<F>(ctx, packet),
        _ => unreachable::<F>(ctx, packet),
    };
    back(ctx, answered, sender)
}

/// Counts a packet that does not fit through the next link, and tells its sender by ICMP what does. Without that, what is larger
/// would vanish: the stack, which would say so, does not see the packet.
#[inline(never)]
pub fn too_big<F: Family>(ctx: &TcContext, packet: &Packet, mtu_bytes: u16, sender: Sender) -> i32 {
    count(DropReason::PacketTooBig);
    // Only the first fragment has what the sender knows its socket by.
    if packet.part == Part::Later {
        return DROP;
    }
    back(ctx, error::<F, LongQuote>(ctx, packet, Error::too_big::<F>(mtu_bytes)), sender)
}

/// Who is to get an answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// Whoever is behind the device that the packet came in by.
    Behind,
    /// The node itself, which was about to send the packet by the device.
    Node,
}

/// Sends an answer to who sent the packet.
#[inline(always)]
fn back(ctx: &TcContext, answered: Option<()>, sender: Sender) -> i32 {
    let flags = if matches!(sender, Sender::Node) { u64::from(BPF_F_INGRESS) } else { 0 };
    match answered {
        // SAFETY: a helper with numbers.
        Some(()) => unsafe { bpf_redirect((*raw(ctx)).ifindex, flags) as i32 },
        None => DROP,
    }
}

#[inline(always)]
fn turn_ethernet(ctx: &TcContext) -> Option<()> {
    let old: [u8; 12] = ctx.load(0).ok()?;
    let new =
        [old[6], old[7], old[8], old[9], old[10], old[11], old[0], old[1], old[2], old[3], old[4], old[5]];
    ctx.store(0, &new, 0).ok()
}

/// Makes of a frame one of a header and `bytes` behind it, to be written, without the notes that the kernel has on its checksum: a device that
/// was to finish the packet's (CHECKSUM_PARTIAL) would write into the answer. The kernel drops that note when it cuts off, in front, the place
/// where the checksum begins.
#[inline(always)]
fn resize<F: Family>(ctx: &TcContext, bytes: usize) -> Option<()> {
    let length = ETHERNET_BYTES + F::HEADER_BYTES + bytes + NOTED_BYTES as usize;
    // SAFETY: the context is valid.
    let is_done = unsafe {
        bpf_skb_change_tail(raw(ctx), length as u32, 0) == 0
            && bpf_skb_adjust_room(raw(ctx), -NOTED_BYTES, BPF_ADJ_ROOM_MAC, 0) == 0
    };
    is_done.then_some(())
}

#[inline(always)]
fn reset<F: Family>(ctx: &TcContext, packet: &Packet) -> Option<()> {
    // A reset is never answered (RFC 9293 §3.10.7.1).
    if packet.flags & RST != 0 {
        return None;
    }
    let tcp: [u32; TCP_WORDS] = ctx.load(packet.transport()).ok()?;
    let answer = tcp_reset(packet, &tcp);
    resize::<F>(ctx, TCP_BYTES as usize)?;
    turn_ethernet(ctx)?;
    ctx.store(ETHERNET_BYTES, &F::answer(packet, TCP, TCP_BYTES), 0).ok()?;
    ctx.store(ETHERNET_BYTES + F::HEADER_BYTES, &answer, 0).ok()
}

#[inline(always)]
fn abort<F: Family>(ctx: &TcContext, packet: &Packet) -> Option<()> {
    // What ends an association is never answered (RFC 9260 §8.4).
    if packet.flags & (RST | FIN) != 0 {
        return None;
    }
    let tag: [u8; 4] = ctx.load(packet.transport() + abort_tag(packet)).ok()?;
    let answer = sctp_abort(packet, u32::from_ne_bytes(tag));
    resize::<F>(ctx, ABORT_BYTES as usize)?;
    turn_ethernet(ctx)?;
    ctx.store(ETHERNET_BYTES, &F::answer(packet, SCTP, ABORT_BYTES), 0).ok()?;
    ctx.store(ETHERNET_BYTES + F::HEADER_BYTES, &answer, 0).ok()
}

#[inline(always)]
fn unreachable<F: Family>(ctx: &TcContext, packet: &Packet) -> Option<()> {
    // The quote is taken as it stands only without options and extensions, which UDP to Services hardly ever has.
    if packet.header_bytes as usize != F::HEADER_BYTES {
        return None;
    }
    error::<F, F::Quote>(ctx, packet, Error::port_unreachable::<F>())
}

#[inline(always)]
fn error<F: Family, Q: Quote>(ctx: &TcContext, packet: &Packet, error: Error) -> Option<()> {
    let quote: Q = ctx.load(ETHERNET_BYTES).ok()?;
    let answer = icmp_error::<F, Q>(packet, &quote, error);
    resize::<F>(ctx, icmp_bytes::<Q>() as usize)?;
    turn_ethernet(ctx)?;
    ctx.store(ETHERNET_BYTES, &F::answer(packet, F::ICMP, icmp_bytes::<Q>()), 0).ok()?;
    ctx.store(ETHERNET_BYTES + F::HEADER_BYTES, &answer, 0).ok()?;
    ctx.store(ETHERNET_BYTES + F::HEADER_BYTES + ICMP_BYTES, &quote, 0).ok()
}
