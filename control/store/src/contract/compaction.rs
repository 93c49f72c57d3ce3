//! Compaction: what is forgotten, what is kept, who is told.

use std::sync::Arc;

use super::{commit, delete, events, get, kv, open, put, watch_error};
use crate::{Error, Event, Range, Revision, Store};

pub(super) async fn forgets_below_and_keeps_above(store: Arc<dyn Store>) {
    let (a, b) = ("/compact/a", "/compact/b");
    let range = Range::prefix("/compact/");
    let one = commit(&store, vec![], vec![put(a, "a1"), put(b, "b1")]).await;
    let two = commit(&store, vec![], vec![put(a, "a2")]).await;
    let three = commit(&store, vec![], vec![delete(b)]).await;
    let four = commit(&store, vec![], vec![put(a, "a4")]).await;
    store.compact(three).await.expect("compaction is taken");

    for gone in [one, two] {
        let outcome = store.range(range.clone(), gone, 0).await;
        match outcome {
            Err(Error::Compacted { requested, oldest }) => assert_eq!((requested, oldest), (gone, three)),
            other => panic!("reading {gone:?}: {other:?}"),
        }
    }
    let at_three = store.range(range.clone(), three, 0).await.expect("the compacted revision can be read");
    assert_eq!(at_three.items, [kv(a, "a2", one, two)]);
    let (mut watch, from, first) = open(&store, range, three).await;
    assert_eq!(first, []);
    let seen = events(&mut watch, from, 1).await;
    assert_eq!(seen, [Event::Put { kv: kv(a, "a4", one, four), prev: Some(kv(a, "a2", one, two)) }]);
}

pub(super) async fn keeps_the_newest_of_everything(store: Arc<dyn Store>) {
    let prefix = "/compact-newest/";
    let mut last = Revision(0);
    for round in 0..20 {
        for n in 0..30 {
            last = commit(&store, vec![], vec![put(&format!("{prefix}{n:02}"), format!("{round}"))]).await;
        }
    }
    let before = store.range(Range::prefix(prefix), Revision(0), 0).await.expect("a page");
    store.compact(last).await.expect("compaction is taken");
    let after = store.range(Range::prefix(prefix), Revision(0), 0).await.expect("a page");
    assert_eq!(before.items, after.items);
    assert_eq!(after.items.len(), 30);
    let changed = commit(&store, vec![], vec![delete(&format!("{prefix}00"))]).await;
    assert!(changed > last);
    assert_eq!(get(&store, &format!("{prefix}00")).await, None);
}

pub(super) async fn is_repeatable_and_bounded(store: Arc<dyn Store>) {
    let one = commit(&store, vec![], vec![put("/compact-again", "1")]).await;
    let two = commit(&store, vec![], vec![put("/compact-again", "2")]).await;
    store.compact(two).await.expect("compaction is taken");
    store.compact(two).await.expect("the same again is no error");
    store.compact(one).await.expect("less than before is no error");
    let far = Revision(two.0 + 1_000_000);
    let outcome = store.compact(far).await;
    assert!(matches!(outcome, Err(Error::Future { requested, .. }) if requested == far), "{outcome:?}");
    assert_eq!(get(&store, "/compact-again").await, Some(kv("/compact-again", "2", one, two)));
}

pub(super) async fn ends_a_watch_that_starts_below(store: Arc<dyn Store>) {
    let key = "/compact-watch/a";
    let one = commit(&store, vec![], vec![put(key, "1")]).await;
    commit(&store, vec![], vec![put(key, "2")]).await;
    let three = commit(&store, vec![], vec![put(key, "3")]).await;
    store.compact(three).await.expect("compaction is taken");
    let error = watch_error(&store, Range::prefix("/compact-watch/"), one).await;
    let told = matches!(error, Error::Compacted { requested, oldest } if (requested, oldest) == (one, three));
    assert!(told, "{error:?}");
}
