//! What the maps should say about one Service. Pure.

use std::collections::{BTreeMap, BTreeSet};

use weft_ebpf_abi::{
    Address, BackendKey, Port, SCOPE_EXTERNAL, SCOPE_INTERNAL, SERVICE_KEEP_SOURCE, ServiceKey,
};

use crate::tables::{Endpoint, EndpointState, Service, ServicePort, Slice};

/// A list of backends within its Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListName {
    /// The Service's port.
    pub port: u16,
    /// Its protocol.
    pub protocol: u8,
    /// Endpoints of this node only.
    pub local: bool,
}

/// An address and port that leads to a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// The list; `None` marks the address as a Service's.
    pub list: Option<ListName>,
    /// Seconds of affinity.
    pub affinity_seconds: u32,
    /// `SERVICE_…`.
    pub flags: u32,
}

/// A backend as one Service knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Hash of the endpoint's uid.
    pub owner: u64,
    /// It is in a list.
    pub active: bool,
}

/// What the maps should say about a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Addresses and ports.
    pub frontends: BTreeMap<ServiceKey, Frontend>,
    /// Lists that they lead to.
    pub lists: BTreeMap<ListName, BTreeSet<BackendKey>>,
    /// Every endpoint, in a list or not.
    pub backends: BTreeMap<BackendKey, Known>,
}

/// Derives it from the Service and its slices.
#[must_use]
pub fn desired(service: &Service, slices: &[&Slice]) -> Desired {
    let mut out = Desired::default();
    for address in &service.cluster {
        let refuse = Frontend { list: None, affinity_seconds: 0, flags: 0 };
        out.frontends.insert(key(*address, 0, 0, SCOPE_INTERNAL), refuse);
    }
    for port in &service.ports {
        add_frontends(&mut out, service, port);
        add_backends(&mut out, port, slices);
    }
    out
}

fn key(address: Address, port: u16, protocol: u8, scope: u8) -> ServiceKey {
    ServiceKey { address, port: Port::new(port), protocol, scope }
}

/// Traffic that starts in the cluster takes any endpoint of an external address, whatever externalTrafficPolicy
/// says: it has not passed a load balancer that knows the nodes.
fn add_frontends(out: &mut Desired, service: &Service, port: &ServicePort) {
    let name = |local| ListName { port: port.port, protocol: port.protocol, local };
    let mut add = |address, number, scope, local, flags| {
        let list = name(local);
        out.lists.entry(list).or_default();
        let frontend = Frontend { list: Some(list), affinity_seconds: service.affinity_seconds, flags };
        out.frontends.insert(key(address, number, port.protocol, scope), frontend);
    };
    for address in &service.cluster {
        add(*address, port.port, SCOPE_INTERNAL, service.internal_local, 0);
    }
    let keep = if service.external_local { SERVICE_KEEP_SOURCE } else { 0 };
    let node_port = (port.node_port != 0).then_some((Address::ANY_V4, port.node_port));
    for (address, number) in service.external.iter().map(|a| (*a, port.port)).chain(node_port) {
        add(address, number, SCOPE_INTERNAL, false, 0);
        add(address, number, SCOPE_EXTERNAL, service.external_local, keep);
    }
}

fn add_backends(out: &mut Desired, port: &ServicePort, slices: &[&Slice]) {
    let endpoints = || {
        slices.iter().flat_map(|slice| {
            let targets = slice.ports.iter().filter(|(n, p, _)| *n == port.name && *p == port.protocol);
            targets.flat_map(|(_, protocol, number)| {
                slice.endpoints.iter().map(|e| {
                    let number = Port::new(*number);
                    (BackendKey { address: e.address, port: number, protocol: *protocol, pad: 0 }, e)
                })
            })
        })
    };
    for (backend, endpoint) in endpoints() {
        let known = out.backends.entry(backend).or_insert(Known { owner: endpoint.owner, active: false });
        // While an address passes from one pod to another both may be listed: the usable one owns it.
        if endpoint.state == EndpointState::Ready {
            known.owner = endpoint.owner;
        }
    }
    for local in [false, true] {
        let name = ListName { port: port.port, protocol: port.protocol, local };
        let Some(list) = out.lists.get_mut(&name) else { continue };
        let eligible = |e: &&Endpoint| !local || e.local;
        let of = |state| endpoints().filter(move |(_, e)| eligible(e) && e.state == state).map(|(b, _)| b);
        list.extend(of(EndpointState::Ready));
        if list.is_empty() {
            list.extend(of(EndpointState::Terminating));
        }
        for backend in list.iter() {
            if let Some(known) = out.backends.get_mut(backend) {
                known.active = true;
            }
        }
    }
}
