//! Sockets of a network namespace, by the kernel's socket diagnosis: connected UDP sockets found, and ended.
//!
//! The layouts are those of linux/inet_diag.h; the messages are two, so they are written here by hand.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr as NetlinkAddress};
use nix::errno::Errno;

use crate::{Error, namespace};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;

const HEADER_BYTES: usize = 16;
/// `struct inet_diag_sockid`: ports, addresses, device, cookie.
const ID_BYTES: usize = 48;
/// `TCP_ESTABLISHED`, which a connected UDP socket has as well.
const CONNECTED: u32 = 1 << 1;

/// A connected UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpSocket {
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Whom it is connected to; an IPv6 socket may have a mapped IPv4 peer.
    pub peer: SocketAddr,
    family: u8,
    id: [u8; ID_BYTES],
}

/// A connection to the kernel's socket diagnosis, in one network namespace.
#[derive(Debug)]
pub struct SocketDiag {
    socket: Socket,
    sequence: u32,
}

impl SocketDiag {
    /// Opens one in the namespace of the calling thread.
    ///
    /// # Errors
    /// If the kernel has no socket diagnosis, or no more descriptors.
    pub fn open() -> Result<Self, Error> {
        let failed = |op| move |source| Error::Socket { op, source };
        let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(failed("open"))?;
        socket.bind_auto().map_err(failed("bind"))?;
        socket.connect(&NetlinkAddress::new(0, 0)).map_err(failed("connect"))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Opens one in another namespace, which the calling thread enters for that moment.
    ///
    /// # Errors
    /// If the namespace can't be entered, or the thread can't come back; then it must not go on.
    pub fn open_within(namespace: BorrowedFd<'_>) -> Result<Self, Error> {
        namespace::during(namespace, Self::open)?
    }

    /// All connected UDP sockets of both families. A socket that comes or goes meanwhile may be there or not: the table is
    /// read bucket by bucket, and no bucket is left out.
    ///
    /// # Errors
    /// If the kernel refuses, or has no diagnosis of UDP.
    pub fn connected_udp(&mut self) -> Result<Vec<UdpSocket>, Error> {
        let op = "list UDP sockets";
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let family = u8::try_from(family).unwrap_or(0);
            let body = request(family, CONNECTED, &[0; ID_BYTES]);
            self.send(op, SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, &body)?;
            self.receive(op, |kind, body| {
                if kind == SOCK_DIAG_BY_FAMILY {
                    found.extend(read(body));
                }
            })?;
        }
        Ok(found)
    }

    /// Ends a socket's connection: a process that waits gets `ECONNABORTED`, one that sends `EDESTADDRREQ`. One that is gone already is no error.
    ///
    /// # Errors
    /// If the kernel refuses, or was built without it (`CONFIG_INET_DIAG_DESTROY`).
    pub fn destroy(&mut self, socket: &UdpSocket) -> Result<(), Error> {
        let op = "end the UDP socket to";
        let body = request(socket.family, CONNECTED, &socket.id);
        self.send(op, SOCK_DESTROY, REQUEST | ACK, &body)?;
        let ended = self.receive(op, |_, _| {});
        ended.map_err(|error| match error {
            Error::Refused { op, errno, .. } => {
                Error::Refused { op, subject: socket.peer.to_string(), errno }
            }
            other => other,
        })
    }

    fn send(&mut self, op: &'static str, kind: u16, flags: u16, body: &[u8]) -> Result<(), Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        self.socket.send(&message, 0).map_err(|source| Error::Socket { op, source })?;
        Ok(())
    }

    /// Hands every message to `take` up to the end of a dump, or an acknowledgement.
    fn receive(&self, op: &'static str, mut take: impl FnMut(u16, &[u8])) -> Result<(), Error> {
        loop {
            let (datagram, _) =
                self.socket.recv_from_full().map_err(|source| Error::Socket { op, source })?;
            let mut rest = datagram.as_slice();
            while let Some((kind, sequence, body, behind)) = split(rest) {
                rest = behind;
                match kind {
                    _ if sequence != self.sequence => {}
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return acknowledged(op, body),
                    _ => take(kind, body),
                }
            }
        }
    }
}

/// Kind, sequence number and body of the first message, and what is behind it.
pub(crate) fn split(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let header = bytes.first_chunk::<HEADER_BYTES>()?;
    let number = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let length = usize::try_from(number(0)).ok()?;
    let body = bytes.get(HEADER_BYTES..length)?;
    // Messages begin at multiples of four bytes.
    let behind = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((u16::from_ne_bytes([header[4], header[5]]), number(8), body, behind))
}

pub(crate) fn acknowledged(op: &'static str, body: &[u8]) -> Result<(), Error> {
    let Some(code) = body.first_chunk::<4>() else {
        return Err(Error::Decode { op, reason: "an acknowledgement without a code".to_owned() });
    };
    match Errno::from_raw(i32::from_ne_bytes(*code).saturating_neg()) {
        Errno::UnknownErrno if *code == [0; 4] => Ok(()),
        Errno::ENOENT if op != "list UDP sockets" => Ok(()),
        errno => Err(Error::Refused { op, subject: String::new(), errno }),
    }
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, states: u32, id: &[u8; ID_BYTES]) -> Vec<u8> {
    let protocol = u8::try_from(libc::IPPROTO_UDP).unwrap_or(0);
    [&[family, protocol, 0, 0][..], &states.to_ne_bytes(), id].concat()
}

/// `struct inet_diag_msg`: family, state and timer in four bytes, then the id.
pub(crate) fn read(body: &[u8]) -> Option<UdpSocket> {
    let family = *body.first()?;
    let id = *body.get(4..)?.first_chunk::<ID_BYTES>()?;
    let address = |at: usize| -> Option<IpAddr> {
        if i32::from(family) == libc::AF_INET {
            Some(Ipv4Addr::from(*id.get(at..)?.first_chunk::<4>()?).into())
        } else {
            Some(Ipv6Addr::from(*id.get(at..)?.first_chunk::<16>()?).into())
        }
    };
    let peer = SocketAddr::new(address(20)?, u16::from_be_bytes([id[2], id[3]]));
    // Two words, the low one first, each in the host's order.
    let word = |at: usize| u64::from(u32::from_ne_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]));
    Some(UdpSocket { cookie: word(40) | word(44) << 32, peer, family, id })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_split_at_multiples_of_four() {
        let message = |length: u32, kind: u16, body: &[u8]| {
            let mut bytes = length.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 2]);
            bytes.extend(7_u32.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(body);
            bytes
        };
        let two = [message(18, 20, &[1, 2, 0, 0]), message(16, 3, &[])].concat();
        let (kind, sequence, body, rest) = split(&two).unwrap();
        assert_eq!((kind, sequence, body), (20, 7, [1, 2].as_slice()));
        let (kind, _, body, rest) = split(rest).unwrap();
        assert_eq!((kind, body.len(), rest.len()), (3, 0, 0));
        assert!(split(rest).is_none());
        for damaged in [message(15, 3, &[]), message(40, 3, &[]), vec![1; 8]] {
            assert!(split(&damaged).is_none());
        }
    }

    #[test]
    fn a_message_that_is_cut_off_is_no_socket() {
        for length in 0..52 {
            assert_eq!(read(&vec![2; length]), None);
        }
        assert!(read(&[2; 52]).is_some());
    }
}
