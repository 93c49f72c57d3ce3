//! The table of flows that are translated packet by packet: who is in it, who may go on, and how one gets in.

use aya_ebpf::bindings::BPF_NOEXIST;
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::connecting::{self, Connecting};
use weft_ebpf_logic::flow::{self, NAT_PORT_TRIES, NEVER, Route};
use weft_ebpf_logic::packet::{ACK, FIN, Packet, RST, SYN};
use weft_ebpf_logic::service::{flow_is_current, takes_new_flows};

use crate::failure;
use crate::maps::{Entry, FLOWS, Kernel, config};

/// What is known of a packet's flow.
pub enum Known {
    /// It goes on.
    Goes,
    /// Its backend is gone.
    Gone,
    /// The packet begins another.
    Anew,
}

/// Copies the entry of a flow; answers where it is.
#[inline(always)]
pub fn known(key: &FlowKey, entry: &mut Entry) -> Option<*mut FlowValue> {
    let found = FLOWS.get_ptr_mut(key)?;
    entry.copy(found);
    Some(found)
}

/// Judges a packet of a flow that is in the table.
#[inline(always)]
pub fn established(
    packet: &Packet,
    protocol: u8,
    entry: &FlowValue,
    now: u32,
    backend: &mut BackendKey,
) -> Known {
    if entry.flags & FLOW_REPLY == 0 {
        let fresh_syn =
            packet.flags & SYN != 0 && (entry.flags & FLOW_CLOSING != 0 || was_never_answered(packet, entry));
        if fresh_syn || flow::is_idle(entry, protocol, now) {
            return Known::Anew;
        }
        *backend = flow::backend(entry, protocol);
        if !flow_is_current(&Kernel, backend, entry.generation) {
            return if protocol != UDP && packet.flags & SYN == 0 { Known::Gone } else { Known::Anew };
        }
    }
    Known::Goes
}

/// Whether a SYN is of a flow that its backend never answered and, as it drains, will not take any more: the client asks again, or gave up
/// without a word and has taken the port for another connection.
#[inline(always)]
fn was_never_answered(packet: &Packet, entry: &FlowValue) -> bool {
    let protocol = packet.key.protocol;
    if packet.flags & ACK != 0 || takes_new_flows(&Kernel, &flow::backend(entry, protocol)) {
        return false;
    }
    // SAFETY: a word is read at once.
    match unsafe { FLOWS.get(flow::reply_key(entry, protocol)) } {
        Some(answers) => answers.last_seen == NEVER,
        None => true,
    }
}

/// Notes that a flow lives, at most once a second, and that it is closing, in both directions.
#[inline(always)]
pub fn touch(packet: &Packet, entry: &FlowValue, now: u32) {
    let closing = packet.flags & (FIN | RST) != 0;
    if entry.last_seen != now
        && let Some(live) = FLOWS.get_ptr_mut(packet.key)
    {
        // SAFETY: an aligned word of an element; a lost race writes the same second.
        unsafe { (*live).last_seen = now };
    }
    if closing {
        let forward = if entry.flags & FLOW_REPLY != 0 {
            flow::forward_key(entry, packet.key.protocol)
        } else {
            packet.key
        };
        if let Some(live) = FLOWS.get_ptr_mut(forward) {
            // SAFETY: an aligned word of an element; no other flag is set later than at its creation.
            unsafe { (*live).flags |= FLOW_CLOSING };
        }
    }
}

/// Counts what the packet tells of a connection that is watched. (Not where it is judged: the stack is full there.)
#[inline(always)]
pub fn watch(packet: &Packet, entry: &FlowValue) {
    let came = connecting::judge(entry, packet.flags);
    if !matches!(came, Connecting::Nothing) {
        failure::note(packet, entry, came);
    }
}

/// Removes both directions of a flow.
#[inline(always)]
pub fn forget(key: &FlowKey, forward: &FlowValue) {
    let _ = FLOWS.remove(flow::reply_key(forward, key.protocol));
    let _ = FLOWS.remove(key);
}

/// Enters both directions of a new flow, the answers first: no packet may leave whose answer would not be known.
/// Looks for a source port that is free towards the backend.
#[inline(never)]
pub fn record(key: &FlowKey, route: &Route, ifindex: u32, entry: &mut FlowValue) -> Result<(), DropReason> {
    entry.last_seen = Kernel.now_seconds();
    let mut reply = flow::reply(key, ifindex, entry.generation);
    reply.flags |= entry.flags & FLOW_WATCHED;
    // A client that keeps its address keeps its port as well, unless its answers could not be told from another flow's. A pod never
    // keeps it: it may use the same port towards the same backend directly, past any table of flows.
    let mut entered = false;
    entry.source = if route.keeps_source { key.source } else { route.source };
    if route.keeps_source && !is_from_pods(ifindex) {
        entry.source_port = key.source_port;
        entered = enter_own(key, entry, &reply);
    }
    if !entered && !enter_free(key, entry, &reply) {
        return Err(DropReason::NatPortsExhausted);
    }
    FLOWS.insert(key, *entry, 0).map_err(|_| DropReason::FlowTableFull)
}

#[inline(always)]
fn is_from_pods(ifindex: u32) -> bool {
    match config() {
        Some(config) => ifindex == config.bridge_ifindex || ifindex == config.overlay_ifindex,
        None => false,
    }
}

/// Enters the answers to the client's own port. Those of this very flow, whose other half was forgotten, are taken over.
#[inline(never)]
pub fn enter_own(key: &FlowKey, entry: &FlowValue, reply: &FlowValue) -> bool {
    let answers = flow::reply_key(entry, key.protocol);
    if FLOWS.insert(answers, reply, BPF_NOEXIST as u64).is_ok() {
        return true;
    }
    // SAFETY: an element reused meanwhile is another flow's, as which it is taken.
    match FLOWS.get_ptr(answers).map(|known| flow::answers(unsafe { &*known }, key)) {
        Some(true) => FLOWS.insert(answers, reply, 0).is_ok(),
        Some(false) | None => false,
    }
}

/// Enters the answers to a port that is free.
#[inline(never)]
pub fn enter_free(key: &FlowKey, entry: &mut FlowValue, reply: &FlowValue) -> bool {
    let random = Kernel.random();
    for n in 0..NAT_PORT_TRIES {
        entry.source_port = flow::nat_port(random, n);
        if FLOWS.insert(flow::reply_key(entry, key.protocol), reply, BPF_NOEXIST as u64).is_ok() {
            return true;
        }
    }
    false
}
