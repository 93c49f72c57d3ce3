//! The `scale` subresource: `autoscaling/v1` Scale from and to the kinds that have replicas.

use serde_json::{Map, Value, json};

use super::value::{at, default_object, entries, number, text};
use crate::kinds::Kind;
use crate::table::selector_text;

/// The Scale of an object.
pub fn scale_get(kind: &Kind, object: &Value) -> Value {
    let mut metadata = Map::new();
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = object["metadata"].get(field) {
            metadata.insert(field.to_owned(), value.clone());
        }
    }
    let selector = &object["spec"]["selector"];
    let selector = if (kind.group, kind.kind) == ("", "ReplicationController") {
        let mut pairs: Vec<_> =
            entries(selector).map(|(key, value)| format!("{key}={}", text(value))).collect();
        pairs.sort();
        pairs.join(",")
    } else {
        selector_text(selector)
    };
    let mut status = json!({"replicas": number(&object["status"]["replicas"])});
    if !selector.is_empty() {
        status["selector"] = selector.into();
    }
    let replicas = number(&object["spec"]["replicas"]);
    json!({
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": metadata,
        "spec": if replicas == 0 { json!({}) } else { json!({"replicas": replicas}) },
        "status": status,
    })
}

/// Writes what a Scale asks for into the object: replicas, and the resourceVersion that it was read at.
pub fn scale_set(_kind: &Kind, object: &mut Value, scale: &Value) {
    if let Some(spec) = default_object(object, "spec") {
        spec["replicas"] = number(&scale["spec"]["replicas"]).into();
    }
    let version = &scale["metadata"]["resourceVersion"];
    if !text(version).is_empty()
        && let Some(metadata) = at(object, &["metadata"])
    {
        metadata["resourceVersion"] = version.clone();
    }
}
