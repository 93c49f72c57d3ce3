//! The overlay: a VXLAN device, and for every other node routes to its pods, neighbours and a forwarding entry.
//!
//! The device learns nothing (RFC 7348 §4 allows a control plane instead): the Nodes in the API say where pods are, and the
//! hardware address of a node's end follows from the node's address, so nothing has to be published. Tunnels are of one
//! family (IPv4 wherever nodes have it) and carry the pods' packets of both. Nodes that are on a link of this one may be
//! reached without ([`Routing`]).

pub(crate) mod inquiry;
pub mod offload;
mod peer;
mod ranges;
mod tell;
pub mod trial;
mod tunnels;
mod ways;
pub mod width;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::Node;
use weft_cni_netlink::{Class, Error, Event, Link, LinkChange, Netlink, Route, Vxlan, sysctl};
use weft_ebpf_abi::TUNNEL_PORT;

use self::offload::{Broken, Finisher};
use self::ways::{Entries, Ground, Local, PROTOCOL, entries, same};
use self::width::Widths;
use crate::OVERLAY;
use crate::node::Devices;

pub use self::peer::{DIRECT_RETURN, DIRECT_RETURN_VERSION, Peer, mac, overhead_bytes};
pub use self::ranges::Ranges;
pub use self::tunnels::Tunnels;
pub use self::ways::{Routing, UnknownRouting};

/// VXLAN network identifier.
pub const VNI: u32 = 4_242;
/// UDP port of the tunnels.
pub const PORT: u16 = TUNNEL_PORT.get();
/// MTU if the underlay's device is not found.
const DEFAULT_MTU_BYTES: u32 = 1_500;

/// What other nodes need, and what is in the kernel.
#[derive(Debug)]
pub struct Overlay {
    node_name: String,
    node_ip: IpAddr,
    routing: Routing,
    /// Peers by the name of their Node; the node's own is in it.
    nodes: BTreeMap<String, Peer>,
    addresses: BTreeSet<IpAddr>,
    /// Ranges whose trial packets come through.
    proven: BTreeSet<IpNetwork>,
    /// What ways take that are narrower than they begin, by the other end.
    found: Widths,
    /// What the routes said of it that an earlier agent left, once they were read.
    adopted: Option<Widths>,
    /// A card that breaks checksums within tunnels.
    broken: Option<Broken>,
    /// Of the device of this number, which may be down now.
    finisher: (u32, Finisher),
    /// Number of the device that `applied` is about.
    index: u32,
    /// Its largest packet in bytes.
    mtu_bytes: u32,
    applied: BTreeMap<Peer, Entries>,
    /// Second routes that are in the kernel, whichever peer they were put for.
    seconds: BTreeMap<IpNetwork, Route>,
    /// What the ways to peers take that are narrower than the device, by the peer's address.
    narrow: BTreeMap<IpAddr, u32>,
    /// What an earlier agent left is looked through once.
    pruned: bool,
    dirty: bool,
}

impl Overlay {
    /// Nothing is known yet. `node_ip` is this node's end of the tunnels.
    #[must_use]
    pub fn new(node_name: String, node_ip: IpAddr, routing: Routing) -> Self {
        Self {
            node_name,
            node_ip,
            routing,
            nodes: BTreeMap::new(),
            addresses: BTreeSet::new(),
            proven: BTreeSet::new(),
            found: Widths::new(),
            adopted: None,
            broken: None,
            finisher: (0, Finisher::default()),
            index: 0,
            mtu_bytes: 0,
            applied: BTreeMap::new(),
            seconds: BTreeMap::new(),
            narrow: BTreeMap::new(),
            pruned: false,
            dirty: true,
        }
    }

    /// Enters a Node.
    pub fn apply_node(&mut self, node: &Node) {
        let Some(name) = node.metadata.name.clone() else { return };
        let before = match Peer::of(node, self.node_ip.is_ipv6()) {
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

    /// Takes in which ranges' trial packets come through.
    pub fn set_proven(&mut self, proven: BTreeSet<IpNetwork>) {
        let turned: BTreeSet<IpNetwork> = self.proven.symmetric_difference(&proven).copied().collect();
        self.proven = proven;
        self.look_again(|peer, _| peer.pods.iter().any(|range| turned.contains(range)));
    }

    /// Takes in what ways take that are narrower than they begin.
    pub fn set_found(&mut self, found: Widths) {
        let turned = width::turns(&self.found, &found);
        self.found = found;
        self.look_again(|peer, _| turned.iter().any(|(to, _)| peer.routers.contains(to)));
    }

    /// Takes in which card breaks checksums within tunnels: nothing is left to it any more.
    pub fn set_broken(&mut self, broken: Option<Broken>) {
        self.dirty |= broken != self.broken;
        self.broken = broken;
    }

    /// Takes in a change of the kernel's: what somebody else took away or replaced will be put again. What the overlay itself
    /// does contradicts nothing.
    pub fn observe(&mut self, event: &Event) {
        let overlay = self.index;
        match *event {
            Event::Lost => self.look_again(|_, _| true),
            // Its MTU may have changed; and the kernel drops the routes of one that is set down, and doesn't say so.
            Event::Link(index) if index != overlay => self.look_again(|_, entries| entries.use_device(index)),
            Event::Route { route: Some(route), gone } => self.look_again(|peer, entries| {
                // The way to the peer may be a wider or narrower one now, or lead over another link.
                (route.index != overlay && peer.is_within(route.destination))
                    || entries.broken_by_route(&route, gone)
            }),
            Event::Neighbour(change) if change.index == overlay => {
                self.look_again(|_, entries| entries.broken_by_neighbour(&change));
            }
            Event::Route { route: None, .. } | Event::Neighbour(_) | Event::Link(_) | Event::Address(_) => {}
        }
    }

    fn look_again(&mut self, at: impl Fn(&Peer, &Entries) -> bool) {
        let before = self.applied.len();
        self.applied.retain(|peer, entries| !at(peer, entries));
        if self.applied.len() != before {
            self.dirty = true;
            // A peer may be gone before it is looked at.
            self.pruned = false;
        }
    }

    /// Whether the kernel lags behind.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// The address that the node uses towards pods of a family: the bridge's, the first of the node's own range. It must lie
    /// in that range, or answers would not come back through the overlay.
    fn source(&self, v6: bool) -> Option<IpAddr> {
        let own = self.nodes.get(&self.node_name)?;
        let gateway = peer::first(*own.pods.iter().find(|range| range.is_ipv6() == v6)?);
        self.addresses.contains(&gateway).then_some(gateway)
    }

    fn local(&self) -> Local<'_> {
        Local {
            routing: self.routing,
            proven: &self.proven,
            index: self.index,
            mtu_bytes: self.mtu_bytes,
            sources: [self.source(false), self.source(true)],
        }
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
        let Some(device) = self.device(&mut netlink, !wanted.is_empty())? else {
            self.dirty = false;
            return Ok(());
        };
        if device.index != self.index {
            self.index = device.index;
            self.mtu_bytes = device.mtu_bytes;
            self.applied.clear();
            self.seconds.clear();
            self.pruned = false;
        }
        self.narrow.retain(|address, _| wanted.iter().any(|peer| peer.address == *address));
        self.adopt_widths(&mut netlink)?;
        let mut result = self.choose_finisher();
        let gone = self.applied.keys().filter(|peer| !wanted.contains(peer));
        for peer in gone.cloned().collect::<Vec<_>>() {
            match self.remove(&mut netlink, &peer, &wanted) {
                Ok(()) => drop(self.applied.remove(&peer)),
                Err(error) => result = Err(error),
            }
        }
        let missing: Vec<Peer> =
            wanted.iter().filter(|peer| !self.applied.contains_key(peer)).cloned().collect();
        if !missing.is_empty() {
            if self.routing != Routing::Tunnel {
                self.take_by_either_way(&mut netlink)?;
            }
            let links = netlink.links()?.into_iter().map(|link| (link.index, link)).collect();
            for peer in missing {
                match self.put(&mut netlink, &peer, &links) {
                    Ok(entries) => drop(self.applied.insert(peer, entries)),
                    Err(error) => result = Err(error),
                }
            }
        }
        // Half of what is wanted would take the rest for somebody's that is gone.
        if !self.pruned && result.is_ok() {
            self.prune(&mut netlink)?;
            self.pruned = true;
        }
        self.dirty = result.is_err();
        result
    }

    /// What an earlier agent has measured holds until there is better.
    fn adopt_widths(&mut self, netlink: &mut Netlink) -> Result<(), Error> {
        if self.adopted.is_some() {
            return Ok(());
        }
        let routes = netlink.routes()?;
        let by_tunnel = routes.iter().filter(|route| route.index == self.index && self.is_own(route));
        let widths = by_tunnel.filter_map(|route| {
            let mut peers = self.nodes.values();
            let peer = peers.find(|peer| peer.pods.contains(&route.destination))?;
            Some((peer.address, route.mtu_bytes?.saturating_add(overhead_bytes(peer.address))))
        });
        let adopted: Widths = widths.collect();
        self.found.clone_from(&adopted);
        self.adopted = Some(adopted);
        Ok(())
    }

    /// Leaves checksums to the card, or not.
    fn choose_finisher(&mut self) -> Result<(), Error> {
        if self.finisher.0 != self.index {
            self.finisher = (self.index, Finisher::of_device()?);
        }
        let broken = self.broken.is_some_and(|broken| broken.card.overlay == self.index);
        self.finisher.1.set(broken)
    }

    /// The tunnels' device, made where it is needed: a cluster of one node needs none.
    fn device(&self, netlink: &mut Netlink, needed: bool) -> Result<Option<Link>, Error> {
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
            None if !needed => return Ok(None),
            None => self.create(netlink)?,
        };
        if !device.up {
            netlink.change_link(device.index, &LinkChange { up: Some(true), ..LinkChange::default() })?;
        }
        Ok(Some(device))
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

    /// A peer may send by the tunnel what this node sends by the link. Of a device without an address the kernel refuses that even
    /// where it looks loosely (`fib_validate_source`); the address is what peers have as their router.
    fn take_by_either_way(&self, netlink: &mut Netlink) -> Result<(), Error> {
        let ranges = self.nodes.get(&self.node_name).into_iter().flat_map(|own| &own.pods);
        if let Some(range) = ranges.into_iter().find(|range| range.is_ipv4()) {
            netlink.add_address(self.index, range.network().into())?;
        }
        sysctl::loosen_reverse_path(OVERLAY)
    }

    /// The routes last: a packet that takes one finds the rest. Of the routes the second first: there is a way at any time.
    fn put(
        &mut self,
        netlink: &mut Netlink,
        peer: &Peer,
        links: &BTreeMap<u32, Link>,
    ) -> Result<Entries, Error> {
        let ground = Ground::find(netlink, peer, links, (self.index, &self.found))?;
        let entries = entries(peer, &ground, &self.local());
        match entries.narrow_bytes {
            Some(mtu) => drop(self.narrow.insert(peer.address, mtu)),
            None => drop(self.narrow.remove(&peer.address)),
        }
        netlink.put_fdb(&entries.fdb)?;
        for range in &entries.ranges {
            netlink.put_neighbour(&range.neighbour)?;
            let destination = range.first.destination;
            if let Some(second) = range.second {
                if let Some(link) = range.hop.and_then(|hop| links.get(&hop.index)) {
                    sysctl::loosen_reverse_path(&link.name)?;
                }
                netlink.put_route(&second)?;
                self.seconds.insert(destination, second);
            }
            netlink.put_route(&range.first)?;
            if range.second.is_none()
                && let Some(second) = self.seconds.get(&destination)
            {
                netlink.delete_route(second)?;
                self.seconds.remove(&destination);
            }
        }
        Ok(entries)
    }

    /// Leaves what another peer needs: a node may come back with other ranges, or its ranges go to another node.
    fn remove(&mut self, netlink: &mut Netlink, peer: &Peer, wanted: &BTreeSet<Peer>) -> Result<(), Error> {
        let Some(entries) = self.applied.get(peer) else { return Ok(()) };
        for range in &entries.ranges {
            let destination = range.first.destination;
            if wanted.iter().any(|w| w.pods.contains(&destination)) {
                continue;
            }
            // Without a source it matches whatever the route was made with.
            netlink.delete_route(&Route { source: None, ..range.first })?;
            if let Some(second) = self.seconds.get(&destination) {
                netlink.delete_route(second)?;
                self.seconds.remove(&destination);
            }
            netlink.delete_neighbour(&range.neighbour)?;
        }
        if !wanted.iter().any(|w| w.address == peer.address) {
            netlink.delete_fdb(&entries.fdb)?;
        }
        Ok(())
    }

    fn prune(&self, netlink: &mut Netlink) -> Result<(), Error> {
        let ranges = || self.applied.values().flat_map(|entries| &entries.ranges);
        for route in netlink.routes()?.into_iter().filter(|route| self.is_own(route)) {
            let mut wanted = ranges().flat_map(|range| std::iter::once(&range.first).chain(&range.second));
            if !wanted.any(|ours| same(ours, &route)) {
                netlink.delete_route(&route)?;
            }
        }
        for neighbour in netlink.neighbours(self.index)? {
            if !ranges().any(|range| range.neighbour == neighbour) {
                netlink.delete_neighbour(&neighbour)?;
            }
        }
        for entry in netlink.fdb(self.index)? {
            if !self.applied.values().any(|entries| entries.fdb == entry) {
                netlink.delete_fdb(&entry)?;
            }
        }
        Ok(())
    }

    /// Routes of earlier versions are known by their device alone.
    fn is_own(&self, route: &Route) -> bool {
        route.gateway.is_some() && (route.protocol == PROTOCOL || route.index == self.index)
    }
}

/// Removes the device and all routes, of the node of the calling thread's network namespace. What is gone already is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn cleanup() -> Result<(), Error> {
    let mut netlink = Netlink::open()?;
    netlink.delete_link_named(OVERLAY)?;
    let routes = netlink.routes()?.into_iter().filter(|route| route.protocol == PROTOCOL);
    routes.collect::<Vec<_>>().iter().try_for_each(|route| netlink.delete_route(route))
}

#[cfg(test)]
mod tests;
