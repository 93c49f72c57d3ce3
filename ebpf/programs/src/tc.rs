//! Node edge: packets to Services that no socket hook saw, and the answers to them.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::fast::{Plain4, Plain6, Shape as _};
use weft_ebpf_logic::flow;
use weft_ebpf_logic::packet::{self, FIN, Family as _, Packet, Part, RST, SYN, V4, V6};
use weft_ebpf_logic::tunnel;

use crate::counts;
use crate::direct;
use crate::events;
use crate::family::{Family, Frame};
use crate::flows::{Known, established, known, record, touch, watch};
use crate::frame::{ethertype, ingress_ifindex};
use crate::in_place::{self, Plain};
use crate::judge::{Outcome, counted, judge};
use crate::maps::{FRAGMENTS, Kernel, LOCAL_PODS, Work, config, is_pods, work};
use crate::own::own;
use crate::pod;
use crate::policy;
use crate::reject::{Sender, reject, too_big};
use crate::rewrite::{rewrite_error, translate};
use crate::verdict::{DROP, NOBODYS, PASS, TO_POD, TO_STACK, UNDECIDED, UNKNOWN, UNREAD, dropped, told};
use crate::way::{by_now, choose_link, leave, too_big_for};

/// Packets that enter the node: from outside, from its pods, from the overlay.
#[classifier]
pub fn weft_ingress(ctx: TcContext) -> i32 {
    let mark = policy::take_mark(&ctx);
    if mark & SEEN_MARK != 0 {
        return PASS;
    }
    let (Some(config), Some(work)) = (config(), work()) else { return PASS };
    (work.came_by, work.at_pod, work.mark) = (ingress_ifindex(&ctx), false, mark);
    let done = match ethertype(&ctx) {
        Plain4::ETHERTYPE => ingress::<V4>(&ctx, work, config),
        Plain6::ETHERTYPE => ingress::<V6>(&ctx, work, config),
        _ => PASS,
    };
    match done {
        verdict if verdict >= 0 => verdict,
        TO_POD => pod::hand_over(&ctx, &work.pod),
        _ => PASS,
    }
}

#[inline(always)]
fn ingress<F: Family>(ctx: &TcContext, work: &mut Work, config: &NodeConfig) -> i32 {
    if pod::arrives::<F>(ctx, work, config) {
        return TO_POD;
    }
    work.carried = carry::<F>(ctx, work, config);
    decide::<F>(ctx, work)
}

/// Packets that the node's own processes send: answers of a backend that is the node itself, and SCTP to Services.
#[classifier]
pub fn weft_egress(ctx: TcContext) -> i32 {
    match ethertype(&ctx) {
        Plain4::ETHERTYPE => egress::<V4>(&ctx),
        Plain6::ETHERTYPE => egress::<V6>(&ctx),
        _ => PASS,
    }
}

/// Translates a packet to a Service, and the answer to one, if [`carry`] has left anything to do. Returns a verdict, or [`NOBODYS`],
/// [`TO_POD`], [`TO_STACK`].
#[inline(always)]
pub fn decide<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    let carried = work.carried;
    if carried > UNREAD {
        return carried;
    }
    if carried == UNREAD && read::<F>(ctx, &mut work.packet).is_none() {
        work.packet.key.protocol = 0;
        return NOBODYS;
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
        Outcome::Begins if leads_into_tunnel::<F>(work) => Outcome::Dropped(DropReason::NoRoute),
        outcome => outcome,
    };
    match counted(work, outcome) {
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
                    counts::connection(work.list);
                    go::<F>(ctx, work)
                }
                Err(reason) => {
                    counts::turned_away(work.list, reason);
                    told(&work.packet, reason)
                }
            }
        }
        Outcome::Refused(reason) => reject::<F>(ctx, &work.packet, reason, Sender::Behind),
        Outcome::Dropped(reason) => told(&work.packet, reason),
    }
}

/// Whether a Service's backend is what takes the tunnels' packets on some node: as the node's own, which it would leave as, the packet would
/// be taken for a peer's, and what is in it get past every policy. What comes by another way is dropped by nftables (`guard`).
#[inline(never)]
fn leads_into_tunnel<F: Family>(work: &Work) -> bool {
    let Work { packet, entry, .. } = work;
    tunnel::is_port(packet.key.protocol, entry.destination_port)
        && config().is_some_and(|config| config.overlay_ifindex != 0)
        && !is_pods(&entry.destination, F::ETHERTYPE == V6::ETHERTYPE)
}

/// Most packets: of the plainest shape, and of a flow that is known and goes on. What becomes of them is what the functions below would
/// decide; spread over those it took about a third longer.
#[inline(never)]
pub fn carry<F: Family>(ctx: &TcContext, work: &mut Work, config: &NodeConfig) -> i32 {
    match F::protocol(ctx) {
        Some(UDP) => carry_plain::<F, F::Udp>(ctx, work, config),
        Some(TCP) => carry_plain::<F, F::Tcp>(ctx, work, config),
        Some(_) | None => UNREAD,
    }
}

/// As of one protocol. Nothing that is called in between changes the frame, so what was found of it stays where it is.
#[inline(always)]
fn carry_plain<F: Family, P: Plain>(ctx: &TcContext, work: &mut Work, config: &NodeConfig) -> i32 {
    let Some(head) = P::head(ctx) else { return UNREAD };
    if P::read(head, &mut work.packet).is_none() {
        return UNREAD;
    }
    if P::PROTOCOL == UDP && !work.at_pod && tunnel::comes_in(&Kernel, &work.packet.key) {
        return NOBODYS;
    }
    let Work { packet, entry, mark, backend, clock, .. } = work;
    let Some(live) = known(&packet.key, entry) else { return UNKNOWN };
    let now = clock.now_seconds();
    if *mark != 0
        || packet.flags & (SYN | FIN | RST) != 0
        || entry.flags & FLOW_DIRECT != 0
        || !matches!(established(packet, P::PROTOCOL, entry, now, backend), Known::Goes)
    {
        return UNDECIDED;
    }
    by_now(entry, config);
    if too_big_for(ctx, packet.total_bytes, entry.ifindex).is_some() {
        return UNDECIDED;
    }
    if entry.last_seen != now {
        // SAFETY: an aligned word of an element; one reused meanwhile is of a flow that began this second.
        unsafe { (*live).last_seen = now };
    }
    match P::rewrite(ctx, head, packet, entry) {
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
    if in_place::read::<F>(ctx, &mut work.packet).is_none() && read::<F>(ctx, &mut work.packet).is_none() {
        return PASS;
    }
    if tunnel::has_port(&work.packet.key) && is_tunnels(&work.packet.key) {
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

/// Not inlined: the stack of the program is full.
#[inline(never)]
fn is_tunnels(key: &FlowKey) -> bool {
    tunnel::goes_out(&Kernel, key)
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
