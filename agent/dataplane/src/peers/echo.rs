//! ICMP echo over raw sockets: what a node's kernel answers, whatever becomes of its agent.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, sendto};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use crate::sys;

pub(crate) use self::told::Told;

mod told;

/// ICMP of RFC 792, and of RFC 4443.
const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
const HEADER_BYTES: usize = 8;
/// Room for an IPv4 header with all options, and the answer.
const BUFFER_BYTES: usize = 128;

/// Headers in front of it, without options.
const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;

/// Whom to ask, and how the question has to go there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// Whom.
    pub to: IpAddr,
    /// An address of the node's.
    pub from: IpAddr,
    /// The device to leave by.
    pub device: u32,
    /// Size of the packet, which nobody may cut.
    pub packet_bytes: usize,
}

/// The sockets of both families, as far as the kernel has them.
#[derive(Debug)]
pub(crate) struct Echo {
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
    /// Tells our answers from those to others on the node.
    id: u16,
    sequence: u16,
    /// ICMP errors are queued for it.
    to_errors: bool,
}

impl Echo {
    /// Opens them in the calling thread's network namespace. All who ask in a process have their own `number`.
    pub(crate) fn open(number: u16) -> io::Result<Self> {
        let id = u16::try_from(std::process::id() & 0xffff).unwrap_or(0).wrapping_add(number);
        let v4 = open(false);
        // A kernel without one of the families is no error.
        match (v4, open(true)) {
            (Err(error), Err(_)) => Err(error),
            (v4, v6) => Ok(Self { v4: v4.ok(), v6: v6.ok(), id, sequence: 0, to_errors: false }),
        }
    }

    /// The same, and it is told of ICMP errors that come back ([`Self::try_told`]).
    pub(crate) fn open_to_errors(number: u16) -> io::Result<Self> {
        let echo = Self { to_errors: true, ..Self::open(number)? };
        for (socket, v6) in [(&echo.v4, false), (&echo.v6, true)] {
            if let Some(socket) = socket {
                sys::queue_errors(socket.as_fd(), v6)?;
            }
        }
        Ok(echo)
    }

    /// The next ICMP error about a question, without waiting.
    pub(crate) fn try_told(&self) -> io::Result<Option<Told>> {
        for (socket, kind) in [(&self.v4, ECHO_REQUEST_V4), (&self.v6, ECHO_REQUEST_V6)] {
            let Some(socket) = socket else { continue };
            if let Some(told) = told::next(socket, kind, self.id)? {
                return Ok(Some(told));
            }
        }
        Ok(None)
    }

    /// Asks with a packet of this size, which nobody may cut, whatever the kernel knows of the way. Answers with the number of the
    /// question.
    pub(crate) fn ask_whole(&mut self, to: IpAddr, packet_bytes: usize) -> u16 {
        self.sequence = self.sequence.wrapping_add(1);
        let (socket, kind) = match to {
            IpAddr::V4(_) => (&self.v4, ECHO_REQUEST_V4),
            IpAddr::V6(_) => (&self.v6, ECHO_REQUEST_V6),
        };
        let Some(socket) = socket else { return self.sequence };
        let packet = request_of(kind, self.id, self.sequence, packet_bytes);
        let address = SockaddrStorage::from(SocketAddr::new(to, 0));
        if let Err(error) = sendto(socket.as_raw_fd(), &packet, &address, MsgFlags::MSG_DONTWAIT) {
            tracing::debug!(%to, packet_bytes, %error, "cannot ask with a packet of a size");
        }
        self.sequence
    }

    /// Asks past the routes' preference. Answers with the number of the question.
    pub(crate) fn ask_by(&mut self, question: &Question) -> u16 {
        self.sequence = self.sequence.wrapping_add(1);
        let (socket, kind) = match question.to {
            IpAddr::V4(_) => (&self.v4, ECHO_REQUEST_V4),
            IpAddr::V6(_) => (&self.v6, ECHO_REQUEST_V6),
        };
        let Some(socket) = socket else { return self.sequence };
        let packet = request_of(kind, self.id, self.sequence, question.packet_bytes);
        if let Err(error) = send_by(socket, &packet, question) {
            tracing::debug!(?question, %error, "cannot ask by a link");
        }
        self.sequence
    }

    /// Asks an address. What the kernel can't send now is a question without an answer.
    pub(super) fn ask(&mut self, address: IpAddr) {
        self.sequence = self.sequence.wrapping_add(1);
        let (socket, kind) = match address {
            IpAddr::V4(_) => (&self.v4, ECHO_REQUEST_V4),
            IpAddr::V6(_) => (&self.v6, ECHO_REQUEST_V6),
        };
        let Some(socket) = socket else { return };
        let packet = request(kind, self.id, self.sequence);
        if let Err(error) = socket.try_send_to(&packet, SocketAddr::new(address, 0)) {
            tracing::debug!(%address, %error, "cannot ask a node");
        }
    }

    /// Who has answered meanwhile which question, without waiting.
    pub(crate) fn try_answer(&self) -> io::Result<Option<(IpAddr, u16)>> {
        for socket in [&self.v4, &self.v6].into_iter().flatten() {
            let mut bytes = [0; BUFFER_BYTES];
            loop {
                match socket.try_recv_from(&mut bytes) {
                    Ok((count, from)) => {
                        let bytes = bytes.get(..count).unwrap_or_default();
                        if let Some(sequence) = answers(bytes, from.is_ipv6(), self.id) {
                            return Ok(Some((from.ip(), sequence)));
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // An ICMP error that came back for one question is told by the lack of its answer.
                    Err(error) if is_of_one_question(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(None)
    }

    /// Waits until something may have come. Cancel safe.
    pub(crate) async fn ready(&self) -> io::Result<()> {
        let interest = if self.to_errors { Interest::READABLE | Interest::ERROR } else { Interest::READABLE };
        tokio::select! {
            ready = has_something(self.v4.as_ref(), interest) => ready,
            ready = has_something(self.v6.as_ref(), interest) => ready,
        }
    }
}

async fn has_something(socket: Option<&UdpSocket>, interest: Interest) -> io::Result<()> {
    match socket {
        Some(socket) => socket.ready(interest).await.map(drop),
        None => std::future::pending().await,
    }
}

fn send_by(socket: &UdpSocket, packet: &[u8], question: &Question) -> io::Result<()> {
    let device = question.device;
    let payload = [io::IoSlice::new(packet)];
    let to = SockaddrStorage::from(SocketAddr::new(question.to, 0));
    let fd = socket.as_raw_fd();
    let send = |message| sendmsg(fd, &payload, &[message], MsgFlags::MSG_DONTWAIT, Some(&to));
    let sent = match question.from {
        IpAddr::V4(from) => {
            let from = libc::in_addr { s_addr: u32::from(from).to_be() };
            let ipi_ifindex = i32::try_from(device).map_err(io::Error::other)?;
            send(ControlMessage::Ipv4PacketInfo(&libc::in_pktinfo {
                ipi_ifindex,
                ipi_spec_dst: from,
                ipi_addr: libc::in_addr { s_addr: 0 },
            }))
        }
        // Told of a source, IPv6 would heed the device no more (`ip6_route_output_flags`); the device's route gives the same.
        IpAddr::V6(_) => {
            let ipi6_addr = libc::in6_addr { s6_addr: Ipv6Addr::UNSPECIFIED.octets() };
            send(ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo { ipi6_addr, ipi6_ifindex: device }))
        }
    };
    sent.map(drop).map_err(io::Error::from)
}

fn is_of_one_question(error: &io::Error) -> bool {
    let known = [
        libc::EMSGSIZE,
        libc::EHOSTUNREACH,
        libc::ENETUNREACH,
        libc::ECONNREFUSED,
        libc::EHOSTDOWN,
        libc::ENETDOWN,
        libc::EACCES,
        libc::ENONET,
        libc::ENOPROTOOPT,
        libc::EOPNOTSUPP,
        libc::EPROTO,
    ];
    error.raw_os_error().is_some_and(|code| known.contains(&code))
}

/// The standard library has no type for raw sockets; a UDP socket's calls are those that one needs.
fn open(v6: bool) -> io::Result<UdpSocket> {
    let accepted = if v6 { ECHO_REPLY_V6 } else { ECHO_REPLY_V4 };
    UdpSocket::from_std(std::net::UdpSocket::from(sys::icmp_socket(v6, accepted)?))
}

/// An echo request that makes a packet of a size. Zeros behind the header leave its checksum as it is.
fn request_of(kind: u8, id: u16, sequence: u16, packet_bytes: usize) -> Vec<u8> {
    let mut packet = request(kind, id, sequence).to_vec();
    let header_bytes = if kind == ECHO_REQUEST_V4 { IPV4_BYTES } else { IPV6_BYTES };
    packet.resize(packet_bytes.saturating_sub(header_bytes).max(HEADER_BYTES), 0);
    packet
}

/// An echo request; the kernel fills in IPv6's checksum.
fn request(kind: u8, id: u16, sequence: u16) -> [u8; HEADER_BYTES] {
    let [id_high, id_low] = id.to_be_bytes();
    let [sequence_high, sequence_low] = sequence.to_be_bytes();
    let mut packet = [kind, 0, 0, 0, id_high, id_low, sequence_high, sequence_low];
    if kind == ECHO_REQUEST_V4 {
        let [high, low] = checksum(&packet).to_be_bytes();
        (packet[2], packet[3]) = (high, low);
    }
    packet
}

/// RFC 1071's, of an even number of bytes.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

/// The number of the question of ours that a packet answers. Raw sockets of IPv4 get the IP header too.
fn answers(bytes: &[u8], v6: bool, id: u16) -> Option<u16> {
    let (header, kind) = match (v6, bytes.first()) {
        (true, _) => (0, ECHO_REPLY_V6),
        (false, Some(first)) => (usize::from(first & 0x0f) * 4, ECHO_REPLY_V4),
        (false, None) => return None,
    };
    let packet = bytes.get(header..).and_then(|rest| rest.get(..HEADER_BYTES))?;
    let ours = packet[0] == kind && packet[1] == 0 && packet[4..6] == id.to_be_bytes();
    ours.then(|| u16::from_be_bytes([packet[6], packet[7]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_a_right_checksum_and_its_answer_is_known() {
        let packet = request(ECHO_REQUEST_V4, 0xbeef, 7);
        assert_eq!(checksum(&packet), 0, "with its checksum in it, a packet sums to nothing");
        let mut answer = vec![0x46; 24];
        answer.extend([ECHO_REPLY_V4, 0, 0, 0, 0xbe, 0xef, 0, 7]);
        assert_eq!(answers(&answer, false, 0xbeef), Some(7), "behind a header with options");
        assert_eq!(answers(&answer, false, 0xbeee), None, "somebody else's");
        assert_eq!(answers(&answer[..31], false, 0xbeef), None, "cut short");
        assert_eq!(answers(&[], false, 0), None);
        answer[24] = 3;
        assert_eq!(answers(&answer, false, 0xbeef), None, "an ICMP error");
        assert_eq!(answers(&[ECHO_REPLY_V6, 0, 1, 2, 0xbe, 0xef, 0, 7], true, 0xbeef), Some(7));
    }
}
