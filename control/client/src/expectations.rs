//! Owns the record of writes whose watch events a cache has not shown yet, so that a controller that works from a
//! stale cache never creates or deletes twice.

use crate::ObjectKey;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use tokio::time::Instant;

/// Upstream gives up on an expected event after five minutes; a lost watch event must not block an object for ever.
const TIMEOUT: Duration = Duration::from_secs(300);

struct Expected {
    creations: i64,
    deletions: HashSet<String>,
    since: Instant,
}

/// Expected creations (counted) and deletions (by uid) per owner.
#[derive(Default)]
pub struct Expectations {
    by_owner: Mutex<HashMap<ObjectKey, Expected>>,
}

impl Expectations {
    /// Says how many creations and which deletions are about to be sent.
    pub fn expect(&self, owner: &ObjectKey, creations: usize, deletions: impl IntoIterator<Item = String>) {
        let expected = Expected {
            creations: i64::try_from(creations).unwrap_or(i64::MAX),
            deletions: deletions.into_iter().collect(),
            since: Instant::now(),
        };
        self.by_owner.lock().insert(owner.clone(), expected);
    }

    /// A creation was seen, or failed.
    pub fn created(&self, owner: &ObjectKey, count: usize) {
        if let Some(expected) = self.by_owner.lock().get_mut(owner) {
            expected.creations -= i64::try_from(count).unwrap_or(i64::MAX);
        }
    }

    /// A deletion was seen, or failed.
    pub fn deleted(&self, owner: &ObjectKey, uid: &str) {
        if let Some(expected) = self.by_owner.lock().get_mut(owner) {
            expected.deletions.remove(uid);
        }
    }

    /// Whether the cache has shown everything (or it took too long), so that the owner may be synced.
    pub fn satisfied(&self, owner: &ObjectKey) -> bool {
        match self.by_owner.lock().get(owner) {
            Some(e) => (e.creations <= 0 && e.deletions.is_empty()) || e.since.elapsed() > TIMEOUT,
            None => true,
        }
    }

    /// The owner is gone.
    pub fn forget(&self, owner: &ObjectKey) {
        self.by_owner.lock().remove(owner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn are_satisfied_by_events_or_by_time() {
        let (all, owner) = (Expectations::default(), ObjectKey::new("a", "rs"));
        assert!(all.satisfied(&owner));
        all.expect(&owner, 2, ["u1".to_owned()]);
        all.created(&owner, 1);
        all.deleted(&owner, "u1");
        all.deleted(&owner, "u1");
        assert!(!all.satisfied(&owner));
        all.created(&owner, 1);
        assert!(all.satisfied(&owner));
        all.expect(&owner, 1, []);
        assert!(!all.satisfied(&owner));
        tokio::time::advance(TIMEOUT + Duration::from_secs(1)).await;
        assert!(all.satisfied(&owner));
    }
}
