//! Rows of configuration and identity in a namespace.

use jiff::Timestamp;
use serde_json::Value;

use super::duration::age;
use super::format::{count, name, text};

pub(super) fn row(group: &str, kind: &str, object: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let entries = match (group, kind) {
        ("", "ConfigMap") => count(&object["data"]) + count(&object["binaryData"]),
        ("", "ServiceAccount") => count(&object["secrets"]),
        ("", "Secret") => {
            let type_ = text(&object["type"]);
            return Some(vec![name(object), type_.into(), count(&object["data"]).into(), age(object, now)]);
        }
        _ => return None,
    };
    Some(vec![name(object), entries.into(), age(object, now)])
}
