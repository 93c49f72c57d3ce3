//! The cluster's Services and endpoints as the planner needs them: trimmed from the API's objects, nothing kept twice.

mod owners;
mod shared;
mod trim;
pub mod wire;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use weft_ebpf_abi::{Address, BackendKey};

use self::owners::Owners;
use self::shared::Shared;
use crate::rows::{Place, Rows};

/// Label on a Node that names its zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Namespace and name of a Service; a clone shares the text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(Arc<str>);

impl ServiceName {
    /// From its parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        // Neither part can have a slash.
        Self(format!("{namespace}/{name}").into())
    }

    /// Namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.parts().0
    }

    /// Name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.parts().1
    }

    fn parts(&self) -> (&str, &str) {
        self.0.split_once('/').unwrap_or((&self.0, ""))
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub const fn of(address: &Address) -> Self {
        if address.as_v4().is_some() { Self::V4 } else { Self::V6 }
    }

    /// The unspecified address: any of the node's.
    #[must_use]
    pub const fn any(self) -> Address {
        match self {
            Self::V4 => Address::ANY_V4,
            Self::V6 => Address::ANY,
        }
    }
}

/// A range of addresses; what lies behind its prefix is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    /// Its first address.
    pub first: Address,
    /// Bits of the address that count, in its 128-bit form.
    pub prefix_bits: u32,
}

/// A Service with an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Cluster addresses. The Service has the families of these, whatever its other addresses are.
    pub cluster: Box<[Address]>,
    /// Ports.
    pub ports: Arc<[ServicePort]>,
    /// What few Services have.
    pub rare: Option<Box<Rare>>,
    /// Seconds of affinity by client; 0 for none.
    pub affinity_seconds: u32,
    /// From outside a client's hash chooses the backend (Maglev), as it does unless the annotation `weft.dev/backend-choice` says otherwise.
    pub hashed: bool,
    /// Endpoints whose connections fail are left out for a while (annotation `weft.dev/ejection`).
    pub ejection: bool,
    /// internalTrafficPolicy is Local.
    pub internal_local: bool,
    /// externalTrafficPolicy is Local.
    pub external_local: bool,
    /// Port at which the node says how many endpoints it has (healthCheckNodePort); 0 for none.
    pub health_port: u16,
    /// Seconds of the epoch when it was made: of two that claim an address, the older has it.
    pub created: i64,
}

impl Service {
    /// The load balancer's addresses, unless it proxies itself.
    #[must_use]
    pub fn balancer(&self) -> &[Address] {
        self.rare.as_ref().map_or(&[], |rare| &rare.balancer)
    }

    /// The only clients that may use those; `None` for all.
    #[must_use]
    pub fn sources(&self) -> Option<&[Range]> {
        self.rare.as_ref()?.sources.as_deref()
    }

    /// External addresses.
    #[must_use]
    pub fn external(&self) -> &[Address] {
        self.rare.as_ref().map_or(&[], |rare| &rare.external)
    }

    /// Ranges of ports that lead to the same ports of the endpoints.
    #[must_use]
    pub fn ranges(&self) -> &[PortRange] {
        self.rare.as_ref().map_or(&[], |rare| &rare.ranges)
    }
}

/// What few Services have, apart so that the others are small.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rare {
    /// The load balancer's addresses, unless it proxies itself.
    pub balancer: Box<[Address]>,
    /// weft gives those out itself, so its nodes answer for them on their link.
    pub balancer_is_ours: bool,
    /// The only clients that may use those; `None` for all.
    pub sources: Option<Box<[Range]>>,
    /// External addresses.
    pub external: Box<[Address]>,
    /// Ranges of ports that lead to the same ports of the endpoints (annotation `weft.dev/port-ranges`).
    pub ranges: Box<[PortRange]>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Name; empty if the Service has one port only.
    pub name: Box<str>,
    /// Port.
    pub port: u16,
    /// Port on every node; 0 for none.
    pub node_port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: u8,
}

/// A range of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: u8,
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

/// A node that endpoints are on, by the number that the tables gave its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

/// What a node knows besides Services, and what its choice of endpoints depends on.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Its zone.
    pub zone: Option<&'a str>,
    /// Nodes that don't answer it.
    pub silent: &'a BTreeSet<NodeId>,
    /// Backends whose connections failed: left out where the Service wants it.
    pub ejected: &'a BTreeSet<BackendKey>,
}

/// Name, protocol and number of a slice's port.
pub type SlicePort = (Box<str>, u8, u16);

/// A slice of endpoints, all of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Ports.
    pub ports: Arc<[SlicePort]>,
    /// Endpoints.
    pub endpoints: Box<[Endpoint]>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address.
    pub address: Address,
    /// Hash of the uid of the object behind it.
    pub owner: u64,
    /// Where it is.
    pub node: NodeId,
    /// On this node.
    pub local: bool,
    /// Whether it may get traffic.
    pub state: EndpointState,
    /// Its share of new connections, in proportion to others' (annotation `weft.dev/weight` of its slice).
    pub weight: u8,
    /// Whom it is for, if it is not for all.
    pub hints: Option<Box<Hints>>,
}

/// Whom an endpoint is meant for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Zones.
    pub zones: Vec<Box<str>>,
    /// It names nodes.
    pub nodes: bool,
    /// It names this node.
    pub this_node: bool,
}

/// Whether an endpoint may get traffic (KEP-1669).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointState {
    /// It is ready.
    Ready,
    /// It is terminating and still serves: used if no endpoint is ready.
    Terminating,
    /// Neither: it only finishes what it has.
    Unready,
}

/// All Services and slices.
#[derive(Debug, Default)]
pub struct Tables {
    node_name: String,
    /// Zone of this node.
    zone: Option<String>,
    /// Addresses that the node answers itself (cluster DNS): they are no Service's to the programs.
    node_local: Vec<Address>,
    known: Rows<ServiceName, Known>,
    slices: Owners,
    service_ports: Shared<ServicePort>,
    slice_ports: Shared<SlicePort>,
    /// Numbers of the nodes that endpoints were ever on.
    node_ids: HashMap<Box<str>, NodeId>,
    silent: BTreeSet<NodeId>,
    ejected: BTreeSet<BackendKey>,
}

/// A Service, and slices that name it; either may come first.
#[derive(Debug, Default)]
struct Known {
    service: Option<Box<Service>>,
    /// By name.
    slices: Vec<(Box<str>, Slice)>,
}

impl Known {
    fn place(&self, slice: &str) -> Result<usize, usize> {
        self.slices.binary_search_by(|(name, _)| (**name).cmp(slice))
    }
}

impl Tables {
    /// Empty tables of a node.
    #[must_use]
    pub fn new(node_name: &str, node_local: Vec<Address>) -> Self {
        Self { node_name: node_name.to_owned(), node_local, ..Self::default() }
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.len() == 0
    }

    /// Whether a Service is known, not only slices that name it.
    #[must_use]
    pub fn has(&self, name: &ServiceName) -> bool {
        self.known.get(name).is_some_and(|known| known.service.is_some())
    }

    /// A Service and its slices.
    #[must_use]
    pub fn get(&self, name: &ServiceName) -> Option<(&Service, Vec<&Slice>)> {
        let known = self.known.get(name)?;
        Some((known.service.as_deref()?, known.slices.iter().map(|(_, slice)| slice).collect()))
    }

    /// What the choice of endpoints depends on besides a Service and its slices.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        View { zone: self.zone.as_deref(), silent: &self.silent, ejected: &self.ejected }
    }

    /// Whether a Node is this node's own.
    #[must_use]
    pub fn is_own(&self, node: &core::Node) -> bool {
        node.metadata.name.as_deref() == Some(&self.node_name)
    }

    /// Enters this node's own labels; returns the Services whose choice of endpoints depends on them, if they changed.
    /// That looks at all of them, and happens once in a node's life.
    pub fn apply_node(&mut self, node: &core::Node) -> Vec<ServiceName> {
        if !self.is_own(node) {
            return Vec::new();
        }
        let zone = node.metadata.labels.as_ref().and_then(|l| l.get(ZONE_LABEL)).filter(|z| !z.is_empty());
        if zone == self.zone.as_ref() {
            return Vec::new();
        }
        self.zone = zone.cloned();
        let hinted = |slice: &Slice| slice.endpoints.iter().any(|e| e.hints.is_some());
        let concerned = self.known.iter().filter(|(_, known)| known.slices.iter().any(|(_, s)| hinted(s)));
        concerned.map(|(name, _)| name.clone()).collect()
    }

    /// Enters the nodes that don't answer; returns the Services with endpoints on those that are new or no longer among them.
    /// That looks at all endpoints: an index of them by node would cost memory always, and nodes die seldom.
    pub fn set_silent<'n>(&mut self, names: impl IntoIterator<Item = &'n str>) -> Vec<ServiceName> {
        let silent: BTreeSet<_> = names.into_iter().map(|name| number(&mut self.node_ids, name)).collect();
        let turned: BTreeSet<_> = silent.symmetric_difference(&self.silent).copied().collect();
        self.silent = silent;
        if turned.is_empty() {
            return Vec::new();
        }
        let on_one = |slice: &Slice| slice.endpoints.iter().any(|e| turned.contains(&e.node));
        let concerned = self.known.iter().filter(|(_, known)| known.slices.iter().any(|(_, s)| on_one(s)));
        concerned.map(|(name, _)| name.clone()).collect()
    }

    /// Enters the backends whose connections fail; returns the Services that leave out those which are new or no longer among them.
    pub fn set_ejected(&mut self, ejected: BTreeSet<BackendKey>) -> Vec<ServiceName> {
        let turned: BTreeSet<_> =
            ejected.symmetric_difference(&self.ejected).map(|backend| backend.address).collect();
        self.ejected = ejected;
        let has_one = |slice: &Slice| slice.endpoints.iter().any(|e| turned.contains(&e.address));
        let concerned = self.known.iter().filter(|(_, known)| {
            known.service.as_ref().is_some_and(|s| s.ejection) && known.slices.iter().any(|(_, s)| has_one(s))
        });
        concerned.map(|(name, _)| name.clone()).collect()
    }

    /// Enters a Service; returns its name if that changed anything.
    pub fn apply_service(&mut self, object: &wire::Service<'_>) -> Option<ServiceName> {
        let name = service_name(object)?;
        let Some(mut service) = trim::service(object, &self.node_local) else {
            return self.delete_service(&name);
        };
        let place = self.known.enter(name, |_| Known::default());
        if self.known.at(place)?.1.service.as_deref() == Some(&service) {
            return None;
        }
        service.ports = self.service_ports.share(service.ports);
        self.known.at_mut(place)?.service = Some(Box::new(service));
        self.name(place)
    }

    /// Removes a Service; returns its name if it was there.
    pub fn delete_service(&mut self, name: &ServiceName) -> Option<ServiceName> {
        let place = self.known.place(name)?;
        self.known.at_mut(place)?.service.take()?;
        self.forget_if_empty(place)
    }

    /// Enters a slice; returns the Services that this changed (two if it moved).
    pub fn apply_slice(&mut self, object: &wire::Slice<'_>) -> Vec<ServiceName> {
        let Some((namespace, name)) = object.metadata.names() else { return Vec::new() };
        let labels = object.metadata.labels.as_ref();
        let served = labels.filter(|labels| labels.headless.is_none());
        let label = served.and_then(|labels| labels.service_name.as_deref());
        // Other families of addresses (FQDN) are no proxy's business.
        let family = match object.address_type.as_deref() {
            Some("IPv4") => Some(Family::V4),
            Some("IPv6") => Some(Family::V6),
            Some(_) | None => None,
        };
        let Some((owner, family)) = label.zip(family) else {
            return self.delete_slice(namespace, name).into_iter().collect();
        };
        let owner = self.known.enter(ServiceName::new(namespace, owner), |_| Known::default());
        let mut changed = Vec::new();
        let before = self.owner(namespace, name);
        if before != Some(owner) {
            changed.extend(self.delete_slice(namespace, name));
        }
        let slice = trim::slice(object, family, &self.node_name, |name| number(&mut self.node_ids, name));
        if self.enter_slice(owner, (namespace, name), slice) {
            changed.extend(self.name(owner));
        }
        changed
    }

    /// Whether that changed anything.
    fn enter_slice(&mut self, owner: Place, (namespace, name): (&str, &str), mut slice: Slice) -> bool {
        let Some(known) = self.known.at_mut(owner) else { return false };
        match known.place(name) {
            Ok(place) if known.slices[place].1 == slice => return false,
            Ok(place) => {
                slice.ports = self.slice_ports.share(slice.ports);
                known.slices[place].1 = slice;
            }
            Err(place) => {
                slice.ports = self.slice_ports.share(slice.ports);
                // Most Services have one slice.
                known.slices.reserve_exact(1);
                known.slices.insert(place, (name.into(), slice));
                self.slices.insert(namespace, name, owner);
            }
        }
        true
    }

    /// Removes a slice; returns the Service that this changed.
    pub fn delete_slice(&mut self, namespace: &str, name: &str) -> Option<ServiceName> {
        let owner = self.owner(namespace, name)?;
        self.slices.remove(namespace, name, owner);
        let known = self.known.at_mut(owner)?;
        if let Ok(place) = known.place(name) {
            known.slices.remove(place);
        }
        self.forget_if_empty(owner)
    }

    /// The Service that a slice is of.
    fn owner(&self, namespace: &str, slice: &str) -> Option<Place> {
        self.slices.get(namespace, slice, |place| {
            let service = self.known.at(place);
            service.is_some_and(|(name, known)| name.namespace() == namespace && known.place(slice).is_ok())
        })
    }

    /// Names of all Services, for a relist.
    #[must_use]
    pub fn service_names(&self) -> Vec<ServiceName> {
        let named = self.known.iter().filter(|(_, known)| known.service.is_some());
        named.map(|(name, _)| name.clone()).collect()
    }

    /// Namespaces and names of all slices, for a relist.
    #[must_use]
    pub fn slice_names(&self) -> Vec<(String, String)> {
        let all = self.known.iter().flat_map(|(service, known)| {
            known.slices.iter().map(|(name, _)| (service.namespace().to_owned(), name.as_ref().to_owned()))
        });
        all.collect()
    }

    /// The name that all who keep it share the text of.
    fn name(&self, place: Place) -> Option<ServiceName> {
        self.known.at(place).map(|(name, _)| name.clone())
    }

    /// Returns the name, whether it is forgotten or not.
    fn forget_if_empty(&mut self, place: Place) -> Option<ServiceName> {
        let (name, known) = self.known.at(place)?;
        let name = name.clone();
        if known.service.is_none() && known.slices.is_empty() {
            self.known.remove(&name);
        }
        Some(name)
    }
}

/// The number of a node's name; a new one if it has none.
fn number(ids: &mut HashMap<Box<str>, NodeId>, name: &str) -> NodeId {
    if let Some(id) = ids.get(name) {
        return *id;
    }
    // 0 stands for no node.
    let id = NodeId(u32::try_from(ids.len()).unwrap_or(u32::MAX).saturating_add(1));
    ids.insert(name.into(), id);
    id
}

/// Name of a Service object.
#[must_use]
pub fn service_name(object: &wire::Service<'_>) -> Option<ServiceName> {
    object.metadata.names().map(|(namespace, name)| ServiceName::new(namespace, name))
}

/// Namespace and name of a slice object.
#[must_use]
pub fn slice_name(object: &wire::Slice<'_>) -> Option<(String, String)> {
    object.metadata.names().map(|(namespace, name)| (namespace.to_owned(), name.to_owned()))
}
