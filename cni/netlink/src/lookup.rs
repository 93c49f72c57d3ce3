//! Which route the kernel would take.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType,
};
use nix::errno::Errno;

use crate::route::{family, ip};
use crate::socket::About;
use crate::{Error, Netlink};

/// The route of an address, resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destined {
    /// The address is the namespace's own.
    pub local: bool,
    /// Out of this device.
    pub index: u32,
    /// Through this router.
    pub gateway: Option<IpAddr>,
    /// From this address.
    pub source: Option<IpAddr>,
    /// Largest packet in bytes, if the route says one.
    pub mtu_bytes: Option<u32>,
    /// The kernel has learned that size from an ICMP error, and will forget it.
    pub learned: bool,
}

impl Netlink {
    /// The route that the kernel would take to an address; `None` if it has none, or one that refuses.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn route_to(&mut self, address: IpAddr) -> Result<Option<Destined>, Error> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(IpNetwork::from(address));
        message.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(address)));
        let subject = address.to_string();
        let about = About { op: "find the route to", subject: &subject };
        match self.get(about, RouteNetlinkMessage::GetRoute(message)) {
            Ok(RouteNetlinkMessage::NewRoute(message)) => Ok(read(&message)),
            Ok(_) => Ok(None),
            Err(Error::Refused { errno, .. }) if refuses(errno) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// No route, or one of type unreachable, prohibit or blackhole.
fn refuses(errno: Errno) -> bool {
    [Errno::ENETUNREACH, Errno::EHOSTUNREACH, Errno::EACCES, Errno::EINVAL].contains(&errno)
}

pub(crate) fn read(message: &RouteMessage) -> Option<Destined> {
    let local = match message.header.kind {
        RouteType::Local => true,
        RouteType::Unicast => false,
        _ => return None,
    };
    let mut found =
        Destined { local, index: 0, gateway: None, source: None, mtu_bytes: None, learned: false };
    // Of IPv6 a router's announcement may make a route that expires; what the kernel makes itself is a copy.
    let copied = message.header.flags.contains(RouteFlags::Cloned);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Gateway(address) => found.gateway = ip(address),
            RouteAttribute::PrefSource(address) => found.source = ip(address),
            RouteAttribute::Oif(index) => found.index = *index,
            RouteAttribute::CacheInfo(info) => found.learned = copied && info.expires != 0,
            RouteAttribute::Metrics(metrics) => {
                let mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                found.mtu_bytes = mtu.or(found.mtu_bytes);
            }
            _ => {}
        }
    }
    Some(found)
}
