//! Neighbours (address to hardware address) and a VXLAN device's forwarding entries (hardware address to node).

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteType;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::error::ok_if_gone;
use crate::event::NeighbourChange;
use crate::socket::About;
use crate::{Error, Mac, Netlink};

/// A permanent neighbour of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Neighbour {
    /// The device's number.
    pub index: u32,
    /// Address.
    pub address: IpAddr,
    /// Hardware address.
    pub mac: Mac,
}

/// A permanent forwarding entry of a VXLAN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FdbEntry {
    /// The device's number.
    pub index: u32,
    /// Hardware address behind the tunnel.
    pub mac: Mac,
    /// The node at its other end.
    pub remote: IpAddr,
}

impl Netlink {
    /// Puts a neighbour, in place of what was known of the address.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn put_neighbour(&mut self, neighbour: &Neighbour) -> Result<(), Error> {
        let subject = neighbour.address.to_string();
        let about = About { op: "put the neighbour", subject: &subject };
        let message = RouteNetlinkMessage::NewNeighbour(neighbour_message(neighbour));
        self.request(about, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes a neighbour. One that is gone is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_neighbour(&mut self, neighbour: &Neighbour) -> Result<(), Error> {
        let subject = neighbour.address.to_string();
        let about = About { op: "delete the neighbour", subject: &subject };
        ok_if_gone(self.request(about, RouteNetlinkMessage::DelNeighbour(neighbour_message(neighbour)), 0))
    }

    /// The permanent neighbours of a device.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn neighbours(&mut self, index: u32) -> Result<Vec<Neighbour>, Error> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.dump("list the neighbours", &request, |message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => read_neighbour(&message, index),
            _ => None,
        })
    }

    /// Has the kernel answer on a device for an address that is not the device's own. One that it answers for already is no error.
    /// Of IPv6; [`sysctl::answer_for_proxies`](crate::sysctl::answer_for_proxies) lets it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn put_proxy(&mut self, index: u32, address: IpAddr) -> Result<(), Error> {
        let subject = address.to_string();
        let about = About { op: "answer for the address", subject: &subject };
        let message = RouteNetlinkMessage::NewNeighbour(proxy_message(index, address));
        self.request(about, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Has the kernel no longer answer for an address. One that it doesn't answer for is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_proxy(&mut self, index: u32, address: IpAddr) -> Result<(), Error> {
        let subject = address.to_string();
        let about = About { op: "no longer answer for the address", subject: &subject };
        ok_if_gone(self.request(about, RouteNetlinkMessage::DelNeighbour(proxy_message(index, address)), 0))
    }

    /// The addresses that the kernel answers for, each with the device's number.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn proxies(&mut self) -> Result<Vec<(u32, IpAddr)>, Error> {
        let mut message = NeighbourMessage::default();
        message.header.flags = NeighbourFlags::Proxy;
        let request = RouteNetlinkMessage::GetNeighbour(message);
        self.dump("list the addresses answered for", &request, |message| match message {
            RouteNetlinkMessage::NewNeighbour(message)
                if message.header.flags.contains(NeighbourFlags::Proxy) =>
            {
                Some((message.header.ifindex, destination(&message)?))
            }
            _ => None,
        })
    }

    /// Puts a forwarding entry, in place of one for the same hardware address.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn put_fdb(&mut self, entry: &FdbEntry) -> Result<(), Error> {
        let subject = entry.mac.to_string();
        let about = About { op: "put the forwarding entry of", subject: &subject };
        let message = RouteNetlinkMessage::NewNeighbour(fdb_message(entry));
        self.request(about, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes a forwarding entry. One that is gone is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_fdb(&mut self, entry: &FdbEntry) -> Result<(), Error> {
        let subject = entry.mac.to_string();
        let about = About { op: "delete the forwarding entry of", subject: &subject };
        ok_if_gone(self.request(about, RouteNetlinkMessage::DelNeighbour(fdb_message(entry)), 0))
    }

    /// The forwarding entries of a VXLAN device.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn fdb(&mut self, index: u32) -> Result<Vec<FdbEntry>, Error> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        let request = RouteNetlinkMessage::GetNeighbour(message);
        self.dump("list the forwarding entries", &request, |message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => read_fdb(&message, index),
            _ => None,
        })
    }
}

pub(crate) fn neighbour_message(neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address);
    message.header.ifindex = neighbour.index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour.address.into()),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.0.to_vec()),
    ];
    message
}

fn proxy_message(index: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Proxy;
    message.attributes = vec![NeighbourAttribute::Destination(address.into())];
    message
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn fdb_message(entry: &FdbEntry) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = entry.index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(entry.mac.0.to_vec()),
        NeighbourAttribute::Destination(entry.remote.into()),
    ];
    message
}

pub(crate) fn read_neighbour(message: &NeighbourMessage, index: u32) -> Option<Neighbour> {
    let ours = message.header.ifindex == index && message.header.state == NeighbourState::Permanent;
    if !ours || !matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6) {
        return None;
    }
    Some(Neighbour { index, address: destination(message)?, mac: mac(message)? })
}

pub(crate) fn read_fdb(message: &NeighbourMessage, index: u32) -> Option<FdbEntry> {
    if message.header.ifindex != index {
        return None;
    }
    Some(FdbEntry { index, mac: mac(message)?, remote: destination(message)? })
}

pub(crate) fn change(message: &NeighbourMessage, gone: bool) -> NeighbourChange {
    NeighbourChange {
        index: message.header.ifindex,
        forwarding: message.header.family == AddressFamily::Bridge,
        address: destination(message),
        mac: mac(message),
        gone,
    }
}

fn destination(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        // A bridge-family message carries the address as bytes.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            let bytes = bytes.as_slice();
            let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
        }
        _ => None,
    })
}

fn mac(message: &NeighbourMessage) -> Option<Mac> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok().map(Mac),
        _ => None,
    })
}
