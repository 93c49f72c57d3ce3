//! By which way a translated packet goes on, and what fits through.

use aya_ebpf::bindings::bpf_check_mtu_flags::BPF_MTU_CHK_SEGS;
use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SKIP_NEIGH, BPF_FIB_LOOKUP_SRC,
    bpf_fib_lookup as FibLookup,
};
use aya_ebpf::helpers::{bpf_check_mtu, bpf_fib_lookup, bpf_redirect_neigh};
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::flow::Route;

use crate::family::Family;
use crate::frame::raw;
use crate::maps::{Kernel, Work, config, near};
use crate::verdict::{TO_POD, TO_STACK};

/// What every link takes.
const LEAST_MTU_BYTES: u32 = 1_280;

/// Asks the kernel's routes for the way to a backend and the source address it would use.
#[inline(always)]
pub fn find_route<F: Family>(
    ctx: &TcContext,
    ifindex: u32,
    backend: &BackendKey,
    route: &mut Route,
) -> Option<()> {
    if Kernel.is_node_address(&backend.address) {
        *route = Route { source: Address::ANY, keeps_source: true, ifindex: 0 };
        return Some(());
    }
    // SAFETY: all zeros are a valid value.
    let mut fib: FibLookup = unsafe { core::mem::zeroed() };
    fib.family = F::NUMBER;
    fib.l4_protocol = backend.protocol;
    fib.ifindex = ifindex;
    F::set_destination(&mut fib, &backend.address);
    // SAFETY: context and parameters are valid for the length given.
    let result = unsafe {
        bpf_fib_lookup(
            ctx.skb.skb.cast(),
            &raw mut fib,
            size_of::<FibLookup>() as i32,
            BPF_FIB_LOOKUP_SKIP_NEIGH | BPF_FIB_LOOKUP_SRC,
        )
    };
    // It also looks at the packet's length; a flow may begin with a packet that is too big.
    if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) && result != i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED) {
        return None;
    }
    *route = Route { source: F::source(&fib), keeps_source: false, ifindex: fib.ifindex };
    Some(())
}

/// What goes to other nodes' pods leaves by the overlay, or past it by the link that they are reached by now.
#[inline(never)]
pub fn choose_link(work: &mut Work) {
    if let Some(config) = config() {
        by_now(&mut work.entry, config);
    }
}

/// As [`choose_link`].
#[inline(always)]
pub fn by_now(entry: &mut FlowValue, config: &NodeConfig) {
    // A flow that its backend's node answers stays in the overlay: by the link nobody would tell that node of it.
    if entry.ifindex == config.overlay_ifindex && entry.flags & FLOW_DIRECT == 0 {
        let link = near(config, &entry.destination);
        if link != 0 {
            entry.ifindex = link;
        }
    }
}

/// The MTU of the next device, if the packet exceeds it.
#[inline(always)]
pub fn too_big_for(ctx: &TcContext, total_bytes: u32, ifindex: u32) -> Option<u16> {
    // Every link takes what IPv6 demands of it (RFC 8200 §5): small packets cost nothing here.
    if total_bytes <= LEAST_MTU_BYTES || ifindex == 0 {
        return None;
    }
    let mut mtu = 0_u32;
    // SAFETY: the context is valid, and the helper writes a word.
    let result =
        unsafe { bpf_check_mtu(raw(ctx).cast(), ifindex, &raw mut mtu, 0, u64::from(BPF_MTU_CHK_SEGS)) };
    // Positive: the packet, or a segment of it, is too long.
    (result > 0).then_some(mtu as u16)
}

/// The way of a translated packet: to a pod of this node, or out of a device; 0 leaves it to the stack. Routing it there would drop
/// it: its source is now an address of this node ("martian source").
#[inline(always)]
pub fn leave(work: &mut Work) -> i32 {
    if work.find_target() && work.pod.flags & LOCAL_QUEUED == 0 {
        return TO_POD;
    }
    if work.entry.ifindex == 0 {
        return TO_STACK;
    }
    // SAFETY: no parameters are given; the kernel looks the neighbour up by the packet's destination.
    unsafe { bpf_redirect_neigh(work.entry.ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}
