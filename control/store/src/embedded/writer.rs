//! The one thread that writes: takes what is queued, decides it in order, makes it durable with one sync, tells everybody.

use std::collections::HashMap;
use std::sync::Arc;

use fjall::{OwnedWriteBatch, PersistMode};
use tokio::sync::{mpsc, oneshot};

use super::Shared;
use super::database::{fjall_error, unavailable};
use super::format::{self, COMPACTED_KEY, Head, Place, REVISION_KEY, Record};
use crate::{Condition, Error, KeyValue, Op, Revision, TxnOutcome};

/// Most requests that share one sync. Bounds how long the first of them waits for the last.
const GROUP_REQUESTS: usize = 256;

/// A group takes no further request once it holds this many bytes of values.
const GROUP_BYTES: usize = 8 << 20;

pub(super) type Reply<T> = oneshot::Sender<Result<T, Error>>;

pub(super) enum Request {
    Txn { conditions: Vec<Condition>, ops: Vec<Op>, reply: Reply<TxnOutcome> },
    Compact { revision: Revision, reply: Reply<()> },
}

/// A request that has been decided and waits for the sync.
enum Decided {
    Txn(Reply<TxnOutcome>, TxnOutcome),
    Compact(Reply<()>),
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    removal: std::sync::mpsc::Sender<Revision>,
    revision: Revision,
    compacted: Revision,
    /// Set by a failed commit: what is on disk is unknown, so nothing more is written until the store is opened again.
    failed: bool,
}

/// What a group will write, and what its later requests must see of its earlier ones.
struct Group {
    batch: OwnedWriteBatch,
    revision: Revision,
    compacted: Revision,
    /// Keys changed so far: head and value, or deleted.
    states: HashMap<String, Option<(Head, KeyValue)>>,
    changes: Vec<(Place, Record)>,
    decided: Vec<Decided>,
    bytes: usize,
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        removal: std::sync::mpsc::Sender<Revision>,
        revision: Revision,
        compacted: Revision,
    ) -> Self {
        Self { shared, removal, revision, compacted, failed: false }
    }

    /// Runs until every sender of the queue is gone.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        while let Some(first) = queue.blocking_recv() {
            let mut group = self.group();
            self.decide(&mut group, first);
            while group.decided.len() < GROUP_REQUESTS
                && group.bytes < GROUP_BYTES
                && let Ok(next) = queue.try_recv()
            {
                self.decide(&mut group, next);
            }
            self.commit(group);
        }
        self.shared.hub.close();
    }

    fn group(&self) -> Group {
        let batch = self.shared.db.db.batch().durability(Some(PersistMode::SyncData));
        Group {
            batch,
            revision: self.revision,
            compacted: self.compacted,
            states: HashMap::new(),
            changes: Vec::new(),
            decided: Vec::new(),
            bytes: 0,
        }
    }

    fn decide(&self, group: &mut Group, request: Request) {
        match request {
            Request::Txn { conditions, ops, reply } => match self.decide_txn(group, &conditions, ops) {
                Ok(outcome) => group.decided.push(Decided::Txn(reply, outcome)),
                Err(error) => answer(reply, Err(error)),
            },
            Request::Compact { revision, reply } => {
                if revision > group.revision {
                    answer(reply, Err(Error::Future { requested: revision, current: group.revision }));
                    return;
                }
                if revision > group.compacted {
                    group.compacted = revision;
                    group.batch.insert(&self.shared.db.head, COMPACTED_KEY, revision.0.to_be_bytes());
                }
                group.decided.push(Decided::Compact(reply));
            }
        }
    }

    fn decide_txn(
        &self,
        group: &mut Group,
        conditions: &[Condition],
        ops: Vec<Op>,
    ) -> Result<TxnOutcome, Error> {
        for condition in conditions {
            let head = self.head(group, condition.key())?;
            if !condition.holds(head.map(|head| head.place.revision)) {
                let states = conditions.iter().map(|condition| self.kv(group, condition.key()));
                return Ok(TxnOutcome::Conflict(states.collect::<Result<_, _>>()?));
            }
        }
        // All reads come before the first write: a failed read leaves the group as it was.
        let heads: Vec<Option<Head>> =
            ops.iter().map(|op| self.head(group, op.key())).collect::<Result<_, _>>()?;
        let revision = Revision(group.revision.0 + 1);
        let mut ordinal = 0;
        for (op, head) in ops.into_iter().zip(heads) {
            if matches!(op, Op::Delete { .. }) && head.is_none() {
                continue;
            }
            self.write(group, Place { revision, ordinal }, op, head);
            ordinal += 1;
        }
        if ordinal > 0 {
            group.revision = revision;
        }
        Ok(TxnOutcome::Committed(group.revision))
    }

    fn write(&self, group: &mut Group, place: Place, op: Op, before: Option<Head>) {
        let db = &self.shared.db;
        let prev = before.map(|head| head.place);
        let (key, put) = match op {
            Op::Put { key, value } => {
                let create = before.map_or(place.revision, |head| head.create_revision);
                (key, Some((create, value)))
            }
            Op::Delete { key } => (key, None),
        };
        let head = put.as_ref().map(|(create, _)| Head { place, create_revision: *create });
        let record = Record { key: key.clone(), put, prev };
        let encoded = record.encode();
        group.bytes += encoded.len();
        group.batch.insert(&db.log, place.encode(), encoded);
        group.batch.insert(&db.index, format::index_key(&key, place.revision), format::encode_version(head));
        match head {
            Some(head) => group.batch.insert(&db.head, key.as_bytes(), head.encode()),
            None => group.batch.remove(&db.head, key.as_bytes()),
        }
        group.changes.push((place, record.clone()));
        group.states.insert(key, head.zip(record.into_kv(place.revision)));
    }

    fn head(&self, group: &Group, key: &str) -> Result<Option<Head>, Error> {
        match group.states.get(key) {
            Some(state) => Ok(state.as_ref().map(|(head, _)| *head)),
            None => self.shared.db.view().head(key),
        }
    }

    fn kv(&self, group: &Group, key: &str) -> Result<Option<KeyValue>, Error> {
        match group.states.get(key) {
            Some(state) => Ok(state.as_ref().map(|(_, kv)| kv.clone())),
            None => {
                let view = self.shared.db.view();
                view.head(key)?.map(|head| view.kv(head.place)).transpose()
            }
        }
    }

    fn commit(&mut self, group: Group) {
        let Group { mut batch, revision, compacted, changes, decided, .. } = group;
        let written = if self.failed {
            Err(Error::Unavailable { during: "writing: an earlier write failed", source: None })
        } else {
            if revision > self.revision {
                batch.insert(&self.shared.db.head, REVISION_KEY, revision.0.to_be_bytes());
            }
            batch.commit().map_err(|error| fjall_error("writing", error))
        };
        if let Err(error) = written {
            if !self.failed {
                tracing::error!(%error, "a commit failed; the store takes no more writes until it is opened again");
            }
            self.failed = true;
            for one in decided {
                one.answer(Err(Error::Unavailable { during: "writing", source: None }));
            }
            return;
        }
        if revision > self.revision {
            self.revision = revision;
            // Before the answers: whoever has one and then watches "from now on" starts behind it.
            self.shared.hub.publish(revision, &changes, &self.shared.db.view());
        }
        if compacted > self.compacted {
            self.compacted = compacted;
            if self.removal.send(compacted).is_err() {
                tracing::error!(
                    "the thread that removes compacted revisions has stopped; the disk will fill"
                );
            }
        }
        for one in decided {
            one.answer(Ok(()));
        }
    }
}

impl Decided {
    fn answer(self, written: Result<(), Error>) {
        match self {
            Self::Txn(reply, outcome) => answer(reply, written.map(|()| outcome)),
            Self::Compact(reply) => answer(reply, written),
        }
    }
}

/// The asker may have gone away; its transaction stands all the same.
fn answer<T>(reply: Reply<T>, result: Result<T, Error>) {
    drop(reply.send(result));
}

/// The error of an asker whose request was lost with the writer.
pub(super) fn stopped(error: oneshot::error::RecvError) -> Error {
    unavailable("writing: it is stopping", error)
}
