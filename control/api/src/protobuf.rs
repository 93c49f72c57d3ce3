//! Reading of protobuf bodies: client-go's typed clients, and so `kubectl create`, send nothing else.
//!
//! The facts name each field's number, JSON name and type; the object comes out as JSON would have said it. Answers
//! are JSON, which every client accepts beside protobuf.

use std::{collections::HashMap, sync::LazyLock};

use base64::Engine as _;
use serde_json::{Map, Value, json};

use crate::{kinds::Gvk, status::Status};

/// The media type of these bodies.
pub const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
/// What a body begins with.
const MAGIC: &[u8] = b"k8s\0";
/// Messages within messages; JSON bodies have the same order of bound.
const MAX_DEPTH: usize = 64;

/// How often a field may be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    One,
    List,
    Map,
}

/// The type of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Text,
    Integer,
    Bool,
    Bytes,
    Double,
    Time,
    MicroTime,
    Duration,
    Quantity,
    IntOrString,
    /// JSON in bytes.
    Raw,
    /// A message that stands for a list of strings.
    Texts,
    Message(&'static str),
}

#[derive(Debug)]
struct Field {
    number: u64,
    /// `None` if its fields are the parent's in JSON.
    name: Option<&'static str>,
    shape: Shape,
    /// Absent and zero differ.
    optional: bool,
    /// JSON shows it even if it is zero.
    kept: bool,
    ty: Type,
}

type Messages = HashMap<&'static str, Vec<Field>>;

/// Read when the first protobuf body comes.
static MESSAGES: LazyLock<Messages> = LazyLock::new(|| {
    let mut messages = Messages::new();
    let mut current = "";
    for line in include_str!("../facts/protobuf.txt").lines() {
        if let Some(name) = line.strip_prefix("M ") {
            current = name;
            messages.insert(name, Vec::new());
        } else if let (Some(field), Some(fields)) = (Field::parse(line), messages.get_mut(current)) {
            fields.push(field);
        }
    }
    messages
});

impl Field {
    fn parse(line: &'static str) -> Option<Self> {
        let mut words = line.split(' ');
        let number = words.next()?.parse().ok()?;
        let name = words.next()?;
        let text = words.next()?;
        let ty = text.trim_start_matches(['[', '{', '*', '!']);
        let flags = &text[..text.len() - ty.len()];
        let shape = match flags.as_bytes().first() {
            Some(b'[') => Shape::List,
            Some(b'{') => Shape::Map,
            _ => Shape::One,
        };
        Some(Self {
            number,
            name: (name != "-").then_some(name),
            shape,
            optional: flags.contains('*'),
            kept: flags.contains('!'),
            ty: match ty {
                "s" => Type::Text,
                "i" => Type::Integer,
                "b" => Type::Bool,
                "y" => Type::Bytes,
                "d" => Type::Double,
                "T" => Type::Time,
                "U" => Type::MicroTime,
                "D" => Type::Duration,
                "Q" => Type::Quantity,
                "I" => Type::IntOrString,
                "R" => Type::Raw,
                "L" => Type::Texts,
                message => Type::Message(message),
            },
        })
    }
}

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum WireError {
    #[error("unexpected EOF")]
    End,
    #[error("proto: illegal wireType {0}")]
    WireType(u64),
    #[error("proto: integer overflow")]
    Overflow,
    #[error("proto: wrong wireType for field {0}")]
    Mismatch(u64),
    #[error("proto: invalid UTF-8")]
    Text,
    #[error("proto: messages are nested too deeply")]
    Depth,
    #[error("invalid JSON in a raw field: {0}")]
    Raw(String),
    #[error("unknown message {0}")]
    Unknown(String),
}

/// A field's value on the wire.
#[derive(Clone, Copy, Debug)]
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Reads fields one after another.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or(WireError::End)?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError::Overflow)
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], WireError> {
        let length =
            usize::try_from(length).ok().filter(|length| *length <= self.0.len()).ok_or(WireError::End)?;
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        Ok(taken)
    }

    fn fixed(&mut self, length: u64) -> Result<u64, WireError> {
        let bytes = self.take(length)?;
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn next(&mut self) -> Result<Option<(u64, Wire<'a>)>, WireError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            1 => Wire::Number(self.fixed(8)?),
            2 => {
                let length = self.varint()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Number(self.fixed(4)?),
            other => return Err(WireError::WireType(other)),
        };
        Ok(Some((tag >> 3, value)))
    }
}

/// Reads a body; its type and the object, with `apiVersion` and `kind`.
///
/// Fails with 400 for a body that is no message, with 415 for a type that has no protobuf form here.
pub fn read(body: &[u8]) -> Result<Value, Status> {
    let broken =
        |error: WireError| Status::bad_request(format!("the object provided is unrecognized: {error}"));
    let envelope = body.strip_prefix(MAGIC).ok_or_else(|| {
        Status::bad_request(
            "the object provided is unrecognized: provided data does not appear to be a protobuf message",
        )
    })?;
    let (api_version, kind, raw) = read_envelope(envelope).map_err(broken)?;
    let gvk = Gvk::parse(&api_version, &kind);
    let message =
        message_name(gvk).ok_or_else(|| Status::unsupported_media_type(&crate::codec::MEDIA_TYPES))?;
    let mut object = read_message(message, raw, 0).map_err(broken)?;
    object.insert("apiVersion".to_owned(), api_version.into());
    object.insert("kind".to_owned(), kind.into());
    Ok(Value::Object(object))
}

/// `runtime.Unknown`: the type, and the object's bytes.
fn read_envelope(bytes: &[u8]) -> Result<(String, String, &[u8]), WireError> {
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    let mut reader = Reader(bytes);
    while let Some((number, value)) = reader.next()? {
        match (number, value) {
            (1, Wire::Bytes(meta)) => {
                let mut meta = Reader(meta);
                while let Some((number, value)) = meta.next()? {
                    match (number, value) {
                        (1, value) => api_version = text(value)?,
                        (2, value) => kind = text(value)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    Ok((api_version, kind, raw))
}

/// The message of a kind: of its group and version, or one that all groups share, such as `DeleteOptions`.
fn message_name(gvk: Gvk<'_>) -> Option<&'static str> {
    let group = if gvk.group.is_empty() { "core" } else { gvk.group.split('.').next()? };
    let own = format!("{group}.{}.{}", gvk.version, gvk.kind);
    let shared = format!("meta.v1.{}", gvk.kind);
    [own, shared].iter().find_map(|name| MESSAGES.get_key_value(name.as_str()).map(|(name, _)| *name))
}

fn read_message(name: &'static str, bytes: &[u8], depth: usize) -> Result<Map<String, Value>, WireError> {
    if depth > MAX_DEPTH {
        return Err(WireError::Depth);
    }
    let fields = MESSAGES.get(name).ok_or_else(|| WireError::Unknown(name.to_owned()))?;
    let mut object = Map::new();
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        // A field of a newer version is dropped, as protobuf has it.
        let Some(field) = fields.iter().find(|field| field.number == number) else { continue };
        read_field(&mut object, field, wire, depth)?;
    }
    Ok(object)
}

fn read_field(
    object: &mut Map<String, Value>,
    field: &Field,
    wire: Wire<'_>,
    depth: usize,
) -> Result<(), WireError> {
    let Some(name) = field.name else {
        if let (Type::Message(message), Wire::Bytes(bytes)) = (field.ty, wire) {
            object.extend(read_message(message, bytes, depth + 1)?);
        }
        return Ok(());
    };
    match field.shape {
        Shape::One => {
            let value = read_value(field, wire, depth)?;
            if !value.is_null() && (field.optional || field.kept || !is_zero(&value)) {
                object.insert(name.to_owned(), value);
            }
        }
        Shape::List => {
            let list = object.entry(name).or_insert_with(|| json!([]));
            let Some(list) = list.as_array_mut() else { return Ok(()) };
            match (field.ty, wire) {
                // Numbers may come packed.
                (Type::Integer, Wire::Bytes(bytes)) => {
                    let mut reader = Reader(bytes);
                    while !reader.0.is_empty() {
                        list.push(signed(reader.varint()?).into());
                    }
                }
                _ => list.push(read_value(field, wire, depth)?),
            }
        }
        Shape::Map => {
            let map = object.entry(name).or_insert_with(|| json!({}));
            let Wire::Bytes(bytes) = wire else { return Err(WireError::Mismatch(field.number)) };
            let (key, value) = read_entry(field, bytes, depth)?;
            map[key] = value;
        }
    }
    Ok(())
}

/// An entry of a map: key and value are fields 1 and 2. A value that isn't there is zero.
fn read_entry(field: &Field, bytes: &[u8], depth: usize) -> Result<(String, Value), WireError> {
    let (mut key, mut value) = (String::new(), None);
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        match number {
            1 => key = text(wire)?,
            2 => value = Some(read_value(field, wire, depth)?),
            _ => {}
        }
    }
    let zero = if matches!(field.ty, Type::Integer) { Wire::Number(0) } else { Wire::Bytes(&[]) };
    let value = match value {
        Some(value) => value,
        None => read_value(field, zero, depth)?,
    };
    Ok((key, value))
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Bool(flag) => !flag,
        Value::Null => true,
        Value::Array(_) | Value::Object(_) => false,
    }
}

fn text(wire: Wire<'_>) -> Result<String, WireError> {
    match wire {
        Wire::Bytes(bytes) => Ok(std::str::from_utf8(bytes).map_err(|_invalid| WireError::Text)?.to_owned()),
        Wire::Number(_) => Err(WireError::Mismatch(0)),
    }
}

fn signed(value: u64) -> i64 {
    i64::from_ne_bytes(value.to_ne_bytes())
}

fn read_value(field: &Field, wire: Wire<'_>, depth: usize) -> Result<Value, WireError> {
    let value = match (field.ty, wire) {
        (Type::Text, wire) => text(wire)?.into(),
        (Type::Integer, Wire::Number(number)) => signed(number).into(),
        (Type::Bool, Wire::Number(number)) => (number != 0).into(),
        (Type::Double, Wire::Number(bits)) => json!(f64::from_bits(bits)),
        (Type::Bytes, Wire::Bytes(bytes)) => base64::engine::general_purpose::STANDARD.encode(bytes).into(),
        (Type::Message(message), Wire::Bytes(bytes)) => {
            Value::Object(read_message(message, bytes, depth + 1)?)
        }
        (ty, Wire::Bytes(bytes)) => read_special(ty, bytes)?,
        (_, Wire::Number(_)) => return Err(WireError::Mismatch(field.number)),
    };
    Ok(value)
}

/// Messages that JSON writes as something else.
fn read_special(ty: Type, bytes: &[u8]) -> Result<Value, WireError> {
    let mut numbers = [0u64; 3];
    let mut texts: Vec<String> = Vec::new();
    let mut raw: &[u8] = &[];
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        match wire {
            Wire::Number(value) => {
                if let Some(slot) = usize::try_from(number).ok().and_then(|at| numbers.get_mut(at)) {
                    *slot = value;
                }
            }
            Wire::Bytes(bytes) if ty == Type::Raw => raw = bytes,
            wire @ Wire::Bytes(_) => texts.push(text(wire)?),
        }
    }
    let first = texts.first().cloned().unwrap_or_default();
    Ok(match ty {
        Type::Time | Type::MicroTime if bytes.is_empty() => Value::Null,
        Type::Time => time(signed(numbers[1]), 0, "%Y-%m-%dT%H:%M:%SZ"),
        Type::MicroTime => time(signed(numbers[1]), signed(numbers[2]), "%Y-%m-%dT%H:%M:%S.%6fZ"),
        Type::Duration => {
            let nanos = signed(numbers[1]);
            format!("{}.{:09}s", nanos / 1_000_000_000, nanos.unsigned_abs() % 1_000_000_000).into()
        }
        Type::Texts => json!(texts),
        Type::IntOrString if numbers[1] == 0 => i64::from(low_half(numbers[2])).into(),
        Type::Raw if raw.is_empty() => Value::Null,
        Type::Raw => serde_json::from_slice(raw).map_err(|error| WireError::Raw(error.to_string()))?,
        Type::Text
        | Type::Integer
        | Type::Bool
        | Type::Bytes
        | Type::Double
        | Type::Quantity
        | Type::IntOrString
        | Type::Message(_) => first.into(),
    })
}

fn low_half(value: u64) -> i32 {
    let bytes = value.to_le_bytes();
    i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn time(seconds: i64, nanos: i64, format: &str) -> Value {
    let nanos = i32::try_from(nanos).unwrap_or_default();
    match jiff::Timestamp::new(seconds, nanos) {
        Ok(time) => time.strftime(format).to_string().into(),
        Err(_out_of_range) => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_whole() {
        assert!(MESSAGES.len() > 500);
        for field in MESSAGES.values().flatten() {
            if let Type::Message(name) = field.ty {
                assert!(MESSAGES.contains_key(name), "{name}");
            }
        }
        assert_eq!(message_name(Gvk::parse("policy/v1", "DeleteOptions")), Some("meta.v1.DeleteOptions"));
    }

    #[test]
    fn what_kubectl_sends() {
        let body = b"k8s\x00\n\x0f\n\x02v1\x12\tConfigMap\x12\x1b\n\x11\n\x01x\x12\x00\x1a\x00\"\x00*\x002\x008\x00B\x00\x12\x06\n\x01a\x12\x01b\x1a\x00\"\x00";
        let object = read(body).unwrap();
        assert_eq!(
            object,
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "b"}})
        );
    }

    #[test]
    fn broken_bodies_are_refused() {
        for body in [&b"{}"[..], b"k8s", b"k8s\0\xff", b"k8s\0\n\x0f\n\x02v1"] {
            assert_eq!(read(body).unwrap_err().code(), 400);
        }
        assert_eq!(read(b"k8s\0\n\x05\x0a\x01x\x12\0").unwrap_err().code(), 415);
    }
}
