//! What the fuzzer feeds: frames from the node's link.

use super::arp::{FRAME_BYTES, Frame};

/// A frame as the announcer's socket hands it over: what is read of it is what it would be written as. Whether it is ARP.
pub fn arp(bytes: &[u8]) -> bool {
    let Some(frame) = Frame::decode(bytes) else { return false };
    let written = frame.encode(frame.target_mac);
    assert_eq!(Frame::decode(&written), Some(frame));
    assert_eq!(bytes[12..FRAME_BYTES], written[12..], "all of the packet is kept");
    true
}

/// What the socket for neighbour discovery hands over. Whether it says who has an address.
pub fn ndp(bytes: &[u8]) -> bool {
    let Some((target, mac)) = super::ndp::read_advertisement(bytes) else { return false };
    assert_eq!(super::ndp::read_advertisement(&super::ndp::advertisement(mac, target)), Some((target, mac)));
    true
}
