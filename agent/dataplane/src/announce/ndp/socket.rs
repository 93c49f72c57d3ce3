//! A raw socket for neighbour discovery on one device. It hears advertisements only.

use std::io::{self, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, setsockopt, sockopt};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use weft_cni_netlink::Mac;

use super::{ADVERTISEMENT, HOP_LIMIT, MESSAGE_BYTES, read_advertisement};
use crate::sys;

/// An advertisement with options beside the one that counts.
const BUFFER_BYTES: usize = 256;

#[derive(Debug)]
pub(in super::super) struct NdpSocket {
    socket: UdpSocket,
    index: u32,
}

impl NdpSocket {
    /// Opens it in the calling thread's network namespace, for a device.
    pub(in super::super) fn open(index: u32, device: &str) -> io::Result<Self> {
        let socket = sys::icmp_socket(true, ADVERTISEMENT)?;
        setsockopt(&socket, sockopt::BindToDevice, &device.into())?;
        setsockopt(&socket, sockopt::Ipv6MulticastHops, &libc::c_int::from(HOP_LIMIT))?;
        setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true)?;
        // A UDP socket's calls are those that a raw one needs.
        Ok(Self { socket: UdpSocket::from_std(socket.into())?, index })
    }

    /// Sends to a multicast group on the link.
    pub(in super::super) async fn send(
        &self,
        message: &[u8; MESSAGE_BYTES],
        group: Ipv6Addr,
    ) -> io::Result<()> {
        let to = SocketAddrV6::new(group, 0, 0, self.index);
        let sent = self.socket.send_to(message, to).await?;
        if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The next message; `None` for one that says nothing about who has an address, or that no neighbour sent. Cancel safe.
    pub(in super::super) async fn receive(&self) -> io::Result<Option<(Ipv6Addr, Mac)>> {
        let mut bytes = [0; BUFFER_BYTES];
        let read = || {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let mut control = nix::cmsg_space!(libc::c_int);
            let flags = MsgFlags::MSG_DONTWAIT;
            let got = recvmsg::<SockaddrIn6>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
            let limit = ControlMessageOwned::Ipv6HopLimit(i32::from(HOP_LIMIT));
            let is_neighbours = got.cmsgs()?.any(|message| message == limit);
            Ok((got.bytes, is_neighbours))
        };
        let (count, is_neighbours) = self.socket.async_io(Interest::READABLE, read).await?;
        Ok(read_advertisement(bytes.get(..count).unwrap_or_default()).filter(|_| is_neighbours))
    }
}
