//! ICMP errors about what a socket has sent, from its error queue.

use std::io::{self, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// An error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Returned {
    /// How much of what was sent is known.
    pub(crate) about_bytes: usize,
    /// Where it was to go.
    pub(crate) to: Option<IpAddr>,
    /// What the kernel makes of the error.
    pub(crate) errno: i32,
    /// Of EMSGSIZE, what the next link takes in bytes.
    pub(crate) info: u32,
}

/// Has errors queued for a socket.
pub(crate) fn queue_errors(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let set = match v6 {
        false => setsockopt(&socket, sockopt::Ipv4RecvErr, &true),
        true => setsockopt(&socket, sockopt::Ipv6RecvErr, &true),
    };
    set.map_err(io::Error::from)
}

/// The next error, without waiting; `about` gets the beginning of what was sent, without headers up to that of the socket's protocol.
pub(crate) fn try_returned(socket: &UdpSocket, about: &mut [u8]) -> io::Result<Returned> {
    socket.try_io(Interest::ERROR, || {
        // The largest of the two families' messages, with the address of who sent the error.
        let mut control =
            nix::cmsg_space!([u8; size_of::<libc::sock_extended_err>() + size_of::<libc::sockaddr_in6>()]);
        let mut into = [IoSliceMut::new(about)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut into, Some(&mut control), flags)?;
        let error = message.cmsgs()?.find_map(|message| {
            use ControlMessageOwned as M;
            let (M::Ipv4RecvErr(error, _) | M::Ipv6RecvErr(error, _)) = message else { return None };
            Some((i32::try_from(error.ee_errno).unwrap_or(i32::MAX), error.ee_info))
        });
        let (errno, info) = error.unwrap_or_default();
        let to = message.address.and_then(|to| match (to.as_sockaddr_in(), to.as_sockaddr_in6()) {
            (Some(v4), _) => Some(IpAddr::V4(v4.ip())),
            (None, Some(v6)) => Some(IpAddr::V6(v6.ip())),
            (None, None) => None,
        });
        Ok(Returned { about_bytes: message.bytes, to, errno, info })
    })
}
