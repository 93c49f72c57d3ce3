//! What the planner needs of an object of the API.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use k8s_openapi::jiff::Timestamp;
use weft_ebpf_abi::{Address, SCTP, TCP, UDP};

use super::wire::{self, Text};
use super::{
    Endpoint, EndpointState, Family, Hints, NodeId, PortRange, Range, Rare, Service, ServicePort, Slice,
};
use crate::announce::CLASS;

/// The weight of endpoints whose slice names none.
const DEFAULT_WEIGHT: u8 = 1;
const MOST_WEIGHT: u8 = 100;
/// Ports in a Service's ranges: each takes as many entries of the maps as a port that is written out.
const MAX_RANGE_PORTS: usize = 1_024;
/// Affinity when the Service gives no timeout (the API's default: 3 hours).
const AFFINITY_DEFAULT_SECONDS: u32 = 10_800;
/// Bits before an IPv4 address in its 128-bit form.
const V4_MAPPED_BITS: u32 = 96;

fn address(text: &str) -> Option<Address> {
    text.parse::<IpAddr>().ok().map(Address::from)
}

fn protocol(name: Option<&str>) -> Option<u8> {
    match name {
        None | Some("TCP") => Some(TCP),
        Some("UDP") => Some(UDP),
        Some("SCTP") => Some(SCTP),
        Some(_) => None,
    }
}

fn ordered<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort_unstable();
    items.dedup();
    items
}

/// `None` for what no proxy serves: headless, ExternalName, another proxy's.
pub(super) fn service(object: &wire::Service<'_>, node_local: &[Address]) -> Option<Service> {
    let spec = object.spec.as_ref()?;
    let labels = object.metadata.labels.as_ref();
    if spec.kind.as_deref() == Some("ExternalName")
        || labels.is_some_and(|labels| labels.other_proxy.is_some() || labels.headless.is_some())
    {
        return None;
    }
    let listed = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    let mut cluster = ordered(listed.filter_map(|text| address(text)).collect());
    cluster.retain(|address| !node_local.contains(address));
    if cluster.is_empty() {
        return None;
    }
    let served = |address: &Address| cluster.iter().any(|c| Family::of(c) == Family::of(address));
    let external = spec.external_ips.iter().flatten().filter_map(|text| address(text));
    let external = ordered(external.filter(served).collect());
    let balancer = ordered(balancer_addresses(object).filter(served).collect());
    let external_local = spec.external_traffic_policy.as_deref() == Some("Local");
    let checked = external_local && spec.kind.as_deref() == Some("LoadBalancer");
    let is_ours = spec.load_balancer_class.as_deref().is_none_or(|class| class == CLASS);
    let rare = Rare {
        sources: sources(spec),
        ranges: port_ranges(object),
        balancer_is_ours: is_ours && !balancer.is_empty(),
        balancer: balancer.into(),
        external: external.into(),
    };
    Some(Service {
        rare: (rare != Rare::default()).then(|| Box::new(rare)),
        ejection: ejection(object),
        hashed: hashed(object),
        ports: spec.ports.iter().flatten().filter_map(port).collect(),
        affinity_seconds: affinity_seconds(spec),
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local,
        health_port: spec.health_check_node_port.filter(|_| checked).map_or(0, number),
        created: object.metadata.creation_timestamp.as_deref().map_or(0, seconds),
        cluster: cluster.into(),
    })
}

/// Seconds of the epoch; what is no time was before all times.
fn seconds(time: &str) -> i64 {
    time.parse::<Timestamp>().map_or(0, Timestamp::as_second)
}

/// The load balancer's addresses, unless it proxies itself (KEP-1860).
fn balancer_addresses(object: &wire::Service<'_>) -> impl Iterator<Item = Address> {
    let balancer = object.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    let ingress = balancer.into_iter().flat_map(|b| b.ingress.iter().flatten());
    let served = ingress.filter(|i| i.ip_mode.as_deref() != Some("Proxy"));
    served.filter_map(|i| address(i.ip.as_deref()?))
}

/// Ranges of clients. One that can't be read allows nobody: the API refuses it, so this is not from there.
/// Ranges of one family only keep out all clients of the other.
fn sources(spec: &wire::ServiceSpec<'_>) -> Option<Box<[Range]>> {
    let texts = spec.load_balancer_source_ranges.as_ref().filter(|r| !r.is_empty())?;
    Some(ordered(texts.iter().filter_map(|t| t.trim().parse().ok().map(range)).collect()).into())
}

fn range(network: IpNetwork) -> Range {
    let mapped = if network.is_ipv4() { V4_MAPPED_BITS } else { 0 };
    Range { first: Address::from(network.network()), prefix_bits: mapped + u32::from(network.prefix()) }
}

/// Ranges that can't be read are left out, and those that would be too many: the Service's other ports must go on.
fn port_ranges(object: &wire::Service<'_>) -> Box<[PortRange]> {
    let Some(text) = annotation(&object.metadata, |a| &a.port_ranges) else { return Box::default() };
    let mut count = 0;
    let mut ranges = Vec::new();
    for text in text.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        let range = port_range(text);
        count += range.map_or(0, |range| usize::from(range.last - range.first) + 1);
        match range {
            Some(range) if count <= MAX_RANGE_PORTS => ranges.push(range),
            Some(_) | None => {
                complain(&object.metadata, text, "not a range of ports, or more than 1024 ports in all");
            }
        }
    }
    ordered(ranges).into()
}

/// Sockets choose at random in any case: they have no port yet.
fn hashed(object: &wire::Service<'_>) -> bool {
    match annotation(&object.metadata, |a| &a.backend_choice) {
        Some("random") => false,
        None | Some("maglev") => true,
        Some(other) => {
            complain(
                &object.metadata,
                other,
                "annotation weft.dev/backend-choice is neither maglev nor random",
            );
            true
        }
    }
}

/// Off unless it is wanted: readiness alone decides then, as upstream has it.
fn ejection(object: &wire::Service<'_>) -> bool {
    match annotation(&object.metadata, |a| &a.ejection) {
        Some("true") => true,
        None | Some("false") => false,
        Some(other) => {
            complain(&object.metadata, other, "annotation weft.dev/ejection is neither true nor false");
            false
        }
    }
}

fn annotation<'o>(
    of: &'o wire::Metadata<'_>,
    which: impl FnOnce(&'o wire::Annotations<'_>) -> &'o Option<Text<'o>>,
) -> Option<&'o str> {
    which(of.annotations.as_ref()?).as_deref()
}

fn complain(of: &wire::Metadata<'_>, value: &str, what: &'static str) {
    let (namespace, name) = of.names().unwrap_or_default();
    tracing::warn!(namespace, name, value, what);
}

fn port_range(text: &str) -> Option<PortRange> {
    let (ports, kind) = text.split_once('/').map_or((text, None), |(ports, kind)| (ports, Some(kind)));
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let protocol = protocol(kind.map(str::trim))?;
    (0 < first && first <= last).then_some(PortRange { protocol, first, last })
}

fn affinity_seconds(spec: &wire::ServiceSpec<'_>) -> u32 {
    match spec.session_affinity.as_deref() {
        Some("ClientIP") => {
            let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
            let seconds = config.and_then(|c| c.timeout_seconds).and_then(|s| u32::try_from(s).ok());
            seconds.unwrap_or(AFFINITY_DEFAULT_SECONDS)
        }
        Some(_) | None => 0,
    }
}

/// A port, or 0 for what is none.
fn number(port: i32) -> u16 {
    u16::try_from(port).unwrap_or(0)
}

fn port(port: &wire::Port<'_>) -> Option<ServicePort> {
    Some(ServicePort {
        name: port.name.as_deref().unwrap_or_default().into(),
        port: u16::try_from(port.port.unwrap_or(0)).ok()?,
        node_port: port.node_port.map_or(0, number),
        protocol: protocol(port.protocol.as_deref())?,
    })
}

/// `number` gives the number of a node's name.
pub(super) fn slice(
    object: &wire::Slice<'_>,
    family: Family,
    node_name: &str,
    mut number: impl FnMut(&str) -> NodeId,
) -> Slice {
    let ports = object.ports.iter().flatten().filter_map(|p| {
        let number = u16::try_from(p.port?).ok()?;
        Some((p.name.as_deref().unwrap_or_default().into(), protocol(p.protocol.as_deref())?, number))
    });
    let weight = weight(object);
    let endpoints = object.endpoints.iter().flatten().filter_map(|e| {
        let uid = e.target_ref.as_ref().and_then(|t| t.uid.as_deref()).unwrap_or("");
        let first = e.addresses.as_ref()?.0.as_deref()?;
        Some(Endpoint {
            address: address(first).filter(|a| Family::of(a) == family)?,
            owner: fnv1a(uid.as_bytes()),
            node: e.node_name.as_deref().map_or(NodeId::default(), &mut number),
            local: e.node_name.as_deref() == Some(node_name),
            state: endpoint_state(e.conditions.as_ref()),
            weight,
            hints: e.hints.as_ref().and_then(|hints| trim_hints(hints, node_name)),
        })
    });
    Slice { ports: ports.collect(), endpoints: endpoints.collect() }
}

/// One that can't be read is that of all others: the endpoints must go on.
fn weight(object: &wire::Slice<'_>) -> u8 {
    let Some(text) = annotation(&object.metadata, |a| &a.weight) else { return DEFAULT_WEIGHT };
    match text.parse() {
        Ok(weight) if (1..=MOST_WEIGHT).contains(&weight) => weight,
        _ => {
            complain(&object.metadata, text, "annotation weft.dev/weight is no number from 1 to 100");
            DEFAULT_WEIGHT
        }
    }
}

/// What is missing means yes for ready and serving, no for terminating (discovery/v1 EndpointConditions).
fn endpoint_state(conditions: Option<&wire::Conditions>) -> EndpointState {
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let serving = conditions.and_then(|c| c.serving).unwrap_or(true);
    let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
    match (ready, serving, terminating) {
        (true, _, _) => EndpointState::Ready,
        (false, true, true) => EndpointState::Terminating,
        (false, _, _) => EndpointState::Unready,
    }
}

fn trim_hints(hints: &wire::Hints<'_>, node_name: &str) -> Option<Box<Hints>> {
    let zones: Vec<_> = hints.for_zones.iter().flatten().map(|zone| (*zone.name).into()).collect();
    let nodes = hints.for_nodes.as_deref().unwrap_or_default();
    let this_node = nodes.iter().any(|node| *node.name == *node_name);
    let any = !zones.is_empty() || !nodes.is_empty();
    any.then(|| Box::new(Hints { zones, nodes: !nodes.is_empty(), this_node }))
}

/// FNV-1a: fixed for ever, unlike the standard library's hasher, because it is stored in pinned maps.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
