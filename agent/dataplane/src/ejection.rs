//! Passive ejection: backends of Services that opted in take no new connections for a while after some in a row have failed
//! (docs/adr/0012). The programs count; they wake the agent by a ring, so where nothing fails nothing is read.
//!
//! What is known lies in the pinned map: the next agent and every tool go on with it.

mod book;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use aya::maps::{Map, MapData, RingBuf};
use tokio::io::unix::AsyncFd;
use weft_ebpf_abi::{BackendKey, Failures, names};
use zerocopy::{FromBytes as _, IntoBytes as _};

use self::book::{Book, Change};
pub use self::book::{FIRST_SECONDS, LONGEST_SECONDS, Turn};
use crate::observe::ObserveError;
use crate::observe::pinned::PinnedMap;
use crate::programs::{ProgramError, Programs, check_layout, duplicate, mismatch};
use crate::sys;

/// Why failures can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum EjectionError {
    /// The maps are not there.
    #[error(transparent)]
    Programs(#[from] ProgramError),
    /// A map could not be used.
    #[error("cannot use map {map}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

fn failed(map: &'static str) -> impl FnOnce(std::io::Error) -> EjectionError {
    move |source| EjectionError::Map { map, source }
}

/// The watched backends of a node.
pub struct Ejections {
    map: OwnedFd,
    wake: AsyncFd<RingBuf<MapData>>,
    book: Book,
    turns: Vec<Turn>,
}

impl Ejections {
    /// Takes over what the map says; those that failed while no agent ran are ejected now. Wants a tokio runtime.
    ///
    /// # Errors
    /// If the maps can't be used.
    pub fn adopt(programs: &Programs, now: u32) -> Result<Self, EjectionError> {
        let Some(Map::HashMap(data)) = programs.ebpf.map(names::FAILURES) else {
            return Err(mismatch(names::FAILURES).into());
        };
        check_layout(data, names::FAILURES, size_of::<BackendKey>(), size_of::<Failures>())?;
        let map = duplicate(data, names::FAILURES)?;
        let Some(Map::RingBuf(data)) = programs.ebpf.map(names::WAKE) else {
            return Err(mismatch(names::WAKE).into());
        };
        let wrap = |source| ProgramError::Map { name: names::WAKE, source };
        let data = MapData::from_fd(duplicate(data, names::WAKE)?).map_err(wrap)?;
        let ring = RingBuf::try_from(Map::RingBuf(data)).map_err(wrap)?;
        // SAFETY: the descriptor is the map's, which lives as long as the ring and never changes.
        let wake = unsafe { AsyncFd::register(ring) }.map_err(|error| failed(names::WAKE)(error.into()))?;
        let (keys, values) = sys::read_all(map.as_fd(), size_of::<BackendKey>(), size_of::<Failures>())
            .map_err(failed(names::FAILURES))?;
        let keys = keys.chunks_exact(size_of::<BackendKey>());
        let values = values.chunks_exact(size_of::<Failures>());
        let known: BTreeMap<_, _> = keys
            .zip(values)
            .filter_map(|(k, v)| {
                Some((BackendKey::read_from_bytes(k).ok()?, Failures::read_from_bytes(v).ok()?))
            })
            .collect();
        let book = Book::adopt(known.clone());
        let mut adopted = Self { map, wake, book, turns: Vec::new() };
        for (key, found) in known {
            adopted.judge(key, &found, now);
        }
        Ok(adopted)
    }

    /// Makes these the backends that are watched, with their owners.
    pub fn watch(&mut self, wanted: &BTreeMap<BackendKey, u64>) {
        for change in self.book.watch(wanted) {
            if !self.write(&change) {
                self.book.forget(&change.0);
            }
        }
    }

    /// Whether any is watched.
    #[must_use]
    pub fn is_watching(&self) -> bool {
        !self.book.is_empty()
    }

    /// Waits until a program tells of failures, or one that is ejected is due. May be dropped at any time.
    pub async fn ready(&mut self) {
        let now = sys::monotonic_seconds();
        let due = async {
            match self.book.next() {
                Some(at) => tokio::time::sleep(Duration::from_secs(at.saturating_sub(now).into())).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ready = self.wake.readable_mut() => match ready {
                // The kernel wakes a reader that has taken everything: `take` does so before the next wait.
                Ok(mut guard) => guard.clear_ready(),
                Err(error) => {
                    tracing::warn!(%error, "failures are not heard of");
                    std::future::pending().await
                }
            },
            () = due => {}
        }
    }

    /// Takes what the programs tell, and brings back those whose time is over.
    pub fn take(&mut self, now: u32) -> Vec<Turn> {
        let mut told = BTreeSet::new();
        while let Some(item) = self.wake.get_mut().next() {
            told.extend(BackendKey::read_from_bytes(&item));
        }
        for key in told {
            let mut found = Failures::default();
            match sys::lookup(self.map.as_fd(), key.as_bytes(), found.as_mut_bytes()) {
                Ok(true) => self.judge(key, &found, now),
                // It went meanwhile.
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "what is known of a backend's failures can't be read"),
            }
        }
        for (turn, change) in self.book.due(now) {
            self.write(&change);
            self.turns.push(turn);
        }
        std::mem::take(&mut self.turns)
    }

    /// Those that are ejected.
    #[must_use]
    pub fn ejected(&self) -> BTreeSet<BackendKey> {
        self.book.ejected()
    }

    fn judge(&mut self, key: BackendKey, found: &Failures, now: u32) {
        if let Some((turn, change)) = self.book.failed(key, found, now) {
            self.write(&change);
            self.turns.push(turn);
        }
    }

    /// What can't be written is logged: the backend is then not watched, or tells again.
    fn write(&self, (key, entry): &Change) -> bool {
        let done = match entry {
            Some(entry) => sys::update_batch(self.map.as_fd(), key.as_bytes(), entry.as_bytes(), 1).1,
            None => sys::delete_batch(self.map.as_fd(), key.as_bytes(), 1).1,
        };
        match done {
            // One that is gone is as it should be.
            Err(error) if entry.is_some() || error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(backend = ?key, %error, "what is known of a backend's failures can't be written");
                false
            }
            _ => true,
        }
    }
}

impl std::fmt::Debug for Ejections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ejections").field("book", &self.book).finish_non_exhaustive()
    }
}

/// The clock of [`Ejections`]: whole seconds of the monotonic clock.
#[must_use]
pub fn now() -> u32 {
    sys::monotonic_seconds()
}

/// The backends that are ejected, with the seconds until they are back, from the pinned map; none where there is no such map yet.
pub(crate) fn pinned(pins: &Path) -> Result<BTreeMap<BackendKey, u32>, ObserveError> {
    if !pins.join("maps").join(names::FAILURES).exists() {
        return Ok(BTreeMap::new());
    }
    let map = PinnedMap::open::<BackendKey, Failures>(pins, names::FAILURES)?;
    let all = map.dump::<BackendKey, Failures>()?.into_iter().filter(|(_, f)| f.back_at != 0);
    let now = now();
    Ok(all.map(|(key, f)| (key, f.back_at.saturating_sub(now))).collect())
}
