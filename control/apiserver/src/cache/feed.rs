//! Owns how the cache follows the store: the first load, one watch, and a reload when the watch can't resume.

use super::{Cache, Item, Objects};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use weft_control_store::{Error, Event, KeyValue, Range, Revision, Store, Watch};

/// The prefix of every object in the store.
pub(crate) const PREFIX: &str = "/registry/";
/// Keys per page of the first load: bounds memory without many round trips.
const PAGE: usize = 500;
/// Pause before the store is asked again after an error.
const RETRY: Duration = Duration::from_millis(200);

/// Why the cache couldn't be filled.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The store refused a read.
    #[error("the cache couldn't be loaded from the store")]
    Load(#[source] Error),
    /// The store refused the watch.
    #[error("the store couldn't be watched")]
    Watch(#[source] Error),
}

enum Put {
    Set(usize, Arc<Item>),
    Gone(usize, String, u64),
}

impl Cache {
    /// Fills the cache with all objects at one revision. What watches could resume from is forgotten.
    pub(crate) async fn load(&self, store: &dyn Store) -> Result<(), FeedError> {
        let mut fresh: Vec<Objects> = self.slots.iter().map(|_slot| Objects::new_sync()).collect();
        let mut range = Range::prefix(PREFIX);
        let mut revision = Revision(0);
        loop {
            let page = store.range(range.clone(), revision, PAGE).await.map_err(FeedError::Load)?;
            revision = page.revision;
            for kv in &page.items {
                if let Some((resource, item)) = self.decode(kv) {
                    fresh[resource].insert_mut(item.key.clone(), item);
                }
            }
            match page.items.last() {
                // The smallest key after the last one.
                Some(last) if page.more => range.start = format!("{}\0", last.key),
                _ => break,
            }
        }
        let mut gate = self.gate.write();
        for (cell, objects) in self.slots.iter().zip(fresh) {
            let mut slot = cell.slot.write();
            slot.objects = objects;
            slot.changes.clear();
            slot.change_bytes = 0;
            slot.floor = revision.0;
            slot.newest = revision.0;
            cell.changed.send_replace(revision.0);
        }
        *gate = revision.0;
        drop(gate);
        self.applied.send_replace(revision.0);
        Ok(())
    }

    /// Follows the store until `shutdown`.
    pub(crate) async fn follow(&self, store: Arc<dyn Store>, shutdown: CancellationToken) {
        while !shutdown.is_cancelled() {
            let outcome = tokio::select! {
                () = shutdown.cancelled() => return,
                outcome = self.follow_once(store.as_ref()) => outcome,
            };
            let Err(error) = outcome else { continue };
            tracing::warn!(error = %Chain(&error), "the watch of the store broke; it is resumed");
            if matches!(&error, FeedError::Watch(Error::Compacted { .. } | Error::Future { .. }))
                && let Err(error) = self.load(store.as_ref()).await
            {
                tracing::warn!(error = %Chain(&error), "the cache couldn't be reloaded; it is retried");
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    async fn follow_once(&self, store: &dyn Store) -> Result<(), FeedError> {
        use futures::StreamExt;
        let after = Revision(self.revision());
        let mut watch: Watch = store.watch(Range::prefix(PREFIX), after).await.map_err(FeedError::Watch)?;
        while let Some(batch) = watch.next().await {
            let batch = batch.map_err(FeedError::Watch)?;
            self.apply(batch.revision.0, &batch.events);
        }
        Ok(())
    }

    /// Applies whole revisions. Parsing is done before readers are held up.
    pub(super) fn apply(&self, revision: u64, events: &[Event]) {
        let puts: Vec<Put> = events.iter().filter_map(|event| self.read_event(event)).collect();
        let mut touched: Vec<(usize, u64)> = Vec::new();
        {
            let mut gate = self.gate.write();
            if revision < *gate {
                return;
            }
            for put in puts {
                match put {
                    Put::Set(resource, item) => {
                        touched.push((resource, item.revision));
                        self.slots[resource].slot.write().put(item);
                    }
                    Put::Gone(resource, key, revision) => {
                        touched.push((resource, revision));
                        self.slots[resource].slot.write().delete(&key, revision);
                    }
                }
            }
            *gate = revision;
        }
        for (resource, revision) in touched {
            self.slots[resource].changed.send_replace(revision);
        }
        self.applied.send_replace(revision);
    }

    fn read_event(&self, event: &Event) -> Option<Put> {
        match event {
            Event::Put { kv, .. } => self.decode(kv).map(|(resource, item)| Put::Set(resource, item)),
            Event::Delete { key, revision, .. } => {
                let (resource, key) = self.resources.by_store_key(key)?;
                Some(Put::Gone(resource.id, key.to_owned(), revision.0))
            }
        }
    }

    fn decode(&self, kv: &KeyValue) -> Option<(usize, Arc<Item>)> {
        // Keys of no served resource are kept in the store: another version of weft may serve them.
        let (resource, key) = self.resources.by_store_key(&kv.key)?;
        match Item::decode(resource.storage, key, kv.mod_revision.0, &kv.value) {
            Ok(item) => Some((resource.id, Arc::new(item))),
            Err(error) => {
                tracing::error!(error = %Chain(&error), key = kv.key, "a stored object can't be read");
                None
            }
        }
    }
}

/// Prints an error with its sources.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
