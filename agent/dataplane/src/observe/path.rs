//! Which way a packet leaves the node, as the kernel's routes say.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use weft_cni_netlink::{Class, Destined, Link, Netlink};

use super::ObserveError;
use crate::OVERLAY;

/// How far the packet is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Way {
    /// It is the node's own address.
    Local,
    /// Out of a device.
    Device,
    /// There is no route, or one that refuses.
    None,
}

/// The way to an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Path {
    /// The address.
    pub to: IpAddr,
    /// How far.
    pub way: Way,
    /// The device, and its kind as the kernel names it.
    pub device: Option<String>,
    /// The router.
    pub gateway: Option<IpAddr>,
    /// The source address that the node would use.
    pub source: Option<IpAddr>,
    /// Largest packet in bytes, by the route or the device.
    pub mtu_bytes: Option<u32>,
    /// Whether the device carries packets.
    pub running: bool,
    /// For the overlay: the node that the packet goes to.
    pub tunnel: Option<IpAddr>,
    /// For the overlay: what is missing on the way into the tunnel.
    pub missing: Option<String>,
}

/// Asks the kernel of the current network namespace.
pub(crate) fn find(to: IpAddr) -> Result<Path, ObserveError> {
    let mut netlink = Netlink::open()?;
    let mut path = Path {
        to,
        way: Way::None,
        device: None,
        gateway: None,
        source: None,
        mtu_bytes: None,
        running: false,
        tunnel: None,
        missing: None,
    };
    let route = match netlink.route_to(to) {
        Ok(Some(route)) => route,
        Ok(None) => return Ok(path),
        Err(error) => return Err(error.into()),
    };
    path.way = if route.local { Way::Local } else { Way::Device };
    path.gateway = route.gateway;
    path.source = route.source;
    let links = netlink.links()?;
    let Some(listed) = links.iter().find(|link| link.index == route.index) else { return Ok(path) };
    // Asked for by name, the kernel works out at once whether it carries packets.
    let link = match netlink.link(&listed.name) {
        Ok(link) => link,
        Err(error) if error.class() == Class::NotFound => return Ok(path),
        Err(error) => return Err(error.into()),
    };
    path.mtu_bytes = Some(route.mtu_bytes.unwrap_or(link.mtu_bytes));
    path.running = link.running || link.loopback;
    path.device = Some(link.name.clone());
    if link.name == OVERLAY {
        tunnel(&mut netlink, &link, &route, &mut path)?;
    }
    Ok(path)
}

/// The overlay needs more than a route: the neighbour behind it, and the node that the neighbour is at.
fn tunnel(netlink: &mut Netlink, link: &Link, route: &Destined, path: &mut Path) -> Result<(), ObserveError> {
    let next = route.gateway.unwrap_or(path.to);
    let neighbour = netlink.neighbours(link.index)?.into_iter().find(|n| n.address == next);
    let Some(neighbour) = neighbour else {
        path.missing = Some(format!("no neighbour entry for {next} on {}", link.name));
        return Ok(());
    };
    match netlink.fdb(link.index)?.into_iter().find(|entry| entry.mac == neighbour.mac) {
        Some(entry) => path.tunnel = Some(entry.remote),
        None => {
            path.missing = Some(format!("no forwarding entry for {} on {}", neighbour.mac, link.name));
        }
    }
    Ok(())
}
