//! Node edge: packets to Services that no socket hook saw, and the answers to them.

use core::ptr::copy_nonoverlapping;

use aya_ebpf::bindings::bpf_check_mtu_flags::BPF_MTU_CHK_SEGS;
use aya_ebpf::bindings::{
    __sk_buff, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SKIP_NEIGH,
    BPF_FIB_LOOKUP_SRC, BPF_NOEXIST, TC_ACT_OK, TC_ACT_SHOT, bpf_fib_lookup as FibLookup,
};
use aya_ebpf::helpers::{bpf_check_mtu, bpf_fib_lookup, bpf_redirect_neigh};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::connecting::{self, Connecting};
use weft_ebpf_logic::flow::{self, NAT_PORT_TRIES, NEVER, PodDevices, Route};
use weft_ebpf_logic::packet::{self, ACK, FIN, Family as _, Packet, Part, RST, SYN, V4, V6};
use weft_ebpf_logic::service::{
    Client, Destination, Found, allows, find, flow_is_current, select, takes_new_flows,
};

use crate::direct;
use crate::events;
use crate::failure;
use crate::family::{Family, Frame};
use crate::maps::{FLOWS, FRAGMENTS, Kernel, LOCAL_PODS, Work, config, count, near, work};
use crate::pod;
use crate::policy;
use crate::reject::{Sender, reject, too_big};
use crate::rewrite::{rewrite, rewrite_error};

const PASS: i32 = TC_ACT_OK as i32;
const DROP: i32 = TC_ACT_SHOT as i32;
/// No verdict yet: the packet is nobody's.
pub const NOBODYS: i32 = -2;
/// No verdict yet: the packet is to be handed to [`Work::pod`].
pub const TO_POD: i32 = -3;
/// No verdict yet: the packet was translated, and is the stack's.
pub const TO_STACK: i32 = -4;
/// What [`carry`] leaves: a packet of another shape, which is not read yet.
const UNREAD: i32 = -5;
/// Likewise: one that is read, of no known flow.
pub const UNKNOWN: i32 = -6;
/// Likewise: one that is read, on which something is to be decided.
pub const UNDECIDED: i32 = -7;
/// By which device the node's own packets come.
const NO_DEVICE: u32 = 0;
const LEAST_MTU_BYTES: u32 = 1_280;

/// Packets that enter the node: from outside, from its pods, from the overlay.
#[classifier]
pub fn weft_ingress(ctx: TcContext) -> i32 {
    let mark = policy::take_mark(&ctx);
    if mark & SEEN_MARK != 0 {
        return PASS;
    }
    let Some(work) = work() else { return PASS };
    (work.came_by, work.at_pod, work.mark) = (ingress_ifindex(&ctx), false, mark);
    let done = match ethertype(&ctx) {
        V4::ETHERTYPE => ingress::<V4>(&ctx, work),
        V6::ETHERTYPE => ingress::<V6>(&ctx, work),
        _ => PASS,
    };
    match done {
        TO_POD => pod::hand_over(&ctx, &work.pod),
        NOBODYS | TO_STACK => PASS,
        verdict => verdict,
    }
}

#[inline(always)]
fn ingress<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    if pod::arrives::<F>(ctx, work) { TO_POD } else { serve::<F>(ctx, work) }
}

/// Packets that the node's own processes send: answers of a backend that is the node itself, and SCTP to Services.
#[classifier]
pub fn weft_egress(ctx: TcContext) -> i32 {
    match ethertype(&ctx) {
        V4::ETHERTYPE => egress::<V4>(&ctx),
        V6::ETHERTYPE => egress::<V6>(&ctx),
        _ => PASS,
    }
}

#[inline(always)]
pub fn ethertype(ctx: &TcContext) -> [u8; 2] {
    // SAFETY: the kernel hands in a valid context. The low half holds the type in network order.
    let [a, b, _, _] = unsafe { (*raw(ctx)).protocol }.to_ne_bytes();
    [a, b]
}

/// What becomes of a packet.
enum Outcome {
    /// It is nobody's.
    Pass,
    /// It becomes what the entry says.
    Goes,
    /// Likewise, once the flow is recorded and has a source.
    Begins,
    /// It is answered with a refusal.
    Refused(DropReason),
    /// It is dropped.
    Dropped(DropReason),
}

/// Translates a packet to a Service, and the answer to one. Returns a verdict, or [`NOBODYS`], [`TO_POD`], [`TO_STACK`].
#[inline(always)]
pub fn serve<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    work.carried = carry::<F>(ctx, work);
    decide::<F>(ctx, work)
}

/// What is left of that, if anything is, once [`carry`] has said so.
#[inline(always)]
pub fn decide<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    let carried = work.carried;
    if carried == UNREAD {
        if read::<F>(ctx, &mut work.packet).is_none() {
            work.packet.key.protocol = 0;
            return NOBODYS;
        }
    } else if carried != UNKNOWN && carried != UNDECIDED {
        return carried;
    }
    direct::see_node::<F>(ctx, work);
    if work.packet.key.protocol == F::ICMP {
        return error::<F>(ctx, work, true);
    }
    if !direct::prepare::<F>(ctx, work) {
        return DROP;
    }
    let outcome = match judge::<F>(ctx, work) {
        Outcome::Goes | Outcome::Begins
            if work.mark != 0 && !policy::may_reach(work.mark, &work.entry, work.packet.key.protocol) =>
        {
            Outcome::Dropped(DropReason::PolicyEgress)
        }
        outcome => outcome,
    };
    match outcome {
        Outcome::Pass => NOBODYS,
        Outcome::Goes => {
            watch(&work.packet, &work.entry);
            go::<F>(ctx, work)
        }
        Outcome::Begins => {
            direct::decide(ctx, work);
            let Work { packet, entry, route, came_by, .. } = work;
            match record(&packet.key, route, *came_by, entry) {
                Ok(()) => {
                    if work.at_pod {
                        note_translated(&work.packet.key.source);
                    }
                    events::packet(&work.packet.key, &flow::backend(&work.entry, work.packet.key.protocol));
                    go::<F>(ctx, work)
                }
                Err(reason) => told(packet, reason),
            }
        }
        Outcome::Refused(reason) => reject::<F>(ctx, &work.packet, reason, Sender::Behind),
        Outcome::Dropped(reason) => told(&work.packet, reason),
    }
}

/// Most packets: of the plainest shape, and of a flow that is known and goes on. What becomes of them is what the functions below would
/// decide; spread over those it took about a third longer.
#[inline(never)]
pub fn carry<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    if F::read(ctx, &mut work.packet).is_none() {
        return UNREAD;
    }
    let Work { packet, entry, mark, backend, clock, .. } = work;
    let Some(live) = known(&packet.key, entry) else { return UNKNOWN };
    let now = clock.now_seconds();
    if *mark != 0
        || packet.flags & (SYN | FIN | RST) != 0
        || entry.flags & FLOW_DIRECT != 0
        || !matches!(established(packet, entry, now, backend), Known::Goes)
    {
        return UNDECIDED;
    }
    by_now(entry);
    if too_big_for(ctx, packet.total_bytes, entry.ifindex).is_some() {
        return UNDECIDED;
    }
    if entry.last_seen != now {
        // SAFETY: an aligned word of an element; one reused meanwhile is of a flow that began this second.
        unsafe { (*live).last_seen = now };
    }
    match F::rewrite(ctx, packet, entry) {
        Some(()) => leave(work),
        None => dropped(DropReason::RewriteFailed),
    }
}

/// Notes that answers to a pod may have to be translated back, before the first one can come.
#[inline(always)]
fn note_translated(client: &Address) {
    if let Some(pod) = LOCAL_PODS.get_ptr_mut(client) {
        // SAFETY: aligned bytes of an element, which only ever become 1.
        unsafe { (*pod).translated = [1, 0] };
    }
}

/// Drops a packet that would have begun a flow: whoever watches is told.
#[inline(always)]
fn told(packet: &Packet, reason: DropReason) -> i32 {
    events::dropped(&packet.key, reason);
    dropped(reason)
}

/// Sends a packet on as what it becomes, if it fits.
#[inline(always)]
fn go<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    choose_link(work);
    if let Some(mtu_bytes) = too_big_for(ctx, work.packet.total_bytes, work.entry.ifindex) {
        return too_big::<F>(ctx, &work.packet, mtu_bytes, Sender::Behind);
    }
    match translate::<F>(ctx, &work.packet, &work.entry) {
        Ok(()) if work.entry.flags & FLOW_DIRECT != 0 => direct::leave::<F>(ctx, work),
        Ok(()) => leave(work),
        Err(reason) => dropped(reason),
    }
}

#[inline(always)]
fn egress<F: Family>(ctx: &TcContext) -> i32 {
    let Some(work) = work() else { return PASS };
    work.node = [0; 3];
    if F::read(ctx, &mut work.packet).is_none() && read::<F>(ctx, &mut work.packet).is_none() {
        return PASS;
    }
    if work.packet.key.protocol == F::ICMP {
        let done = error::<F>(ctx, work, false);
        return if done < 0 { PASS } else { done };
    }
    let Work { packet, entry, .. } = work;
    if known(&packet.key, entry).is_none() || entry.flags & FLOW_REPLY == 0 {
        return if packet.key.protocol == SCTP { own::<F>(ctx, work) } else { PASS };
    }
    touch(packet, entry, Kernel.now_seconds());
    watch(packet, entry);
    translate::<F>(ctx, packet, entry).map_or_else(dropped, |()| PASS)
}

/// SCTP of the node's own sockets, which no hook sees. Their packets to Services go on as clients' do that come in by no device, and so
/// their answers are the stack's.
#[inline(always)]
fn own<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    if !policy::is_own(ctx) {
        return PASS;
    }
    (work.came_by, work.at_pod, work.carried) = (NO_DEVICE, false, UNDECIDED);
    match judge::<F>(ctx, work) {
        Outcome::Pass => PASS,
        Outcome::Goes => go_out::<F>(ctx, work),
        Outcome::Begins => {
            if begin_own(work) {
                go_out::<F>(ctx, work)
            } else {
                DROP
            }
        }
        Outcome::Refused(reason) => reject::<F>(ctx, &work.packet, reason, Sender::Node),
        Outcome::Dropped(reason) => told_apart(&work.packet, reason),
    }
}

/// Enters a flow of the node's own.
#[inline(never)]
fn begin_own(work: &mut Work) -> bool {
    let Work { packet, entry, route, backend, .. } = work;
    // The stack would not take a packet from itself.
    let entered = match route.ifindex {
        0 => Err(DropReason::NoRoute),
        _ => record(&packet.key, route, NO_DEVICE, entry),
    };
    if let Err(reason) = entered {
        told(packet, reason);
        return false;
    }
    *backend = flow::backend(entry, packet.key.protocol);
    events::packet(&packet.key, backend);
    true
}

/// As [`told`], where the stack is full.
#[inline(never)]
fn told_apart(packet: &Packet, reason: DropReason) -> i32 {
    told(packet, reason)
}

/// Sends the node's own packet on as what it becomes, if it fits. It leaves by the bridge to a pod of the node: none can be handed over here.
#[inline(never)]
fn go_out<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    choose_link(work);
    if let Some(mtu_bytes) = too_big_for(ctx, work.packet.total_bytes, work.entry.ifindex) {
        return too_big::<F>(ctx, &work.packet, mtu_bytes, Sender::Node);
    }
    match translate::<F>(ctx, &work.packet, &work.entry) {
        // SAFETY: no parameters are given; the kernel looks the neighbour up by the packet's destination.
        Ok(()) => unsafe { bpf_redirect_neigh(work.entry.ifindex, core::ptr::null_mut(), 0, 0) as i32 },
        Err(reason) => dropped(reason),
    }
}

#[inline(always)]
fn dropped(reason: DropReason) -> i32 {
    count(reason);
    DROP
}

/// Parses a frame of whatever shape. A later fragment gets the ports that the first one had.
#[inline(never)]
fn read<F: Family>(ctx: &TcContext, packet: &mut Packet) -> Option<()> {
    *packet = packet::parse::<F, _>(&Frame(ctx))?;
    if packet.part == Part::Later {
        // SAFETY: copied at once; one reused meanwhile leads to a flow between other addresses, which is not found.
        let first = unsafe { FRAGMENTS.get(packet.fragment_key()).copied() }?;
        packet.complete(&first);
    }
    Some(())
}

/// Decides on a packet: by its flow if it is known, else by its destination.
#[inline(never)]
fn judge<F: Family>(ctx: &TcContext, work: &mut Work) -> Outcome {
    let Work { packet, entry, backend, carried, .. } = work;
    if *carried != UNKNOWN && known(&packet.key, entry).is_some() {
        let now = Kernel.now_seconds();
        match established(packet, entry, now, backend) {
            Known::Goes => {
                touch(packet, entry, now);
                return Outcome::Goes;
            }
            Known::Gone => {
                forget(&packet.key, entry);
                return Outcome::Refused(DropReason::BackendGone);
            }
            Known::Anew => forget(&packet.key, entry),
        }
    }
    if packet.part == Part::Later { Outcome::Pass } else { begin::<F>(ctx, work) }
}

/// Copies the entry of a flow; answers where it is.
#[inline(always)]
pub fn known(key: &FlowKey, entry: &mut FlowValue) -> Option<*mut FlowValue> {
    let found = FLOWS.get_ptr_mut(key)?;
    // SAFETY: copied at once, from one map to another; an assignment would have to reckon that both are one.
    unsafe { copy_nonoverlapping(found, entry, 1) };
    Some(found)
}

/// An ICMP error about a packet that was translated on this node goes on to the other end of the flow, and quotes what
/// that end sent. One that the node itself sends goes on by the stack.
#[inline(always)]
fn error<F: Family>(ctx: &TcContext, work: &mut Work, came_in: bool) -> i32 {
    if quoted::<F>(ctx, work).is_none() {
        return NOBODYS;
    }
    match rewrite_error::<F>(ctx, &work.packet, &work.quoted, &work.entry) {
        Some(()) if came_in => {
            choose_link(work);
            leave(work)
        }
        Some(()) => TO_STACK,
        None => dropped(DropReason::RewriteFailed),
    }
}

/// Reads what an error quotes, and finds the entry of its flow.
#[inline(never)]
fn quoted<F: Family>(ctx: &TcContext, work: &mut Work) -> Option<()> {
    work.quoted = packet::parse_quote::<F, _>(&Frame(ctx), &work.packet)?;
    let mut key = flow::reversed(&work.quoted.key);
    key.pad = work.node;
    if known(&key, &mut work.entry).is_some() {
        return Some(());
    }
    key.pad = [0; 3];
    known(&key, &mut work.entry).map(drop)
}

enum Known {
    Goes,
    Gone,
    Anew,
}

#[inline(always)]
fn established(packet: &Packet, entry: &FlowValue, now: u32, backend: &mut BackendKey) -> Known {
    let protocol = packet.key.protocol;
    if entry.flags & FLOW_REPLY == 0 {
        let fresh_syn =
            packet.flags & SYN != 0 && (entry.flags & FLOW_CLOSING != 0 || was_never_answered(packet, entry));
        if fresh_syn || flow::is_idle(entry, protocol, now) {
            return Known::Anew;
        }
        *backend = flow::backend(entry, protocol);
        if !flow_is_current(&Kernel, backend, entry.generation) {
            return if protocol != UDP && packet.flags & SYN == 0 { Known::Gone } else { Known::Anew };
        }
    }
    Known::Goes
}

/// Whether a SYN is of a flow that its backend never answered and, as it drains, will not take any more: the client asks again, or gave up
/// without a word and has taken the port for another connection.
#[inline(always)]
fn was_never_answered(packet: &Packet, entry: &FlowValue) -> bool {
    let protocol = packet.key.protocol;
    if packet.flags & ACK != 0 || takes_new_flows(&Kernel, &flow::backend(entry, protocol)) {
        return false;
    }
    // SAFETY: a word is read at once.
    match unsafe { FLOWS.get(flow::reply_key(entry, protocol)) } {
        Some(answers) => answers.last_seen == NEVER,
        None => true,
    }
}

/// Notes that a flow lives, at most once a second, and that it is closing, in both directions.
#[inline(always)]
fn touch(packet: &Packet, entry: &FlowValue, now: u32) {
    let closing = packet.flags & (FIN | RST) != 0;
    if entry.last_seen != now
        && let Some(live) = FLOWS.get_ptr_mut(packet.key)
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

/// Counts what the packet tells of a connection that is watched. (Not where it is judged: the stack is full there.)
#[inline(always)]
fn watch(packet: &Packet, entry: &FlowValue) {
    let came = connecting::judge(entry, packet.flags);
    if !matches!(came, Connecting::Nothing) {
        failure::note(packet, entry, came);
    }
}

/// Removes both directions of a flow.
#[inline(always)]
pub fn forget(key: &FlowKey, forward: &FlowValue) {
    let _ = FLOWS.remove(flow::reply_key(forward, key.protocol));
    let _ = FLOWS.remove(key);
}

/// A packet of no known flow: one to a Service begins one.
#[inline(always)]
fn begin<F: Family>(ctx: &TcContext, work: &mut Work) -> Outcome {
    let Some(config) = config() else { return Outcome::Pass };
    let Work { packet, entry, route, came_by: ifindex, at_pod, service_flags, .. } = work;
    let ifindex = *ifindex;
    let pods = PodDevices { bridge: config.bridge_ifindex, overlay: config.overlay_ifindex };
    let key = &packet.key;
    let to = Destination {
        address: key.destination,
        port: key.destination_port,
        protocol: key.protocol,
        scope: if ifindex == NO_DEVICE || pods.has(ifindex) { SCOPE_INTERNAL } else { SCOPE_EXTERNAL },
        loopback_is_node: false,
    };
    let service = match find(&Kernel, &to) {
        Found::Nothing => return Outcome::Pass,
        Found::UnknownPort => return Outcome::Refused(DropReason::PacketUnknownPort),
        Found::Service(service) => service,
    };
    *service_flags = service.flags;
    if !allows(&Kernel, &service, &key.source) {
        return Outcome::Dropped(DropReason::SourceNotAllowed);
    }
    if key.protocol != UDP && packet.flags & SYN == 0 {
        return Outcome::Refused(DropReason::UnknownFlow);
    }
    let client = Client { client: key.source, port: Some(key.source_port), datagram_socket: None };
    let chosen = select(&Kernel, &service, &client);
    let Some((backend, known)) = chosen.and_then(|b| Some((b, Kernel.backend(&b)?))) else {
        return match service.flags & SERVICE_DROP_EMPTY {
            0 => Outcome::Refused(DropReason::PacketNoEndpoints),
            _ => Outcome::Dropped(DropReason::NoLocalEndpoints),
        };
    };
    let from = if ifindex == NO_DEVICE { ingress_ifindex(ctx) } else { ifindex };
    if find_route::<F>(ctx, from, &backend, route).is_none() {
        return Outcome::Dropped(DropReason::NoRoute);
    }
    // Past the tunnel or not, it is a way to pods, and may be the other one by the next packet.
    if route.ifindex != 0 && route.ifindex == near(config, &backend.address) {
        route.ifindex = config.overlay_ifindex;
    }
    route.keeps_source |= pods.keep_source(ifindex, route.ifindex, service.flags);
    if *at_pod && route.ifindex == config.bridge_ifindex {
        let has_edge = LOCAL_PODS.get_ptr(backend.address).is_some();
        route.keeps_source |= flow::keep_source_at_edge(&key.source, &backend.address, has_edge);
    }
    *entry = flow::forward(&backend, (key.source, key.source_port), route.ifindex, known.generation);
    if key.protocol == TCP && service.flags & SERVICE_WATCHED != 0 {
        entry.flags |= FLOW_WATCHED;
    }
    Outcome::Begins
}

#[inline(always)]
pub fn ingress_ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel hands in a valid context.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// Asks the kernel's routes for the way to a backend and the source address it would use.
#[inline(always)]
pub fn find_route<F: Family>(
    ctx: &TcContext,
    ifindex: u32,
    backend: &BackendKey,
    route: &mut Route,
) -> Option<()> {
    if Kernel.is_node_address(&backend.address) {
        *route = Route { source: Address::ANY, keeps_source: true, ifindex: 0 };
        return Some(());
    }
    // SAFETY: all zeros are a valid value.
    let mut fib: FibLookup = unsafe { core::mem::zeroed() };
    fib.family = F::NUMBER;
    fib.l4_protocol = backend.protocol;
    fib.ifindex = ifindex;
    F::set_destination(&mut fib, &backend.address);
    // SAFETY: context and parameters are valid for the length given.
    let result = unsafe {
        bpf_fib_lookup(
            ctx.skb.skb.cast(),
            &raw mut fib,
            size_of::<FibLookup>() as i32,
            BPF_FIB_LOOKUP_SKIP_NEIGH | BPF_FIB_LOOKUP_SRC,
        )
    };
    // It also looks at the packet's length; a flow may begin with a packet that is too big.
    if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) && result != i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED) {
        return None;
    }
    *route = Route { source: F::source(&fib), keeps_source: false, ifindex: fib.ifindex };
    Some(())
}

/// Enters both directions of a new flow, the answers first: no packet may leave whose answer would not be known.
/// Looks for a source port that is free towards the backend.
#[inline(never)]
fn record(key: &FlowKey, route: &Route, ifindex: u32, entry: &mut FlowValue) -> Result<(), DropReason> {
    entry.last_seen = Kernel.now_seconds();
    let mut reply = flow::reply(key, ifindex, entry.generation);
    reply.flags |= entry.flags & FLOW_WATCHED;
    // A client that keeps its address keeps its port as well, unless its answers could not be told from another flow's. A pod never
    // keeps it: it may use the same port towards the same backend directly, past any table of flows.
    let mut entered = false;
    entry.source = if route.keeps_source { key.source } else { route.source };
    if route.keeps_source && !is_from_pods(ifindex) {
        entry.source_port = key.source_port;
        entered = enter_own(key, entry, &reply);
    }
    if !entered && !enter_free(key, entry, &reply) {
        return Err(DropReason::NatPortsExhausted);
    }
    FLOWS.insert(key, *entry, 0).map_err(|_| DropReason::FlowTableFull)
}

#[inline(always)]
fn is_from_pods(ifindex: u32) -> bool {
    match config() {
        Some(config) => ifindex == config.bridge_ifindex || ifindex == config.overlay_ifindex,
        None => false,
    }
}

/// Enters the answers to the client's own port. Those of this very flow, whose other half was forgotten, are taken over.
#[inline(never)]
pub fn enter_own(key: &FlowKey, entry: &FlowValue, reply: &FlowValue) -> bool {
    let answers = flow::reply_key(entry, key.protocol);
    if FLOWS.insert(answers, reply, BPF_NOEXIST as u64).is_ok() {
        return true;
    }
    // SAFETY: an element reused meanwhile is another flow's, as which it is taken.
    match FLOWS.get_ptr(answers).map(|known| flow::answers(unsafe { &*known }, key)) {
        Some(true) => FLOWS.insert(answers, reply, 0).is_ok(),
        Some(false) | None => false,
    }
}

/// Enters the answers to a port that is free.
#[inline(never)]
pub fn enter_free(key: &FlowKey, entry: &mut FlowValue, reply: &FlowValue) -> bool {
    let random = Kernel.random();
    for n in 0..NAT_PORT_TRIES {
        entry.source_port = flow::nat_port(random, n);
        if FLOWS.insert(flow::reply_key(entry, key.protocol), reply, BPF_NOEXIST as u64).is_ok() {
            return true;
        }
    }
    false
}

/// Rewrites a packet. The first fragment tells the others which flow is theirs.
#[inline(never)]
fn translate<F: Family>(ctx: &TcContext, packet: &Packet, entry: &FlowValue) -> Result<(), DropReason> {
    if packet.part == Part::First {
        let known = FRAGMENTS.insert(packet.fragment_key(), packet.fragment_value(), 0);
        known.map_err(|_| DropReason::FlowTableFull)?;
    }
    let rewritten = if packet.is_plain::<F>() && packet.key.protocol != SCTP {
        F::rewrite(ctx, packet, entry)
    } else {
        rewrite::<F>(ctx, packet, entry)
    };
    rewritten.ok_or(DropReason::RewriteFailed)
}

/// What goes to other nodes' pods leaves by the overlay, or past it by the link that they are reached by now.
#[inline(never)]
fn choose_link(work: &mut Work) {
    by_now(&mut work.entry);
}

#[inline(always)]
fn by_now(entry: &mut FlowValue) {
    let Some(config) = config() else { return };
    // A flow that its backend's node answers stays in the overlay: by the link nobody would tell that node of it.
    if entry.ifindex == config.overlay_ifindex && entry.flags & FLOW_DIRECT == 0 {
        let link = near(config, &entry.destination);
        if link != 0 {
            entry.ifindex = link;
        }
    }
}

/// The MTU of the next device, if the packet exceeds it.
#[inline(always)]
fn too_big_for(ctx: &TcContext, total_bytes: u32, ifindex: u32) -> Option<u16> {
    // Every link takes what IPv6 demands of it (RFC 8200 §5): small packets cost nothing here.
    if total_bytes <= LEAST_MTU_BYTES || ifindex == 0 {
        return None;
    }
    let mut mtu = 0_u32;
    // SAFETY: the context is valid, and the helper writes a word.
    let result =
        unsafe { bpf_check_mtu(raw(ctx).cast(), ifindex, &raw mut mtu, 0, u64::from(BPF_MTU_CHK_SEGS)) };
    // Positive: the packet, or a segment of it, is too long.
    (result > 0).then_some(mtu as u16)
}

/// The way of a translated packet: to a pod of this node, or out of a device; 0 leaves it to the stack. Routing it there would drop
/// it: its source is now an address of this node ("martian source").
#[inline(always)]
fn leave(work: &mut Work) -> i32 {
    if work.find_target() && work.pod.flags & LOCAL_QUEUED == 0 {
        return TO_POD;
    }
    if work.entry.ifindex == 0 {
        return TO_STACK;
    }
    // SAFETY: no parameters are given; the kernel looks the neighbour up by the packet's destination.
    unsafe { bpf_redirect_neigh(work.entry.ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// The raw context, for helpers that aya does not wrap.
#[inline(always)]
pub fn raw(ctx: &TcContext) -> *mut __sk_buff {
    ctx.skb.skb
}
