use netlink_packet_core::Emitable as _;
use netlink_packet_route::link::{InfoKind, LinkFlags, State};

use super::*;

fn veth() -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = 7;
    message.header.flags = LinkFlags::Up | LinkFlags::Broadcast;
    message.attributes = vec![
        LinkAttribute::IfName("weft0123".to_owned()),
        LinkAttribute::TxQueueLen(1_000),
        LinkAttribute::OperState(State::Up),
        LinkAttribute::Mtu(1_450),
        LinkAttribute::Controller(2),
        LinkAttribute::Link(5),
        LinkAttribute::LinkNetNsId(3),
        LinkAttribute::Qdisc("noqueue".to_owned()),
        LinkAttribute::Address(vec![2, 0x77, 10, 42, 1, 7]),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
    ];
    message
}

fn bytes(message: &LinkMessage) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

#[test]
fn a_device_is_read_from_its_bytes() {
    let expected = Link {
        index: 7,
        name: "weft0123".to_owned(),
        mac: Some(Mac([2, 0x77, 10, 42, 1, 7])),
        mtu_bytes: 1_450,
        up: true,
        running: true,
        loopback: false,
        master: Some(2),
        peer_index: Some(5),
        peer_namespace: Some(3),
        kind: "veth".to_owned(),
        queue: "noqueue".to_owned(),
    };
    assert_eq!(read(&bytes(&veth())).unwrap(), expected);
}

#[test]
fn what_a_device_does_not_say_is_not_there() {
    let mut message = LinkMessage::default();
    message.header.index = 1;
    message.header.flags = LinkFlags::Loopback;
    let link = read(&bytes(&message)).unwrap();
    assert!(link.loopback && !link.up && !link.running && link.kind.is_empty(), "{link:?}");
    assert_eq!((link.mac, link.master, link.peer_index, link.peer_namespace), (None, None, None, None));
    message.attributes = vec![LinkAttribute::OperState(State::Down), LinkAttribute::Address(vec![0; 4])];
    let link = read(&bytes(&message)).unwrap();
    assert_eq!((link.running, link.mac), (false, None), "down, and not of Ethernet");
}

#[test]
fn what_is_cut_off_is_refused() {
    let whole = bytes(&veth());
    let is_cut = |length: usize| read(&whole[..length]).is_err();
    // Only where an attribute has just ended, which is at a multiple of four, may a message end too.
    let ends = (0..whole.len()).step_by(4).filter(|length| !is_cut(*length)).count();
    assert_eq!(ends, veth().attributes.len());
    assert!((0..HEADER_BYTES).all(is_cut));
}

#[test]
fn another_message_is_no_device() {
    let mut header = NetlinkHeader::default();
    header.message_type = libc::RTM_DELLINK;
    assert!(FoundLink::deserialize(&header, &bytes(&veth())).unwrap().0.is_none());
}
