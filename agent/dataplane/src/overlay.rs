//! The overlay: a VXLAN device, and for every other node a route to its pods, a neighbour and a forwarding entry.
//!
//! The device learns nothing (RFC 7348 §4 allows a control plane instead): the Nodes in the API say where pods are, and the
//! hardware address of a node's end follows from the node's address, so nothing has to be published.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::Ipv4Network;
use k8s_openapi::api::core::v1::Node;
use weft_cni_netlink::{Class, Error, FdbEntry, Link, Mac, Neighbour, Netlink, Route, Vxlan};

use crate::OVERLAY;
use crate::node::Devices;

/// VXLAN network identifier.
pub const VNI: u32 = 4_242;
/// UDP port of the kernel's VXLAN (RFC 7348's 4789 is left to others on the node).
pub const PORT: u16 = 8_472;
/// What VXLAN adds to a packet over IPv4 (RFC 7348 §5).
const OVERHEAD_BYTES: u32 = 50;
/// MTU if the underlay's device is not found.
const DEFAULT_MTU_BYTES: u32 = 1_500;

/// Another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// Addresses of its pods.
    pub pods: Ipv4Network,
    /// Its own address.
    pub address: Ipv4Addr,
}

/// The hardware address of a node's end: locally administered, and the node's address.
#[must_use]
pub fn mac(node: Ipv4Addr) -> Mac {
    let [a, b, c, d] = node.octets();
    Mac([0x02, 0x77, a, b, c, d])
}

/// What other nodes need, and what is in the kernel.
#[derive(Debug)]
pub struct Overlay {
    node_name: String,
    node_ip: Ipv4Addr,
    /// Peers by the name of their Node; the node's own is in it.
    nodes: BTreeMap<String, Peer>,
    addresses: BTreeSet<Ipv4Addr>,
    /// Number of the device that `applied` is about.
    index: u32,
    applied: BTreeSet<Peer>,
    /// What an earlier agent left is looked through once.
    pruned: bool,
    dirty: bool,
}

impl Overlay {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(node_name: String, node_ip: Ipv4Addr) -> Self {
        Self {
            node_name,
            node_ip,
            nodes: BTreeMap::new(),
            addresses: BTreeSet::new(),
            index: 0,
            applied: BTreeSet::new(),
            pruned: false,
            dirty: true,
        }
    }

    /// Enters a Node.
    pub fn apply_node(&mut self, node: &Node) {
        let Some(name) = node.metadata.name.clone() else { return };
        let before = match peer(node) {
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
        if devices.overlay != self.index && self.index != 0 {
            self.index = 0;
            self.applied.clear();
            self.dirty = true;
        }
    }

    /// Whether the kernel lags behind.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// The address that the node uses towards pods: the bridge's, the first of the node's own range. It must lie
    /// in that range, or answers would not come back through the overlay.
    fn source(&self) -> Option<Ipv4Addr> {
        let own = self.nodes.get(&self.node_name)?;
        let gateway = Ipv4Addr::from(u32::from(own.pods.network()) + 1);
        self.addresses.contains(&gateway).then_some(gateway)
    }

    /// Peers that should be reachable: none while the node has no address to reach them from.
    fn wanted(&self) -> BTreeSet<Peer> {
        if self.source().is_none() {
            return BTreeSet::new();
        }
        let others = self.nodes.iter().filter(|(name, _)| **name != self.node_name);
        others.map(|(_, peer)| *peer).filter(|peer| peer.address != self.node_ip).collect()
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
        if device.index != self.index {
            self.index = device.index;
            self.applied.clear();
            self.pruned = false;
        }
        let mut result = Ok(());
        for peer in self.applied.difference(&wanted).copied().collect::<Vec<_>>() {
            match self.remove(&mut netlink, &peer, &wanted) {
                Ok(()) => drop(self.applied.remove(&peer)),
                Err(error) => result = Err(error),
            }
        }
        for peer in wanted.difference(&self.applied).copied().collect::<Vec<_>>() {
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
        let underlay = netlink.addresses()?.into_iter().find(|a| a.network.ip() == IpAddr::V4(self.node_ip));
        let links = netlink.links()?;
        let underlay = underlay.and_then(|a| links.into_iter().find(|link| link.index == a.index));
        let mtu_bytes =
            underlay.map_or(DEFAULT_MTU_BYTES, |link| link.mtu_bytes).saturating_sub(OVERHEAD_BYTES);
        netlink.create_vxlan(&Vxlan {
            name: OVERLAY,
            vni: VNI,
            port: PORT,
            local: self.node_ip,
            mac: mac(self.node_ip),
            mtu_bytes,
        })?;
        netlink.link(OVERLAY)
    }

    fn entries(&self, peer: &Peer) -> (Route, Neighbour, FdbEntry) {
        let gateway = IpAddr::V4(peer.pods.network());
        let mut route = Route::new(peer.pods.into(), self.index);
        route.gateway = Some(gateway);
        route.onlink = true;
        route.source = self.source().map(IpAddr::V4);
        let mac = mac(peer.address);
        (
            route,
            Neighbour { index: self.index, address: gateway, mac },
            FdbEntry { index: self.index, mac, remote: peer.address },
        )
    }

    /// The route last: a packet that takes it finds the rest.
    fn put(&self, netlink: &mut Netlink, peer: &Peer) -> Result<(), Error> {
        let (route, neighbour, fdb) = self.entries(peer);
        netlink.put_fdb(&fdb)?;
        netlink.put_neighbour(&neighbour)?;
        netlink.put_route(&route)
    }

    /// Leaves what another peer needs: a node may come back with another range, or its range go to another node.
    fn remove(&self, netlink: &mut Netlink, peer: &Peer, wanted: &BTreeSet<Peer>) -> Result<(), Error> {
        let (mut route, neighbour, fdb) = self.entries(peer);
        if !wanted.iter().any(|w| w.pods == peer.pods) {
            // Without a source it matches whatever the route was made with.
            route.source = None;
            netlink.delete_route(&route)?;
            netlink.delete_neighbour(&neighbour)?;
        }
        if !wanted.iter().any(|w| w.address == peer.address) {
            netlink.delete_fdb(&fdb)?;
        }
        Ok(())
    }

    fn prune(&self, netlink: &mut Netlink, wanted: &BTreeSet<Peer>) -> Result<(), Error> {
        let wanted: Vec<_> = wanted.iter().map(|peer| self.entries(peer)).collect();
        for route in netlink.routes()?.into_iter().filter(|r| r.index == self.index) {
            let ours = matches!(route.destination, ipnetwork::IpNetwork::V4(_)) && route.gateway.is_some();
            if ours && !wanted.iter().any(|(r, ..)| r.destination == route.destination) {
                netlink.delete_route(&route)?;
            }
        }
        for neighbour in netlink.neighbours(self.index)? {
            if !wanted.iter().any(|(_, n, _)| *n == neighbour) {
                netlink.delete_neighbour(&neighbour)?;
            }
        }
        for entry in netlink.fdb(self.index)? {
            if !wanted.iter().any(|(.., f)| *f == entry) {
                netlink.delete_fdb(&entry)?;
            }
        }
        Ok(())
    }
}

/// `None` while the Node has no range or no address.
fn peer(node: &Node) -> Option<Peer> {
    let spec = node.spec.as_ref()?;
    let ranges = spec.pod_cidrs.iter().flatten().map(String::as_str).chain(spec.pod_cidr.as_deref());
    let pods = ranges.filter_map(|range| range.parse::<Ipv4Network>().ok()).next()?;
    let addresses = node.status.as_ref()?.addresses.iter().flatten();
    let internal =
        addresses.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).next()?;
    Some(Peer { pods, address: internal })
}
