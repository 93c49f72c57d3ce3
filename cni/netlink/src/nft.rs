//! nftables: batches of changes that take effect together, and the expressions that our rules are made of.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Expressions, NfTablesMessage, Operator, Payload, Register,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

use crate::Error;

/// `NFNL_SUBSYS_NFTABLES`: whom a batch is for.
const SUBSYSTEM: u16 = 10;

/// `NFT_PAYLOAD_NETWORK_HEADER`: offsets count from the IP header.
const NETWORK_HEADER: u32 = 1;

/// The family that a table is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    pub(crate) fn of(network: &IpNetwork) -> Self {
        if network.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn number(self) -> NetfilterProtoFamily {
        match self {
            Self::V4 => NetfilterProtoFamily::IPv4,
            Self::V6 => NetfilterProtoFamily::IPv6,
        }
    }

    fn address_bytes(self) -> u32 {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }
}

/// Which address of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Source,
    Destination,
}

impl Field {
    /// Where the header has it.
    fn offset(self, family: Family) -> u32 {
        match (family, self) {
            (Family::V4, Self::Source) => 12,
            (Family::V4, Self::Destination) => 16,
            (Family::V6, Self::Source) => 8,
            (Family::V6, Self::Destination) => 24,
        }
    }
}

/// One change, to a table of a family, with the flags that it is sent with.
pub(crate) type Change = (Family, NfTablesMessage, u16);

/// Goes on if an address of the packet is, or isn't, of the network.
pub(crate) fn address(field: Field, operator: Operator, network: IpNetwork) -> [Expressions; 3] {
    let family = Family::of(&network);
    let bytes = family.address_bytes();
    let value = |address: IpAddr| {
        DataAttribute::Value(match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        })
    };
    [
        Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Reg1),
            Payload::Base(NETWORK_HEADER),
            Payload::Offset(field.offset(family)),
            Payload::Len(bytes),
        ]),
        Expressions::Bitwise(vec![
            Bitwise::SourceRegister(Register::Reg1),
            Bitwise::DestinationRegister(Register::Reg1),
            Bitwise::Length(bytes),
            Bitwise::Mask(value(network.mask())),
            Bitwise::Xor(DataAttribute::Value(vec![0; bytes as usize])),
        ]),
        Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(operator),
            Cmp::Data(value(network.network())),
        ]),
    ]
}

/// An expression that the library has no name for.
pub(crate) fn expression(name: &str, attributes: Vec<DefaultNla>) -> Expressions {
    Expressions::Other { expression_type: name.to_owned(), attributes }
}

/// An attribute that holds a number, as nftables writes them all.
pub(crate) fn number(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

/// Sends changes that take effect together or not at all, and waits until each is acknowledged.
pub(crate) fn batch(op: &'static str, changes: &[Change]) -> Result<(), Error> {
    let failed = |source| Error::Socket { op, source };
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed)?;
    socket.bind_auto().map_err(failed)?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;

    let edge = || NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM);
    let mut bytes = Vec::new();
    append(&mut bytes, 0, NLM_F_REQUEST, NetfilterMessage::new(edge(), ControlMessage::BatchBegin));
    for (sequence, (family, message, flags)) in (1..).zip(changes) {
        let header = NetfilterHeader::new(family.number(), 0, 0);
        let message = NetfilterMessage::new(header, NetfilterMessageInner::NfTables(message.clone()));
        append(&mut bytes, sequence, NLM_F_REQUEST | NLM_F_ACK | flags, message);
    }
    append(&mut bytes, 0, NLM_F_REQUEST, NetfilterMessage::new(edge(), ControlMessage::BatchEnd));
    socket.send(&bytes, 0).map_err(failed)?;

    let mut acknowledged = 0;
    while acknowledged < changes.len() {
        let (datagram, _) = socket.recv_from_full().map_err(failed)?;
        acknowledged += acknowledgements(op, &datagram)?;
    }
    Ok(())
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

/// How many acknowledgements a datagram holds; the first refusal is an error.
fn acknowledgements(op: &'static str, datagram: &[u8]) -> Result<usize, Error> {
    let mut count = 0;
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkMessage::<NetfilterMessage>::deserialize(rest)
            .map_err(|error| Error::Decode { op, reason: error.to_string() })?;
        if let NetlinkPayload::Error(error) = message.payload {
            if let Some(code) = error.code {
                let errno = Errno::from_raw(code.get().saturating_neg());
                return Err(Error::Refused { op, subject: String::new(), errno });
            }
            count += 1;
        }
        let length = usize::try_from(message.header.length).unwrap_or(0);
        rest = &rest[length.next_multiple_of(4).clamp(4, rest.len())..];
    }
    Ok(count)
}
