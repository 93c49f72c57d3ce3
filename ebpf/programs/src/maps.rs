//! The maps, and the tables of the logic crate made from them. Names and types are those of `weft-ebpf-abi`.

use core::ops::{Deref, DerefMut};
use core::ptr::copy_nonoverlapping;

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_jiffies64, bpf_ktime_get_coarse_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::flow::Route;
use weft_ebpf_logic::packet::Packet;
use weft_ebpf_logic::tunnel::Tunnels;

/// BPF_F_NO_PREALLOC: memory follows what is in use, not the bound.
pub const NO_PREALLOC: u32 = 1;

#[map(name = "weft_svc_2")]
static SERVICES: HashMap<ServiceKey, ServiceValue> = HashMap::pinned(sizes::SERVICES, NO_PREALLOC);
#[map(name = "weft_slot_2")]
static SLOTS: HashMap<SlotKey, BackendKey> = HashMap::pinned(sizes::SLOTS, NO_PREALLOC);
#[map(name = "weft_back_2")]
static BACKENDS: HashMap<BackendKey, BackendValue> = HashMap::pinned(sizes::BACKENDS, NO_PREALLOC);
#[map(name = "weft_addr_2")]
static NODE_ADDRESSES: HashMap<Address, u32> = HashMap::pinned(sizes::NODE_ADDRESSES, NO_PREALLOC);
#[map(name = "weft_conf_2")]
static CONFIG: Array<NodeConfig> = Array::pinned(1, 0);
#[map(name = "weft_sock_2")]
pub static SOCKETS: LruHashMap<SocketKey, SocketValue> = LruHashMap::pinned(sizes::SOCKETS, 0);
#[map(name = "weft_flow_2")]
pub static FLOWS: LruHashMap<FlowKey, FlowValue> = LruHashMap::pinned(sizes::FLOWS, 0);
#[map(name = "weft_aff_2")]
static AFFINITY: LruHashMap<AffinityKey, AffinityValue> = LruHashMap::pinned(sizes::AFFINITY, 0);
#[map(name = "weft_drop_2")]
static DROPS: PerCpuArray<u64> = PerCpuArray::pinned(DropReason::COUNT, 0);
#[map(name = "weft_src_2")]
static SOURCES: LpmTrie<SourceData, u32> = LpmTrie::pinned(sizes::SOURCES, NO_PREALLOC);
#[map(name = "weft_frag_2")]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentValue> = LruHashMap::pinned(sizes::FRAGMENTS, 0);
#[map(name = "weft_local_2")]
pub static LOCAL_PODS: HashMap<Address, LocalPod> = HashMap::pinned(sizes::LOCAL_PODS, NO_PREALLOC);
#[map(name = "weft_pods_2")]
static POD_RANGES: Array<PodRange> = Array::pinned(2, 0);
#[map(name = "weft_near_2")]
static NEAR: LpmTrie<Address, u32> = LpmTrie::pinned(sizes::NEAR, NO_PREALLOC);
#[map(name = "weft_tun_2")]
static TUNNELS: Array<Tunnel> = Array::pinned(sizes::TUNNELS, 0);
/// Not pinned: nothing in it outlives a packet.
#[map]
static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// What a packet program works on. It lies in a map because the stack of 512 bytes has to hold keys and the kernel's parameters.
#[derive(Clone, Copy)]
pub struct Work {
    /// The packet as parsed.
    pub packet: Packet,
    /// What it becomes.
    pub entry: Entry,
    /// The way of a flow that begins.
    pub route: Route,
    /// The flags of the Service of a flow that begins.
    pub service_flags: u32,
    /// The list of the Service that it asks for, if it is of no known flow; else 0.
    pub list: u32,
    /// The device that it came in by; the bridge for what a pod's edge sees, and the overlay for what another node's pods send past
    /// the tunnel.
    pub came_by: u32,
    /// Whether it is looked at where its pod sends it.
    pub at_pod: bool,
    /// Whether its destination is a pod of this node, and the marks that it had. (In registers each would double the states that the
    /// verifier goes through.)
    pub near: bool,
    /// What the function for most packets said of it.
    pub carried: i32,
    /// Whether the way to a pod of another node was asked for.
    pub asked: bool,
    /// See above.
    pub mark: u32,
    /// What an ICMP error quotes.
    pub quoted: Packet,
    /// Its source and destination as it came.
    pub ends: [Address; 2],
    /// The pod that it is for, if that is to be handed to it directly.
    pub pod: LocalPod,
    /// By which node it came, if a client outside had sent it there.
    pub node: [u8; 3],
    /// Whether it tells what that client asked for.
    pub tells: bool,
    /// The backend of its flow, which a lookup wants in one piece.
    pub backend: BackendKey,
    /// The time, which outlives a packet.
    pub clock: Clock,
}

/// The entry of a flow, at a multiple of eight bytes, as the kernel has the elements of its maps: it is copied by eight bytes at a time.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Entry(FlowValue);

impl Entry {
    /// Copies an element of the table of flows.
    #[inline(always)]
    pub fn copy(&mut self, element: *const FlowValue) {
        const EIGHTS: usize = size_of::<FlowValue>() / 8;
        const _: () = assert!(size_of::<FlowValue>() == EIGHTS * 8 + 4);
        let (from, to) = (element.cast::<u64>(), (&raw mut self.0).cast::<u64>());
        // SAFETY: both have that size and begin at a multiple of eight bytes. They are not one, which an assignment would have to reckon with.
        unsafe {
            copy_nonoverlapping(from, to, EIGHTS);
            copy_nonoverlapping(from.add(EIGHTS).cast::<u32>(), to.add(EIGHTS).cast::<u32>(), 1);
        }
    }
}

impl Deref for Entry {
    type Target = FlowValue;

    #[inline(always)]
    fn deref(&self) -> &FlowValue {
        &self.0
    }
}

impl DerefMut for Entry {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut FlowValue {
        &mut self.0
    }
}

/// The seconds of the monotonic clock, and the tick at which it was asked for them: it goes on at a tick only, and asking it costs about as
/// much as a lookup.
#[derive(Clone, Copy)]
pub struct Clock {
    tick: u64,
    seconds: u32,
}

impl Clock {
    /// As [`Tables::now_seconds`].
    #[inline(always)]
    pub fn now_seconds(&mut self) -> u32 {
        // SAFETY: a helper without arguments, which the kernel makes a load of.
        let tick = unsafe { bpf_jiffies64() };
        if self.tick != tick {
            *self = Self { tick, seconds: Kernel.now_seconds() };
        }
        self.seconds
    }
}

impl Work {
    /// Looks for a pod of this node, by the source or destination that the packet came with.
    #[inline(always)]
    pub fn find_end(&mut self, which: usize) -> bool {
        find_pod(&self.ends[which], &mut self.pod)
    }

    /// Looks for the pod of this node that the packet goes to as what it becomes.
    #[inline(always)]
    pub fn find_target(&mut self) -> bool {
        find_pod(&self.entry.destination, &mut self.pod)
    }
}

#[inline(always)]
fn find_pod(address: &Address, pod: &mut LocalPod) -> bool {
    let Some(found) = LOCAL_PODS.get_ptr(address) else { return false };
    // SAFETY: without preallocation an element is freed by RCU only, after the program has ended. It is not what it is copied to, which
    // an assignment would have to reckon with.
    unsafe { copy_nonoverlapping(found, pod, 1) };
    true
}

/// This CPU's. A packet program is not interrupted by another one: both run with softirqs off.
#[inline(always)]
pub fn work() -> Option<&'static mut Work> {
    // SAFETY: zeros are a valid value, and no other reference is alive on this CPU.
    WORK.get_ptr_mut(0).map(|work| unsafe { &mut *work })
}

/// The node's configuration; `None` until the agent has written it.
#[inline(always)]
pub fn config() -> Option<&'static NodeConfig> {
    CONFIG.get(0).filter(|config| config.layout == LAYOUT)
}

/// Whether an address may be a pod's.
#[inline(always)]
pub fn is_pods(address: &Address, is_v6: bool) -> bool {
    POD_RANGES.get(u32::from(is_v6)).is_some_and(|range| range.contains(address))
}

/// The device of the link by which a pod of another node is reached past the tunnel; 0 for any other address.
#[inline(always)]
pub fn near(config: &NodeConfig, address: &Address) -> u32 {
    if config.flags & NODE_NEAR == 0 {
        return 0;
    }
    NEAR.get(Key::new(128, *address)).copied().unwrap_or(0)
}

/// Counts a drop.
#[inline(always)]
pub fn count(reason: DropReason) {
    if let Some(counter) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: the element belongs to this CPU, and these programs are not preempted by themselves on it.
        unsafe { *counter += 1 };
    }
}

/// The kernel's tables.
pub struct Kernel;

impl Tunnels for Kernel {
    #[inline(always)]
    fn tunnel(&self, place: u32) -> Option<&Tunnel> {
        TUNNELS.get(place)
    }
}

impl Tables for Kernel {
    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<ServiceValue> {
        // SAFETY: without preallocation an element is freed by RCU only; it is copied before the program ends.
        unsafe { SERVICES.get(key).copied() }
    }
    #[inline(always)]
    fn slot(&self, key: &SlotKey) -> Option<BackendKey> {
        // SAFETY: as for services.
        unsafe { SLOTS.get(key).copied() }
    }
    #[inline(always)]
    fn backend(&self, key: &BackendKey) -> Option<BackendValue> {
        // SAFETY: as for services.
        unsafe { BACKENDS.get(key).copied() }
    }
    #[inline(always)]
    fn is_node_address(&self, address: &Address) -> bool {
        NODE_ADDRESSES.get_ptr(address).is_some()
    }
    #[inline(always)]
    fn source_allowed(&self, list: u32, client: &Address) -> bool {
        let data = SourceData { list: list.to_be_bytes(), address: *client };
        SOURCES.get(Key::new(32 + 128, data)).is_some()
    }
    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        // SAFETY: an element reused meanwhile gives another client's backend of some list. `select` checks that it
        // takes new flows; the window is the copy of 24 bytes.
        unsafe { AFFINITY.get(key).copied() }
    }
    #[inline(always)]
    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        let _ = AFFINITY.insert(key, value, 0);
    }
    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_get_prandom_u32() }
    }
    #[inline(always)]
    fn now_seconds(&self) -> u32 {
        // SAFETY: a helper without arguments.
        (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
    }
}
