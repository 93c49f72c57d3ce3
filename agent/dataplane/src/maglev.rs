//! Maglev tables: which backend serves which hash of a flow, the same on every node that knows the same backends.
//!
//! Each backend has a permutation of the table's places of its own; in turns, each takes the next of its places that is
//! free (Eisenbud and others, "Maglev", NSDI 2016, §3.4). So every backend gets its share to within one place, and
//! when one goes, the places of the others mostly stay.

use std::collections::{BTreeMap, BTreeSet};

use weft_ebpf_abi::BackendKey;
use zerocopy::IntoBytes;

/// Sizes of tables: primes, so that every step visits all places. Few of them and far apart: a change of size moves nearly
/// every flow, and it must follow from the backends alone, or nodes that saw another history would disagree.
const SIZES: [u32; 5] = [61, 251, 1_021, 4_093, 16_381];
/// Places for each backend at least, as long as there is a size for that: fewer would move more flows at a change.
const PLACES_PER_BACKEND: u32 = 8;

/// Backends and their shares of new connections, in the smallest numbers that say the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares(Vec<(BackendKey, u32)>);

impl Shares {
    /// Those that have no weight have 1.
    #[must_use]
    pub fn of(backends: &BTreeSet<BackendKey>, weights: &BTreeMap<BackendKey, u8>) -> Self {
        let weight = |backend| weights.get(backend).map_or(1, |weight| u32::from(*weight).max(1));
        let all: Vec<_> = backends.iter().map(|backend| (*backend, weight(backend))).collect();
        let divisor = all.iter().fold(0, |divisor, (_, weight)| greatest_common_divisor(divisor, *weight));
        Self(all.into_iter().map(|(backend, weight)| (backend, weight / divisor.max(1))).collect())
    }

    /// Whether all have the same.
    #[must_use]
    pub fn are_even(&self) -> bool {
        self.0.iter().all(|(_, share)| *share == 1)
    }

    /// How many backends there are.
    #[must_use]
    pub fn backends(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    fn most(&self) -> u32 {
        self.0.iter().map(|(_, share)| *share).max().unwrap_or(1)
    }
}

const fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// Places in the table of these backends; as many as backends when they outgrow the largest size.
#[must_use]
pub fn size(shares: &Shares) -> u32 {
    let backends = shares.backends();
    if backends <= 1 {
        return backends;
    }
    let units = shares.0.iter().fold(0_u32, |sum, (_, share)| sum.saturating_add(*share));
    let wanted = units.saturating_mul(PLACES_PER_BACKEND);
    let [.., largest] = SIZES;
    SIZES.into_iter().find(|size| *size >= wanted).unwrap_or(largest.max(backends))
}

/// The backend of each place. In every round each backend is given its share, and takes a place for each full one: the largest share.
#[must_use]
pub fn table(shares: &Shares) -> Vec<BackendKey> {
    let size = size(shares);
    if shares.backends() == size {
        return shares.0.iter().map(|(backend, _)| *backend).collect();
    }
    let turn = |(backend, share): &(BackendKey, u32)| (*backend, *share, 0, Places::of(backend, size));
    let mut turns: Vec<_> = shares.0.iter().map(turn).collect();
    let most = shares.most();
    let mut places: Vec<Option<BackendKey>> = vec![None; size as usize];
    let mut free = places.len();
    while free > 0 {
        for (backend, share, credit, permutation) in &mut turns {
            *credit += *share;
            if *credit < most {
                continue;
            }
            *credit -= most;
            // Each permutation names every place once, so one that is free comes.
            let Some(place) = permutation.find(|place| places[*place as usize].is_none()) else { continue };
            places[place as usize] = Some(*backend);
            free -= 1;
            if free == 0 {
                break;
            }
        }
    }
    places.into_iter().flatten().collect()
}

/// All places of a table, in an order that depends on the backend only.
struct Places {
    next: u32,
    step: u32,
    left: u32,
    size: u32,
}

impl Places {
    fn of(backend: &BackendKey, size: u32) -> Self {
        let hash = hash(backend.as_bytes());
        let share = |bits: u64, of: u32| u32::try_from(bits % u64::from(of)).unwrap_or(0);
        Self {
            next: share(hash >> 32, size),
            step: share(hash & 0xffff_ffff, size - 1) + 1,
            left: size,
            size,
        }
    }
}

impl Iterator for Places {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        self.left = self.left.checked_sub(1)?;
        let place = self.next;
        self.next = (self.next + self.step) % self.size;
        Some(place)
    }
}

/// FNV-1a with the finalizer of splitmix64: fixed for ever, because nodes of several versions must agree.
fn hash(bytes: &[u8]) -> u64 {
    let mut hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use weft_ebpf_abi::{Address, Port, TCP};

    use super::*;

    fn backends(first: u16, count: u16) -> BTreeSet<BackendKey> {
        let key = |i: u16| {
            let [a, b] = i.to_be_bytes();
            BackendKey { address: Address::v4([10, 42, a, b]), port: Port::new(8080), protocol: TCP, pad: 0 }
        };
        (first..first + count).map(key).collect()
    }

    /// All alike.
    fn even(backends: &BTreeSet<BackendKey>) -> Shares {
        Shares::of(backends, &BTreeMap::new())
    }

    fn taken(table: &[BackendKey]) -> BTreeMap<BackendKey, usize> {
        let mut shares = BTreeMap::new();
        for backend in table {
            *shares.entry(*backend).or_default() += 1;
        }
        shares
    }

    #[test]
    fn sizes_follow_the_backends() {
        let sizes =
            [0, 1, 2, 7, 8, 31, 32, 127, 511, 2_047, 16_381, 20_000].map(|n| size(&even(&backends(0, n))));
        assert_eq!(sizes, [0, 1, 61, 61, 251, 251, 1_021, 1_021, 4_093, 16_381, 16_381, 20_000]);
        assert!(table(&even(&backends(0, 0))).is_empty());
    }

    #[test]
    fn what_nodes_agreed_on_stays() {
        // Another order would send the flows of a node that is not upgraded yet to other backends.
        let places: Vec<_> =
            table(&even(&backends(1, 3))).iter().map(|b| b.address.low()[3]).take(12).collect();
        assert_eq!(places, PINNED);
    }

    const PINNED: [u8; 12] = [1, 2, 1, 3, 2, 3, 3, 3, 1, 3, 2, 3];

    #[test]
    fn weights_that_are_alike_are_none() {
        let all = backends(1, 5);
        let ten: BTreeMap<_, _> = all.iter().map(|backend| (*backend, 10)).collect();
        assert!(Shares::of(&all, &ten).are_even());
        assert_eq!(table(&Shares::of(&all, &ten)), table(&even(&all)));
    }

    proptest! {
        #[test]
        fn every_backend_gets_its_weight(weights in prop::collection::vec(1_u8..=100, 2..40)) {
            let all = backends(1, u16::try_from(weights.len()).unwrap());
            let weights: BTreeMap<_, _> = all.iter().copied().zip(weights).collect();
            let shares = Shares::of(&all, &weights);
            let table = table(&shares);
            prop_assert_eq!(table.len(), size(&shares) as usize);
            let (taken, sum) = (taken(&table), weights.values().map(|w| f64::from(*w)).sum::<f64>());
            for (backend, weight) in &weights {
                let part = f64::from(*weight) / sum;
                let wanted = part * table.len() as f64;
                let got = taken.get(backend).copied().unwrap_or(0) as f64;
                // When the table is full, less than a place is owed to each backend; these have gone to all by weight. And the last round may end before
                // a backend's turn.
                let bound = 2.0 + part * weights.len() as f64;
                prop_assert!((wanted - got).abs() <= bound, "{got} places instead of {wanted}");
            }
        }

        #[test]
        fn every_backend_gets_its_share(first in 0_u16..1_000, count in 2_u16..300) {
            let table = table(&even(&backends(first, count)));
            prop_assert_eq!(table.len(), size(&even(&backends(first, count))) as usize);
            let shares = taken(&table);
            let (least, most) = (shares.values().min().unwrap(), shares.values().max().unwrap());
            prop_assert_eq!(shares.len(), usize::from(count));
            prop_assert!(most - least <= 1);
        }

        #[test]
        fn a_backend_that_goes_moves_few_others(first in 0_u16..1_000, count in 3_u16..200, which in any::<prop::sample::Index>()) {
            let all = backends(first, count);
            let gone = *which.get(&all.iter().copied().collect::<Vec<_>>());
            let mut fewer = all.clone();
            fewer.remove(&gone);
            prop_assume!(size(&even(&all)) == size(&even(&fewer)));
            let (before, after) = (table(&even(&all)), table(&even(&fewer)));
            let kept = before.iter().zip(&after).filter(|(b, _)| **b != gone);
            let moved = kept.filter(|(b, a)| b != a).count();
            // A modulo over the list would move nearly all of them.
            prop_assert!(moved * 3 <= before.len(), "{moved} of {} moved", before.len());
        }
    }
}
