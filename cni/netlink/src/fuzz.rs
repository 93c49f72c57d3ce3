//! What the fuzzer feeds: bytes in place of the kernel's replies and events.

use netlink_packet_core::NetlinkPayload;
use netlink_packet_netfilter::NetfilterMessage;
use netlink_packet_route::RouteNetlinkMessage;

use crate::{diag, event, link, lookup, neighbour, route, socket};

/// A datagram of the route socket, read as every request and event reads it.
pub fn route_reply(datagram: &[u8]) {
    let _devices = socket::parse::<link::FoundLink>("read", datagram);
    let Ok(messages) = socket::parse::<RouteNetlinkMessage>("read", datagram) else { return };
    for message in messages {
        if let NetlinkPayload::InnerMessage(inner) = &message.payload {
            read_route(inner);
        }
        event::event(message.payload);
    }
}

fn read_route(message: &RouteNetlinkMessage) {
    match message {
        RouteNetlinkMessage::NewAddress(message) => drop(crate::address::read(message)),
        RouteNetlinkMessage::NewRoute(message) => {
            route::read(message);
            lookup::read(message);
        }
        RouteNetlinkMessage::NewNeighbour(message) => {
            neighbour::read_neighbour(message, message.header.ifindex);
            neighbour::read_fdb(message, message.header.ifindex);
        }
        _ => {}
    }
}

/// A datagram of netfilter's socket.
pub fn netfilter_reply(datagram: &[u8]) {
    let _broken = socket::parse::<NetfilterMessage>("read", datagram);
}

/// A datagram of the socket diagnosis.
pub fn diag_reply(datagram: &[u8]) {
    let mut rest = datagram;
    while let Some((_, _, body, behind)) = diag::split(rest) {
        assert!(behind.len() < rest.len(), "a message has no length");
        if let Some(socket) = diag::read(body) {
            assert!(body.len() >= 52, "{socket:?} of {} bytes", body.len());
        }
        // Only the answer to a request that ends a socket may say that there is none.
        let _refused = diag::acknowledged("read", body);
        rest = behind;
    }
}
