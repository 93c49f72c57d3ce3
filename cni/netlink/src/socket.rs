//! One route socket: requests with an acknowledgement, and dumps that are repeated when they were interrupted.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::link::FoundLink;
use crate::{Error, Link, namespace};

/// `SIOCGSKNS` of linux/sockios.h.
const SIOCGSKNS: libc::Ioctl = 0x894c;

/// A dump that was interrupted this many times in a row is given up.
const DUMP_TRIES: u32 = 16;

/// A connection to the kernel's route service, in one network namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    /// How many messages came that no request had asked for.
    events: u64,
    /// What the kernel sent last.
    answer: Vec<u8>,
}

/// The longest answer that is one datagram: a device without virtual functions takes 5 KiB.
const ANSWER_BYTES: usize = 16 << 10;
/// The longest part of an answer that comes in parts; the kernel sends at most 32 KiB.
const PART_BYTES: usize = 64 << 10;

/// What the kernel does in the background takes moments; on a machine that is overwhelmed, longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a request is about, for its error.
#[derive(Clone, Copy)]
pub(crate) struct About<'a> {
    pub(crate) op: &'static str,
    pub(crate) subject: &'a str,
}

impl About<'_> {
    /// The error for a code that the kernel answered.
    pub(crate) fn refused(self, code: i32) -> Error {
        let errno = Errno::from_raw(code.saturating_neg());
        Error::Refused { op: self.op, subject: self.subject.to_owned(), errno }
    }
}

impl Netlink {
    /// Opens a socket in the namespace of the calling thread.
    ///
    /// # Errors
    /// If the kernel has no route netlink, or no more descriptors.
    pub fn open() -> Result<Self, Error> {
        let failed = |op| move |source| Error::Socket { op, source };
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed("open"))?;
        socket.bind_auto().map_err(failed("bind"))?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connect"))?;
        Ok(Self { socket, sequence: 0, events: 0, answer: Vec::with_capacity(ANSWER_BYTES) })
    }

    /// Opens a socket in another namespace, which the calling thread enters for that moment.
    ///
    /// # Errors
    /// If the namespace can't be entered, or the thread can't come back; then it must not go on.
    pub fn open_within(namespace: BorrowedFd<'_>) -> Result<Self, Error> {
        namespace::during(namespace, Self::open)?
    }

    pub(crate) fn check_strictly(&self) -> io::Result<()> {
        self.socket.set_netlink_get_strict_chk(true)
    }

    /// Asks for one thing and waits for it, or for the reason why not.
    pub(crate) fn get<T: NetlinkDeserializable>(
        &mut self,
        about: About<'_>,
        message: RouteNetlinkMessage,
    ) -> Result<T, Error> {
        self.send(about.op, message, NLM_F_REQUEST)?;
        loop {
            for message in self.receive(about.op)? {
                if message.header.sequence_number != self.sequence {
                    self.events += 1;
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => return Ok(inner),
                    NetlinkPayload::Error(error) => {
                        return Err(about.refused(error.code.map_or(0, std::num::NonZeroI32::get)));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Asks until the answer is yes, and waits for events of a group in between.
    ///
    /// Whatever a request skips while it waits for its answer counts as an event: the answer may be older.
    pub(crate) fn until(
        &mut self,
        about: About<'_>,
        group: u32,
        mut holds: impl FnMut(&mut Self) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        if holds(self)? {
            return Ok(());
        }
        self.subscribed(group, |netlink| {
            loop {
                let seen = netlink.events;
                if holds(netlink)? {
                    return Ok(());
                }
                if netlink.events == seen {
                    match netlink.receive::<RouteNetlinkMessage>(about.op) {
                        Ok(_) => {}
                        Err(Error::Socket { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                            return Err(about.refused(-libc::EAGAIN));
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        })
    }

    /// Does something while events of a group come too, and while no answer is waited for longer than [`PATIENCE`].
    pub(crate) fn subscribed<T>(
        &mut self,
        group: u32,
        work: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let failed = |op| move |source| Error::Socket { op, source };
        let set = |socket: &Socket, after: Duration| {
            let after = TimeVal::microseconds(i64::try_from(after.as_micros()).unwrap_or(0));
            setsockopt(&borrowed(socket), ReceiveTimeout, &after)
                .map_err(|errno| failed("set the time-out")(errno.into()))
        };
        self.socket.add_membership(group).map_err(failed("subscribe"))?;
        set(&self.socket, PATIENCE)?;
        let outcome = work(self);
        set(&self.socket, Duration::ZERO)?;
        self.socket.drop_membership(group).map_err(failed("unsubscribe"))?;
        outcome
    }

    /// The number of the last request.
    pub(crate) fn sequence(&self) -> u32 {
        self.sequence
    }

    /// The namespace that the socket is of, whatever namespace its thread is in by now. Nothing below /proc is opened: for a new process
    /// the kernel makes that anew.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn namespace(&self) -> Result<OwnedFd, Error> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
        let fd = unsafe { libc::ioctl(self.raw().as_raw_fd(), SIOCGSKNS) };
        if fd < 0 {
            return Err(Error::Socket { op: "ask for the namespace of", source: io::Error::last_os_error() });
        }
        // SAFETY: the kernel has just returned this descriptor, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// The socket's descriptor.
    pub(crate) fn raw(&self) -> BorrowedFd<'_> {
        borrowed(&self.socket)
    }

    /// Sends a request and waits for its acknowledgement.
    pub(crate) fn request(
        &mut self,
        about: About<'_>,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), Error> {
        self.request_echo(about, message, flags).map(|_| ())
    }

    /// The same, with what the kernel says of the devices that it made: with `NLM_F_ECHO`, and if it is new enough.
    pub(crate) fn request_echo(
        &mut self,
        about: About<'_>,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<Link>, Error> {
        self.send(about.op, message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        let mut echo = Vec::new();
        loop {
            for message in self.receive(about.op)? {
                if message.header.sequence_number != self.sequence {
                    self.events += 1;
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(FoundLink(link)) => echo.extend(link),
                    NetlinkPayload::Error(error) => {
                        return error.code.map_or(Ok(echo), |code| Err(about.refused(code.get())));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Sends a dump request and collects what `pick` takes of the answers. The one place where a dump is read: an
    /// interrupted one is incomplete, so it is repeated.
    pub(crate) fn dump<M: NetlinkDeserializable, T>(
        &mut self,
        op: &'static str,
        message: &RouteNetlinkMessage,
        mut pick: impl FnMut(M) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        self.answer.clear();
        self.answer.reserve(PART_BYTES);
        for _ in 0..DUMP_TRIES {
            self.send(op, message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if let Some(found) = self.collect(op, &mut pick)? {
                return Ok(found);
            }
        }
        Err(Error::Interrupted { op })
    }

    fn collect<M: NetlinkDeserializable, T>(
        &mut self,
        op: &'static str,
        pick: &mut impl FnMut(M) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        let mut found = Vec::new();
        let mut interrupted = false;
        loop {
            for message in self.receive(op)? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => found.extend(pick(inner)),
                    NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(found)),
                    NetlinkPayload::Error(error) => {
                        let about = About { op, subject: "" };
                        return Err(about.refused(error.code.map_or(0, std::num::NonZeroI32::get)));
                    }
                    _ => {}
                }
            }
        }
    }

    fn send(&mut self, op: &'static str, message: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
        let bytes = self.encode(message, flags);
        self.send_bytes(op, &bytes)
    }

    /// The next request's bytes.
    pub(crate) fn encode(&mut self, message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        buffer
    }

    /// Waits for a datagram. One call: to ask for its length first is to receive it twice.
    pub(crate) fn receive<T: NetlinkDeserializable>(
        &mut self,
        op: &'static str,
    ) -> Result<Vec<NetlinkMessage<T>>, Error> {
        self.answer.clear();
        let received = self.socket.recv(&mut self.answer, libc::MSG_TRUNC);
        let length = received.map_err(|source| Error::Socket { op, source })?;
        if length > self.answer.len() {
            return Err(Error::Decode { op, reason: format!("{length} bytes are too many") });
        }
        parse(op, &self.answer)
    }

    pub(crate) fn send_bytes(&self, op: &'static str, bytes: &[u8]) -> Result<(), Error> {
        self.socket.send(bytes, 0).map(|_| ()).map_err(|source| Error::Socket { op, source })
    }

    /// Notes a message that no request asked for.
    pub(crate) fn note_event(&mut self) {
        self.events += 1;
    }
}

fn borrowed(socket: &Socket) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the socket that it is borrowed from.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// The messages of one datagram.
pub(crate) fn parse<T: NetlinkDeserializable>(
    op: &'static str,
    datagram: &[u8],
) -> Result<Vec<NetlinkMessage<T>>, Error> {
    let mut messages = Vec::new();
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkMessage::<T>::deserialize(rest)
            .map_err(|error| Error::Decode { op, reason: error.to_string() })?;
        let length = usize::try_from(message.header.length).unwrap_or(0);
        // Messages begin at multiples of four bytes.
        let step = length.next_multiple_of(4).clamp(4, rest.len());
        rest = &rest[step..];
        messages.push(message);
    }
    Ok(messages)
}
