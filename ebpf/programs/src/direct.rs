//! Clients outside that keep their address towards a pod of another node, which answers them past this one.
//!
//! ```text
//! client ──► node A: destination becomes the pod's ──► overlay, with what the client asked for behind the packet
//!    ▲                                                     │
//!    └── node B: the pod's answers become that's ◄── pod ◄─┘ read, noted, cut off
//! ```
//!
//! On the way there the first node has the flow as any other; on the pod's node a packet's flow is known by the node that it
//! comes from as well, so nobody but that node adds to it, and two nodes may hand on the same client and port. All the rest is done with
//! it as with any flow's.

use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT, bpf_fib_lookup as FibLookup};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_skb_change_tail};
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::direct::{self, Nodes};
use weft_ebpf_logic::flow;
use weft_ebpf_logic::packet::{self, ETHERNET_BYTES, Family as _, SYN, V6};

use crate::family::Family;
use crate::flows::{enter_free, enter_own, forget};
use crate::frame::{ingress_ifindex, raw};
use crate::in_place::is_segmented;
use crate::maps::{FLOWS, Kernel, NO_PREALLOC, Work, config, is_pods};
use crate::verdict::{UNDECIDED, dropped, told_apart};
use crate::way::find_route;

/// First six bytes of a frame, and the next.
const MAC_BYTES: usize = 6;

#[map(name = "weft_direct_2")]
static NODES: LpmTrie<Address, u32> = LpmTrie::pinned(sizes::DIRECT, NO_PREALLOC);

impl Nodes for Kernel {
    #[inline(always)]
    fn takes_bytes(&self, address: &Address) -> Option<u32> {
        match NODES.get(Key::new(128, *address)) {
            Some(bytes) => Some(*bytes),
            // A pod whose node isn't known yet.
            None if is_pods(address, !is_mapped(address)) => Some(0),
            None => None,
        }
    }
}

#[inline(always)]
fn is_mapped(address: &Address) -> bool {
    let [a, b, c, _] = address.words();
    a | b == 0 && c == u32::from_ne_bytes([0, 0, 0xff, 0xff])
}

/// Decides whether the flow that a packet begins is to be answered by its backend's node. Not inlined, and not where the flow is judged: the
/// stack is full there.
#[inline(never)]
pub fn decide(ctx: &TcContext, work: &mut Work) {
    let Some(config) = config() else { return };
    if config.flags & NODE_DIRECT != 0
        && work.entry.ifindex == config.overlay_ifindex
        && work.came_by != config.overlay_ifindex
        && work.came_by != config.bridge_ifindex
        && !is_segmented(ctx)
        && direct::suits(&Kernel, &work.packet, work.service_flags, &work.entry.destination)
    {
        work.entry.flags |= FLOW_DIRECT;
        work.route.keeps_source = true;
    }
}

/// Forgets a flow that its backend's node answers, if this SYN begins another.
#[inline(never)]
fn forget_old(packet: &packet::Packet, entry: &mut FlowValue) {
    if config().is_none_or(|config| config.flags & NODE_DIRECT == 0) {
        return;
    }
    // SAFETY: copied at once.
    let Some(known) = (unsafe { FLOWS.get(packet.key).copied() }) else { return };
    *entry = known;
    if direct::begins_anew(&Kernel, packet, entry) {
        forget(&packet.key, entry);
    }
}

/// Sends a translated packet to its backend's node, and what its client asked for with it.
#[inline(never)]
pub fn leave<F: Family>(ctx: &TcContext, work: &Work) -> i32 {
    let (packet, entry) = (&work.packet, &work.entry);
    if direct::tells(packet, entry.last_seen, Kernel.now_seconds())
        && !is_segmented(ctx)
        && direct::fits(&Kernel, packet, &entry.destination)
    {
        return match tell::<F>(ctx, work) {
            Ok(ifindex) => {
                // SAFETY: a helper with numbers.
                unsafe { bpf_redirect(ifindex, 0) as i32 }
            }
            Err(reason) => dropped(reason),
        };
    }
    // SAFETY: no parameters are given; the kernel looks the neighbour up by the packet's destination.
    unsafe { bpf_redirect_neigh(entry.ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Puts what the client asked for behind a packet, and hardware addresses that say so before it. Answers the device.
#[inline(never)]
fn tell<F: Family>(ctx: &TcContext, work: &Work) -> Result<u32, DropReason> {
    let (packet, entry) = (&work.packet, &work.entry);
    // SAFETY: all zeros are a valid value.
    let mut fib: FibLookup = unsafe { core::mem::zeroed() };
    fib.family = F::NUMBER;
    fib.ifindex = entry.ifindex;
    F::set_destination(&mut fib, &entry.destination);
    // SAFETY: context and parameters are valid for the length given.
    let result = unsafe {
        bpf_fib_lookup(ctx.skb.skb.cast(), &raw mut fib, size_of::<FibLookup>() as i32, BPF_FIB_LOOKUP_OUTPUT)
    };
    if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) || fib.ifindex != entry.ifindex {
        return Err(DropReason::NoRoute);
    }
    let [a, b, c, d, e, f] = fib.smac;
    let macs = [fib.dmac, [a | MAC_ASKED, b, c, d, e, f]];
    ctx.store(0, &macs, 0).map_err(|_| DropReason::RewriteFailed)?;
    // What Ethernet has filled a short frame up with goes.
    let end = ETHERNET_BYTES as u32 + packet.total_bytes;
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_change_tail(raw(ctx), end + ASKED_BYTES, 0) } != 0 {
        return Err(DropReason::RewriteFailed);
    }
    ctx.store(end as usize, &direct::asked(&packet.key), 0).map_err(|_| DropReason::RewriteFailed)?;
    Ok(fib.ifindex)
}

/// Notes by which node a packet of a client outside came, and whether it tells what the client asked for.
#[inline(never)]
pub fn see_node<F: Family>(ctx: &TcContext, work: &mut Work) {
    (work.node, work.tells) = ([0; 3], false);
    let Some(config) = config() else { return };
    if config.overlay_ifindex == 0
        || ingress_ifindex(ctx) != config.overlay_ifindex
        || is_pods(&work.packet.key.source, F::ETHERTYPE == V6::ETHERTYPE)
    {
        return;
    }
    let Ok(mac) = ctx.load::<[u8; 6]>(MAC_BYTES) else { return };
    work.node = direct::by_node(mac);
    work.tells = mac[0] & MAC_ASKED != 0 && config.flags & NODE_DIRECT != 0;
    // It was not looked for as one that this node has handed on.
    work.carried = UNDECIDED;
}

/// Brings what is known of a packet's flow up to date, before the packet is judged. Answers whether it may go on.
#[inline(never)]
pub fn prepare<F: Family>(ctx: &TcContext, work: &mut Work) -> bool {
    if work.tells {
        work.packet.key.pad = work.node;
        if let Err(reason) = learn::<F>(ctx, work) {
            told_apart(&work.packet, reason);
            return false;
        }
    } else if work.node != [0; 3] {
        find_handed_on(work);
    } else if work.packet.flags & SYN != 0 {
        forget_old(&work.packet, &mut work.entry);
    }
    true
}

/// A packet that another node has handed on is known by that node. One that is in no such flow is as any other.
#[inline(never)]
fn find_handed_on(work: &mut Work) {
    work.packet.key.pad = work.node;
    if FLOWS.get_ptr(work.packet.key).is_none() {
        work.packet.key.pad = [0; 3];
    }
}

/// Notes how the pod's answers are to look to a packet that tells what its client asked for.
// Its steps are functions beside each other, not within each other: their stacks would add up ("combined stack size of 5 calls is 528").
#[inline(always)]
fn learn<F: Family>(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    if !take_asked(ctx, work) {
        find_handed_on(work);
        return Ok(());
    }
    if is_noted(&work.packet.key, &work.quoted.key) {
        return Ok(());
    }
    if !find_way_back::<F>(ctx, work) {
        return Err(DropReason::NoRoute);
    }
    note(work)
}

/// Reads what a packet's client asked for, into what an error quotes, which this is none of, and cuts it off. Answers whether there was
/// such a thing, of this version.
#[inline(never)]
fn take_asked(ctx: &TcContext, work: &mut Work) -> bool {
    let end = ETHERNET_BYTES + work.packet.total_bytes as usize;
    let Ok(asked) = ctx.load::<Asked>(end) else { return false };
    if is_segmented(ctx) || direct::read_asked(&asked, &work.packet.key, &mut work.quoted.key).is_none() {
        return false;
    }
    // A receiver does that too, by the packet's length.
    // SAFETY: the context is valid.
    unsafe { bpf_skb_change_tail(raw(ctx), end as u32, 0) };
    true
}

#[inline(never)]
fn find_way_back<F: Family>(ctx: &TcContext, work: &mut Work) -> bool {
    let Some(config) = config() else { return false };
    let key = &work.packet.key;
    let client = BackendKey { address: key.source, port: key.source_port, protocol: key.protocol, pad: 0 };
    find_route::<F>(ctx, config.bridge_ifindex, &client, &mut work.route).is_some()
}

/// Whether a flow is known as it is, from this very second.
#[inline(never)]
fn is_noted(key: &FlowKey, asked: &FlowKey) -> bool {
    // SAFETY: an element reused meanwhile is another flow's, as which it is taken.
    let Some(known) = FLOWS.get_ptr(key).map(|known| unsafe { &*known }) else { return false };
    if known.last_seen != Kernel.now_seconds() {
        return false;
    }
    // SAFETY: as above.
    FLOWS
        .get_ptr(flow::reply_key(known, key.protocol))
        .is_some_and(|reply| flow::answers(unsafe { &*reply }, asked))
}

/// Enters a flow, the answers first. One that is known keeps the port by which the pod knows its client.
#[inline(never)]
fn note(work: &mut Work) -> Result<(), DropReason> {
    let bridge = config().map_or(0, |config| config.bridge_ifindex);
    let Work { packet, quoted, entry, route, .. } = work;
    let (key, asked) = (&packet.key, &quoted.key);
    let mut reply = flow::reply(asked, route.ifindex, 0);
    reply.last_seen = Kernel.now_seconds();
    // SAFETY: copied at once.
    if let Some(known) = unsafe { FLOWS.get(key).copied() } {
        **entry = known;
        entry.last_seen = reply.last_seen;
        FLOWS
            .insert(flow::reply_key(entry, key.protocol), reply, 0)
            .map_err(|_| DropReason::FlowTableFull)?;
    } else {
        **entry = FlowValue {
            source: key.source,
            destination: key.destination,
            source_port: asked.source_port,
            destination_port: key.destination_port,
            ifindex: bridge,
            generation: 0,
            // As answers are, it is judged by the node that the flow began on.
            flags: FLOW_REPLY,
            last_seen: reply.last_seen,
        };
        if !enter_own(asked, entry, &reply) && !enter_free(asked, entry, &reply) {
            return Err(DropReason::NatPortsExhausted);
        }
    }
    FLOWS.insert(key, **entry, 0).map_err(|_| DropReason::FlowTableFull)
}
