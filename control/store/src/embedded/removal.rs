//! The background removal of what compaction gave up: small unsynced batches between the writer's, resumed after a crash.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;

use super::Shared;
use super::database::{ChunkBounds, fjall_error};
use super::format::{self, REMOVED_KEY};
use crate::{Error, Revision};

/// One batch's share of the log. A commit waits for at most one batch to enter memory, below a millisecond.
const CHUNK: ChunkBounds = ChunkBounds { records: 256, bytes: 1 << 20 };

/// Removes up to each compacted revision it is told, until the writer is gone or the store stops. Begins with what a crash
/// may have left of the last removal.
pub(super) fn run(shared: &Arc<Shared>, compacted: Revision, targets: &Receiver<Revision>) {
    let mut next = Some(compacted);
    while let Some(target) = next {
        if let Err(error) = remove(shared, target) {
            // Nothing is lost by it: the next compaction, or the next start, goes on from the same place.
            tracing::warn!(%error, "compacted revisions could not be removed; trying again at the next compaction");
        }
        next = targets.recv().ok().map(|target| targets.try_iter().last().unwrap_or(target));
    }
}

fn remove(shared: &Shared, target: Revision) -> Result<(), Error> {
    let mut removed = shared.db.view().removed()?;
    while removed < target && !shared.stopping.load(Ordering::Acquire) {
        removed = step(shared, removed, target)?;
    }
    Ok(())
}

/// Walks the changes of the next revisions: each gives up the version that it superseded, a deletion also itself.
/// Doing a step twice does no harm.
fn step(shared: &Shared, removed: Revision, target: Revision) -> Result<Revision, Error> {
    let db = &shared.db;
    let chunk = db.view().log(removed, target, CHUNK)?;
    let mut batch = db.db.batch();
    for (place, record) in &chunk.records {
        let own = record.put.is_none().then_some(*place);
        for gone in record.prev.into_iter().chain(own) {
            batch.remove(&db.log, gone.encode());
            batch.remove(&db.index, format::index_key(&record.key, gone.revision));
        }
    }
    batch.insert(&db.head, REMOVED_KEY, chunk.through.0.to_be_bytes());
    batch.commit().map_err(|error| fjall_error("removing compacted revisions", error))?;
    Ok(chunk.through)
}
