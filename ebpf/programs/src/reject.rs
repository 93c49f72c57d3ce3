//! Refusals: the packet itself is turned into the answer and sent back where it came from.

use aya_ebpf::bindings::{BPF_F_ADJ_ROOM_NO_CSUM_RESET, TC_ACT_SHOT, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::{bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::{DropReason, TCP};
use weft_ebpf_logic::packet::{
    ETHERNET_BYTES, ICMP_BYTES, ICMP_QUOTE_BYTES, IPV4_BYTES, RST, TCP_BYTES, port_unreachable, tcp_reset,
};

use crate::events;
use crate::maps::count;
use crate::tc::{Packet, raw};

const DROP: i32 = TC_ACT_SHOT as i32;

/// Counts the reason and answers with a TCP reset, or ICMP "port unreachable" for UDP.
#[inline(always)]
pub fn reject(ctx: &TcContext, packet: &Packet, reason: DropReason) -> i32 {
    count(reason);
    events::dropped(&packet.key, reason);
    let answered = if packet.key.protocol == TCP { reset(ctx, packet) } else { unreachable(ctx, packet) };
    match answered {
        // SAFETY: a helper with numbers: out of the device that it came in by.
        Some(()) => unsafe { bpf_redirect((*raw(ctx)).ifindex, 0) as i32 },
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

#[inline(always)]
fn change_tail(ctx: &TcContext, bytes: usize) -> Option<()> {
    // SAFETY: the context is valid.
    (unsafe { bpf_skb_change_tail(raw(ctx), bytes as u32, 0) } == 0).then_some(())
}

#[inline(always)]
fn reset(ctx: &TcContext, packet: &Packet) -> Option<()> {
    // A reset is never answered (RFC 9293 §3.10.7.1).
    if packet.flags & RST != 0 {
        return None;
    }
    let tcp: [u8; TCP_BYTES] = ctx.load(packet.transport()).ok()?;
    let answer = tcp_reset(&packet.ip, &tcp);
    change_tail(ctx, ETHERNET_BYTES + IPV4_BYTES + TCP_BYTES)?;
    turn_ethernet(ctx)?;
    ctx.store(ETHERNET_BYTES, &answer, 0).ok()
}

#[inline(always)]
fn unreachable(ctx: &TcContext, packet: &Packet) -> Option<()> {
    // The quote is taken as it stands only without IP options, which UDP to Services never has.
    if packet.ip.header_bytes as usize != IPV4_BYTES {
        return None;
    }
    let quote: [u8; ICMP_QUOTE_BYTES] = ctx.load(ETHERNET_BYTES).ok()?;
    let answer = port_unreachable(&packet.ip, &quote);
    let room = (IPV4_BYTES + ICMP_BYTES) as i32;
    ctx.adjust_room(room, BPF_ADJ_ROOM_MAC, u64::from(BPF_F_ADJ_ROOM_NO_CSUM_RESET)).ok()?;
    change_tail(ctx, ETHERNET_BYTES + IPV4_BYTES + ICMP_BYTES + ICMP_QUOTE_BYTES)?;
    turn_ethernet(ctx)?;
    ctx.store(ETHERNET_BYTES, &answer, 0).ok()?;
    ctx.store(ETHERNET_BYTES + IPV4_BYTES + ICMP_BYTES, &quote, 0).ok()
}
