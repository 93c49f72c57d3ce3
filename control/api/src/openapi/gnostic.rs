//! OpenAPI v2 as the protobuf of gnostic (`openapi.v2.Document`), which kubectl and client-go read.
//!
//! Field numbers are those of gnostic's `OpenAPIv2.proto`; only messages and fields that the document has are here.

use serde_json::{Map, Value};

/// The media type that clients ask for, and the one that names itself correctly; the answer has the latter.
pub const MEDIA_TYPES: [&str; 2] = [
    "application/com.github.proto-openapi.spec.v2@v1.0+protobuf",
    "application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
];

/// Encodes a document made by [`super::v2::document`].
pub fn encode(document: &Value) -> Vec<u8> {
    let mut out = Message::default();
    out.text(1, &document["swagger"]);
    let mut info = Message::default();
    info.text(1, &document["info"]["title"]);
    info.text(2, &document["info"]["version"]);
    out.message(2, info);
    let mut paths = Message::default();
    for (path, item) in fields(&document["paths"]) {
        paths.named(2, path, path_item(item));
    }
    out.message(8, paths);
    let mut definitions = Message::default();
    for (name, definition) in fields(&document["definitions"]) {
        definitions.named(1, name, schema(definition));
    }
    out.message(9, definitions);
    for requirement in items(&document["security"]) {
        let mut named = Message::default();
        for name in fields(requirement).keys() {
            named.named(1, name, Message::default());
        }
        out.message(12, named);
    }
    let mut security = Message::default();
    for (name, item) in fields(&document["securityDefinitions"]) {
        let mut key = Message::default();
        for (number, field) in [(1, "type"), (2, "name"), (3, "in")] {
            key.text(number, &item[field]);
        }
        security.named(1, name, key.within(2));
    }
    out.message(13, security);
    out.0
}

static NOTHING: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);

fn fields(value: &Value) -> &Map<String, Value> {
    value.as_object().unwrap_or(&NOTHING)
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A message as it grows.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(u8::try_from(value & 0x7f).unwrap_or_default() | 0x80);
            value >>= 7;
        }
        self.0.push(u8::try_from(value).unwrap_or_default());
    }

    fn bytes(&mut self, number: u64, bytes: &[u8]) {
        self.varint(number << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn text(&mut self, number: u64, value: &Value) {
        if let Some(text) = value.as_str() {
            self.bytes(number, text.as_bytes());
        }
    }

    fn texts(&mut self, number: u64, values: &Value) {
        items(values).iter().for_each(|value| self.text(number, value));
    }

    fn flag(&mut self, number: u64, value: &Value) {
        if value == true {
            self.varint(number << 3);
            self.varint(1);
        }
    }

    fn message(&mut self, number: u64, message: Self) {
        self.bytes(number, &message.0);
    }

    /// An entry of a map, which gnostic writes as a list of names and values.
    fn named(&mut self, number: u64, name: &str, value: Self) {
        let mut entry = Self::default();
        entry.bytes(1, name.as_bytes());
        entry.message(2, value);
        self.message(number, entry);
    }

    /// This message as a field of another, as a `oneof` has it.
    fn within(self, number: u64) -> Self {
        let mut outer = Self::default();
        outer.message(number, self);
        outer
    }

    /// The fields that begin with `x-`, each as YAML, of which JSON is a part.
    fn extensions(&mut self, number: u64, object: &Value) {
        for (name, value) in fields(object).iter().filter(|(name, _)| name.starts_with("x-")) {
            let mut any = Self::default();
            any.bytes(2, format!("{value}\n").as_bytes());
            self.named(number, name, any);
        }
    }
}

fn path_item(item: &Value) -> Message {
    let mut out = Message::default();
    for (number, method) in [(2, "get"), (3, "put"), (4, "post"), (5, "delete"), (8, "patch")] {
        if let Some(found) = item.get(method) {
            out.message(number, operation(found));
        }
    }
    items(&item["parameters"]).iter().for_each(|one| out.message(9, parameter(one)));
    out
}

fn operation(operation: &Value) -> Message {
    let mut out = Message::default();
    out.texts(6, &operation["produces"]);
    out.texts(7, &operation["consumes"]);
    items(&operation["parameters"]).iter().for_each(|one| out.message(8, parameter(one)));
    let mut responses = Message::default();
    for (code, response) in fields(&operation["responses"]) {
        let mut one = Message::default();
        one.text(1, &response["description"]);
        if let Some(found) = response.get("schema") {
            one.message(2, schema(found).within(1));
        }
        responses.named(1, code, one.within(1));
    }
    out.message(9, responses);
    out.texts(10, &operation["schemes"]);
    out.extensions(13, operation);
    out
}

/// A parameter's item: one of the body, of the query or of the path.
fn parameter(parameter: &Value) -> Message {
    let mut out = Message::default();
    let place = parameter["in"].as_str().unwrap_or_default();
    if place == "body" {
        out.text(2, &parameter["name"]);
        out.text(3, &parameter["in"]);
        out.flag(4, &parameter["required"]);
        out.message(5, schema(&parameter["schema"]));
        return out.within(1).within(1);
    }
    out.flag(1, &parameter["required"]);
    out.text(2, &parameter["in"]);
    out.text(4, &parameter["name"]);
    // Of the query one may allow an empty value, so its later fields have other numbers.
    let (kind, first) = if place == "query" { (3, 6) } else { (4, 5) };
    out.text(first, &parameter["type"]);
    out.flag(first + 14, &parameter["uniqueItems"]);
    out.within(kind).within(2).within(1)
}

fn schema(value: &Value) -> Message {
    let mut out = Message::default();
    out.text(1, &value["$ref"]);
    out.text(2, &value["format"]);
    out.texts(19, &value["required"]);
    if let Some(additional) = value.get("additionalProperties") {
        out.message(21, schema(additional).within(1));
    }
    if value["type"].is_string() {
        let mut kind = Message::default();
        kind.text(1, &value["type"]);
        out.message(22, kind);
    }
    if let Some(item) = value.get("items") {
        out.message(23, schema(item).within(1));
    }
    if let Some(properties) = value.get("properties") {
        let mut all = Message::default();
        for (name, property) in fields(properties) {
            all.named(1, name, schema(property));
        }
        out.message(25, all);
    }
    out.extensions(31, value);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_are_as_protobuf_writes_them() {
        let bytes = encode(&json!({"swagger": "2.0", "info": {"title": "T", "version": "v"},
            "paths": {"/a": {"get": {"x-k": 1}}}, "definitions": {"D": {"type": "string"}}}));
        assert!(bytes.starts_with(b"\x0a\x032.0\x12\x06\x0a\x01T\x12\x01v"), "{bytes:?}");
        let definitions = b"\x4a\x12\x0a\x10\x0a\x01D\x12\x0b\xb2\x01\x08\x0a\x06string\x6a\x00";
        assert!(bytes.ends_with(definitions), "{bytes:?}");
        let mut number = Message::default();
        number.varint(300);
        assert_eq!(number.0, [0xac, 0x02]);
        let query = parameter(&json!({"in": "query", "name": "q", "type": "string", "uniqueItems": true}));
        assert_eq!(query.0, b"\x0a\x19\x12\x17\x1a\x15\x12\x05query\x22\x01q\x32\x06string\xa0\x01\x01");
    }
}
