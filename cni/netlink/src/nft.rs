//! nftables: batches of changes that take effect together, and the messages that ours consist of; and the flows that the rules
//! were applied to.

mod expression;

use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage, Tuple};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Expressions, Hook, HookNumber, InetHookNumber, NfTablesMessage,
    RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

use crate::socket::parse;
use crate::{Class, Error};

pub(crate) use expression::{
    Field, address_within, by_device, by_device_of, by_loopback, device_key, drop, for_this_host, is_marked,
    jump, mark, masquerade, octets, of_loopback, to_udp_port, translate_by,
};

/// `NFNL_SUBSYS_NFTABLES`: whom a batch is for.
const SUBSYSTEM: u16 = 10;

/// A dump that was interrupted this many times in a row is given up.
const DUMP_TRIES: u32 = 16;

/// The family that a table is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    pub(crate) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    pub(crate) fn address_bytes(self) -> u32 {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    /// `AF_INET`, `AF_INET6`.
    pub(crate) fn address_family(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    fn number(self) -> NetfilterProtoFamily {
        match self {
            Self::V4 => NetfilterProtoFamily::IPv4,
            Self::V6 => NetfilterProtoFamily::IPv6,
        }
    }
}

/// One change, with the flags that it is sent with.
pub(crate) type Change = (NfTablesMessage, u16);

/// Where and when a chain is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Base {
    /// `nat` or `filter`.
    pub(crate) kind: &'static str,
    pub(crate) hook: InetHookNumber,
    pub(crate) priority: i32,
}

pub(crate) fn new_table(name: &str, flags: u16) -> Change {
    (NfTablesMessage::NewTable(table(name)), NLM_F_CREATE | flags)
}

pub(crate) fn delete_table(name: &str) -> Change {
    (NfTablesMessage::DeleteTable(table(name)), 0)
}

fn table(name: &str) -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] }
}

/// A chain; without a base, one that others jump to.
pub(crate) fn new_chain(table: &str, name: &str, base: Option<Base>) -> Change {
    let mut attributes = vec![ChainAttribute::Table(table.to_owned()), ChainAttribute::Name(name.to_owned())];
    if let Some(base) = base {
        attributes.push(ChainAttribute::Type(base.kind.to_owned()));
        attributes.push(ChainAttribute::Hook(vec![
            Hook::Number(HookNumber::Inet(base.hook)),
            Hook::Priority(base.priority.cast_unsigned()),
        ]));
    }
    (NfTablesMessage::NewChain(ChainMessage { attributes }), NLM_F_CREATE)
}

/// A rule at the end of a chain.
pub(crate) fn new_rule(table: &str, chain: &str, expressions: Vec<Expressions>) -> Change {
    let attributes = vec![
        RuleAttribute::Table(table.to_owned()),
        RuleAttribute::Chain(chain.to_owned()),
        RuleAttribute::Expressions(expressions.into_iter().map(Into::into).collect()),
    ];
    (NfTablesMessage::NewRule(RuleMessage { attributes }), NLM_F_CREATE | NLM_F_APPEND)
}

/// Makes changes in one family that take effect together or not at all, and waits until each is acknowledged.
pub(crate) fn batch(op: &'static str, family: Family, changes: Vec<Change>) -> Result<(), Error> {
    let mut socket = Nft::open(op)?;
    socket.batch(changes.into_iter().map(|change| (family, change)).collect())
}

/// The same in several families, all of it together.
pub(crate) fn batch_all(op: &'static str, changes: Vec<(Family, Change)>) -> Result<(), Error> {
    Nft::open(op)?.batch(changes)
}

/// Deletes a table of each family. One that is gone is no error.
pub(crate) fn remove_tables(op: &'static str, name: &str) -> Result<(), Error> {
    let removed = FAMILIES.map(|family| match batch(op, family, vec![delete_table(name)]) {
        Err(error) if error.class() == Class::NotFound => Ok(()),
        other => other,
    });
    removed.into_iter().collect()
}

/// Asks for a list, and collects what `pick` takes of it.
pub(crate) fn dump<T>(
    op: &'static str,
    family: Family,
    request: NfTablesMessage,
    mut pick: impl FnMut(NfTablesMessage) -> Vec<T>,
) -> Result<Vec<T>, Error> {
    Nft::open(op)?.dump(family, NetfilterMessageInner::NfTables(request), |message| match message {
        NetfilterMessageInner::NfTables(message) => pick(message),
        _ => Vec::new(),
    })
}

/// Ends the flows that conntrack knows and `ends` takes: what is left of them is a new flow, and seen by every rule again.
pub(crate) fn end_flows(
    op: &'static str,
    family: Family,
    mut ends: impl FnMut(&[Tuple]) -> bool,
) -> Result<(), Error> {
    let mut socket = Nft::open(op)?;
    let request = NetfilterMessageInner::Conntrack(ConntrackMessage::Get(Vec::new()));
    let going = socket.dump(family, request, |message| match message {
        NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) => {
            let original = attributes.into_iter().filter_map(|attribute| match attribute {
                ConntrackAttribute::CtaTupleOrig(tuple) => Some(tuple),
                _ => None,
            });
            original.filter(|tuple| ends(tuple)).collect()
        }
        _ => Vec::new(),
    })?;
    for tuple in going {
        let message = ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(tuple)]);
        match socket.request(family, NetfilterMessageInner::Conntrack(message)) {
            // It has ended by itself.
            Err(error) if error.class() == Class::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

/// A connection for one operation.
struct Nft {
    socket: Socket,
    op: &'static str,
}

impl Nft {
    fn open(op: &'static str) -> Result<Self, Error> {
        let failed = |source| Error::Socket { op, source };
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        Ok(Self { socket, op })
    }

    fn batch(&mut self, changes: Vec<(Family, Change)>) -> Result<(), Error> {
        let count = changes.len();
        let edge = || NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM);
        let mut bytes = Vec::new();
        append(&mut bytes, 0, NLM_F_REQUEST, NetfilterMessage::new(edge(), ControlMessage::BatchBegin));
        for (sequence, (family, (message, flags))) in (1..).zip(changes) {
            let message = within(family, NetfilterMessageInner::NfTables(message));
            append(&mut bytes, sequence, NLM_F_REQUEST | NLM_F_ACK | flags, message);
        }
        append(&mut bytes, 0, NLM_F_REQUEST, NetfilterMessage::new(edge(), ControlMessage::BatchEnd));
        self.send(&bytes)?;
        self.await_acknowledgements(count)
    }

    fn request(&mut self, family: Family, message: NetfilterMessageInner) -> Result<(), Error> {
        let mut bytes = Vec::new();
        append(&mut bytes, 1, NLM_F_REQUEST | NLM_F_ACK, within(family, message));
        self.send(&bytes)?;
        self.await_acknowledgements(1)
    }

    fn await_acknowledgements(&self, count: usize) -> Result<(), Error> {
        let mut acknowledged = 0;
        while acknowledged < count {
            for message in self.receive()? {
                let NetlinkPayload::Error(error) = message.payload else { continue };
                if let Some(code) = error.code {
                    return Err(self.refused(code.get()));
                }
                acknowledged += 1;
            }
        }
        Ok(())
    }

    fn dump<T>(
        &mut self,
        family: Family,
        request: NetfilterMessageInner,
        mut pick: impl FnMut(NetfilterMessageInner) -> Vec<T>,
    ) -> Result<Vec<T>, Error> {
        let request = within(family, request);
        for _ in 0..DUMP_TRIES {
            if let Some(found) = self.dump_once(request.clone(), &mut pick)? {
                return Ok(found);
            }
        }
        Err(Error::Interrupted { op: self.op })
    }

    /// Nothing if the list changed meanwhile.
    fn dump_once<T>(
        &mut self,
        request: NetfilterMessage,
        pick: &mut impl FnMut(NetfilterMessageInner) -> Vec<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        let mut bytes = Vec::new();
        append(&mut bytes, 1, NLM_F_REQUEST | NLM_F_DUMP, request);
        self.send(&bytes)?;
        let (mut found, mut interrupted) = (Vec::new(), false);
        loop {
            for message in self.receive()? {
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => found.extend(pick(message.inner)),
                    NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(found)),
                    NetlinkPayload::Error(error) => {
                        return Err(self.refused(error.code.map_or(0, std::num::NonZeroI32::get)));
                    }
                    _ => {}
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        self.socket.send(bytes, 0).map_err(|source| Error::Socket { op: self.op, source })?;
        Ok(())
    }

    fn receive(&self) -> Result<Vec<NetlinkMessage<NetfilterMessage>>, Error> {
        let op = self.op;
        let (datagram, _) = self.socket.recv_from_full().map_err(|source| Error::Socket { op, source })?;
        parse(op, &datagram)
    }

    fn refused(&self, code: i32) -> Error {
        let errno = Errno::from_raw(code.saturating_neg());
        Error::Refused { op: self.op, subject: String::new(), errno }
    }
}

fn within(family: Family, message: NetfilterMessageInner) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family.number(), 0, 0), message)
}

fn append(bytes: &mut Vec<u8>, sequence: u32, flags: u16, message: NetfilterMessage) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..start + message.buffer_len()]);
}
