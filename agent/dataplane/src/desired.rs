//! What the maps should say about one Service. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use weft_ebpf_abi::{
    Address, BackendKey, Port, SCOPE_EXTERNAL, SCOPE_INTERNAL, SERVICE_CHECK_SOURCE, SERVICE_DROP_EMPTY,
    SERVICE_HASHED, SERVICE_KEEP_SOURCE, SERVICE_WATCHED, ServiceKey, TCP,
};

use crate::tables::{Endpoint, EndpointState, Family, Hints, Range, Service, ServicePort, Slice, View};

/// A list of backends within its Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListName {
    /// The Service's port.
    pub port: u16,
    /// Its protocol.
    pub protocol: u8,
    /// Family of its backends.
    pub family: Family,
    /// Endpoints of this node only.
    pub local: bool,
    /// It stands in the maps as a Maglev table.
    pub hashed: bool,
}

/// By what right a Service has an address and port. What comes first wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// The API server allots it: cluster address, NodePort.
    Allotted,
    /// A load balancer was given it.
    Balancer,
    /// The Service's author wrote it: anybody could.
    External,
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
    /// By what right.
    pub claim: Claim,
}

/// A backend as one Service knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Hash of the endpoint's uid.
    pub owner: u64,
    /// It is in a list.
    pub active: bool,
}

/// What the node says about a Service to a load balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// At this port.
    pub port: u16,
    /// Ready endpoints on this node.
    pub local_endpoints: usize,
}

/// What the maps should say about a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Addresses and ports.
    pub frontends: BTreeMap<ServiceKey, Frontend>,
    /// Lists that they lead to.
    pub lists: BTreeMap<ListName, BTreeSet<BackendKey>>,
    /// The only clients of lists that not all may use.
    pub sources: BTreeMap<ListName, BTreeSet<Range>>,
    /// Every endpoint, in a list or not.
    pub backends: BTreeMap<BackendKey, Known>,
    /// Shares of new connections, of backends that have another weight than 1.
    pub weights: BTreeMap<BackendKey, u8>,
    /// Seconds of the epoch when the Service was made.
    pub created: i64,
    /// What to tell load balancers.
    pub health: Option<Health>,
    /// Load-balancer addresses that this node is fit to answer for on its link.
    pub answers: BTreeSet<IpAddr>,
    /// Policy internal: it has endpoints, and none on this node.
    pub no_local_internal: bool,
    /// Policy external: likewise.
    pub no_local_external: bool,
    /// Endpoints that would take traffic if their node answered.
    pub left_out: usize,
    /// Backends whose connections are watched, with the hash of their endpoint's uid.
    pub watched: BTreeMap<BackendKey, u64>,
    /// Those of them that are left out of a list because connections failed.
    pub ejected: BTreeSet<BackendKey>,
}

/// Derives it from the Service and its slices, for a node that sees this.
#[must_use]
pub fn desired(service: &Service, slices: &[&Slice], view: View<'_>) -> Desired {
    let mut out = Desired {
        created: service.created,
        health: health(service, slices),
        answers: answers(service, slices),
        ..Desired::default()
    };
    for address in &service.cluster {
        let refuse = Frontend { list: None, affinity_seconds: 0, flags: 0, claim: Claim::Allotted };
        out.frontends.insert(key(*address, 0, 0, SCOPE_INTERNAL), refuse);
    }
    for port in &*service.ports {
        add_port(&mut out, service, slices, Target { port, hashed: true, view, at: named });
    }
    for range in service.ranges() {
        for number in range.first..=range.last {
            let same = |port: &ServicePort| port.port == number && port.protocol == range.protocol;
            if !service.ports.iter().any(same) {
                let port =
                    ServicePort { name: "".into(), port: number, node_port: 0, protocol: range.protocol };
                add_port(
                    &mut out,
                    service,
                    slices,
                    Target { port: &port, hashed: false, view, at: same_number },
                );
            }
        }
    }
    out.left_out = left_out(slices, view);
    if service.ejection {
        let tcp = out.backends.iter().filter(|(key, _)| key.protocol == TCP);
        out.watched = tcp.map(|(key, known)| (*key, known.owner)).collect();
    }
    for backend in out.lists.values().flatten() {
        if let Some(known) = out.backends.get_mut(backend) {
            known.active = true;
        }
    }
    out
}

/// A port, and how its endpoints are found.
#[derive(Clone, Copy)]
struct Target<'a> {
    port: &'a ServicePort,
    /// From outside by a Maglev table. Ranges do without: a thousand tables would be too many.
    hashed: bool,
    view: View<'a>,
    /// Ports at which a slice's endpoints serve it.
    at: fn(&Slice, &ServicePort) -> Vec<u16>,
}

/// Ports of a slice with this name: a named target port may be another one in each.
fn named(slice: &Slice, port: &ServicePort) -> Vec<u16> {
    let targets =
        slice.ports.iter().filter(|(name, protocol, _)| *name == port.name && *protocol == port.protocol);
    targets.map(|(_, _, number)| *number).collect()
}

fn same_number(_: &Slice, port: &ServicePort) -> Vec<u16> {
    vec![port.port]
}

fn add_port(out: &mut Desired, service: &Service, slices: &[&Slice], target: Target<'_>) {
    for family in [Family::V4, Family::V6] {
        if service.cluster.iter().any(|address| Family::of(address) == family) {
            let candidates = Candidates::of(&target, family, slices);
            let uses_local = service.internal_local || service.external_local;
            let mut local = if uses_local { candidates.local() } else { BTreeSet::new() };
            let mut cluster = candidates.cluster(target.view.zone);
            if service.ejection {
                for list in [&mut local, &mut cluster] {
                    out.ejected.append(&mut eject(list, target.view.ejected));
                }
            }
            add_backends(out, &candidates, target.hashed);
            let Target { port, hashed, .. } = target;
            Builder { out, service, port, hashed, family, cluster, local }.add_frontends();
        }
    }
}

/// Takes those that are ejected from a list, but never more than half of it: what fails everywhere is not the backends' fault, and
/// the others must bear the load. Returns what it took.
fn eject(list: &mut BTreeSet<BackendKey>, ejected: &BTreeSet<BackendKey>) -> BTreeSet<BackendKey> {
    let most = list.len() / 2;
    let taken: BTreeSet<_> = list.intersection(ejected).take(most).copied().collect();
    list.retain(|backend| !taken.contains(backend));
    taken
}

fn key(address: Address, port: u16, protocol: u8, scope: u8) -> ServiceKey {
    ServiceKey { address, port: Port::new(port), protocol, scope }
}

/// Under policy Local only a node with a ready endpoint takes traffic; otherwise any does, also to refuse it when there are no
/// endpoints at all.
fn answers(service: &Service, slices: &[&Slice]) -> BTreeSet<IpAddr> {
    let mut endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
    let fit = !service.external_local || endpoints.any(|e| e.local && e.state == EndpointState::Ready);
    let ours = service.rare.iter().filter(|rare| fit && rare.balancer_is_ours);
    ours.flat_map(|rare| &rare.balancer).map(|address| IpAddr::from(*address)).collect()
}

/// A pod of both families counts once: the family that has more is taken.
fn health(service: &Service, slices: &[&Slice]) -> Option<Health> {
    let endpoints = || slices.iter().flat_map(|slice| &slice.endpoints);
    let ready = || endpoints().filter(|e| e.local && e.state == EndpointState::Ready);
    let of =
        |family| -> BTreeSet<_> { ready().map(|e| e.address).filter(|a| Family::of(a) == family).collect() };
    (service.health_port != 0).then(|| Health {
        port: service.health_port,
        local_endpoints: of(Family::V4).len().max(of(Family::V6).len()),
    })
}

/// Each address counts once, however many ports it serves.
fn left_out(slices: &[&Slice], view: View<'_>) -> usize {
    if view.silent.is_empty() {
        return 0;
    }
    let endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
    let left_out = endpoints.filter(|e| e.state != EndpointState::Unready && view.silent.contains(&e.node));
    left_out.map(|e| e.address).collect::<BTreeSet<_>>().len()
}

/// Ranges do without weights as they do without Maglev tables.
fn add_backends(out: &mut Desired, candidates: &Candidates<'_>, weighted: bool) {
    for (backend, endpoint) in &candidates.0 {
        let known = out.backends.entry(*backend).or_insert(Known { owner: endpoint.owner, active: false });
        // While an address passes from one pod to another both may be listed: the usable one owns it.
        if endpoint.state == EndpointState::Ready {
            known.owner = endpoint.owner;
        }
        if weighted && endpoint.weight != 1 {
            out.weights.insert(*backend, endpoint.weight);
        }
    }
}

/// Endpoints of one port and family. Which of them get traffic is upstream's choice (kube-proxy's `CategorizeEndpoints`),
/// made among those whose nodes answer. The others keep the flows that they have: their node may only be cut off.
struct Candidates<'a>(Vec<(BackendKey, &'a Endpoint)>, View<'a>);

impl<'a> Candidates<'a> {
    fn of(target: &Target<'a>, family: Family, slices: &[&'a Slice]) -> Self {
        let mut found = Vec::new();
        let protocol = target.port.protocol;
        for slice in slices {
            for port in (target.at)(slice, target.port).into_iter().map(Port::new) {
                let of_family = slice.endpoints.iter().filter(|e| Family::of(&e.address) == family);
                found.extend(
                    of_family.map(|e| (BackendKey { address: e.address, port, protocol, pad: 0 }, e)),
                );
            }
        }
        Self(found, target.view)
    }

    fn state(&self, state: EndpointState) -> impl Iterator<Item = &(BackendKey, &'a Endpoint)> {
        let silent = self.1.silent;
        self.0.iter().filter(move |(_, endpoint)| endpoint.state == state && !silent.contains(&endpoint.node))
    }

    /// For traffic that may go to any node: the ready endpoints that are meant for this node or its zone; if none is ready
    /// anywhere, those that terminate and still serve (KEP-1669).
    fn cluster(&self, zone: Option<&str>) -> BTreeSet<BackendKey> {
        let prefer = self.preference(zone);
        let mut ready = self.state(EndpointState::Ready).peekable();
        if ready.peek().is_none() {
            return self.state(EndpointState::Terminating).map(|(b, _)| *b).collect();
        }
        ready.filter(|(_, e)| prefer.is_none_or(|p| p.takes(e.hints.as_deref()))).map(|(b, _)| *b).collect()
    }

    /// For traffic that stays on this node: its ready endpoints, or else those that terminate and still serve.
    fn local(&self) -> BTreeSet<BackendKey> {
        let of = |state| self.state(state).filter(|(_, e)| e.local).map(|(b, _)| *b);
        let ready: BTreeSet<_> = of(EndpointState::Ready).collect();
        if ready.is_empty() { of(EndpointState::Terminating).collect() } else { ready }
    }

    /// Hints count only if every ready endpoint has them and one is meant for here: else some would get no traffic at
    /// all, or this node none.
    fn preference<'z>(&self, zone: Option<&'z str>) -> Option<Preference<'z>> {
        let hints = || self.state(EndpointState::Ready).map(|(_, e)| e.hints.as_deref());
        let for_zone = zone.map(Preference::Zone);
        let mut modes = [Some(Preference::Node), for_zone].into_iter().flatten();
        modes.find(|mode| hints().all(|h| mode.is_said(h)) && hints().any(|h| mode.takes(h)))
    }
}

/// Endpoints that are preferred, by their hints.
#[derive(Clone, Copy)]
enum Preference<'z> {
    Node,
    Zone(&'z str),
}

impl Preference<'_> {
    /// Whether the hints speak of this at all.
    fn is_said(self, hints: Option<&Hints>) -> bool {
        hints.is_some_and(|hints| match self {
            Self::Node => hints.nodes,
            Self::Zone(_) => !hints.zones.is_empty(),
        })
    }

    fn takes(self, hints: Option<&Hints>) -> bool {
        hints.is_some_and(|hints| match self {
            Self::Node => hints.this_node,
            Self::Zone(zone) => hints.zones.iter().any(|z| **z == *zone),
        })
    }
}

/// Adds the frontends of one port and family.
struct Builder<'a> {
    out: &'a mut Desired,
    service: &'a Service,
    port: &'a ServicePort,
    hashed: bool,
    family: Family,
    cluster: BTreeSet<BackendKey>,
    local: BTreeSet<BackendKey>,
}

/// Where a frontend's traffic comes from and may go.
#[derive(Clone, Copy)]
struct Way {
    scope: u8,
    local: bool,
    flags: u32,
    claim: Claim,
}

impl Builder<'_> {
    fn add_frontends(&mut self) {
        let service = self.service;
        let of_family = |address: &&Address| Family::of(address) == self.family;
        let addresses = |of: &[Address]| of.iter().filter(of_family).copied().collect::<Vec<_>>();
        let (cluster, balancer, external) =
            (addresses(&service.cluster), addresses(service.balancer()), addresses(service.external()));
        let inside =
            Way { scope: SCOPE_INTERNAL, local: service.internal_local, flags: 0, claim: Claim::Allotted };
        for address in cluster {
            self.add(address, self.port.port, inside);
        }
        // The balancer's come before what the author wrote: who is kept out there does not get in by the other.
        let check = if service.sources().is_some() { SERVICE_CHECK_SOURCE } else { 0 };
        for address in balancer {
            self.add_external(address, self.port.port, Claim::Balancer, check);
        }
        for address in external {
            self.add_external(address, self.port.port, Claim::External, 0);
        }
        if self.port.node_port != 0 {
            self.add_external(self.family.any(), self.port.node_port, Claim::Allotted, 0);
        }
    }

    /// Traffic that starts in the cluster takes any endpoint of an external address, whatever externalTrafficPolicy says:
    /// it has not passed a load balancer that knows the nodes.
    fn add_external(&mut self, address: Address, number: u16, claim: Claim, flags: u32) {
        let local = self.service.external_local;
        let keep = if local { SERVICE_KEEP_SOURCE } else { 0 };
        self.add(address, number, Way { scope: SCOPE_INTERNAL, local: false, flags, claim });
        let hashed = if self.hashed && self.service.hashed { SERVICE_HASHED } else { 0 };
        let flags = flags | keep | hashed;
        self.add(address, number, Way { scope: SCOPE_EXTERNAL, local, flags, claim });
    }

    fn add(&mut self, address: Address, number: u16, way: Way) {
        let ServicePort { port, protocol, .. } = *self.port;
        let backends = if way.local { &self.local } else { &self.cluster };
        let mut flags = way.flags;
        if self.service.ejection && protocol == TCP {
            flags |= SERVICE_WATCHED;
        }
        // Others on the way may still find an endpoint, so the client is not told that there is none.
        if way.local && backends.is_empty() && !self.cluster.is_empty() {
            flags |= SERVICE_DROP_EMPTY;
            self.out.no_local_internal |= way.scope == SCOPE_INTERNAL;
            self.out.no_local_external |= way.scope == SCOPE_EXTERNAL;
        }
        let hashed = flags & SERVICE_HASHED != 0;
        let list = ListName { port, protocol, family: self.family, local: way.local, hashed };
        let frontend = Frontend {
            list: Some(list),
            affinity_seconds: self.service.affinity_seconds,
            flags,
            claim: way.claim,
        };
        let key = key(address, number, protocol, way.scope);
        if let std::collections::btree_map::Entry::Vacant(free) = self.out.frontends.entry(key) {
            free.insert(frontend);
            self.out.lists.entry(list).or_insert_with(|| backends.clone());
            if let Some(sources) = self.service.sources().filter(|_| flags & SERVICE_CHECK_SOURCE != 0) {
                let of_family = |range: &&Range| Family::of(&range.first) == self.family;
                self.out.sources.insert(list, sources.iter().filter(of_family).copied().collect());
            }
        }
    }
}
