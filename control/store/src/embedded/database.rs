//! The three keyspaces on disk: opening them, and consistent reads of them.

use std::path::Path;

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode, Readable, Snapshot};

use super::Options;
use super::format::{
    self, COMPACTED_KEY, FORMAT, FORMAT_KEY, Head, Place, REMOVED_KEY, REVISION_KEY, Record, damaged,
    scan_bounds,
};
use crate::{Error, Event, KeyValue, Range, Revision};

/// One thread flushes while the other compacts; with a single one a long compaction would hold up flushes, and so writes.
const WORKERS: usize = 2;

/// fjall's lowest bound. A journal file is 64 MiB, sparse until used.
const JOURNAL_BYTES: u64 = 128 << 20;

pub(super) struct Db {
    pub(super) db: Database,
    /// Place → change. The only copy of the values.
    pub(super) log: Keyspace,
    /// Key and revision → where that version is.
    pub(super) index: Keyspace,
    /// Live key → where its state is; and the store's own revisions.
    pub(super) head: Keyspace,
}

impl Db {
    /// Opens the keyspaces below `folder`, making them first if need be.
    ///
    /// fjall can't resume a creation that was cut short. So it happens in a folder of another name, which becomes the
    /// database by a rename.
    pub(super) fn open(folder: &Path, options: &Options) -> Result<Self, Error> {
        let (ready, half) = (folder.join("db"), folder.join("db.new"));
        if !ready.exists() {
            if half.exists() {
                std::fs::remove_dir_all(&half)
                    .map_err(|error| unavailable("clearing a half-made database", error))?;
            }
            let made = Self::open_fjall(&half, options)?;
            made.head
                .insert(FORMAT_KEY, FORMAT.to_be_bytes())
                .map_err(|error| fjall_error("creating", error))?;
            made.db.persist(PersistMode::SyncAll).map_err(|error| fjall_error("creating", error))?;
            drop(made);
            std::fs::rename(&half, &ready)
                .and_then(|()| std::fs::File::open(folder)?.sync_all())
                .map_err(|error| unavailable("naming the new database", error))?;
        }
        let db = Self::open_fjall(&ready, options)?;
        let format = db.view().number(FORMAT_KEY)?;
        if format != FORMAT {
            return Err(damaged(&format!("its format is {format}, this program's is {FORMAT}")));
        }
        Ok(db)
    }

    fn open_fjall(folder: &Path, options: &Options) -> Result<Self, Error> {
        let opening = |error| fjall_error("opening", error);
        let db = Database::builder(folder)
            .cache_size(options.cache_bytes)
            .worker_threads(WORKERS)
            .max_journaling_size(JOURNAL_BYTES)
            .open()
            .map_err(opening)?;
        let keyspace = |name, bytes| {
            db.keyspace(name, || KeyspaceCreateOptions::default().max_memtable_size(bytes)).map_err(opening)
        };
        // The log carries the values; what the others hold per change is some 100 bytes.
        let log = keyspace("log", options.memtable_bytes)?;
        let index = keyspace("index", options.memtable_bytes / 2)?;
        let head = keyspace("head", options.memtable_bytes / 2)?;
        Ok(Self { db, log, index, head })
    }

    /// Everything as of now, unmoved by later writes.
    pub(super) fn view(&self) -> View<'_> {
        View { snapshot: self.db.snapshot(), db: self }
    }
}

/// A consistent view of the database. Holds back fjall's garbage collection: keep it short.
pub(super) struct View<'a> {
    snapshot: Snapshot,
    db: &'a Db,
}

/// Records of the log, whole revisions, as read for a watch or a removal.
pub(super) struct Chunk {
    pub(super) records: Vec<(Place, Record)>,
    /// Everything up to here has been read.
    pub(super) through: Revision,
    /// How far compaction was at the time.
    pub(super) compacted: Revision,
}

impl View<'_> {
    fn number(&self, key: &[u8]) -> Result<u64, Error> {
        let bytes = self.snapshot.get(&self.db.head, key).map_err(reading)?;
        bytes.map_or(Ok(0), |bytes| format::decode_u64(&bytes))
    }

    /// The newest durable revision; 1 for an empty store, as in etcd.
    pub(super) fn revision(&self) -> Result<Revision, Error> {
        self.number(REVISION_KEY).map(|revision| Revision(revision.max(1)))
    }

    pub(super) fn compacted(&self) -> Result<Revision, Error> {
        self.number(COMPACTED_KEY).map(Revision)
    }

    pub(super) fn removed(&self) -> Result<Revision, Error> {
        self.number(REMOVED_KEY).map(Revision)
    }

    pub(super) fn head(&self, key: &str) -> Result<Option<Head>, Error> {
        let bytes = self.snapshot.get(&self.db.head, key).map_err(reading)?;
        bytes.map(|bytes| Head::decode(&bytes)).transpose()
    }

    fn record(&self, place: Place) -> Result<Option<Record>, Error> {
        let bytes = self.snapshot.get(&self.db.log, place.encode()).map_err(reading)?;
        bytes.map(|bytes| Record::decode(&bytes)).transpose()
    }

    /// The state that is kept at a place that something retained points to.
    pub(super) fn kv(&self, place: Place) -> Result<KeyValue, Error> {
        self.record(place)?
            .and_then(|record| record.into_kv(place.revision))
            .ok_or_else(|| damaged(&format!("the log has no value at {place:?}")))
    }

    /// The live keys of a range, at most `limit` (0: all), and whether there are more.
    pub(super) fn range_newest(&self, range: &Range, limit: usize) -> Result<(Vec<KeyValue>, bool), Error> {
        let mut items = Vec::new();
        for entry in self.scan(&self.db.head, range) {
            let head = Head::decode(&entry.value().map_err(reading)?)?;
            if limit != 0 && items.len() == limit {
                return Ok((items, true));
            }
            items.push(self.kv(head.place)?);
        }
        Ok((items, false))
    }

    /// The same as of an earlier revision, by the newest version of each key that isn't past it.
    pub(super) fn range_at(
        &self,
        range: &Range,
        revision: Revision,
        limit: usize,
    ) -> Result<(Vec<KeyValue>, bool), Error> {
        let mut items = Vec::new();
        let mut newest: Option<(String, Option<Head>)> = None;
        for entry in self.scan(&self.db.index, range) {
            let (index_key, version) = entry.into_inner().map_err(reading)?;
            let (key, at) = format::decode_index_key(&index_key)?;
            if at > revision {
                continue;
            }
            let version = format::decode_version(&version)?;
            match &mut newest {
                Some((known, state)) if known == key => *state = version,
                _ => {
                    if !self.take(newest.replace((key.to_owned(), version)), limit, &mut items)? {
                        return Ok((items, true));
                    }
                }
            }
        }
        let all = self.take(newest, limit, &mut items)?;
        Ok((items, !all))
    }

    /// Adds a key's state to a page; false if it is live and the page is full.
    fn take(
        &self,
        found: Option<(String, Option<Head>)>,
        limit: usize,
        items: &mut Vec<KeyValue>,
    ) -> Result<bool, Error> {
        let Some((_, Some(head))) = found else { return Ok(true) };
        if limit != 0 && items.len() == limit {
            return Ok(false);
        }
        items.push(self.kv(head.place)?);
        Ok(true)
    }

    fn scan(&self, keyspace: &Keyspace, range: &Range) -> fjall::Iter {
        match scan_bounds(range) {
            // An empty or backward range; BTreeMap-like scans panic on it.
            (start, Some(end)) if start >= end => self.snapshot.range(keyspace, [0u8; 0]..[0u8; 0]),
            (start, Some(end)) => self.snapshot.range(keyspace, start..end),
            (start, None) => self.snapshot.range(keyspace, start..),
        }
    }

    /// Reads the log behind `after`, up to `until`, about `limit` records and `bytes` bytes of it.
    pub(super) fn log(&self, after: Revision, until: Revision, bounds: ChunkBounds) -> Result<Chunk, Error> {
        let until = until.min(self.revision()?);
        let mut chunk =
            Chunk { records: Vec::new(), through: until.max(after), compacted: self.compacted()? };
        let from = Place::first(Revision(after.0 + 1)).encode();
        let mut bytes = 0;
        for entry in self.snapshot.range(&self.db.log, from..) {
            let (place, record) = entry.into_inner().map_err(reading)?;
            let place = Place::decode(&place)?;
            if place.revision > until {
                break;
            }
            let last = chunk.records.last().map(|(place, _): &(Place, Record)| place.revision);
            if let Some(last) = last
                && last != place.revision
                && (chunk.records.len() >= bounds.records || bytes >= bounds.bytes)
            {
                chunk.through = last;
                break;
            }
            bytes += record.len();
            chunk.records.push((place, Record::decode(&record)?));
        }
        Ok(chunk)
    }

    /// Turns a change into what a watcher gets.
    pub(super) fn event(&self, place: Place, record: Record) -> Result<Event, Error> {
        let prev = record.prev.map(|place| self.kv(place)).transpose()?;
        let key = record.key.clone();
        Ok(match record.into_kv(place.revision) {
            Some(kv) => Event::Put { kv, prev },
            None => Event::Delete { key, revision: place.revision, prev },
        })
    }
}

/// How much of the log is read at once; the last revision is always whole.
#[derive(Clone, Copy)]
pub(super) struct ChunkBounds {
    pub(super) records: usize,
    pub(super) bytes: usize,
}

fn reading(error: fjall::Error) -> Error {
    fjall_error("reading", error)
}

pub(super) fn fjall_error(during: &'static str, error: fjall::Error) -> Error {
    let stopped =
        matches!(error, fjall::Error::Poisoned | fjall::Error::Locked | fjall::Error::KeyspaceDeleted);
    if stopped || has_io_cause(&error) {
        return unavailable(during, error);
    }
    // What is left tells of bytes that aren't what they were written as.
    Error::Damaged(format!("{during}: {error}"))
}

fn has_io_cause(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|error| error.is::<std::io::Error>())
}

pub(super) fn unavailable(
    during: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> Error {
    Error::Unavailable { during, source: Some(Box::new(source)) }
}
