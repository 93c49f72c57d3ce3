//! What becomes of a connection on this node: the programs' own logic, run on the live maps.

pub mod policy;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use weft_ebpf_abi::{
    Address, DropReason, NODE_DIRECT, Port, SCOPE_EXTERNAL, SCOPE_INTERNAL, SERVICE_CHECK_SOURCE,
    SERVICE_DROP_EMPTY, ServiceKey, ServiceValue,
};
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::direct::{self, Nodes};
use weft_ebpf_logic::packet::Packet;
use weft_ebpf_logic::service::{Client, Destination, Found, allows, find, select};

use crate::observe::ObserveError;
use crate::observe::pinned::Pinned;
use crate::observe::wire::{BackendKeyed, Frontend, FrontendKey, Protocol, Scope};
use crate::observe::{frontend, members};

/// What a client's first packet has at most, as a rule.
const FIRST_PACKET_BYTES: u32 = 1_280;

/// By which hook the node sees the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Hook {
    /// A process in a pod of this node: `connect` and `sendmsg`.
    PodSocket,
    /// A process of the node itself.
    NodeSocket,
    /// A packet from outside, at the edge.
    Edge,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Query {
    /// How the client is seen.
    pub hook: Hook,
    /// The client's address.
    pub from: IpAddr,
    /// The client's pod, if it is one of this node.
    pub pod_uid: Option<String>,
    /// Where to.
    pub to: IpAddr,
    /// Which port.
    pub port: u16,
    /// Which protocol.
    pub protocol: Protocol,
}

/// What the programs decide.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Decision {
    /// It is no Service: the packet goes where it says.
    Direct,
    /// A backend is chosen: this one if the client has affinity, else any of the list.
    Backend {
        /// The one that the client stays with.
        kept: Option<BackendKeyed>,
    },
    /// The client is told that nobody serves this.
    Refused {
        /// Name of the [`DropReason`].
        reason: String,
    },
    /// The packet vanishes.
    Dropped {
        /// Name of the [`DropReason`].
        reason: String,
    },
}

/// What the programs find and decide.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trace {
    /// Whether the programs know their node: until then they do nothing.
    pub configured: bool,
    /// Whether the address is one of the node's own.
    pub node_address: bool,
    /// The Service's entry, with its backends.
    pub service: Option<Frontend>,
    /// Ports that the address does serve, if this one is not served.
    pub served: Vec<FrontendKey>,
    /// The decision.
    pub decision: Decision,
    /// Backends towards which the client keeps its address, since their node answers it directly.
    #[serde(default)]
    pub direct: Vec<BackendKeyed>,
}

/// Answers from the pinned maps. `netns` is the cookie of the client's network namespace, by which sockets have affinity.
pub(crate) fn ask(maps: &Pinned, query: &Query, netns: Option<u64>) -> Result<Trace, ObserveError> {
    let config = maps.node_config()?;
    let configured = config.is_some();
    let client = match query.hook {
        Hook::Edge => Address::from(query.from),
        Hook::PodSocket => Address::from_id(netns.unwrap_or(0)),
        Hook::NodeSocket => Address::from_id(config.map_or(0, |config| config.netns_cookie)),
    };
    let (decision, entry) = decide(maps, query, client);
    let mut service = None;
    if let Some((key, value)) = entry {
        service = frontend(&key, &value);
        if let Some(service) = &mut service {
            service.backends = members(maps, &value)?;
        }
    }
    let direct = match (&service, entry, config) {
        (Some(service), Some((_, value)), Some(config)) if config.flags & NODE_DIRECT != 0 => {
            let backends = service.backends.iter().map(|backend| backend.key);
            backends.filter(|backend| is_direct(maps, query, value.flags, *backend)).collect()
        }
        _ => Vec::new(),
    };
    let refused = matches!(decision, Decision::Refused { .. });
    let served = if refused && service.is_none() { served_at(maps, query)? } else { Vec::new() };
    let node_address = maps.is_node_address(&Address::from(query.to));
    maps.check()?;
    Ok(Trace { configured, node_address, service, served, decision, direct })
}

/// Whether the first packet of the client would be handed to a backend's node with what it asks for. It is taken to be a small one.
fn is_direct<N: Nodes>(nodes: &N, query: &Query, flags: u32, backend: BackendKeyed) -> bool {
    let mut packet = Packet::between(Address::from(query.from), Address::from(query.to));
    packet.key.protocol = query.protocol.number();
    packet.total_bytes = FIRST_PACKET_BYTES;
    query.hook == Hook::Edge && direct::suits(nodes, &packet, flags, &Address::from(backend.address))
}

fn destination(query: &Query) -> Destination {
    Destination {
        address: Address::from(query.to),
        port: Port::new(query.port),
        protocol: query.protocol.number(),
        scope: if query.hook == Hook::Edge { SCOPE_EXTERNAL } else { SCOPE_INTERNAL },
        loopback_is_node: query.hook == Hook::NodeSocket && query.protocol != Protocol::Sctp,
    }
}

/// The order of steps is the programs': `forward` of the socket hooks, `begin` of the edge.
fn decide<T: Tables>(
    tables: &T,
    query: &Query,
    client: Address,
) -> (Decision, Option<(ServiceKey, ServiceValue)>) {
    let to = destination(query);
    // No hook sees a socket of SCTP.
    let unhooked = query.hook == Hook::Edge || query.protocol == Protocol::Sctp;
    // What the node sends to itself by loopback passes no program either.
    if unhooked && query.hook == Hook::NodeSocket && tables.is_node_address(&to.address) {
        return (Decision::Direct, None);
    }
    let value = match find(tables, &to) {
        Found::Nothing => return (Decision::Direct, None),
        Found::UnknownPort => {
            let reason = if unhooked { DropReason::PacketUnknownPort } else { DropReason::SocketUnknownPort };
            return (refused(reason), None);
        }
        Found::Service(value) => value,
    };
    let entry = Some((key_of(tables, &to), value));
    // A Service that asks who its clients are leaves a pod's sockets to the edge, which sees the pod's address.
    let by_packet = unhooked || (query.hook == Hook::PodSocket && value.flags & SERVICE_CHECK_SOURCE != 0);
    // A node in a range may use the address as if it came from that address itself.
    let source = if by_packet { Address::from(query.from) } else { to.address };
    if !allows(tables, &value, &source) {
        return (dropped(DropReason::SourceNotAllowed), entry);
    }
    let client = if by_packet { source } else { client };
    let chosen = select(tables, &value, &Client { client, port: None, datagram_socket: None });
    let Some(chosen) = chosen.filter(|backend| tables.backend(backend).is_some()) else {
        return (without_backend(&value, by_packet), entry);
    };
    // With affinity the choice is the client's own as long as it is remembered; without, any other is as likely.
    let kept = (value.affinity_seconds > 0 && remembered(tables, &value, client)).then(|| BackendKeyed {
        address: chosen.address.into(),
        port: chosen.port.get(),
        protocol: query.protocol,
    });
    (Decision::Backend { kept }, entry)
}

fn refused(reason: DropReason) -> Decision {
    Decision::Refused { reason: reason.name().to_owned() }
}

fn dropped(reason: DropReason) -> Decision {
    Decision::Dropped { reason: reason.name().to_owned() }
}

fn without_backend(value: &ServiceValue, by_packet: bool) -> Decision {
    match (value.flags & SERVICE_DROP_EMPTY != 0, by_packet) {
        (true, true) => dropped(DropReason::NoLocalEndpoints),
        (true, false) => refused(DropReason::NoLocalEndpoints),
        (false, true) => refused(DropReason::PacketNoEndpoints),
        (false, false) => refused(DropReason::SocketNoEndpoints),
    }
}

fn remembered<T: Tables>(tables: &T, value: &ServiceValue, client: Address) -> bool {
    let key = weft_ebpf_abi::AffinityKey { client, list: value.list };
    let now = tables.now_seconds();
    tables.affinity(&key).is_some_and(|last| now.wrapping_sub(last.last_used) < value.affinity_seconds)
}

/// Under which key the logic has found the Service: the address as it is, or the NodePort.
fn key_of<T: Tables>(tables: &T, to: &Destination) -> ServiceKey {
    let key = ServiceKey { address: to.address, port: to.port, protocol: to.protocol, scope: to.scope };
    if tables.service(&key).is_some() {
        key
    } else {
        ServiceKey { address: to.address.any_of_family(), ..key }
    }
}

/// The ports of an address, of whatever protocol.
fn served_at(maps: &Pinned, query: &Query) -> Result<Vec<FrontendKey>, ObserveError> {
    let scope = if query.hook == Hook::Edge { Scope::Outside } else { Scope::Inside };
    let all = maps.services()?;
    let keys = all.iter().filter_map(|(key, _)| FrontendKey::try_from(*key).ok());
    let mut served: Vec<_> = keys.filter(|key| key.address == query.to && key.scope == scope).collect();
    served.sort();
    Ok(served)
}

#[cfg(test)]
mod tests;
