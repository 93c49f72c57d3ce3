//! The maps of policy behind one trait: the kernel's, and ones in memory that fail when told to.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use weft_ebpf_abi::names;

use crate::maps::{Entry, MapError};
use crate::sys;

/// A map that the planner keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyTable {
    /// What holds for a pod.
    Pods,
    /// Identities of pods' addresses.
    Identities,
    /// Identities of ranges.
    Ranges,
    /// Rules.
    Rules,
}

impl PolicyTable {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Pods, Self::Identities, Self::Ranges, Self::Rules];

    /// Name of the map.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pods => names::POLICY_PODS,
            Self::Identities => names::IDENTITIES,
            Self::Ranges => names::RANGES,
            Self::Rules => names::RULES,
        }
    }
}

/// A set of such maps.
pub trait PolicyMaps {
    /// Sets entries, in order, and stops at the first that fails.
    fn update(&mut self, table: PolicyTable, entries: &[Entry]) -> Result<(), MapError>;
    /// Removes keys, in order, and stops at the first that fails; one that is not there counts as removed.
    fn delete(&mut self, table: PolicyTable, keys: &[Vec<u8>]) -> Result<(), MapError>;
    /// All entries, in no order.
    fn dump(&mut self, table: PolicyTable) -> Result<Vec<Entry>, MapError>;
}

fn error(op: &'static str, table: PolicyTable, done: usize, source: io::Error) -> MapError {
    MapError { op, map: table.name(), done, source }
}

/// The kernel's maps.
#[derive(Debug, Default)]
pub struct KernelPolicyMaps {
    maps: HashMap<PolicyTable, (OwnedFd, usize, usize)>,
}

impl KernelPolicyMaps {
    /// Adds a table's map, with the sizes of its keys and values.
    pub fn insert(&mut self, table: PolicyTable, fd: OwnedFd, key_bytes: usize, value_bytes: usize) {
        self.maps.insert(table, (fd, key_bytes, value_bytes));
    }

    fn get(&self, op: &'static str, table: PolicyTable) -> Result<&(OwnedFd, usize, usize), MapError> {
        self.maps.get(&table).ok_or_else(|| error(op, table, 0, io::ErrorKind::NotFound.into()))
    }
}

fn length(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

impl PolicyMaps for KernelPolicyMaps {
    fn update(&mut self, table: PolicyTable, entries: &[Entry]) -> Result<(), MapError> {
        if entries.is_empty() {
            return Ok(());
        }
        let (fd, ..) = self.get("update", table)?;
        let keys: Vec<u8> = entries.iter().flat_map(|(key, _)| key.iter().copied()).collect();
        let values: Vec<u8> = entries.iter().flat_map(|(_, value)| value.iter().copied()).collect();
        let (done, result) = sys::update_batch(fd.as_fd(), &keys, &values, length(entries.len()));
        result.map_err(|source| error("update", table, done as usize, source))
    }

    fn delete(&mut self, table: PolicyTable, keys: &[Vec<u8>]) -> Result<(), MapError> {
        let (fd, ..) = self.get("delete", table)?;
        let mut from = 0;
        while from < keys.len() {
            let bytes: Vec<u8> = keys[from..].iter().flatten().copied().collect();
            let (done, result) = sys::delete_batch(fd.as_fd(), &bytes, length(keys.len() - from));
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

    fn dump(&mut self, table: PolicyTable) -> Result<Vec<Entry>, MapError> {
        let (fd, key_bytes, value_bytes) = self.get("read", table)?;
        sys::read_by_key(fd.as_fd(), *key_bytes, *value_bytes)
            .map_err(|source| error("read", table, 0, source))
    }
}

/// Maps in memory.
#[derive(Debug, Default)]
pub struct MemoryPolicyMaps {
    /// The entries.
    pub tables: BTreeMap<PolicyTable, BTreeMap<Vec<u8>, Vec<u8>>>,
    /// Entries changed so far: what a change costs.
    pub changes: usize,
    /// Of 100 entries, how many fail.
    pub fail_percent: u64,
    /// Failures so far.
    pub failures: usize,
    state: u64,
}

impl MemoryPolicyMaps {
    /// Maps that fail this share of their changes; the same seed fails the same ones.
    #[must_use]
    pub fn failing(seed: u64, percent: u64) -> Self {
        Self { state: seed | 1, fail_percent: percent, ..Self::default() }
    }

    /// Entries of a table.
    #[must_use]
    pub fn count(&self, table: PolicyTable) -> usize {
        self.tables.get(&table).map_or(0, BTreeMap::len)
    }

    /// xorshift64: which entry fails must be the same on every machine.
    fn fails(&mut self) -> bool {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let failed = self.state % 100 < self.fail_percent;
        self.failures += usize::from(failed);
        failed
    }
}

impl PolicyMaps for MemoryPolicyMaps {
    fn update(&mut self, table: PolicyTable, entries: &[Entry]) -> Result<(), MapError> {
        for (done, (key, value)) in entries.iter().enumerate() {
            if self.fails() {
                return Err(error("update", table, done, io::Error::from_raw_os_error(libc::ENOMEM)));
            }
            self.changes += 1;
            self.tables.entry(table).or_default().insert(key.clone(), value.clone());
        }
        Ok(())
    }

    fn delete(&mut self, table: PolicyTable, keys: &[Vec<u8>]) -> Result<(), MapError> {
        for (done, key) in keys.iter().enumerate() {
            if self.fails() {
                return Err(error("delete", table, done, io::Error::from_raw_os_error(libc::ENOMEM)));
            }
            self.changes += 1;
            self.tables.entry(table).or_default().remove(key);
        }
        Ok(())
    }

    fn dump(&mut self, table: PolicyTable) -> Result<Vec<Entry>, MapError> {
        Ok(self.tables.get(&table).map(|t| t.clone().into_iter().collect()).unwrap_or_default())
    }
}
