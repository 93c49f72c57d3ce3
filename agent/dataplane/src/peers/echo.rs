//! ICMP echo over raw sockets: what a node's kernel answers, whatever becomes of its agent.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::net::UdpSocket;

use crate::sys;

/// ICMP of RFC 792, and of RFC 4443.
const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
const HEADER_BYTES: usize = 8;
/// Room for an IPv4 header with all options, and the answer.
const BUFFER_BYTES: usize = 128;

/// The sockets of both families, as far as the kernel has them.
#[derive(Debug)]
pub(super) struct Echo {
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
    /// Tells our answers from those to others on the node.
    id: u16,
    sequence: u16,
}

impl Echo {
    /// Opens them in the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let id = u16::try_from(std::process::id() & 0xffff).unwrap_or(0);
        let v4 = open(false);
        // A kernel without one of the families is no error.
        match (v4, open(true)) {
            (Err(error), Err(_)) => Err(error),
            (v4, v6) => Ok(Self { v4: v4.ok(), v6: v6.ok(), id, sequence: 0 }),
        }
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

    /// Who has answered meanwhile, without waiting.
    pub(super) fn try_answer(&self) -> io::Result<Option<IpAddr>> {
        for socket in [&self.v4, &self.v6].into_iter().flatten() {
            let mut bytes = [0; BUFFER_BYTES];
            loop {
                match socket.try_recv_from(&mut bytes) {
                    Ok((count, from)) => {
                        let bytes = bytes.get(..count).unwrap_or_default();
                        if answers(bytes, from.is_ipv6(), self.id) {
                            return Ok(Some(from.ip()));
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
    pub(super) async fn ready(&self) -> io::Result<()> {
        tokio::select! {
            ready = readable(self.v4.as_ref()) => ready,
            ready = readable(self.v6.as_ref()) => ready,
        }
    }
}

async fn readable(socket: Option<&UdpSocket>) -> io::Result<()> {
    match socket {
        Some(socket) => socket.readable().await,
        None => std::future::pending().await,
    }
}

fn is_of_one_question(error: &io::Error) -> bool {
    let known = [libc::EHOSTUNREACH, libc::ENETUNREACH, libc::ECONNREFUSED, libc::EHOSTDOWN, libc::ENETDOWN];
    error.raw_os_error().is_some_and(|code| known.contains(&code))
}

/// The standard library has no type for raw sockets; a UDP socket's calls are those that one needs.
fn open(v6: bool) -> io::Result<UdpSocket> {
    let accepted = if v6 { ECHO_REPLY_V6 } else { ECHO_REPLY_V4 };
    UdpSocket::from_std(std::net::UdpSocket::from(sys::icmp_socket(v6, accepted)?))
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
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

/// Whether a packet is an answer to a question of ours. Raw sockets of IPv4 get the IP header too.
fn answers(bytes: &[u8], v6: bool, id: u16) -> bool {
    let (header, kind) = match (v6, bytes.first()) {
        (true, _) => (0, ECHO_REPLY_V6),
        (false, Some(first)) => (usize::from(first & 0x0f) * 4, ECHO_REPLY_V4),
        (false, None) => return false,
    };
    let Some(packet) = bytes.get(header..).and_then(|rest| rest.get(..HEADER_BYTES)) else { return false };
    packet[0] == kind && packet[1] == 0 && packet[4..6] == id.to_be_bytes()
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
        assert!(answers(&answer, false, 0xbeef), "behind a header with options");
        assert!(!answers(&answer, false, 0xbeee), "somebody else's");
        assert!(!answers(&answer[..31], false, 0xbeef), "cut short");
        assert!(!answers(&[], false, 0));
        answer[24] = 3;
        assert!(!answers(&answer, false, 0xbeef), "an ICMP error");
        assert!(answers(&[ECHO_REPLY_V6, 0, 1, 2, 0xbe, 0xef, 0, 7], true, 0xbeef));
    }
}
