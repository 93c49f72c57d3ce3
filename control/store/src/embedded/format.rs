//! The bytes on disk: keys and values of the three keyspaces (drawn in the module's README).

use bytes::Bytes;

use crate::{Error, KeyValue, Revision};

/// Where the newest durable revision is kept in `head`. User keys hold no NUL, so these can't be one.
pub(super) const REVISION_KEY: &[u8] = b"\0revision";
/// The revision that reads and watches may not go below.
pub(super) const COMPACTED_KEY: &[u8] = b"\0compacted";
/// Up to which compacted revision the superseded records have been removed.
pub(super) const REMOVED_KEY: &[u8] = b"\0removed";
/// The layout's version; another one is refused.
pub(super) const FORMAT_KEY: &[u8] = b"\0format";
/// The layout that this file describes.
pub(super) const FORMAT: u64 = 1;

/// The place of a record in the log: a revision and the operation's number within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) revision: Revision,
    pub(super) ordinal: u32,
}

impl Place {
    pub(super) const BYTES: usize = 12;

    /// The first place of a revision.
    pub(super) fn first(revision: Revision) -> Self {
        Self { revision, ordinal: 0 }
    }

    /// Big-endian, so that the log's order is the order of revisions.
    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&self.revision.0.to_be_bytes());
        out[8..].copy_from_slice(&self.ordinal.to_be_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader(bytes);
        let place = reader.place()?;
        reader.end()?;
        Ok(place)
    }
}

/// A live key's state without its value: the value of `head`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) place: Place,
    pub(super) create_revision: Revision,
}

impl Head {
    pub(super) fn encode(self) -> [u8; Place::BYTES + 8] {
        let mut out = [0; Place::BYTES + 8];
        out[..Place::BYTES].copy_from_slice(&self.place.encode());
        out[Place::BYTES..].copy_from_slice(&self.create_revision.0.to_be_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader(bytes);
        let head = Self { place: reader.place()?, create_revision: Revision(reader.u64()?) };
        reader.end()?;
        Ok(head)
    }
}

/// One version of a key: the value of `index`. `None` is a deletion.
pub(super) fn encode_version(head: Option<Head>) -> Vec<u8> {
    head.map_or_else(Vec::new, |head| head.encode().to_vec())
}

pub(super) fn decode_version(bytes: &[u8]) -> Result<Option<Head>, Error> {
    if bytes.is_empty() { Ok(None) } else { Head::decode(bytes).map(Some) }
}

/// `key NUL revision`: all versions of a key are neighbours, oldest first, in the order of keys.
pub(super) fn index_key(key: &str, revision: Revision) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len() + 9);
    out.extend_from_slice(key.as_bytes());
    out.push(0);
    out.extend_from_slice(&revision.0.to_be_bytes());
    out
}

pub(super) fn decode_index_key(bytes: &[u8]) -> Result<(&str, Revision), Error> {
    let at = bytes.len().checked_sub(9).ok_or_else(|| damaged("a short index key"))?;
    let (key, rest) = bytes.split_at(at);
    let mut reader = Reader(&rest[1..]);
    let key = std::str::from_utf8(key)
        .map_err(|error| damaged(&format!("an index key that isn't text: {error}")))?;
    Ok((key, Revision(reader.u64()?)))
}

/// A change as the log keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) key: String,
    /// Value and creation of a put; `None` is a deletion.
    pub(super) put: Option<(Revision, Bytes)>,
    /// Where the version before is, unless the key is new.
    pub(super) prev: Option<Place>,
}

const PUT: u8 = 0;
const DELETE: u8 = 1;

impl Record {
    pub(super) fn encode(&self) -> Vec<u8> {
        let (kind, create, value) = match &self.put {
            Some((create, value)) => (PUT, *create, value.as_ref()),
            None => (DELETE, Revision(0), &[][..]),
        };
        let mut out = Vec::with_capacity(1 + 8 + Place::BYTES + 4 + self.key.len() + value.len());
        out.push(kind);
        out.extend_from_slice(&create.0.to_be_bytes());
        // Revision 0 is never written, so it can stand for "none".
        out.extend_from_slice(&self.prev.unwrap_or(Place::first(Revision(0))).encode());
        let key_bytes = u32::try_from(self.key.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&key_bytes.to_be_bytes());
        out.extend_from_slice(self.key.as_bytes());
        out.extend_from_slice(value);
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader(bytes);
        let kind = reader.u8()?;
        let create = Revision(reader.u64()?);
        let prev = reader.place()?;
        let key_bytes = reader.u32()? as usize;
        let key = std::str::from_utf8(reader.take(key_bytes)?)
            .map_err(|error| damaged(&format!("a key in the log that isn't text: {error}")))?
            .to_owned();
        let put = match kind {
            PUT => Some((create, Bytes::copy_from_slice(reader.0))),
            DELETE => None,
            other => return Err(damaged(&format!("a log record of kind {other}"))),
        };
        Ok(Self { key, put, prev: (prev.revision.0 != 0).then_some(prev) })
    }

    /// The key's state after this change, `None` after a deletion.
    pub(super) fn into_kv(self, revision: Revision) -> Option<KeyValue> {
        let Self { key, put, .. } = self;
        put.map(|(create_revision, value)| KeyValue { key, value, create_revision, mod_revision: revision })
    }
}

/// Bounds for a scan over keys, and over keys followed by NUL and a revision, that mean the same as the range's.
///
/// Callers continue a range after a key with `key NUL`. No key holds a NUL, so "from `key NUL`" is "from
/// `key 0x01`", and so is "below `key NUL`" once versions of `key` itself (`key NUL revision`) must count as below.
pub(super) fn scan_bounds(range: &crate::Range) -> (Vec<u8>, Option<Vec<u8>>) {
    // The first byte that a key may begin with is 1: this skips the store's own entries in `head`.
    let start = if range.start.is_empty() { vec![1] } else { scan_bound(&range.start) };
    (start, range.end.as_deref().map(scan_bound))
}

fn scan_bound(bound: &str) -> Vec<u8> {
    match bound.as_bytes().iter().position(|byte| *byte == 0) {
        Some(at) => [&bound.as_bytes()[..at], &[1]].concat(),
        None => bound.as_bytes().to_vec(),
    }
}

pub(super) fn decode_u64(bytes: &[u8]) -> Result<u64, Error> {
    let mut reader = Reader(bytes);
    let number = reader.u64()?;
    reader.end()?;
    Ok(number)
}

pub(super) fn damaged(what: &str) -> Error {
    Error::Damaged(what.to_owned())
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Error> {
        let (head, rest) =
            self.0.split_at_checked(bytes).ok_or_else(|| damaged("a record that ends too early"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u8(&mut self) -> Result<u8, Error> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_be_bytes)
    }

    fn place(&mut self) -> Result<Place, Error> {
        Ok(Place { revision: Revision(self.u64()?), ordinal: self.u32()? })
    }

    fn end(&self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(damaged("a record that is too long")) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Range;

    proptest! {
        #[test]
        fn a_record_survives_its_encoding(
            key in "[a-z/]{1,40}", value in proptest::collection::vec(any::<u8>(), 0..64),
            create in 1u64.., prev in proptest::option::of((1u64.., any::<u32>())), delete: bool,
        ) {
            let record = Record {
                key,
                put: (!delete).then(|| (Revision(create), Bytes::from(value))),
                prev: prev.map(|(revision, ordinal)| Place { revision: Revision(revision), ordinal }),
            };
            prop_assert_eq!(Record::decode(&record.encode()).unwrap(), record);
        }

        #[test]
        fn bytes_from_anywhere_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = (Record::decode(&bytes), Head::decode(&bytes), Place::decode(&bytes), decode_index_key(&bytes));
        }

        #[test]
        fn scan_bounds_keep_exactly_the_ranges_keys(
            key in "[a-c\u{1}]{1,3}", start in "[a-c\u{0}]{0,3}", end in "[a-c\u{0}]{0,3}", revision: u64,
        ) {
            let range = Range { start, end: Some(end) };
            let (low, high) = scan_bounds(&range);
            let high = high.unwrap();
            let inside = |bytes: &[u8]| bytes >= low.as_slice() && bytes < high.as_slice();
            // A NUL in the middle of a bound is followed by nothing that a key could tell apart.
            let wanted = range.contains(&key);
            prop_assert_eq!(inside(key.as_bytes()), wanted);
            prop_assert_eq!(inside(&index_key(&key, Revision(revision))), wanted);
        }
    }
}
