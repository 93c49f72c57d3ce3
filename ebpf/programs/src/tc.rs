//! Node edge: packets to Services that no socket hook saw, and the answers to them.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_FIB_LOOKUP_SKIP_NEIGH, BPF_FIB_LOOKUP_SRC,
    BPF_NOEXIST, TC_ACT_OK, TC_ACT_SHOT, bpf_fib_lookup as FibLookup,
};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_redirect_neigh};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::flow::{self, NAT_PORT_TRIES, Route};
use weft_ebpf_logic::packet::{self, ETHERNET_BYTES, ETHERTYPE_IPV4, FIN, IPV4_BYTES, Ipv4, RST, SYN};
use weft_ebpf_logic::service::{Client, Destination, Found, find, flow_is_current, select};

use crate::events;
use crate::maps::{FLOWS, Kernel, config, count};
use crate::reject::reject;

const PASS: i32 = TC_ACT_OK as i32;
const DROP: i32 = TC_ACT_SHOT as i32;
const AF_INET: u8 = 2;

/// A packet as parsed.
pub struct Packet {
    /// Its IPv4 header.
    pub ip: Ipv4,
    /// Its flow.
    pub key: FlowKey,
    /// TCP's flags; 0 for UDP.
    pub flags: u8,
}

impl Packet {
    /// Where TCP or UDP begins.
    #[inline(always)]
    pub fn transport(&self) -> usize {
        ETHERNET_BYTES + self.ip.header_bytes as usize
    }
}

#[inline(always)]
fn parse(ctx: &TcContext) -> Option<Packet> {
    let ethertype: [u8; 2] = ctx.load(12).ok()?;
    if ethertype != ETHERTYPE_IPV4 {
        return None;
    }
    let header: [u8; IPV4_BYTES] = ctx.load(ETHERNET_BYTES).ok()?;
    let ip = packet::ipv4(&header)?;
    let at = ETHERNET_BYTES + ip.header_bytes as usize;
    let ports: [u8; 4] = ctx.load(at).ok()?;
    let flags = if ip.protocol == TCP { ctx.load(at + 13).ok()? } else { 0 };
    Some(Packet { key: packet::flow_key(&ip, ports), ip, flags })
}

/// Packets that enter the node: from outside, from its pods, from the overlay.
#[classifier]
pub fn weft_ingress(ctx: TcContext) -> i32 {
    let Some(packet) = parse(&ctx) else { return PASS };
    // SAFETY: copied at once.
    if let Some(entry) = unsafe { FLOWS.get(packet.key).copied() } {
        match established(&packet, &entry) {
            Known::Goes => return send(&ctx, &packet, &entry),
            Known::Gone => {
                forget(&packet.key, &entry);
                return reject(&ctx, &packet, DropReason::BackendGone);
            }
            Known::Anew => forget(&packet.key, &entry),
        }
    }
    begin(&ctx, &packet)
}

/// Packets that the node's own processes send: answers of a backend that is the node itself.
#[classifier]
pub fn weft_egress(ctx: TcContext) -> i32 {
    let Some(packet) = parse(&ctx) else { return PASS };
    // SAFETY: copied at once.
    match unsafe { FLOWS.get(packet.key).copied() } {
        Some(entry) if entry.flags & FLOW_REPLY != 0 => {
            touch(&packet, &entry);
            if rewrite(&ctx, &packet, &entry).is_none() {
                count(DropReason::RewriteFailed);
                return DROP;
            }
            PASS
        }
        _ => PASS,
    }
}

enum Known {
    Goes,
    Gone,
    Anew,
}

#[inline(always)]
fn established(packet: &Packet, entry: &FlowValue) -> Known {
    let protocol = packet.key.protocol;
    if entry.flags & FLOW_REPLY == 0 {
        let fresh_syn = packet.flags & SYN != 0 && entry.flags & FLOW_CLOSING != 0;
        if fresh_syn || flow::is_idle(entry, protocol, Kernel.now_seconds()) {
            return Known::Anew;
        }
        if !flow_is_current(&Kernel, &flow::backend(entry, protocol), entry.generation) {
            return if protocol == TCP && packet.flags & SYN == 0 { Known::Gone } else { Known::Anew };
        }
    }
    touch(packet, entry);
    Known::Goes
}

/// Notes that a flow lives, at most once a second, and that it is closing, in both directions.
#[inline(always)]
fn touch(packet: &Packet, entry: &FlowValue) {
    let now = Kernel.now_seconds();
    let closing = packet.key.protocol == TCP && packet.flags & (FIN | RST) != 0;
    if let Some(live) = FLOWS.get_ptr_mut(packet.key)
        && entry.last_seen != now
    {
        // SAFETY: an aligned word of an element; a lost race writes the same second.
        unsafe { (*live).last_seen = now };
    }
    if closing {
        let forward = if entry.flags & FLOW_REPLY != 0 {
            flow::forward_key(entry, packet.key.protocol)
        } else {
            packet.key
        };
        if let Some(live) = FLOWS.get_ptr_mut(forward) {
            // SAFETY: an aligned word of an element; no other flag is set later than at its creation.
            unsafe { (*live).flags |= FLOW_CLOSING };
        }
    }
}

/// Removes both directions of a flow.
#[inline(always)]
fn forget(key: &FlowKey, forward: &FlowValue) {
    let _ = FLOWS.remove(flow::reply_key(forward, key.protocol));
    let _ = FLOWS.remove(key);
}

/// A packet of no known flow: one to a Service begins one.
#[inline(always)]
fn begin(ctx: &TcContext, packet: &Packet) -> i32 {
    let Some(config) = config() else { return PASS };
    let ifindex = ingress_ifindex(ctx);
    let internal = ifindex == config.bridge_ifindex || ifindex == config.overlay_ifindex;
    let key = &packet.key;
    let to = Destination {
        address: key.destination,
        port: key.destination_port,
        protocol: key.protocol,
        scope: if internal { SCOPE_INTERNAL } else { SCOPE_EXTERNAL },
        loopback_is_node: false,
    };
    let service = match find(&Kernel, &to) {
        Found::Nothing => return PASS,
        Found::UnknownPort => return reject(ctx, packet, DropReason::PacketUnknownPort),
        Found::Service(service) => service,
    };
    if key.protocol == TCP && packet.flags & SYN == 0 {
        return reject(ctx, packet, DropReason::UnknownFlow);
    }
    let client = Client { client: key.source, datagram_socket: None };
    let Some(backend) = select(&Kernel, &service, &client) else {
        return reject(ctx, packet, DropReason::PacketNoEndpoints);
    };
    let Some(known) = Kernel.backend(&backend) else {
        return reject(ctx, packet, DropReason::PacketNoEndpoints);
    };
    let Some(route) = route(ctx, packet, &backend, service.flags) else {
        count(DropReason::NoRoute);
        events::dropped(key, DropReason::NoRoute);
        return DROP;
    };
    match record(key, &backend, &route, ifindex, known.generation) {
        Ok(entry) => {
            events::packet(key, &backend);
            send(ctx, packet, &entry)
        }
        Err(reason) => {
            count(reason);
            events::dropped(key, reason);
            DROP
        }
    }
}

#[inline(always)]
fn ingress_ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel hands in a valid context.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// Asks the kernel's routes for the way to a backend and the source address it would use.
#[inline(always)]
fn route(ctx: &TcContext, packet: &Packet, backend: &BackendKey, flags: u32) -> Option<Route> {
    if Kernel.is_node_address(&backend.address) {
        return Some(Route { source: None, ifindex: 0 });
    }
    // SAFETY: all zeros are a valid value.
    let mut fib: FibLookup = unsafe { core::mem::zeroed() };
    fib.family = AF_INET;
    fib.l4_protocol = packet.key.protocol;
    fib.ifindex = ingress_ifindex(ctx);
    fib.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(backend.address.low());
    // SAFETY: context and parameters are valid for the length given.
    let result = unsafe {
        bpf_fib_lookup(
            ctx.skb.skb.cast(),
            &raw mut fib,
            size_of::<FibLookup>() as i32,
            BPF_FIB_LOOKUP_SKIP_NEIGH | BPF_FIB_LOOKUP_SRC,
        )
    };
    if result != 0 {
        return None;
    }
    if flags & SERVICE_KEEP_SOURCE != 0 {
        return Some(Route { source: None, ifindex: fib.ifindex });
    }
    // SAFETY: the lookup filled in the IPv4 source.
    let source = Address::v4(unsafe { fib.__bindgen_anon_3.ipv4_src }.to_ne_bytes());
    Some(Route { source: Some(source), ifindex: fib.ifindex })
}

/// Enters both directions of a new flow, the answers first: no packet may leave whose answer would not be known.
#[inline(always)]
fn record(
    key: &FlowKey,
    backend: &BackendKey,
    route: &Route,
    ifindex: u32,
    generation: u32,
) -> Result<FlowValue, DropReason> {
    let now = Kernel.now_seconds();
    let mut reply = flow::reply(key, ifindex, generation);
    reply.last_seen = now;
    let random = Kernel.random();
    for n in 0..NAT_PORT_TRIES {
        let source = match route.source {
            Some(address) => (address, flow::nat_port(random, n)),
            None => (key.source, key.source_port),
        };
        let mut forward = flow::forward(backend, source, route.ifindex, generation);
        forward.last_seen = now;
        let mode = if route.source.is_some() { BPF_NOEXIST as u64 } else { 0 };
        if FLOWS.insert(flow::reply_key(&forward, key.protocol), reply, mode).is_ok() {
            return match FLOWS.insert(key, forward, 0) {
                Ok(()) => Ok(forward),
                Err(_) => Err(DropReason::FlowTableFull),
            };
        }
    }
    Err(DropReason::NatPortsExhausted)
}

/// Rewrites a packet and sends it on its way. Routing it in the stack instead would drop it: its
/// source is now an address of this node ("martian source").
#[inline(always)]
fn send(ctx: &TcContext, packet: &Packet, entry: &FlowValue) -> i32 {
    if rewrite(ctx, packet, entry).is_none() {
        count(DropReason::RewriteFailed);
        return DROP;
    }
    if entry.ifindex == 0 {
        return PASS;
    }
    // SAFETY: no parameters are given; the kernel looks the neighbour up by the packet's destination.
    unsafe { bpf_redirect_neigh(entry.ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

#[inline(always)]
fn rewrite(ctx: &TcContext, packet: &Packet, entry: &FlowValue) -> Option<()> {
    let key = &packet.key;
    let transport = packet.transport();
    let udp = key.protocol == UDP;
    let checksum = transport + if udp { 6 } else { 16 };
    // A UDP checksum of 0 means "none", and stays none.
    let mangled = if udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
    let pairs = [(key.source.low(), entry.source.low()), (key.destination.low(), entry.destination.low())];
    for (old, new) in pairs {
        if old != new {
            let (from, to) = (u64::from(u32::from_ne_bytes(old)), u64::from(u32::from_ne_bytes(new)));
            ctx.l4_csum_replace(checksum, from, to, u64::from(BPF_F_PSEUDO_HDR) | mangled | 4).ok()?;
            ctx.l3_csum_replace(ETHERNET_BYTES + 10, from, to, 4).ok()?;
        }
    }
    let old =
        [key.source_port.0[0], key.source_port.0[1], key.destination_port.0[0], key.destination_port.0[1]];
    let new = [
        entry.source_port.0[0],
        entry.source_port.0[1],
        entry.destination_port.0[0],
        entry.destination_port.0[1],
    ];
    if old != new {
        let (from, to) = (u64::from(u32::from_ne_bytes(old)), u64::from(u32::from_ne_bytes(new)));
        ctx.l4_csum_replace(checksum, from, to, mangled | 4).ok()?;
        ctx.store(transport, &new, 0).ok()?;
    }
    let (s, d) = (entry.source.low(), entry.destination.low());
    ctx.store(ETHERNET_BYTES + 12, &[s[0], s[1], s[2], s[3], d[0], d[1], d[2], d[3]], 0).ok()
}

/// The raw context, for helpers that aya does not wrap.
#[inline(always)]
pub fn raw(ctx: &TcContext) -> *mut __sk_buff {
    ctx.skb.skb
}
