//! Pod edge: NetworkPolicy on the host's side of each pod's device.
//!
//! Both programs let other programs on the device go on (`TCX_NEXT`) with what they do not drop.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{HashMap, LruHashMap, PerCpuArray, PerCpuHashMap};
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::policy::*;
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::policy::{
    Bytes, Edge, Packet, Parsed, Peer, PolicyTables, check, check_fragment, parse, rule,
};
use weft_ebpf_logic::service::{Destination, Found, find};

use crate::events;
use crate::frame::raw;
use crate::maps::{FLOWS, Kernel, NO_PREALLOC, count};
use crate::verdict::{DROP, NEXT};

#[map(name = "weft_ppod_2")]
static PODS: HashMap<u32, PolicyPod> = HashMap::pinned(sizes::POLICY_PODS, NO_PREALLOC);
#[map(name = "weft_ident_2")]
static IDENTITIES: HashMap<Address, u64> = HashMap::pinned(sizes::IDENTITIES, NO_PREALLOC);
#[map(name = "weft_range_2")]
static RANGES: LpmTrie<Address, u64> = LpmTrie::pinned(sizes::RANGES, NO_PREALLOC);
#[map(name = "weft_rule_2")]
static RULES: LpmTrie<RuleData, u32> = LpmTrie::pinned(sizes::RULES, NO_PREALLOC);
#[map(name = "weft_track_2")]
static TRACKED: LruHashMap<TrackKey, TrackValue> = LruHashMap::pinned(sizes::TRACKED, 0);

#[map(name = "weft_dry_2")]
static WOULD_DROP: PerCpuHashMap<u64, u64> = PerCpuHashMap::pinned(sizes::WOULD_DROP, NO_PREALLOC);

/// Room for the packet being looked at: the stack has too little. Nothing else runs on the CPU until the program ends.
#[map(name = "weft_packet_2")]
static PACKET: PerCpuArray<Packet> = PerCpuArray::with_max_entries(1, 0);

impl PolicyTables for Kernel {
    #[inline(always)]
    fn identity(&self, address: &Address) -> u64 {
        // SAFETY: without preallocation an element is freed by RCU only; it is copied before the program ends.
        match unsafe { IDENTITIES.get(address).copied() } {
            Some(identity) => identity,
            None => match RANGES.get(Key::new(128, *address)) {
                Some(identity) => *identity,
                None => IDENTITY_NONE,
            },
        }
    }
    #[inline(always)]
    fn allows(&self, set: u64, identity: u64, protocol: u8, port: Port) -> bool {
        let data =
            RuleData { set: set.to_be_bytes(), identity: identity.to_be_bytes(), protocol, pad: 0, port };
        RULES.get(Key::new(RULE_BITS_PORT, data)).is_some()
    }
    #[inline(always)]
    fn tracked(&self, key: &TrackKey) -> Option<TrackValue> {
        // SAFETY: copied at once; an element reused meanwhile tells another flow's time, which is a second's matter.
        unsafe { TRACKED.get(key).copied() }
    }
    #[inline(always)]
    fn track(&self, key: &TrackKey, value: &TrackValue) {
        let _ = TRACKED.insert(key, value, 0);
    }
    #[inline(always)]
    fn would_drop(&self, set: u64) {
        match WOULD_DROP.get_ptr_mut(set) {
            // SAFETY: the element belongs to this CPU, and these programs are not preempted by themselves on it.
            Some(counter) => unsafe { *counter += 1 },
            None => drop(WOULD_DROP.insert(set, 1, BPF_NOEXIST as u64)),
        }
    }
    #[inline(always)]
    fn now(&self) -> u32 {
        // SAFETY: a helper without arguments.
        (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
    }
}

struct Frame<'a>(&'a TcContext);

impl Bytes for Frame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.load(at).ok()
    }
}

#[inline(always)]
fn edge(ctx: &TcContext, way: u8) -> Option<Edge> {
    // SAFETY: the kernel hands in a valid context.
    edge_at(unsafe { (*raw(ctx)).ifindex }, way)
}

#[inline(always)]
fn edge_at(ifindex: u32, way: u8) -> Option<Edge> {
    // SAFETY: as for identities.
    let pod = unsafe { PODS.get(ifindex).copied() }?;
    (pod.flags != 0).then_some(Edge { pod, ifindex, way })
}

/// Whether anything is asked of packets to the pod behind a device, be it on trial.
#[inline(always)]
pub fn is_checked(ifindex: u32) -> bool {
    // SAFETY: as for identities.
    unsafe { PODS.get(ifindex) }.is_some_and(|pod| pod.flags != 0)
}

#[inline(always)]
fn room() -> Option<&'static mut Packet> {
    let packet = PACKET.get_ptr_mut(0)?;
    // SAFETY: the element belongs to this CPU and to one program at a time; zeros are a valid packet.
    Some(unsafe { &mut *packet })
}

/// Packets that a pod sends.
#[classifier]
pub fn weft_from_pod(ctx: TcContext) -> i32 {
    let Some(edge) = edge(&ctx, TRACK_OUT) else { return NEXT };
    let Some(packet) = room() else { return DROP };
    let allowed = match parse(&Frame(&ctx), packet) {
        Parsed::Free => return NEXT,
        Parsed::Broken => {
            return verdict(edge.pod.flags & POLICY_EGRESS == 0, DropReason::PolicyEgress, None);
        }
        Parsed::Fragment => check_fragment(&Kernel, &edge, packet),
        Parsed::Packet => {
            let peer = destination(&ctx, &edge, packet);
            check(&Kernel, &edge, packet, &peer)
        }
    };
    verdict(allowed, DropReason::PolicyEgress, Some(packet))
}

/// Packets that go to a pod.
#[classifier]
pub fn weft_to_pod(ctx: TcContext) -> i32 {
    match edge(&ctx, TRACK_IN) {
        Some(edge) => into_pod(&ctx, &edge, is_own(&ctx)),
        None => NEXT,
    }
}

/// Asks a pod's policies about a packet that is about to be handed to it past its device, whose program never sees it.
/// Not inlined: the stack of the program that asks has no room for more keys.
#[inline(never)]
pub fn admits(ctx: &TcContext, ifindex: u32) -> bool {
    match edge_at(ifindex, TRACK_IN) {
        Some(edge) => into_pod(ctx, &edge, false) == NEXT,
        None => true,
    }
}

#[inline(always)]
fn into_pod(ctx: &TcContext, edge: &Edge, is_own: bool) -> i32 {
    let Some(packet) = room() else { return DROP };
    let allowed = match parse(&Frame(ctx), packet) {
        Parsed::Free => return NEXT,
        Parsed::Broken => {
            return verdict(edge.pod.flags & POLICY_INGRESS == 0, DropReason::PolicyIngress, None);
        }
        Parsed::Fragment => is_own || check_fragment(&Kernel, edge, packet),
        Parsed::Packet => {
            let peer = if is_own { Peer::Exempt } else { source(packet) };
            check(&Kernel, edge, packet, &peer)
        }
    };
    verdict(allowed, DropReason::PolicyIngress, Some(packet))
}

#[inline(always)]
fn verdict(allowed: bool, reason: DropReason, packet: Option<&Packet>) -> i32 {
    if allowed {
        return NEXT;
    }
    count(reason);
    if let Some(packet) = packet {
        events::kept_out(packet, reason);
    }
    DROP
}

/// Whether the node made the packet itself: it came in by no device.
#[inline(always)]
pub fn is_own(ctx: &TcContext) -> bool {
    // SAFETY: the kernel hands in a valid context.
    unsafe { (*raw(ctx)).ingress_ifindex == 0 }
}

/// Whom a packet out of a pod is for. The node is always reachable from its pods; a Service is what it is translated to, which
/// [`may_reach`] checks then.
#[inline(always)]
fn destination(ctx: &TcContext, edge: &Edge, packet: &Packet) -> Peer {
    if edge.pod.flags & (POLICY_EGRESS | POLICY_DRY_EGRESS) == 0 {
        return Peer::Exempt;
    }
    let to = Destination {
        address: packet.destination,
        port: packet.destination_port,
        protocol: packet.protocol,
        scope: SCOPE_INTERNAL,
        loopback_is_node: false,
    };
    match find(&Kernel, &to) {
        Found::Nothing if Kernel.is_node_address(&packet.destination) => Peer::Exempt,
        Found::Nothing => Peer::At(packet.destination),
        Found::UnknownPort | Found::Service(_) => {
            // SAFETY: the context is valid, and a program of this type may write the mark.
            unsafe { (*raw(ctx)).mark = POLICY_MARK | edge.ifindex };
            Peer::Exempt
        }
    }
}

/// Who sent a packet to a pod. One that the node translated has the node's address: the flow knows the client.
#[inline(always)]
fn source(packet: &Packet) -> Peer {
    if !Kernel.is_node_address(&packet.source) {
        return Peer::At(packet.source);
    }
    let answer = FlowKey {
        source: packet.destination,
        destination: packet.source,
        source_port: packet.destination_port,
        destination_port: packet.source_port,
        protocol: packet.protocol,
        pad: [0; 3],
    };
    // SAFETY: copied at once.
    match unsafe { FLOWS.get(answer).copied() } {
        // A pod that reaches itself through a Service.
        Some(flow) if flow.destination == packet.destination => Peer::Exempt,
        Some(flow) => Peer::At(flow.destination),
        None => Peer::At(packet.source),
    }
}

/// Takes the marks of a pod's edge off a packet: that of an isolated pod's packet to a Service, and [`SEEN_MARK`].
#[inline(always)]
pub fn take_mark(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid, and a program of this type may write the mark.
    unsafe {
        let mark = (*raw(ctx)).mark;
        if mark & (POLICY_MARK | SEEN_MARK) != 0 {
            (*raw(ctx)).mark = 0;
        }
        mark
    }
}

/// Whether the pod that a packet to a Service is from ([`take_mark`]) may reach the backend chosen for it. Not inlined: the stack
/// of the program that asks has no room for more keys.
#[inline(never)]
pub fn may_reach(mark: u32, flow: &FlowValue, protocol: u8) -> bool {
    if mark & POLICY_MARK == 0 || flow.flags & FLOW_REPLY != 0 {
        return true;
    }
    // SAFETY: as for identities.
    let Some(pod) = (unsafe { PODS.get(mark & !(POLICY_MARK | SEEN_MARK)).copied() }) else { return true };
    if Kernel.is_node_address(&flow.destination) {
        return true;
    }
    let covered = |set| rule(&Kernel, set, &flow.destination, protocol, flow.destination_port);
    if pod.flags & POLICY_EGRESS != 0 && !covered(pod.egress) {
        return false;
    }
    if pod.flags & POLICY_DRY_EGRESS != 0 && !covered(pod.dry_egress) {
        Kernel.would_drop(pod.dry_egress);
    }
    true
}
