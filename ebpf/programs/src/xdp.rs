//! Node edge, in the driver: packets of flows that the tc program has begun go straight to the pod's device.
//!
//! It decides nothing: what begins, ends, is refused, or is of another shape than the plainest passes to the tc program, untouched.
//! So there is one place that chooses, counts drops and tells of flows, and a flow is carried by either at any time.

use core::ptr::read_volatile;

use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{HashMap, PerCpuArray};
use aya_ebpf::programs::XdpContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::fast::{self, Head, Plain, Plain4, Plain6, Shape, TCP4, TCP6, UDP4, UDP6};
use weft_ebpf_logic::flow;
use weft_ebpf_logic::service::flow_is_current;
use weft_ebpf_logic::tunnel;

use crate::flows::known;
use crate::maps::{Clock, Entry, Kernel, NO_PREALLOC, config};
use crate::policy;

#[map(name = "weft_xpod_2")]
static PODS: HashMap<Address, XdpPod> = HashMap::pinned(sizes::XDP_PODS, NO_PREALLOC);

/// Not pinned: nothing in it outlives a packet. The stack of 512 bytes is too small for what LLVM makes of addresses on it.
#[map]
static XDP_WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// What the program works on.
#[derive(Clone, Copy)]
struct Work {
    packet: Plain,
    entry: Entry,
    /// The time, which outlives a packet.
    clock: Clock,
}

/// This CPU's, which nothing interrupts that would use it.
#[inline(always)]
fn work() -> Option<&'static mut Work> {
    // SAFETY: zeros are a valid value, and no other reference is alive on this CPU.
    XDP_WORK.get_ptr_mut(0).map(|work| unsafe { &mut *work })
}

/// Frames that come in by an uplink. Large ones (of several buffers) may come too, which is what keeps a veth's other end
/// sending them; they are passed.
#[xdp(frags)]
pub fn weft_xdp(ctx: XdpContext) -> u32 {
    carry(&ctx).unwrap_or(XDP_PASS)
}

#[inline(always)]
fn carry(ctx: &XdpContext) -> Option<u32> {
    // No frame of either family is shorter that could be carried.
    let head = head::<UDP4>(ctx)?;
    match head[6] {
        Plain4::ETHERTYPE => match Plain4::protocol(head) {
            UDP => udp::<Plain4, UDP4>(ctx),
            TCP => tcp::<Plain4, TCP4>(ctx),
            _ => None,
        },
        Plain6::ETHERTYPE => match Plain6::protocol(head) {
            UDP => udp::<Plain6, UDP6>(ctx),
            TCP => tcp::<Plain6, TCP6>(ctx),
            _ => None,
        },
        _ => None,
    }
}

/// The frame's beginning, if it is that long.
#[inline(always)]
fn head<const N: usize>(ctx: &XdpContext) -> Option<&mut Head<N>> {
    // Read here and now: LLVM would pass what was read earlier to a function, and shift it ("R3 pointer arithmetic on pkt_end
    // prohibited", Linux 6.18).
    // SAFETY: the kernel hands in a valid context.
    let (begin, end) =
        unsafe { (read_volatile(&raw const (*ctx.ctx).data), read_volatile(&raw const (*ctx.ctx).data_end)) };
    let (begin, end) = (begin as usize, end as usize);
    if begin + N * 2 > end {
        return None;
    }
    // SAFETY: so many bytes are there, they are the program's alone, and frames begin at even addresses.
    Some(unsafe { &mut *(begin as *mut Head<N>) })
}

#[inline(never)]
fn udp<S: Shape, const N: usize>(ctx: &XdpContext) -> Option<u32> {
    let (head, work) = (head::<N>(ctx)?, work()?);
    fast::udp::<S, N>(head, &mut work.packet)?;
    if tunnel::comes_in(&Kernel, &work.packet.key) {
        return None;
    }
    let pod = way(work)?;
    fast::translate_udp::<S, N>(head, &work.packet.key, &work.entry);
    Some(leave(head, pod))
}

#[inline(never)]
fn tcp<S: Shape, const N: usize>(ctx: &XdpContext) -> Option<u32> {
    let (head, work) = (head::<N>(ctx)?, work()?);
    fast::tcp::<S, N>(head, &mut work.packet)?;
    let pod = way(work)?;
    fast::translate_tcp::<S, N>(head, &work.packet.key, &work.entry);
    Some(leave(head, pod))
}

/// What a packet becomes, and the pod it goes to, if nothing is left to decide on it.
#[inline(always)]
fn way(work: &mut Work) -> Option<&'static XdpPod> {
    let Work { packet, entry, clock } = work;
    let key = &packet.key;
    // One reused meanwhile is another flow's, whose backend the packet would reach once.
    let live = known(key, entry)?;
    let now = clock.now_seconds();
    if entry.flags & (FLOW_REPLY | FLOW_CLOSING) != 0
        || entry.ifindex != config()?.bridge_ifindex
        || flow::is_idle(entry, key.protocol, now)
    {
        return None;
    }
    // SAFETY: without preallocation an element is freed by RCU only, after the program has ended.
    let pod = unsafe { PODS.get(&entry.destination) }?;
    if packet.total_bytes > pod.mtu_bytes
        || policy::is_checked(pod.ifindex)
        || !flow_is_current(&Kernel, &flow::backend(entry, key.protocol), entry.generation)
    {
        return None;
    }
    if entry.last_seen != now {
        // SAFETY: an aligned word of an element; one reused meanwhile is of a flow that began this second.
        unsafe { (*live).last_seen = now };
    }
    Some(pod)
}

#[inline(always)]
fn leave<const N: usize>(head: &mut Head<N>, pod: &XdpPod) -> u32 {
    fast::set_ethernet(head, &pod.pod, &pod.bridge);
    // SAFETY: a helper with numbers.
    unsafe { bpf_redirect(pod.ifindex, 0) as u32 }
}
