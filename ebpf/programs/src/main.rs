//! The programs that run in the kernel, thin glue over `weft-ebpf-logic`: one file per hook.
#![no_std]
#![no_main]

mod counts;
mod direct;
mod events;
mod failure;
mod family;
mod flows;
mod frame;
mod in_place;
mod judge;
mod maps;
mod own;
mod pod;
mod policy;
mod reject;
mod rewrite;
mod sctp;
mod sock;
mod tc;
mod verdict;
mod way;
mod xdp;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// Several helpers (fib lookup, socket cookies) are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
