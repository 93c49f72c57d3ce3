//! The embedded store: one process, one folder, one writer; acknowledged means durable.
//!
//! `README.md` beside the modules draws the layout on disk and the way of a write.

mod database;
mod format;
mod hub;
mod removal;
#[cfg(test)]
mod tests;
mod watch;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use tokio::sync::{mpsc, oneshot};

use crate::limits::{check_key, check_txn};
use crate::{Condition, Error, KeyValue, Op, Page, Range, Revision, Store, TxnOutcome, Watch};
use database::{Db, View, unavailable};
use hub::{Hub, Subscription};
use writer::{Request, Writer};

/// What an embedded store may use.
#[derive(Clone, Debug)]
pub struct Options {
    /// Cache of blocks read from disk, in bytes. The watch cache above serves almost every read, so it is small.
    pub cache_bytes: u64,
    /// What the log collects in memory before it is written out as a table, in bytes; the two indexes get half each.
    pub memtable_bytes: u64,
    /// Transactions that may wait for the writer; further callers wait for a place.
    pub queue: usize,
    /// Batches that may wait for one watcher; it is dropped as lagging after that.
    pub watch_buffer: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { cache_bytes: 4 << 20, memtable_bytes: 4 << 20, queue: 1024, watch_buffer: 1024 }
    }
}

/// The store in a folder of this machine. Dropping it waits for what is queued.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    /// `None` only while dropping.
    queue: Option<mpsc::Sender<Request>>,
    threads: Vec<JoinHandle<()>>,
}

/// What the store, its threads and its watchers hold in common.
struct Shared {
    db: Db,
    hub: Hub,
    watch_buffer: usize,
    stopping: AtomicBool,
    /// Held for as long as anybody can touch the database. Last, so that it is dropped last.
    _lock: std::fs::File,
}

impl EmbeddedStore {
    /// Opens the store in `path`, making it if it isn't there. Another process that has it open is an error at once.
    ///
    /// Blocks for as long as the journal takes to read back, at most 64 MiB of it.
    pub fn open(path: impl AsRef<Path>, options: Options) -> Result<Self, Error> {
        let path = path.as_ref();
        let lock = lock(path)?;
        let db = Db::open(path, &options)?;
        let view = db.view();
        let (revision, compacted) = (view.revision()?, view.compacted()?);
        drop(view);
        let shared = Arc::new(Shared {
            db,
            hub: Hub::new(revision),
            watch_buffer: options.watch_buffer,
            stopping: AtomicBool::new(false),
            _lock: lock,
        });
        let (sender, queue) = mpsc::channel(options.queue.max(1));
        let (removals, targets) = std::sync::mpsc::channel();
        let mut store = Self { shared: Arc::clone(&shared), queue: Some(sender), threads: Vec::new() };
        let writer = Writer::new(Arc::clone(&shared), removals, revision, compacted);
        store.spawn("store-writer", move || writer.run(queue))?;
        store.spawn("store-removal", move || removal::run(&shared, compacted, &targets))?;
        Ok(store)
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(body);
        self.threads.push(thread.map_err(|error| unavailable("starting its threads", error))?);
        Ok(())
    }

    async fn request<T>(&self, make: impl FnOnce(writer::Reply<T>) -> Request) -> Result<T, Error> {
        let stopped = || Error::Unavailable { during: "writing: it is stopping", source: None };
        let (reply, answer) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or_else(stopped)?;
        queue
            .send(make(reply))
            .await
            .map_err(|error| unavailable("writing: it is stopping", Unsent::from(error)))?;
        answer.await.map_err(writer::stopped)?
    }
}

/// A request that found the writer gone. The request itself is not worth keeping in the error.
#[derive(Debug, thiserror::Error)]
#[error("the writer has stopped")]
struct Unsent;

impl From<mpsc::error::SendError<Request>> for Unsent {
    fn from(_: mpsc::error::SendError<Request>) -> Self {
        Self
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.queue = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the store panicked");
            }
        }
    }
}

/// Takes the folder's lock file. The kernel gives it back when the process ends, however it ends.
fn lock(path: &Path) -> Result<std::fs::File, Error> {
    let during = "locking its folder (another process may have it open)";
    std::fs::create_dir_all(path).map_err(|error| unavailable("making its folder", error))?;
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path.join("lock"));
    let file = file.map_err(|error| unavailable(during, error))?;
    file.try_lock().map_err(|error| unavailable(during, error))?;
    Ok(file)
}

impl Shared {
    fn subscribe(&self, range: Range) -> Subscription {
        self.hub.subscribe(range, self.watch_buffer)
    }

    /// Reads where blocking is allowed: a range may have to come from disk.
    async fn read<T, F>(self: &Arc<Self>, read: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&View<'_>) -> Result<T, Error> + Send + 'static,
    {
        let shared = Arc::clone(self);
        let read = tokio::task::spawn_blocking(move || read(&shared.db.view()));
        read.await.map_err(|error| unavailable("reading", error))?
    }
}

#[async_trait::async_trait]
impl Store for EmbeddedStore {
    async fn txn(&self, conditions: Vec<Condition>, ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        check_txn(&conditions, &ops)?;
        self.request(|reply| Request::Txn { conditions, ops, reply }).await
    }

    /// Reads on the caller's thread: two look-ups, mostly in memory, cost less than a change of threads.
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        check_key(key)?;
        let view = self.shared.db.view();
        view.head(key)?.map(|head| view.kv(head.place)).transpose()
    }

    async fn range(&self, range: Range, revision: Revision, limit: usize) -> Result<Page, Error> {
        self.shared
            .read(move |view| {
                let (current, oldest) = (view.revision()?, view.compacted()?);
                let at = if revision.0 == 0 { current } else { revision };
                if at > current {
                    return Err(Error::Future { requested: at, current });
                }
                if at < oldest {
                    return Err(Error::Compacted { requested: at, oldest });
                }
                let (items, more) = if at == current {
                    view.range_newest(&range, limit)?
                } else {
                    view.range_at(&range, at, limit)?
                };
                Ok(Page { revision: at, items, more })
            })
            .await
    }

    async fn watch(&self, range: Range, after: Revision) -> Result<Watch, Error> {
        watch::open(Arc::clone(&self.shared), range, after)
    }

    async fn current_revision(&self) -> Result<Revision, Error> {
        self.shared.db.view().revision()
    }

    async fn compact(&self, revision: Revision) -> Result<(), Error> {
        self.request(|reply| Request::Compact { revision, reply }).await
    }
}
