//! Ranges of addresses that peers name, nested: each boundary with the peers that its addresses belong to.

use std::collections::{BTreeMap, BTreeSet};

use weft_ebpf_abi::Address;
use weft_ebpf_abi::policy::RangeKey;

use super::objects::PeerSpec;

/// Peers of the addresses that lie in a boundary and in none within it.
pub(super) type Nested = BTreeMap<RangeKey, BTreeSet<u64>>;

/// All of IPv4.
const IPV4: RangeKey = RangeKey { prefix_bits: 96, address: Address::v4([0; 4]) };

fn bits(address: &Address) -> u128 {
    u128::from_be_bytes(address.0)
}

fn mask(prefix_bits: u32) -> u128 {
    u128::MAX.checked_shl(128 - prefix_bits).unwrap_or(0)
}

/// First and last address.
pub(super) fn span(range: &RangeKey) -> (Address, Address) {
    let last = bits(&range.address) | !mask(range.prefix_bits);
    (range.address, Address(last.to_be_bytes()))
}

fn encloses(outer: &RangeKey, inner: &RangeKey) -> bool {
    outer.prefix_bits <= inner.prefix_bits
        && bits(&inner.address) & mask(outer.prefix_bits) == bits(&outer.address)
}

/// Nests all boundaries of these blocks, in one pass over them in order.
pub(super) fn nest<'a>(blocks: impl Iterator<Item = (u64, &'a PeerSpec)>) -> Nested {
    // By address, the wider first: whatever encloses a boundary comes before it.
    let mut boundaries: BTreeMap<(Address, u32), (Vec<u64>, Vec<u64>)> = BTreeMap::new();
    for (id, spec) in blocks {
        let PeerSpec::Block { cidr, except } = spec else { continue };
        boundaries.entry((cidr.address, cidr.prefix_bits)).or_default().0.push(id);
        for hole in except {
            boundaries.entry((hole.address, hole.prefix_bits)).or_default().1.push(id);
        }
    }
    // A wide range of IPv6 is not meant to hold IPv4, which stands mapped into it.
    if boundaries.keys().any(|(address, prefix_bits)| {
        encloses(&RangeKey { prefix_bits: *prefix_bits, address: *address }, &IPV4)
    }) {
        boundaries.entry((IPV4.address, IPV4.prefix_bits)).or_default();
    }
    let mut nested = Nested::new();
    let mut around: Vec<RangeKey> = Vec::new();
    for ((address, prefix_bits), (begins, ends)) in boundaries {
        let range = RangeKey { prefix_bits, address };
        while around.last().is_some_and(|outer| !encloses(outer, &range)) {
            around.pop();
        }
        let outer = around.last().filter(|_| range != IPV4);
        let mut peers = outer.and_then(|outer| nested.get(outer)).cloned().unwrap_or_default();
        peers.extend(begins);
        for id in ends {
            peers.remove(&id);
        }
        nested.insert(range, peers);
        around.push(range);
    }
    nested
}

/// The peers of an address.
pub(super) fn lookup<'a>(nested: &'a Nested, address: &Address) -> Option<&'a BTreeSet<u64>> {
    // IPv4 lies behind 96 bits; a shorter prefix than the shortest in use costs a lookup in vain, no more.
    (0..=128).rev().find_map(|prefix_bits| {
        let address = Address((bits(address) & mask(prefix_bits)).to_be_bytes());
        nested.get(&RangeKey { prefix_bits, address })
    })
}
