//! Events of flows, while somebody watches. Nobody watching costs one lookup in an array where a connection begins or is refused.

use aya_ebpf::helpers::{bpf_get_current_cgroup_id, bpf_ktime_get_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray, RingBuf};
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;

use crate::maps::Kernel;

#[map(name = "weft_evt_2")]
static EVENTS: RingBuf = RingBuf::pinned(sizes::EVENT_BYTES, 0);
#[map(name = "weft_seen_2")]
static WATCHED: Array<Watched> = Array::pinned(1, 0);
#[map(name = "weft_lost_2")]
static LOST: PerCpuArray<u64> = PerCpuArray::pinned(1, 0);

/// Whether somebody wants to know: of every flow, or of a drop.
#[inline(always)]
fn wanted(drop: bool) -> bool {
    let Some(watched) = WATCHED.get(0) else { return false };
    let until = if drop && watched.drops_until > watched.flows_until {
        watched.drops_until
    } else {
        watched.flows_until
    };
    until != 0 && until > Kernel.now_seconds()
}

/// A socket got a backend.
#[inline(always)]
pub fn socket(address: &Address, port: Port, backend: &BackendKey, datagram: bool) {
    if wanted(false) {
        let kind = if datagram { EVENT_DATAGRAM } else { EVENT_CONNECT };
        tell_socket(address, port, backend, u32::from(kind));
    }
}

/// A socket was refused.
#[inline(always)]
pub fn socket_refused(address: &Address, port: Port, protocol: u8, reason: DropReason) {
    if wanted(true) {
        tell_refused(address, port, u32::from(protocol), reason as u32);
    }
}

/// The first packet of a flow goes to a backend.
#[inline(always)]
pub fn packet(key: &FlowKey, backend: &BackendKey) {
    if wanted(false) {
        tell_packet(key, backend);
    }
}

/// A packet was refused or dropped.
#[inline(always)]
pub fn dropped(key: &FlowKey, reason: DropReason) {
    if wanted(true) {
        tell_dropped(key, reason as u32);
    }
}

// Functions of their own, which write into the ring itself: an event on the stack of the packet path is more than the
// 512 bytes that all frames share ("Looks like the BPF stack limit is exceeded").

#[inline(never)]
fn tell_socket(address: &Address, port: Port, backend: &BackendKey, kind: u32) {
    tell(|event| {
        event.cgroup_id = cgroup_id();
        event.destination = *address;
        event.destination_port = port;
        event.backend = backend.address;
        event.backend_port = backend.port;
        event.protocol = backend.protocol;
        event.kind = kind as u8;
    });
}

#[inline(never)]
fn tell_refused(address: &Address, port: Port, protocol: u32, reason: u32) {
    tell(|event| {
        event.cgroup_id = cgroup_id();
        event.destination = *address;
        event.destination_port = port;
        event.protocol = protocol as u8;
        event.kind = EVENT_DROP;
        event.reason = reason;
    });
}

#[inline(never)]
fn tell_packet(key: &FlowKey, backend: &BackendKey) {
    tell(|event| {
        client(event, key);
        event.backend = backend.address;
        event.backend_port = backend.port;
        event.kind = EVENT_PACKET;
    });
}

#[inline(never)]
fn tell_dropped(key: &FlowKey, reason: u32) {
    tell(|event| {
        client(event, key);
        event.kind = EVENT_DROP;
        event.reason = reason;
    });
}

#[inline(always)]
fn client(event: &mut FlowEvent, key: &FlowKey) {
    event.source = key.source;
    event.source_port = key.source_port;
    event.destination = key.destination;
    event.destination_port = key.destination_port;
    event.protocol = key.protocol;
}

#[inline(always)]
fn cgroup_id() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_current_cgroup_id() }
}

/// Takes a place in the ring and lets `fill` write it; without one, counts.
#[inline(always)]
fn tell(fill: impl FnOnce(&mut FlowEvent)) {
    let Some(mut entry) = EVENTS.reserve::<FlowEvent>(0) else {
        if let Some(lost) = LOST.get_ptr_mut(0) {
            // SAFETY: the element belongs to this CPU.
            unsafe { *lost += 1 };
        }
        return;
    };
    // SAFETY: the place is as large as an event, aligned to eight bytes, and nobody reads it before it is handed over.
    let event = unsafe {
        core::ptr::write_bytes(entry.as_mut_ptr(), 0, 1);
        &mut *entry.as_mut_ptr()
    };
    // SAFETY: a helper without arguments.
    event.time_ns = unsafe { bpf_ktime_get_ns() };
    fill(event);
    entry.submit(0);
}
