//! Maps in memory.

use std::collections::{BTreeMap, HashMap};

use super::{Entry, Kind, MapError, MapSet, Table};

/// Maps in memory.
#[derive(Debug)]
pub struct MemoryMaps<T = Table> {
    /// The entries.
    pub tables: HashMap<T, BTreeMap<Vec<u8>, Vec<u8>>>,
    /// Calls so far: what a change costs.
    pub calls: usize,
    /// Entries changed so far.
    pub changes: usize,
    /// Entries that fit in a map, if that is less than all.
    pub capacity: HashMap<T, usize>,
}

impl<T> Default for MemoryMaps<T> {
    fn default() -> Self {
        Self { tables: HashMap::new(), calls: 0, changes: 0, capacity: HashMap::new() }
    }
}

impl<T: Kind> MapSet<T> for MemoryMaps<T> {
    fn update(&mut self, table: T, entries: &[Entry]) -> Result<(), MapError> {
        self.calls += 1;
        self.changes += entries.len();
        let capacity = self.capacity.get(&table).copied().unwrap_or(usize::MAX);
        let map = self.tables.entry(table).or_default();
        for (done, (key, value)) in entries.iter().enumerate() {
            if map.len() >= capacity && !map.contains_key(key) {
                let source = std::io::Error::from_raw_os_error(libc::E2BIG);
                return Err(MapError { op: "update", map: table.name(), done, source });
            }
            map.insert(key.clone(), value.clone());
        }
        Ok(())
    }

    fn delete(&mut self, table: T, keys: &[Vec<u8>]) -> Result<(), MapError> {
        self.calls += 1;
        self.changes += keys.len();
        let entries = self.tables.entry(table).or_default();
        for key in keys {
            entries.remove(key);
        }
        Ok(())
    }

    fn dump(&mut self, table: T) -> Result<Vec<Entry>, MapError> {
        Ok(self.tables.get(&table).map(|t| t.clone().into_iter().collect()).unwrap_or_default())
    }
}
