//! Pods of this node that packets can be handed to directly: the map of them, kept by the difference.

use std::collections::BTreeMap;

use weft_ebpf_abi::{Address, LocalPod, names};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::maps::{Kind, MapError, MapSet};

/// The one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LocalTable;

impl Kind for LocalTable {
    fn name(self) -> &'static str {
        names::LOCAL_PODS
    }
}

/// What the map says.
#[derive(Debug)]
pub struct LocalPods<M> {
    maps: M,
    written: BTreeMap<Address, LocalPod>,
}

impl<M: MapSet<LocalTable>> LocalPods<M> {
    /// With what an earlier agent left in the map.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn adopt(mut maps: M) -> Result<Self, MapError> {
        let mut written = BTreeMap::new();
        for (key, value) in maps.dump(LocalTable)? {
            if let (Ok(key), Ok(value)) = (Address::read_from_bytes(&key), LocalPod::read_from_bytes(&value))
            {
                written.insert(key, value);
            }
        }
        Ok(Self { maps, written })
    }

    /// Brings the map to what is wanted. An entry of the same device keeps its note that flows were translated; that of another pod
    /// begins without. Entries of a pod that is gone go first: its address may be another's.
    ///
    /// # Errors
    /// If an entry fails: it stays to be done.
    pub fn sync(&mut self, wanted: &BTreeMap<Address, LocalPod>) -> Result<(), MapError> {
        let gone: Vec<Address> =
            self.written.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        if !gone.is_empty() {
            let keys: Vec<_> = gone.iter().map(|key| key.as_bytes().to_vec()).collect();
            self.maps.delete(LocalTable, &keys)?;
            self.written.retain(|key, _| wanted.contains_key(key));
        }
        let changed: Vec<(Address, LocalPod)> =
            wanted.iter().filter_map(|(key, pod)| Some((*key, self.change(key, pod)?))).collect();
        if changed.is_empty() {
            return Ok(());
        }
        let bytes = |(key, pod): &(Address, LocalPod)| (key.as_bytes().to_vec(), pod.as_bytes().to_vec());
        let entries: Vec<_> = changed.iter().map(bytes).collect();
        self.maps.update(LocalTable, &entries)?;
        self.written.extend(changed);
        Ok(())
    }

    /// What is to be written; `None` for what stands there.
    fn change(&self, key: &Address, wanted: &LocalPod) -> Option<LocalPod> {
        match self.written.get(key) {
            Some(there) if there.ifindex == wanted.ifindex => {
                let same = LocalPod { translated: wanted.translated, ..*there } == *wanted;
                // The programs may have noted something since: who looks once more than he must errs on the right side.
                (!same).then_some(LocalPod { translated: [1, 0], ..*wanted })
            }
            Some(_) | None => Some(*wanted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::memory::MemoryMaps;

    fn pod(ifindex: u32, flags: u32) -> LocalPod {
        LocalPod { ifindex, flags, mac: [2, 0, 0, 0, 0, 1], translated: [0, 0] }
    }

    fn there(local: &LocalPods<MemoryMaps<LocalTable>>) -> BTreeMap<Address, LocalPod> {
        let entries = local.maps.tables[&LocalTable].iter();
        entries
            .map(|(k, v)| (Address::read_from_bytes(k).unwrap(), LocalPod::read_from_bytes(v).unwrap()))
            .collect()
    }

    #[test]
    fn only_differences_are_written_and_notes_are_kept() {
        let [a, b] = [Address::v4([10, 42, 0, 2]), Address::v4([10, 42, 0, 3])];
        let mut local = LocalPods::adopt(MemoryMaps::default()).unwrap();
        let wanted = BTreeMap::from([(a, pod(5, 0)), (b, pod(6, 0))]);
        local.sync(&wanted).unwrap();
        assert_eq!(there(&local), wanted);
        // What a program does.
        let noted = LocalPod { translated: [1, 0], ..pod(5, 0) };
        local.maps.update(LocalTable, &[(a.as_bytes().to_vec(), noted.as_bytes().to_vec())]).unwrap();
        let changes = local.maps.changes;

        let mut local = LocalPods::adopt(local.maps).unwrap();
        local.sync(&wanted).unwrap();
        assert_eq!(local.maps.changes, changes, "a new agent finds all as it should be");
        let queued = BTreeMap::from([(a, pod(5, 1)), (b, pod(6, 0))]);
        local.sync(&queued).unwrap();
        assert_eq!(there(&local)[&a], LocalPod { flags: 1, ..noted });
        assert_eq!(local.maps.changes, changes + 1);
        let moved = BTreeMap::from([(a, pod(7, 0))]);
        local.sync(&moved).unwrap();
        assert_eq!(there(&local), moved, "another pod begins without a note");
        local.sync(&BTreeMap::new()).unwrap();
        assert!(there(&local).is_empty());
    }

    #[test]
    fn what_fails_is_done_later() {
        let mut maps = MemoryMaps::default();
        maps.capacity.insert(LocalTable, 0);
        let mut local = LocalPods::adopt(maps).unwrap();
        let wanted = BTreeMap::from([(Address::v4([10, 42, 0, 2]), pod(5, 0))]);
        local.sync(&wanted).unwrap_err();
        local.maps.capacity.clear();
        local.sync(&wanted).unwrap();
        assert_eq!(there(&local), wanted);
    }
}
