//! Many callers at once: no update is lost, no event is lost or doubled.

use std::collections::HashSet;
use std::sync::Arc;

use futures::future::join_all;

use super::{absent, at, commit, events, get, open, put};
use crate::{Range, Revision, Store, TxnOutcome};

const CALLERS: usize = 8;

pub(super) async fn increments_are_never_lost(store: Arc<dyn Store>) {
    const EACH: usize = 25;
    let key = "/concurrent/counter";
    commit(&store, vec![], vec![put(key, "0")]).await;
    let caller = || async {
        for _ in 0..EACH {
            let mut state = get(&store, key).await.expect("the counter");
            loop {
                let count: usize =
                    std::str::from_utf8(&state.value).expect("text").parse().expect("a number");
                let op = put(key, (count + 1).to_string());
                match store
                    .txn(vec![at(key, state.mod_revision)], vec![op])
                    .await
                    .expect("the transaction is taken")
                {
                    TxnOutcome::Committed(_) => break,
                    TxnOutcome::Conflict(mut now) => {
                        let now = now.remove(0).expect("the counter");
                        assert!(
                            now.mod_revision > state.mod_revision,
                            "a conflict with the state that was named"
                        );
                        state = now;
                    }
                }
            }
        }
    };
    join_all((0..CALLERS).map(|_| caller())).await;
    assert_eq!(get(&store, key).await.expect("the counter").value, (CALLERS * EACH).to_string());
}

pub(super) async fn creation_has_one_winner(store: Arc<dyn Store>) {
    for round in 0..20 {
        let key = &format!("/concurrent/create/{round}");
        let outcomes =
            join_all((0..CALLERS).map(|n| store.txn(vec![absent(key)], vec![put(key, n.to_string())]))).await;
        let winners: Vec<usize> = (0..CALLERS)
            .filter(|n| matches!(outcomes[*n].as_ref().expect("taken"), TxnOutcome::Committed(_)))
            .collect();
        assert_eq!(winners.len(), 1);
        assert_eq!(get(&store, key).await.expect("the key").value, winners[0].to_string());
    }
}

pub(super) async fn watchers_see_every_event_once(store: Arc<dyn Store>) {
    const EACH: usize = 100;
    let prefix = "/concurrent/watched/";
    let start = store.current_revision().await.expect("a revision");
    let (live, live_from, first) = open(&store, Range::prefix(prefix), Revision(0)).await;
    assert_eq!(first, []);
    let writers = join_all((0..CALLERS).map(|writer| {
        let store = &store;
        async move {
            let mut revisions = Vec::new();
            for n in 0..EACH {
                let key = format!("{prefix}{writer}/{}", n % 7);
                revisions.push(commit(store, vec![], vec![put(&key, n.to_string())]).await);
            }
            revisions
        }
    }));
    // Watchers that join while the writers are at it, each behind the same revision.
    let joiners = join_all((0..4).map(|_| async {
        tokio::task::yield_now().await;
        let (mut watch, from, first) = open(&store, Range::prefix(prefix), start).await;
        assert_eq!(first, []);
        events(&mut watch, from, CALLERS * EACH).await
    }));
    let mut live = live;
    let (written, joined, live) =
        futures::join!(writers, joiners, async { events(&mut live, live_from, CALLERS * EACH).await });
    let written: HashSet<Revision> = written.into_iter().flatten().collect();
    assert_eq!(written.len(), CALLERS * EACH, "two transactions got one revision");
    for seen in joined.into_iter().chain([live]) {
        let revisions: HashSet<Revision> = seen.iter().map(crate::Event::revision).collect();
        assert_eq!(revisions, written);
    }
}
