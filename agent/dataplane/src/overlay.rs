//! The overlay: a VXLAN device, and for every other node routes to its pods, neighbours and a forwarding entry.
//!
//! The device learns nothing (RFC 7348 §4 allows a control plane instead): the Nodes in the API say where pods are, and the
//! hardware address of a node's end follows from the node's address, so nothing has to be published. Tunnels are of one
//! family (IPv4 wherever nodes have it) and carry the pods' packets of both.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::Node;
use weft_cni_netlink::{
    Class, Error, Event, FdbEntry, Link, LinkChange, Mac, Neighbour, NeighbourChange, Netlink, Route, Vxlan,
};

use crate::OVERLAY;
use crate::node::Devices;

/// VXLAN network identifier.
pub const VNI: u32 = 4_242;
/// UDP port of the kernel's VXLAN (RFC 7348's 4789 is left to others on the node).
pub const PORT: u16 = 8_472;
/// MTU if the underlay's device is not found.
const DEFAULT_MTU_BYTES: u32 = 1_500;

/// No link of IPv6 is narrower (RFC 8200 §5).
const IPV6_LEAST_MTU_BYTES: u32 = 1_280;

/// What VXLAN adds to a packet between ends of this family (RFC 7348 §5): Ethernet 14, IP, UDP 8, VXLAN 8.
#[must_use]
pub fn overhead_bytes(node: IpAddr) -> u32 {
    match node {
        IpAddr::V4(_) => 14 + 20 + 8 + 8,
        IpAddr::V6(_) => 14 + 40 + 8 + 8,
    }
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// Addresses of its pods: a range for each family.
    pub pods: Vec<IpNetwork>,
    /// Its own address: the other end of the tunnel.
    pub address: IpAddr,
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

/// What other nodes need, and what is in the kernel.
#[derive(Debug)]
pub struct Overlay {
    node_name: String,
    node_ip: IpAddr,
    /// Peers by the name of their Node; the node's own is in it.
    nodes: BTreeMap<String, Peer>,
    addresses: BTreeSet<IpAddr>,
    /// Number of the device that `applied` is about.
    index: u32,
    /// Its largest packet in bytes.
    mtu_bytes: u32,
    applied: BTreeSet<Peer>,
    /// What the ways to peers take that are narrower than the device, by the peer's address.
    narrow: BTreeMap<IpAddr, u32>,
    /// What an earlier agent left is looked through once.
    pruned: bool,
    dirty: bool,
}

/// What the kernel must have for a peer.
struct Entries {
    /// A route for each range, with the neighbour that it leads to.
    ranges: Vec<(Route, Neighbour)>,
    fdb: FdbEntry,
}

impl Overlay {
    /// Nothing is known yet. `node_ip` is this node's end of the tunnels.
    #[must_use]
    pub fn new(node_name: String, node_ip: IpAddr) -> Self {
        Self {
            node_name,
            node_ip,
            nodes: BTreeMap::new(),
            addresses: BTreeSet::new(),
            index: 0,
            mtu_bytes: 0,
            applied: BTreeSet::new(),
            narrow: BTreeMap::new(),
            pruned: false,
            dirty: true,
        }
    }

    /// Enters a Node.
    pub fn apply_node(&mut self, node: &Node) {
        let Some(name) = node.metadata.name.clone() else { return };
        let before = match peer(node, self.node_ip.is_ipv6()) {
            Some(peer) => self.nodes.insert(name.clone(), peer),
            None => self.nodes.remove(&name),
        };
        self.dirty |= self.nodes.get(&name) != before.as_ref();
    }

    /// Removes a Node.
    pub fn delete_node(&mut self, name: &str) {
        self.dirty |= self.nodes.remove(name).is_some();
    }

    /// Names of the Nodes known.
    #[must_use]
    pub fn node_names(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    /// Takes in the node's devices: a device that went took its entries with it.
    pub fn set_devices(&mut self, devices: &Devices) {
        if devices.addresses != self.addresses {
            self.addresses.clone_from(&devices.addresses);
            self.dirty = true;
        }
        // The kernel drops the routes of a device that is set down, and doesn't say so.
        if self.index != 0 && (devices.overlay != self.index || !devices.overlay_up) {
            self.index = 0;
            self.applied.clear();
            self.dirty = true;
        }
    }

    /// Takes in a change of the kernel's: what somebody else took away or replaced will be put again. What the overlay itself
    /// does contradicts nothing.
    pub fn observe(&mut self, event: &Event) {
        let before = self.applied.len();
        match *event {
            Event::Lost => self.applied.clear(),
            // The way to a peer may be a wider or narrower one now.
            Event::Route { route: Some(route), .. } if route.index != self.index && self.is_way(&route) => {
                self.applied.retain(|peer| !route.destination.contains(peer.address));
            }
            Event::Route { route: Some(route), gone } => {
                let index = self.index;
                let kept = route.index == index && route.gateway == Some(route.destination.network());
                // Another route to the same pods may go as it came: ours is there all the while.
                let broken = if gone { route.index == index } else { !kept };
                self.applied.retain(|peer| !(broken && peer.pods.contains(&route.destination)));
            }
            Event::Neighbour(change) if change.index == self.index => {
                self.applied.retain(|peer| !contradicts(peer, &change));
            }
            Event::Route { route: None, .. } | Event::Neighbour(_) | Event::Link(_) | Event::Address(_) => {}
        }
        self.dirty |= self.applied.len() != before;
    }

    fn is_way(&self, route: &Route) -> bool {
        self.applied.iter().any(|peer| route.destination.contains(peer.address))
    }

    /// Whether the kernel lags behind.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// The largest packet that all routes to peers take, if one takes less than the device; else 0.
    #[must_use]
    pub fn narrowest_bytes(&self) -> u32 {
        self.narrow.values().copied().min().unwrap_or(0)
    }

    /// The address that the node uses towards pods of a family: the bridge's, the first of the node's own range. It must lie
    /// in that range, or answers would not come back through the overlay.
    fn source(&self, v6: bool) -> Option<IpAddr> {
        let own = self.nodes.get(&self.node_name)?;
        let gateway = first(*own.pods.iter().find(|range| range.is_ipv6() == v6)?);
        self.addresses.contains(&gateway).then_some(gateway)
    }

    /// Peers that should be reachable, with the ranges of the families that the node has an address to reach them from.
    fn wanted(&self) -> BTreeSet<Peer> {
        let (v4, v6) = (self.source(false).is_some(), self.source(true).is_some());
        let others = self.nodes.iter().filter(|(name, _)| **name != self.node_name);
        let mut peers: BTreeSet<Peer> = others.map(|(_, peer)| peer.clone()).collect();
        if !v4 || !v6 {
            let kept = |range: &IpNetwork| if range.is_ipv6() { v6 } else { v4 };
            peers = peers
                .into_iter()
                .map(|mut peer| {
                    peer.pods.retain(kept);
                    peer
                })
                .collect();
        }
        peers.retain(|peer| peer.address != self.node_ip && !peer.pods.is_empty());
        peers
    }

    /// Brings the kernel up to date by the difference.
    ///
    /// # Errors
    /// If the kernel refuses something; the rest is done, and the overlay stays dirty.
    pub fn sync(&mut self) -> Result<(), Error> {
        let mut netlink = Netlink::open()?;
        let wanted = self.wanted();
        let device = match netlink.link(OVERLAY) {
            Ok(link) if link.mac == Some(mac(self.node_ip)) => Some(link),
            Ok(link) => {
                netlink.delete_link(link.index)?;
                None
            }
            Err(error) if error.class() == Class::NotFound => None,
            Err(error) => return Err(error),
        };
        let device = match device {
            Some(device) => device,
            // A cluster of one node needs no overlay.
            None if wanted.is_empty() => {
                self.dirty = false;
                return Ok(());
            }
            None => self.create(&mut netlink)?,
        };
        if !device.up {
            netlink.change_link(device.index, &LinkChange { up: Some(true), ..LinkChange::default() })?;
        }
        if device.index != self.index {
            self.index = device.index;
            self.mtu_bytes = device.mtu_bytes;
            self.applied.clear();
            self.pruned = false;
        }
        self.narrow.retain(|address, _| wanted.iter().any(|peer| peer.address == *address));
        let mut result = Ok(());
        for peer in self.applied.difference(&wanted).cloned().collect::<Vec<_>>() {
            match self.remove(&mut netlink, &peer, &wanted) {
                Ok(()) => drop(self.applied.remove(&peer)),
                Err(error) => result = Err(error),
            }
        }
        for peer in wanted.difference(&self.applied).cloned().collect::<Vec<_>>() {
            match self.put(&mut netlink, &peer) {
                Ok(()) => drop(self.applied.insert(peer)),
                Err(error) => result = Err(error),
            }
        }
        if !self.pruned {
            self.prune(&mut netlink, &wanted)?;
            self.pruned = true;
        }
        self.dirty = result.is_err();
        result
    }

    fn create(&self, netlink: &mut Netlink) -> Result<Link, Error> {
        let underlay = netlink.addresses()?.into_iter().find(|a| a.network.ip() == self.node_ip);
        let links = netlink.links()?;
        let underlay = underlay.and_then(|a| links.into_iter().find(|link| link.index == a.index));
        let mtu_bytes = underlay.map_or(DEFAULT_MTU_BYTES, |link| link.mtu_bytes);
        netlink.create_vxlan(&Vxlan {
            name: OVERLAY,
            vni: VNI,
            port: PORT,
            local: self.node_ip,
            mac: mac(self.node_ip),
            mtu_bytes: mtu_bytes.saturating_sub(overhead_bytes(self.node_ip)),
        })?;
        netlink.link(OVERLAY)
    }

    fn entries(&self, peer: &Peer) -> Entries {
        let (index, mac) = (self.index, mac(peer.address));
        let range = |range: &IpNetwork| {
            let gateway = range.network();
            let mut route = Route::new(*range, index);
            route.gateway = Some(gateway);
            route.onlink = true;
            route.source = self.source(range.is_ipv6());
            (route, Neighbour { index, address: gateway, mac })
        };
        Entries {
            ranges: peer.pods.iter().map(range).collect(),
            fdb: FdbEntry { index, mac, remote: peer.address },
        }
    }

    /// The routes last: a packet that takes one finds the rest.
    fn put(&mut self, netlink: &mut Netlink, peer: &Peer) -> Result<(), Error> {
        let entries = self.entries(peer);
        let way = netlink.route_to(peer.address)?.and_then(|way| way.mtu_bytes);
        let within = way.map(|mtu| mtu.saturating_sub(overhead_bytes(peer.address)));
        match within.filter(|mtu| *mtu < self.mtu_bytes) {
            Some(mtu) => drop(self.narrow.insert(peer.address, mtu)),
            None => drop(self.narrow.remove(&peer.address)),
        }
        netlink.put_fdb(&entries.fdb)?;
        for (mut route, neighbour) in entries.ranges {
            netlink.put_neighbour(&neighbour)?;
            // On a narrow way the kernel would send tunnel packets in fragments; told of it, it tells the pods.
            let least = if route.destination.is_ipv6() { IPV6_LEAST_MTU_BYTES } else { 0 };
            route.mtu_bytes = within.filter(|mtu| *mtu < self.mtu_bytes).map(|mtu| mtu.max(least));
            netlink.put_route(&route)?;
        }
        Ok(())
    }

    /// Leaves what another peer needs: a node may come back with other ranges, or its ranges go to another node.
    fn remove(&self, netlink: &mut Netlink, peer: &Peer, wanted: &BTreeSet<Peer>) -> Result<(), Error> {
        let entries = self.entries(peer);
        for (mut route, neighbour) in entries.ranges {
            if wanted.iter().any(|w| w.pods.contains(&route.destination)) {
                continue;
            }
            // Without a source it matches whatever the route was made with.
            route.source = None;
            netlink.delete_route(&route)?;
            netlink.delete_neighbour(&neighbour)?;
        }
        if !wanted.iter().any(|w| w.address == peer.address) {
            netlink.delete_fdb(&entries.fdb)?;
        }
        Ok(())
    }

    fn prune(&self, netlink: &mut Netlink, wanted: &BTreeSet<Peer>) -> Result<(), Error> {
        let wanted: Vec<_> = wanted.iter().map(|peer| self.entries(peer)).collect();
        let ranges = || wanted.iter().flat_map(|entries| &entries.ranges);
        for route in netlink.routes()?.into_iter().filter(|r| r.index == self.index && r.gateway.is_some()) {
            if !ranges().any(|(r, _)| r.destination == route.destination) {
                netlink.delete_route(&route)?;
            }
        }
        for neighbour in netlink.neighbours(self.index)? {
            if !ranges().any(|(_, n)| *n == neighbour) {
                netlink.delete_neighbour(&neighbour)?;
            }
        }
        for entry in netlink.fdb(self.index)? {
            if !wanted.iter().any(|entries| entries.fdb == entry) {
                netlink.delete_fdb(&entry)?;
            }
        }
        Ok(())
    }
}

/// Whether a neighbour or forwarding entry that a peer needs is gone or leads elsewhere.
fn contradicts(peer: &Peer, change: &NeighbourChange) -> bool {
    let wanted = mac(peer.address);
    if change.forwarding {
        return change.mac == Some(wanted) && (change.gone || change.address != Some(peer.address));
    }
    let is_peers = change.address.is_some_and(|ip| peer.pods.iter().any(|range| range.network() == ip));
    is_peers && (change.gone || change.mac != Some(wanted))
}

/// The first address behind a range's own: its gateway.
fn first(range: IpNetwork) -> IpAddr {
    match range {
        IpNetwork::V4(range) => IpAddr::V4((u32::from(range.network()) + 1).into()),
        IpNetwork::V6(range) => IpAddr::V6((u128::from(range.network()) + 1).into()),
    }
}

/// `None` while the Node has no range, or no address of the tunnels' family.
fn peer(node: &Node, v6: bool) -> Option<Peer> {
    let spec = node.spec.as_ref()?;
    let listed = spec.pod_cidrs.iter().flatten().map(String::as_str).chain(spec.pod_cidr.as_deref());
    let mut pods: Vec<IpNetwork> = Vec::new();
    for range in listed.filter_map(|range| range.parse::<IpNetwork>().ok()) {
        if !pods.iter().any(|other| other.is_ipv6() == range.is_ipv6()) {
            pods.push(range);
        }
    }
    let addresses = node.status.as_ref()?.addresses.iter().flatten();
    let internal = addresses.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok());
    let address = internal.into_iter().find(|address: &IpAddr| address.is_ipv6() == v6)?;
    (!pods.is_empty()).then_some(Peer { pods, address })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, ranges: &[&str], addresses: &[&str]) -> Node {
        let addresses: Vec<_> =
            addresses.iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
        let object = json!({"metadata": {"name": name},
            "spec": {"podCIDR": ranges.first(), "podCIDRs": ranges}, "status": {"addresses": addresses}});
        serde_json::from_value(object).unwrap()
    }

    fn wanted(overlay: &Overlay) -> Vec<String> {
        let text = |peer: &Peer| {
            let pods: Vec<_> = peer.pods.iter().map(ToString::to_string).collect();
            format!("{} by {}", pods.join(" "), peer.address)
        };
        overlay.wanted().iter().map(text).collect()
    }

    #[test]
    fn peers_are_reached_in_the_families_that_the_node_has_addresses_of() {
        let mut overlay = Overlay::new("a".to_owned(), "192.0.2.1".parse().unwrap());
        overlay.apply_node(&node("a", &["10.42.0.0/24", "fd42::/64"], &["192.0.2.1", "fd44::1"]));
        overlay.apply_node(&node("b", &["10.42.1.0/24", "fd42:0:0:1::/64"], &["fd44::2", "192.0.2.2"]));
        overlay.apply_node(&node("c", &["10.42.2.0/24"], &["192.0.2.3"]));
        overlay.apply_node(&node("no-range", &[], &["192.0.2.4"]));
        overlay.apply_node(&node("other-family", &["10.42.5.0/24"], &["fd44::5"]));
        let mut devices = Devices::default();
        let rows: [(&[&str], &[&str]); 4] = [
            (&[], &[]),
            (&["10.42.0.1"], &["10.42.1.0/24 by 192.0.2.2", "10.42.2.0/24 by 192.0.2.3"]),
            (&["fd42::1"], &["fd42:0:0:1::/64 by 192.0.2.2"]),
            (
                &["10.42.0.1", "fd42::1"],
                &["10.42.1.0/24 fd42:0:0:1::/64 by 192.0.2.2", "10.42.2.0/24 by 192.0.2.3"],
            ),
        ];
        for (addresses, expected) in rows {
            devices.addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
            overlay.set_devices(&devices);
            assert_eq!(wanted(&overlay), expected, "{addresses:?}");
        }
    }

    #[test]
    fn hardware_addresses_follow_from_the_nodes_own() {
        assert_eq!(mac("10.44.0.2".parse().unwrap()).to_string(), "02:77:0a:2c:00:02");
        let macs: BTreeSet<_> =
            (2..=65_u16).map(|n| mac(IpAddr::from([0xfd44, 0, 0, 0, 0, 0, 0, n]))).collect();
        assert_eq!(macs.len(), 64, "the nodes of one machine all differ");
    }
}
