//! What the tc programs do in place: they read what they read otherwise, and rewrite as the kernel's notes on a packet want it.

use proptest::prelude::*;

use super::*;
use crate::fast::shared::{Left, read_tcp, read_udp, rewrite_tcp, rewrite_udp};
use crate::packet::{Packet, V4, V6, parse};

fn read_shared(frame: &[u8], v4: bool, protocol: u8) -> Option<Packet> {
    let mut packet = Packet::between(Address::ANY, Address::ANY);
    match (v4, protocol) {
        (true, UDP) => read_udp::<Plain4, UDP4>(&head(frame), &mut packet),
        (true, _) => read_tcp::<Plain4, TCP4>(&head(frame), &mut packet),
        (false, UDP) => read_udp::<Plain6, UDP6>(&head(frame), &mut packet),
        (false, _) => read_tcp::<Plain6, TCP6>(&head(frame), &mut packet),
    }?;
    Some(packet)
}

fn rewritten(frame: &[u8], made: &Made, to: &FlowValue, is_segmented: bool) -> (Left, Vec<u8>) {
    fn whole<const N: usize>(frame: &[u8], work: impl FnOnce(&mut Head<N>) -> Left) -> (Left, Vec<u8>) {
        let mut start: Head<N> = head(frame);
        let left = work(&mut start);
        let mut out = frame.to_vec();
        out[..N * 2].copy_from_slice(&bytes_of(&start));
        (left, out)
    }
    let packet = read_shared(frame, made.is_v4(), made.protocol).unwrap();
    match (made.is_v4(), made.protocol) {
        (true, UDP) => whole(frame, |start| rewrite_udp::<Plain4, UDP4>(start, &packet, to, is_segmented)),
        (true, _) => whole(frame, |start| rewrite_tcp::<Plain4, TCP4>(start, &packet, to, is_segmented)),
        (false, UDP) => whole(frame, |start| rewrite_udp::<Plain6, UDP6>(start, &packet, to, is_segmented)),
        (false, _) => whole(frame, |start| rewrite_tcp::<Plain6, TCP6>(start, &packet, to, is_segmented)),
    }
}

/// Where the transport's checksum is.
fn checksum_at(made: &Made) -> usize {
    let transport = if made.is_v4() { 34 } else { 54 };
    transport + if made.protocol == UDP { 6 } else { 16 }
}

/// The sum of what lies behind the Ethernet header, as a device makes it. 0 and 0xffff are the same number.
fn device_sum(frame: &[u8]) -> u16 {
    !reference(&frame[14..]) % 0xffff
}

/// A sum after a change, as the kernel adds it. The change is of half-words as they stand in memory.
fn changed(sum: u16, change: u32) -> u16 {
    let folded = (change & 0xffff) + (change >> 16);
    let folded = u16::from_be_bytes(u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap().to_ne_bytes());
    u16::try_from((u32::from(sum) + u32::from(folded)) % 0xffff).unwrap()
}

/// The two packets have one payload.
fn both() -> impl Strategy<Value = (Made, Made)> {
    pair().prop_map(|(from, mut to)| {
        to.payload.clone_from(&from.payload);
        (from, to)
    })
}

proptest! {
    #[test]
    fn it_reads_whatever_the_helpers_would_read((packet, _) in pair(), flags: u8) {
        let mut frame = packet.frame();
        if packet.protocol == TCP {
            frame[checksum_at(&packet) - 3] = flags;
        }
        let known = if packet.is_v4() { parse::<V4, _>(&frame[..]) } else { parse::<V6, _>(&frame[..]) };
        prop_assert_eq!(read_shared(&frame, packet.is_v4(), packet.protocol), known);
    }

    #[test]
    fn a_finished_packet_is_as_if_it_had_been_made_so((from, to) in both()) {
        let frame = from.frame();
        let (left, out) = rewritten(&frame, &from, &entry(&to), false);
        match left {
            Left::Sum(change) => {
                prop_assert_eq!(&out[14..], &to.frame()[14..]);
                prop_assert_eq!(changed(device_sum(&frame), change), device_sum(&out));
            }
            // One in 65536 looks unfinished: the kernel knows better, and applies the change.
            Left::Checksum(change) => finish(&out, &to, change, &to.frame()),
        }
    }

    #[test]
    fn a_packet_without_a_checksum_stays_so((mut from, mut to) in both()) {
        (from.protocol, to.protocol) = (UDP, UDP);
        let without = |made: &Made| {
            let mut frame = made.frame();
            frame[checksum_at(made)..checksum_at(made) + 2].fill(0);
            frame
        };
        let frame = without(&from);
        let (left, out) = rewritten(&frame, &from, &entry(&to), false);
        prop_assert_eq!(&out[14..], &without(&to)[14..]);
        if let Left::Sum(change) = left {
            prop_assert_eq!(changed(device_sum(&frame), change), device_sum(&out));
        }
    }

    #[test]
    fn an_unfinished_one_is_left_to_the_kernel((from, to) in both()) {
        for is_segmented in [false, true] {
            let (left, out) = rewritten(&from.unfinished(), &from, &entry(&to), is_segmented);
            let Left::Checksum(change) = left else { panic!("{left:?}") };
            // Of these the kernel applies the addresses only, and not inverted: the device will add the ports.
            let at = checksum_at(&to);
            let wanted = to.unfinished();
            let begun = u16::from_be_bytes([out[at], out[at + 1]]);
            let sum = u16::from_be_bytes([wanted[at], wanted[at + 1]]);
            prop_assert_eq!(changed(begun, change.addresses), sum % 0xffff);
            prop_assert_eq!(&out[14..at], &wanted[14..at]);
            prop_assert_eq!(&out[at + 2..], &wanted[at + 2..]);
        }
    }

    #[test]
    fn a_packet_that_is_to_be_cut_is_left_to_the_kernel((from, to) in both()) {
        let (left, out) = rewritten(&from.frame(), &from, &entry(&to), true);
        let Left::Checksum(change) = left else { panic!("{left:?}") };
        finish(&out, &to, change, &to.frame());
    }

    #[test]
    fn a_hop_less_keeps_the_sums((packet, _) in pair(), hops in 2..=255_u8) {
        fn hop<S: Shape, const N: usize>(frame: &mut [u8]) -> Option<u32> {
            let mut start: Head<N> = head(frame);
            let change = S::hop(&mut start)?;
            frame[..N * 2].copy_from_slice(&bytes_of(&start));
            Some(change)
        }
        let at = if packet.is_v4() { 22 } else { 21 };
        let with = |hops| {
            let mut frame = packet.frame();
            frame[at] = hops;
            if packet.is_v4() {
                frame[24..26].fill(0);
                let sum = reference(&frame[14..34]).to_be_bytes();
                frame[24..26].copy_from_slice(&sum);
            }
            frame
        };
        let of = |frame: &mut Vec<u8>| {
            if packet.is_v4() { hop::<Plain4, IP4>(frame) } else { hop::<Plain6, IP6>(frame) }
        };
        let mut frame = with(hops);
        let before = device_sum(&frame);
        let change = of(&mut frame).unwrap();
        prop_assert_eq!(&frame, &with(hops - 1));
        prop_assert_eq!(changed(before, change), device_sum(&frame));
        for none in [0, 1] {
            prop_assert_eq!(of(&mut with(none)), None);
        }
    }
}

/// Applies a change to a finished checksum as the kernel does, and compares.
fn finish(out: &[u8], to: &Made, change: Change, wanted: &[u8]) {
    let at = checksum_at(to);
    let sum = !u16::from_be_bytes([out[at], out[at + 1]]);
    let sum = changed(changed(sum, change.addresses), change.ports);
    let wanted_sum = !u16::from_be_bytes([wanted[at], wanted[at + 1]]);
    assert_eq!(sum, wanted_sum % 0xffff);
    assert_eq!((&out[14..at], &out[at + 2..]), (&wanted[14..at], &wanted[at + 2..]));
}

#[test]
fn a_frame_for_a_router_goes_on_from_there() {
    let mut frame: Head<7> = head(&[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 8, 0]);
    pass_on(&mut frame, &[1; 6]);
    assert_eq!(bytes_of(&frame)[..12], [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2], "it is the pod's already");
    pass_on(&mut frame, &[1, 1, 1, 1, 1, 3]);
    assert_eq!(bytes_of(&frame)[..12], [1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1]);
}
