//! Pods, namespaces and policies as the planner needs them: trimmed from the API's objects.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use sha2::{Digest as _, Sha256};
use weft_ebpf_abi::policy::RangeKey;
use weft_ebpf_abi::{Address, SCTP, TCP, UDP};

pub use super::selector::{Labels, Selector};

/// Annotation that puts a policy on trial.
const DRY_RUN: &str = "weft.dev/dry-run";

/// Namespace and name of a pod or a policy.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Name {
    /// Of an object in a namespace.
    #[must_use]
    pub fn of<K: kube::Resource>(object: &K) -> Option<Self> {
        let meta = object.meta();
        Some(Self { namespace: meta.namespace.clone()?, name: meta.name.clone()? })
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A container's port with a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// Protocol.
    pub protocol: u8,
    /// Name.
    pub name: String,
    /// Number.
    pub number: u16,
}

/// A pod with a network of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Tells pods of one name apart.
    pub uid: String,
    /// Labels.
    pub labels: Labels,
    /// Addresses; none before it has them, and after its end.
    pub addresses: Vec<Address>,
    /// Ports that policies may name.
    pub ports: BTreeSet<NamedPort>,
    /// Ports of its node lead to it.
    pub host_ports: bool,
    /// It runs on this node.
    pub local: bool,
}

impl Pod {
    /// `None` for pods that policy does not know: those in their node's network.
    #[must_use]
    pub fn new(object: &core::Pod, node: &str) -> Option<Self> {
        let spec = object.spec.as_ref()?;
        if spec.host_network == Some(true) {
            return None;
        }
        let status = object.status.as_ref();
        let phase = status.and_then(|s| s.phase.as_deref());
        let ended = matches!(phase, Some("Succeeded" | "Failed"));
        let ips = status.iter().flat_map(|s| s.pod_ips.iter().flatten()).map(|ip| ip.ip.as_str());
        let ips = ips.chain(status.and_then(|s| s.pod_ip.as_deref()));
        let addresses: BTreeSet<Address> =
            ips.filter(|_| !ended).filter_map(|ip| ip.parse::<IpAddr>().ok()).map(Address::from).collect();
        // An init container that goes on beside the others (a sidecar) has ports too.
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let ports = containers.flat_map(|c| c.ports.iter().flatten());
        let host_ports = ports.clone().any(|port| port.host_port.is_some_and(|number| number != 0));
        let ports = ports.filter_map(|port| {
            Some(NamedPort {
                protocol: protocol(port.protocol.as_deref())?,
                name: port.name.clone()?,
                number: u16::try_from(port.container_port).ok()?,
            })
        });
        Some(Self {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            labels: object.metadata.labels.clone().unwrap_or_default(),
            addresses: addresses.into_iter().collect(),
            ports: ports.collect(),
            host_ports,
            local: !ended && spec.node_name.as_deref() == Some(node),
        })
    }
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The pods of its namespace that it is about.
    pub pods: Selector,
    /// What it allows in; `None` if it is not about that.
    pub ingress: Option<Vec<Rule>>,
    /// What it allows out; `None` if it is not about that.
    pub egress: Option<Vec<Rule>>,
    /// It is on trial: what it would drop is counted, and let through.
    pub dry_run: bool,
}

/// Peers and ports that are allowed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Peers; `None` for everybody.
    pub peers: Option<Vec<Peer>>,
    /// Ports; `None` for all of every protocol.
    pub ports: Option<Vec<PortRule>>,
}

/// A peer and its number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer {
    /// Made from what it says.
    pub id: u64,
    /// What it says.
    pub spec: Arc<PeerSpec>,
}

/// Whom a rule names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerSpec {
    /// Pods by their labels, in one namespace.
    Pods {
        /// The namespace.
        namespace: String,
        /// The pods.
        pods: Selector,
    },
    /// Pods by their labels, in namespaces by theirs.
    PodsOf {
        /// The namespaces.
        namespaces: Selector,
        /// The pods.
        pods: Selector,
    },
    /// Addresses.
    Block {
        /// The range.
        cidr: RangeKey,
        /// Ranges within that are not meant.
        except: BTreeSet<RangeKey>,
    },
}

/// Which ports a rule allows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortRule {
    /// All of every protocol.
    Any,
    /// First and last of a protocol.
    Span(u8, u16, u16),
    /// A port of a protocol by the name that the destination's containers give it.
    Named(u8, String),
}

impl Policy {
    /// Trims one. What can't be read allows nothing.
    #[must_use]
    pub fn new(object: &networking::NetworkPolicy) -> Option<Self> {
        let namespace = object.metadata.namespace.as_deref()?;
        let spec = object.spec.as_ref()?;
        let about = |kind: &str, default| match &spec.policy_types {
            Some(types) if !types.is_empty() => types.iter().any(|t| t == kind),
            _ => default,
        };
        let ingress = spec.ingress.iter().flatten();
        let ingress = ingress.map(|rule| Rule::new(namespace, rule.from.as_ref(), rule.ports.as_ref()));
        let egress = spec.egress.iter().flatten();
        let egress = egress.map(|rule| Rule::new(namespace, rule.to.as_ref(), rule.ports.as_ref()));
        let has_egress = spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
        Some(Self {
            pods: spec.pod_selector.as_ref().map(Selector::new).unwrap_or_default(),
            ingress: about("Ingress", true).then(|| ingress.collect()),
            egress: about("Egress", has_egress).then(|| egress.collect()),
            dry_run: object.annotations().get(DRY_RUN).is_some_and(|value| value == "true"),
        })
    }
}

impl Rule {
    fn new(
        namespace: &str,
        peers: Option<&Vec<networking::NetworkPolicyPeer>>,
        ports: Option<&Vec<networking::NetworkPolicyPort>>,
    ) -> Self {
        let peers = peers.filter(|p| !p.is_empty());
        let ports = ports.filter(|p| !p.is_empty());
        Self {
            peers: peers.map(|all| {
                all.iter().filter_map(|one| PeerSpec::new(namespace, one)).map(Peer::from).collect()
            }),
            ports: ports.map(|all| all.iter().filter_map(PortRule::new).collect()),
        }
    }
}

impl From<PeerSpec> for Peer {
    fn from(spec: PeerSpec) -> Self {
        Self { id: number(&spec), spec: Arc::new(spec) }
    }
}

impl PeerSpec {
    fn new(namespace: &str, peer: &networking::NetworkPolicyPeer) -> Option<Self> {
        if let Some(block) = &peer.ip_block {
            let except: Option<_> = block.except.iter().flatten().map(|text| range(text)).collect();
            return Some(Self::Block { cidr: range(&block.cidr)?, except: except? });
        }
        let pods = peer.pod_selector.as_ref().map(Selector::new);
        match (&peer.namespace_selector, pods) {
            (Some(namespaces), pods) => {
                Some(Self::PodsOf { namespaces: Selector::new(namespaces), pods: pods.unwrap_or_default() })
            }
            (None, Some(pods)) => Some(Self::Pods { namespace: namespace.to_owned(), pods }),
            (None, None) => None,
        }
    }
}

impl PortRule {
    fn new(port: &networking::NetworkPolicyPort) -> Option<Self> {
        let protocol = protocol(port.protocol.as_deref())?;
        Some(match &port.port {
            None => Self::Span(protocol, 0, u16::MAX),
            Some(IntOrString::String(name)) => Self::Named(protocol, name.clone()),
            Some(IntOrString::Int(first)) => {
                let first = u16::try_from(*first).ok()?;
                let last = port.end_port.map_or(Some(first), |last| u16::try_from(last).ok())?;
                Self::Span(protocol, first, last)
            }
        })
    }
}

fn protocol(name: Option<&str>) -> Option<u8> {
    match name {
        None | Some("TCP") => Some(TCP),
        Some("UDP") => Some(UDP),
        Some("SCTP") => Some(SCTP),
        Some(_) => None,
    }
}

/// A range of addresses, its host's bits cleared.
#[must_use]
pub fn range(text: &str) -> Option<RangeKey> {
    let network: IpNetwork = text.parse().ok()?;
    let more = if network.is_ipv4() { 96 } else { 0 };
    Some(RangeKey {
        prefix_bits: more + u32::from(network.prefix()),
        address: Address::from(network.network()),
    })
}

/// A number made from what something says; never 0. 64 bits of SHA-256: it stands in pinned maps, so it must not change, and
/// nobody may find two things of one number.
#[must_use]
pub fn number(of: &impl fmt::Debug) -> u64 {
    let digest = Sha256::digest(format!("{of:?}"));
    let first = digest.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte));
    first.max(1)
}
