//! Owns one object of the cache: its final bytes and a small header.
//!
//! The store holds an object's JSON without `resourceVersion`, with `metadata` opened early (see
//! [`object_value_bytes`]), so the revision is put in at a known place without parsing:
//!
//! ```text
//! stored:  {"apiVersion":"v1","kind":"Pod","metadata":{"name":…},…}
//! buffer: ,{"apiVersion":"v1","kind":"Pod","metadata":{"resourceVersion":"7","name":…},…}}\n
//!         ^ a list takes it from here                 the end of a watch event is there ^
//! ```

use bytes::{BufMut, Bytes, BytesMut};
use serde_json::Value;
use std::sync::Arc;
use weft_control_api::kinds::Kind;
use weft_control_api::strategy;

const METADATA: &[u8] = b"\"metadata\":{";
const REVISION: &[u8] = b"\"resourceVersion\":\"";
/// `apiVersion` and `kind` are far shorter than this, so `metadata` opens before it.
const SEARCH_BYTES: usize = 400;

/// An object's bytes with what selectors and authorization need to know without parsing it.
#[derive(Debug)]
pub(crate) struct Item {
    /// `namespace/name` or `name`.
    pub(crate) key: Arc<str>,
    /// The revision of its last write.
    pub(crate) revision: u64,
    /// Its uid.
    pub(crate) uid: Box<str>,
    /// Its labels, sorted.
    pub(crate) labels: Box<[(Box<str>, Box<str>)]>,
    /// The fields that field selectors may name.
    pub(crate) fields: Box<[(&'static str, Box<str>)]>,
    buffer: Bytes,
    /// Where the revision's digits stand in `buffer`.
    digits: std::ops::Range<usize>,
}

/// Why stored bytes are no object.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ItemError {
    /// The value isn't JSON.
    #[error("the stored value of {key} is not JSON")]
    Json {
        /// The key in the store.
        key: String,
        /// Where it broke.
        #[source]
        source: serde_json::Error,
    },
    /// The value doesn't open its metadata where it should.
    #[error("the stored value of {key} has no metadata in its place")]
    Shape {
        /// The key in the store.
        key: String,
    },
}

/// The bytes that are stored for an object: type first, then metadata, then the rest; no `resourceVersion`.
pub(crate) fn object_value_bytes(object: &Value) -> Bytes {
    let mut out = Vec::with_capacity(1024);
    out.extend_from_slice(b"{\"apiVersion\":");
    put_json(&mut out, object.get("apiVersion").unwrap_or(&Value::Null));
    out.extend_from_slice(b",\"kind\":");
    put_json(&mut out, object.get("kind").unwrap_or(&Value::Null));
    out.extend_from_slice(b",\"metadata\":{");
    let mut first = true;
    for (key, value) in object.get("metadata").and_then(Value::as_object).into_iter().flatten() {
        if key != "resourceVersion" {
            put_member(&mut out, key, value, &mut first);
        }
    }
    out.push(b'}');
    let mut first = false;
    for (key, value) in object.as_object().into_iter().flatten() {
        if !matches!(key.as_str(), "apiVersion" | "kind" | "metadata") {
            put_member(&mut out, key, value, &mut first);
        }
    }
    out.push(b'}');
    Bytes::from(out)
}

fn put_member(out: &mut Vec<u8>, key: &str, value: &Value, first: &mut bool) {
    if !*first {
        out.push(b',');
    }
    *first = false;
    put_json(out, &Value::String(key.to_owned()));
    out.push(b':');
    put_json(out, value);
}

fn put_json(out: &mut Vec<u8>, value: &Value) {
    serde_json::to_writer(out, value).expect("a JSON value has string keys and a Vec takes every write");
}

impl Item {
    /// Makes an item of a stored value.
    pub(crate) fn decode(kind: &Kind, key: &str, revision: u64, value: &[u8]) -> Result<Self, ItemError> {
        let object: Value = serde_json::from_slice(value)
            .map_err(|source| ItemError::Json { key: key.to_owned(), source })?;
        let metadata = &object["metadata"];
        let mut labels: Vec<(Box<str>, Box<str>)> = metadata["labels"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.as_str().into(), v.as_str().unwrap_or_default().into()))
            .collect();
        labels.sort();
        let fields = strategy::selectable_fields(kind, &object)
            .into_iter()
            .map(|(name, value)| (name, value.into_boxed_str()))
            .collect();
        let uid = metadata["uid"].as_str().unwrap_or_default().into();
        let (buffer, digits) =
            splice(value, revision).ok_or_else(|| ItemError::Shape { key: key.to_owned() })?;
        Ok(Self { key: key.into(), revision, uid, labels: labels.into(), fields, buffer, digits })
    }

    /// The object with another revision: what a deletion shows.
    pub(crate) fn at_revision(&self, revision: u64) -> Self {
        let text = revision.to_string();
        let mut buffer = BytesMut::with_capacity(self.buffer.len() + text.len());
        buffer.put_slice(&self.buffer[..self.digits.start]);
        buffer.put_slice(text.as_bytes());
        buffer.put_slice(&self.buffer[self.digits.end..]);
        Self {
            key: self.key.clone(),
            revision,
            uid: self.uid.clone(),
            labels: self.labels.clone(),
            fields: self.fields.clone(),
            buffer: buffer.freeze(),
            digits: self.digits.start..self.digits.start + text.len(),
        }
    }

    /// The object's JSON.
    pub(crate) fn json(&self) -> Bytes {
        self.buffer.slice(1..self.buffer.len() - 2)
    }

    /// A comma and the object's JSON: an element of a list after the first.
    pub(crate) fn json_after_comma(&self) -> Bytes {
        self.buffer.slice(..self.buffer.len() - 2)
    }

    /// The object's JSON and the end of a watch event.
    pub(crate) fn event_tail(&self) -> Bytes {
        self.buffer.slice(1..)
    }

    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        self.buffer.len()
    }

    /// The object's name.
    pub(crate) fn name(&self) -> &str {
        self.key.rsplit_once('/').map_or(&self.key, |(_, name)| name)
    }

    /// The object's namespace; empty for cluster scope.
    pub(crate) fn namespace(&self) -> &str {
        self.key.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// The parsed object, for what can't be done on bytes.
    pub(crate) fn parse(&self) -> Value {
        serde_json::from_slice(&self.buffer[1..self.buffer.len() - 2])
            .expect("the bytes were parsed when the item was made, and only digits were put in since")
    }

    /// The value of a selectable field.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(k, _)| *k == name).map(|(_, v)| &**v)
    }
}

/// A stored value with its revision: the object's final JSON.
pub(crate) fn json_with_revision(value: &[u8], revision: u64) -> Bytes {
    match splice(value, revision) {
        Some((buffer, _)) => buffer.slice(1..buffer.len() - 2),
        None => Bytes::copy_from_slice(value),
    }
}

/// Puts the revision into a stored value; the buffer and the place of the digits.
fn splice(value: &[u8], revision: u64) -> Option<(Bytes, std::ops::Range<usize>)> {
    let head = &value[..value.len().min(SEARCH_BYTES)];
    let at = head.windows(METADATA.len()).position(|w| w == METADATA)? + METADATA.len();
    let text = revision.to_string();
    let mut buffer = BytesMut::with_capacity(value.len() + REVISION.len() + text.len() + 5);
    buffer.put_u8(b',');
    buffer.put_slice(&value[..at]);
    buffer.put_slice(REVISION);
    let start = buffer.len();
    buffer.put_slice(text.as_bytes());
    let end = buffer.len();
    buffer.put_u8(b'"');
    if value.get(at) != Some(&b'}') {
        buffer.put_u8(b',');
    }
    buffer.put_slice(&value[at..]);
    buffer.put_slice(b"}\n");
    Some((buffer.freeze(), start..end))
}
