//! Owns the watch cache: every stored object as the bytes that clients get, fed by one watch of the store.
//!
//! One lock, the gate, orders batches and readers: whoever holds it for reading sees whole revisions only.
//! Objects live in persistent maps, so a snapshot is one reference count, and a list holds nothing up.

mod feed;
mod item;

pub use feed::FeedError;
pub(crate) use feed::{Chain, PREFIX};
pub(crate) use item::{Item, json_with_revision, object_value_bytes};

use crate::resources::Resources;
use parking_lot::RwLock;
use rpds::RedBlackTreeMapSync;
use std::collections::VecDeque;
use std::ops::Bound;
use std::sync::Arc;
use tokio::sync::watch;

/// Changes kept for watches that resume, per resource.
const MAX_CHANGES: usize = 2048;
/// Bytes of objects kept for the same, per resource; busy resources hit this one first.
const MAX_CHANGE_BYTES: usize = 1024 * 1024;
/// Never keep fewer changes than this, however large they are.
const MIN_CHANGES: usize = 64;

/// The objects of one resource, by `namespace/name` or `name`.
pub(crate) type Objects = RedBlackTreeMapSync<Arc<str>, Arc<Item>>;

/// A change of one object.
#[derive(Debug)]
pub(crate) struct Change {
    /// The revision that made it.
    pub(crate) revision: u64,
    /// The new state; for a deletion the last one with the deletion's revision.
    pub(crate) item: Arc<Item>,
    /// The state before; none for a creation.
    pub(crate) previous: Option<Arc<Item>>,
    /// Whether the object is gone.
    pub(crate) deleted: bool,
}

/// All objects of a resource at a revision.
#[derive(Clone)]
pub(crate) struct Snapshot {
    /// The revision that the snapshot shows.
    pub(crate) revision: u64,
    /// The objects.
    pub(crate) objects: Objects,
}

#[derive(Default)]
struct Slot {
    objects: Objects,
    changes: VecDeque<Arc<Change>>,
    change_bytes: usize,
    /// Every change after this revision is in `changes`.
    floor: u64,
    /// The revision of the newest change.
    newest: u64,
}

struct SlotCell {
    slot: RwLock<Slot>,
    changed: watch::Sender<u64>,
}

/// The cache of all resources.
pub(crate) struct Cache {
    resources: Arc<Resources>,
    slots: Vec<SlotCell>,
    /// The revision up to which everything is applied; written only with all slots consistent.
    gate: RwLock<u64>,
    applied: watch::Sender<u64>,
}

/// What a resumed watch finds.
pub(crate) enum Resume {
    /// The changes after the revision asked for, oldest first, and the revision reached.
    Changes(Vec<Arc<Change>>, u64),
    /// The revision asked for is older than what is kept; the oldest that isn't is named.
    Expired(u64),
}

impl Cache {
    /// An empty cache.
    pub(crate) fn new(resources: Arc<Resources>) -> Self {
        let slots = resources
            .all()
            .iter()
            .map(|_resource| SlotCell { slot: RwLock::default(), changed: watch::Sender::new(0) })
            .collect();
        Self { resources, slots, gate: RwLock::new(0), applied: watch::Sender::new(0) }
    }

    /// The newest revision that the cache shows.
    pub(crate) fn revision(&self) -> u64 {
        *self.gate.read()
    }

    /// Waits until the cache shows `revision`.
    pub(crate) async fn wait_for(&self, revision: u64) {
        let mut applied = self.applied.subscribe();
        // The sender lives as long as the cache, so this can't fail while `self` is borrowed.
        let _ = applied.wait_for(|now| *now >= revision).await;
    }

    /// All objects of a resource.
    pub(crate) fn snapshot(&self, resource: usize) -> Snapshot {
        let gate = self.gate.read();
        let objects = self.slots[resource].slot.read().objects.clone();
        Snapshot { revision: *gate, objects }
    }

    /// One object.
    pub(crate) fn get(&self, resource: usize, key: &str) -> Option<Arc<Item>> {
        let _gate = self.gate.read();
        self.slots[resource].slot.read().objects.get(key).cloned()
    }

    /// The changes of a resource after `revision`.
    pub(crate) fn changes_after(&self, resource: usize, revision: u64) -> Resume {
        let gate = self.gate.read();
        let slot = self.slots[resource].slot.read();
        if revision < slot.floor {
            return Resume::Expired(slot.floor);
        }
        let from = slot.changes.partition_point(|change| change.revision <= revision);
        Resume::Changes(slot.changes.range(from..).cloned().collect(), *gate)
    }

    /// A signal that carries the revision of the resource's newest change.
    pub(crate) fn subscribe(&self, resource: usize) -> watch::Receiver<u64> {
        self.slots[resource].changed.subscribe()
    }

    /// The revision of the newest change of a resource; tells whether something derived from it is stale.
    pub(crate) fn newest_change(&self, resource: usize) -> u64 {
        self.slots[resource].slot.read().newest
    }

    /// Number of objects of a resource.
    pub(crate) fn count(&self, resource: usize) -> usize {
        self.slots[resource].slot.read().objects.size()
    }

    /// The resources that the cache holds.
    pub(crate) fn resources(&self) -> &Arc<Resources> {
        &self.resources
    }
}

/// The objects of `namespace` in key order, starting after `after`; all namespaces if it is empty.
pub(crate) fn in_namespace<'a>(
    objects: &'a Objects,
    namespace: &str,
    after: Option<&str>,
) -> impl Iterator<Item = &'a Arc<Item>> {
    let prefix = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
    let start = match after {
        Some(key) if key >= prefix.as_str() => Bound::Excluded(key.to_owned()),
        _ => Bound::Included(prefix.clone()),
    };
    // The range is collected by reference: the map's range borrows its bounds.
    let bounds = (start.as_ref().map(String::as_str), Bound::Unbounded);
    let found: Vec<&'a Arc<Item>> = objects
        .range::<str, _>(bounds)
        .take_while(|(key, _)| key.starts_with(&prefix))
        .map(|(_, item)| item)
        .collect();
    found.into_iter()
}

impl Slot {
    fn put(&mut self, item: Arc<Item>) {
        let previous = self.objects.get(&item.key).cloned();
        self.objects.insert_mut(item.key.clone(), item.clone());
        self.record(Change { revision: item.revision, item, previous, deleted: false });
    }

    fn delete(&mut self, key: &str, revision: u64) {
        let Some(previous) = self.objects.get(key).cloned() else { return };
        self.objects.remove_mut(key);
        let item = Arc::new(previous.at_revision(revision));
        self.record(Change { revision, item, previous: Some(previous), deleted: true });
    }

    fn record(&mut self, change: Change) {
        self.newest = change.revision;
        self.change_bytes += change.item.len();
        self.changes.push_back(Arc::new(change));
        while self.changes.len() > MAX_CHANGES
            || (self.change_bytes > MAX_CHANGE_BYTES && self.changes.len() > MIN_CHANGES)
        {
            let Some(oldest) = self.changes.pop_front() else { break };
            self.change_bytes -= oldest.item.len();
            self.floor = oldest.revision;
        }
    }
}

#[cfg(test)]
mod tests;
