//! Several requests in one message to the kernel, which carries them out in their order, each whatever came of those before.

use ipnetwork::IpNetwork;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use crate::link::FoundLink;
use crate::socket::About;
use crate::{Error, Link, LinkChange, Neighbour, Netlink, Route, address, link, neighbour, route};

/// Changes, and questions about devices.
#[derive(Debug, Default)]
pub struct Batch {
    requests: Vec<Request>,
}

#[derive(Debug)]
struct Request {
    op: &'static str,
    subject: String,
    message: RouteNetlinkMessage,
    flags: u16,
    /// A refusal that is none.
    fine: Option<Errno>,
}

impl Batch {
    fn push(
        mut self,
        (op, subject): (&'static str, String),
        message: RouteNetlinkMessage,
        flags: u16,
        fine: Option<Errno>,
    ) -> Self {
        self.requests.push(Request { op, subject, message, flags, fine });
        self
    }

    /// Changes a device.
    #[must_use]
    pub fn change_link(self, index: u32, change: &LinkChange<'_>) -> Self {
        let message = RouteNetlinkMessage::SetLink(link::changing(index, change));
        self.push(("change the device", index.to_string()), message, 0, None)
    }

    /// Lets a bridge send a port's packets back to it, as a pod that reaches itself through a Service needs, and gives the
    /// port no IPv6 address of its own: its packets are the bridge's to take, and each such address would be announced to every pod.
    #[must_use]
    pub fn make_pod_port(self, index: u32) -> Self {
        let hairpin = RouteNetlinkMessage::NewLink(link::hairpin(index, true));
        let no_address = RouteNetlinkMessage::NewLink(link::without_own_address(index));
        // A kernel without IPv6 knows no such thing.
        self.push(("set hairpin of", index.to_string()), hairpin, 0, None).push(
            ("take the IPv6 address of", index.to_string()),
            no_address,
            0,
            Some(Errno::EAFNOSUPPORT),
        )
    }

    /// Gives a device an address. One that it has already is no error. [`Netlink::await_address`] waits for it.
    #[must_use]
    pub fn add_address(self, index: u32, network: IpNetwork) -> Self {
        let message = RouteNetlinkMessage::NewAddress(address::message(index, network));
        let about = ("add the address", network.to_string());
        self.push(about, message, NLM_F_CREATE | NLM_F_EXCL, Some(Errno::EEXIST))
    }

    /// Puts a neighbour, in place of what was known of the address.
    #[must_use]
    pub fn put_neighbour(self, neighbour: &Neighbour) -> Self {
        let message = RouteNetlinkMessage::NewNeighbour(neighbour::neighbour_message(neighbour));
        let about = ("put the neighbour", neighbour.address.to_string());
        self.push(about, message, NLM_F_CREATE | NLM_F_REPLACE, None)
    }

    /// Puts a route, in place of one to the same destination.
    #[must_use]
    pub fn put_route(self, route: &Route) -> Self {
        let message = RouteNetlinkMessage::NewRoute(route::message(route));
        let about = ("put the route to", route.destination.to_string());
        self.push(about, message, NLM_F_CREATE | NLM_F_REPLACE, None)
    }

    /// Asks for the device of a name, as it is then.
    #[must_use]
    pub fn link(self, name: &str) -> Self {
        let message = RouteNetlinkMessage::GetLink(link::question(name));
        self.push(("find the device", name.to_owned()), message, 0, None)
    }
}

impl Netlink {
    /// Carries out a batch, and answers the devices that it asks for, in their order. What follows a request that the kernel refuses is
    /// tried all the same.
    ///
    /// # Errors
    /// The first refusal.
    pub fn apply(&mut self, batch: Batch) -> Result<Vec<Link>, Error> {
        let Some(last) = batch.requests.last() else { return Ok(Vec::new()) };
        let op = last.op;
        let mut bytes = Vec::new();
        let mut abouts = Vec::new();
        let count = batch.requests.len();
        for (n, request) in batch.requests.into_iter().enumerate() {
            let Request { op, subject, message, flags, fine } = request;
            // The others are heard of if they fail. A question is answered anyhow, and would be acknowledged as well.
            let asks = matches!(message, RouteNetlinkMessage::GetLink(_));
            let ack = if n + 1 == count && !asks { NLM_F_ACK } else { 0 };
            bytes.extend(self.encode(message, NLM_F_REQUEST | ack | flags));
            abouts.push((self.sequence(), op, subject, fine));
        }
        self.send_bytes(op, &bytes)?;
        self.hear(op, &abouts)
    }

    /// Reads until the last request is answered: by then the others are.
    fn hear(
        &mut self,
        op: &'static str,
        abouts: &[(u32, &'static str, String, Option<Errno>)],
    ) -> Result<Vec<Link>, Error> {
        let mut links = Vec::new();
        let mut refused = None;
        loop {
            for NetlinkMessage { header, payload, .. } in self.receive(op)? {
                let of = abouts.iter().find(|(sequence, ..)| *sequence == header.sequence_number);
                let Some((sequence, op, subject, fine)) = of else {
                    self.note_event();
                    continue;
                };
                match payload {
                    NetlinkPayload::InnerMessage(FoundLink(Some(link))) => links.push(link),
                    NetlinkPayload::Error(error) => {
                        let code = error.code.map_or(0, std::num::NonZeroI32::get);
                        if code != 0 && *fine != Some(Errno::from_raw(code.saturating_neg())) {
                            let about = About { op, subject };
                            refused.get_or_insert_with(|| about.refused(code));
                        }
                    }
                    _ => continue,
                }
                if *sequence == self.sequence() {
                    return refused.map_or(Ok(links), Err);
                }
            }
        }
    }
}
