//! SCTP of the node's own sockets.

use aya_ebpf::helpers::bpf_redirect_neigh;
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::DropReason;
use weft_ebpf_logic::flow;

use crate::counts;
use crate::events;
use crate::family::Family;
use crate::flows::record;
use crate::judge::{NO_DEVICE, Outcome, counted, judge};
use crate::maps::Work;
use crate::policy;
use crate::reject::{Sender, reject, too_big};
use crate::rewrite::translate;
use crate::verdict::{DROP, PASS, UNDECIDED, dropped, told, told_apart};
use crate::way::{choose_link, too_big_for};

/// SCTP of the node's own sockets, which no hook sees. Their packets to Services go on as clients' do that come in by no device, and so
/// their answers are the stack's.
#[inline(always)]
pub fn own<F: Family>(ctx: &TcContext, work: &mut Work) -> i32 {
    if !policy::is_own(ctx) {
        return PASS;
    }
    (work.came_by, work.at_pod, work.carried) = (NO_DEVICE, false, UNDECIDED);
    let outcome = judge::<F>(ctx, work);
    match counted(work, outcome) {
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
        counts::turned_away(work.list, reason);
        told(packet, reason);
        return false;
    }
    counts::connection(work.list);
    *backend = flow::backend(entry, packet.key.protocol);
    events::packet(&packet.key, backend);
    true
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
