//! What the kernel programs and the agent share: map names, keys, values, flags and drop reasons, each written once.
//!
//! Every type is plain bytes: fixed width, explicit padding, network order for what is on the wire. zerocopy's derives
//! refuse implicit padding at compile time; the asserts below fix sizes and offsets, because pinned maps outlive
//! the binary that made them.
#![no_std]
#![forbid(unsafe_code)]

mod address;
mod asked;
mod count;
mod event;
mod failure;
pub mod policy;
mod reason;
mod tunnel;
mod xdp;

pub use address::{Address, Port};
pub use asked::{ASKED_BYTES, ASKED_VERSION, Asked, MAC_ASKED};
pub use count::{CONNECTIONS, CountKey, FAILED};
pub use event::{EVENT_CONNECT, EVENT_DATAGRAM, EVENT_DROP, EVENT_PACKET, FlowEvent, Watched};
pub use failure::{FAILURES_IN_A_ROW, Failures};
pub use reason::DropReason;
pub use tunnel::{TUNNEL_PORT, Tunnel};
pub use xdp::XdpPod;

use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version of every layout in this crate. A change of any type is a new number, and with it new map names.
pub const LAYOUT: u32 = 2;

/// Names of the maps; the number is [`LAYOUT`]. The programs repeat them as literals (an attribute takes no constant);
/// the loader fails if one is missing.
pub mod names {
    /// [`ServiceKey`](super::ServiceKey) to [`ServiceValue`](super::ServiceValue).
    pub const SERVICES: &str = "weft_svc_2";
    /// [`SlotKey`](super::SlotKey) to [`BackendKey`](super::BackendKey).
    pub const SLOTS: &str = "weft_slot_2";
    /// [`BackendKey`](super::BackendKey) to [`BackendValue`](super::BackendValue).
    pub const BACKENDS: &str = "weft_back_2";
    /// [`Address`](super::Address) to `u32`: addresses of this node that answer NodePorts.
    pub const NODE_ADDRESSES: &str = "weft_addr_2";
    /// Index 0 to [`NodeConfig`](super::NodeConfig).
    pub const CONFIG: &str = "weft_conf_2";
    /// [`SocketKey`](super::SocketKey) to [`SocketValue`](super::SocketValue), least recently used dropped.
    pub const SOCKETS: &str = "weft_sock_2";
    /// [`FlowKey`](super::FlowKey) to [`FlowValue`](super::FlowValue), least recently used dropped.
    pub const FLOWS: &str = "weft_flow_2";
    /// [`AffinityKey`](super::AffinityKey) to [`AffinityValue`](super::AffinityValue), least recently used dropped.
    pub const AFFINITY: &str = "weft_aff_2";
    /// [`DropReason`](super::DropReason) as index to a counter per CPU.
    pub const DROPS: &str = "weft_drop_2";
    /// Prefix trie of [`SourceKey`](super::SourceKey) to `u32`: clients that may use a list of backends.
    pub const SOURCES: &str = "weft_src_2";
    /// Ring of [`FlowEvent`](super::FlowEvent).
    pub const EVENTS: &str = "weft_evt_2";
    /// Index 0 to [`Watched`](super::Watched).
    pub const WATCHED: &str = "weft_seen_2";
    /// Index 0 to the number of events that found no room, per CPU.
    pub const LOST: &str = "weft_lost_2";
    /// [`FragmentKey`](super::FragmentKey) to [`FragmentValue`](super::FragmentValue), least recently used dropped.
    pub const FRAGMENTS: &str = "weft_frag_2";
    /// Index of a pod's device to [`PolicyPod`](super::policy::PolicyPod).
    pub const POLICY_PODS: &str = "weft_ppod_2";
    /// [`Address`](super::Address) of a pod to its identity, `u64`.
    pub const IDENTITIES: &str = "weft_ident_2";
    /// Prefix trie of [`RangeKey`](super::policy::RangeKey) to the identity of its addresses, `u64`.
    pub const RANGES: &str = "weft_range_2";
    /// Prefix trie of [`RuleKey`](super::policy::RuleKey) to `u32`: what is allowed.
    pub const RULES: &str = "weft_rule_2";
    /// [`TrackKey`](super::policy::TrackKey) to [`TrackValue`](super::policy::TrackValue), least recently used dropped.
    pub const TRACKED: &str = "weft_track_2";
    /// Set of rules on trial to `u64` per CPU: packets that it does not cover.
    pub const WOULD_DROP: &str = "weft_dry_2";
    /// [`Address`](super::Address) to [`LocalPod`](super::LocalPod): pods of this node whose edges have programs.
    pub const LOCAL_PODS: &str = "weft_local_2";
    /// Prefix trie of [`RangeKey`](super::policy::RangeKey) to `u32`: pods of nodes on a link of this one that are reached past the
    /// tunnel, with the link's device.
    pub const NEAR: &str = "weft_near_2";
    /// Prefix trie of [`RangeKey`](super::policy::RangeKey) to `u32`: pods and addresses of other nodes, with the largest packet that gets
    /// to these pods if their node answers clients outside by itself, else 0.
    pub const DIRECT: &str = "weft_direct_2";
    /// Index 0 for IPv4 and 1 for IPv6 to [`PodRange`](super::PodRange).
    pub const POD_RANGES: &str = "weft_pods_2";
    /// [`Address`](super::Address) of a pod to [`XdpPod`](super::XdpPod): pods that XDP hands packets to.
    pub const XDP_PODS: &str = "weft_xpod_2";
    /// Index from a peer's address to [`Tunnel`](super::Tunnel).
    pub const TUNNELS: &str = "weft_tun_2";
    /// [`BackendKey`](super::BackendKey) to [`Failures`](super::Failures): backends whose connections are watched.
    pub const FAILURES: &str = "weft_fail_2";
    /// Ring of [`BackendKey`](super::BackendKey): those with too many failures. Not pinned: it wakes the agent, which reads the map above.
    pub const WAKE: &str = "weft_wake";
    /// [`CountKey`](super::CountKey) to `u64` per CPU. Not pinned: it counts from the start of the agent, which alone knows whose lists
    /// these are.
    pub const COUNTS: &str = "weft_counts";
    /// All that are pinned.
    pub const ALL: [&str; 27] = [
        SERVICES,
        SLOTS,
        BACKENDS,
        NODE_ADDRESSES,
        CONFIG,
        SOCKETS,
        FLOWS,
        AFFINITY,
        DROPS,
        SOURCES,
        EVENTS,
        WATCHED,
        LOST,
        FRAGMENTS,
        POLICY_PODS,
        IDENTITIES,
        RANGES,
        RULES,
        TRACKED,
        WOULD_DROP,
        LOCAL_PODS,
        POD_RANGES,
        NEAR,
        DIRECT,
        XDP_PODS,
        TUNNELS,
        FAILURES,
    ];
}

/// Bounds of the maps. Those of Services are limits (elements are allocated as they come); those of
/// sockets, flows, affinity and tracked flows are allocated whole at load, and the agent makes them larger on machines with much memory.
pub mod sizes {
    /// Service addresses and ports.
    pub const SERVICES: u32 = 65_536;
    /// Endpoints over all Services; 5,000 Services of 50 endpoints fit.
    pub const SLOTS: u32 = 524_288;
    /// Distinct endpoint addresses and ports.
    pub const BACKENDS: u32 = 262_144;
    /// Addresses of one node.
    pub const NODE_ADDRESSES: u32 = 1_024;
    /// Sockets whose peer is remembered for `getpeername` and `recvmsg`; about 110 bytes each.
    pub const SOCKETS: u32 = 32_768;
    /// Two for each flow translated packet by packet; about 150 bytes each.
    pub const FLOWS: u32 = 32_768;
    /// Clients of Services with affinity, and unconnected UDP sockets.
    pub const AFFINITY: u32 = 16_384;
    /// Ranges of clients over all Services.
    pub const SOURCES: u32 = 65_536;
    /// Pods of one node.
    pub const POLICY_PODS: u32 = 4_096;
    /// Addresses of pods that a selector in use selects.
    pub const IDENTITIES: u32 = 262_144;
    /// Ranges of addresses in policies that select pods of this node.
    pub const RANGES: u32 = 65_536;
    /// Rules of pods of this node: for each set of rules, peers times ports.
    pub const RULES: u32 = 524_288;
    /// Flows of isolated pods; about 110 bytes each.
    pub const TRACKED: u32 = 32_768;
    /// The ring of events: some 3,000 of them.
    pub const EVENT_BYTES: u32 = 262_144;
    /// Sets of rules on trial that have met a packet they do not cover.
    pub const WOULD_DROP: u32 = 4_096;
    /// Addresses of this node's pods.
    pub const LOCAL_PODS: u32 = 8_192;
    /// Ranges of pods: two for each node.
    pub const NEAR: u32 = 16_384;
    /// Ranges of pods and addresses: four or more for each node.
    pub const DIRECT: u32 = 65_536;
    /// Addresses of pods of one node: two for each.
    pub const XDP_PODS: u32 = 8_192;
    /// Places of tunnels, a power of two. In a cluster of more nodes some have none.
    pub const TUNNELS: u32 = 1_024;
    /// Backends of Services that opted in to ejection.
    pub const FAILURES: u32 = 16_384;
    /// The ring that wakes the agent: some 100 backends, each told of again at its next failure.
    pub const WAKE_BYTES: u32 = 4_096;
    /// What was counted of lists: for each with traffic its connections, and the reasons for which some were turned away.
    pub const COUNTS: u32 = 65_536;
    /// Fragmented packets under way; about 100 bytes each. The kernel itself keeps at most 4 MiB of fragments.
    pub const FRAGMENTS: u32 = 4_096;
}

/// IPPROTO_TCP.
pub const TCP: u8 = 6;
/// IPPROTO_UDP.
pub const UDP: u8 = 17;
/// IPPROTO_SCTP.
pub const SCTP: u8 = 132;

/// Traffic that starts on this node or in its pods.
pub const SCOPE_INTERNAL: u8 = 0;
/// Traffic that comes from outside the cluster.
pub const SCOPE_EXTERNAL: u8 = 1;

/// An address and port that is a Service.
///
/// NodePorts have the unspecified address of their family: the programs ask [`names::NODE_ADDRESSES`] whether the destination is the node.
/// Port 0 and protocol 0 mark a cluster address as a Service's: what it does not serve is refused.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ServiceKey {
    /// Cluster, external or load-balancer address.
    pub address: Address,
    /// Port.
    pub port: Port,
    /// [`TCP`], [`UDP`] or [`SCTP`].
    pub protocol: u8,
    /// [`SCOPE_INTERNAL`] or [`SCOPE_EXTERNAL`].
    pub scope: u8,
}
const _: () = assert!(size_of::<ServiceKey>() == 20 && offset_of!(ServiceKey, port) == 16);

/// Keep the client's address: only endpoints of this node are in the list (externalTrafficPolicy Local).
pub const SERVICE_KEEP_SOURCE: u32 = 1;
/// Only clients in [`names::SOURCES`] may use it (loadBalancerSourceRanges); others' packets are dropped.
pub const SERVICE_CHECK_SOURCE: u32 = 2;
/// The list is a Maglev table: the slot is a hash of the client, the same on every node.
pub const SERVICE_HASHED: u32 = 4;
/// Without a backend, packets are dropped instead of refused: another node has one (externalTrafficPolicy Local).
pub const SERVICE_DROP_EMPTY: u32 = 8;
/// Connections are watched: a backend whose connections fail is to be ejected.
pub const SERVICE_WATCHED: u32 = 16;

/// Where a Service's traffic goes.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ServiceValue {
    /// Its list of backends; several addresses of a Service share one.
    pub list: u32,
    /// Backends in the list, in slots 0 to `count - 1`.
    pub count: u32,
    /// Seconds of affinity by client; 0 for none.
    pub affinity_seconds: u32,
    /// `SERVICE_…`.
    pub flags: u32,
}
const _: () = assert!(size_of::<ServiceValue>() == 16);

/// A client of a list, without the length of its range.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SourceData {
    /// The list, in network order: a trie compares from the first byte on.
    pub list: [u8; 4],
    /// The client's address, or the range's first.
    pub address: Address,
}

/// A range of clients of a list, as a prefix trie wants it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SourceKey {
    /// Bits that count: 32 for the list, then those of the address (96 more for IPv4, which stands as mapped).
    pub prefix_bits: u32,
    /// What they are bits of.
    pub data: SourceData,
}
const _: () = assert!(size_of::<SourceKey>() == 24 && offset_of!(SourceKey, data) == 4);

/// A place in a list of backends.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SlotKey {
    /// The list.
    pub list: u32,
    /// From 0; dense.
    pub index: u32,
}
const _: () = assert!(size_of::<SlotKey>() == 8);

/// An endpoint's address and port.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct BackendKey {
    /// Pod's or node's address.
    pub address: Address,
    /// Port.
    pub port: Port,
    /// [`TCP`], [`UDP`] or [`SCTP`].
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}
const _: () = assert!(size_of::<BackendKey>() == 20);

impl BackendKey {
    /// Made of whole words, as is a [`FlowKey`].
    #[inline(always)]
    #[must_use]
    pub const fn new(address: &Address, port: Port, protocol: u8) -> Self {
        let ([a, b, c, d], [high, low]) = (address.words(), port.0);
        zerocopy::transmute!([a, b, c, d, u32::from_ne_bytes([high, low, protocol, 0])])
    }
}

/// The backend takes new flows. Without it only established flows of TCP and SCTP go on (an endpoint that is terminating or not ready).
pub const BACKEND_ACTIVE: u32 = 1;

/// What is known of a backend. A flow holds the generation it began with; if it differs, the flow's endpoint is gone.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct BackendValue {
    /// Never used twice on a node.
    pub generation: u32,
    /// `BACKEND_…`.
    pub flags: u32,
    /// Hash of the endpoint's uid: another pod on the same address is another backend.
    pub owner: u64,
}
const _: () = assert!(size_of::<BackendValue>() == 16 && offset_of!(BackendValue, owner) == 8);

/// A socket and the backend it talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SocketKey {
    /// `SO_COOKIE` of the socket.
    pub cookie: u64,
    /// The backend.
    pub peer: BackendKey,
    /// Zero.
    pub pad: [u8; 4],
}
const _: () = assert!(size_of::<SocketKey>() == 32);

/// What the process believes it talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SocketValue {
    /// The Service's address.
    pub address: Address,
    /// The Service's port.
    pub port: Port,
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<SocketValue>() == 20);

/// Source and destination of a packet as it arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port.
    pub source_port: Port,
    /// Destination port.
    pub destination_port: Port,
    /// [`TCP`], [`UDP`] or [`SCTP`].
    pub protocol: u8,
    /// Which node sent it, for a client's packet that another node hands on; else zero.
    pub pad: [u8; 3],
}
const _: () = assert!(size_of::<FlowKey>() == 40 && offset_of!(FlowKey, source_port) == 32);

impl FlowKey {
    /// Sets all but the addresses. By whole words, as a map reads a key: a processor has to wait until what it wrote in pieces is in its cache
    /// before it can read the whole.
    #[inline(always)]
    pub fn set_ports(&mut self, [source, destination]: [Port; 2], protocol: u8) {
        let ([a, b], [c, d]) = (source.0, destination.0);
        let words: &mut [u32; 10] = zerocopy::transmute_mut!(self);
        words[8] = u32::from_ne_bytes([a, b, c, d]);
        words[9] = u32::from_ne_bytes([protocol, 0, 0, 0]);
    }
}

/// The packet is an answer of a backend.
pub const FLOW_REPLY: u32 = 1;
/// A FIN or RST was seen: a SYN with the same ports begins a new flow.
pub const FLOW_CLOSING: u32 = 2;
/// What this direction says of the connection's coming about is still to be counted.
pub const FLOW_WATCHED: u32 = 4;
/// The backend's node answers the client by itself: packets tell it what the client asked for.
pub const FLOW_DIRECT: u32 = 8;

/// What a packet of a flow becomes. The entry of the other direction is this one reversed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowValue {
    /// Source address afterwards.
    pub source: Address,
    /// Destination address afterwards.
    pub destination: Address,
    /// Source port afterwards.
    pub source_port: Port,
    /// Destination port afterwards.
    pub destination_port: Port,
    /// Device to leave by; 0 leaves the packet to the host's stack.
    pub ifindex: u32,
    /// Generation of the backend when the flow began.
    pub generation: u32,
    /// `FLOW_…`.
    pub flags: u32,
    /// Seconds of the monotonic clock when it was last used.
    pub last_seen: u32,
}
const _: () = assert!(size_of::<FlowValue>() == 52 && offset_of!(FlowValue, ifindex) == 36);

/// What the fragments of a packet have in common (RFC 791 §3.2, RFC 8200 §4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FragmentKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Identification.
    pub id: u32,
    /// Protocol for IPv4, where it is part of what identifies; 0 for IPv6.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}
const _: () = assert!(size_of::<FragmentKey>() == 40 && offset_of!(FragmentKey, id) == 32);

/// What only the first fragment of a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FragmentValue {
    /// Source port.
    pub source_port: Port,
    /// Destination port.
    pub destination_port: Port,
    /// [`TCP`], [`UDP`] or [`SCTP`].
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}
const _: () = assert!(size_of::<FragmentValue>() == 8);

/// A client of a list of backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AffinityKey {
    /// The client's address for packets; for sockets a number made into one ([`Address::from_id`]).
    pub client: Address,
    /// The list.
    pub list: u32,
}
const _: () = assert!(size_of::<AffinityKey>() == 20);

/// The backend that a client had last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AffinityValue {
    /// The backend.
    pub backend: BackendKey,
    /// Seconds of the monotonic clock.
    pub last_used: u32,
}
const _: () = assert!(size_of::<AffinityValue>() == 24);

/// In the place of a cgroup's id: none has this one.
pub const EVERY_CGROUP: u64 = 0;

/// What the programs know of their node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeConfig {
    /// Cookie of the node's network namespace: sockets in it are served.
    pub netns_cookie: u64,
    /// Id of the node's cgroup in cgroup2: processes below it are served. [`EVERY_CGROUP`] for all processes.
    pub cgroup_id: u64,
    /// Index of the bridge the pods are on.
    pub bridge_ifindex: u32,
    /// Index of the overlay's device; 0 for none.
    pub overlay_ifindex: u32,
    /// [`LAYOUT`]; the programs do nothing while it is 0.
    pub layout: u32,
    /// The largest packet that every route to other nodes' pods takes, if one takes less than its device; else 0.
    pub narrowest_bytes: u16,
    /// `NODE_…`.
    pub flags: u16,
}
const _: () = assert!(size_of::<NodeConfig>() == 32);

/// The map of ranges that are reached past the tunnel is not empty.
pub const NODE_NEAR: u16 = 1;
/// Clients outside keep their address towards pods of other nodes, which answer them past this one, and the other way round.
pub const NODE_DIRECT: u16 = 2;

/// Packets to the pod wait in a queue at its device (a bound on its bandwidth): they are not handed to it past that.
pub const LOCAL_QUEUED: u32 = 1;
/// The node's ports lead to the pod by the stack's own translation, which its answers must not go past.
pub const LOCAL_HOST_PORTS: u32 = 2;

/// A pod of this node with programs at its edge, by each of its addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LocalPod {
    /// The host's end of its pair.
    pub ifindex: u32,
    /// `LOCAL_…`.
    pub flags: u32,
    /// Hardware address of the pod's end.
    pub mac: [u8; 6],
    /// Not 0 once a flow of the pod was translated at its edge: answers to it may have to be translated back. Set by the
    /// programs, kept by the agent.
    pub translated: [u8; 2],
}
const _: () = assert!(size_of::<LocalPod>() == 16 && offset_of!(LocalPod, mac) == 8);

/// The addresses of the cluster's pods of one family. All zeros: any address may be a pod's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PodRange {
    /// The range's first address, as words that stand in memory as on the wire.
    pub first: [u32; 4],
    /// The bits that are the range's.
    pub mask: [u32; 4],
}
const _: () = assert!(size_of::<PodRange>() == 32);

impl PodRange {
    /// The range of the addresses that have the first `bits` (of 128) in common with this one.
    #[must_use]
    pub const fn new(address: Address, bits: u8) -> Self {
        let mask = match u128::MAX.checked_shl(128 - bits as u32) {
            Some(mask) => Address(mask.to_be_bytes()).words(),
            None => [0; 4],
        };
        let words = address.words();
        let first = [words[0] & mask[0], words[1] & mask[1], words[2] & mask[2], words[3] & mask[3]];
        Self { first, mask }
    }

    /// Whether an address is in it.
    #[inline(always)]
    #[must_use]
    pub const fn contains(&self, address: &Address) -> bool {
        let [a, b, c, d] = address.words();
        let ([e, f, g, h], [i, j, k, l]) = (self.first, self.mask);
        (a & i) ^ e | (b & j) ^ f | (c & k) ^ g | (d & l) ^ h == 0
    }
}

/// Mark on a packet that a pod's edge has looked up and left to the stack: the node's edge need not look again. It is taken off
/// there.
pub const SEEN_MARK: u32 = 1 << 30;

/// First port of the range that packets to Services leave the node with. It lies above the kernel's
/// default range for local sockets (32768 to 60999).
pub const NAT_PORT_FIRST: u16 = 61_000;
/// Number of ports in that range.
pub const NAT_PORT_COUNT: u16 = 4_536;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_what_shares_its_first_bits() {
        let range = PodRange::new(Address::v4([10, 42, 7, 9]), 96 + 14);
        for inside in [[10, 40, 0, 0], [10, 43, 255, 255]] {
            assert!(range.contains(&Address::v4(inside)), "{inside:?}");
        }
        for outside in [[10, 39, 255, 255], [10, 44, 0, 0]] {
            assert!(!range.contains(&Address::v4(outside)), "{outside:?}");
        }
        assert!(!range.contains(&Address::ANY), "of the other family");
        let one = PodRange::new(Address([7; 16]), 128);
        assert!(one.contains(&Address([7; 16])) && !one.contains(&Address::ANY));
        for all in [PodRange::default(), PodRange::new(Address([7; 16]), 0)] {
            assert!(all.contains(&Address::ANY) && all.contains(&Address([7; 16])));
        }
    }
}
