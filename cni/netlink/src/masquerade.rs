//! The masquerade rule: pods that leave the cluster do so with their node's address.
//!
//! One nftables table of our own, so that nobody else's rules are touched and all of it goes with the table:
//!
//! ```text
//! table ip weft {
//!     chain masquerade {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         ip saddr <cluster> ip daddr != <cluster> masquerade
//!     }
//! }
//! ```

use ipnetwork::Ipv4Network;
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook, HookNumber, InetHookNumber,
    NfTablesMessage, Operator, Payload, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

use crate::{Class, Error};

const TABLE: &str = "weft";
const CHAIN: &str = "masquerade";

/// `NF_IP_PRI_NAT_SRC`: behind the decisions of filters.
const PRIORITY: u32 = 100;

/// `NFNL_SUBSYS_NFTABLES`: whom a batch is for.
const SUBSYSTEM: u16 = 10;

/// `NFT_PAYLOAD_NETWORK_HEADER`: offsets count from the IP header.
const NETWORK_HEADER: u32 = 1;
/// Where an IPv4 header has the addresses, and how long they are.
const SOURCE: u32 = 12;
const DESTINATION: u32 = 16;
const ADDRESS_BYTES: u32 = 4;

/// Puts the rule for this cluster in place of whatever the table held. All or nothing, and no packet sees it half done.
///
/// # Errors
/// If the kernel refuses (no nftables, not root).
pub fn ensure(cluster: Ipv4Network) -> Result<(), Error> {
    let table = || TableMessage { attributes: vec![TableAttribute::Name(TABLE.to_owned())] };
    let chain = ChainMessage {
        attributes: vec![
            ChainAttribute::Table(TABLE.to_owned()),
            ChainAttribute::Name(CHAIN.to_owned()),
            ChainAttribute::Type("nat".to_owned()),
            ChainAttribute::Hook(vec![
                Hook::Number(HookNumber::Inet(InetHookNumber::PostRouting)),
                Hook::Priority(PRIORITY),
            ]),
        ],
    };
    let expressions = [address(SOURCE), inside(cluster, Operator::Equal), address(DESTINATION)]
        .into_iter()
        .chain([inside(cluster, Operator::NotEqual), vec![masquerade()]])
        .flatten()
        .map(Into::into)
        .collect();
    let rule = RuleMessage {
        attributes: vec![
            RuleAttribute::Table(TABLE.to_owned()),
            RuleAttribute::Chain(CHAIN.to_owned()),
            RuleAttribute::Expressions(expressions),
        ],
    };
    // The table is made before it is deleted, so that the deletion can't miss.
    batch("put the masquerade rule", [
        (NfTablesMessage::NewTable(table()), NLM_F_CREATE),
        (NfTablesMessage::DeleteTable(table()), 0),
        (NfTablesMessage::NewTable(table()), NLM_F_CREATE),
        (NfTablesMessage::NewChain(chain), NLM_F_CREATE),
        (NfTablesMessage::NewRule(rule), NLM_F_CREATE | NLM_F_APPEND),
    ])
}

/// Removes the table. One that is gone is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn remove() -> Result<(), Error> {
    let table = TableMessage { attributes: vec![TableAttribute::Name(TABLE.to_owned())] };
    match batch("remove the masquerade rule", [(NfTablesMessage::DeleteTable(table), 0)]) {
        Err(error) if error.class() == Class::NotFound => Ok(()),
        other => other,
    }
}

/// Loads an address of the packet.
fn address(offset: u32) -> Vec<Expressions> {
    vec![Expressions::Payload(vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(NETWORK_HEADER),
        Payload::Offset(offset),
        Payload::Len(ADDRESS_BYTES),
    ])]
}

/// Goes on if the loaded address is, or isn't, of the network.
fn inside(network: Ipv4Network, operator: Operator) -> Vec<Expressions> {
    let value = |address: std::net::Ipv4Addr| DataAttribute::Value(address.octets().to_vec());
    vec![
        Expressions::Bitwise(vec![
            Bitwise::SourceRegister(Register::Reg1),
            Bitwise::DestinationRegister(Register::Reg1),
            Bitwise::Length(ADDRESS_BYTES),
            Bitwise::Mask(value(network.mask())),
            Bitwise::Xor(value(std::net::Ipv4Addr::UNSPECIFIED)),
        ]),
        Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(operator),
            Cmp::Data(value(network.network())),
        ]),
    ]
}

fn masquerade() -> Expressions {
    Expressions::Other { expression_type: "masq".to_owned(), attributes: Vec::<DefaultNla>::new() }
}

/// Sends messages that take effect together, and waits until each is acknowledged.
fn batch<const N: usize>(op: &'static str, messages: [(NfTablesMessage, u16); N]) -> Result<(), Error> {
    let failed = |source| Error::Socket { op, source };
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed)?;
    socket.bind_auto().map_err(failed)?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;

    let ours = || NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0);
    let edge = || NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM);
    let mut bytes = Vec::new();
    append(&mut bytes, 0, NLM_F_REQUEST, NetfilterMessage::new(edge(), ControlMessage::BatchBegin));
    for (sequence, (message, flags)) in (1..).zip(messages) {
        let message = NetfilterMessage::new(ours(), NetfilterMessageInner::NfTables(message));
        append(&mut bytes, sequence, NLM_F_REQUEST | NLM_F_ACK | flags, message);
    }
    append(&mut bytes, 0, NLM_F_REQUEST, NetfilterMessage::new(edge(), ControlMessage::BatchEnd));
    socket.send(&bytes, 0).map_err(failed)?;

    let mut acknowledged = 0;
    while acknowledged < N {
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
