//! How large the maps are that forget what was used least recently: where they are too small for the traffic, flows that live are forgotten.

use nix::unistd::{SysconfVar, sysconf};
use weft_ebpf_abi::{names, sizes};

/// These maps, with the least that they hold. They are allocated whole.
const FORGETFUL: [(&str, u32); 4] = [
    (names::FLOWS, sizes::FLOWS),
    (names::SOCKETS, sizes::SOCKETS),
    (names::AFFINITY, sizes::AFFINITY),
    (names::TRACKED, sizes::TRACKED),
];

/// A machine with so much memory, or less, has the least.
const LEAST_MEMORY_BYTES: u64 = 4 << 30;
/// A million flows.
const MOST: u64 = 32;

/// The sizes for this machine. Maps that are pinned already stay as they are.
pub(super) fn of_machine() -> impl Iterator<Item = (&'static str, u32)> {
    let times = times(memory_bytes());
    FORGETFUL.into_iter().map(move |(name, least)| (name, least.saturating_mul(times)))
}

/// How much more than the least: as much more as there is memory, so that they take about a five-hundredth of it.
fn times(memory_bytes: u64) -> u32 {
    let times = (memory_bytes / LEAST_MEMORY_BYTES).clamp(1, MOST);
    1 << times.ilog2()
}

/// Memory of the machine; 0 if it does not say.
fn memory_bytes() -> u64 {
    let of = |name| sysconf(name).ok().flatten().and_then(|number| u64::try_from(number).ok()).unwrap_or(0);
    of(SysconfVar::_PHYS_PAGES).saturating_mul(of(SysconfVar::PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_grow_with_the_machine() {
        let rows = [(0, 1), (1, 1), (4, 1), (7, 1), (8, 2), (23, 4), (32, 8), (128, 32), (4_096, 32)];
        for (gib, wanted) in rows {
            assert_eq!(times(gib << 30), wanted, "{gib} GiB");
        }
        assert!(memory_bytes() > 1 << 28, "this machine has memory");
    }
}
