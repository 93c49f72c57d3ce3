//! Which Service an address is, and which backend serves it.

use weft_ebpf_abi::{
    Address, AffinityKey, AffinityValue, BACKEND_ACTIVE, BackendKey, Port, SCOPE_INTERNAL,
    SERVICE_CHECK_SOURCE, SERVICE_HASHED, ServiceKey, ServiceValue, SlotKey, UDP,
};

use crate::{Tables, hash};

/// How long an unconnected UDP socket stays with a backend it does not hear about being gone: as long as
/// netfilter keeps an answered UDP flow (`nf_conntrack_udp_timeout_stream`).
pub const UDP_STICKY_SECONDS: u32 = 120;

/// A destination as a client gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Address.
    pub address: Address,
    /// Port.
    pub port: Port,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: u8,
    /// `SCOPE_…`.
    pub scope: u8,
    /// Whether 127.0.0.0/8 means this node: only for sockets in the node's own namespace.
    pub loopback_is_node: bool,
}

/// What a destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No Service: leave it alone.
    Nothing,
    /// A Service.
    Service(ServiceValue),
    /// A Service's address, but not a port of it.
    UnknownPort,
}

/// Looks a destination up: as it is, as a NodePort, as a Service's address.
#[inline(always)]
pub fn find<T: Tables>(tables: &T, to: &Destination) -> Found {
    let mut key = ServiceKey { address: to.address, port: to.port, protocol: to.protocol, scope: to.scope };
    if let Some(value) = tables.service(&key) {
        return Found::Service(value);
    }
    if (to.loopback_is_node && to.address.is_v4_loopback()) || tables.is_node_address(&to.address) {
        key.address = to.address.any_of_family();
        return match tables.service(&key) {
            Some(value) => Found::Service(value),
            None => Found::Nothing,
        };
    }
    key = ServiceKey { address: to.address, port: Port::new(0), protocol: 0, scope: SCOPE_INTERNAL };
    if to.scope == SCOPE_INTERNAL && tables.service(&key).is_some() {
        return Found::UnknownPort;
    }
    Found::Nothing
}

/// Whether a client may use the Service (loadBalancerSourceRanges).
#[inline(always)]
pub fn allows<T: Tables>(tables: &T, service: &ServiceValue, source: &Address) -> bool {
    service.flags & SERVICE_CHECK_SOURCE == 0 || tables.source_allowed(service.list, source)
}

/// Who asks, for affinity and hashed choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// The client itself: its address, or the namespace of its socket.
    pub client: Address,
    /// The port of its packets; a socket that connects has none yet.
    pub port: Option<Port>,
    /// Its unconnected UDP socket, whose datagrams should stay together.
    pub datagram_socket: Option<Address>,
}

/// Picks a backend; `None` if the Service has none.
#[inline(always)]
pub fn select<T: Tables>(tables: &T, service: &ServiceValue, client: &Client) -> Option<BackendKey> {
    if service.count == 0 {
        return None;
    }
    let (who, seconds) = match client.datagram_socket {
        _ if service.affinity_seconds > 0 => (client.client, service.affinity_seconds),
        Some(socket) => (socket, UDP_STICKY_SECONDS),
        None => return pick(tables, service, client),
    };
    let key = AffinityKey { client: who, list: service.list };
    let now = tables.now_seconds();
    if let Some(last) = tables.affinity(&key)
        && now.wrapping_sub(last.last_used) < seconds
        && takes_new_flows(tables, &last.backend)
    {
        if now != last.last_used {
            tables.remember(&key, &AffinityValue { backend: last.backend, last_used: now });
        }
        return Some(last.backend);
    }
    let backend = pick(tables, service, client)?;
    tables.remember(&key, &AffinityValue { backend, last_used: now });
    Some(backend)
}

/// A random backend, or the one that the client's hash leads to. The list may shrink between the lookups: the agent
/// lowers the count before it empties a slot, so a reader that was overtaken tries slot 0 before it gives up.
#[inline(always)]
fn pick<T: Tables>(tables: &T, service: &ServiceValue, client: &Client) -> Option<BackendKey> {
    let number = match client.port {
        // Affinity remembers its choice; once that is forgotten, the next one is open, as kube-proxy's is.
        Some(port) if service.flags & SERVICE_HASHED != 0 => hash::client(&client.client, port),
        Some(_) | None => tables.random(),
    };
    let index = scale(number, service.count);
    match tables.slot(&SlotKey { list: service.list, index }) {
        Some(backend) => Some(backend),
        None => tables.slot(&SlotKey { list: service.list, index: 0 }),
    }
}

/// Maps a random number evenly onto 0 to `count - 1` (a multiplication; the remainder would cost a division).
#[inline(always)]
#[must_use]
pub const fn scale(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

/// Whether a backend is there and does not drain.
#[inline(always)]
pub fn takes_new_flows<T: Tables>(tables: &T, backend: &BackendKey) -> bool {
    matches!(tables.backend(backend), Some(value) if value.flags & BACKEND_ACTIVE != 0)
}

/// Whether a flow that began with `generation` may go on. UDP has no connection to finish: it leaves a
/// backend that takes no new flows.
#[inline(always)]
pub fn flow_is_current<T: Tables>(tables: &T, backend: &BackendKey, generation: u32) -> bool {
    match tables.backend(backend) {
        Some(value) if value.generation == generation => {
            backend.protocol != UDP || value.flags & BACKEND_ACTIVE != 0
        }
        Some(_) | None => false,
    }
}
