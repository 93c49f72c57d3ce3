//! Operations as bytes for the maps, and the maps' bytes as operations.

use zerocopy::{FromBytes, IntoBytes};

use crate::maps::{Entry, MapError, MapSet, Table};
use crate::plan::{Book, Op};

/// Runs operations of one phase, which all concern one map in one way.
pub(super) fn run(maps: &mut impl MapSet, batch: &[(usize, Op)]) -> Result<(), MapError> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut keys: Vec<Vec<u8>> = Vec::new();
    let mut table = Table::Services;
    for (_, op) in batch {
        let (t, key, value) = encode(op);
        table = t;
        match value {
            Some(value) => entries.push((key, value)),
            None => keys.push(key),
        }
    }
    if keys.is_empty() { maps.update(table, &entries) } else { maps.delete(table, &keys) }
}

fn encode(op: &Op) -> (Table, Vec<u8>, Option<Vec<u8>>) {
    fn bytes(value: &(impl IntoBytes + zerocopy::Immutable)) -> Vec<u8> {
        value.as_bytes().to_vec()
    }
    match op {
        Op::PutBackend(key, value) => (Table::Backends, bytes(key), Some(bytes(value))),
        Op::PutNodeAddress(key) => (Table::NodeAddresses, bytes(key), Some(bytes(&1_u32))),
        Op::PutSlot(key, value) => (Table::Slots, bytes(key), Some(bytes(value))),
        Op::PutSource(key) => (Table::Sources, bytes(key), Some(bytes(&1_u32))),
        Op::PutService(key, value) => (Table::Services, bytes(key), Some(bytes(value))),
        Op::DeleteService(key) => (Table::Services, bytes(key), None),
        Op::DeleteSource(key) => (Table::Sources, bytes(key), None),
        Op::DeleteSlot(key) => (Table::Slots, bytes(key), None),
        Op::DeleteNodeAddress(key) => (Table::NodeAddresses, bytes(key), None),
        Op::DeleteBackend(key) => (Table::Backends, bytes(key), None),
    }
}

/// Reads all maps.
pub(super) fn read(maps: &mut impl MapSet) -> Result<Book, MapError> {
    let mut book = Book::default();
    for table in Table::ALL {
        for (key, value) in maps.dump(table)? {
            if let Some(op) = decode(table, &key, &value) {
                book.record(&op);
            }
        }
    }
    Ok(book)
}

/// `None` for an entry of another size, which the loader's check of the layout rules out.
fn decode(table: Table, key: &[u8], value: &[u8]) -> Option<Op> {
    fn read<T: FromBytes>(bytes: &[u8]) -> Option<T> {
        T::read_from_bytes(bytes).ok()
    }
    Some(match table {
        Table::Services => Op::PutService(read(key)?, read(value)?),
        Table::Slots => Op::PutSlot(read(key)?, read(value)?),
        Table::Backends => Op::PutBackend(read(key)?, read(value)?),
        Table::NodeAddresses => Op::PutNodeAddress(read(key)?),
        Table::Sources => Op::PutSource(read(key)?),
    })
}
