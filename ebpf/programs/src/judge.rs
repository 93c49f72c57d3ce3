//! What is decided on a packet: by its flow if it is known, else by the Service that it asks for.

use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::Tables;
use weft_ebpf_logic::flow::{self, PodDevices};
use weft_ebpf_logic::packet::{Part, SYN};
use weft_ebpf_logic::service::{Client, Destination, Found, allows, find, select};

use crate::counts;
use crate::family::Family;
use crate::flows::{Known, established, forget, known, touch};
use crate::frame::ingress_ifindex;
use crate::maps::{Kernel, LOCAL_PODS, Work, config, near};
use crate::verdict::UNKNOWN;
use crate::way::find_route;

/// By which device the node's own packets come.
pub const NO_DEVICE: u32 = 0;

/// What becomes of a packet.
pub enum Outcome {
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

/// Decides on a packet: by its flow if it is known, else by its destination.
#[inline(never)]
pub fn judge<F: Family>(ctx: &TcContext, work: &mut Work) -> Outcome {
    work.list = 0;
    let Work { packet, entry, backend, carried, .. } = work;
    if *carried != UNKNOWN && known(&packet.key, entry).is_some() {
        let now = Kernel.now_seconds();
        match established(packet, packet.key.protocol, entry, now, backend) {
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

/// A packet of no known flow: one to a Service begins one.
#[inline(always)]
fn begin<F: Family>(ctx: &TcContext, work: &mut Work) -> Outcome {
    let Some(config) = config() else { return Outcome::Pass };
    let Work { packet, entry, route, came_by: ifindex, at_pod, service_flags, list, .. } = work;
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
    (*service_flags, *list) = (service.flags, service.list);
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
    **entry = flow::forward(&backend, (key.source, key.source_port), route.ifindex, known.generation);
    if key.protocol == TCP && service.flags & SERVICE_WATCHED != 0 {
        entry.flags |= FLOW_WATCHED;
    }
    Outcome::Begins
}

/// Counts what a Service turns away. (Not where it is judged: the stack is full there.)
#[inline(always)]
pub fn counted(work: &Work, outcome: Outcome) -> Outcome {
    if let Outcome::Refused(reason) | Outcome::Dropped(reason) = outcome {
        counts::turned_away(work.list, reason);
    }
    outcome
}
