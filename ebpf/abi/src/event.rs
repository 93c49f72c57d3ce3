//! Events of flows, from the programs to whoever watches.

use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Address, Port};

/// A socket was connected to a backend.
pub const EVENT_CONNECT: u8 = 1;
/// A datagram of a socket that is not connected was sent to a backend.
pub const EVENT_DATAGRAM: u8 = 2;
/// The first packet of a flow was translated.
pub const EVENT_PACKET: u8 = 3;
/// Traffic was refused or dropped: see the reason.
pub const EVENT_DROP: u8 = 4;

/// What happened to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowEvent {
    /// Nanoseconds of the monotonic clock.
    pub time_ns: u64,
    /// Cgroup of the process, which tells its pod; 0 for packets.
    pub cgroup_id: u64,
    /// The client; [`Address::ANY`] for sockets, which have none yet.
    pub source: Address,
    /// What the client asked for.
    pub destination: Address,
    /// What it got; [`Address::ANY`] for nothing.
    pub backend: Address,
    /// The client's port; 0 for sockets.
    pub source_port: Port,
    /// The port that was asked for.
    pub destination_port: Port,
    /// The backend's port.
    pub backend_port: Port,
    /// Number of the transport protocol.
    pub protocol: u8,
    /// `EVENT_…`.
    pub kind: u8,
    /// [`DropReason`](crate::DropReason) of a drop; 0 for others.
    pub reason: u32,
    /// Zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<FlowEvent>() == 80 && offset_of!(FlowEvent, source_port) == 64);

/// Until when somebody watches, in seconds of the monotonic clock: a watcher that died is forgotten by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Watched {
    /// Everything.
    pub flows_until: u32,
    /// What is refused or dropped.
    pub drops_until: u32,
}
const _: () = assert!(size_of::<Watched>() == 8);
