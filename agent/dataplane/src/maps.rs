//! The maps behind one trait: the kernel's, in memory, and ones that fail.

pub mod faulty;
pub mod kernel;
pub mod memory;

use std::fmt::Debug;
use std::hash::Hash;

use weft_ebpf_abi::{names, sizes};

/// The tables that one planner keeps.
pub trait Kind: Copy + Debug + Eq + Hash {
    /// Name of the map.
    fn name(self) -> &'static str;
}

/// A map that the planner of Services keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Services' addresses and ports.
    Services,
    /// Places in lists of backends.
    Slots,
    /// Backends.
    Backends,
    /// Addresses of the node.
    NodeAddresses,
    /// Ranges of clients that may use a list.
    Sources,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Services, Self::Slots, Self::Backends, Self::NodeAddresses, Self::Sources];

    /// The name in metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Slots => "slots",
            Self::Backends => "backends",
            Self::NodeAddresses => "node_addresses",
            Self::Sources => "sources",
        }
    }

    /// How many entries fit.
    #[must_use]
    pub const fn capacity(self) -> u32 {
        match self {
            Self::Services => sizes::SERVICES,
            Self::Slots => sizes::SLOTS,
            Self::Backends => sizes::BACKENDS,
            Self::NodeAddresses => sizes::NODE_ADDRESSES,
            Self::Sources => sizes::SOURCES,
        }
    }
}

impl Kind for Table {
    fn name(self) -> &'static str {
        match self {
            Self::Services => names::SERVICES,
            Self::Slots => names::SLOTS,
            Self::Backends => names::BACKENDS,
            Self::NodeAddresses => names::NODE_ADDRESSES,
            Self::Sources => names::SOURCES,
        }
    }
}

/// Why a map could not be changed or read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} map {map}")]
pub struct MapError {
    /// `update`, `delete` or `read`.
    pub op: &'static str,
    /// Name of the map.
    pub map: &'static str,
    /// How many entries were done before it failed, in the order given.
    pub done: usize,
    /// What the kernel said.
    #[source]
    pub source: std::io::Error,
}

impl MapError {
    /// For a person: what failed and why. Hash maps and tries have different words for being full.
    #[must_use]
    pub fn reason(&self) -> String {
        match self.source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) if self.op == "update" => format!("map {} is full", self.map),
            Some(_) | None => format!("{self}: {}", self.source),
        }
    }
}

/// A key and a value as they stand in a map.
pub type Entry = (Vec<u8>, Vec<u8>);

/// A set of maps.
pub trait MapSet<T: Kind = Table> {
    /// Sets entries, in order, and stops at the first that fails.
    fn update(&mut self, table: T, entries: &[Entry]) -> Result<(), MapError>;
    /// Removes keys, in order, and stops at the first that fails; one that is not there counts as removed.
    fn delete(&mut self, table: T, keys: &[Vec<u8>]) -> Result<(), MapError>;
    /// All entries, in no order.
    fn dump(&mut self, table: T) -> Result<Vec<Entry>, MapError>;
}
