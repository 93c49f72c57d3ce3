//! Who watches what, and the delivery of committed changes to them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use super::database::View;
use super::format::{Place, Record};
use crate::{Batch, Error, Event, Range, Revision};

/// The watchers of a store.
///
/// The database is read under this lock (for the state before a change), and never takes it.
pub(super) struct Hub {
    state: Mutex<State>,
    /// The newest revision whose events are in every watcher's queue.
    published: watch::Sender<Revision>,
}

struct State {
    published: Revision,
    watchers: Vec<Watcher>,
    /// Set when the store stops: later subscriptions end at once.
    closed: bool,
}

struct Watcher {
    range: Range,
    queue: mpsc::Sender<Batch>,
    lagged: Arc<AtomicBool>,
}

/// A watcher's end of the queue. Everything behind `from` comes through it.
pub(super) struct Subscription {
    pub(super) from: Revision,
    pub(super) queue: mpsc::Receiver<Batch>,
    pub(super) published: watch::Receiver<Revision>,
    pub(super) lagged: Arc<AtomicBool>,
}

impl Hub {
    pub(super) fn new(published: Revision) -> Self {
        let state = State { published, watchers: Vec::new(), closed: false };
        Self { state: Mutex::new(state), published: watch::Sender::new(published) }
    }

    pub(super) fn subscribe(&self, range: Range, buffer: usize) -> Subscription {
        let (sender, queue) = mpsc::channel(buffer.max(1));
        let lagged = Arc::new(AtomicBool::new(false));
        let mut state = self.state.lock();
        if !state.closed {
            state.watchers.push(Watcher { range, queue: sender, lagged: Arc::clone(&lagged) });
        }
        Subscription { from: state.published, queue, published: self.published.subscribe(), lagged }
    }

    /// Hands a group of whole revisions, the last one `through`, to whom it concerns.
    ///
    /// The events are made under the lock: a watcher that subscribes meanwhile either gets the whole group
    /// or starts behind it.
    pub(super) fn publish(&self, through: Revision, changes: &[(Place, Record)], view: &View<'_>) {
        let mut state = self.state.lock();
        let wanted: Vec<_> = changes
            .iter()
            .filter(|(_, record)| state.watchers.iter().any(|watcher| watcher.range.contains(&record.key)))
            .map(|(place, record)| view.event(*place, record.clone()))
            .collect();
        let events: Result<Vec<Event>, Error> = wanted.into_iter().collect();
        state.published = through;
        match events {
            Ok(events) => state.watchers.retain(|watcher| watcher.deliver(through, &events)),
            Err(error) => {
                // Who watches again reads the group from the log, and is told what is wrong with it.
                tracing::error!(%error, "committed changes can't be read back; every watcher is dropped");
                state.watchers.drain(..).for_each(|watcher| watcher.lagged.store(true, Ordering::Release));
            }
        }
        drop(state);
        self.published.send_replace(through);
    }

    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.watchers.clear();
    }
}

impl Watcher {
    /// False if the watcher is to be forgotten.
    fn deliver(&self, through: Revision, events: &[Event]) -> bool {
        let mine: Vec<Event> =
            events.iter().filter(|event| self.range.contains(event.key())).cloned().collect();
        if mine.is_empty() {
            return !self.queue.is_closed();
        }
        match self.queue.try_send(Batch { revision: through, events: mine }) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.lagged.store(true, Ordering::Release);
                false
            }
        }
    }
}
