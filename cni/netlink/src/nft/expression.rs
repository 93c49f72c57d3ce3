//! What rules are made of. Registers are named as the kernel does: 1 is the first of 16 bytes, 8 and up are those of 4 bytes
//! that it consists of.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{DefaultNla, Emitable as _, NLA_F_NESTED};
use netlink_packet_netfilter::nftables::Expressions;

use super::Family;

/// `NFT_REG_1`, and the 4 bytes that begin it: `NFT_REG32_00`.
pub(crate) const FIRST: u32 = 1;
pub(crate) const FIRST_32: u32 = 8;

/// `NFT_PAYLOAD_NETWORK_HEADER` and `NFT_PAYLOAD_TRANSPORT_HEADER`: where offsets count from.
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

/// `NFT_CMP_EQ`, `NFT_CMP_NEQ`.
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;

/// `NFT_META_MARK`, `NFT_META_IIFNAME`, `NFT_META_L4PROTO`.
const MARK: u32 = 3;
const INPUT_NAME: u32 = 6;
const PROTOCOL: u32 = 16;
/// `IPPROTO_UDP`.
const UDP: u8 = 17;

/// `NFT_FIB_RESULT_ADDRTYPE`, `NFTA_FIB_F_DADDR`, and `RTN_LOCAL`, which it answers.
const ADDRESS_TYPE: u32 = 3;
const OF_DESTINATION: u32 = 2;
const LOCAL: u32 = 2;

/// `NFT_JUMP` and `NF_DROP`.
const JUMP: i32 = -3;
const DROP: i32 = 0;

/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`: two flows that race for the same port don't lose each other's packets.
const FULLY_RANDOM: u32 = 1 << 4;

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

/// Goes on if an address of the packet is, or isn't, of the network.
pub(crate) fn address_within(field: Field, is: bool, network: IpNetwork) -> Vec<Expressions> {
    let family = Family::of(network.ip());
    let bytes = family.address_bytes();
    let masked = expression(
        "bitwise",
        vec![
            number(1, FIRST),
            number(2, FIRST),
            number(3, bytes),
            data(4, &octets(network.mask())),
            data(5, &vec![0; bytes as usize]),
        ],
    );
    vec![load_address(field, family, FIRST), masked, compare(is, &octets(network.network()))]
}

/// Goes on if the packet has an address of 127.0.0.0/8.
pub(crate) fn of_loopback(field: Field) -> Vec<Expressions> {
    let load = payload(FIRST, NETWORK_HEADER, field.offset(Family::V4), 1);
    vec![load, compare(true, &[127])]
}

/// Goes on if the packet came, or didn't come, by loopback.
pub(crate) fn by_loopback(is: bool) -> Vec<Expressions> {
    vec![meta(INPUT_NAME, FIRST), compare(is, &device_key("lo"))]
}

/// Goes on if the packet came by this device.
pub(crate) fn by_device(name: &str) -> Vec<Expressions> {
    vec![meta(INPUT_NAME, FIRST), compare(true, &device_key(name))]
}

/// Goes on if the packet is of UDP, for this port.
pub(crate) fn to_udp_port(port: u16) -> Vec<Expressions> {
    let load = payload(FIRST, TRANSPORT_HEADER, 2, 2);
    vec![meta(PROTOCOL, FIRST), compare(true, &[UDP]), load, compare(true, &port.to_be_bytes())]
}

/// Goes on if the packet came by a device whose name is in a set.
pub(crate) fn by_device_of(set: &str) -> Vec<Expressions> {
    vec![meta(INPUT_NAME, FIRST), lookup(set, None)]
}

/// Goes on if the packet is for this host.
pub(crate) fn for_this_host() -> Vec<Expressions> {
    let fib = expression("fib", vec![number(1, FIRST), number(2, ADDRESS_TYPE), number(3, OF_DESTINATION)]);
    vec![fib, compare(true, &LOCAL.to_ne_bytes())]
}

/// Sends the packet where a map says for its protocol and port, and, if `addressed`, for its destination before them.
pub(crate) fn translate_by(map: &str, family: Family, addressed: bool) -> Vec<Expressions> {
    let words = family.address_bytes() / 4;
    let begin = if addressed { FIRST_32 + words } else { FIRST_32 };
    let mut all: Vec<Expressions> =
        addressed.then(|| load_address(Field::Destination, family, FIRST)).into_iter().collect();
    all.push(meta(PROTOCOL, begin));
    // Destination ports of TCP, UDP and SCTP lie alike.
    all.push(payload(begin + 1, TRANSPORT_HEADER, 2, 2));
    all.push(lookup(map, Some(FIRST)));
    let destination = 1;
    all.push(expression(
        "nat",
        vec![
            number(1, destination),
            number(2, u32::from(family.address_family())),
            number(3, FIRST),
            number(5, FIRST_32 + words),
        ],
    ));
    all
}

/// Sets or clears a bit of the packet's mark.
pub(crate) fn mark(bit: u32, on: bool) -> Vec<Expressions> {
    let change = expression(
        "bitwise",
        vec![
            number(1, FIRST),
            number(2, FIRST),
            number(3, 4),
            data(4, &(!bit).to_ne_bytes()),
            data(5, &(if on { bit } else { 0 }).to_ne_bytes()),
        ],
    );
    vec![meta(MARK, FIRST), change, expression("meta", vec![number(2, MARK), number(3, FIRST)])]
}

/// Goes on if a bit of the packet's mark is set.
pub(crate) fn is_marked(bit: u32) -> Vec<Expressions> {
    let only = expression(
        "bitwise",
        vec![number(1, FIRST), number(2, FIRST), number(3, 4), data(4, &bit.to_ne_bytes()), data(5, &[0; 4])],
    );
    vec![meta(MARK, FIRST), only, compare(true, &bit.to_ne_bytes())]
}

/// Gives the packet the address of the device that it leaves by.
pub(crate) fn masquerade() -> Expressions {
    expression("masq", vec![number(1, FULLY_RANDOM)])
}

/// Goes on in another chain, and comes back.
pub(crate) fn jump(chain: &str) -> Expressions {
    verdict(JUMP, Some(chain))
}

/// Drops the packet.
pub(crate) fn drop() -> Expressions {
    verdict(DROP, None)
}

/// A device's name as sets of them have it.
pub(crate) fn device_key(name: &str) -> Vec<u8> {
    let mut key = name.as_bytes().to_vec();
    key.resize(16, 0);
    key
}

/// An address's bytes.
pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn load_address(field: Field, family: Family, register: u32) -> Expressions {
    payload(register, NETWORK_HEADER, field.offset(family), family.address_bytes())
}

fn payload(register: u32, header: u32, offset: u32, bytes: u32) -> Expressions {
    expression("payload", vec![number(1, register), number(2, header), number(3, offset), number(4, bytes)])
}

fn meta(key: u32, register: u32) -> Expressions {
    expression("meta", vec![number(1, register), number(2, key)])
}

/// Compares the first register.
fn compare(equal: bool, value: &[u8]) -> Expressions {
    let operator = if equal { EQUAL } else { NOT_EQUAL };
    expression("cmp", vec![number(1, FIRST), number(2, operator), data(3, value)])
}

/// Looks the first registers up in a set, or in a map that answers into a register.
fn lookup(set: &str, answer: Option<u32>) -> Expressions {
    let mut attributes = vec![text(1, set), number(2, FIRST)];
    attributes.extend(answer.map(|register| number(3, register)));
    expression("lookup", attributes)
}

fn verdict(code: i32, chain: Option<&str>) -> Expressions {
    let mut verdict = vec![number(1, code.cast_unsigned())];
    verdict.extend(chain.map(|chain| text(2, chain)));
    // Register 0 is the verdict's.
    expression("immediate", vec![number(1, 0), nested(2, vec![nested(2, verdict)])])
}

fn expression(name: &str, attributes: Vec<DefaultNla>) -> Expressions {
    Expressions::Other { expression_type: name.to_owned(), attributes }
}

fn number(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

fn text(kind: u16, value: &str) -> DefaultNla {
    DefaultNla::new(kind, [value.as_bytes(), &[0]].concat())
}

/// `NFTA_DATA_VALUE` within an attribute.
fn data(kind: u16, value: &[u8]) -> DefaultNla {
    nested(kind, vec![DefaultNla::new(1, value.to_vec())])
}

fn nested(kind: u16, attributes: Vec<DefaultNla>) -> DefaultNla {
    let mut bytes = vec![0; attributes.as_slice().buffer_len()];
    attributes.as_slice().emit(&mut bytes);
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}
