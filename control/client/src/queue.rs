//! Owns the keyed work queue: a key waits at most once, is worked on by one worker at a time, and comes back with
//! exponential back-off after a failure.

use parking_lot::Mutex;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::error::Error;
use std::fmt::Debug;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Upstream's per-item limiter: 5 ms, doubling, at most 1000 s (16 min 40 s).
const BACKOFF_FIRST: Duration = Duration::from_millis(5);
const BACKOFF_MAX: Duration = Duration::from_secs(1000);

struct Inner<K> {
    ready: VecDeque<K>,
    /// Waiting in `ready`, or to be put there when its worker is done.
    dirty: HashSet<K>,
    working: HashSet<K>,
    delayed: BinaryHeap<Reverse<(Instant, K)>>,
    /// The earliest wake-up per key: a later one for the same key is dropped, so the heap is bounded by the keys.
    delayed_until: HashMap<K, Instant>,
    failures: HashMap<K, u32>,
}

/// A work queue. Cloning shares it.
pub struct Queue<K> {
    inner: Arc<Mutex<Inner<K>>>,
    wake: Arc<Notify>,
}

impl<K> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), wake: self.wake.clone() }
    }
}

impl<K: Clone + Eq + Hash + Ord> Default for Queue<K> {
    fn default() -> Self {
        let inner = Inner {
            ready: VecDeque::new(),
            dirty: HashSet::new(),
            working: HashSet::new(),
            delayed: BinaryHeap::new(),
            delayed_until: HashMap::new(),
            failures: HashMap::new(),
        };
        Self { inner: Arc::new(Mutex::new(inner)), wake: Arc::new(Notify::new()) }
    }
}

impl<K: Clone + Eq + Hash + Ord> Queue<K> {
    /// Puts a key in, unless it waits already. A key being worked on is worked on again afterwards.
    pub fn add(&self, key: K) {
        self.inner.lock().push(key);
        self.wake.notify_one();
    }

    /// Puts a key in after a delay.
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let mut inner = self.inner.lock();
        let at = Instant::now() + delay;
        match inner.delayed_until.get(&key) {
            Some(earlier) if *earlier <= at => return,
            _ => {}
        }
        inner.delayed_until.insert(key.clone(), at);
        inner.delayed.push(Reverse((at, key)));
        drop(inner);
        self.wake.notify_one();
    }

    /// Puts a key in after its back-off, which doubles with every call until [`Queue::forget`].
    pub fn add_rate_limited(&self, key: K) {
        let delay = {
            let mut inner = self.inner.lock();
            let failures = inner.failures.entry(key.clone()).or_insert(0);
            let delay = BACKOFF_FIRST.saturating_mul(1u32.checked_shl(*failures).unwrap_or(u32::MAX));
            *failures = failures.saturating_add(1).min(30);
            delay.min(BACKOFF_MAX)
        };
        self.add_after(key, delay);
    }

    /// Ends the back-off of a key.
    pub fn forget(&self, key: &K) {
        self.inner.lock().failures.remove(key);
    }

    /// How often a key failed in a row.
    pub fn failures(&self, key: &K) -> u32 {
        self.inner.lock().failures.get(key).copied().unwrap_or(0)
    }

    /// How many keys wait for a worker.
    pub fn len(&self) -> usize {
        self.inner.lock().ready.len()
    }

    /// Whether no key waits for a worker.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next key; call [`Queue::done`] when it is worked off. Safe to cancel.
    pub async fn get(&self) -> K {
        loop {
            let (next, deadline) = self.inner.lock().pop(Instant::now());
            if let Some((key, more)) = next {
                if more {
                    self.wake.notify_one();
                }
                return key;
            }
            match deadline {
                Some(at) => {
                    tokio::select! {
                        () = self.wake.notified() => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                None => self.wake.notified().await,
            }
        }
    }

    /// Says that a worker is done with a key.
    pub fn done(&self, key: &K) {
        let mut inner = self.inner.lock();
        inner.working.remove(key);
        if inner.dirty.contains(key) {
            inner.ready.push_back(key.clone());
            drop(inner);
            self.wake.notify_one();
        }
    }
}

impl<K: Clone + Eq + Hash + Ord> Inner<K> {
    fn push(&mut self, key: K) {
        if !self.dirty.insert(key.clone()) {
            return;
        }
        if !self.working.contains(&key) {
            self.ready.push_back(key);
        }
    }

    /// The next key (and whether more wait), or when to look again.
    fn pop(&mut self, now: Instant) -> (Option<(K, bool)>, Option<Instant>) {
        while let Some(Reverse((at, _))) = self.delayed.peek() {
            if *at > now {
                break;
            }
            if let Some(Reverse((at, key))) = self.delayed.pop() {
                // An entry that an earlier wake-up superseded is stale.
                if self.delayed_until.get(&key) == Some(&at) {
                    self.delayed_until.remove(&key);
                    self.push(key);
                }
            }
        }
        let deadline = self.delayed.peek().map(|Reverse((at, _))| *at);
        let Some(key) = self.ready.pop_front() else { return (None, deadline) };
        self.dirty.remove(&key);
        self.working.insert(key.clone());
        // Another worker must take over the timer as well as the rest.
        (Some((key, !self.ready.is_empty() || deadline.is_some())), deadline)
    }
}

/// How a key was worked off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing to do until the next change.
    Done,
    /// Look again after this time.
    After(Duration),
    /// Look again with back-off, silently: a lost race, a cache that is behind.
    Again,
}

/// Runs `workers` loops over the queue until `shutdown`, then lets the keys in hand finish.
pub async fn work<K, E, F, Fut>(queue: &Queue<K>, workers: usize, shutdown: &CancellationToken, sync: F)
where
    K: Clone + Eq + Hash + Ord + Debug,
    E: Error + 'static,
    F: Fn(K) -> Fut,
    Fut: Future<Output = Result<Outcome, E>>,
{
    let one = || async {
        loop {
            let key = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                key = queue.get() => key,
            };
            match sync(key.clone()).await {
                Ok(Outcome::Done) => queue.forget(&key),
                Ok(Outcome::After(delay)) => {
                    queue.forget(&key);
                    queue.add_after(key.clone(), delay);
                }
                Ok(Outcome::Again) => queue.add_rate_limited(key.clone()),
                Err(error) => {
                    tracing::warn!(?key, error = %crate::Chain(&error), failures = queue.failures(&key), "sync failed; will try again");
                    queue.add_rate_limited(key.clone());
                }
            }
            queue.done(&key);
        }
    };
    futures::future::join_all((0..workers).map(|_| one())).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_waits_once_and_returns_if_changed_while_worked_on() {
        let queue = Queue::default();
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.len(), 1);
        let key = queue.get().await;
        queue.add("a");
        assert_eq!(queue.len(), 0, "one worker per key");
        queue.done(&key);
        assert_eq!(queue.get().await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn back_off_doubles_and_is_forgotten() {
        let queue = Queue::default();
        let mut waited = Vec::new();
        for _ in 0..4 {
            let start = Instant::now();
            queue.add_rate_limited("a");
            let key = queue.get().await;
            waited.push(start.elapsed().as_millis());
            queue.done(&key);
        }
        assert_eq!(waited, [5, 10, 20, 40]);
        queue.forget(&"a");
        let start = Instant::now();
        queue.add_rate_limited("a");
        queue.get().await;
        assert_eq!(start.elapsed().as_millis(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn back_off_ends_at_upstreams_maximum() {
        let queue = Queue::default();
        for _ in 0..40 {
            queue.inner.lock().delayed_until.clear();
            queue.add_rate_limited("a");
        }
        queue.inner.lock().delayed.clear();
        queue.inner.lock().delayed_until.clear();
        let start = Instant::now();
        queue.add_rate_limited("a");
        queue.get().await;
        assert_eq!(start.elapsed(), BACKOFF_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earlier_of_two_delays_wins_and_fires_once() {
        let queue = Queue::default();
        queue.add_after("a", Duration::from_secs(10));
        queue.add_after("a", Duration::from_secs(1));
        queue.add_after("a", Duration::from_secs(20));
        let start = Instant::now();
        let key = queue.get().await;
        assert_eq!(start.elapsed(), Duration::from_secs(1));
        queue.done(&key);
        assert!(tokio::time::timeout(Duration::from_secs(60), queue.get()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn workers_share_and_stop() {
        let queue = Queue::default();
        for key in 0..100 {
            queue.add(key);
        }
        let shutdown = CancellationToken::new();
        let seen = Mutex::new(HashSet::new());
        work(&queue, 4, &shutdown, |key| {
            let (seen, shutdown) = (&seen, &shutdown);
            async move {
                tokio::task::yield_now().await;
                seen.lock().insert(key);
                if seen.lock().len() == 100 {
                    shutdown.cancel();
                }
                Ok::<_, std::fmt::Error>(Outcome::Done)
            }
        })
        .await;
        assert_eq!(seen.lock().len(), 100);
    }
}
