//! What a device does for the packets that go through it: switches of ethtool, and whether it takes frames from XDP.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

use crate::Error;

/// `SIOCETHTOOL` of linux/sockios.h.
const SIOCETHTOOL: u64 = 0x8946;
/// `ETHTOOL_STXCSUM` and `ETHTOOL_SGRO` of linux/ethtool.h.
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

    fn set(&self, op: &'static str, device: &str, command: u32, on: bool) -> Result<(), Error> {
        let refused = |errno| Error::Refused { op, subject: device.to_owned(), errno };
        let mut name = [0; libc::IFNAMSIZ];
        if device.len() >= name.len() {
            return Err(refused(Errno::ENODEV));
        }
        name[..device.len()].copy_from_slice(device.as_bytes());
        let mut value = Value { command, data: u32::from(on) };
        let mut request = Request { name, data: &raw mut value, rest: [0; 2] };
        // SAFETY: the request is a valid `struct ifreq` that points to a valid value, both for the length of the call.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        Errno::result(result).map(|_| ()).map_err(refused)
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
        let answer = features.ask(op, "netdev", GET_FAMILY, (FAMILY_NAME, b"netdev\0"))?;
        let id = attribute(&answer, FAMILY_ID).and_then(|value| value.try_into().ok());
        let id: [u8; 2] = id.ok_or_else(|| Error::Decode { op, reason: "it has no number".to_owned() })?;
        features.family = u16::from_ne_bytes(id);
        Ok(features)
    }

    /// Whether frames that XDP redirects to a device are taken: for a veth, whether its other end would receive them.
    ///
    /// # Errors
    /// [`crate::Class::NotFound`] if there is no such device.
    pub fn takes_frames(&mut self, index: u32) -> Result<bool, Error> {
        let op = "ask for the features of";
        let answer = self.ask(op, &index.to_string(), GET_DEVICE, (IFINDEX, &index.to_ne_bytes()))?;
        let features = attribute(&answer, XDP_FEATURES).and_then(|value| value.try_into().ok());
        Ok(features.is_some_and(|value| u64::from_ne_bytes(value) & TAKES_FRAMES != 0))
    }

    /// Sends a command with one attribute; answers the attributes of what comes back.
    fn ask(
        &mut self,
        op: &'static str,
        subject: &str,
        command: u8,
        (kind, value): (u16, &[u8]),
    ) -> Result<Vec<u8>, Error> {
        const HEADER_BYTES: usize = 16;
        let mut message = vec![0; HEADER_BYTES];
        message.extend([command, 1, 0, 0]);
        message.extend(u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(value);
        message.resize(message.len().next_multiple_of(4), 0);
        let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
        message[..4].copy_from_slice(&length.to_ne_bytes());
        message[4..6].copy_from_slice(&self.family.to_ne_bytes());
        let flags = netlink_packet_core::NLM_F_REQUEST;
        message[6..8].copy_from_slice(&flags.to_ne_bytes());
        let failed = |source| Error::Socket { op, source };
        self.socket.send(&message, 0).map_err(failed)?;
        let (answer, _) = self.socket.recv_from_full().map_err(failed)?;
        let short = || Error::Decode { op, reason: "it is cut off".to_owned() };
        let kind =
            answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(short)?;
        if kind == u16::try_from(libc::NLMSG_ERROR).unwrap_or(2) {
            let code = answer.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
            let errno = Errno::from_raw(code.ok_or_else(short)?.saturating_neg());
            return Err(Error::Refused { op, subject: subject.to_owned(), errno });
        }
        answer.get(HEADER_BYTES + 4..).map(<[u8]>::to_vec).ok_or_else(short)
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
