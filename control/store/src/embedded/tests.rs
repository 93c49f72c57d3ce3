//! The embedded store: the contract, a model, crashes, locks, bounds.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use proptest::prelude::*;

use super::*;
use crate::contract;

fn open(path: &Path) -> EmbeddedStore {
    EmbeddedStore::open(path, Options::default()).unwrap()
}

fn put(key: &str, value: impl Into<Bytes>) -> Op {
    Op::Put { key: key.to_owned(), value: value.into() }
}

async fn commit(store: &EmbeddedStore, ops: Vec<Op>) -> Revision {
    match store.txn(vec![], ops).await.unwrap() {
        TxnOutcome::Committed(revision) => revision,
        TxnOutcome::Conflict(states) => panic!("{states:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(open(folder.path()));
    contract::run(&store, contract::TOGETHER).await;
    contract::run(&store, contract::PROGRESS).await;
    contract::run(&store, contract::ALONE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract_with_the_smallest_queues() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { queue: 1, memtable_bytes: 64 << 10, cache_bytes: 0, ..Options::default() };
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(folder.path(), options).unwrap());
    contract::run(&store, contract::TOGETHER).await;
    contract::run(&store, contract::ALONE).await;
}

#[tokio::test]
async fn a_second_opener_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let before = Instant::now();
    let second = EmbeddedStore::open(folder.path(), Options::default());
    assert!(matches!(second, Err(Error::Unavailable { .. })));
    assert!(before.elapsed() < Duration::from_millis(100));
    drop(store);
    open(folder.path());
}

#[tokio::test]
async fn a_half_made_database_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("db.new/keyspaces")).unwrap();
    std::fs::write(folder.path().join("db.new/0.jnl"), b"").unwrap();
    let store = open(folder.path());
    commit(&store, vec![put("/a", "1")]).await;
    assert!(!folder.path().join("db.new").exists());
}

#[tokio::test]
async fn a_watcher_that_does_not_keep_up_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { watch_buffer: 4, ..Options::default() };
    let store = EmbeddedStore::open(folder.path(), options).unwrap();
    let mut watch = store.watch(Range::prefix("/"), Revision(0)).await.unwrap();
    let mut last = watch.next().await.unwrap().unwrap().revision;
    for n in 0..10 {
        commit(&store, vec![put("/a", n.to_string())]).await;
    }
    let error = loop {
        match watch.next().await.unwrap() {
            Ok(batch) => last = batch.revision,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Lagged), "{error:?}");
    assert!(watch.next().await.is_none());
    // What it was told holds: watching again from there misses nothing.
    let mut again = store.watch(Range::prefix("/"), last).await.unwrap();
    let mut seen = 0;
    while seen < 6 {
        seen += again.next().await.unwrap().unwrap().events.len();
    }
    assert_eq!(seen, 6);
}

#[tokio::test]
async fn watches_end_when_the_store_does() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut watch = store.watch(Range::prefix("/"), Revision(0)).await.unwrap();
    watch.next().await.unwrap().unwrap();
    drop(store);
    assert!(matches!(watch.next().await, Some(Err(Error::Unavailable { .. }))));
}

#[tokio::test]
async fn compaction_frees_what_was_superseded() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut last = Revision(0);
    for n in 0..2000 {
        last = commit(&store, vec![put(&format!("/k{}", n % 10), "x".repeat(100))]).await;
    }
    store.compact(last).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while store.shared.db.view().removed().unwrap() < last {
        assert!(Instant::now() < deadline, "the removal doesn't end");
        tokio::task::yield_now().await;
    }
    let db = &store.shared.db;
    assert_eq!((db.log.len().unwrap(), db.index.len().unwrap()), (10, 10));
}

#[tokio::test]
async fn a_removal_that_was_cut_short_goes_on_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut last = Revision(0);
    for n in 0..50 {
        last = commit(&store, vec![put("/k", n.to_string())]).await;
    }
    // As a crash between the two would leave it.
    let head = &store.shared.db.head;
    head.insert(format::COMPACTED_KEY, last.0.to_be_bytes()).unwrap();
    drop(store);
    let store = open(folder.path());
    let deadline = Instant::now() + Duration::from_secs(20);
    while store.shared.db.log.len().unwrap() > 1 {
        assert!(Instant::now() < deadline, "the removal doesn't go on");
        tokio::task::yield_now().await;
    }
    assert!(matches!(store.range(Range::prefix("/"), Revision(5), 0).await, Err(Error::Compacted { .. })));
}

/// A step of the model test.
#[derive(Clone, Debug)]
enum Step {
    Write(Vec<(u8, Option<u8>)>),
    Compact(u8),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let write = proptest::collection::btree_map(0u8..6, proptest::option::weighted(0.7, any::<u8>()), 1..4);
    prop_oneof![
        20 => write.prop_map(|ops| Step::Write(ops.into_iter().collect())),
        1 => any::<u8>().prop_map(Step::Compact),
        1 => Just(Step::Reopen),
    ]
}

type States = BTreeMap<String, (Bytes, Revision, Revision)>;

/// The states at every revision, kept the plain way.
struct Model {
    history: BTreeMap<Revision, States>,
    compacted: Revision,
}

impl Model {
    fn write(&mut self, revision: Revision, ops: &[Op]) {
        let mut states = self.history.values().next_back().unwrap().clone();
        for op in ops {
            match op {
                Op::Put { key, value } => {
                    let create = states.get(key).map_or(revision, |state| state.1);
                    states.insert(key.clone(), (value.clone(), create, revision));
                }
                Op::Delete { key } => drop(states.remove(key)),
            }
        }
        self.history.insert(revision, states);
    }

    async fn check(&self, store: &EmbeddedStore) {
        assert_eq!(store.current_revision().await.unwrap(), *self.history.keys().next_back().unwrap());
        for (revision, states) in &self.history {
            let read = store.range(Range::prefix("/"), *revision, 0).await;
            if *revision < self.compacted {
                assert!(matches!(read, Err(Error::Compacted { .. })));
                continue;
            }
            let states = states.iter().map(|(key, (value, create, modified))| KeyValue {
                key: key.clone(),
                value: value.clone(),
                create_revision: *create,
                mod_revision: *modified,
            });
            assert_eq!(read.unwrap().items, states.collect::<Vec<_>>());
        }
    }

    /// Replays a watch from the compacted revision over the state there; it must give every later state.
    async fn check_watch(&self, store: &EmbeddedStore) {
        let start = self.compacted.max(Revision(1));
        let end = *self.history.keys().next_back().unwrap();
        let mut watch = store.watch(Range::prefix("/"), start).await.unwrap();
        let mut states = self.history[&start].clone();
        let mut at = watch.next().await.unwrap().unwrap().revision;
        while at < end {
            let batch = watch.next().await.unwrap().unwrap();
            for events in batch.events.chunk_by(|a, b| a.revision() == b.revision()) {
                for event in events {
                    let before = states.get(event.key()).cloned();
                    let (prev, now) = match event {
                        crate::Event::Put { kv, prev } => {
                            (prev, Some((kv.value.clone(), kv.create_revision, kv.mod_revision)))
                        }
                        crate::Event::Delete { prev, .. } => (prev, None),
                    };
                    assert_eq!(
                        before,
                        prev.clone().map(|kv| (kv.value, kv.create_revision, kv.mod_revision))
                    );
                    match now {
                        Some(now) => drop(states.insert(event.key().to_owned(), now)),
                        None => drop(states.remove(event.key())),
                    }
                }
                assert_eq!(states, self.history[&events[0].revision()]);
            }
            at = batch.revision;
        }
        assert_eq!(states, self.history[&end]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn agrees_with_a_plain_model(steps in proptest::collection::vec(step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let mut store = open(folder.path());
            let mut model = Model { history: BTreeMap::from([(Revision(1), States::new())]), compacted: Revision(0) };
            for step in steps {
                match step {
                    Step::Write(ops) => {
                        let op = |(key, value): (u8, Option<u8>)| match value {
                            Some(value) => put(&format!("/{key}"), vec![value]),
                            None => Op::Delete { key: format!("/{key}") },
                        };
                        let ops: Vec<Op> = ops.into_iter().map(op).collect();
                        let newest = *model.history.keys().next_back().unwrap();
                        let states = &model.history[&newest];
                        let changes = ops.iter().any(|op| matches!(op, Op::Put { .. }) || states.contains_key(op.key()));
                        let revision = commit(&store, ops.clone()).await;
                        assert_eq!(revision, Revision(newest.0 + u64::from(changes)));
                        model.write(revision, &ops);
                    }
                    Step::Compact(part) => {
                        let newest = *model.history.keys().next_back().unwrap();
                        let at = Revision(newest.0 * u64::from(part) / 255);
                        store.compact(at).await.unwrap();
                        model.compacted = model.compacted.max(at);
                    }
                    Step::Reopen => {
                        drop(store);
                        store = open(folder.path());
                    }
                }
            }
            model.check(&store).await;
            model.check_watch(&store).await;
        });
    }
}

const CHILD: &str = "WEFT_STORE_TEST_FOLDER";

#[test]
#[ignore = "not a test: the writing process of kill_9_loses_nothing_that_was_acknowledged"]
fn crash_child() {
    let folder = std::env::var(CHILD).expect("the folder is given by the test that starts this");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let options = Options { memtable_bytes: 256 << 10, ..Options::default() };
        let store = EmbeddedStore::open(folder, options).unwrap();
        let store = &store;
        futures::future::join_all((0..8).map(|writer| async move {
            for n in 0.. {
                let (one, two) = (format!("/{writer}/one"), format!("/{writer}/two/{}", n % 50));
                let value = format!("{n} {}", "x".repeat(n % 3000));
                let revision = commit(store, vec![put(&one, value.clone()), put(&two, value)]).await;
                // Whole lines: a line that the parent has read is an acknowledgement that was given.
                println!("ack {} {writer} {n}", revision.0);
                if n % 100 == 99 {
                    store.compact(Revision(revision.0 - 50)).await.unwrap();
                }
            }
        }))
        .await;
    });
}

#[test]
fn kill_9_loses_nothing_that_was_acknowledged() {
    use rand::RngExt;
    let folder = tempfile::tempdir().unwrap();
    let mut acknowledged: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for round in 0..10 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "embedded::tests::crash_child", "--ignored", "--nocapture"])
            .env(CHILD, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let wanted = rand::rng().random_range(1..600);
        let before = acknowledged.len();
        for line in lines {
            let line = line.unwrap();
            let mut words = line.split(' ').skip_while(|word| !word.ends_with("ack")).skip(1);
            let Some(revision) = words.next() else { continue };
            let mut number = || words.next().unwrap().parse::<u64>().unwrap();
            acknowledged.insert(revision.parse().unwrap(), (number(), number()));
            if acknowledged.len() == before + wanted {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(acknowledged.len() > before, "round {round}: the child wrote nothing");
        runtime.block_on(check_after_crash(folder.path(), &acknowledged));
    }
}

async fn check_after_crash(folder: &Path, acknowledged: &BTreeMap<u64, (u64, u64)>) {
    let before = Instant::now();
    let store = open(folder);
    assert!(before.elapsed() < Duration::from_secs(5), "reopening took {:?}", before.elapsed());
    let current = store.current_revision().await.unwrap();
    let newest = *acknowledged.keys().next_back().unwrap();
    assert!(current.0 >= newest, "revision {newest} was acknowledged, the store is at {current:?}");

    // Every retained revision is there, is next to the one before, and is whole: its two puts, of one value.
    let oldest = store.shared.db.view().compacted().unwrap().max(Revision(1));
    let mut watch = store.watch(Range::prefix("/"), oldest).await.unwrap();
    let mut at = watch.next().await.unwrap().unwrap().revision;
    let mut next = oldest.0 + 1;
    while at < current {
        let batch = watch.next().await.unwrap().unwrap();
        for revision in batch.events.chunk_by(|a, b| a.revision() == b.revision()) {
            assert_eq!(revision[0].revision(), Revision(next));
            let [crate::Event::Put { kv: one, .. }, crate::Event::Put { kv: two, .. }] = revision else {
                panic!("half a transaction: {revision:?}");
            };
            assert_eq!(one.value, two.value);
            if let Some((writer, n)) = acknowledged.get(&next) {
                assert_eq!(one.key, format!("/{writer}/one"));
                assert!(one.value.starts_with(format!("{n} ").as_bytes()));
            }
            next += 1;
        }
        at = batch.revision;
    }
    assert_eq!(next, current.0 + 1);

    // What is newest of each key that was acknowledged is there or has been overwritten by a later write.
    for (revision, (writer, _)) in acknowledged {
        let state = store.get(&format!("/{writer}/one")).await.unwrap().unwrap();
        assert!(state.mod_revision.0 >= *revision);
    }
}
