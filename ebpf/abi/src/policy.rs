//! NetworkPolicy as maps: pods by the device that leads to them, peers as identities, rules as a prefix trie.
//!
//! Sets and identities are numbers made from what they mean (a hash of it), so an agent that starts again finds its own entries
//! and changes none.

use core::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Address, Port};

/// The rules of a pod are checked for packets into it.
pub const POLICY_INGRESS: u32 = 1;
/// The rules of a pod are checked for packets out of it.
pub const POLICY_EGRESS: u32 = 2;
/// Packets into the pod that the dry-run rules do not cover are counted.
pub const POLICY_DRY_INGRESS: u32 = 4;
/// Packets out of the pod that the dry-run rules do not cover are counted.
pub const POLICY_DRY_EGRESS: u32 = 8;

/// What holds for a pod, by the index of the device that leads to it. A pod without an entry, or with one without flags, is
/// free.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct PolicyPod {
    /// Set of rules for packets into the pod.
    pub ingress: u64,
    /// Set of rules for packets out of the pod.
    pub egress: u64,
    /// What would be the set for packets into the pod, were the policies on trial in force.
    pub dry_ingress: u64,
    /// Likewise for packets out of the pod.
    pub dry_egress: u64,
    /// `POLICY_…`: which of the sets are checked.
    pub flags: u32,
    /// Zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<PolicyPod>() == 40 && offset_of!(PolicyPod, flags) == 32);

/// The identity of an address that no selector in use selects, and the wildcard in rules.
pub const IDENTITY_NONE: u64 = 0;

/// A range of addresses, as a prefix trie wants it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RangeKey {
    /// Bits of the address that count (96 more for IPv4, which stands as mapped).
    pub prefix_bits: u32,
    /// The range's first address.
    pub address: Address,
}
const _: () = assert!(size_of::<RangeKey>() == 20 && offset_of!(RangeKey, address) == 4);

/// A rule, without the length of its prefix. A trie compares from the first byte on.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RuleData {
    /// The set of rules.
    pub set: [u8; 8],
    /// The peer's identity; [`IDENTITY_NONE`] for everybody.
    pub identity: [u8; 8],
    /// Protocol.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
    /// Destination port, or the first of a range.
    pub port: Port,
}
const _: () = assert!(size_of::<RuleData>() == 20 && offset_of!(RuleData, port) == 18);

/// Bits of a rule for every protocol.
pub const RULE_BITS_ANY: u32 = 128;
/// Bits of a rule for every port of a protocol.
pub const RULE_BITS_PROTOCOL: u32 = RULE_BITS_ANY + 16;
/// Bits of a rule for one port.
pub const RULE_BITS_PORT: u32 = RULE_BITS_PROTOCOL + 16;

/// A rule: packets that it covers are allowed.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RuleKey {
    /// Bits that count: [`RULE_BITS_ANY`], [`RULE_BITS_PROTOCOL`], or up to [`RULE_BITS_PORT`] for ports.
    pub prefix_bits: u32,
    /// What they are bits of.
    pub data: RuleData,
}
const _: () = assert!(size_of::<RuleKey>() == 24 && offset_of!(RuleKey, data) == 4);

impl RuleKey {
    /// A rule; `port` is the number and how many of its bits count, `None` for a rule on all ports; protocol `None` covers all.
    #[must_use]
    pub const fn new(set: u64, identity: u64, protocol: Option<u8>, port: Option<(u16, u32)>) -> Self {
        let (protocol, port, prefix_bits) = match (protocol, port) {
            (None, _) => (0, 0, RULE_BITS_ANY),
            (Some(protocol), None) => (protocol, 0, RULE_BITS_PROTOCOL),
            (Some(protocol), Some((port, bits))) => (protocol, port, RULE_BITS_PROTOCOL + bits),
        };
        let data = RuleData {
            set: set.to_be_bytes(),
            identity: identity.to_be_bytes(),
            protocol,
            pad: 0,
            port: Port::new(port),
        };
        Self { prefix_bits, data }
    }
}

/// The packet came out of the pod.
pub const TRACK_OUT: u8 = 0;
/// The packet went into the pod.
pub const TRACK_IN: u8 = 1;
/// Not a flow: the fragments of one packet; the ports hold its identification.
pub const TRACK_FRAGMENTS: u8 = 2;

/// A flow that a pod's edge has let through, in the direction it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TrackKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port; ICMP's identifier.
    pub source_port: Port,
    /// Destination port; ICMP's identifier.
    pub destination_port: Port,
    /// Index of the device at whose edge it was seen.
    pub ifindex: u32,
    /// Protocol.
    pub protocol: u8,
    /// [`TRACK_OUT`] or [`TRACK_IN`], with [`TRACK_FRAGMENTS`] for fragments.
    pub way: u8,
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<TrackKey>() == 44 && offset_of!(TrackKey, ifindex) == 36);

/// A FIN or RST was seen.
pub const TRACK_CLOSING: u32 = 1;

/// What is kept of such a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TrackValue {
    /// Seconds of the monotonic clock when it was last used.
    pub last_seen: u32,
    /// `TRACK_CLOSING`.
    pub flags: u32,
}
const _: () = assert!(size_of::<TrackValue>() == 8);

/// Mark on a packet from an isolated pod to a Service, with the index of the pod's device: the pod's rules are about the backend,
/// so they are checked when it is chosen.
pub const POLICY_MARK: u32 = 1 << 31;
