//! What the kernel says of a frame, beside the frame itself.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;

/// The raw context, for helpers that aya does not wrap.
#[inline(always)]
pub fn raw(ctx: &TcContext) -> *mut __sk_buff {
    ctx.skb.skb
}

/// The type of the frame, in network order.
#[inline(always)]
pub fn ethertype(ctx: &TcContext) -> u16 {
    // SAFETY: the kernel hands in a valid context. The low half holds the type in network order.
    unsafe { (*raw(ctx)).protocol as u16 }
}

/// The device that the frame came in by.
#[inline(always)]
pub fn ingress_ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel hands in a valid context.
    unsafe { (*ctx.skb.skb).ifindex }
}
