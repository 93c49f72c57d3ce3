//! Maps that fail now and then, seeded: what the reconciler must live with.

use super::{Entry, Kind, MapError, MapSet};

/// Passes operations on, and fails a share of them entry by entry.
#[derive(Debug)]
pub struct FaultyMaps<M> {
    /// The maps behind.
    pub inner: M,
    state: u64,
    percent: u64,
    /// Failures so far.
    pub failures: usize,
}

impl<M> FaultyMaps<M> {
    /// Fails `percent` of all entries; the same seed fails the same ones.
    pub fn new(inner: M, seed: u64, percent: u64) -> Self {
        Self { inner, state: seed | 1, percent, failures: 0 }
    }

    /// xorshift64: which entry fails must be the same on every machine.
    fn fails(&mut self) -> bool {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let failed = self.state % 100 < self.percent;
        self.failures += usize::from(failed);
        failed
    }

    fn error<T: Kind>(op: &'static str, table: T, done: usize) -> MapError {
        let source = std::io::Error::from_raw_os_error(libc::ENOMEM);
        MapError { op, map: table.name(), done, source }
    }
}

impl<T: Kind, M: MapSet<T>> MapSet<T> for FaultyMaps<M> {
    fn update(&mut self, table: T, entries: &[Entry]) -> Result<(), MapError> {
        let good = entries.iter().position(|_| self.fails()).unwrap_or(entries.len());
        self.inner.update(table, &entries[..good])?;
        if good < entries.len() { Err(Self::error("update", table, good)) } else { Ok(()) }
    }

    fn delete(&mut self, table: T, keys: &[Vec<u8>]) -> Result<(), MapError> {
        let good = keys.iter().position(|_| self.fails()).unwrap_or(keys.len());
        self.inner.delete(table, &keys[..good])?;
        if good < keys.len() { Err(Self::error("delete", table, good)) } else { Ok(()) }
    }

    fn dump(&mut self, table: T) -> Result<Vec<Entry>, MapError> {
        self.inner.dump(table)
    }
}
