//! A link between two nodes whose network cards are this test's: each frame comes to it as a driver gets it, with the checksum that the
//! card should finish still open.
//!
//! ```text
//! node 1: up0 ═ c1 ┐ card of node 1 → n2
//!                  │ namespace of the link, moved by a thread
//! node 2: up0 ═ c2 ┘ card of node 2 → n1
//! ```

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, bind, recv, send, socket,
};
use weft_tests_harness::netns::Netns;

use crate::links::run;
use crate::place::within;

/// `PACKET_VNET_HDR` and `PACKET_IGNORE_OUTGOING` of linux/if_packet.h.
const WITH_HEADERS: i32 = 15;
const IGNORE_OUTGOING: i32 = 23;
/// `struct virtio_net_hdr` of linux/virtio_net.h: flags, kind of segments, three fields of two bytes, where the checksum begins and is.
const HEADER_BYTES: usize = 10;
const NEEDS_CHECKSUM: u8 = 1;
/// Ethernet, IPv4, UDP and VXLAN, and Ethernet again: a checksum behind them is one of a packet within a tunnel.
const TUNNEL_BYTES: usize = 14 + 20 + 8 + 8 + 14;
const LARGEST_FRAME_BYTES: usize = 70_000;
/// How long a thread that should end may go on.
const LOOK_MS: u16 = 50;

/// How a card finishes checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Card {
    Right,
    /// Those within tunnels wrongly.
    Broken,
    /// Rightly, but every other frame with one within a tunnel is lost.
    Lossy,
}

/// The cards at work.
pub(crate) struct Cards {
    /// Checksums within tunnels that were left to the card of each node.
    left: Arc<[AtomicU64; 2]>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    link: Netns,
}

impl Cards {
    /// Makes `up0` of both nodes.
    pub(crate) fn join(nodes: &[Netns], cards: [Card; 2]) -> Self {
        let link = Netns::new("cd").unwrap();
        within(&link, || std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")).unwrap();
        for (node, end) in nodes.iter().zip(["c1", "c2"]) {
            run(&format!("-n {} link add {end} type veth peer name up0 netns {}", link.name(), node.name()));
            run(&format!("-n {} link set {end} up", link.name()));
        }
        let sockets = within(&link, || ["c1", "c2"].map(open));
        let (left, ends) =
            (Arc::new([AtomicU64::new(0), AtomicU64::new(0)]), Arc::new(AtomicBool::new(false)));
        let (counts, stop) = (Arc::clone(&left), Arc::clone(&ends));
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                carry(&sockets, cards, &counts);
            }
        });
        Self { left, ends, thread: Some(thread), link }
    }

    /// Has the link to the second node take no larger packets, and say nothing of those that it drops.
    pub(crate) fn narrow(&self, mtu_bytes: u32) {
        run(&format!("-n {} link set c2 mtu {mtu_bytes}", self.link.name()));
    }

    /// How many checksums within tunnels were left to the card of a node.
    pub(crate) fn left(&self, number: usize) -> u64 {
        self.left[number - 1].load(Ordering::Relaxed)
    }
}

impl Drop for Cards {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the cards failed");
        }
    }
}

/// A socket that gets what a device's other end sends, and sends to it.
fn open(device: &str) -> OwnedFd {
    const ETH_P_ALL: u16 = 3;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, None).unwrap();
    let on = 1_i32;
    for option in [WITH_HEADERS, IGNORE_OUTGOING] {
        let size = u32::try_from(size_of_val(&on)).unwrap();
        // SAFETY: the socket is open, and the value has the size given.
        let set = unsafe {
            nix::libc::setsockopt(
                socket.as_raw_fd(),
                nix::libc::SOL_PACKET,
                option,
                (&raw const on).cast(),
                size,
            )
        };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
    }
    let index = nix::net::if_::if_nametoindex(device).unwrap();
    // SAFETY: all zeros are a valid address of this kind, which is as long as it says.
    let address = unsafe {
        let mut address: nix::libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = u16::try_from(nix::libc::AF_PACKET).unwrap();
        address.sll_protocol = ETH_P_ALL.to_be();
        address.sll_ifindex = i32::try_from(index).unwrap();
        let size = u32::try_from(size_of_val(&address)).unwrap();
        <LinkAddr as SockaddrLike>::from_raw((&raw const address).cast(), Some(size)).unwrap()
    };
    bind(socket.as_raw_fd(), &address).unwrap();
    socket
}

/// Waits for frames a while, and carries those that wait.
fn carry(sockets: &[OwnedFd; 2], cards: [Card; 2], left: &[AtomicU64; 2]) {
    let [first, second] = sockets;
    let mut waits = [first, second].map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
    poll(&mut waits, PollTimeout::from(LOOK_MS)).unwrap();
    for (at, (from, to)) in [(first, second), (second, first)].into_iter().enumerate() {
        let mut frame = vec![0; LARGEST_FRAME_BYTES];
        while let Ok(length) = recv(from.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            if finish(&mut frame[..length], cards[at], &left[at]) {
                // What a link that is down, full or narrower does not take is lost without a word.
                match send(to.as_raw_fd(), &frame[..length], MsgFlags::empty()) {
                    Ok(_)
                    | Err(
                        Errno::ENETDOWN | Errno::ENXIO | Errno::ENOBUFS | Errno::EAGAIN | Errno::EMSGSIZE,
                    ) => {}
                    Err(error) => panic!("a frame can't be carried: {error}"),
                }
            }
        }
    }
}

/// Finishes the checksum of a frame as a card would; `false` for one that is lost.
fn finish(bytes: &mut [u8], card: Card, left: &AtomicU64) -> bool {
    let (header, frame) = bytes.split_at_mut(HEADER_BYTES);
    if header[0] & NEEDS_CHECKSUM == 0 {
        return true;
    }
    assert_eq!(header[1], 0, "no test here sends what is to be cut");
    let field = |at: usize| usize::from(u16::from_ne_bytes([header[at], header[at + 1]]));
    let (start, offset) = (field(6), field(8));
    // What stands in the field is the sum of the header that is not there.
    let sum: u32 = frame[start..]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let mut checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap();
    let mut kept = true;
    if start >= TUNNEL_BYTES {
        let number = left.fetch_add(1, Ordering::Relaxed);
        kept = card != Card::Lossy || number % 2 == 1;
        checksum ^= if card == Card::Broken { 0x5555 } else { 0 };
    }
    frame[start + offset..start + offset + 2].copy_from_slice(&checksum.max(1).to_be_bytes());
    header.fill(0);
    kept
}
