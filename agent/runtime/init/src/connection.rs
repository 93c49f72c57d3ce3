//! One agent's connection to the init: bytes and descriptors in, replies out, never blocking.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg, send};
use weft_agent_runtime_init::wire::{self, Reply};

use crate::launch;

/// What a reader that doesn't read may cost us.
const MAX_UNSENT_BYTES: usize = 4 << 20;
/// Descriptors of one exec.
const MAX_DESCRIPTORS: usize = 4;
const READ_BYTES: usize = 16 << 10;

/// A connection and what is under way on it.
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    pub(crate) received: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
    pub(crate) unsent: Vec<u8>,
    pub(crate) subscribed: bool,
    pub(crate) awaits_shutdown: bool,
    pub(crate) closed: bool,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            received: Vec::new(),
            descriptors: Vec::new(),
            unsent: Vec::new(),
            subscribed: false,
            awaits_shutdown: false,
            closed: false,
        }
    }

    pub(crate) fn read(&mut self) {
        let mut bytes = [0; READ_BYTES];
        loop {
            let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            let (length, descriptors) =
                match recvmsg::<()>(self.stream.as_raw_fd(), &mut slices, Some(&mut space), flags) {
                    Ok(message) => (message.bytes, launch::received(&message)),
                    Err(Errno::EAGAIN) => return,
                    Err(Errno::EINTR) => continue,
                    Err(_) => (0, Vec::new()),
                };
            if length == 0 {
                self.closed = true;
                return;
            }
            self.descriptors.extend(descriptors);
            self.received.extend_from_slice(&bytes[..length]);
            if self.received.len() > wire::MAX_MESSAGE_BYTES + READ_BYTES
                || self.descriptors.len() > MAX_DESCRIPTORS
            {
                self.closed = true;
                return;
            }
        }
    }

    pub(crate) fn send(&mut self, reply: &Reply) {
        match wire::encode(reply) {
            Ok(bytes) => self.unsent.extend(bytes),
            Err(error) => {
                eprintln!("encode a reply: {error}");
                self.closed = true;
            }
        }
        self.flush();
        self.closed |= self.unsent.len() > MAX_UNSENT_BYTES;
    }

    pub(crate) fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match send(self.stream.as_raw_fd(), &self.unsent, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
            {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => {
                    self.unsent.clear();
                    self.closed = true;
                }
            }
        }
    }
}
