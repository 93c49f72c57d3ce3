//! Transactions: conditions, revisions, atomicity, refusals.

use std::sync::Arc;

use super::{absent, at, commit, conflict, delete, get, kv, put};
use crate::{Error, MAX_KEY_BYTES, MAX_TXN_OPS, Op, Revision, Store};

pub(super) async fn creates_updates_and_deletes(store: Arc<dyn Store>) {
    let key = "/txn/life/a";
    let before = store.current_revision().await.expect("a revision");
    assert!(before >= Revision(1), "revisions start at 1, not {before:?}");
    assert_eq!(get(&store, key).await, None);

    let created = commit(&store, vec![absent(key)], vec![put(key, "1")]).await;
    assert!(created > before);
    assert_eq!(get(&store, key).await, Some(kv(key, "1", created, created)));

    let updated = commit(&store, vec![at(key, created)], vec![put(key, "2")]).await;
    assert!(updated > created);
    assert_eq!(get(&store, key).await, Some(kv(key, "2", created, updated)));

    let deleted = commit(&store, vec![at(key, updated)], vec![delete(key)]).await;
    assert!(deleted > updated);
    assert_eq!(get(&store, key).await, None);
    assert!(store.current_revision().await.expect("a revision") >= deleted);
}

pub(super) async fn applies_all_or_nothing(store: Arc<dyn Store>) {
    let (a, b, c) = ("/txn/atomic/a", "/txn/atomic/b", "/txn/atomic/c");
    let first = commit(&store, vec![absent(a), absent(b)], vec![put(a, "a1"), put(b, "b1")]).await;
    let second = commit(&store, vec![at(a, first)], vec![put(c, "c1"), delete(a), put(b, "b2")]).await;
    assert_eq!(get(&store, a).await, None);
    assert_eq!(get(&store, b).await, Some(kv(b, "b2", first, second)));
    assert_eq!(get(&store, c).await, Some(kv(c, "c1", second, second)));

    // One condition of two fails: no operation is carried out.
    conflict(&store, vec![at(b, second), absent(c)], vec![put(a, "a2"), delete(b), delete(c)]).await;
    assert_eq!(get(&store, a).await, None);
    assert_eq!(get(&store, b).await, Some(kv(b, "b2", first, second)));
    assert_eq!(get(&store, c).await, Some(kv(c, "c1", second, second)));
}

pub(super) async fn answers_a_conflict_with_each_state(store: Arc<dyn Store>) {
    let (a, b, gone) = ("/txn/conflict/a", "/txn/conflict/b", "/txn/conflict/gone");
    let first = commit(&store, vec![], vec![put(a, "a1"), put(b, "b1"), put(gone, "x")]).await;
    let second = commit(&store, vec![], vec![put(b, "b2"), delete(gone)]).await;

    let conditions = vec![at(a, first), at(b, first), at(gone, first), absent(a)];
    let states = conflict(&store, conditions, vec![put(a, "lost")]).await;
    let (a_now, b_now) = (kv(a, "a1", first, first), kv(b, "b2", first, second));
    assert_eq!(states, vec![Some(a_now.clone()), Some(b_now), None, Some(a_now)]);

    // A condition may name a key that is not written, and an absent key has no revision.
    assert_eq!(conflict(&store, vec![at("/txn/conflict/never", first)], vec![delete(a)]).await, vec![None]);
    commit(&store, vec![absent(gone), at(b, second)], vec![delete(a)]).await;
}

pub(super) async fn changing_nothing_keeps_the_revision(store: Arc<dyn Store>) {
    let (key, other) = ("/txn/nothing/a", "/txn/nothing/b");
    let made = commit(&store, vec![], vec![put(key, "1")]).await;
    let nothing = commit(&store, vec![at(key, made)], vec![delete(other)]).await;
    let empty = commit(&store, vec![at(key, made)], vec![]).await;
    assert!(nothing >= made && empty >= nothing);
    assert_eq!(get(&store, key).await, Some(kv(key, "1", made, made)));
    // A put counts as a change even if the value stays.
    assert!(commit(&store, vec![], vec![put(key, "1")]).await > empty);
}

pub(super) async fn recreation_starts_a_new_life(store: Arc<dyn Store>) {
    let key = "/txn/again";
    let first = commit(&store, vec![], vec![put(key, "1")]).await;
    commit(&store, vec![], vec![delete(key)]).await;
    let again = commit(&store, vec![absent(key)], vec![put(key, "2")]).await;
    assert_eq!(get(&store, key).await, Some(kv(key, "2", again, again)));
    assert!(again > first);
}

pub(super) async fn refuses_bad_requests(store: Arc<dyn Store>) {
    let key = "/txn/bad";
    let long = "x".repeat(MAX_KEY_BYTES + 1);
    let many: Vec<Op> = (0..=MAX_TXN_OPS).map(|n| put(&format!("{key}/{n}"), "")).collect();
    let requests = [
        (vec![], vec![put("", "1")]),
        (vec![absent("")], vec![]),
        (vec![], vec![put("a\0b", "1")]),
        (vec![], vec![put(&long, "1")]),
        (vec![], vec![put(key, "1"), put(key, "2")]),
        (vec![], vec![put(key, "1"), delete(key)]),
        (vec![], many),
    ];
    for (conditions, ops) in requests {
        let outcome = store.txn(conditions, ops).await;
        assert!(matches!(outcome, Err(Error::Invalid(_))), "{outcome:?}");
    }
    assert!(matches!(store.get("").await, Err(Error::Invalid(_))));
    assert_eq!(get(&store, key).await, None);
}
