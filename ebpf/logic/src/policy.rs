//! NetworkPolicy for one packet at a pod's edge.
//!
//! A packet is allowed if it is an answer, or a rule of the pod's set covers it: for its peer's identity, or for everybody. The
//! cost is that of at most five lookups, however many policies there are.

mod parse;

pub use parse::{Bytes, Packet, Parsed, parse};

use weft_ebpf_abi::policy::{
    IDENTITY_NONE, POLICY_DRY_EGRESS, POLICY_DRY_INGRESS, POLICY_EGRESS, POLICY_INGRESS, PolicyPod,
    TRACK_CLOSING, TRACK_FRAGMENTS, TRACK_IN, TRACK_OUT, TrackKey, TrackValue,
};
use weft_ebpf_abi::{Address, Port, TCP, UDP};

use crate::packet::{FIN, RST, SYN};

/// IPPROTO_ICMP.
pub const ICMP: u8 = 1;
/// IPPROTO_ICMPV6.
pub const ICMPV6: u8 = 58;

/// How long answers to a silent flow are still let through: netfilter's times.
const TCP_SECONDS: u32 = 432_000;
const TCP_CLOSING_SECONDS: u32 = 120;
const UDP_SECONDS: u32 = 180;
const OTHER_SECONDS: u32 = 600;
const ICMP_SECONDS: u32 = 30;

/// The tables that verdicts are made from.
pub trait PolicyTables {
    /// Identity of a peer: of the pod with this address, or of the narrowest range around it.
    fn identity(&self, address: &Address) -> u64;
    /// Whether a set allows an identity this protocol and port.
    fn allows(&self, set: u64, identity: u64, protocol: u8, port: Port) -> bool;
    /// A flow that was let through.
    fn tracked(&self, key: &TrackKey) -> Option<TrackValue>;
    /// Remembers one. Best effort: a full table forgets the oldest.
    fn track(&self, key: &TrackKey, value: &TrackValue);
    /// Counts a packet that a set on trial does not cover.
    fn would_drop(&self, set: u64);
    /// Seconds of the monotonic clock.
    fn now(&self) -> u32;
}

/// Where a packet is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// What holds for the pod.
    pub pod: PolicyPod,
    /// Index of the device that leads to it.
    pub ifindex: u32,
    /// [`TRACK_OUT`] or [`TRACK_IN`].
    pub way: u8,
}

/// Whom the rules are asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The node, or a Service whose backend is checked later: allowed.
    Exempt,
    /// This address.
    At(Address),
}

/// Whether a packet may pass; what answers to it need is remembered.
#[inline(always)]
pub fn check<T: PolicyTables>(tables: &T, edge: &Edge, packet: &Packet, peer: &Peer) -> bool {
    let pod = &edge.pod;
    let (own, set, dry, trial) = if edge.way == TRACK_OUT {
        (POLICY_EGRESS, pod.egress, POLICY_DRY_EGRESS, pod.dry_egress)
    } else {
        (POLICY_INGRESS, pod.ingress, POLICY_DRY_INGRESS, pod.dry_ingress)
    };
    let now = tables.now();
    if !is_answer(tables, edge, packet, now) {
        if edge.pod.flags & own != 0
            && let Peer::At(address) = peer
            && !covers(tables, set, address, packet)
        {
            return false;
        }
        if edge.pod.flags & dry != 0
            && let Peer::At(address) = peer
            && !covers(tables, trial, address, packet)
        {
            tables.would_drop(trial);
        }
        if !packet.error {
            remember(tables, edge, packet, now);
        }
    }
    if packet.fragments {
        // The first opens the way for the others.
        tables.track(&fragment_key(edge, packet), &TrackValue { last_seen: now, flags: 0 });
    }
    true
}

/// Whether a later fragment of a packet may pass: if the first did.
#[inline(always)]
pub fn check_fragment<T: PolicyTables>(tables: &T, edge: &Edge, packet: &Packet) -> bool {
    let own = if edge.way == TRACK_OUT { POLICY_EGRESS } else { POLICY_INGRESS };
    if edge.pod.flags & own == 0 {
        return true;
    }
    let now = tables.now();
    let key = fragment_key(edge, packet);
    matches!(tables.tracked(&key), Some(value) if now.wrapping_sub(value.last_seen) <= ICMP_SECONDS)
}

// What follows is not inlined where it has keys of its own: together they are more than a program's stack holds.

/// Whether the rules of a set cover a packet of or to this peer. A pod can't keep itself out.
#[inline(never)]
pub fn covers<T: PolicyTables>(tables: &T, set: u64, peer: &Address, packet: &Packet) -> bool {
    if packet.source == packet.destination {
        return true;
    }
    rule(tables, set, peer, packet.protocol, packet.destination_port)
}

/// Whether a set allows a peer this protocol and port.
#[inline(always)]
pub fn rule<T: PolicyTables>(tables: &T, set: u64, peer: &Address, protocol: u8, port: Port) -> bool {
    let identity = tables.identity(peer);
    if identity != IDENTITY_NONE && tables.allows(set, identity, protocol, port) {
        return true;
    }
    tables.allows(set, IDENTITY_NONE, protocol, port)
}

#[inline(always)]
fn forward_key(edge: &Edge, packet: &Packet) -> TrackKey {
    TrackKey {
        source: packet.source,
        destination: packet.destination,
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        ifindex: edge.ifindex,
        protocol: packet.protocol,
        way: edge.way,
        pad: [0; 2],
    }
}

#[inline(always)]
fn answered_key(edge: &Edge, packet: &Packet) -> TrackKey {
    TrackKey {
        source: packet.destination,
        destination: packet.source,
        source_port: packet.destination_port,
        destination_port: packet.source_port,
        ifindex: edge.ifindex,
        protocol: packet.protocol,
        way: if edge.way == TRACK_OUT { TRACK_IN } else { TRACK_OUT },
        pad: [0; 2],
    }
}

/// Whether a packet answers a flow that was let through the other way.
#[inline(never)]
fn is_answer<T: PolicyTables>(tables: &T, edge: &Edge, packet: &Packet, now: u32) -> bool {
    if packet.begins {
        return false;
    }
    let key = answered_key(edge, packet);
    let Some(value) = tables.tracked(&key) else { return false };
    if !is_alive(&value, packet.protocol, now) {
        return false;
    }
    let closing = if packet.tcp_flags & (FIN | RST) != 0 { TRACK_CLOSING } else { 0 };
    touch(tables, &key, &value, closing, now);
    true
}

#[inline(never)]
fn remember<T: PolicyTables>(tables: &T, edge: &Edge, packet: &Packet, now: u32) {
    let key = &forward_key(edge, packet);
    let closing = if packet.tcp_flags & (FIN | RST) != 0 { TRACK_CLOSING } else { 0 };
    match tables.tracked(key) {
        // A SYN after the end begins anew, with the same ports.
        Some(_) if packet.protocol == TCP && packet.tcp_flags & SYN != 0 => {
            tables.track(key, &TrackValue { last_seen: now, flags: 0 });
        }
        Some(value) => touch(tables, key, &value, closing, now),
        None => tables.track(key, &TrackValue { last_seen: now, flags: closing }),
    }
}

/// Writes only what changed: at most once a second.
#[inline(always)]
fn touch<T: PolicyTables>(tables: &T, key: &TrackKey, value: &TrackValue, closing: u32, now: u32) {
    let new = TrackValue { last_seen: now, flags: value.flags | closing };
    if new != *value {
        tables.track(key, &new);
    }
}

/// What joins the fragments of one packet.
#[inline(always)]
fn fragment_key(edge: &Edge, packet: &Packet) -> TrackKey {
    let [a, b, c, d] = packet.identification;
    TrackKey {
        source: packet.source,
        destination: packet.destination,
        source_port: Port([a, b]),
        destination_port: Port([c, d]),
        ifindex: edge.ifindex,
        protocol: 0,
        way: edge.way | TRACK_FRAGMENTS,
        pad: [0; 2],
    }
}

#[inline(always)]
fn is_alive(value: &TrackValue, protocol: u8, now: u32) -> bool {
    let bound = match protocol {
        TCP if value.flags & TRACK_CLOSING != 0 => TCP_CLOSING_SECONDS,
        TCP => TCP_SECONDS,
        UDP => UDP_SECONDS,
        ICMP | ICMPV6 => ICMP_SECONDS,
        _ => OTHER_SECONDS,
    };
    now.wrapping_sub(value.last_seen) <= bound
}

#[cfg(test)]
mod tests;
