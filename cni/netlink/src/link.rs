//! Network devices: bridges, veth pairs, VXLAN.

use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{
    DecodeError, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NetlinkDeserializable, NetlinkHeader, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridgePort, InfoData, InfoPortData, InfoPortKind,
    InfoVeth, LinkAttribute, LinkExtentMask, LinkInfo, LinkMessage,
};

use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

use crate::error::ok_if_gone;
use crate::socket::About;
use crate::{Class, Error, Mac, Netlink};

/// `struct ifinfomsg` of linux/rtnetlink.h: its length, and where the number and the flags are.
const HEADER_BYTES: usize = 16;
const INDEX_AT: usize = 4;
const FLAGS_AT: usize = 8;
/// `IF_OPER_UNKNOWN` and `IF_OPER_UP` of linux/if.h.
const OPERATES_UNKNOWN: u8 = 0;
const OPERATES: u8 = 6;

/// A device as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number in this namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address, if it has one of Ethernet.
    pub mac: Option<Mac>,
    /// Largest packet in bytes.
    pub mtu_bytes: u32,
    /// Whether it is set up.
    pub up: bool,
    /// Whether it carries packets: set up, and so is what it depends on (the other end, a port).
    ///
    /// The kernel works this out in the background, at times a second later. Since Linux 6.8, asking for one device
    /// ([`Netlink::link`]) makes it work it out at once.
    pub running: bool,
    /// Whether it is a loopback device.
    pub loopback: bool,
    /// The device (a bridge) that it belongs to.
    pub master: Option<u32>,
    /// Number of the other end of a pair, in the other end's namespace.
    pub peer_index: Option<u32>,
    /// The namespace of the other end of a pair, as this one numbers it (`ip netns list-id`).
    pub peer_namespace: Option<i32>,
    /// `bridge`, `veth`, `vxlan` …; empty for a physical device.
    pub kind: String,
    /// Kind of the queue that packets wait in before it sends them: `noqueue` if they don't.
    pub queue: String,
}

impl Link {
    /// Whether packets may wait before the device sends them, and so its rate may be bounded.
    #[must_use]
    pub fn is_queued(&self) -> bool {
        !matches!(self.queue.as_str(), "" | "noqueue")
    }
}

/// One end of a new veth pair.
#[derive(Clone, Debug)]
pub struct VethEnd<'a> {
    /// Name, at most 15 bytes.
    pub name: &'a str,
    /// Hardware address; the kernel's choice if `None`.
    pub mac: Option<Mac>,
    /// Largest packet in bytes.
    pub mtu_bytes: u32,
}

/// A new VXLAN device. It learns nothing: its entries are put by the caller.
#[derive(Clone, Debug)]
pub struct Vxlan<'a> {
    /// Name, at most 15 bytes.
    pub name: &'a str,
    /// Network identifier, 24 bits.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Address that tunnel packets are sent from; its family is the tunnels'.
    pub local: IpAddr,
    /// Hardware address.
    pub mac: Mac,
    /// Largest packet in bytes: the underlay's less 50, or less 70 over IPv6.
    pub mtu_bytes: u32,
}

/// What to change of a device; `None` stays as it is.
#[derive(Clone, Debug, Default)]
pub struct LinkChange<'a> {
    /// Set up or down.
    pub up: Option<bool>,
    /// Make it a port of this bridge; 0 takes it out.
    pub master: Option<u32>,
    /// Largest packet in bytes.
    pub mtu_bytes: Option<u32>,
    /// Hardware address.
    pub mac: Option<Mac>,
    /// New name.
    pub name: Option<&'a str>,
    /// Move it to this namespace.
    pub netns: Option<BorrowedFd<'a>>,
}

impl Netlink {
    /// All devices of the namespace.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.dump("list the devices", &request, |FoundLink(found)| found)
    }

    /// The device of a name.
    ///
    /// # Errors
    /// [`Class::NotFound`] if there is none.
    pub fn link(&mut self, name: &str) -> Result<Link, Error> {
        let about = About { op: "find the device", subject: name };
        let FoundLink(found) = self.get(about, RouteNetlinkMessage::GetLink(question(name)))?;
        found.ok_or_else(|| Error::Decode { op: about.op, reason: "not a device".to_owned() })
    }

    /// The device of a number.
    ///
    /// # Errors
    /// [`Class::NotFound`] if there is none.
    pub fn link_at(&mut self, index: u32) -> Result<Link, Error> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let subject = index.to_string();
        let about = About { op: "find the device", subject: &subject };
        let FoundLink(found) = self.get(about, RouteNetlinkMessage::GetLink(message))?;
        found.ok_or_else(|| Error::Decode { op: about.op, reason: "not a device".to_owned() })
    }

    /// The device of a number in another namespace, by the number that this one has for it ([`Link::peer_namespace`]).
    ///
    /// # Errors
    /// [`Class::NotFound`] if there is none.
    pub fn link_of(&mut self, namespace: i32, index: u32) -> Result<Link, Error> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::IfNetnsId(namespace));
        let subject = index.to_string();
        let about = About { op: "find the other end", subject: &subject };
        let FoundLink(found) = self.get(about, RouteNetlinkMessage::GetLink(message))?;
        found.ok_or_else(|| Error::Decode { op: about.op, reason: "not a device".to_owned() })
    }

    /// The bridge of a name, made and set up if it is missing.
    ///
    /// # Errors
    /// If it can't be made.
    pub fn ensure_bridge(&mut self, name: &str, mtu_bytes: u32) -> Result<Link, Error> {
        let bridge = LinkBridge::new(name).mtu(mtu_bytes).build();
        match self.create("create the bridge", name, bridge) {
            Err(error) if error.class() != Class::Exists => return Err(error),
            _ => {}
        }
        self.link(name)
    }

    /// Makes a veth pair: `host` here and up; `peer` down, in another namespace if one is given. The kernel refuses to set
    /// the peer up before it knows the other end (ENOTCONN).
    ///
    /// # Errors
    /// [`Class::Exists`] if either name is taken.
    pub fn create_veth(
        &mut self,
        host: &VethEnd<'_>,
        peer: &VethEnd<'_>,
        peer_netns: Option<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        self.create_veth_port(host, peer, peer_netns, None).map(|_| ())
    }

    /// The same, with the host's end a port of a bridge from the start. Answers the host's end, as it was before it became one;
    /// Linux before 6.1 doesn't say what it made.
    ///
    /// # Errors
    /// [`Class::Exists`] if either name is taken.
    pub fn create_veth_port(
        &mut self,
        host: &VethEnd<'_>,
        peer: &VethEnd<'_>,
        peer_netns: Option<BorrowedFd<'_>>,
        bridge: Option<u32>,
    ) -> Result<Option<Link>, Error> {
        let mut other = end(LinkUnspec::new_with_name(peer.name), peer);
        if bridge.is_some() {
            other = one_queue(other);
        }
        if let Some(netns) = peer_netns {
            other = other.setns_by_fd(netns.as_raw_fd());
        }
        let pair = end(LinkVeth::new(host.name, peer.name), host);
        let mut pair = pair.set_info_data(InfoData::Veth(InfoVeth::Peer(other.build())));
        if let Some(bridge) = bridge {
            pair = one_queue(pair.controller(bridge));
        }
        let echo = self.create("create the veth pair", host.name, pair.up().build())?;
        Ok(echo.into_iter().find(|link| link.name == host.name))
    }

    /// Makes a VXLAN device and sets it up.
    ///
    /// # Errors
    /// [`Class::Exists`] if the name, or the identifier and port, are taken.
    pub fn create_vxlan(&mut self, vxlan: &Vxlan<'_>) -> Result<(), Error> {
        let device = LinkVxlan::new(vxlan.name, vxlan.vni).port(vxlan.port).learning(false);
        let device = match vxlan.local {
            IpAddr::V4(local) => device.local(local),
            IpAddr::V6(local) => device.local6(local),
        };
        let device = device.mtu(vxlan.mtu_bytes).address(vxlan.mac.0.to_vec()).up();
        self.create("create the VXLAN device", vxlan.name, device.build()).map(|_| ())
    }

    fn create(&mut self, op: &'static str, subject: &str, message: LinkMessage) -> Result<Vec<Link>, Error> {
        let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO;
        self.request_echo(About { op, subject }, RouteNetlinkMessage::NewLink(message), flags)
    }

    /// Changes a device.
    ///
    /// # Errors
    /// [`Class::NotFound`] if there is none of this number.
    pub fn change_link(&mut self, index: u32, change: &LinkChange<'_>) -> Result<(), Error> {
        let message = changing(index, change);
        let subject = index.to_string();
        self.request(
            About { op: "change the device", subject: &subject },
            RouteNetlinkMessage::SetLink(message),
            0,
        )
    }

    /// Lets a bridge send a port's packets back to it, as a pod that reaches itself through a Service needs.
    ///
    /// # Errors
    /// If the device is no bridge's port.
    pub fn set_hairpin(&mut self, index: u32, on: bool) -> Result<(), Error> {
        let subject = index.to_string();
        let about = About { op: "set hairpin of", subject: &subject };
        self.request(about, RouteNetlinkMessage::NewLink(hairpin(index, on)), 0)
    }

    /// Deletes a device, and the other end of a pair with it. One that is gone is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_link(&mut self, index: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let subject = index.to_string();
        let about = About { op: "delete the device", subject: &subject };
        ok_if_gone(self.request(about, RouteNetlinkMessage::DelLink(message), 0))
    }

    /// Deletes the device of a name, if there is one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_link_named(&mut self, name: &str) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let about = About { op: "delete the device", subject: name };
        ok_if_gone(self.request(about, RouteNetlinkMessage::DelLink(message), 0))
    }
}

/// Asks for a device. Without its counters, which are the larger part of an answer and take longest.
pub(crate) fn question(name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message
}

pub(crate) fn changing(index: u32, change: &LinkChange<'_>) -> LinkMessage {
    let device = LinkUnspec::new_with_index(index);
    let mut message = match change.up {
        Some(true) => device.up(),
        Some(false) => device.down(),
        None => device,
    }
    .build();
    message.attributes.extend(change.master.map(LinkAttribute::Controller));
    message.attributes.extend(change.mtu_bytes.map(LinkAttribute::Mtu));
    message.attributes.extend(change.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
    message.attributes.extend(change.name.map(|name| LinkAttribute::IfName(name.to_owned())));
    message.attributes.extend(change.netns.map(|netns| LinkAttribute::NetNsFd(netns.as_raw_fd())));
    message
}

/// For RTM_NEWLINK: RTM_SETLINK takes a port's data without a word and does nothing with it.
pub(crate) fn hairpin(index: u32, on: bool) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(on)])),
    ]));
    message
}

/// Has the kernel give a device no IPv6 address of its own.
pub(crate) fn without_own_address(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let no_address = vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)];
    message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(no_address)]));
    message
}

/// Else the kernel makes a queue for each processor, and files below /sys for each, and then uses one of them.
fn one_queue<T>(builder: LinkMessageBuilder<T>) -> LinkMessageBuilder<T> {
    builder
        .append_extra_attribute(LinkAttribute::NumTxQueues(1))
        .append_extra_attribute(LinkAttribute::NumRxQueues(1))
}

fn end<T>(builder: LinkMessageBuilder<T>, end: &VethEnd<'_>) -> LinkMessageBuilder<T> {
    let builder = builder.mtu(end.mtu_bytes);
    match end.mac {
        Some(mac) => builder.address(mac.0.to_vec()),
        None => builder,
    }
}

/// The device of a message, if it is about one that there is.
///
/// Read from the bytes: of a device the kernel tells some sixty things, and to make all of them was a third of what ADD computed.
#[derive(Debug)]
pub(crate) struct FoundLink(pub(crate) Option<Link>);

impl NetlinkDeserializable for FoundLink {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let found = (header.message_type == libc::RTM_NEWLINK).then(|| read(payload)).transpose()?;
        Ok(Self(found))
    }
}

/// `struct ifinfomsg` and attributes.
fn read(payload: &[u8]) -> Result<Link, DecodeError> {
    let attributes = payload.get(HEADER_BYTES..).ok_or("a device without its header")?;
    let flags = word(&payload[FLAGS_AT..])?;
    let has = |flag: libc::c_int| flags & flag.cast_unsigned() != 0;
    let mut link = Link {
        index: word(&payload[INDEX_AT..])?,
        name: String::new(),
        mac: None,
        mtu_bytes: 0,
        up: has(libc::IFF_UP),
        running: false,
        loopback: has(libc::IFF_LOOPBACK),
        master: None,
        peer_index: None,
        peer_namespace: None,
        kind: String::new(),
        queue: String::new(),
    };
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute?;
        let value = attribute.value();
        match attribute.kind() {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_ADDRESS => link.mac = value.try_into().ok().map(Mac),
            libc::IFLA_MTU => link.mtu_bytes = word(value)?,
            // Loopback and its like never say more than "unknown".
            libc::IFLA_OPERSTATE => link.running = matches!(value, [OPERATES_UNKNOWN | OPERATES]),
            libc::IFLA_MASTER => link.master = Some(word(value)?),
            libc::IFLA_LINK => link.peer_index = Some(word(value)?),
            libc::IFLA_LINK_NETNSID => link.peer_namespace = Some(word(value)?.cast_signed()),
            libc::IFLA_QDISC => link.queue = text(value),
            libc::IFLA_LINKINFO => {
                for info in NlasIterator::new(value) {
                    let info = info?;
                    if info.kind() == libc::IFLA_INFO_KIND {
                        link.kind = text(info.value());
                    }
                }
            }
            _ => {}
        }
    }
    Ok(link)
}

fn word(bytes: &[u8]) -> Result<u32, DecodeError> {
    let first = bytes.first_chunk().ok_or("a number that is cut off")?;
    Ok(u32::from_ne_bytes(*first))
}

/// Up to its end, which is a zero. The name of a device may be any bytes.
fn text(bytes: &[u8]) -> String {
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests;
