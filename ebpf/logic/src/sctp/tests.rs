//! SCTP's checksum against CRC32c bit by bit, packets as they are read, and the answer that refuses one.

use proptest::prelude::*;
use weft_ebpf_abi::{Address, Port, SCTP};

use super::*;
use crate::packet::answer::sctp_abort;
use crate::packet::{Part, V4, V6, parse, parse_quote};

/// CRC32c as RFC 9260 appendix A has it, a bit at a time.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ POLYNOMIAL };
        }
    }
    !crc
}

/// Puts the checksum into a packet.
fn summed(mut packet: Vec<u8>) -> Vec<u8> {
    packet[CHECKSUM..CHECKSUM + 4].fill(0);
    let sum = crc32c(&packet).to_le_bytes();
    packet[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum);
    packet
}

/// A packet of one chunk.
fn packet(ports: [u16; 2], chunk: u8, rest: &[u8]) -> Vec<u8> {
    let [from, to] = ports.map(u16::to_be_bytes);
    summed([&from[..], &to, &[9, 8, 7, 6], &[0; 4], &[chunk, 0, 0, 4], rest].concat())
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().unwrap())
}

/// A frame of IPv4 or IPv6.
fn frame(v6: bool, fragment: u16, sctp: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    let [a, b] = fragment.to_be_bytes();
    if v6 {
        let [c, d] = u16::try_from(sctp.len()).unwrap().to_be_bytes();
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, c, d, SCTP, 64]);
        frame.extend([[0xfd; 16], [0xfe; 16]].concat());
    } else {
        let [c, d] = u16::try_from(20 + sctp.len()).unwrap().to_be_bytes();
        frame.extend([8, 0, 0x45, 0, c, d, 0, 7, a, b, 64, SCTP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    frame.extend(sctp);
    frame
}

#[test]
fn it_is_the_crc_that_was_published() {
    // RFC 3720 appendix B.4 has these vectors.
    let ascending: Vec<u8> = (0..32).collect();
    for (bytes, crc) in [(&[0; 32][..], 0x8a91_36aa), (&[0xff; 32], 0x62a8_ab43), (&ascending, 0x46dd_794e)] {
        assert_eq!(crc32c(bytes), crc);
        let words: [u32; 8] = std::array::from_fn(|n| word(&bytes[n * 4..]).to_le());
        assert_eq!(checksum(&words), crc);
    }
}

#[test]
fn a_packet_tells_its_ports_and_what_its_first_chunk_says() {
    let rows = [
        ("INIT", INIT, SYN),
        ("INIT ACK", INIT_ACK, SYN | ACK),
        ("ABORT", ABORT, RST),
        ("SHUTDOWN COMPLETE", SHUTDOWN_COMPLETE, FIN),
        ("DATA", 0, 0),
        ("HEARTBEAT", 4, 0),
        ("SHUTDOWN", 7, 0),
        ("COOKIE ECHO", 10, 0),
    ];
    for (name, chunk, wanted) in rows {
        let sctp = packet([5_000, 80], chunk, &[0; 16]);
        let (v4, v6) = (frame(false, 0, &sctp), frame(true, 0, &sctp));
        for read in [parse::<V4, _>(v4.as_slice()).unwrap(), parse::<V6, _>(v6.as_slice()).unwrap()] {
            assert_eq!((read.key.protocol, read.flags, read.part), (SCTP, wanted, Part::Whole), "{name}");
            assert_eq!((read.key.source_port.get(), read.key.destination_port.get()), (5_000, 80), "{name}");
        }
    }
    let sctp = packet([5_000, 80], INIT, &[]);
    let without_chunk = frame(false, 0, &sctp[..12]);
    assert_eq!(parse::<V4, _>(without_chunk.as_slice()), None, "no packet is without a chunk");
    let (first, later) = (frame(false, 0x2000, &sctp), frame(false, 3, &sctp));
    let first = parse::<V4, _>(first.as_slice()).unwrap();
    let mut later = parse::<V4, _>(later.as_slice()).unwrap();
    assert_eq!((first.part, first.flags), (Part::First, SYN));
    assert_eq!((later.part, later.flags, later.key.source_port.get()), (Part::Later, 0, 0));
    later.complete(&first.fragment_value());
    assert_eq!(later.key, first.key);
}

#[test]
fn a_first_fragment_tells_how_long_all_of_it_is() {
    let chunk = |bytes: u16| {
        let [a, b] = bytes.to_be_bytes();
        [vec![0, 3, a, b], vec![7; usize::from(bytes) - 4]].concat()
    };
    let sack = [3, 0, 0, 16, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0];
    let rows = [
        ("one chunk", chunk(1_400), Some(1_412)),
        ("one that is padded", chunk(1_401), Some(1_416)),
        ("another before it", [&sack[..], &chunk(1_401)].concat(), Some(1_432)),
        ("all are whole", [&sack[..], &chunk(40)].concat(), None),
        ("too many", [sack.repeat(8), chunk(1_400)].concat(), None),
        ("shorter than a chunk can be", [&[0, 3, 0, 3], &chunk(1_400)[..]].concat(), None),
        ("the header is cut off", [&sack[..], &[0; 84], &chunk(1_400)].concat(), None),
    ];
    for (name, chunks, wanted) in rows {
        let mut sctp = [&[0; 12][..], &chunks].concat();
        sctp.truncate(200);
        let read = parse::<V4, _>(frame(false, 0x2000, &sctp).as_slice()).unwrap();
        assert_eq!(bytes_of_all(frame(false, 0x2000, &sctp).as_slice(), &read), wanted, "{name}");
    }
}

#[test]
fn errors_quote_it() {
    let quoted = frame(false, 0, &packet([5_000, 80], 0, &[]));
    // A router need not quote more than the ports and the tag.
    let quoted = &quoted[14..14 + 28];
    let mut error = frame(false, 0, &[&[3, 4, 0, 0, 0, 0, 5, 0], quoted].concat());
    error[23] = 1;
    let outer = parse::<V4, _>(error.as_slice()).unwrap();
    let inner = parse_quote::<V4, _>(error.as_slice(), &outer).unwrap();
    assert_eq!((inner.key.protocol, inner.key.destination_port.get()), (SCTP, 80));
}

#[test]
fn a_refusal_is_what_a_host_without_a_listener_sends() {
    for (chunk, tag, t_bit) in [(INIT, [1, 2, 3, 4], 0), (0, [9, 8, 7, 6], 1)] {
        let sctp = packet([5_000, 80], chunk, &[1, 2, 3, 4, 0, 0, 0, 0]);
        let asked = parse::<V4, _>(frame(false, 0, &sctp).as_slice()).unwrap();
        let tag_at = if chunk == INIT { INITIATE_TAG } else { TAG };
        let tag_there = u32::from_ne_bytes(sctp[tag_at..tag_at + 4].try_into().unwrap());
        let answer: Vec<u8> =
            sctp_abort(&asked, tag_there).iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(answer[..4], [0, 80, 0x13, 0x88], "ports turned round");
        assert_eq!(answer[TAG..TAG + 4], tag);
        assert_eq!(answer[FIRST_CHUNK..], [ABORT, t_bit, 0, 4]);
        assert_eq!(answer, summed(answer.clone()));
    }
}

#[test]
fn a_port_of_a_packet_of_any_length_may_change() {
    let old = packet([40_000, 30_080], 0, &[0x5a; 65_000]);
    for bytes in (16..2_000).chain([9_000, 32_767, 32_768, 65_000]) {
        let old = summed(old[..bytes].to_vec());
        let mut new = old.clone();
        new[..4].copy_from_slice(&[0xee, 0x48, 0x1f, 0x90]);
        let change = change_of_checksum(word(&old) ^ word(&new), u16::try_from(bytes).unwrap());
        let sum = word(&old[CHECKSUM..]) ^ change;
        assert_eq!(sum, word(&summed(new)[CHECKSUM..]), "{bytes}");
    }
}

proptest! {
    #[test]
    fn a_changed_checksum_is_that_of_the_changed_packet(
        ports: [u8; 4],
        rest in proptest::collection::vec(any::<u8>(), 12..3_000),
    ) {
        let old = summed([&[0, 80, 1, 2], &rest[..]].concat());
        let mut new = old.clone();
        new[..4].copy_from_slice(&ports);
        let change = change_of_checksum(word(&old) ^ word(&new), u16::try_from(old.len()).unwrap());
        prop_assert_eq!(word(&old[CHECKSUM..]) ^ change, word(&summed(new)[CHECKSUM..]));
    }

    #[test]
    fn every_refusal_has_its_checksum(ports: [u16; 2], tag: u32, flags: u8) {
        let mut asked = crate::packet::Packet::between(Address::v4([1; 4]), Address::v4([2; 4]));
        (asked.key.protocol, asked.flags) = (SCTP, flags);
        asked.key.source_port = Port::new(ports[0]);
        asked.key.destination_port = Port::new(ports[1]);
        let answer: Vec<u8> = sctp_abort(&asked, tag).iter().flat_map(|word| word.to_ne_bytes()).collect();
        prop_assert_eq!(&answer, &summed(answer.clone()));
    }
}
