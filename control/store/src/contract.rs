//! The contract suite: what every backend must do, as functions over `&dyn Store`.
//!
//! Each function works below a prefix of its own, so that one store can serve them all, at the same time; functions that compact
//! are apart (`ALONE`), because compaction concerns the whole store.

mod compaction;
mod concurrency;
mod range;
mod txn;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;

use crate::{Batch, Condition, Error, Event, KeyValue, Op, Range, Revision, Store, TxnOutcome, Watch};

/// One function of the suite.
pub struct Case {
    /// What it is about.
    pub name: &'static str,
    /// Runs it; panics if the store breaks the contract.
    pub run: fn(Arc<dyn Store>) -> BoxFuture<'static, ()>,
}

macro_rules! cases {
    ($($(#[$doc:meta])* $list:ident: $($module:ident::$name:ident),+ $(,)?;)+) => {
        $($(#[$doc])* pub const $list: &[Case] = &[
            $(Case { name: stringify!($module::$name), run: |store| Box::pin($module::$name(store)) },)+
        ];)+
    };
}

cases! {
    /// Cases that may run side by side on one store.
    TOGETHER:
        txn::creates_updates_and_deletes, txn::applies_all_or_nothing, txn::answers_a_conflict_with_each_state,
        txn::changing_nothing_keeps_the_revision, txn::refuses_bad_requests, txn::recreation_starts_a_new_life,
        range::pages_in_key_order, range::reads_an_earlier_revision, range::refuses_the_future,
        range::bounds_are_start_inclusive_and_end_exclusive,
        watch::from_now_on_sees_only_what_follows, watch::from_a_revision_replays_then_goes_live,
        watch::keeps_a_revision_whole, watch::keeps_to_its_range, watch::refuses_the_future,
        concurrency::increments_are_never_lost, concurrency::creation_has_one_winner,
        concurrency::watchers_see_every_event_once;
    /// Cases that need the store to themselves.
    ALONE:
        compaction::forgets_below_and_keeps_above, compaction::keeps_the_newest_of_everything,
        compaction::is_repeatable_and_bounded, compaction::ends_a_watch_that_starts_below;
    /// For stores that tell an idle watch how far it is.
    PROGRESS: watch::tells_an_idle_watch_how_far_it_is;
}

/// Runs the cases one after the other, saying which.
pub async fn run(store: &Arc<dyn Store>, cases: &[Case]) {
    for case in cases {
        eprintln!("contract: {}", case.name);
        let one = tokio::time::timeout(Duration::from_secs(60), (case.run)(Arc::clone(store)));
        assert!(one.await.is_ok(), "{} didn't end", case.name);
    }
}

/// How long a watch may take to deliver what has been committed.
const SOON: Duration = Duration::from_secs(10);

fn put(key: &str, value: impl Into<Bytes>) -> Op {
    Op::Put { key: key.to_owned(), value: value.into() }
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.to_owned() }
}

fn absent(key: &str) -> Condition {
    Condition::Absent(key.to_owned())
}

fn at(key: &str, revision: Revision) -> Condition {
    Condition::ModRevision(key.to_owned(), revision)
}

async fn commit(store: &Arc<dyn Store>, conditions: Vec<Condition>, ops: Vec<Op>) -> Revision {
    match store.txn(conditions, ops).await.expect("the transaction is taken") {
        TxnOutcome::Committed(revision) => revision,
        TxnOutcome::Conflict(states) => panic!("unexpected conflict: {states:?}"),
    }
}

async fn conflict(store: &Arc<dyn Store>, conditions: Vec<Condition>, ops: Vec<Op>) -> Vec<Option<KeyValue>> {
    match store.txn(conditions, ops).await.expect("the transaction is taken") {
        TxnOutcome::Committed(revision) => panic!("committed at {revision:?} against its conditions"),
        TxnOutcome::Conflict(states) => states,
    }
}

async fn get(store: &Arc<dyn Store>, key: &str) -> Option<KeyValue> {
    store.get(key).await.expect("the key can be read")
}

fn kv(key: &str, value: &'static str, create: Revision, modified: Revision) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Bytes::from_static(value.as_bytes()),
        create_revision: create,
        mod_revision: modified,
    }
}

/// Opens a watch and takes its first batch; gives the revision that it starts behind.
async fn open(store: &Arc<dyn Store>, range: Range, after: Revision) -> (Watch, Revision, Vec<Event>) {
    let mut watch = store.watch(range, after).await.expect("the watch opens");
    let first = next(&mut watch).await;
    (watch, first.revision, first.events)
}

async fn next(watch: &mut Watch) -> Batch {
    let next = tokio::time::timeout(SOON, watch.next()).await.expect("a batch arrives");
    next.expect("the watch goes on").expect("the watch is well")
}

/// Collects events until there are `count` of them; checks that batches are whole, in order, and never repeat.
async fn events(watch: &mut Watch, from: Revision, count: usize) -> Vec<Event> {
    let mut seen: Vec<Event> = Vec::new();
    let mut last = from;
    while seen.len() < count {
        let batch = next(watch).await;
        assert!(batch.revision >= last, "progress went back from {last:?} to {:?}", batch.revision);
        for event in batch.events {
            assert!(event.revision() > last, "{event:?} was part of what ended at {last:?}");
            assert!(event.revision() <= batch.revision);
            assert!(seen.last().is_none_or(|before| before.revision() <= event.revision()));
            seen.push(event);
        }
        last = batch.revision;
    }
    assert_eq!(seen.len(), count, "more events than were made: {seen:?}");
    seen
}

/// The error of a watch that can't be served, whether it comes at once or in the stream.
async fn watch_error(store: &Arc<dyn Store>, range: Range, after: Revision) -> Error {
    match store.watch(range, after).await {
        Err(error) => error,
        Ok(mut watch) => loop {
            let next = tokio::time::timeout(SOON, watch.next()).await.expect("the error arrives");
            match next.expect("the watch ends with an error") {
                Err(error) => return error,
                Ok(batch) => {
                    assert!(batch.events.is_empty(), "events of a watch that can't be served: {batch:?}")
                }
            }
        },
    }
}
