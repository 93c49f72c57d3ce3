//! The store's contract: a revisioned key-value space with the semantics of etcd v3, and its backends.
//!
//! Keys are UTF-8 paths such as `/registry/pods/default/web-1`. Every committed transaction gets the next
//! revision; a key's `mod_revision` is the revision of its last write. Revisions start at 1 and never repeat.
//!
//! Two backends keep this contract: [`embedded`], for one API server, and [`etcd`], for several. The functions in
//! `contract` are run against both.
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "contract"))]
pub mod contract;
pub mod embedded;
pub mod etcd;
mod limits;

pub use limits::{MAX_KEY_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES};

use bytes::Bytes;
use futures::stream::BoxStream;

/// A store revision. 0 stands for "none yet" or, in a read, "the newest".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

/// A key with its value and the revisions that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The whole key.
    pub key: String,
    /// The value as it was put.
    pub value: Bytes,
    /// Revision at which the key was created (again, after a deletion).
    pub create_revision: Revision,
    /// Revision of the last put.
    pub mod_revision: Revision,
}

/// What must hold for a transaction to be carried out; all conditions of a transaction are joined by "and".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The key doesn't exist.
    Absent(String),
    /// The key exists and its last write has this revision.
    ModRevision(String, Revision),
}

/// One write of a transaction. A transaction names each key at most once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Create or replace.
    Put {
        /// Key to write.
        key: String,
        /// Its new value.
        value: Bytes,
    },
    /// Delete; no error if the key doesn't exist.
    Delete {
        /// Key to delete.
        key: String,
    },
}

/// The outcome of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// All conditions held; everything is durable, at this revision. A transaction that changed nothing
    /// (deletes of absent keys) answers the current revision.
    Committed(Revision),
    /// A condition didn't hold and nothing was written; the current state of each condition's key, in order.
    Conflict(Vec<Option<KeyValue>>),
}

/// A range of keys: `start` included, `end` excluded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// First key.
    pub start: String,
    /// First key past the range; `None` is unbounded.
    pub end: Option<String>,
}

impl Range {
    /// All keys that begin with `prefix`.
    pub fn prefix(prefix: &str) -> Self {
        // Keys are paths: their last byte is never the last code point, so a successor exists.
        let mut end: Vec<char> = prefix.chars().collect();
        while let Some(last) = end.pop() {
            if let Some(next) = char::from_u32(last as u32 + 1) {
                end.push(next);
                break;
            }
        }
        let end: String = end.into_iter().collect();
        Self { start: prefix.to_owned(), end: (!end.is_empty()).then_some(end) }
    }
}

/// A page of a range read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Revision that the read saw.
    pub revision: Revision,
    /// The keys in order.
    pub items: Vec<KeyValue>,
    /// Whether keys of the range were left off because of the limit.
    pub more: bool,
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key was created or replaced.
    Put {
        /// The new state.
        kv: KeyValue,
        /// The state before, unless the key is new.
        prev: Option<KeyValue>,
    },
    /// The key was deleted.
    Delete {
        /// The key.
        key: String,
        /// Revision of the deletion.
        revision: Revision,
        /// The state before.
        prev: Option<KeyValue>,
    },
}

/// All events of one or more whole revisions, in order; never a part of a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Everything up to and including this revision has been delivered, in this watch's range.
    /// A batch without events only says so (progress).
    pub revision: Revision,
    /// The events, in order of revision.
    pub events: Vec<Event>,
}

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The revision asked for has been compacted away.
    #[error("revision {requested:?} has been compacted; the oldest retained is {oldest:?}")]
    Compacted {
        /// What was asked for.
        requested: Revision,
        /// Oldest revision that can still be read or watched from.
        oldest: Revision,
    },
    /// The revision asked for isn't there yet.
    #[error("revision {requested:?} is in the future; the current one is {current:?}")]
    Future {
        /// What was asked for.
        requested: Revision,
        /// The newest revision.
        current: Revision,
    },
    /// A request that the store can't take: an empty key, a key twice in a transaction, a value over the bound.
    #[error("invalid request to the store: {0}")]
    Invalid(&'static str),
    /// A watcher that didn't keep up was dropped; watch again from its last revision.
    #[error("the watcher fell behind and was dropped")]
    Lagged,
    /// The backend is stopping or can't be reached; the outcome of a write is unknown.
    #[error("the store is unavailable while {during}")]
    Unavailable {
        /// What was being done.
        during: &'static str,
        /// What the backend said.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// Data on disk can't be read back; a person must act.
    #[error("the store is damaged: {0}")]
    Damaged(String),
}

/// A stream of batches. It ends after the first error.
pub type Watch = BoxStream<'static, Result<Batch, Error>>;

/// A revisioned key-value store with the semantics of etcd v3. Cheap to share behind an `Arc`.
#[async_trait::async_trait]
pub trait Store: Send + Sync + 'static {
    /// Carries out `ops` atomically if all `conditions` hold. Returns only when the outcome is durable.
    async fn txn(&self, conditions: Vec<Condition>, ops: Vec<Op>) -> Result<TxnOutcome, Error>;

    /// Reads one key, linearizably.
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error>;

    /// Reads a range at `revision` (0: the newest, linearizably); at most `limit` keys (0: all).
    async fn range(&self, range: Range, revision: Revision, limit: usize) -> Result<Page, Error>;

    /// Watches a range for changes *after* `after` (etcd's start revision less one). 0 means from now on.
    /// The first batch, possibly empty, arrives at once and names the revision that the watch starts behind.
    async fn watch(&self, range: Range, after: Revision) -> Result<Watch, Error>;

    /// The newest durable revision, linearizably.
    async fn current_revision(&self) -> Result<Revision, Error>;

    /// Forgets what was superseded at or before `revision`. Reads and watches below it then answer `Compacted`.
    async fn compact(&self, revision: Revision) -> Result<(), Error>;
}
