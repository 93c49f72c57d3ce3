//! The maps, and the tables of the logic crate made from them. Names and types are those of `weft-ebpf-abi`.

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::flow::Route;
use weft_ebpf_logic::packet::Packet;

/// BPF_F_NO_PREALLOC: memory follows the number of Services, not the bound.
const NO_PREALLOC: u32 = 1;

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
/// Not pinned: nothing in it outlives a packet.
#[map]
static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// What a packet program works on. It lies in a map because the stack of 512 bytes has to hold keys and the kernel's parameters.
#[derive(Clone, Copy)]
pub struct Work {
    /// The packet as parsed.
    pub packet: Packet,
    /// What it becomes.
    pub entry: FlowValue,
    /// The way of a flow that begins.
    pub route: Route,
    /// The flags of the Service of a flow that begins.
    pub service_flags: u32,
    /// The device that it came in by; the bridge for what a pod's edge sees, and the overlay for what another node's pods send past
    /// the tunnel.
    pub came_by: u32,
    /// Whether it is looked at where its pod sends it.
    pub at_pod: bool,
    /// Whether its destination is a pod of this node, and the marks that it had. (In registers each would double the states that the
    /// verifier goes through.)
    pub near: bool,
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
}

impl Work {
    /// Looks for a pod of this node, by the source or destination that the packet came with.
    #[inline(always)]
    pub fn find_end(&mut self, which: usize) -> bool {
        let end = self.ends[which];
        self.find_pod(end)
    }

    /// Looks for a pod of this node.
    #[inline(always)]
    pub fn find_pod(&mut self, address: Address) -> bool {
        // SAFETY: without preallocation an element is freed by RCU only; it is copied before the program ends.
        match unsafe { LOCAL_PODS.get(address) } {
            Some(pod) => {
                self.pod = *pod;
                true
            }
            None => false,
        }
    }
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
