//! ICMP errors about questions, from the error queues of the sockets that asked.

use std::io::{self, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::HEADER_BYTES;

/// The errors that one socket may have queued are taken in turns of as many.
const AT_ONCE: usize = 1_024;

/// A packet was too large for the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// Where it was to go.
    pub(crate) to: IpAddr,
    /// The number of the question.
    pub(crate) number: u16,
    /// What the next link takes, as a router says.
    pub(crate) takes_bytes: u32,
}

/// The next of a socket that is about a question of this kind and id, and says a size. All others are passed over.
pub(super) fn next(socket: &UdpSocket, kind: u8, id: u16) -> io::Result<Option<Told>> {
    for _ in 0..AT_ONCE {
        match socket.try_io(Interest::ERROR, || receive(socket)) {
            Ok((about, error)) => {
                if let Some(told) = read(&about, &error, kind, id) {
                    return Ok(Some(told));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// What an error is about: the head of the packet as it was sent, and its destination.
struct About {
    head: [u8; HEADER_BYTES],
    whole: bool,
    to: Option<IpAddr>,
}

/// The error, and how large a packet may be if it says so.
struct Said {
    errno: u32,
    info: u32,
}

fn receive(socket: &UdpSocket) -> io::Result<(About, Said)> {
    let mut head = [0; HEADER_BYTES];
    // The largest of the two families' messages, with the address of who sent the error.
    let mut control =
        nix::cmsg_space!([u8; size_of::<libc::sock_extended_err>() + size_of::<libc::sockaddr_in6>()]);
    let mut into = [IoSliceMut::new(&mut head)];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut into, Some(&mut control), flags)?;
    let said = message.cmsgs()?.find_map(|message| {
        use ControlMessageOwned as M;
        let (M::Ipv4RecvErr(error, _) | M::Ipv6RecvErr(error, _)) = message else { return None };
        Some(Said { errno: error.ee_errno, info: error.ee_info })
    });
    let to =
        message.address.and_then(|address| match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => Some(IpAddr::V4(v4.ip())),
            (None, Some(v6)) => Some(IpAddr::V6(v6.ip())),
            (None, None) => None,
        });
    let whole = message.bytes == HEADER_BYTES;
    let said = said.unwrap_or(Said { errno: 0, info: 0 });
    Ok((About { head, whole, to }, said))
}

fn read(about: &About, said: &Said, kind: u8, id: u16) -> Option<Told> {
    let head = about.head;
    let ours = about.whole && head[0] == kind && head[4..6] == id.to_be_bytes();
    let too_large = i32::try_from(said.errno) == Ok(libc::EMSGSIZE);
    (ours && too_large).then_some(Told {
        to: about.to?,
        number: u16::from_be_bytes([head[6], head[7]]),
        takes_bytes: said.info,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_size_that_is_said_of_a_question_counts() {
        let about = |head, whole| About { head, whole, to: Some([10, 0, 0, 1].into()) };
        let head = [8, 0, 1, 2, 0xbe, 0xef, 0, 7];
        let said = |errno: i32| Said { errno: errno.unsigned_abs(), info: 1_400 };
        let told = Told { to: [10, 0, 0, 1].into(), number: 7, takes_bytes: 1_400 };
        assert_eq!(read(&about(head, true), &said(libc::EMSGSIZE), 8, 0xbeef), Some(told));
        assert_eq!(read(&about(head, true), &said(libc::EMSGSIZE), 8, 0xbeee), None, "somebody else's");
        assert_eq!(read(&about(head, true), &said(libc::EMSGSIZE), 128, 0xbeef), None, "of another kind");
        assert_eq!(read(&about(head, true), &said(libc::EHOSTUNREACH), 8, 0xbeef), None, "another error");
        assert_eq!(read(&about(head, false), &said(libc::EMSGSIZE), 8, 0xbeef), None, "cut short");
    }
}
