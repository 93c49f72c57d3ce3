mod shared;

use proptest::prelude::*;

use super::*;
use crate::packet::{ACK, Family, V4, V6, parse};

fn halves_of(frame: &[u8]) -> Vec<u16> {
    frame.chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])).collect()
}

fn bytes_of<const N: usize>(head: &Head<N>) -> Vec<u8> {
    head.iter().flat_map(|half| half.to_ne_bytes()).collect()
}

fn head<const N: usize>(frame: &[u8]) -> Head<N> {
    halves_of(frame)[..N].try_into().unwrap()
}

/// The checksum as RFC 1071 words it.
fn reference(bytes: &[u8]) -> u16 {
    let mut total: u64 =
        bytes.chunks(2).map(|c| u64::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !u16::try_from(total).unwrap()
}

#[derive(Debug)]
struct Made {
    source: Address,
    destination: Address,
    protocol: u8,
    ports: [u16; 2],
    payload: Vec<u8>,
}

impl Made {
    fn is_v4(&self) -> bool {
        self.source.as_v4().is_some()
    }

    fn octets(&self) -> (Vec<u8>, Vec<u8>) {
        let of = |address: &Address| address.as_v4().map_or(address.0.to_vec(), |v4| v4.to_vec());
        (of(&self.source), of(&self.destination))
    }

    fn pseudo(&self, length: usize) -> Vec<u8> {
        let (source, destination) = self.octets();
        let length = u16::try_from(length).unwrap().to_be_bytes();
        [&source, &destination, &[0, self.protocol][..], &length].concat()
    }

    fn transport(&self, checksum: impl FnOnce(&[u8]) -> u16) -> Vec<u8> {
        let [from, to] = self.ports.map(u16::to_be_bytes);
        let mut out = [from, to].concat();
        let at = if self.protocol == TCP {
            out.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, ACK, 1, 0, 0, 0, 0, 0]);
            16
        } else {
            out.extend(u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes());
            out.extend([0, 0]);
            6
        };
        out.extend(&self.payload);
        let sum = checksum(&out).to_be_bytes();
        out[at..at + 2].copy_from_slice(&sum);
        out
    }

    /// With a checksum that is finished.
    fn frame(&self) -> Vec<u8> {
        self.ethernet(&self.transport(|bytes| {
            match reference(&[&self.pseudo(bytes.len()), bytes].concat()) {
                0 if self.protocol == UDP => 0xffff,
                sum => sum,
            }
        }))
    }

    /// With one that a device has yet to finish: the kernel leaves the folded sum of the pseudo-header there.
    fn unfinished(&self) -> Vec<u8> {
        self.ethernet(&self.transport(|bytes| !reference(&self.pseudo(bytes.len()))))
    }

    fn ethernet(&self, transport: &[u8]) -> Vec<u8> {
        let mut frame = vec![1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2];
        let (source, destination) = self.octets();
        if self.is_v4() {
            let length = u16::try_from(20 + transport.len()).unwrap().to_be_bytes();
            let mut ip = vec![0x45, 0, length[0], length[1], 1, 2, 0x40, 0, 64, self.protocol, 0, 0];
            ip.extend([source, destination].concat());
            let sum = reference(&ip).to_be_bytes();
            ip[10..12].copy_from_slice(&sum);
            frame.extend([8, 0]);
            frame.extend(ip);
        } else {
            let length = u16::try_from(transport.len()).unwrap().to_be_bytes();
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, length[0], length[1], self.protocol, 64]);
            frame.extend([source, destination].concat());
        }
        frame.extend(transport);
        frame
    }
}

fn entry(made: &Made) -> FlowValue {
    FlowValue {
        source: made.source,
        destination: made.destination,
        source_port: Port::new(made.ports[0]),
        destination_port: Port::new(made.ports[1]),
        ifindex: 1,
        generation: 1,
        flags: 0,
        last_seen: 0,
    }
}

/// Reads a frame by the plain path; `None` if it is left alone.
fn read(frame: &[u8], v4: bool, protocol: u8) -> Option<Plain> {
    let mut packet = Plain::empty();
    match (v4, protocol) {
        (true, UDP) => udp::<Plain4, UDP4>(&head(frame), &mut packet),
        (true, _) => tcp::<Plain4, TCP4>(&head(frame), &mut packet),
        (false, UDP) => udp::<Plain6, UDP6>(&head(frame), &mut packet),
        (false, _) => tcp::<Plain6, TCP6>(&head(frame), &mut packet),
    }?;
    Some(packet)
}

fn translated<S: Shape, const N: usize>(frame: &[u8], made: &Made, to: &FlowValue) -> Vec<u8> {
    let mut start: Head<N> = head(frame);
    let packet = read(frame, made.is_v4(), made.protocol).unwrap();
    if made.protocol == UDP {
        translate_udp::<S, N>(&mut start, &packet.key, to);
    } else {
        translate_tcp::<S, N>(&mut start, &packet.key, to);
    }
    set_ethernet(&mut start, &[3; 6], &[4; 6]);
    let mut out = frame.to_vec();
    out[..N * 2].copy_from_slice(&bytes_of(&start));
    out
}

fn address(v4: bool) -> BoxedStrategy<Address> {
    if v4 {
        any::<[u8; 4]>().prop_map(Address::v4).boxed()
    } else {
        any::<[u8; 15]>()
            .prop_map(|tail| {
                let mut bytes = [0xfd; 16];
                bytes[1..].copy_from_slice(&tail);
                Address(bytes)
            })
            .boxed()
    }
}

fn made(v4: bool, protocol: u8) -> impl Strategy<Value = Made> {
    let payload = prop::collection::vec(any::<u8>(), 0..40);
    (address(v4), address(v4), any::<[u16; 2]>(), payload).prop_map(
        move |(source, destination, ports, payload)| Made { source, destination, protocol, ports, payload },
    )
}

fn pair() -> impl Strategy<Value = (Made, Made)> {
    (any::<bool>(), prop::sample::select(vec![TCP, UDP]))
        .prop_flat_map(|(v4, protocol)| (made(v4, protocol), made(v4, protocol)))
}

proptest! {
    /// A translated frame is the frame that would have been made of the new addresses in the first place.
    #[test]
    fn a_translated_frame_is_as_if_it_had_been_made_so((from, mut to) in pair()) {
        to.payload.clone_from(&from.payload);
        let frame = from.frame();
        // One in 65536 looks unfinished, and is left alone.
        prop_assume!(read(&frame, from.is_v4(), from.protocol).is_some());
        let out = match (from.is_v4(), from.protocol) {
            (true, UDP) => translated::<Plain4, UDP4>(&frame, &from, &entry(&to)),
            (true, _) => translated::<Plain4, TCP4>(&frame, &from, &entry(&to)),
            (false, UDP) => translated::<Plain6, UDP6>(&frame, &from, &entry(&to)),
            (false, _) => translated::<Plain6, TCP6>(&frame, &from, &entry(&to)),
        };
        let wanted = to.frame();
        prop_assert_eq!(&out[14..], &wanted[14..]);
        prop_assert_eq!(&out[..12], &[3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]);
    }

    #[test]
    fn it_reads_what_the_tc_program_reads((packet, _) in pair()) {
        let frame = packet.frame();
        let known = if packet.is_v4() { parse::<V4, _>(&frame[..]) } else { parse::<V6, _>(&frame[..]) }.unwrap();
        if let Some(plain) = read(&frame, packet.is_v4(), packet.protocol) {
            prop_assert_eq!(plain.key, known.key);
            prop_assert_eq!(plain.total_bytes, known.total_bytes);
        }
    }

    #[test]
    fn a_checksum_that_a_device_has_yet_to_finish_is_left_alone((packet, _) in pair()) {
        prop_assert_eq!(read(&packet.unfinished(), packet.is_v4(), packet.protocol), None);
    }
}

fn plain(v4: bool, protocol: u8) -> Made {
    let address = |low| {
        if v4 {
            Address::v4([10, 0, 0, low])
        } else {
            Address([[0xfd; 15].as_slice(), &[low]].concat().try_into().unwrap())
        }
    };
    Made {
        source: address(1),
        destination: address(2),
        protocol,
        ports: [5_000, 30_080],
        payload: b"hello".to_vec(),
    }
}

#[test]
fn what_is_of_another_shape_is_left_alone() {
    for protocol in [UDP, TCP] {
        let frame = plain(true, protocol).frame();
        assert!(read(&frame, true, protocol).is_some());
        let rows: [(&str, usize, u8); 6] = [
            ("options", 14, 0x46),
            ("another version", 14, 0x65),
            ("more fragments", 20, 0x20),
            ("a later fragment", 21, 1),
            ("a length that is none", 17, 10),
            ("the reserved flag", 20, 0x80),
        ];
        for (name, at, value) in rows {
            let mut frame = frame.clone();
            frame[at] = value;
            assert_eq!(read(&frame, true, protocol), None, "{name}");
        }
        let frame = plain(false, protocol).frame();
        assert!(read(&frame, false, protocol).is_some());
        let mut other = frame.clone();
        other[14] = 0x45;
        assert_eq!(read(&other, false, protocol), None, "another version");
        let mut jumbo = frame.clone();
        jumbo[18..20].fill(0);
        assert_eq!(read(&jumbo, false, protocol), None, "no length");
        let mut mapped = frame;
        mapped[22..34].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
        assert_eq!(read(&mapped, false, protocol), None, "an IPv4-mapped address");
    }
}

#[test]
fn what_begins_or_ends_a_connection_is_left_alone() {
    for flag in [SYN, FIN, RST, SYN | ACK, FIN | ACK] {
        for v4 in [true, false] {
            let mut frame = plain(v4, TCP).frame();
            frame[if v4 { 47 } else { 67 }] = flag;
            assert_eq!(read(&frame, v4, TCP), None, "{flag:#x}");
        }
    }
}

#[test]
fn a_datagram_without_a_checksum_stays_without_or_is_left_alone() {
    let mut frame = plain(true, UDP).frame();
    frame[40..42].fill(0);
    let to = plain(true, UDP);
    let out = translated::<Plain4, UDP4>(&frame, &to, &entry(&Made { ports: [1, 2], ..plain(true, UDP) }));
    assert_eq!((&out[34..38], &out[40..42]), (&[0, 1, 0, 2][..], &[0, 0][..]));
    let mut frame = plain(false, UDP).frame();
    frame[60..62].fill(0);
    assert_eq!(read(&frame, false, UDP), None, "of IPv6");
}

#[test]
fn the_shapes_are_those_of_the_headers() {
    assert_eq!((Plain4::TRANSPORT - ETHERNET) * 2, V4::HEADER_BYTES);
    assert_eq!((Plain6::TRANSPORT - ETHERNET) * 2, V6::HEADER_BYTES);
    assert_eq!(Plain4::ETHERTYPE.to_ne_bytes(), V4::ETHERTYPE);
    assert_eq!(Plain6::ETHERTYPE.to_ne_bytes(), V6::ETHERTYPE);
}
