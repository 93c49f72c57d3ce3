//! Tells when devices or addresses of the node's network namespace change.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

/// `RTMGRP_LINK | RTMGRP_IPV4_IFADDR` of linux/rtnetlink.h.
const GROUPS: u32 = 0x1 | 0x10;

/// A socket that becomes readable when a device or an IPv4 address comes, changes or goes. Its messages are not parsed: the
/// devices are listed anew, which also heals what was lost when the socket overflowed.
#[derive(Debug)]
pub(crate) struct LinkChanges {
    socket: AsyncFd<OwnedFd>,
}

impl LinkChanges {
    /// Opens it in the current namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
        // SAFETY: an `OwnedFd` keeps the same descriptor open until it is dropped, and gives it out to be read only.
        Ok(Self { socket: unsafe { AsyncFd::register(fd)? } })
    }

    /// Waits for a change, and takes in all that have come.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.socket.readable().await?;
            let mut some = false;
            let mut buffer = [0_u8; 4_096];
            loop {
                match recv(guard.get_inner().as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    // ENOBUFS: messages were lost, so something changed.
                    Ok(_) | Err(nix::Error::ENOBUFS) => some = true,
                    Err(nix::Error::EAGAIN) => break,
                    Err(nix::Error::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            guard.clear_ready();
            if some {
                return Ok(());
            }
        }
    }
}
