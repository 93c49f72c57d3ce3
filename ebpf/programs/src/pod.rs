//! Pod edge: Services that no socket hook saw, and the short ways: to a pod of this node, and to and from the overlay.
//!
//! Behind the program of policy on the same hook. What has no short way is the plain one's: bridge, routes, VXLAN device.

use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibLookup};
use aya_ebpf::helpers::{
    bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_type,
};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::fast::{self, Plain4, Plain6, Shape as _};
use weft_ebpf_logic::packet::{ETHERNET_BYTES, Family as _, V4, V6};

use crate::family::Family;
use crate::frame::{ethertype, ingress_ifindex, raw};
use crate::in_place::{self, ETHERNET};
use crate::maps::{Work, config, count, is_pods, near, work};
use crate::policy;
use crate::tc::{carry, decide};
use crate::verdict::{DROP, NEXT, NOBODYS, TO_POD, TO_STACK, UNKNOWN};

/// Places in [`Work::ends`].
const SOURCE: usize = 0;
const DESTINATION: usize = 1;
/// PACKET_HOST of linux/if_packet.h.
const PACKET_HOST: u32 = 0;

/// Packets that a pod sends, after its policies.
#[classifier]
pub fn weft_pod_edge(ctx: TcContext) -> i32 {
    let mark = policy::take_mark(&ctx);
    let (Some(config), Some(work)) = (config(), work()) else { return NEXT };
    (work.came_by, work.at_pod, work.mark) = (config.bridge_ifindex, true, mark);
    let done = match ethertype(&ctx) {
        Plain4::ETHERTYPE => edge::<V4>(&ctx, work, config),
        Plain6::ETHERTYPE => edge::<V6>(&ctx, work, config),
        _ => return NEXT,
    };
    match done {
        TO_POD => hand_over(&ctx, &work.pod),
        NOBODYS | TO_STACK => {
            // SAFETY: the context is valid, and a program of this type may write the mark.
            unsafe { (*raw(&ctx)).mark = SEEN_MARK };
            NEXT
        }
        verdict => verdict,
    }
}

#[inline(always)]
fn edge<F: Family>(ctx: &TcContext, work: &mut Work, config: &NodeConfig) -> i32 {
    if read_ends::<F>(ctx, work).is_none() {
        return NEXT;
    }
    work.near = work.find_end(DESTINATION);
    // An isolated pod's packet to a Service is marked, and is always asked about.
    if work.near && work.mark == 0 && work.pod.translated[0] == 0 {
        return if work.pod.flags & LOCAL_QUEUED == 0 { TO_POD } else { NOBODYS };
    }
    work.carried = carry::<F>(ctx, work, config);
    // A pod of another node is no Service: its way is asked for before Services are. Where there is none, it was asked for already.
    work.asked = work.carried == UNKNOWN
        && !work.near
        && work.mark == 0
        && is_pods(&work.ends[DESTINATION], F::ETHERTYPE == V6::ETHERTYPE);
    if work.asked {
        let done = set_out::<F>(ctx, work);
        if done != NOBODYS {
            return done;
        }
    }
    let done = decide::<F>(ctx, work);
    if done != NOBODYS || work.mark != 0 || work.asked {
        return done;
    }
    if work.near {
        // Looking for the way of a translated packet may have overwritten it.
        return if work.find_end(DESTINATION) && work.pod.flags & LOCAL_QUEUED == 0 {
            TO_POD
        } else {
            NOBODYS
        };
    }
    set_out::<F>(ctx, work)
}

/// Sends a packet to a pod of another node, if it is from the pod at whose edge it is, and that one's packets need not pass the stack.
#[inline(always)]
fn set_out<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    if work.find_end(SOURCE)
        && work.pod.ifindex == ingress_ifindex(ctx)
        && work.pod.flags & LOCAL_HOST_PORTS == 0
    {
        return depart::<F>(ctx, work);
    }
    NOBODYS
}

/// Not inlined, as the stack of all that follows has no room for what it reads.
#[inline(never)]
fn read_ends<F: Family>(ctx: &TcContext, work: &mut Work) -> Option<()> {
    work.ends = F::addresses(ctx)?;
    Some(())
}

/// Whether a packet comes from other nodes' pods, for a pod of this node that it can be handed to. What may have to be translated
/// back can not, nor what no pod sent: answers to a node's own address leave past the overlay by the stack, which translates the source of
/// all that it has not seen the beginning of.
#[inline(always)]
pub fn arrives<F: Family>(ctx: &TcContext, work: &mut Work, config: &NodeConfig) -> bool {
    (work.came_by == config.overlay_ifindex || config.flags & NODE_NEAR != 0)
        && is_from_afar::<F>(ctx, work)
        && is_pods(&work.ends[SOURCE], F::ETHERTYPE == V6::ETHERTYPE)
        && work.find_end(DESTINATION)
        && work.pod.translated[0] == 0
        && work.pod.flags & LOCAL_QUEUED == 0
        && F::hop(ctx).is_some()
}

/// Whether a packet comes from other nodes' pods: out of the overlay, or over the link by which they are reached past it; then it
/// counts as the overlay's. If so its ends are read.
#[inline(never)]
fn is_from_afar<F: Family>(ctx: &TcContext, work: &mut Work) -> bool {
    let Some(config) = config() else { return false };
    let overlay = config.overlay_ifindex;
    if work.came_by == overlay {
        return read_ends::<F>(ctx, work).is_some();
    }
    if overlay == 0 || config.flags & NODE_NEAR == 0 || read_ends::<F>(ctx, work).is_none() {
        return false;
    }
    if near(config, &work.ends[SOURCE]) != work.came_by {
        return false;
    }
    work.came_by = overlay;
    true
}

/// Hands a packet to a pod: past the bridge, and past the pod's device, whose program would have asked its policies.
#[inline(never)]
pub fn hand_over(ctx: &TcContext, pod: &LocalPod) -> i32 {
    let ifindex = pod.ifindex;
    if !policy::admits(ctx, ifindex) {
        return DROP;
    }
    if address_to(ctx, pod).is_none() {
        count(DropReason::RewriteFailed);
        return DROP;
    }
    // SAFETY: the context is valid; the helper takes numbers. Linux before 6.16 does not do this for a packet that is handed over,
    // and the pod's stack would take it for somebody else's.
    unsafe {
        if (*raw(ctx)).pkt_type != PACKET_HOST {
            bpf_skb_change_type(raw(ctx), PACKET_HOST);
        }
        bpf_redirect_peer(ifindex, 0) as i32
    }
}

/// Writes the pod's hardware address into a frame that was sent to a router's, and the router's as that of the sender.
#[inline(always)]
fn address_to(ctx: &TcContext, pod: &LocalPod) -> Option<()> {
    let head = in_place::head::<ETHERNET>(ctx)?;
    fast::pass_on(head, &pod.mac);
    Some(())
}

/// Sends a packet to a pod of another node straight into the overlay or onto the link, if the node's routes lead there: what the
/// stack would do with it, without the bridge and the hooks of its firewall.
#[inline(never)]
fn depart<F: Family>(ctx: &TcContext, work: &Work) -> i32 {
    let (Some(config), Some(bytes)) = (config(), longest::<F>(ctx, work)) else { return NOBODYS };
    // The kernel's answer to the question below heeds a route's own size for IPv6 only.
    let too_large = config.narrowest_bytes != 0 && bytes > config.narrowest_bytes;
    if config.overlay_ifindex == 0 || too_large {
        return NOBODYS;
    }
    // SAFETY: all zeros are a valid value.
    let mut fib: FibLookup = unsafe { core::mem::zeroed() };
    fib.family = F::NUMBER;
    fib.ifindex = work.came_by;
    fib.__bindgen_anon_1.tot_len = bytes;
    F::set_destination(&mut fib, &work.ends[DESTINATION]);
    // SAFETY: context and parameters are valid for the length given.
    let result =
        unsafe { bpf_fib_lookup(ctx.skb.skb.cast(), &raw mut fib, size_of::<FibLookup>() as i32, 0) };
    // What is too big for the route is the stack's too, which says so to the sender.
    if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
        return NOBODYS;
    }
    let by_link = fib.ifindex != config.overlay_ifindex;
    if by_link && fib.ifindex != near(config, &work.ends[DESTINATION]) {
        return NOBODYS;
    }
    if F::hop(ctx).is_none() {
        return NOBODYS;
    }
    if by_link {
        // The kernel has to see that the neighbour is used, or it would never ask whether it is still there.
        // SAFETY: no parameters are given; the kernel finds the router by the packet's destination.
        return unsafe { bpf_redirect_neigh(fib.ifindex, core::ptr::null_mut(), 0, 0) as i32 };
    }
    if in_place::set_ethernet(ctx, &fib.dmac, &fib.smac).is_none() {
        count(DropReason::RewriteFailed);
        return DROP;
    }
    // SAFETY: a helper with numbers.
    unsafe { bpf_redirect(fib.ifindex, 0) as i32 }
}

/// Bytes of the longest IP packet that a frame will be on the wire: of a segment, if it is to be cut into such.
#[inline(always)]
fn longest<F: Family>(ctx: &TcContext, work: &Work) -> Option<u16> {
    // SAFETY: the context is valid.
    let (length, segment) = unsafe { ((*raw(ctx)).len, (*raw(ctx)).gso_size) };
    let bytes = if segment == 0 {
        length - ETHERNET_BYTES as u32
    } else {
        let packet = &work.packet;
        let header = match packet.key.protocol {
            UDP => 8,
            TCP => {
                let words: u8 = ctx.load(packet.transport() + 12).ok()?;
                u32::from(words >> 4) * 4
            }
            _ => return None,
        };
        packet.header_bytes + header + segment
    };
    u16::try_from(bytes).ok()
}
