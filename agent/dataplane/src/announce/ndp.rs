//! Neighbour discovery of IPv6 (RFC 4861) as bytes: who has an address, and that it is here. The kernel fills in checksums.

mod socket;

use std::net::Ipv6Addr;

use weft_cni_netlink::Mac;

pub(super) use self::socket::NdpSocket;

const SOLICITATION: u8 = 135;
pub(super) const ADVERTISEMENT: u8 = 136;
/// An advertisement's flag "override": caches are to forget another hardware address.
const OVERRIDE: u8 = 0x20;
const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// A header with flags and target, and one option with an address of Ethernet.
pub(super) const MESSAGE_BYTES: usize = HEADER_BYTES + OPTION_BYTES;
const HEADER_BYTES: usize = 24;
/// Options are counted in these.
const OPTION_BYTES: usize = 8;
/// What neighbours send has this hop limit: nobody has forwarded it.
pub(super) const HOP_LIMIT: u8 = 255;
pub(super) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// "Who has `target`?"
pub(super) fn solicitation(own: Mac, target: Ipv6Addr) -> [u8; MESSAGE_BYTES] {
    message([SOLICITATION, 0], target, SOURCE_LINK_ADDRESS, own)
}

/// "`target` is here", unasked.
pub(super) fn advertisement(own: Mac, target: Ipv6Addr) -> [u8; MESSAGE_BYTES] {
    message([ADVERTISEMENT, OVERRIDE], target, TARGET_LINK_ADDRESS, own)
}

fn message([kind, flags]: [u8; 2], target: Ipv6Addr, option: u8, own: Mac) -> [u8; MESSAGE_BYTES] {
    let mut bytes = [0; MESSAGE_BYTES];
    bytes[0] = kind;
    bytes[4] = flags;
    bytes[8..HEADER_BYTES].copy_from_slice(&target.octets());
    // The option is one unit long.
    bytes[HEADER_BYTES..HEADER_BYTES + 2].copy_from_slice(&[option, 1]);
    bytes[HEADER_BYTES + 2..].copy_from_slice(&own.0);
    bytes
}

/// Where a solicitation for an address goes: to the few nodes that may have it (RFC 4291 §2.7.1).
pub(super) fn solicited_node(target: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = target.octets();
    let mut group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).octets();
    group[13..].copy_from_slice(&[a, b, c]);
    group.into()
}

/// Which address an advertisement is about and who has it; `None` for what is none, or doesn't say.
pub(super) fn read_advertisement(message: &[u8]) -> Option<(Ipv6Addr, Mac)> {
    let header: &[u8; HEADER_BYTES] = message.first_chunk()?;
    if header[0] != ADVERTISEMENT || header[1] != 0 {
        return None;
    }
    let target = Ipv6Addr::from(*header.last_chunk::<16>()?);
    let mut options = &message[HEADER_BYTES..];
    while let [kind, units, ..] = *options {
        // Without a length no further option is found.
        let length = usize::from(units) * OPTION_BYTES;
        let option = options.get(..length).filter(|option| !option.is_empty())?;
        if kind == TARGET_LINK_ADDRESS && units == 1 {
            return Some((target, Mac(*option.last_chunk()?)));
        }
        options = &options[length..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const TARGET: Ipv6Addr = Ipv6Addr::new(0xfd44, 0, 0, 0, 0, 0, 0xab, 0xcdef);

    #[test]
    fn messages_have_the_rfcs_layout() {
        let target = [0xfd, 0x44, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xab, 0xcd, 0xef];
        let asked = [&[135, 0, 0, 0, 0, 0, 0, 0], &target[..], &[1, 1, 2, 0, 0, 0, 0, 1]].concat();
        assert_eq!(solicitation(OWN, TARGET)[..], asked);
        let said = [&[136, 0, 0, 0, 0x20, 0, 0, 0], &target[..], &[2, 1, 2, 0, 0, 0, 0, 1]].concat();
        assert_eq!(advertisement(OWN, TARGET)[..], said);
        assert_eq!(solicited_node(TARGET).to_string(), "ff02::1:ffab:cdef");
    }

    #[test]
    fn an_advertisement_is_read_whatever_options_it_has_and_nothing_else_is() {
        let message = advertisement(OWN, TARGET);
        assert_eq!(read_advertisement(&message), Some((TARGET, OWN)));
        for cut in 0..MESSAGE_BYTES {
            assert_eq!(read_advertisement(&message[..cut]), None, "{cut}");
        }
        let (header, option) = message.split_at(HEADER_BYTES);
        let nonce = [14, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(read_advertisement(&[header, &nonce, option].concat()), Some((TARGET, OWN)));
        let endless = [14, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(read_advertisement(&[header, &endless, option].concat()), None);
        assert_eq!(read_advertisement(&solicitation(OWN, TARGET)), None);
        let mut coded = message;
        coded[1] = 1;
        assert_eq!(read_advertisement(&coded), None);
    }
}
