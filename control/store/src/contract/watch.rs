//! Watches: where they start, what they deliver, in which pieces.

use std::sync::Arc;

use super::{commit, delete, events, kv, next, open, put, watch_error};
use crate::{Error, Event, Range, Revision, Store};

pub(super) async fn from_now_on_sees_only_what_follows(store: Arc<dyn Store>) {
    let key = "/watch/now/a";
    let before = commit(&store, vec![], vec![put(key, "1")]).await;
    let (mut watch, from, first) = open(&store, Range::prefix("/watch/now/"), Revision(0)).await;
    assert!(from >= before, "a watch from now on starts behind what is acknowledged");
    assert_eq!(first, []);
    let after = commit(&store, vec![], vec![put(key, "2")]).await;
    let seen = events(&mut watch, from, 1).await;
    let prev = Some(kv(key, "1", before, before));
    assert_eq!(seen, [Event::Put { kv: kv(key, "2", before, after), prev }]);
}

pub(super) async fn from_a_revision_replays_then_goes_live(store: Arc<dyn Store>) {
    let (a, b) = ("/watch/replay/a", "/watch/replay/b");
    let one = commit(&store, vec![], vec![put(a, "a1")]).await;
    let two = commit(&store, vec![], vec![put(a, "a2")]).await;
    let three = commit(&store, vec![], vec![delete(a), put(b, "b3")]).await;
    let (mut watch, from, first) = open(&store, Range::prefix("/watch/replay/"), one).await;
    let four = commit(&store, vec![], vec![put(a, "a4")]).await;
    let five = commit(&store, vec![], vec![delete(b)]).await;

    let mut seen = first;
    let rest = 5 - seen.len();
    seen.extend(events(&mut watch, from, rest).await);
    // Within a revision the order of keys is the backend's.
    seen.sort_by(|x, y| (x.revision(), x.key()).cmp(&(y.revision(), y.key())));
    let a2 = kv(a, "a2", one, two);
    let b3 = kv(b, "b3", three, three);
    assert_eq!(
        seen,
        [
            Event::Put { kv: a2.clone(), prev: Some(kv(a, "a1", one, one)) },
            Event::Delete { key: a.to_owned(), revision: three, prev: Some(a2) },
            Event::Put { kv: b3.clone(), prev: None },
            Event::Put { kv: kv(a, "a4", four, four), prev: None },
            Event::Delete { key: b.to_owned(), revision: five, prev: Some(b3) },
        ]
    );
}

pub(super) async fn keeps_a_revision_whole(store: Arc<dyn Store>) {
    let prefix = "/watch/whole/";
    let start = store.current_revision().await.expect("a revision");
    let (mut live, _, _) = open(&store, Range::prefix(prefix), Revision(0)).await;
    for round in 0..40 {
        let ops = (0..50).map(|n| put(&format!("{prefix}{n}"), format!("{round}"))).collect();
        commit(&store, vec![], ops).await;
    }
    let (mut replay, _, first) = open(&store, Range::prefix(prefix), start).await;
    assert_eq!(first, []);
    for watch in [&mut live, &mut replay] {
        let mut seen = 0;
        while seen < 40 * 50 {
            let batch = next(watch).await;
            assert_eq!(batch.events.len() % 50, 0, "a part of a revision was delivered");
            for revision in batch.events.chunk_by(|a, b| a.revision() == b.revision()) {
                assert_eq!(revision.len(), 50);
            }
            seen += batch.events.len();
        }
    }
}

pub(super) async fn keeps_to_its_range(store: Arc<dyn Store>) {
    let (inside, outside) = ("/watch/range/in/a", "/watch/range/out");
    let (mut watch, from, _) = open(&store, Range::prefix("/watch/range/in/"), Revision(0)).await;
    commit(&store, vec![], vec![put(outside, "1")]).await;
    commit(&store, vec![], vec![put(outside, "2"), put(inside, "1")]).await;
    commit(&store, vec![], vec![delete(outside)]).await;
    commit(&store, vec![], vec![delete(inside)]).await;
    let seen = events(&mut watch, from, 2).await;
    assert!(seen.iter().all(|event| event.key() == inside), "{seen:?}");
}

pub(super) async fn refuses_the_future(store: Arc<dyn Store>) {
    let far = Revision(store.current_revision().await.expect("a revision").0 + 1_000_000);
    let error = watch_error(&store, Range::prefix("/"), far).await;
    assert!(matches!(error, Error::Future { requested, .. } if requested == far), "{error:?}");
}

pub(super) async fn tells_an_idle_watch_how_far_it_is(store: Arc<dyn Store>) {
    let (mut watch, _, _) = open(&store, Range::prefix("/watch/idle/"), Revision(0)).await;
    let elsewhere = commit(&store, vec![], vec![put("/watch/busy", "1")]).await;
    loop {
        let batch = next(&mut watch).await;
        assert_eq!(batch.events, []);
        if batch.revision >= elsewhere {
            break;
        }
    }
    let here = commit(&store, vec![], vec![put("/watch/idle/a", "1")]).await;
    loop {
        let batch = next(&mut watch).await;
        if !batch.events.is_empty() {
            assert_eq!(batch.events, [Event::Put { kv: kv("/watch/idle/a", "1", here, here), prev: None }]);
            break;
        }
        assert!(batch.revision < here, "progress overtook an event");
    }
}
