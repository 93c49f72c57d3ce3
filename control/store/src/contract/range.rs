//! Range reads: order, limits, bounds, earlier revisions.

use std::sync::Arc;

use super::{commit, delete, kv, put};
use crate::{Error, Range, Revision, Store};

fn keys(page: &crate::Page) -> Vec<&str> {
    page.items.iter().map(|item| item.key.as_str()).collect()
}

pub(super) async fn pages_in_key_order(store: Arc<dyn Store>) {
    let prefix = "/range/pages/";
    let names = ["b", "a/c", "a", "c", "a-b"];
    for name in names {
        commit(&store, vec![], vec![put(&format!("{prefix}{name}"), name)]).await;
    }
    let all = store.range(Range::prefix(prefix), Revision(0), 0).await.expect("a page");
    assert!(!all.more);
    assert_eq!(keys(&all), ["a", "a-b", "a/c", "b", "c"].map(|name| format!("{prefix}{name}")));
    assert_eq!(all.items[3].value, "b");

    // The way clients go on: from the successor of the last key, at the revision of the first page.
    let mut seen = Vec::new();
    let mut range = Range::prefix(prefix);
    loop {
        let page = store.range(range.clone(), all.revision, 2).await.expect("a page");
        assert_eq!(page.revision, all.revision);
        assert_eq!(page.items.len(), 2.min(all.items.len() - seen.len()));
        seen.extend(page.items);
        assert_eq!(page.more, seen.len() < all.items.len());
        if !page.more {
            break;
        }
        range.start = format!("{}\0", seen.last().expect("a full page").key);
    }
    assert_eq!(seen, all.items);
    // A page that ends exactly with the range has no more.
    assert!(!store.range(Range::prefix(prefix), Revision(0), 5).await.expect("a page").more);
}

pub(super) async fn reads_an_earlier_revision(store: Arc<dyn Store>) {
    let (a, b, c) = ("/range/past/a", "/range/past/b", "/range/past/c");
    let range = Range::prefix("/range/past/");
    let one = commit(&store, vec![], vec![put(a, "a1"), put(b, "b1")]).await;
    let two = commit(&store, vec![], vec![put(a, "a2"), delete(b)]).await;
    let three = commit(&store, vec![], vec![put(b, "b3"), put(c, "c3")]).await;
    let four = commit(&store, vec![], vec![delete(a)]).await;

    let expected = [
        (one, vec![kv(a, "a1", one, one), kv(b, "b1", one, one)]),
        (two, vec![kv(a, "a2", one, two)]),
        (three, vec![kv(a, "a2", one, two), kv(b, "b3", three, three), kv(c, "c3", three, three)]),
        (four, vec![kv(b, "b3", three, three), kv(c, "c3", three, three)]),
    ];
    for (revision, items) in expected {
        let page = store.range(range.clone(), revision, 0).await.expect("a page");
        assert_eq!((page.revision, page.items), (revision, items));
    }
    // A limit counts what was live then: `b` was deleted at `two`, so `a` was the only one.
    let page = store.range(range.clone(), two, 1).await.expect("a page");
    assert_eq!((keys(&page), page.more), (vec![a], false));
    let page = store.range(range.clone(), three, 1).await.expect("a page");
    assert_eq!((keys(&page), page.more), (vec![a], true));
    let before = store.range(range, Revision(one.0 - 1), 0).await.expect("a page");
    assert_eq!(before.items, []);
}

pub(super) async fn bounds_are_start_inclusive_and_end_exclusive(store: Arc<dyn Store>) {
    let prefix = "/range/bounds/";
    for name in ["a", "b", "c"] {
        commit(&store, vec![], vec![put(&format!("{prefix}{name}"), name)]).await;
    }
    let then = store.current_revision().await.expect("a revision");
    commit(&store, vec![], vec![put("/range/elsewhere", "x")]).await;
    let key = |name: &str| format!("{prefix}{name}");
    let cases: [(String, Option<String>, &[&str]); 7] = [
        (key("a"), Some(key("c")), &["a", "b"]),
        (key("b"), Some(key("b\0")), &["b"]),
        (key("a\0"), Some(key("d")), &["b", "c"]),
        (key(""), Some(key("a")), &[]),
        (key("c"), Some(key("c")), &[]),
        (key("c"), Some(key("a")), &[]),
        (key("bb"), Some(key("cc")), &["c"]),
    ];
    for (start, end, names) in cases {
        let range = Range { start, end };
        for revision in [Revision(0), then] {
            let page = store.range(range.clone(), revision, 0).await.expect("a page");
            let wanted: Vec<String> = names.iter().map(|name| key(name)).collect();
            assert_eq!(keys(&page), wanted, "{range:?} at {revision:?}");
        }
    }
    let everything = Range { start: String::new(), end: None };
    let page = store.range(everything, Revision(0), 0).await.expect("a page");
    assert!(page.items.iter().any(|item| item.key == key("a")));
    assert!(page.items.is_sorted_by(|a, b| a.key < b.key));
}

pub(super) async fn refuses_the_future(store: Arc<dyn Store>) {
    let far = Revision(store.current_revision().await.expect("a revision").0 + 1_000_000);
    let outcome = store.range(Range::prefix("/"), far, 0).await;
    assert!(matches!(outcome, Err(Error::Future { requested, .. }) if requested == far), "{outcome:?}");
}
