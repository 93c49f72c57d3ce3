//! Counts of each Service: connections, failures, and what was turned away.
//!
//! An entry is made by what it counts first, so a Service without traffic costs nothing.

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuHashMap;
use weft_ebpf_abi::*;

use crate::maps::NO_PREALLOC;

/// Not pinned: the agent that loaded it says whose the lists are.
#[map(name = "weft_counts")]
static COUNTS: PerCpuHashMap<CountKey, u64> = PerCpuHashMap::with_max_entries(sizes::COUNTS, NO_PREALLOC);

/// A connection, or the first packet of a flow, got a backend.
#[inline(always)]
pub fn connection(list: u32) {
    add(list, CONNECTIONS);
}

/// A connection that got a backend failed.
#[inline(always)]
pub fn failed(list: u32) {
    add(list, FAILED);
}

/// What asked for the Service was refused or dropped.
#[inline(always)]
pub fn turned_away(list: u32, reason: DropReason) {
    add(list, reason as u32);
}

/// Without room for an entry the count is lost; the node's own counters have what was turned away.
// A function of its own: the packet path has no room on its stack.
#[inline(never)]
fn add(list: u32, what: u32) -> u32 {
    if list == 0 {
        return 0;
    }
    let key = CountKey { list, what };
    if let Some(count) = COUNTS.get_ptr_mut(key) {
        // SAFETY: the value belongs to this CPU, and without preallocation it is freed by RCU only, after the program has ended. A
        // kernel that preempts may lose a count.
        unsafe { *count += 1 };
    } else {
        let _ = COUNTS.insert(key, 1, 0);
    }
    0
}
