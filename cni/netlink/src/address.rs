//! Addresses of devices.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::error::{ok_if_exists, ok_if_gone};
use crate::socket::About;
use crate::{Error, Netlink};

/// `RTNLGRP_IPV6_ROUTE`.
const IPV6_ROUTES: u32 = 11;

/// An address as found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The device's number.
    pub index: u32,
    /// Address and prefix length.
    pub network: IpNetwork,
    /// Whether it may be used beyond this host and its links.
    pub global: bool,
    /// Whether it can be told to others: not a temporary address of IPv6 (RFC 8981), nor one that is about to go or not sure yet.
    pub lasting: bool,
}

impl Netlink {
    /// All addresses of the namespace.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn addresses(&mut self) -> Result<Vec<Address>, Error> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump("list the addresses", &request, |message| match message {
            RouteNetlinkMessage::NewAddress(message) => read(&message),
            _ => None,
        })
    }

    /// All addresses of another namespace, by the number that this one has for it (Linux 4.20 on). Afterwards the socket checks
    /// requests strictly.
    ///
    /// # Errors
    /// If there is no such namespace (any more), or the kernel is older.
    pub fn addresses_of(&mut self, namespace: i32) -> Result<Vec<Address>, Error> {
        let op = "list the addresses of a namespace";
        // Without it the kernel overlooks the attribute, and answers for this namespace.
        self.check_strictly().map_err(|source| Error::Socket { op, source })?;
        let mut message = AddressMessage::default();
        message.attributes = vec![AddressAttribute::TargetNetNsId(namespace)];
        self.dump(op, &RouteNetlinkMessage::GetAddress(message), |message| match message {
            RouteNetlinkMessage::NewAddress(message) => read(&message),
            _ => None,
        })
    }

    /// Gives a device an address, and waits until packets to it are taken. One that it has already is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn add_address(&mut self, index: u32, network: IpNetwork) -> Result<(), Error> {
        let subject = network.to_string();
        let about = About { op: "add the address", subject: &subject };
        let message = RouteNetlinkMessage::NewAddress(message(index, network));
        ok_if_exists(self.request(about, message, NLM_F_CREATE | NLM_F_EXCL))?;
        self.await_address(network)
    }

    /// Waits until packets to an address that was just given to a device are taken.
    ///
    /// # Errors
    /// If the kernel takes none for seconds.
    pub fn await_address(&mut self, network: IpNetwork) -> Result<(), Error> {
        if network.is_ipv4() {
            return Ok(());
        }
        let subject = network.to_string();
        // The kernel puts the route that makes an IPv6 address its own in the background, although nothing has to be detected.
        let about = About { op: "wait for the address", subject: &subject };
        self.until(about, IPV6_ROUTES, |netlink| netlink.is_local(network.ip()))
    }

    /// Takes an address from a device. One that it doesn't have is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_address(&mut self, index: u32, network: IpNetwork) -> Result<(), Error> {
        let subject = network.to_string();
        let about = About { op: "delete the address", subject: &subject };
        ok_if_gone(self.request(about, RouteNetlinkMessage::DelAddress(message(index, network)), 0))
    }
}

pub(crate) fn message(index: u32, network: IpNetwork) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = network.prefix();
    message.header.family = match network {
        IpNetwork::V4(_) => AddressFamily::Inet,
        IpNetwork::V6(_) => AddressFamily::Inet6,
    };
    if network.is_ipv6() {
        // Nobody else can have it: the delay of duplicate address detection would be for nothing.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes = vec![AddressAttribute::Local(network.ip()), AddressAttribute::Address(network.ip())];
    message
}

pub(crate) fn read(message: &AddressMessage) -> Option<Address> {
    let mut address: Option<IpAddr> = None;
    for attribute in &message.attributes {
        match attribute {
            // On IPv4, `Address` is the peer's on a point-to-point link; `Local` is ours.
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) => address = address.or(Some(*other)),
            _ => {}
        }
    }
    // The flag of a temporary address of IPv6 is that of a secondary one of IPv4, which lasts.
    let unsure =
        AddressHeaderFlags::Deprecated | AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
    let flags = message.header.flags;
    let temporary =
        message.header.family == AddressFamily::Inet6 && flags.contains(AddressHeaderFlags::Secondary);
    Some(Address {
        lasting: !temporary && !flags.intersects(unsure),
        index: message.header.index,
        network: IpNetwork::new(address?, message.header.prefix_len).ok()?,
        global: message.header.scope == AddressScope::Universe,
    })
}
