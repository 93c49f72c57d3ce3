//! What a request to the store may hold; both backends refuse the same requests before they reach a disk or a socket.

use crate::{Condition, Error, Op};

/// Longest key, in bytes. The longest that the API makes is below 1 KiB; fjall's own bound is 64 KiB.
pub const MAX_KEY_BYTES: usize = 4096;

/// Largest value, in bytes: the API server takes bodies up to 3 MiB, and what it adds to an object is small.
/// An etcd server has a lower bound of its own (1.5 MiB unless told otherwise).
pub const MAX_VALUE_BYTES: usize = 4 << 20;

/// Most operations, and most conditions, of one transaction (etcd's default).
pub const MAX_TXN_OPS: usize = 128;

/// Refuses keys that are empty, too long, or hold a NUL, which separates a key from its revision on disk.
pub(crate) fn check_key(key: &str) -> Result<(), Error> {
    if key.is_empty() {
        return Err(Error::Invalid("the key is empty"));
    }
    if key.len() > MAX_KEY_BYTES {
        return Err(Error::Invalid("the key is too long"));
    }
    if key.as_bytes().contains(&0) {
        return Err(Error::Invalid("the key holds a NUL byte"));
    }
    Ok(())
}

/// Refuses a transaction that is out of bounds or writes a key twice.
pub(crate) fn check_txn(conditions: &[Condition], ops: &[Op]) -> Result<(), Error> {
    if conditions.len() > MAX_TXN_OPS || ops.len() > MAX_TXN_OPS {
        return Err(Error::Invalid("the transaction has too many conditions or operations"));
    }
    for condition in conditions {
        check_key(condition.key())?;
    }
    for (n, op) in ops.iter().enumerate() {
        check_key(op.key())?;
        if let Op::Put { value, .. } = op
            && value.len() > MAX_VALUE_BYTES
        {
            return Err(Error::Invalid("the value is too large"));
        }
        if ops[..n].iter().any(|other| other.key() == op.key()) {
            return Err(Error::Invalid("the transaction writes a key twice"));
        }
    }
    Ok(())
}

impl Condition {
    /// The key that the condition is about.
    pub fn key(&self) -> &str {
        match self {
            Self::Absent(key) | Self::ModRevision(key, _) => key,
        }
    }

    /// Whether the condition holds for a key whose last write has this revision (`None`: the key doesn't exist).
    pub fn holds(&self, mod_revision: Option<crate::Revision>) -> bool {
        match self {
            Self::Absent(_) => mod_revision.is_none(),
            Self::ModRevision(_, wanted) => mod_revision == Some(*wanted),
        }
    }
}

impl Op {
    /// The key that the operation writes.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

impl crate::Event {
    /// The key that changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { kv, .. } => &kv.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The revision of the change.
    pub fn revision(&self) -> crate::Revision {
        match self {
            Self::Put { kv, .. } => kv.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

impl crate::Range {
    /// Whether the range holds this key.
    pub fn contains(&self, key: &str) -> bool {
        key >= self.start.as_str() && self.end.as_deref().is_none_or(|end| key < end)
    }
}
