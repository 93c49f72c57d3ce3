//! Network devices: bridges, veth pairs, VXLAN.

use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridgePort, InfoData, InfoPortData, InfoPortKind,
    InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage, State,
};

use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

use crate::error::ok_if_gone;
use crate::socket::About;
use crate::{Class, Error, Mac, Netlink};

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
        self.dump("list the devices", &request, |message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(read(&message)),
            _ => None,
        })
    }

    /// The device of a name.
    ///
    /// # Errors
    /// [`Class::NotFound`] if there is none.
    pub fn link(&mut self, name: &str) -> Result<Link, Error> {
        let about = About { op: "find the device", subject: name };
        match self.get(about, RouteNetlinkMessage::GetLink(question(name)))? {
            RouteNetlinkMessage::NewLink(message) => Ok(read(&message)),
            _ => Err(Error::Decode { op: about.op, reason: "not a device".to_owned() }),
        }
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
        match self.get(about, RouteNetlinkMessage::GetLink(message))? {
            RouteNetlinkMessage::NewLink(message) => Ok(read(&message)),
            _ => Err(Error::Decode { op: about.op, reason: "not a device".to_owned() }),
        }
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
        match self.get(about, RouteNetlinkMessage::GetLink(message))? {
            RouteNetlinkMessage::NewLink(message) => Ok(read(&message)),
            _ => Err(Error::Decode { op: about.op, reason: "not a device".to_owned() }),
        }
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
        let mut made = echo.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(read(message)),
            _ => None,
        });
        Ok(made.find(|link| link.name == host.name))
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

    fn create(
        &mut self,
        op: &'static str,
        subject: &str,
        message: LinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
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

pub(crate) fn read(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu_bytes: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        running: false,
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        master: None,
        peer_index: None,
        peer_namespace: None,
        kind: String::new(),
        queue: String::new(),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok().map(Mac),
            LinkAttribute::Mtu(bytes) => link.mtu_bytes = *bytes,
            // Loopback and its like never say more than "unknown".
            LinkAttribute::OperState(state) => link.running = matches!(state, State::Up | State::Unknown),
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::Link(index) => link.peer_index = Some(*index),
            LinkAttribute::LinkNetNsId(id) => link.peer_namespace = Some(*id),
            LinkAttribute::Qdisc(kind) => link.queue.clone_from(kind),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    link
}
