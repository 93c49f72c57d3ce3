//! What differs between IPv4 and IPv6 towards the kernel: routes, and how a header is rewritten.

use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use aya_ebpf::programs::TcContext;
use weft_ebpf_abi::Address;
use weft_ebpf_logic::fast::{IP4, IP6, Plain4, Plain6, Shape, TCP4, TCP6, UDP4, UDP6};
use weft_ebpf_logic::packet::{self, Bytes, V4, V6};

use crate::in_place::{self, Plain, Tcp, Udp};

/// BPF_F_IPV6 of linux/bpf.h (6.16): the checksum in the packet and the addresses cancel out, because the header has no
/// checksum of its own.
const CSUM_IPV6: u64 = 1 << 7;

/// A frame in the kernel.
pub struct Frame<'a>(pub &'a TcContext);

impl Bytes for Frame<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.load(at).ok()
    }
}

/// A family in the packet programs.
pub trait Family: packet::Family {
    /// AF_INET or AF_INET6.
    const NUMBER: u8;
    /// Further flags of `bpf_l4_csum_replace` when addresses changed. A kernel that does not know them refuses them.
    const CHECKSUM_FLAGS: u64;
    /// What the family's plainest packets have where.
    type Shape: Shape;
    /// UDP in such packets.
    type Udp: Plain;
    /// TCP in such packets.
    type Tcp: Plain;

    /// Asks for the way to `destination`.
    fn set_destination(fib: &mut FibLookup, destination: &Address);
    /// The source that the routes give.
    fn source(fib: &FibLookup) -> Address;
    /// Source and destination of a packet.
    fn addresses(ctx: &TcContext) -> Option<[Address; 2]>;
    /// Takes one off the hops that a packet has left, as a router does; `None` if it has none for that.
    fn hop(ctx: &TcContext) -> Option<()>;
    /// The protocol, if the frame is as long as any of the plainest shape.
    fn protocol(ctx: &TcContext) -> Option<u8>;
    /// Sets both addresses in the header at `at`, and its checksum if it has one. `difference` is that of their words.
    fn store_addresses(ctx: &TcContext, at: usize, addresses: &[Address; 2], difference: u64) -> Option<()>;
}

impl Family for V4 {
    const NUMBER: u8 = 2;
    const CHECKSUM_FLAGS: u64 = 0;
    type Shape = Plain4;
    type Udp = Udp<Self, UDP4>;
    type Tcp = Tcp<Self, TCP4>;

    #[inline(always)]
    fn set_destination(fib: &mut FibLookup, destination: &Address) {
        fib.__bindgen_anon_4.ipv4_dst = destination.words()[3];
    }
    #[inline(always)]
    fn source(fib: &FibLookup) -> Address {
        // SAFETY: a lookup of this family filled it in.
        Address::v4(unsafe { fib.__bindgen_anon_3.ipv4_src }.to_ne_bytes())
    }
    #[inline(always)]
    fn addresses(ctx: &TcContext) -> Option<[Address; 2]> {
        Some(Plain4::addresses(in_place::head::<IP4>(ctx)?))
    }
    #[inline(always)]
    fn hop(ctx: &TcContext) -> Option<()> {
        in_place::hop::<Plain4, IP4>(ctx)
    }
    #[inline(always)]
    fn protocol(ctx: &TcContext) -> Option<u8> {
        Some(Plain4::protocol(in_place::head::<UDP4>(ctx)?))
    }
    #[inline(always)]
    fn store_addresses(ctx: &TcContext, at: usize, addresses: &[Address; 2], difference: u64) -> Option<()> {
        ctx.l3_csum_replace(at + 10, 0, difference, 0).ok()?;
        ctx.store(at + 12, &[addresses[0].words()[3], addresses[1].words()[3]], 0).ok()
    }
}

impl Family for V6 {
    const NUMBER: u8 = 10;
    const CHECKSUM_FLAGS: u64 = CSUM_IPV6;
    type Shape = Plain6;
    type Udp = Udp<Self, UDP6>;
    type Tcp = Tcp<Self, TCP6>;

    #[inline(always)]
    fn set_destination(fib: &mut FibLookup, destination: &Address) {
        fib.__bindgen_anon_4.ipv6_dst = destination.words();
    }
    #[inline(always)]
    fn source(fib: &FibLookup) -> Address {
        // SAFETY: a lookup of this family filled it in.
        let words = unsafe { fib.__bindgen_anon_3.ipv6_src };
        let mut bytes = [0; 16];
        for i in 0..4 {
            let word = words[i].to_ne_bytes();
            bytes[i * 4] = word[0];
            bytes[i * 4 + 1] = word[1];
            bytes[i * 4 + 2] = word[2];
            bytes[i * 4 + 3] = word[3];
        }
        Address(bytes)
    }
    #[inline(always)]
    fn addresses(ctx: &TcContext) -> Option<[Address; 2]> {
        Some(Plain6::addresses(in_place::head::<IP6>(ctx)?))
    }
    #[inline(always)]
    fn hop(ctx: &TcContext) -> Option<()> {
        in_place::hop::<Plain6, IP6>(ctx)
    }
    #[inline(always)]
    fn protocol(ctx: &TcContext) -> Option<u8> {
        Some(Plain6::protocol(in_place::head::<UDP6>(ctx)?))
    }
    #[inline(always)]
    fn store_addresses(ctx: &TcContext, at: usize, addresses: &[Address; 2], _: u64) -> Option<()> {
        ctx.store(at + 8, addresses, 0).ok()
    }
}
