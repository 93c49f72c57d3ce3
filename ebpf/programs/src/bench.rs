//! Programs of the benchmarks: a sender, the floors that weft is measured against, and a sink. An object of its own.
#![no_std]
#![no_main]

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_redirect};
use aya_ebpf::macros::{classifier, map, xdp};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::programs::{TcContext, XdpContext};
use weft_ebpf_abi::policy::PolicyPod;
use weft_ebpf_abi::*;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Words of a frame of 60 bytes, which with the checksum of Ethernet has 64.
const WORDS: usize = 15;
/// Flows: as many source ports, from the template's on.
const FLOWS_SENT: u32 = 1_024;

/// The frame of the first flow.
#[map]
static TEMPLATE: Array<[u32; WORDS]> = Array::with_max_entries(1, 0);
/// The device that the floor redirects to; then what the sink expects: destination address, and port.
#[map]
static SETTINGS: Array<u32> = Array::with_max_entries(3, 0);
/// What the sink has counted: packets that are as expected, and others.
#[map]
static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(2, 0);

/// Makes the packet of one flow, at random, and sends it out of the device that it is run on. The payload's first two bytes make
/// up for the port, so the checksum is the same for all.
#[xdp]
pub fn bench_send(ctx: XdpContext) -> u32 {
    let (data, end) = (ctx.data(), ctx.data_end());
    let Some(template) = TEMPLATE.get(0) else { return XDP_ABORTED };
    if data + WORDS * 4 > end {
        return XDP_ABORTED;
    }
    // SAFETY: a helper without arguments.
    let flow = unsafe { bpf_get_prandom_u32() } & (FLOWS_SENT - 1);
    // SAFETY: so many bytes are there, and a frame of a test run begins at a multiple of eight.
    unsafe {
        let words = data as *mut u32;
        let mut i = 0;
        while i < WORDS {
            *words.add(i) = template[i];
            i += 1;
        }
        let halves = data as *mut u16;
        let port = u16::from_be(*halves.add(17)) + flow as u16;
        *halves.add(17) = port.to_be();
        let rest = u16::from_be(*halves.add(21)) - flow as u16;
        *halves.add(21) = rest.to_be();
    }
    XDP_TX
}

/// The floor of what an uplink can do: the frame goes to a device as it is.
#[xdp]
pub fn bench_redirect(_: XdpContext) -> u32 {
    match SETTINGS.get(0) {
        // SAFETY: a helper with numbers.
        Some(ifindex) => unsafe { bpf_redirect(*ifindex, 0) as u32 },
        None => XDP_ABORTED,
    }
}

/// What the sender costs alone.
#[xdp]
pub fn bench_drop(_: XdpContext) -> u32 {
    match COUNTS.get_ptr_mut(0) {
        Some(count) => {
            // SAFETY: the element belongs to this CPU.
            unsafe { *count += 1 };
            XDP_DROP
        }
        None => XDP_ABORTED,
    }
}

/// Counts the datagrams of IPv4 that reach a pod, and ends them there.
#[classifier]
pub fn bench_sink(ctx: TcContext) -> i32 {
    if ctx.load::<[u8; 2]>(12) != Ok([8, 0]) || ctx.load::<u8>(14 + 9) != Ok(UDP) {
        return TC_ACT_OK as i32;
    }
    let address: u32 = ctx.load(14 + 16).unwrap_or(0);
    let port: u16 = ctx.load(14 + 20 + 2).unwrap_or(0);
    let expected = SETTINGS.get(1).copied() == Some(address)
        && SETTINGS.get(2).copied() == Some(u32::from(u16::from_be(port)));
    if let Some(count) = COUNTS.get_ptr_mut(u32::from(!expected)) {
        // SAFETY: the element belongs to this CPU.
        unsafe { *count += 1 };
    }
    TC_ACT_SHOT as i32
}

/// BPF_F_NO_PREALLOC.
const NO_PREALLOC: u32 = 1;

#[map(name = "weft_flow_2")]
static FLOWS: LruHashMap<FlowKey, FlowValue> = LruHashMap::pinned(sizes::FLOWS, 0);
#[map(name = "weft_back_2")]
static BACKENDS: HashMap<BackendKey, BackendValue> = HashMap::pinned(sizes::BACKENDS, NO_PREALLOC);
#[map(name = "weft_conf_2")]
static CONFIG: Array<NodeConfig> = Array::pinned(1, 0);
#[map(name = "weft_local_2")]
static LOCAL_PODS: HashMap<Address, LocalPod> = HashMap::pinned(sizes::LOCAL_PODS, NO_PREALLOC);
#[map(name = "weft_xpod_2")]
static XDP_PODS: HashMap<Address, XdpPod> = HashMap::pinned(sizes::XDP_PODS, NO_PREALLOC);
#[map(name = "weft_ppod_2")]
static POLICY_PODS: HashMap<u32, PolicyPod> = HashMap::pinned(sizes::POLICY_PODS, NO_PREALLOC);

/// The keys of one flow's packet, in the order in which the programs ask for them.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Keys {
    flow: FlowKey,
    backend: BackendKey,
    pod: Address,
    ifindex: u32,
}

#[map]
static KEYS: Array<Keys> = Array::with_max_entries(1, 0);

/// The map operations of the tc program for a packet of a known flow, and nothing else.
#[classifier]
pub fn bench_maps_tc(_: TcContext) -> i32 {
    // In the place of the map that it works in.
    let Some(keys) = KEYS.get_ptr(0) else { return TC_ACT_SHOT as i32 };
    // SAFETY: nothing writes to it while programs run.
    let keys = unsafe { &*keys };
    let found = (FLOWS.get_ptr(keys.flow), CONFIG.get_ptr(0), BACKENDS.get_ptr(keys.backend));
    let (Some(_), Some(_), Some(_)) = found else { return TC_ACT_SHOT as i32 };
    // A pod without programs at its edge has no entry.
    if LOCAL_PODS.get_ptr(keys.pod).is_some() {
        return TC_ACT_SHOT as i32;
    }
    TC_ACT_OK as i32
}

/// The map operations of the XDP program for a packet that it carries, and nothing else.
#[xdp]
pub fn bench_maps_xdp(_: XdpContext) -> u32 {
    let Some(keys) = KEYS.get_ptr(0) else { return XDP_ABORTED };
    // SAFETY: as above.
    let keys = unsafe { &*keys };
    let (Some(_), Some(_)) = (FLOWS.get_ptr(keys.flow), CONFIG.get_ptr(0)) else { return XDP_ABORTED };
    let Some(_) = XDP_PODS.get_ptr(keys.pod) else { return XDP_ABORTED };
    // A pod without policies has no entry.
    if POLICY_PODS.get_ptr(keys.ifindex).is_some() {
        return XDP_ABORTED;
    }
    match BACKENDS.get_ptr(keys.backend) {
        Some(_) => XDP_PASS,
        None => XDP_ABORTED,
    }
}
