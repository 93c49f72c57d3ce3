//! Rewriting by the kernel's helpers: addresses, ports and checksums of a translated packet that is not of the plainest shape
//! (`in_place`), and of one that an ICMP error quotes.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_csum_diff;
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::fast::Shape as _;
use weft_ebpf_logic::packet::{ETHERNET_BYTES, ICMP_BYTES, Packet, Part};

use crate::family::Family;
use crate::in_place::{self, summed};
use crate::maps::FRAGMENTS;
use crate::sctp;

const PSEUDO: u64 = BPF_F_PSEUDO_HDR as u64;

/// What the checksum of a header changes by when its addresses do. IPv4 stands as mapped: what stands before the address cancels
/// out.
#[inline(always)]
fn difference(old: &[Address; 2], new: &[Address; 2]) -> u64 {
    const BYTES: u32 = size_of::<[Address; 2]>() as u32;
    // SAFETY: both are readable for the length given, which the helper does not write.
    unsafe {
        bpf_csum_diff(old.as_ptr().cast_mut().cast(), BYTES, new.as_ptr().cast_mut().cast(), BYTES, 0) as u64
    }
}

#[inline(always)]
pub fn ports(source: Port, destination: Port) -> [u8; 4] {
    [source.0[0], source.0[1], destination.0[0], destination.0[1]]
}

/// Adds a difference of addresses to a checksum that covers them.
#[inline(always)]
pub fn cover<F: Family>(ctx: &TcContext, checksum: usize, difference: u64, flags: u64) -> Option<()> {
    let known = ctx.l4_csum_replace(checksum, 0, difference, flags | F::CHECKSUM_FLAGS);
    if F::CHECKSUM_FLAGS == 0 || known.is_ok() {
        return known.ok();
    }
    // Linux before 6.16.
    ctx.l4_csum_replace(checksum, 0, difference, flags).ok()
}

/// Makes a packet what `entry` says. A later fragment has addresses only: the first one's checksum covers the whole.
#[inline(always)]
pub fn rewrite<F: Family>(ctx: &TcContext, packet: &Packet, entry: &FlowValue) -> Option<()> {
    let key = &packet.key;
    let new = [entry.source, entry.destination];
    let changed = difference(&[key.source, key.destination], &new);
    if key.protocol == SCTP {
        if packet.part != Part::Later {
            sctp::rewrite(ctx, packet, entry)?;
        }
        if !F::Shape::HEADER_HAS_CHECKSUM {
            // Nothing in the packet makes up for the addresses.
            summed(ctx, changed as u32);
        }
    } else if packet.part != Part::Later {
        let transport = packet.transport();
        let udp = key.protocol == UDP;
        let checksum = transport + if udp { 6 } else { 16 };
        // A UDP checksum of 0 means "none", and stays none.
        let mangled = if udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        cover::<F>(ctx, checksum, changed, PSEUDO | mangled)?;
        let old = ports(key.source_port, key.destination_port);
        let new = ports(entry.source_port, entry.destination_port);
        if old != new {
            let (from, to) = (u64::from(u32::from_ne_bytes(old)), u64::from(u32::from_ne_bytes(new)));
            ctx.l4_csum_replace(checksum, from, to, mangled | 4).ok()?;
            ctx.store(transport, &new, 0).ok()?;
        }
    }
    F::store_addresses(ctx, ETHERNET_BYTES, &new, changed)
}

/// Makes an ICMP error what `entry` says, which is the entry of packets that go its way; the packet it quotes went the
/// other. The quoted transport checksum stays: nobody verifies it, and often it is cut off.
#[inline(never)]
pub fn rewrite_error<F: Family>(
    ctx: &TcContext,
    error: &Packet,
    quoted: &Packet,
    entry: &FlowValue,
) -> Option<()> {
    let checksum = error.transport() + 2;
    let quote = error.transport() + ICMP_BYTES;
    let old = ports(quoted.key.source_port, quoted.key.destination_port);
    let new = ports(entry.destination_port, entry.source_port);
    let (from, to) = (u64::from(u32::from_ne_bytes(old)), u64::from(u32::from_ne_bytes(new)));
    ctx.l4_csum_replace(checksum, from, to, 4).ok()?;
    ctx.store(quote + quoted.header_bytes as usize, &new, 0).ok()?;

    let inner = [entry.destination, entry.source];
    let changed = difference(&[quoted.key.source, quoted.key.destination], &inner);
    if F::ICMP_COVERS_ADDRESSES {
        ctx.l4_csum_replace(checksum, 0, changed, 0).ok()?;
    }
    F::store_addresses(ctx, quote, &inner, changed)?;

    let outer = [entry.source, entry.destination];
    let changed = difference(&[error.key.source, error.key.destination], &outer);
    if F::ICMP_COVERS_ADDRESSES {
        cover::<F>(ctx, checksum, changed, PSEUDO)?;
    }
    F::store_addresses(ctx, ETHERNET_BYTES, &outer, changed)
}

/// Rewrites a packet. The first fragment tells the others which flow is theirs.
#[inline(never)]
pub fn translate<F: Family>(ctx: &TcContext, packet: &Packet, entry: &FlowValue) -> Result<(), DropReason> {
    if packet.part == Part::First {
        let known = FRAGMENTS.insert(packet.fragment_key(), packet.fragment_value(), 0);
        known.map_err(|_| DropReason::FlowTableFull)?;
    }
    let rewritten = if packet.is_plain::<F>() && packet.key.protocol != SCTP {
        in_place::rewrite::<F>(ctx, packet, entry)
    } else {
        rewrite::<F>(ctx, packet, entry)
    };
    rewritten.ok_or(DropReason::RewriteFailed)
}
