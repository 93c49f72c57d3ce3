//! What a device does for the packets that go through it: switches of ethtool, and whether it takes frames from XDP.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

use crate::Error;

/// `SIOCETHTOOL` of linux/sockios.h.
const SIOCETHTOOL: libc::Ioctl = 0x8946;
/// `ETHTOOL_GTXCSUM`, `ETHTOOL_STXCSUM` and `ETHTOOL_SGRO` of linux/ethtool.h.
const GET_TRANSMIT_CHECKSUMS: u32 = 0x16;
const SET_TRANSMIT_CHECKSUMS: u32 = 0x17;
const SET_RECEIVE_BATCHES: u32 = 0x2c;

/// `NETDEV_XDP_ACT_NDO_XMIT` of linux/netdev.h.
const TAKES_FRAMES: u64 = 4;

/// The ethtool of one network namespace.
#[derive(Debug)]
pub struct Offloads(OwnedFd);

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// `struct ifreq`, with the member that ethtool uses.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    data: *mut Value,
    rest: [u64; 2],
}

impl Offloads {
    /// Opens it in the namespace of the calling thread.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn open() -> Result<Self, Error> {
        // SAFETY: socket takes three integers and returns a new descriptor or -1.
        let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(Error::Socket { op: "open", source: io::Error::last_os_error() });
        }
        // SAFETY: the kernel has just returned this descriptor, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes a device join what it receives to larger packets (GRO). An end of a veth pair that is up then takes frames from XDP,
    /// which without it are lost.
    ///
    /// # Errors
    /// If there is no such device, or it can't.
    pub fn receive_in_batches(&self, device: &str, on: bool) -> Result<(), Error> {
        self.set("let receive in batches", device, SET_RECEIVE_BATCHES, on)
    }

    /// Lets a device finish the checksums of what it sends, or has them finished before.
    ///
    /// # Errors
    /// If there is no such device, or it can't.
    pub fn finish_checksums(&self, device: &str, on: bool) -> Result<(), Error> {
        self.set("set the checksums of", device, SET_TRANSMIT_CHECKSUMS, on)
    }

    /// Whether a device finishes the checksums of what it sends.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn finishes_checksums(&self, device: &str) -> Result<bool, Error> {
        self.call("find out who finishes the checksums of", device, GET_TRANSMIT_CHECKSUMS, 0)
            .map(|data| data != 0)
    }

    fn set(&self, op: &'static str, device: &str, command: u32, on: bool) -> Result<(), Error> {
        self.call(op, device, command, u32::from(on)).map(drop)
    }

    fn call(&self, op: &'static str, device: &str, command: u32, data: u32) -> Result<u32, Error> {
        let refused = |errno| Error::Refused { op, subject: device.to_owned(), errno };
        let mut name = [0; libc::IFNAMSIZ];
        if device.len() >= name.len() {
            return Err(refused(Errno::ENODEV));
        }
        name[..device.len()].copy_from_slice(device.as_bytes());
        let mut value = Value { command, data };
        let mut request = Request { name, data: &raw mut value, rest: [0; 2] };
        // SAFETY: the request is a valid `struct ifreq` that points to a valid value, both for the length of the call.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        Errno::result(result).map_err(refused)?;
        // SAFETY: the kernel wrote into it behind the compiler's back; every bit pattern is valid.
        Ok(unsafe { std::ptr::read_volatile(&raw const value.data) })
    }
}

/// The kernel's `netdev` family of generic netlink (Linux 6.3).
#[derive(Debug)]
pub struct Features {
    socket: Socket,
    family: u16,
}

/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, `CTRL_ATTR_FAMILY_NAME`, `CTRL_ATTR_FAMILY_ID` of linux/genetlink.h.
const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_NAME: u16 = 2;
const FAMILY_ID: u16 = 1;
/// `NETDEV_CMD_DEV_GET`, `NETDEV_A_DEV_IFINDEX`, `NETDEV_A_DEV_XDP_FEATURES` of linux/netdev.h.
const GET_DEVICE: u8 = 1;
const IFINDEX: u16 = 1;
const XDP_FEATURES: u16 = 3;
/// Bytes of a message's header; that of generic netlink, 4 more, follows it.
const HEADER_BYTES: usize = 16;
/// `NLMSG_ERROR` and `NLMSG_DONE`.
const FAILED: u16 = 2;
const DONE: u16 = 3;

impl Features {
    /// Opens it in the namespace of the calling thread.
    ///
    /// # Errors
    /// [`crate::Class::NotFound`] if the kernel is too old.
    pub fn open() -> Result<Self, Error> {
        let failed = |op| move |source| Error::Socket { op, source };
        let mut socket = Socket::new(NETLINK_GENERIC).map_err(failed("open"))?;
        socket.bind_auto().map_err(failed("bind"))?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connect"))?;
        let mut features = Self { socket, family: CONTROL };
        let op = "find the family";
        let name = [&12_u16.to_ne_bytes()[..], &FAMILY_NAME.to_ne_bytes(), b"netdev\0\0"].concat();
        features.send(op, GET_FAMILY, 0, &name)?;
        let answer = features.receive(op)?.into_iter().next().unwrap_or_default().1;
        let id = attribute(&answer, FAMILY_ID).and_then(|value| value.try_into().ok());
        let id: [u8; 2] = id.ok_or_else(|| Error::Decode { op, reason: "it has no number".to_owned() })?;
        features.family = u16::from_ne_bytes(id);
        Ok(features)
    }

    /// The devices of the namespace that take frames which XDP redirects to them; of a veth, whether its other end would
    /// receive them.
    ///
    /// # Errors
    /// If the kernel can't be asked.
    pub fn that_take_frames(&mut self) -> Result<HashSet<u32>, Error> {
        let op = "ask for the features of devices";
        self.send(op, GET_DEVICE, NLM_F_DUMP, &[])?;
        let mut found = HashSet::new();
        loop {
            for (kind, attributes) in self.receive(op)? {
                if kind == DONE {
                    return Ok(found);
                }
                let number = attribute(&attributes, IFINDEX).and_then(|value| value.try_into().ok());
                let features = attribute(&attributes, XDP_FEATURES).and_then(|value| value.try_into().ok());
                if let (Some(number), Some(features)) = (number, features)
                    && u64::from_ne_bytes(features) & TAKES_FRAMES != 0
                {
                    found.insert(u32::from_ne_bytes(number));
                }
            }
        }
    }

    /// Sends a command with these attributes.
    fn send(&mut self, op: &'static str, command: u8, flags: u16, attributes: &[u8]) -> Result<(), Error> {
        let mut message = vec![0; HEADER_BYTES];
        message.extend([command, 1, 0, 0]);
        message.extend(attributes);
        let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
        message[..4].copy_from_slice(&length.to_ne_bytes());
        message[4..6].copy_from_slice(&self.family.to_ne_bytes());
        message[6..8].copy_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        self.socket.send(&message, 0).map(|_| ()).map_err(|source| Error::Socket { op, source })
    }

    /// The messages of one datagram: what each is, and its attributes.
    fn receive(&self, op: &'static str) -> Result<Vec<(u16, Vec<u8>)>, Error> {
        let (datagram, _) = self.socket.recv_from_full().map_err(|source| Error::Socket { op, source })?;
        let short = || Error::Decode { op, reason: "it is cut off".to_owned() };
        let (mut rest, mut found) = (datagram.as_slice(), Vec::new());
        while !rest.is_empty() {
            let length = rest.get(..4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
            let length = length.and_then(|length| usize::try_from(length).ok()).ok_or_else(short)?;
            let message = rest.get(..length).filter(|m| m.len() >= HEADER_BYTES).ok_or_else(short)?;
            let kind = u16::from_ne_bytes([message[4], message[5]]);
            let code = message.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
            if let (FAILED, Some(code)) = (kind, code)
                && code != 0
            {
                let errno = Errno::from_raw(code.saturating_neg());
                return Err(Error::Refused { op, subject: "netdev".to_owned(), errno });
            }
            found.push((kind, message.get(HEADER_BYTES + 4..).unwrap_or_default().to_vec()));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(found)
    }
}

/// The value of the first attribute of a kind.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}
