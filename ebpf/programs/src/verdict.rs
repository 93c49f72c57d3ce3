//! What a packet program answers: to the kernel, and before that to the function that asked.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use weft_ebpf_abi::DropReason;
use weft_ebpf_logic::packet::Packet;

use crate::events;
use crate::maps::count;

/// `TC_ACT_OK`: the packet goes on, and no other program sees it.
pub const PASS: i32 = TC_ACT_OK as i32;
/// `TC_ACT_SHOT`.
pub const DROP: i32 = TC_ACT_SHOT as i32;
/// `TCX_NEXT`, as a filter `TC_ACT_UNSPEC`: other programs on the device go on.
pub const NEXT: i32 = -1;
/// No verdict yet: the packet is nobody's.
pub const NOBODYS: i32 = -2;
/// No verdict yet: the packet is to be handed to [`Work::pod`](crate::maps::Work::pod).
pub const TO_POD: i32 = -3;
/// No verdict yet: the packet was translated, and is the stack's.
pub const TO_STACK: i32 = -4;
/// What [`carry`](crate::tc::carry) leaves: a packet of another shape, which is not read yet. What it has decided on is above.
pub const UNREAD: i32 = -5;
/// Likewise: one that is read, of no known flow.
pub const UNKNOWN: i32 = -6;
/// Likewise: one that is read, on which something is to be decided.
pub const UNDECIDED: i32 = -7;

/// Drops a packet.
#[inline(always)]
pub fn dropped(reason: DropReason) -> i32 {
    count(reason);
    DROP
}

/// Drops a packet that would have begun a flow: whoever watches is told.
#[inline(always)]
pub fn told(packet: &Packet, reason: DropReason) -> i32 {
    events::dropped(&packet.key, reason);
    dropped(reason)
}

/// Likewise, where the stack is full.
#[inline(never)]
pub fn told_apart(packet: &Packet, reason: DropReason) -> i32 {
    told(packet, reason)
}
