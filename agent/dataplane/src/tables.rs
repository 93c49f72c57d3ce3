//! The cluster's Services and endpoints as the planner needs them: trimmed from the API's objects, nothing kept twice.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use weft_ebpf_abi::{Address, TCP, UDP};

/// Label on a slice that names its Service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Label on a Service that another proxy serves.
const OTHER_PROXY_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Label on a Service that no proxy serves.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// Affinity when the Service gives no timeout (the API's default: 3 hours).
const AFFINITY_DEFAULT_SECONDS: u32 = 10_800;

/// Namespace and name of a Service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A Service with an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Cluster addresses.
    pub cluster: Vec<Address>,
    /// External and load-balancer addresses.
    pub external: Vec<Address>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Seconds of affinity by client; 0 for none.
    pub affinity_seconds: u32,
    /// internalTrafficPolicy is Local.
    pub internal_local: bool,
    /// externalTrafficPolicy is Local.
    pub external_local: bool,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; empty if the Service has one port only.
    pub name: String,
    /// Port.
    pub port: u16,
    /// Port on every node; 0 for none.
    pub node_port: u16,
    /// `TCP` or `UDP`.
    pub protocol: u8,
}

/// A slice of endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Name, protocol and number of each port.
    pub ports: Vec<(String, u8, u16)>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address.
    pub address: Address,
    /// Hash of the uid of the object behind it.
    pub owner: u64,
    /// On this node.
    pub local: bool,
    /// Whether it may get traffic.
    pub state: EndpointState,
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
    /// Addresses that the node answers itself (cluster DNS): they are no Service's to the programs.
    node_local: Vec<Address>,
    services: HashMap<ServiceName, Service>,
    slices: HashMap<ServiceName, BTreeMap<String, Slice>>,
    /// Which Service a slice (namespace, name) belongs to.
    slice_of: HashMap<(String, String), ServiceName>,
}

impl Tables {
    /// Empty tables of a node.
    #[must_use]
    pub fn new(node_name: &str, node_local: Vec<Address>) -> Self {
        Self { node_name: node_name.to_owned(), node_local, ..Self::default() }
    }

    /// A Service and its slices.
    #[must_use]
    pub fn get(&self, name: &ServiceName) -> Option<(&Service, Vec<&Slice>)> {
        let service = self.services.get(name)?;
        Some((service, self.slices.get(name).map(|s| s.values().collect()).unwrap_or_default()))
    }

    /// Enters a Service; returns its name if that changed anything.
    pub fn apply_service(&mut self, object: &core::Service) -> Option<ServiceName> {
        let name = service_name(object)?;
        let Some(service) = trim_service(object, &self.node_local) else { return self.delete_service(&name) };
        match self.services.insert(name.clone(), service) {
            Some(old) if self.services.get(&name) == Some(&old) => None,
            Some(_) | None => Some(name),
        }
    }

    /// Removes a Service; returns its name if it was there.
    pub fn delete_service(&mut self, name: &ServiceName) -> Option<ServiceName> {
        self.services.remove(name).map(|_| name.clone())
    }

    /// Enters a slice; returns the Services that this changed (two if it moved).
    pub fn apply_slice(&mut self, object: &discovery::EndpointSlice) -> Vec<ServiceName> {
        let Some((namespace, name)) = slice_name(object) else { return Vec::new() };
        let label = object.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_NAME_LABEL));
        let owner = label.filter(|_| object.address_type == "IPv4");
        let Some(owner) = owner else { return self.delete_slice(&namespace, &name).into_iter().collect() };
        let owner = ServiceName { namespace: namespace.clone(), name: owner.clone() };
        let mut changed = Vec::new();
        if self.slice_of.get(&(namespace.clone(), name.clone())).is_some_and(|old| *old != owner) {
            changed.extend(self.delete_slice(&namespace, &name));
        }
        let slice = trim_slice(object, &self.node_name);
        self.slice_of.insert((namespace, name.clone()), owner.clone());
        let of_service = self.slices.entry(owner.clone()).or_default();
        let same = of_service.get(&name) == Some(&slice);
        if !same {
            of_service.insert(name, slice);
            changed.push(owner);
        }
        changed
    }

    /// Removes a slice; returns the Service that this changed.
    pub fn delete_slice(&mut self, namespace: &str, name: &str) -> Option<ServiceName> {
        let owner = self.slice_of.remove(&(namespace.to_owned(), name.to_owned()))?;
        let of_service = self.slices.get_mut(&owner)?;
        of_service.remove(name);
        if of_service.is_empty() {
            self.slices.remove(&owner);
        }
        Some(owner)
    }

    /// Names of all Services, for a relist.
    #[must_use]
    pub fn service_names(&self) -> Vec<ServiceName> {
        self.services.keys().cloned().collect()
    }

    /// Namespaces and names of all slices, for a relist.
    #[must_use]
    pub fn slice_names(&self) -> Vec<(String, String)> {
        self.slice_of.keys().cloned().collect()
    }
}

/// Name of a Service object.
#[must_use]
pub fn service_name(object: &core::Service) -> Option<ServiceName> {
    Some(ServiceName { namespace: object.metadata.namespace.clone()?, name: object.metadata.name.clone()? })
}

/// Namespace and name of a slice object.
#[must_use]
pub fn slice_name(object: &discovery::EndpointSlice) -> Option<(String, String)> {
    Some((object.metadata.namespace.clone()?, object.metadata.name.clone()?))
}

fn ipv4(text: &str) -> Option<Address> {
    match text.parse() {
        Ok(IpAddr::V4(v4)) => Some(Address::from(v4)),
        Ok(IpAddr::V6(_)) | Err(_) => None,
    }
}

fn protocol(name: Option<&str>) -> Option<u8> {
    match name {
        None | Some("TCP") => Some(TCP),
        Some("UDP") => Some(UDP),
        Some(_) => None,
    }
}

/// `None` for what no proxy serves: headless, ExternalName, another proxy's.
fn trim_service(object: &core::Service, node_local: &[Address]) -> Option<Service> {
    let spec = object.spec.as_ref()?;
    let labels = object.metadata.labels.as_ref();
    let labelled = |key| labels.is_some_and(|l| l.contains_key(key));
    if spec.type_.as_deref() == Some("ExternalName")
        || labelled(OTHER_PROXY_LABEL)
        || labelled(HEADLESS_LABEL)
    {
        return None;
    }
    let listed = spec.cluster_ips.iter().flatten().map(String::as_str);
    let mut cluster: Vec<_> = listed.chain(spec.cluster_ip.as_deref()).filter_map(ipv4).collect();
    cluster.sort_unstable();
    cluster.dedup();
    cluster.retain(|address| !node_local.contains(address));
    if cluster.is_empty() {
        return None;
    }
    let affinity_seconds = match spec.session_affinity.as_deref() {
        Some("ClientIP") => {
            let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
            let seconds = config.and_then(|c| c.timeout_seconds).and_then(|s| u32::try_from(s).ok());
            seconds.unwrap_or(AFFINITY_DEFAULT_SECONDS)
        }
        Some(_) | None => 0,
    };
    Some(Service {
        cluster,
        external: external_addresses(object, spec),
        ports: spec.ports.iter().flatten().filter_map(trim_port).collect(),
        affinity_seconds,
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
    })
}

/// External addresses, and those of the load balancer unless it proxies itself. Source ranges are not enforced yet:
/// a Service that sets them gets no load-balancer address rather than an open one.
fn external_addresses(object: &core::Service, spec: &core::ServiceSpec) -> Vec<Address> {
    let mut addresses: Vec<_> = spec.external_ips.iter().flatten().filter_map(|text| ipv4(text)).collect();
    if spec.load_balancer_source_ranges.as_ref().is_none_or(Vec::is_empty) {
        let balancer = object.status.as_ref().and_then(|s| s.load_balancer.as_ref());
        let ingress = balancer.into_iter().flat_map(|b| b.ingress.iter().flatten());
        let served = ingress.filter(|i| i.ip_mode.as_deref() != Some("Proxy"));
        addresses.extend(served.filter_map(|i| ipv4(i.ip.as_deref()?)));
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn trim_port(port: &core::ServicePort) -> Option<ServicePort> {
    Some(ServicePort {
        name: port.name.clone().unwrap_or_default(),
        port: u16::try_from(port.port).ok()?,
        node_port: port.node_port.and_then(|p| u16::try_from(p).ok()).unwrap_or(0),
        protocol: protocol(port.protocol.as_deref())?,
    })
}

fn trim_slice(object: &discovery::EndpointSlice, node_name: &str) -> Slice {
    let ports = object.ports.iter().flatten().filter_map(|p| {
        let number = u16::try_from(p.port?).ok()?;
        Some((p.name.clone().unwrap_or_default(), protocol(p.protocol.as_deref())?, number))
    });
    let endpoints = object.endpoints.iter().flatten().filter_map(|e| {
        let uid = e.target_ref.as_ref().and_then(|t| t.uid.as_deref()).unwrap_or("");
        Some(Endpoint {
            // Only the first address is meant to be used (discovery/v1 Endpoint.addresses).
            address: ipv4(e.addresses.first()?)?,
            owner: fnv1a(uid.as_bytes()),
            local: e.node_name.as_deref() == Some(node_name),
            state: endpoint_state(e.conditions.as_ref()),
        })
    });
    Slice { ports: ports.collect(), endpoints: endpoints.collect() }
}

/// A missing `ready` means ready, a missing `serving` what `ready` says.
fn endpoint_state(conditions: Option<&discovery::EndpointConditions>) -> EndpointState {
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
    let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
    match (ready, serving, terminating) {
        (true, _, _) => EndpointState::Ready,
        (false, true, true) => EndpointState::Terminating,
        (false, _, _) => EndpointState::Unready,
    }
}

/// FNV-1a: fixed for ever, unlike the standard library's hasher, because it is stored in pinned maps.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
