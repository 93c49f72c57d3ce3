//! What the watches of Services and of policies share: a stream that goes on through failures, and what a new list leaves out.

use std::collections::HashSet;
use std::hash::Hash;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Resource};

/// One watch. When it fails it is tried again with a growing wait, and lists anew if it must.
pub(crate) fn source<K, E>(
    api: Api<K>,
    wrap: fn(watcher::Event<K>) -> E,
    what: &'static str,
) -> BoxStream<'static, E>
where
    K: Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
    E: Send + 'static,
{
    let events = watcher(api, watcher::Config::default()).default_backoff();
    let good = events.filter_map(move |event| async move {
        event.inspect_err(|error| tracing::warn!(%error, what, "watch failed, will be tried again")).ok()
    });
    good.map(wrap).boxed()
}

/// A source's list: whether there was one, and what the one in progress has named. Changes between two lists leave nothing here.
#[derive(Debug)]
pub(crate) struct Relist<K> {
    /// There was a whole list.
    pub(crate) known: bool,
    /// A list is in progress.
    pub(crate) listing: bool,
    /// Something was there before it.
    compares: bool,
    seen: HashSet<K>,
}

impl<K> Default for Relist<K> {
    fn default() -> Self {
        Self { known: false, listing: false, compares: false, seen: HashSet::new() }
    }
}

impl<K: Eq + Hash> Relist<K> {
    /// A list begins. Its names are kept only if there is something that it may leave out.
    pub(crate) fn begin(&mut self, anything_before: bool) {
        (self.listing, self.compares) = (true, anything_before);
        self.seen.clear();
    }

    /// An object was named, by a list or by a change.
    pub(crate) fn name(&mut self, one: impl FnOnce() -> Option<K>) {
        if self.listing && self.compares {
            self.seen.extend(one());
        }
    }

    /// The list has ended; answers what it named, if there was anything before: all else is gone.
    pub(crate) fn finish(&mut self) -> HashSet<K> {
        (self.known, self.listing) = (true, false);
        std::mem::take(&mut self.seen)
    }

    /// The same, answering those of `before` that it did not name.
    pub(crate) fn finish_from(&mut self, before: impl FnOnce() -> Vec<K>) -> Vec<K> {
        let seen = self.finish();
        if !self.compares {
            return Vec::new();
        }
        before().into_iter().filter(|one| !seen.contains(one)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_tells_what_is_gone_and_changes_leave_nothing() {
        let mut relist = Relist::default();
        relist.begin(true);
        relist.name(|| Some("a"));
        assert!(!relist.known);
        assert_eq!(relist.finish_from(|| vec!["a", "b"]), ["b"]);
        assert!(relist.known);
        for name in ["c", "d", "e"] {
            relist.name(|| Some(name));
        }
        assert!(relist.seen.is_empty(), "no list is in progress");
        relist.begin(true);
        assert_eq!(relist.finish(), HashSet::new());
    }

    #[test]
    fn a_list_before_which_there_was_nothing_keeps_no_names() {
        let mut relist = Relist::default();
        relist.begin(false);
        relist.name(|| Some("a"));
        assert!(relist.seen.is_empty());
        assert_eq!(relist.finish_from(|| vec!["a"]), Vec::<&str>::new());
    }
}
