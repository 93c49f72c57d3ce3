//! A packet socket that speaks ARP on one device.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use weft_cni_netlink::Mac;

use super::{BROADCAST, FRAME_BYTES, Frame};
use crate::sys;

/// Frames taken in at once before others get their turn.
const BUFFER_BYTES: usize = 128;

#[derive(Debug)]
pub(in super::super) struct ArpSocket {
    socket: AsyncFd<OwnedFd>,
}

impl ArpSocket {
    /// Opens it in the calling thread's network namespace, for the device of this index.
    pub(in super::super) fn open(index: u32) -> io::Result<Self> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: an OwnedFd owns its descriptor for as long as the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(sys::arp_socket(index)?, interest) };
        let socket = registered.map_err(|error| error.into_parts().1)?;
        Ok(Self { socket })
    }

    /// Sends to one, or to all.
    pub(in super::super) async fn send(&self, frame: &Frame, to: Option<Mac>) -> io::Result<()> {
        let bytes = frame.encode(to.unwrap_or(BROADCAST));
        let write = |socket: &OwnedFd| nix::unistd::write(socket, &bytes).map_err(io::Error::from);
        let sent = self.socket.async_io(Interest::WRITABLE, write).await?;
        if sent == FRAME_BYTES { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The next frame; `None` for one that says nothing about who has an address. Cancel safe.
    pub(in super::super) async fn receive(&self) -> io::Result<Option<Frame>> {
        let mut bytes = [0; BUFFER_BYTES];
        let read = |socket: &OwnedFd| nix::unistd::read(socket, &mut bytes).map_err(io::Error::from);
        let count = self.socket.async_io(Interest::READABLE, read).await?;
        Ok(Frame::decode(bytes.get(..count).unwrap_or_default()).filter(Frame::tells))
    }
}
