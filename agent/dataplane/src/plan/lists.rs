//! Places in lists of backends, and the clients of lists: the least that has to change.

use std::collections::{BTreeSet, HashSet};

use weft_ebpf_abi::{BackendKey, SlotKey, SourceData, SourceKey};

use super::Op;
use crate::tables::Range;

/// Places as they stand; one may be empty after an operation that failed.
type Slots = [Option<BackendKey>];

/// Backends that stay keep their places; holes are filled with new ones, then with those from the end.
pub(super) fn plan_slots(list: u32, slots: &Slots, wanted: &BTreeSet<BackendKey>, ops: &mut Vec<Op>) {
    let mut placed = HashSet::new();
    let stays =
        |slot: &Option<BackendKey>| slot.filter(|b| wanted.contains(b) && placed.insert(*b)).is_some();
    let stay: Vec<_> = slots.iter().take(wanted.len()).map(stays).collect();
    let mut missing = wanted.iter().filter(|b| !placed.contains(*b));
    for (place, index) in (0..wanted.len()).zip(0..) {
        if !stay.get(place).copied().unwrap_or(false)
            && let Some(backend) = missing.next()
        {
            ops.push(Op::PutSlot(SlotKey { list, index }, *backend));
        }
    }
    cut(list, slots, wanted.len(), ops);
}

/// Every place of a table is decided by its hashes: only those that differ change.
pub(super) fn plan_table(list: u32, slots: &Slots, table: &[BackendKey], ops: &mut Vec<Op>) {
    for (place, (index, backend)) in (0..).zip(table).enumerate() {
        if slots.get(place) != Some(&Some(*backend)) {
            ops.push(Op::PutSlot(SlotKey { list, index }, *backend));
        }
    }
    cut(list, slots, table.len(), ops);
}

/// Removes what stands behind the end, from behind.
fn cut(list: u32, slots: &Slots, length: usize, ops: &mut Vec<Op>) {
    let behind: Vec<_> = (0..).zip(slots).skip(length).filter(|(_, slot)| slot.is_some()).collect();
    ops.extend(behind.into_iter().rev().map(|(index, _)| Op::DeleteSlot(SlotKey { list, index })));
}

pub(super) fn plan_sources(
    list: u32,
    current: Option<&BTreeSet<SourceKey>>,
    wanted: Option<&BTreeSet<Range>>,
    ops: &mut Vec<Op>,
) {
    if current.is_none() && wanted.is_none() {
        return;
    }
    let key = |range: &Range| SourceKey {
        prefix_bits: u32::BITS + range.prefix_bits,
        data: SourceData { list: list.to_be_bytes(), address: range.first },
    };
    let wanted: BTreeSet<_> = wanted.into_iter().flatten().map(key).collect();
    let none = BTreeSet::new();
    let current = current.unwrap_or(&none);
    ops.extend(wanted.difference(current).map(|key| Op::PutSource(*key)));
    ops.extend(current.difference(&wanted).map(|key| Op::DeleteSource(*key)));
}
