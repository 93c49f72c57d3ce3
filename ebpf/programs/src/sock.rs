//! Socket hooks: a process that asks for a Service is connected to a pod, before a packet exists.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use weft_ebpf_abi::*;
use weft_ebpf_logic::service::{Client, Destination, Found, allows, find, select};

use crate::maps::{Kernel, SOCKETS, config, count};
use crate::{counts, events};

const ALLOW: i32 = 1;
const DENY: i32 = 0;
const ECONNREFUSED: i32 = 111;
/// Depth of the cgroup tree that is searched for the node's cgroup. `weft/<node>` is at 2; the rest is for a machine that is a container itself.
const MAX_CGROUP_LEVEL: i32 = 8;

/// Family of the hook: which of the context's fields hold the address.
trait Family {
    fn read(ctx: *mut bpf_sock_addr) -> Address;
    fn write(ctx: *mut bpf_sock_addr, address: &Address);
    /// Whether the family's sockets can talk to `address`.
    fn reaches(address: &Address) -> bool;
}

struct V4;
struct V6;

#[inline(always)]
fn word(address: &Address, i: usize) -> u32 {
    u32::from_ne_bytes([address.0[i * 4], address.0[i * 4 + 1], address.0[i * 4 + 2], address.0[i * 4 + 3]])
}

// The verifier takes only whole, aligned words of the context ("invalid bpf_context access"), and LLVM merges or
// splits accesses that are not volatile.
impl Family for V4 {
    #[inline(always)]
    fn read(ctx: *mut bpf_sock_addr) -> Address {
        // SAFETY: the kernel hands in a valid context.
        Address::v4(unsafe { read_volatile(addr_of!((*ctx).user_ip4)) }.to_ne_bytes())
    }
    #[inline(always)]
    fn write(ctx: *mut bpf_sock_addr, address: &Address) {
        // SAFETY: as above; the hook may write this field.
        unsafe { write_volatile(addr_of_mut!((*ctx).user_ip4), word(address, 3)) };
    }
    #[inline(always)]
    fn reaches(address: &Address) -> bool {
        address.as_v4().is_some()
    }
}

impl Family for V6 {
    #[inline(always)]
    fn read(ctx: *mut bpf_sock_addr) -> Address {
        let mut bytes = [0_u8; 16];
        for i in 0..4 {
            // SAFETY: the kernel hands in a valid context.
            let word = unsafe { read_volatile(addr_of!((*ctx).user_ip6[i])) }.to_ne_bytes();
            bytes[i * 4] = word[0];
            bytes[i * 4 + 1] = word[1];
            bytes[i * 4 + 2] = word[2];
            bytes[i * 4 + 3] = word[3];
        }
        Address(bytes)
    }
    #[inline(always)]
    fn write(ctx: *mut bpf_sock_addr, address: &Address) {
        for i in 0..4 {
            // SAFETY: as above; the hook may write this field.
            unsafe { write_volatile(addr_of_mut!((*ctx).user_ip6[i]), word(address, i)) };
        }
    }
    #[inline(always)]
    fn reaches(_: &Address) -> bool {
        true
    }
}

#[inline(always)]
fn port(ctx: *mut bpf_sock_addr) -> Port {
    // SAFETY: the kernel hands in a valid context. The low half holds the port in network order.
    let [a, b, _, _] = unsafe { read_volatile(addr_of!((*ctx).user_port)) }.to_ne_bytes();
    Port([a, b])
}

#[inline(always)]
fn set_port(ctx: *mut bpf_sock_addr, port: Port) {
    let value = u32::from_ne_bytes([port.0[0], port.0[1], 0, 0]);
    // SAFETY: as above; the hook may write this field.
    unsafe { write_volatile(addr_of_mut!((*ctx).user_port), value) };
}

#[inline(always)]
fn protocol(ctx: *mut bpf_sock_addr) -> u8 {
    // SAFETY: the kernel hands in a valid context.
    unsafe { read_volatile(addr_of!((*ctx).protocol)) as u8 }
}

/// Whether this node serves the socket, and whether it is in the node's own namespace.
#[inline(always)]
fn serves(ctx: *mut bpf_sock_addr) -> Option<bool> {
    let config = config()?;
    // SAFETY: the context is valid.
    if unsafe { bpf_get_netns_cookie(ctx.cast()) } == config.netns_cookie {
        return Some(true);
    }
    if config.cgroup_id == EVERY_CGROUP {
        return Some(false);
    }
    for level in 1..=MAX_CGROUP_LEVEL {
        // SAFETY: a helper with a number. It returns 0 below the task's own level.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == config.cgroup_id {
            return Some(false);
        }
        if id == 0 {
            return None;
        }
    }
    None
}

#[inline(always)]
fn refuse(to: &Destination, list: u32, reason: DropReason) -> i32 {
    count(reason);
    counts::turned_away(list, reason);
    events::socket_refused(&to.address, to.port, to.protocol, reason);
    // SAFETY: a helper with a number; the kernel returns it instead of EPERM.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    DENY
}

/// connect and sendmsg: from the Service to a backend.
#[inline(always)]
fn forward<F: Family>(ctx: *mut bpf_sock_addr, datagram: bool) -> i32 {
    let protocol = protocol(ctx);
    if protocol != TCP && protocol != UDP {
        return ALLOW;
    }
    let Some(loopback_is_node) = serves(ctx) else { return ALLOW };
    let (address, port) = (F::read(ctx), port(ctx));
    let to = Destination { address, port, protocol, scope: SCOPE_INTERNAL, loopback_is_node };
    let service = match find(&Kernel, &to) {
        Found::Nothing => return ALLOW,
        Found::UnknownPort => return refuse(&to, 0, DropReason::SocketUnknownPort),
        Found::Service(service) => service,
    };
    if service.flags & SERVICE_CHECK_SOURCE != 0 {
        // A pod's socket has no address yet: its packets will, and the edge asks them.
        if !loopback_is_node {
            return ALLOW;
        }
        // As for kube-proxy: a node that is in a range may use the address as if it came from that address itself.
        if !allows(&Kernel, &service, &address) {
            count(DropReason::SourceNotAllowed);
            counts::turned_away(service.list, DropReason::SourceNotAllowed);
            events::socket_refused(&address, port, protocol, DropReason::SourceNotAllowed);
            return DENY;
        }
    }
    // SAFETY: the context is valid.
    let (cookie, netns) = unsafe { (bpf_get_socket_cookie(ctx.cast()), bpf_get_netns_cookie(ctx.cast())) };
    let client = Client {
        client: Address::from_id(netns),
        port: None,
        datagram_socket: if datagram { Some(Address::from_id(cookie)) } else { None },
    };
    let Some(backend) = select(&Kernel, &service, &client) else {
        let local = service.flags & SERVICE_DROP_EMPTY != 0;
        let reason = if local { DropReason::NoLocalEndpoints } else { DropReason::SocketNoEndpoints };
        return refuse(&to, service.list, reason);
    };
    if !F::reaches(&backend.address) {
        return refuse(&to, service.list, DropReason::SocketNoEndpoints);
    }
    let key = SocketKey { cookie, peer: backend, pad: [0; 4] };
    let asked = SocketValue { address, port, pad: [0; 2] };
    if !(datagram && is_known(&key, &asked)) {
        let _ = SOCKETS.insert(key, asked, 0);
        counts::connection(service.list);
    }
    F::write(ctx, &backend.address);
    set_port(ctx, backend.port);
    events::socket(&address, port, &backend, datagram);
    ALLOW
}

/// Whether a socket has sent to the backend before, by the same Service.
#[inline(always)]
fn is_known(key: &SocketKey, asked: &SocketValue) -> bool {
    // SAFETY: it is compared at once; the cookie in the key is never used again by another socket.
    unsafe { SOCKETS.get(key) }.is_some_and(|known| known == asked)
}

/// recvmsg and getpeername: from the backend to the Service that the process asked for.
#[inline(always)]
fn reverse<F: Family>(ctx: *mut bpf_sock_addr) -> i32 {
    let peer = BackendKey { address: F::read(ctx), port: port(ctx), protocol: protocol(ctx), pad: 0 };
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    // SAFETY: copied at once; the cookie in the key is never used again by another socket.
    let known = unsafe { SOCKETS.get(SocketKey { cookie, peer, pad: [0; 4] }).copied() };
    if let Some(asked) = known {
        F::write(ctx, &asked.address);
        set_port(ctx, asked.port);
    }
    ALLOW
}

#[cgroup_sock_addr(connect4)]
pub fn weft_connect4(ctx: SockAddrContext) -> i32 {
    forward::<V4>(ctx.sock_addr, false)
}

#[cgroup_sock_addr(connect6)]
pub fn weft_connect6(ctx: SockAddrContext) -> i32 {
    forward::<V6>(ctx.sock_addr, false)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn weft_sendmsg4(ctx: SockAddrContext) -> i32 {
    forward::<V4>(ctx.sock_addr, true)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn weft_sendmsg6(ctx: SockAddrContext) -> i32 {
    forward::<V6>(ctx.sock_addr, true)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn weft_recvmsg4(ctx: SockAddrContext) -> i32 {
    reverse::<V4>(ctx.sock_addr)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn weft_recvmsg6(ctx: SockAddrContext) -> i32 {
    reverse::<V6>(ctx.sock_addr)
}

#[cgroup_sock_addr(getpeername4)]
pub fn weft_peername4(ctx: SockAddrContext) -> i32 {
    reverse::<V4>(ctx.sock_addr)
}

#[cgroup_sock_addr(getpeername6)]
pub fn weft_peername6(ctx: SockAddrContext) -> i32 {
    reverse::<V6>(ctx.sock_addr)
}
