//! A hash that is the same on every node and in every version: clients are spread over hashed lists by it.

use weft_ebpf_abi::{Address, Port};

/// MurmurHash3 (x86, 32 bits) of whole words; it is public domain, small, and spreads neighbouring addresses and ports evenly.
#[inline(always)]
#[must_use]
pub const fn words<const N: usize>(input: &[u32; N]) -> u32 {
    let mut hash = 0_u32;
    let mut i = 0;
    while i < N {
        let word = input[i].wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
        hash = (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
        i += 1;
    }
    #[expect(clippy::cast_possible_truncation, reason = "N is a small constant")]
    let bytes = (N * 4) as u32;
    hash ^= bytes;
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// Hash of a client's address and port. The destination is left out: a NodePort is another address on every node, and a client
/// has each of its ports for one Service at a time.
#[inline(always)]
#[must_use]
pub const fn client(address: &Address, port: Port) -> u32 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address.0;
    words(&[
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
        u32::from_le_bytes([i, j, k, l]),
        u32::from_le_bytes([m, n, o, p]),
        port.get() as u32,
    ])
}
