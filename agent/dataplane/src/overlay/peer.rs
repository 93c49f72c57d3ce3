//! Another node, as its Node in the API says it.

use std::net::{IpAddr, Ipv6Addr};

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::Node;
use weft_cni_netlink::Mac;

/// What VXLAN adds to a packet between ends of this family (RFC 7348 §5): Ethernet 14, IP, UDP 8, VXLAN 8.
#[must_use]
pub fn overhead_bytes(node: IpAddr) -> u32 {
    match node {
        IpAddr::V4(_) => 14 + 20 + 8 + 8,
        IpAddr::V6(_) => 14 + 40 + 8 + 8,
    }
}

/// Annotation of a Node that answers clients outside by itself, where another node has sent it their packets.
pub const DIRECT_RETURN: &str = "weft.dev/direct-return";
/// What it says: which packets the node understands.
pub const DIRECT_RETURN_VERSION: &str = "1";

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// Addresses of its pods: a range for each family.
    pub pods: Vec<IpNetwork>,
    /// Its own address: the other end of the tunnel.
    pub address: IpAddr,
    /// Its own addresses, one of each family: a router to its pods for who is on its link.
    pub routers: Vec<IpAddr>,
    /// All its own addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether it answers clients outside by itself ([`DIRECT_RETURN`]).
    pub direct: bool,
}

impl Peer {
    /// `None` while the Node has no range, or no address of the tunnels' family.
    pub(super) fn of(node: &Node, v6: bool) -> Option<Self> {
        let spec = node.spec.as_ref()?;
        let listed = spec.pod_cidrs.iter().flatten().map(String::as_str).chain(spec.pod_cidr.as_deref());
        let mut pods: Vec<IpNetwork> = Vec::new();
        for range in listed.filter_map(|range| range.parse::<IpNetwork>().ok()) {
            if !pods.iter().any(|other| other.is_ipv6() == range.is_ipv6()) {
                pods.push(range);
            }
        }
        let mut addresses: Vec<IpAddr> = Vec::new();
        let mut routers: Vec<IpAddr> = Vec::new();
        for listed in node.status.as_ref()?.addresses.iter().flatten() {
            let Ok(address) = listed.address.parse::<IpAddr>() else { continue };
            addresses.push(address);
            if listed.type_ != "InternalIP" {
                continue;
            }
            if !routers.iter().any(|other| other.is_ipv6() == address.is_ipv6()) {
                routers.push(address);
            }
        }
        let address = *routers.iter().find(|address| address.is_ipv6() == v6)?;
        let version = node.metadata.annotations.as_ref().and_then(|all| all.get(DIRECT_RETURN));
        let direct = version.is_some_and(|version| version == DIRECT_RETURN_VERSION);
        (!pods.is_empty()).then_some(Self { pods, address, routers, addresses, direct })
    }

    /// Whether a network has an address of the node.
    pub(super) fn is_within(&self, network: IpNetwork) -> bool {
        self.routers.iter().any(|address| network.contains(*address))
    }
}

/// The hardware address of a node's end: locally administered, and the node's address (of an IPv6 one a hash of it: four bytes
/// are left, and the addresses of one network differ where that network chose to).
#[must_use]
pub fn mac(node: IpAddr) -> Mac {
    match node {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            Mac([0x02, 0x77, a, b, c, d])
        }
        IpAddr::V6(ip) => {
            // FNV-1a: all nodes must agree on it, of whatever version.
            let hash = ip
                .octets()
                .iter()
                .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
            let [a, b, c, d] = hash.to_be_bytes();
            Mac([0x02, 0x78, a, b, c, d])
        }
    }
}

/// The address that a device with this hardware address gives itself (RFC 4291, appendix A).
pub(super) fn link_local(mac: Mac) -> Ipv6Addr {
    let Mac([a, b, c, d, e, f]) = mac;
    let id = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    Ipv6Addr::from((0xfe80_u128 << 112) | u128::from(u64::from_be_bytes(id)))
}

/// The first address behind a range's own: its gateway.
pub(super) fn first(range: IpNetwork) -> IpAddr {
    match range {
        IpNetwork::V4(range) => IpAddr::V4((u32::from(range.network()) + 1).into()),
        IpNetwork::V6(range) => IpAddr::V6((u128::from(range.network()) + 1).into()),
    }
}
