//! Flows of clients outside whose backend's node answers them by itself: when they are, and what their packets tell that node.

use weft_ebpf_abi::{
    ASKED_BYTES, ASKED_VERSION, Address, Asked, BACKEND_ACTIVE, FLOW_DIRECT, FlowKey, FlowValue, Port, SCTP,
    SERVICE_KEEP_SOURCE, SERVICE_WATCHED, TCP, UDP,
};

use crate::Tables;
use crate::flow;
use crate::packet::{Packet, Part, SYN, fold, sum};
use crate::service::UDP_STICKY_SECONDS;

/// What is known of the cluster's other nodes.
pub trait Nodes {
    /// The largest packet that gets to the pods that an address is one of, if their node answers clients by itself; 0 for other pods, and
    /// for nodes; `None` for an address outside the cluster.
    fn takes_bytes(&self, address: &Address) -> Option<u32>;
}

/// Whether a packet with what it has to tell gets to a pod's node, and that node wants it.
#[inline(always)]
pub fn fits<N: Nodes>(nodes: &N, packet: &Packet, pod: &Address) -> bool {
    matches!(nodes.takes_bytes(pod), Some(bytes) if packet.total_bytes + ASKED_BYTES <= bytes)
}

/// Whether the flow that a packet from outside begins is to be answered by its backend's node. `flags` are the Service's.
///
/// Not of a client that is in the cluster: it has its own rules. Not where connections are watched: this node sees no answers. Not SCTP: a
/// checksum that is only begun would be finished over what stands behind the packet as well, which sums up to zero but for a CRC.
#[inline(always)]
pub fn suits<N: Nodes>(nodes: &N, packet: &Packet, flags: u32, backend: &Address) -> bool {
    let watched = packet.key.protocol == TCP && flags & SERVICE_WATCHED != 0;
    flags & SERVICE_KEEP_SOURCE == 0
        && !watched
        && packet.key.protocol != SCTP
        && matches!(packet.part, Part::Whole)
        && fits(nodes, packet, backend)
        && nodes.takes_bytes(&packet.key.source).is_none()
}

/// Whether a packet of such a flow tells what its client asked for: each that may be the first to arrive, and once a second another, for
/// a node that has forgotten the flow.
#[inline(always)]
#[must_use]
pub fn tells(packet: &Packet, last_seen: u32, now: u32) -> bool {
    matches!(packet.part, Part::Whole)
        && (packet.key.protocol == UDP || packet.flags & SYN != 0 || last_seen != now)
}

/// Whether a SYN begins such a flow anew. The node doesn't see how the backend ends a connection, so it goes by time: a SYN that is sent
/// again comes within two minutes.
#[inline(always)]
pub fn begins_anew<T: Tables + Nodes>(tables: &T, packet: &Packet, entry: &FlowValue) -> bool {
    if entry.flags & FLOW_DIRECT == 0 || packet.flags & SYN == 0 {
        return false;
    }
    let active = match tables.backend(&flow::backend(entry, TCP)) {
        Some(backend) => backend.flags & BACKEND_ACTIVE != 0,
        None => false,
    };
    let idle = tables.now_seconds().wrapping_sub(entry.last_seen) >= UDP_STICKY_SECONDS;
    idle || !active || !fits(tables, packet, &entry.destination)
}

/// What a client's packet tells.
#[inline(always)]
#[must_use]
pub fn asked(key: &FlowKey) -> Asked {
    let [version, of_version] = ASKED_VERSION;
    let [a, b, c, d] = key.destination.words();
    let [e, f] = key.destination_port.0;
    let [g, h] = key.source_port.0;
    let mut asked =
        [u32::from_ne_bytes([version, of_version, 0, 0]), a, b, c, d, u32::from_ne_bytes([e, f, g, h])];
    let [i, j] = fold(sum(&asked));
    asked[0] = u32::from_ne_bytes([version, of_version, i, j]);
    asked
}

/// What the packet's client had sent, into `key`; of the packet itself only its source and protocol are known to be the client's.
/// `None` for what is no such thing.
#[inline(always)]
#[must_use]
pub fn read_asked(asked: &Asked, packet: &FlowKey, key: &mut FlowKey) -> Option<()> {
    let [a, b, _, _] = asked[0].to_ne_bytes();
    let [c, d] = fold(sum(asked));
    if a != ASKED_VERSION[0] || b != ASKED_VERSION[1] || c != 0 || d != 0 {
        return None;
    }
    let [e, f, g, h] = asked[5].to_ne_bytes();
    *key = FlowKey {
        source: packet.source,
        destination: Address::from_words([asked[1], asked[2], asked[3], asked[4]]),
        source_port: Port([g, h]),
        destination_port: Port([e, f]),
        protocol: packet.protocol,
        pad: [0; 3],
    };
    Some(())
}

/// By which node a packet came out of the overlay: the end of the hardware address that it wrote. Never zero.
#[inline(always)]
#[must_use]
pub const fn by_node([_, _, _, a, b, c]: [u8; 6]) -> [u8; 3] {
    // A flow without a node has zeros.
    if a as u32 + b as u32 + c as u32 == 0 { [0xff; 3] } else { [a, b, c] }
}

#[cfg(test)]
mod tests;
