//! Routes of the main table.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use nix::errno::Errno;

use crate::error::ok_if_gone;
use crate::socket::About;
use crate::{Error, Netlink};

/// A route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to; prefix length 0 is the default route.
    pub destination: IpNetwork,
    /// Through this router.
    pub gateway: Option<IpAddr>,
    /// Out of this device.
    pub index: u32,
    /// Address to send from.
    pub source: Option<IpAddr>,
    /// The router is on the link even if no address says so.
    pub onlink: bool,
    /// Largest packet in bytes on this route.
    pub mtu_bytes: Option<u32>,
    /// Of routes to one destination the least is taken; 0 leaves it to the kernel, which makes it 0 of IPv4 and 1024 of IPv6.
    pub metric: u32,
    /// Who put it: a number of `rtnetlink(7)`, or one of 5 to 255 that a program has given itself.
    pub protocol: u8,
}

/// An administrator's routes.
const STATIC: u8 = 4;

impl Route {
    /// A route to a destination out of a device, with nothing else said.
    pub fn new(destination: IpNetwork, index: u32) -> Self {
        Self {
            destination,
            gateway: None,
            index,
            source: None,
            onlink: false,
            mtu_bytes: None,
            metric: 0,
            protocol: STATIC,
        }
    }
}

impl Netlink {
    /// Puts a route, in place of one to the same destination.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn put_route(&mut self, route: &Route) -> Result<(), Error> {
        let subject = route.destination.to_string();
        let about = About { op: "put the route to", subject: &subject };
        self.request(about, RouteNetlinkMessage::NewRoute(message(route)), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes a route. One that is gone is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_route(&mut self, route: &Route) -> Result<(), Error> {
        let subject = route.destination.to_string();
        let about = About { op: "delete the route to", subject: &subject };
        ok_if_gone(self.request(about, RouteNetlinkMessage::DelRoute(message(route)), 0))
    }

    /// The number of the device by which an address is reached.
    ///
    /// # Errors
    /// If no route leads there.
    pub fn device_towards(&mut self, address: IpAddr) -> Result<u32, Error> {
        let route = self.route_towards(address)?;
        let index = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
        let op = "find the route to an address";
        index.ok_or_else(|| Error::Decode { op, reason: "no device".to_owned() })
    }

    /// Whether packets to an address are taken as the host's own.
    pub(crate) fn is_local(&mut self, address: IpAddr) -> Result<bool, Error> {
        match self.route_towards(address) {
            Ok(route) => Ok(route.header.kind == RouteType::Local),
            Err(Error::Refused { errno: Errno::ENETUNREACH | Errno::EHOSTUNREACH, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn route_towards(&mut self, address: IpAddr) -> Result<RouteMessage, Error> {
        let mut message = RouteMessage::default();
        let host = IpNetwork::from(address);
        message.header.address_family = family(host);
        message.header.destination_prefix_length = host.prefix();
        message.attributes.push(RouteAttribute::Destination(address.into()));
        let subject = address.to_string();
        let about = About { op: "find the route to", subject: &subject };
        match self.get(about, RouteNetlinkMessage::GetRoute(message))? {
            RouteNetlinkMessage::NewRoute(message) => Ok(message),
            _ => Err(Error::Decode { op: about.op, reason: "no route".to_owned() }),
        }
    }

    /// The unicast routes of the main table.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn routes(&mut self) -> Result<Vec<Route>, Error> {
        let request = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        self.dump("list the routes", &request, |message| match message {
            RouteNetlinkMessage::NewRoute(message) => read(&message),
            _ => None,
        })
    }
}

pub(crate) fn message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let on_the_link = route.gateway.is_none();
    message.header = RouteHeader {
        address_family: family(route.destination),
        destination_prefix_length: route.destination.prefix(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::from(route.protocol),
        scope: if on_the_link { RouteScope::Link } else { RouteScope::Universe },
        kind: RouteType::Unicast,
        flags: if route.onlink { RouteFlags::Onlink } else { RouteFlags::empty() },
        ..RouteHeader::default()
    };
    if route.destination.prefix() > 0 {
        message.attributes.push(RouteAttribute::Destination(route.destination.network().into()));
    }
    message.attributes.extend(route.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
    message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    message.attributes.push(RouteAttribute::Oif(route.index));
    if route.metric > 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    message
        .attributes
        .extend(route.mtu_bytes.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    message
}

pub(crate) fn family(network: IpNetwork) -> AddressFamily {
    match network {
        IpNetwork::V4(_) => AddressFamily::Inet,
        IpNetwork::V6(_) => AddressFamily::Inet6,
    }
}

pub(crate) fn read(message: &RouteMessage) -> Option<Route> {
    let main =
        message.header.table == RouteHeader::RT_TABLE_MAIN && message.header.kind == RouteType::Unicast;
    if !main {
        return None;
    }
    let any = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let mut destination = any;
    let mut route = Route::new(IpNetwork::from(any), 0);
    route.onlink = message.header.flags.contains(RouteFlags::Onlink);
    route.protocol = message.header.protocol.into();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Oif(index) => route.index = *index,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu_bytes = Some(*mtu);
                    }
                }
            }
            _ => {}
        }
    }
    route.destination = IpNetwork::new(destination, message.header.destination_prefix_length).ok()?;
    Some(route)
}

pub(crate) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
