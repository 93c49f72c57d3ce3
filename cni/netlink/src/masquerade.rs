//! The masquerade rule: pods that leave the cluster do so with their node's address.
//!
//! One nftables table of our own, `ip weft`, replaced whole in one transaction; nobody else's rules are touched.
//!
//! ```text
//! chain postrouting { type nat hook postrouting priority srcnat;
//!     ip saddr 10.42.0.0/16 ip daddr != 10.42.0.0/16 masquerade }
//! ```

use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions, Hook,
    InetHookNumber, ListAttribute, NfTablesMessage, Operator, Payload, Register, RuleAttribute, RuleMessage,
    TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

use crate::Error;
use crate::error::ok_if_gone;

const TABLE: &str = "weft";
const CHAIN: &str = "postrouting";
/// `srcnat`: after every other decision about the packet.
const PRIORITY: u32 = 100;
/// The IPv4 header, as `nft_payload` numbers its bases.
const NETWORK_HEADER: u32 = 1;
const SOURCE_OFFSET: u32 = 12;
const DESTINATION_OFFSET: u32 = 16;
const ADDRESS_BYTES: u32 = 4;
/// Subsystem number in the header of a batch.
const NFTABLES: u16 = 10;

/// Puts the rule in place, in the namespace of the calling thread; what an earlier start left is replaced.
///
/// # Errors
/// If the kernel refuses.
pub fn ensure(cluster: Ipv4Network) -> Result<(), Error> {
    transact(
        "put the masquerade rule",
        vec![
            // Made first, so that it can be deleted whether it was there or not.
            NfTablesMessage::NewTable(table()),
            NfTablesMessage::DeleteTable(table()),
            NfTablesMessage::NewTable(table()),
            NfTablesMessage::NewChain(chain()),
            NfTablesMessage::NewRule(rule(cluster)),
        ],
    )
}

/// Removes the rule. One that is gone is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn remove() -> Result<(), Error> {
    ok_if_gone(transact("remove the masquerade rule", vec![NfTablesMessage::DeleteTable(table())]))
}

fn table() -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(TABLE.to_owned())] }
}

fn chain() -> ChainMessage {
    ChainMessage {
        attributes: vec![
            ChainAttribute::Table(TABLE.to_owned()),
            ChainAttribute::Name(CHAIN.to_owned()),
            ChainAttribute::Hook(vec![
                Hook::Number(InetHookNumber::PostRouting.into()),
                Hook::Priority(PRIORITY),
            ]),
            ChainAttribute::Type("nat".to_owned()),
        ],
    }
}

fn rule(cluster: Ipv4Network) -> RuleMessage {
    let mut expressions = within(SOURCE_OFFSET, cluster, Operator::Equal);
    expressions.extend(within(DESTINATION_OFFSET, cluster, Operator::NotEqual));
    expressions.push(Expressions::Other { expression_type: "masq".to_owned(), attributes: Vec::new() });
    let expressions: Vec<ListAttribute<ExpressionAttribute>> =
        expressions.into_iter().map(Into::into).collect();
    RuleMessage {
        attributes: vec![
            RuleAttribute::Table(TABLE.to_owned()),
            RuleAttribute::Chain(CHAIN.to_owned()),
            RuleAttribute::Expressions(expressions),
        ],
    }
}

/// Loads an address of the IPv4 header, masks it, and compares it with the network's.
fn within(offset: u32, network: Ipv4Network, operator: Operator) -> Vec<Expressions> {
    let value = |address: Ipv4Addr| DataAttribute::Value(address.octets().to_vec());
    vec![
        Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Reg1),
            Payload::Base(NETWORK_HEADER),
            Payload::Offset(offset),
            Payload::Len(ADDRESS_BYTES),
        ]),
        Expressions::Bitwise(vec![
            Bitwise::SourceRegister(Register::Reg1),
            Bitwise::DestinationRegister(Register::Reg1),
            Bitwise::Length(ADDRESS_BYTES),
            Bitwise::Mask(value(network.mask())),
            Bitwise::Xor(value(Ipv4Addr::UNSPECIFIED)),
        ]),
        Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(operator),
            Cmp::Data(value(network.network())),
        ]),
    ]
}

/// Sends a batch, which the kernel carries out whole or not at all.
fn transact(op: &'static str, messages: Vec<NfTablesMessage>) -> Result<(), Error> {
    let failed = |source| Error::Socket { op, source };
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed)?;
    socket.bind_auto().map_err(failed)?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
    let batch = |control| {
        (
            NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFTABLES),
            NetfilterMessageInner::None(control),
        )
    };
    let ours = |message| {
        (NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0), NetfilterMessageInner::NfTables(message))
    };
    let count = u32::try_from(messages.len()).unwrap_or(u32::MAX);
    let begin = std::iter::once(batch(ControlMessage::BatchBegin));
    let end = std::iter::once(batch(ControlMessage::BatchEnd));
    let mut buffer = Vec::new();
    for (sequence, (header, inner)) in begin.chain(messages.into_iter().map(ours)).chain(end).enumerate() {
        let acknowledged = matches!(inner, NetfilterMessageInner::NfTables(_));
        let mut message = NetlinkMessage::from(NetfilterMessage::new(header, inner));
        message.header.sequence_number = u32::try_from(sequence).unwrap_or(0);
        message.header.flags = NLM_F_REQUEST | if acknowledged { NLM_F_ACK | NLM_F_CREATE } else { 0 };
        message.finalize();
        let at = buffer.len();
        buffer.resize(at + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut buffer[at..]);
    }
    socket.send(&buffer, 0).map_err(failed)?;
    acknowledgements(&socket, op, count)
}

fn acknowledgements(socket: &Socket, op: &'static str, mut outstanding: u32) -> Result<(), Error> {
    while outstanding > 0 {
        let (datagram, _) = socket.recv_from_full().map_err(|source| Error::Socket { op, source })?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<NetfilterMessage>::deserialize(rest)
                .map_err(|error| Error::Decode { op, reason: error.to_string() })?;
            if let NetlinkPayload::Error(error) = &message.payload {
                if let Some(code) = error.code {
                    let errno = Errno::from_raw(code.get().saturating_neg());
                    return Err(Error::Refused { op, subject: format!("in the table {TABLE}"), errno });
                }
                outstanding = outstanding.saturating_sub(1);
            }
            let length = usize::try_from(message.header.length).unwrap_or(0);
            rest = &rest[length.next_multiple_of(4).clamp(4, rest.len())..];
        }
    }
    Ok(())
}
