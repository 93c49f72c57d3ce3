//! Which Service a slice belongs to. The slice's name stands in the Service's record and nowhere else: here is only where to look.

use std::hash::{BuildHasher as _, RandomState};

use hashbrown::HashTable;

use crate::rows::Place;

/// A slice, by half of its name's hash, and the Service that it is said to be of.
#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: u32,
    service: Place,
}

/// All slices. `is_of` tells whether a Service has the slice that is asked for: others may have the same hash.
#[derive(Debug, Default)]
pub(super) struct Owners {
    entries: HashTable<Entry>,
    hasher: RandomState,
}

impl Owners {
    fn hash(&self, namespace: &str, name: &str) -> u32 {
        // What is lost is only made up for by more calls of `is_of`.
        (self.hasher.hash_one((namespace, name)) >> 32) as u32
    }

    /// The Service of a slice.
    pub(super) fn get(&self, namespace: &str, name: &str, is_of: impl Fn(Place) -> bool) -> Option<Place> {
        let hash = self.hash(namespace, name);
        let found = self.entries.find(spread(hash), |entry| entry.hash == hash && is_of(entry.service));
        found.map(|entry| entry.service)
    }

    /// Enters a slice that nobody has yet.
    pub(super) fn insert(&mut self, namespace: &str, name: &str, service: Place) {
        let hash = self.hash(namespace, name);
        self.entries.insert_unique(spread(hash), Entry { hash, service }, |entry| spread(entry.hash));
    }

    /// Removes the slice of a Service.
    pub(super) fn remove(&mut self, namespace: &str, name: &str, service: Place) {
        let hash = self.hash(namespace, name);
        let same = |entry: &Entry| entry.hash == hash && entry.service == service;
        if let Ok(entry) = self.entries.find_entry(spread(hash), same) {
            entry.remove();
        }
    }
}

/// The table chooses by the lowest bits and tells apart by the highest.
fn spread(hash: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(hash)
}
