//! Tuples of translated flows: what a packet becomes, and how its answer is recognised.

use weft_ebpf_abi::{
    Address, BackendKey, FLOW_REPLY, FlowKey, FlowValue, NAT_PORT_COUNT, NAT_PORT_FIRST, Port,
    SERVICE_KEEP_SOURCE, UDP,
};

use crate::service::{UDP_STICKY_SECONDS, scale};

/// When answers were last seen that never were.
pub const NEVER: u32 = 0;

/// How many source ports are tried before a flow is refused. At three quarters of the range taken, one flow in 100 is refused.
pub const NAT_PORT_TRIES: u32 = 16;

/// Where a new flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Source address to use.
    pub source: Address,
    /// Whether the client keeps its own instead. (No `Option`: LLVM spills what an absent value leaves undefined, which the
    /// verifier of Linux 6.18 refuses: "R3 !read_ok".)
    pub keeps_source: bool,
    /// Device towards the backend; 0 if the backend is this node.
    pub ifindex: u32,
}

/// The `try_number`-th candidate for a source port, from a random start.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the remainder of NAT_PORT_COUNT, a u16")]
pub const fn nat_port(random: u32, try_number: u32) -> Port {
    let start = scale(random, NAT_PORT_COUNT as u32);
    // 1367 shares no factor with the size of the range: every try is another port.
    let offset = (start + try_number * 1_367) % NAT_PORT_COUNT as u32;
    Port::new(NAT_PORT_FIRST + offset as u16)
}

/// The pods' bridge, and the device to other nodes' pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodDevices {
    /// The bridge.
    pub bridge: u32,
    /// The overlay; 0 for none.
    pub overlay: u32,
}

impl PodDevices {
    /// Whether a device leads to pods only.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, ifindex: u32) -> bool {
        ifindex != 0 && (ifindex == self.bridge || ifindex == self.overlay)
    }

    /// Whether a client keeps its address: the Service wants it, or packets go from pods here to pods there, whose answers
    /// come back through this node by themselves. Between two pods of the bridge they would not: they go straight
    /// from port to port.
    #[inline(always)]
    #[must_use]
    pub const fn keep_source(&self, came_by: u32, leaves_by: u32, flags: u32) -> bool {
        flags & SERVICE_KEEP_SOURCE != 0 || (came_by != leaves_by && self.has(came_by) && self.has(leaves_by))
    }
}

/// Whether a client whose packets are translated at its own edge keeps its address towards a pod of the same bridge: if that pod's
/// edge has programs too, which translate the answers back. Not towards itself: nobody takes packets from his own address.
#[inline(always)]
#[must_use]
pub fn keep_source_at_edge(client: &Address, backend: &Address, backend_has_edge: bool) -> bool {
    backend_has_edge && client != backend
}

/// Whether answers that become this go to the sender of `key`, from what it asked.
#[inline(always)]
#[must_use]
pub fn answers(reply: &FlowValue, key: &FlowKey) -> bool {
    reply.destination == key.source
        && reply.destination_port == key.source_port
        && reply.source == key.destination
        && reply.source_port == key.destination_port
}

/// What a client's packets become.
#[inline(always)]
#[must_use]
pub const fn forward(
    backend: &BackendKey,
    source: (Address, Port),
    ifindex: u32,
    generation: u32,
) -> FlowValue {
    FlowValue {
        source: source.0,
        destination: backend.address,
        source_port: source.1,
        destination_port: backend.port,
        ifindex,
        generation,
        flags: 0,
        last_seen: 0,
    }
}

/// The key of the backend's answers to a forward entry.
#[inline(always)]
#[must_use]
pub const fn reply_key(forward: &FlowValue, protocol: u8) -> FlowKey {
    FlowKey {
        source: forward.destination,
        destination: forward.source,
        source_port: forward.destination_port,
        destination_port: forward.source_port,
        protocol,
        pad: [0; 3],
    }
}

/// What the backend's answers become: from the Service, to the client, out of the device the client came in by.
#[inline(always)]
#[must_use]
pub const fn reply(packet: &FlowKey, ifindex: u32, generation: u32) -> FlowValue {
    FlowValue {
        source: packet.destination,
        destination: packet.source,
        source_port: packet.destination_port,
        destination_port: packet.source_port,
        ifindex,
        generation,
        flags: FLOW_REPLY,
        last_seen: NEVER,
    }
}

/// The key of the client's packets, from the entry of the answers.
#[inline(always)]
#[must_use]
pub const fn forward_key(reply: &FlowValue, protocol: u8) -> FlowKey {
    reply_key(reply, protocol)
}

/// The key of the packets that go against `key`.
#[inline(always)]
#[must_use]
pub const fn reversed(key: &FlowKey) -> FlowKey {
    FlowKey {
        source: key.destination,
        destination: key.source,
        source_port: key.destination_port,
        destination_port: key.source_port,
        protocol: key.protocol,
        pad: [0; 3],
    }
}

/// The backend of a forward entry.
#[inline(always)]
#[must_use]
pub const fn backend(forward: &FlowValue, protocol: u8) -> BackendKey {
    BackendKey::new(&forward.destination, forward.destination_port, protocol)
}

/// Whether a UDP flow was silent for so long that its next packet begins a new one.
#[inline(always)]
#[must_use]
pub const fn is_idle(flow: &FlowValue, protocol: u8, now: u32) -> bool {
    protocol == UDP && now.wrapping_sub(flow.last_seen) >= UDP_STICKY_SECONDS
}
