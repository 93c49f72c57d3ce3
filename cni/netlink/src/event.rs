//! Changes of devices, addresses, routes and neighbours, as the kernel tells them.

use std::net::IpAddr;

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::socket::parse;
use crate::{Error, Mac, Route, neighbour, route};

/// Legacy group bits: links, neighbours, IPv4 addresses and routes, IPv6 addresses and routes.
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A device, by its number.
    Link(u32),
    /// An address of a device.
    Address(u32),
    /// A route was put or is gone; `None` if it is of another table or kind than [`Route`] tells of.
    Route {
        /// The route.
        route: Option<Route>,
        /// It is gone.
        gone: bool,
    },
    /// A neighbour or forwarding entry was put, changed or is gone.
    Neighbour(NeighbourChange),
    /// Events were lost: look at everything again.
    Lost,
}

/// A neighbour (address to hardware address) or forwarding entry (hardware address to the node at the tunnel's other end).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighbourChange {
    /// The device's number.
    pub index: u32,
    /// A forwarding entry, not a neighbour.
    pub forwarding: bool,
    /// The neighbour's address, or the other node's.
    pub address: Option<IpAddr>,
    /// The hardware address.
    pub mac: Option<Mac>,
    /// It is gone.
    pub gone: bool,
}

/// A subscription, in the namespace of the thread that made it.
#[derive(Debug)]
pub struct Events {
    socket: AsyncFd<Socket>,
}

impl Events {
    /// Subscribes. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the socket can't be made.
    pub fn subscribe() -> Result<Self, Error> {
        let failed = |op| move |source| Error::Socket { op, source };
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed("open"))?;
        socket.bind(&SocketAddr::new(0, GROUPS)).map_err(failed("bind"))?;
        socket.set_non_blocking(true).map_err(failed("make non-blocking"))?;

        // SAFETY: the socket owns its descriptor for as long as the AsyncFd owns the socket, and never replaces it.
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        let socket =
            registered.map_err(|error| Error::Socket { op: "register", source: error.into_parts().1 })?;
        Ok(Self { socket })
    }

    /// Waits for the next changes. Cancel safe.
    ///
    /// # Errors
    /// If the socket fails; the loss of events is an event, not an error.
    pub async fn next(&mut self) -> Result<Vec<Event>, Error> {
        let op = "receive events";
        loop {
            let mut guard = self.socket.readable().await.map_err(|source| Error::Socket { op, source })?;
            match guard.try_io(|socket| socket.get_ref().recv_from_full()) {
                Ok(Ok((datagram, _))) => {
                    let messages = parse::<RouteNetlinkMessage>(op, &datagram)?;
                    return Ok(messages.into_iter().filter_map(|message| event(message.payload)).collect());
                }
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(vec![Event::Lost]);
                }
                Ok(Err(source)) => return Err(Error::Socket { op, source }),
                Err(_would_block) => {}
            }
        }
    }
}

pub(crate) fn event(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Event> {
    let NetlinkPayload::InnerMessage(message) = payload else { return None };
    match message {
        RouteNetlinkMessage::NewLink(m) | RouteNetlinkMessage::DelLink(m) => {
            Some(Event::Link(m.header.index))
        }
        RouteNetlinkMessage::NewAddress(m) | RouteNetlinkMessage::DelAddress(m) => {
            Some(Event::Address(m.header.index))
        }
        RouteNetlinkMessage::NewRoute(m) => Some(Event::Route { route: route::read(&m), gone: false }),
        RouteNetlinkMessage::DelRoute(m) => Some(Event::Route { route: route::read(&m), gone: true }),
        RouteNetlinkMessage::NewNeighbour(m) => Some(Event::Neighbour(neighbour::change(&m, false))),
        RouteNetlinkMessage::DelNeighbour(m) => Some(Event::Neighbour(neighbour::change(&m, true))),
        _ => None,
    }
}
