//! One map: what it should say, what it says, and where the two differ.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::hash::Hash;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::maps::PolicyTable;
use crate::maps::{MapError, MapSet};

/// What may stand in a map.
pub trait Plain: Copy + Eq + Debug + IntoBytes + FromBytes + Immutable {}
impl<T: Copy + Eq + Debug + IntoBytes + FromBytes + Immutable> Plain for T {}

/// A map's two sides.
#[derive(Debug)]
pub struct Mirror<K, V> {
    table: PolicyTable,
    wanted: HashMap<K, V>,
    written: HashMap<K, V>,
    /// Keys that may differ.
    dirty: BTreeSet<K>,
}

impl<K: Plain + Ord + Hash, V: Plain> Mirror<K, V> {
    /// An empty map.
    #[must_use]
    pub fn new(table: PolicyTable) -> Self {
        Self { table, wanted: HashMap::new(), written: HashMap::new(), dirty: BTreeSet::new() }
    }

    /// Takes in what the map says already. Nothing is wanted yet, so all of it would go; see [`Mirror::clear`].
    ///
    /// # Errors
    /// If it can't be read.
    pub fn adopt(&mut self, maps: &mut dyn MapSet<PolicyTable>) -> Result<(), MapError> {
        for (key, value) in maps.dump(self.table)? {
            if let (Ok(key), Ok(value)) = (K::read_from_bytes(&key), V::read_from_bytes(&value)) {
                self.written.insert(key, value);
                self.dirty.insert(key);
            }
        }
        Ok(())
    }

    /// What it should say of a key.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<&V> {
        self.wanted.get(key)
    }

    /// Entries that it should have.
    #[must_use]
    pub fn wanted(&self) -> &HashMap<K, V> {
        &self.wanted
    }

    /// Wants an entry.
    pub fn put(&mut self, key: K, value: V) {
        if self.wanted.insert(key, value) != Some(value) {
            self.dirty.insert(key);
        }
    }

    /// Wants no such entry.
    pub fn remove(&mut self, key: &K) {
        if self.wanted.remove(key).is_some() {
            self.dirty.insert(*key);
        }
    }

    /// Whether the map lags behind.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Writes the entries that are wanted and differ.
    ///
    /// # Errors
    /// If one fails; it and those behind it stay to be done.
    pub fn write(&mut self, maps: &mut dyn MapSet<PolicyTable>) -> Result<(), MapError> {
        let (mut keys, mut entries) = (Vec::new(), Vec::new());
        self.dirty.retain(|key| match self.wanted.get(key) {
            Some(value) if self.written.get(key) == Some(value) => false,
            Some(value) => {
                keys.push((*key, *value));
                entries.push((key.as_bytes().to_vec(), value.as_bytes().to_vec()));
                true
            }
            None => true,
        });
        let result = maps.update(self.table, &entries);
        let done = result.as_ref().map_or_else(|error| error.done, |()| keys.len());
        for (key, value) in keys.into_iter().take(done) {
            self.dirty.remove(&key);
            self.written.insert(key, value);
        }
        result
    }

    /// Removes the entries that are not wanted.
    ///
    /// # Errors
    /// If one fails; it and those behind it stay to be done.
    pub fn clear(&mut self, maps: &mut dyn MapSet<PolicyTable>) -> Result<(), MapError> {
        self.dirty.retain(|key| self.wanted.contains_key(key) || self.written.contains_key(key));
        let gone: Vec<K> = self.dirty.iter().filter(|key| !self.wanted.contains_key(key)).copied().collect();
        if gone.is_empty() {
            return Ok(());
        }
        let keys: Vec<_> = gone.iter().map(|key| key.as_bytes().to_vec()).collect();
        let result = maps.delete(self.table, &keys);
        let done = result.as_ref().map_or_else(|error| error.done, |()| gone.len());
        for key in gone.into_iter().take(done) {
            self.dirty.remove(&key);
            self.written.remove(&key);
        }
        result
    }
}
