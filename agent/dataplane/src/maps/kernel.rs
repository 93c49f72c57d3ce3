//! The kernel's maps, as pinned by the loader.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::{Entry, Kind, MapError, MapSet, Table};
use crate::sys;

/// A map with the sizes of its entries.
#[derive(Debug)]
struct KernelMap {
    fd: OwnedFd,
    key_bytes: usize,
    value_bytes: usize,
}

/// The kernel's maps.
#[derive(Debug)]
pub struct KernelMaps<T = Table> {
    maps: HashMap<T, KernelMap>,
}

impl<T> Default for KernelMaps<T> {
    fn default() -> Self {
        Self { maps: HashMap::new() }
    }
}

impl<T: Kind> KernelMaps<T> {
    /// Adds a table's map.
    pub fn insert(&mut self, table: T, fd: OwnedFd, key_bytes: usize, value_bytes: usize) {
        self.maps.insert(table, KernelMap { fd, key_bytes, value_bytes });
    }

    fn get(&self, op: &'static str, table: T) -> Result<&KernelMap, MapError> {
        self.maps.get(&table).ok_or_else(|| error(op, table, 0, io::ErrorKind::NotFound.into()))
    }
}

fn error<T: Kind>(op: &'static str, table: T, done: usize, source: io::Error) -> MapError {
    MapError { op, map: table.name(), done, source }
}

fn length(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

impl<T: Kind> MapSet<T> for KernelMaps<T> {
    fn update(&mut self, table: T, entries: &[Entry]) -> Result<(), MapError> {
        if entries.is_empty() {
            return Ok(());
        }
        let map = self.get("update", table)?;
        let keys: Vec<u8> = entries.iter().flat_map(|(key, _)| key.iter().copied()).collect();
        let values: Vec<u8> = entries.iter().flat_map(|(_, value)| value.iter().copied()).collect();
        debug_assert_eq!(keys.len(), entries.len() * map.key_bytes);
        let (done, result) = sys::update_batch(map.fd.as_fd(), &keys, &values, length(entries.len()));
        result.map_err(|source| error("update", table, done as usize, source))
    }

    fn delete(&mut self, table: T, keys: &[Vec<u8>]) -> Result<(), MapError> {
        let map = self.get("delete", table)?;
        let mut from = 0;
        while from < keys.len() {
            let bytes: Vec<u8> = keys[from..].iter().flatten().copied().collect();
            let (done, result) = sys::delete_batch(map.fd.as_fd(), &bytes, length(keys.len() - from));
            from += done as usize;
            match result {
                Ok(()) => break,
                // The batch stops at a key that is not there: step over it.
                Err(source) if source.raw_os_error() == Some(libc::ENOENT) => from += 1,
                Err(source) => return Err(error("delete", table, from, source)),
            }
        }
        Ok(())
    }

    fn dump(&mut self, table: T) -> Result<Vec<Entry>, MapError> {
        let map = self.get("read", table)?;
        let (keys, values) = sys::read_all(map.fd.as_fd(), map.key_bytes, map.value_bytes)
            .map_err(|source| error("read", table, 0, source))?;
        let pairs = keys.chunks_exact(map.key_bytes).zip(values.chunks_exact(map.value_bytes));
        Ok(pairs.map(|(key, value)| (key.to_vec(), value.to_vec())).collect())
    }
}
