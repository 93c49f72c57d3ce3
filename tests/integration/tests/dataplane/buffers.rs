//! What the stack's buffers may be like: a checksum that a device has yet to finish, a sum that a device has made of the whole packet, headers
//! in several pieces, options. Packets come out the same.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::maps::{HashMap, Map, MapData};
use aya::programs::Program;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use weft_agent_dataplane::node;
use weft_cni_netlink::{Netlink, Offloads};
use weft_ebpf_abi::{Address, LocalPod, NodeConfig, TCP, UDP, names};
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::require;
use zerocopy::IntoBytes as _;

use crate::NEEDS;
use crate::entries::{FAMILIES, Family, V4};
use crate::frames::{ACK, Read, SYN, checksum, ethernet, frame, frame_with, read, read_frame};
use crate::packets::REDIRECT;
use crate::place::{Place, Running, SOON, ask_tcp, ask_udp, identity, serve, within};

const BPF_PROG_TEST_RUN: nix::libc::c_long = 10;
/// BPF_F_TEST_SKB_CHECKSUM_COMPLETE: the buffer has a sum of the packet, and the call fails if that is not the packet's sum afterwards.
pub(crate) const SUMMED: u32 = 1 << 2;
/// `struct __sk_buff`, and where it has the size of segments.
const CONTEXT_BYTES: usize = 192;
const SEGMENT_BYTES: usize = 176;
/// The device that a test run's packets come by: the loopback.
const CAME_BY: u32 = 1;

/// `union bpf_attr`, member `test`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    verdict: u32,
    bytes_in: u32,
    bytes_out: u32,
    frame_in: u64,
    frame_out: u64,
    repeat: u32,
    duration: u32,
    context_bytes_in: u32,
    context_bytes_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    pad: u32,
}

/// Runs a program on a frame in a buffer that is told of by words of the context.
pub(crate) fn run_in(
    running: &Running,
    place: &Place,
    packet: &[u8],
    words: &[(usize, u32)],
    flags: u32,
) -> std::io::Result<(u32, Vec<u8>)> {
    let Some(Program::SchedClassifier(program)) = running.programs.program("weft_ingress") else {
        panic!("not there")
    };
    let (mut out, mut context) = (vec![0_u8; 2_048], [0_u8; CONTEXT_BYTES]);
    for (at, word) in words {
        context[*at..*at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    let mut run = TestRun {
        program: u32::try_from(program.fd().unwrap().as_fd().as_raw_fd()).unwrap(),
        bytes_in: u32::try_from(packet.len()).unwrap(),
        bytes_out: u32::try_from(out.len()).unwrap(),
        frame_in: packet.as_ptr().addr() as u64,
        frame_out: out.as_mut_ptr().addr() as u64,
        context_bytes_in: if words.is_empty() { 0 } else { u32::try_from(CONTEXT_BYTES).unwrap() },
        context_in: if words.is_empty() { 0 } else { context.as_ptr().addr() as u64 },
        flags,
        ..TestRun::default()
    };
    within(&place.node, || {
        // SAFETY: the attributes are of the given size, and lead to buffers that live and have the sizes they say.
        let result = unsafe {
            nix::libc::syscall(nix::libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut run, size_of::<TestRun>())
        };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    })?;
    out.truncate(run.bytes_out as usize);
    Ok((run.verdict, out))
}

fn plain(running: &Running, place: &Place, packet: &[u8]) -> (u32, Vec<u8>) {
    run_in(running, place, packet, &[], 0).unwrap()
}

/// The place with NodePort 30080 of both families, and flows of both protocols from port 5000.
fn set_up(label: &str) -> (Place, Running) {
    let place = Place::new(label).unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[SocketAddr::new(family.pod, 8080)]).unwrap();
        for (protocol, flags) in [(TCP, SYN), (UDP, 0)] {
            assert_eq!(plain(&running, &place, &request(&family, protocol, flags)).0, REDIRECT);
        }
    }
    (place, running)
}

fn request(family: &Family, protocol: u8, flags: u8) -> Vec<u8> {
    frame(protocol, SocketAddr::new(family.client, 5_000), family.at_node(30080), flags)
}

/// Packets of known flows, and their names: both directions, both protocols, and datagrams without a checksum.
fn known(running: &Running, place: &Place) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for family in FAMILIES {
        for protocol in [TCP, UDP] {
            let asks = request(&family, protocol, ACK);
            let to = read_frame("request", &plain(running, place, &asks).1);
            all.push((format!("answer {protocol} {}", family.pod), frame(protocol, to.to, to.from, ACK)));
            all.push((format!("request {protocol} {}", family.pod), asks));
        }
        let mut without = request(&family, UDP, 0);
        let at = without.len() - 7;
        without[at..at + 2].fill(0);
        all.push((format!("datagram without a checksum {}", family.pod), without));
    }
    all
}

#[test]
fn a_sum_that_a_device_made_stays_that_of_the_packet() {
    if !require("dataplane::buffers-summed", &NEEDS) {
        return;
    }
    let (place, mut running) = set_up("bs");
    for (name, packet) in known(&running, &place) {
        let wanted = plain(&running, &place, &packet);
        assert_eq!(wanted.0, REDIRECT, "{name}");
        assert_ne!(wanted.1, packet, "{name}");
        let summed = run_in(&running, &place, &packet, &[], SUMMED);
        assert_eq!(summed.unwrap_or_else(|error| panic!("{name}: {error}")), wanted, "{name}");
    }
    // From other nodes' pods: a hop less.
    let own = within(&place.node, || {
        let devices = node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap();
        identity(&devices, &place.cgroup).unwrap()
    });
    running.programs.configure(NodeConfig { overlay_ifindex: CAME_BY, ..own }).unwrap();
    let local = MapData::from_pin(place.pins.join("maps").join(names::LOCAL_PODS)).unwrap();
    let mut local: HashMap<_, [u8; 16], [u8; 16]> = HashMap::try_from(Map::HashMap(local)).unwrap();
    for family in FAMILIES {
        let mut pod = [0; 16];
        pod.copy_from_slice(LocalPod { ifindex: 70, mac: [2; 6], ..LocalPod::default() }.as_bytes());
        local.insert(Address::from(family.pod).0, pod, 0).unwrap();
        let afar = SocketAddr::new(family.client, 5_000);
        let packet = frame(UDP, afar, SocketAddr::new(family.pod, 8080), 0);
        let hops = if family.pod.is_ipv4() { 22 } else { 21 };
        let (verdict, out) = run_in(&running, &place, &packet, &[], SUMMED).unwrap();
        assert_eq!((verdict, out[hops]), (REDIRECT, packet[hops] - 1));
        assert_eq!(read_frame("handed over", &out), read_frame("sent", &packet));
        let mut last = packet.clone();
        last[hops] = 1;
        assert_ne!(run_in(&running, &place, &last, &[], 0).unwrap().0, REDIRECT, "it has none left");
    }
}

#[test]
fn what_is_to_be_cut_into_segments_comes_out_the_same() {
    if !require("dataplane::buffers-segments", &NEEDS) {
        return;
    }
    let (place, running) = set_up("bg");
    for (name, packet) in known(&running, &place) {
        let wanted = plain(&running, &place, &packet);
        let segmented = run_in(&running, &place, &packet, &[(SEGMENT_BYTES, 1_000)], 0).unwrap();
        assert_eq!(segmented, wanted, "{name}");
    }
}

#[test]
fn options_do_not_hide_a_flow() {
    if !require("dataplane::buffers-options", &NEEDS) {
        return;
    }
    let (place, running) = set_up("bo");
    for protocol in [TCP, UDP] {
        let packet = request(&V4, protocol, ACK);
        let wanted = read_frame("without", &plain(&running, &place, &packet).1);
        // Three times "no operation", and the end.
        let mut ip = [&packet[14..34], &[1, 1, 1, 0], &packet[34..]].concat();
        ip[0] = 0x46;
        let bytes = u16::try_from(ip.len()).unwrap().to_be_bytes();
        ip[2..4].copy_from_slice(&bytes);
        ip[10..12].fill(0);
        let sum = checksum(&ip[..24]).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        for flags in [0, SUMMED] {
            let (verdict, out) = run_in(&running, &place, &ethernet(&ip), &[], flags).unwrap();
            assert_eq!((verdict, checksum(&out[14..38])), (REDIRECT, 0));
            assert_eq!(out[38..], wanted.payload, "ports and checksum are those of the packet without");
            assert_eq!(out[26..34], plain(&running, &place, &packet).1[26..34]);
        }
    }
}

/// What comes in by a namespace's devices, and goes out.
pub(crate) fn watch(netns: &Netns) -> UdpSocket {
    within(netns, || {
        let packets = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), SockProtocol::EthAll);
        let packets = UdpSocket::from(packets.unwrap());
        packets.set_read_timeout(Some(SOON)).unwrap();
        packets
    })
}

/// Waits for so many packets that are wanted; their checksums must be finished, and right.
pub(crate) fn finished(packets: &UdpSocket, name: &str, count: usize, wanted: impl Fn(&Read) -> bool) {
    let mut seen = 0;
    while seen < count {
        let mut buffer = [0; 10_000];
        let length = packets.recv(&mut buffer).unwrap_or_else(|error| panic!("{name}: {seen} seen, {error}"));
        let packet = &buffer[..length];
        // Bridges report to groups as they come up, with options that `read` does not take.
        let is_read = match packet[12..15] {
            [8, 0, 0x45] => length >= 38,
            [0x86, 0xdd, _] => length >= 58,
            _ => false,
        };
        if is_read && wanted(&read(name, &packet[14..], false)) {
            read_frame(name, packet);
            seen += 1;
        }
    }
}

#[test]
fn checksums_that_are_only_begun_are_finished_right() {
    if !require("dataplane::buffers-begun", &NEEDS) {
        return;
    }
    let place = Place::new("bb").unwrap();
    let mut running = place.start().unwrap();
    // Sockets leave checksums to the devices behind the node's, which here do not do it either: the kernel does as a packet leaves.
    within(&place.node, || {
        for device in ["up0", "pod0"] {
            Offloads::open().unwrap().finish_checksums(device, false).unwrap();
        }
    });
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        let service = family.at_node(30080);
        for protocol in [UDP, TCP] {
            let (at_pod, at_client) = (watch(&place.pod), watch(&place.client));
            within(&place.client, || {
                for _ in 0..4 {
                    if protocol == UDP { ask_udp(service) } else { ask_tcp(service) }.unwrap();
                }
            });
            let of = |read: &Read| read.protocol == protocol;
            finished(&at_pod, "requests", 4, |read| of(read) && read.to == pod);
            finished(&at_client, "answers", 4, |read| of(read) && read.from == service);
        }
    }
}

#[test]
fn refusals_of_what_is_only_begun_are_finished_right() {
    if !require("dataplane::buffers-refused", &NEEDS) {
        return;
    }
    let place = Place::new("br").unwrap();
    let mut running = place.start().unwrap();
    within(&place.node, || Offloads::open().unwrap().finish_checksums("up0", false).unwrap());
    for family in FAMILIES {
        running.plain(&family, 10, 30080, &[]).unwrap();
        within(&place.client, || {
            for asked in [ask_tcp(family.at_node(30080)), ask_udp(family.at_node(30080))] {
                assert_eq!(asked.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
            }
        });
    }
}

/// Sends a frame out of a device. The kernel puts no more than an Ethernet header into the first piece of a buffer of more than a page.
pub(crate) fn send(netns: &Netns, device: &str, packet: &[u8]) {
    within(netns, || {
        let index = Netlink::open().unwrap().link(device).unwrap().index;
        let out = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).unwrap();
        let to = nix::libc::sockaddr_ll {
            sll_family: u16::try_from(nix::libc::AF_PACKET).unwrap(),
            sll_protocol: u16::from_ne_bytes([packet[12], packet[13]]),
            sll_ifindex: i32::try_from(index).unwrap(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        };
        let address_bytes = u32::try_from(size_of_val(&to)).unwrap();
        // SAFETY: frame and address live, and have the sizes that are given.
        let sent = unsafe {
            let at = (&raw const to).cast();
            nix::libc::sendto(out.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, at, address_bytes)
        };
        assert_eq!(usize::try_from(sent), Ok(packet.len()), "{}", std::io::Error::last_os_error());
    });
}

#[test]
fn headers_behind_the_first_piece_are_found() {
    if !require("dataplane::buffers-pieces", &NEEDS) {
        return;
    }
    let place = Place::new("bp").unwrap();
    for (netns, devices) in
        [(&place.client, &["eth0"][..]), (&place.node, &["up0", "weft0", "pod0"]), (&place.pod, &["eth0"])]
    {
        for device in devices {
            ip(&["-n", netns.name(), "link", "set", device, "mtu", "9000"]).unwrap();
        }
    }
    let mut running = place.start().unwrap();
    let uplink = within(&place.node, || Netlink::open().unwrap().link("up0").unwrap().mac.unwrap());
    let payload = vec![7; 6_000];
    for family in FAMILIES {
        let server = within(&place.pod, || UdpSocket::bind((family.pod, 0)).unwrap());
        server.set_read_timeout(Some(SOON)).unwrap();
        let pod = server.local_addr().unwrap();
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        // Else the packet waits for the neighbour.
        within(&place.node, || drop(UdpSocket::bind((family.gateway, 0)).unwrap().send_to(b"", pod)));
        server.recv(&mut [0; 8]).unwrap();
        let at_pod = watch(&place.pod);
        for (name, port) in [("begins", 5_000), ("is known", 5_000), ("another", 5_001)] {
            let from = SocketAddr::new(family.client, port);
            let mut packet = frame_with(UDP, from, family.at_node(30080), 0, &payload);
            packet[..6].copy_from_slice(&uplink.0);
            send(&place.client, "eth0", &packet);
            let mut got = vec![0; 10_000];
            let length = server.recv(&mut got).unwrap_or_else(|error| panic!("{name} {pod}: {error}"));
            assert!(got[..length] == payload, "{name} {pod}");
        }
        finished(&at_pod, "in pieces", 3, |read| read.to == pod);
    }
}
