//! What the XDP program knows of the pods that it may hand packets to.

use core::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A pod of this node whose device takes frames from XDP, by the pod's [`Address`](crate::Address).
///
/// There is no entry for a pod whose device has a queue that bounds its rate, or whose end does not take such frames: its packets
/// go the way of the tc program.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct XdpPod {
    /// The node's end of the pod's pair.
    pub ifindex: u32,
    /// The largest packet that it takes, IP header included.
    pub mtu_bytes: u32,
    /// Hardware address of the pod.
    pub pod: [u8; 6],
    /// Hardware address that its packets come from: the bridge's.
    pub bridge: [u8; 6],
}
const _: () = assert!(size_of::<XdpPod>() == 20 && offset_of!(XdpPod, pod) == 8);
