//! Which way packets to a peer's pods take: by a tunnel, or straight over a link that both nodes are on.
//!
//! ```text
//! metric        first (0, of IPv6 1024)      second (4096)
//! tunnel only   range via tunnel             -
//! proven        range via node dev uplink    range via tunnel
//! on trial      range via tunnel             range via node dev uplink
//! ```
//!
//! The second is what the kernel falls back to by itself when it takes the first away with its device, what a flow takes that
//! began by the other way and holds its device, and what a trial packet takes that names its device.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use weft_cni_netlink::{Destined, Error, FdbEntry, Link, Neighbour, NeighbourChange, Netlink, Route};

use super::peer::{Peer, link_local, mac, overhead_bytes};
use super::width::{First, Ways, Widths};

/// Marks the routes as the overlay's: they are told from an administrator's, and outlive no node.
pub(super) const PROTOCOL: u8 = 119;
/// Metric of the second route to a range: behind the kernel's own for IPv6, 1024.
const SECOND: u32 = 4_096;
/// No link of IPv6 is narrower (RFC 8200 §5).
const IPV6_LEAST_MTU_BYTES: u32 = 1_280;

/// How packets get to pods of nodes that are on a link of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Routing {
    /// By a plain route where packets with pods' addresses are seen to get there, else by the tunnel.
    Auto,
    /// By the tunnel.
    #[default]
    Tunnel,
    /// By a plain route, unseen.
    Native,
}

impl std::str::FromStr for Routing {
    type Err = UnknownRouting;

    fn from_str(text: &str) -> Result<Self, UnknownRouting> {
        match text {
            "auto" => Ok(Self::Auto),
            "tunnel" => Ok(Self::Tunnel),
            "native" => Ok(Self::Native),
            _ => Err(UnknownRouting),
        }
    }
}

impl std::fmt::Display for Routing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Tunnel => "tunnel",
            Self::Native => "native",
        })
    }
}

/// It is none of `auto`, `tunnel` and `native`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("neither auto nor tunnel nor native")]
pub struct UnknownRouting;

/// A peer's address on a link of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hop {
    pub(super) index: u32,
    address: IpAddr,
    /// If the route to the address says one.
    mtu_bytes: Option<u32>,
    /// Of the link.
    link_mtu_bytes: u32,
}

impl Hop {
    /// The largest packet that gets there.
    pub(super) fn takes_bytes(&self) -> u32 {
        self.mtu_bytes.unwrap_or(self.link_mtu_bytes)
    }
}

/// What the kernel knows of the ways to a peer's own addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ground {
    /// The device that tunnel packets leave by; 0 for none.
    underlay: u32,
    /// What fits into a tunnel packet.
    within_bytes: Option<u32>,
    hops: Vec<Hop>,
    /// How the ways that packets may take begin.
    firsts: Ways,
}

impl Ground {
    /// Asks the kernel; `found` is what was measured.
    pub(super) fn find(
        netlink: &mut Netlink,
        peer: &Peer,
        links: &BTreeMap<u32, Link>,
        (overlay, found): (u32, &Widths),
    ) -> Result<Self, Error> {
        let mut ground = Self::default();
        for router in &peer.routers {
            let Some(way) = netlink.route_to(*router)? else { continue };
            let link = links.get(&way.index);
            // What the kernel has learned of a way by an ICMP error it will forget, and say so to nobody. Measuring finds it too.
            let set_bytes = way.mtu_bytes.filter(|_| !way.learned);
            let mtu_bytes = found.get(router).copied().into_iter().chain(set_bytes).min();
            if *router == peer.address {
                ground.underlay = way.index;
                let narrowest = mtu_bytes.into_iter().chain(link.map(|link| link.mtu_bytes)).min();
                ground.within_bytes = narrowest.map(|mtu| mtu.saturating_sub(overhead_bytes(*router)));
            }
            let Some(link) = link.filter(|_| !way.local) else { continue };
            let is_near = is_on_link(&way, link, overlay);
            if is_near {
                ground.hops.push(Hop {
                    index: way.index,
                    address: *router,
                    mtu_bytes,
                    link_mtu_bytes: link.mtu_bytes,
                });
            }
            if is_near || *router == peer.address {
                let takes_bytes = set_bytes.unwrap_or(u32::MAX).min(link.mtu_bytes);
                let first =
                    First { device: way.index, gateway: way.gateway, takes_bytes, believed_bytes: None };
                ground.firsts.insert(*router, first);
            }
        }
        Ok(ground)
    }
}

/// Ethernet only: a WireGuard device or another point-to-point tunnel takes no addresses that it wasn't told of.
fn is_on_link(way: &Destined, link: &Link, overlay: u32) -> bool {
    let ethernet = link.mac.is_some() && !link.loopback;
    !way.local && way.gateway.is_none() && way.index != overlay && ethernet
}

/// What of this node decides on the ways to all peers.
#[derive(Debug)]
pub(super) struct Local<'a> {
    pub(super) routing: Routing,
    /// Ranges whose trial packets come through.
    pub(super) proven: &'a BTreeSet<IpNetwork>,
    /// The tunnels' device.
    pub(super) index: u32,
    pub(super) mtu_bytes: u32,
    /// Addresses to send from, by whether the family is IPv6.
    pub(super) sources: [Option<IpAddr>; 2],
}

/// What the kernel must have for a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entries {
    pub(super) ranges: Vec<Range>,
    pub(super) fdb: FdbEntry,
    /// What the narrowest way takes, if that is less than its device does.
    pub(super) narrow_bytes: Option<u32>,
    pub(super) underlay: u32,
    /// The ways that packets take or may turn to.
    pub(super) firsts: Ways,
}

/// What the kernel must have for one range of a peer's pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: Route,
    pub(super) second: Option<Route>,
    /// That the way through the tunnel leads to.
    pub(super) neighbour: Neighbour,
    pub(super) hop: Option<Hop>,
}

impl Range {
    /// The device of the link that packets go by, past the tunnel.
    pub(super) fn native(&self) -> Option<u32> {
        self.hop.map(|hop| hop.index).filter(|index| *index == self.first.index)
    }

    fn routes(&self) -> impl Iterator<Item = &Route> {
        std::iter::once(&self.first).chain(&self.second)
    }
}

/// Decides.
pub(super) fn entries(peer: &Peer, ground: &Ground, local: &Local<'_>) -> Entries {
    let index = local.index;
    // On a narrow way the kernel would send tunnel packets in fragments; told of it, it tells the pods.
    let narrow_bytes = ground.within_bytes.filter(|mtu| *mtu < local.mtu_bytes);
    let by_link = ground.hops.iter().filter_map(|hop| hop.mtu_bytes);
    let range = |range: &IpNetwork| {
        let (gateway, v6) = (tunnel_gateway(peer, *range), range.is_ipv6());
        let mut tunnel = Route::new(*range, index);
        tunnel.gateway = Some(gateway);
        tunnel.onlink = true;
        tunnel.source = local.sources[usize::from(v6)];
        tunnel.protocol = PROTOCOL;
        let least = if v6 { IPV6_LEAST_MTU_BYTES } else { 0 };
        tunnel.mtu_bytes = narrow_bytes.map(|mtu| mtu.max(least));
        let hop = ground.hops.iter().find(|hop| hop.address.is_ipv6() == v6).copied();
        let native = hop.map(|hop| Route {
            gateway: Some(hop.address),
            index: hop.index,
            mtu_bytes: hop.mtu_bytes,
            ..tunnel
        });
        let (first, second) = match (local.routing, native) {
            (Routing::Tunnel, _) | (_, None) => (tunnel, None),
            (Routing::Auto, Some(native)) if !local.proven.contains(range) => (tunnel, Some(native)),
            (Routing::Auto | Routing::Native, Some(native)) => (native, Some(tunnel)),
        };
        let second = second.map(|route| Route { metric: SECOND, ..route });
        let neighbour = Neighbour { index, address: gateway, mac: mac(peer.address) };
        Range { first, second, neighbour, hop }
    };
    Entries {
        ranges: peer.pods.iter().map(range).collect(),
        fdb: FdbEntry { index, mac: mac(peer.address), remote: peer.address },
        narrow_bytes: narrow_bytes.into_iter().chain(by_link).min(),
        underlay: ground.underlay,
        firsts: ground
            .firsts
            .iter()
            .filter(|(router, _)| **router == peer.address || local.routing != Routing::Tunnel)
            .map(|(router, first)| (*router, *first))
            .collect(),
    }
}

/// What a tunnel's route leads to. Of IPv6 it must not lie in the range: while a plain route leads there, the kernel would refuse a
/// router of that address behind another device (`ip6_route_check_nh_onlink`).
fn tunnel_gateway(peer: &Peer, range: IpNetwork) -> IpAddr {
    if range.is_ipv6() { link_local(mac(peer.address)).into() } else { range.network() }
}

impl Entries {
    /// Whether a device carries packets to the peer, in tunnels or without.
    pub(super) fn use_device(&self, index: u32) -> bool {
        self.underlay == index
            || self.ranges.iter().any(|range| range.hop.is_some_and(|hop| hop.index == index))
    }

    /// Whether a route that was put or went is not as it should be. What the overlay itself puts is.
    pub(super) fn broken_by_route(&self, route: &Route, gone: bool) -> bool {
        let Some(range) = self.ranges.iter().find(|range| range.first.destination == route.destination)
        else {
            return false;
        };
        // Another route to the same pods may go as it came: ours is there all the while.
        range.routes().any(|ours| same(ours, route)) == gone
    }

    /// Whether a neighbour or forwarding entry is gone or leads elsewhere.
    pub(super) fn broken_by_neighbour(&self, change: &NeighbourChange) -> bool {
        if change.forwarding {
            let ours = change.mac == Some(self.fdb.mac);
            return ours && (change.gone || change.address != Some(self.fdb.remote));
        }
        let Some(range) = self.ranges.iter().find(|range| Some(range.neighbour.address) == change.address)
        else {
            return false;
        };
        change.gone || change.mac != Some(range.neighbour.mac)
    }
}

/// Whether two routes of one destination are one to the kernel, which tells of routes without all that they were put with.
pub(super) fn same(ours: &Route, told: &Route) -> bool {
    let metric = |route: &Route| match (route.metric, route.destination.is_ipv6()) {
        (0, true) => 1_024,
        (metric, _) => metric,
    };
    (ours.destination, ours.index, ours.gateway) == (told.destination, told.index, told.gateway)
        && metric(ours) == metric(told)
}
