//! Connections to backends that come about or fail, for Services that opted in: counted per backend, and only where it failed.
//!
//! A socket that a hook gave a backend tells by its state: a segment that ends it before it is established is a reset, and a SYN that
//! is sent twice had no answer. What is translated packet by packet tells by its packets (`flows.rs`). A process that gives up
//! by itself says nothing of the backend.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::{
    BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_ESTABLISHED, BPF_TCP_SYN_SENT,
};
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::macros::{map, sock_ops};
use aya_ebpf::maps::{HashMap, RingBuf};
use aya_ebpf::programs::SockOpsContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::connecting::{self, Connecting};
use weft_ebpf_logic::flow;
use weft_ebpf_logic::packet::Packet;
use weft_ebpf_logic::service::{Destination, Found, find};

use crate::counts;
use crate::maps::{FLOWS, Kernel, NO_PREALLOC, SOCKETS};

const AF_INET: u32 = 2;
const GO_ON: u32 = 1;

#[map(name = "weft_fail_2")]
static FAILURES: HashMap<BackendKey, Failures> = HashMap::pinned(sizes::FAILURES, NO_PREALLOC);
/// Not pinned: the next agent reads the map.
#[map(name = "weft_wake")]
static WAKE: RingBuf = RingBuf::with_byte_size(sizes::WAKE_BYTES, 0);

/// A connection by a Service's address failed. Lost races lose a count; a backend that fails goes on failing.
#[inline(always)]
fn failed(backend: &BackendKey, address: &Address, port: Port) {
    let asked = Destination {
        address: *address,
        port,
        protocol: TCP,
        // Whatever clients outside may use is there for those inside as well.
        scope: SCOPE_INTERNAL,
        loopback_is_node: true,
    };
    if let Found::Service(service) = find(&Kernel, &asked) {
        counts::failed(service.list);
    }
    let Some(known) = FAILURES.get_ptr_mut(backend) else { return };
    // SAFETY: aligned words of an element; without preallocation it is freed by RCU only.
    let tell = unsafe {
        let count = (*known).failed.saturating_add(1);
        (*known).failed = count;
        count >= FAILURES_IN_A_ROW && (*known).back_at == 0
    };
    if tell {
        // Without room the next failure tells.
        let _ = WAKE.output::<BackendKey>(*backend, 0);
    }
}

/// A connection came about: what failed before counts no more. Nothing is written where nothing had failed.
#[inline(always)]
fn answered(backend: &BackendKey) {
    let Some(known) = FAILURES.get_ptr_mut(backend) else { return };
    // SAFETY: as above.
    unsafe {
        if (*known).failed | (*known).ejections != 0 {
            (*known).failed = 0;
            (*known).ejections = 0;
        }
    }
}

/// Counts what a packet of a watched flow tells, once in each direction.
///
/// It must call a helper on every way: what a function without a result leaves in the register is judged all the same, and the verifier of
/// Linux 6.18 refuses an address there ("cannot return stack pointer to the caller").
#[inline(never)]
pub fn note(packet: &Packet, entry: &FlowValue, came: Connecting) {
    let key = &packet.key;
    let backend = connecting::backend(key, entry);
    if matches!(came, Connecting::Answered) {
        answered(&backend);
        // A SYN that overtakes the answer is no second question.
        told(&flow::forward_key(entry, key.protocol));
    } else {
        let (address, port) = connecting::asked(key, entry);
        failed(&backend, &address, port);
    }
    told(key);
}

#[inline(always)]
fn told(key: &FlowKey) {
    if let Some(live) = FLOWS.get_ptr_mut(key) {
        // SAFETY: an aligned word of an element; a lost race would tell a second time.
        unsafe { (*live).flags &= !FLOW_WATCHED };
    }
}

/// Attached while a Service has opted in. It answers nothing: other programs' replies stand.
#[sock_ops]
pub fn weft_sockops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            if watched(&ctx).is_some() {
                let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG;
                let _ = ctx.set_cb_flags(flags as i32);
            }
        }
        BPF_SOCK_OPS_STATE_CB if ctx.arg(0) == BPF_TCP_SYN_SENT => match ctx.arg(1) {
            BPF_TCP_ESTABLISHED => {
                if let Some((backend, _)) = watched(&ctx) {
                    answered(&backend);
                }
            }
            BPF_TCP_CLOSE if segments_in(&ctx) != 0 => socket_failed(&ctx),
            _ => {}
        },
        // The first of a connection's time-outs; the state tells whether it is the SYN's.
        BPF_SOCK_OPS_RTO_CB if ctx.arg(0) == 0 && state(&ctx) == BPF_TCP_SYN_SENT => {
            socket_failed(&ctx);
        }
        _ => {}
    }
    GO_ON
}

#[inline(always)]
fn socket_failed(ctx: &SockOpsContext) {
    if let Some((backend, asked)) = watched(ctx) {
        failed(&backend, &asked.address, asked.port);
    }
}

#[inline(always)]
fn segments_in(ctx: &SockOpsContext) -> u32 {
    // SAFETY: the kernel hands in a valid context.
    unsafe { read_volatile(addr_of!((*ctx.ops).segs_in)) }
}

#[inline(always)]
fn state(ctx: &SockOpsContext) -> u32 {
    // SAFETY: as above.
    unsafe { read_volatile(addr_of!((*ctx.ops).state)) }
}

/// The backend that a hook of this node gave the socket, and what it had asked for, if the backend's connections are watched.
#[inline(always)]
fn watched(ctx: &SockOpsContext) -> Option<(BackendKey, SocketValue)> {
    // SAFETY: as above. The upper half holds the port in network order.
    let [_, _, a, b] = unsafe { read_volatile(addr_of!((*ctx.ops).remote_port)) }.to_ne_bytes();
    let backend = BackendKey { address: remote(ctx), port: Port([a, b]), protocol: TCP, pad: 0 };
    FAILURES.get_ptr(backend)?;
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.ops.cast()) };
    // SAFETY: copied at once; the cookie in the key is never used again by another socket.
    let asked = unsafe { SOCKETS.get(SocketKey { cookie, peer: backend, pad: [0; 4] }).copied() }?;
    Some((backend, asked))
}

/// The peer's address; an IPv6 socket has IPv4 ones as mapped, as the tables do.
///
/// All is read before it is chosen from: LLVM makes one load of two, from an address that it computes, which the verifier of Linux 6.18
/// refuses ("dereference of modified ctx ptr").
#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Address {
    // SAFETY: the kernel hands in a valid context; only whole words of it may be read.
    let (v4, v6, family) = unsafe {
        let word = |i: usize| read_volatile(addr_of!((*ctx.ops).remote_ip6[i]));
        let v6 = [word(0), word(1), word(2), word(3)];
        (read_volatile(addr_of!((*ctx.ops).remote_ip4)), v6, read_volatile(addr_of!((*ctx.ops).family)))
    };
    if family == AF_INET { Address::v4(v4.to_ne_bytes()) } else { Address::from_words(v6) }
}
