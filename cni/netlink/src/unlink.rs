//! Deleting a device without waiting for the kernel's cleaning-up.
//!
//! The kernel deletes a device in two steps. First, under its lock, it sets it down, takes its addresses and routes away,
//! takes it out of every list, and says so (RTM_DELLINK). From then on nothing can find it, and no packet passes. Then, without the
//! lock, it waits until no processor can still hold a pointer to it, and frees its memory: some 20 ms in which the process that
//! asked can't go on, and nobody else notices anything. So a child asks, and the parent goes on as soon as the kernel has said
//! so.

use std::os::fd::AsRawFd as _;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::unistd::{ForkResult, fork};

use crate::error::ok_if_gone;
use crate::socket::About;
use crate::{Class, Error, Netlink};

/// `RTNLGRP_LINK`.
const LINKS: u32 = 1;

/// What a message says about a deletion.
enum Word {
    /// It is done, or was refused.
    Answer(Result<(), Error>),
    /// The device is out of every list.
    Out,
    /// Something else.
    Nothing,
}

impl Netlink {
    /// Deletes the device of a name, and the other end of a pair with it, and returns when nothing can find them any more, while
    /// a child process waits for the rest. One that is gone is no error.
    ///
    /// For a process of one thread that ends soon: whoever inherits its children reaps the child.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_link_early(&mut self, name: &str) -> Result<(), Error> {
        let index = match self.link(name) {
            Err(error) if error.class() == Class::NotFound => return Ok(()),
            other => other?.index,
        };
        let mut message = LinkMessage::default();
        // The number, not the name: one that is delayed must not hit a later device of this name.
        message.header.index = index;
        let about = About { op: "delete the device", subject: name };
        let message = RouteNetlinkMessage::DelLink(message);
        self.subscribed(LINKS, |netlink| {
            let bytes = netlink.encode(message, NLM_F_REQUEST | NLM_F_ACK);
            netlink.send_by_child(about.op, &bytes)?;
            netlink.await_deletion(about, index)
        })
    }

    fn await_deletion(&mut self, about: About<'_>, index: u32) -> Result<(), Error> {
        let asked = self.sequence();
        loop {
            let messages = match self.receive(about.op) {
                Ok(messages) => messages,
                // Events were lost, or the child was: the same again, and nobody else to wait for it.
                Err(Error::Socket { source, .. })
                    if matches!(source.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN)) =>
                {
                    return self.delete_link(index);
                }
                Err(error) => return Err(error),
            };
            for message in messages {
                match read(message, about, asked, index) {
                    Word::Answer(answer) => return ok_if_gone(answer),
                    Word::Out => return Ok(()),
                    Word::Nothing => {}
                }
            }
        }
    }

    /// Has a child send a request. Its answer comes to this socket, which both have.
    fn send_by_child(&self, op: &'static str, bytes: &[u8]) -> Result<(), Error> {
        let socket = self.raw();
        // SAFETY: the child only makes system calls on what is there already: no allocation, no lock, no destructor.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { .. }) => Ok(()),
            Ok(ForkResult::Child) => {
                let socket = socket.as_raw_fd();
                close_all_but(socket);
                // SAFETY: the buffer is valid for its length, and the child ends here without running anything of the parent's.
                unsafe {
                    libc::send(socket, bytes.as_ptr().cast(), bytes.len(), 0);
                    libc::_exit(0)
                }
            }
            Err(errno) => Err(Error::Socket { op, source: errno.into() }),
        }
    }
}

/// Lets go of the caller's descriptors: it may wait for their end.
fn close_all_but(kept: i32) {
    let (below, above) = (kept.cast_unsigned().saturating_sub(1), kept.cast_unsigned().saturating_add(1));
    // SAFETY: closes numbers of descriptors that this process, which ends soon, uses no more.
    unsafe {
        if kept > 0 {
            libc::syscall(libc::SYS_close_range, 0u32, below, 0u32);
        }
        libc::syscall(libc::SYS_close_range, above, u32::MAX, 0u32);
    }
}

fn read(message: NetlinkMessage<RouteNetlinkMessage>, about: About<'_>, asked: u32, index: u32) -> Word {
    match message.payload {
        NetlinkPayload::Error(error) if message.header.sequence_number == asked => {
            let code = error.code.map(|code| code.get());
            Word::Answer(code.map_or(Ok(()), |code| Err(about.refused(code))))
        }
        // A bridge says the same, as one of its own family, of a port that leaves it.
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link))
            if link.header.index == index && link.header.interface_family == AddressFamily::Unspec =>
        {
            Word::Out
        }
        _ => Word::Nothing,
    }
}
