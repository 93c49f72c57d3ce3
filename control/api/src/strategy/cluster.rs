//! Namespaces, nodes, events, leases, classes, quotas: defaults and validation.

mod validation;

use serde_json::{Map, Value};

use super::value::{at, default_object, default_to, default_zero, each, text};

pub(super) use validation::{create, update};

/// The label by which a namespace can be selected by name.
const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// Applies the defaults of `kind`; does nothing for a kind of another family.
pub(super) fn default(group: &str, kind: &str, object: &mut Value) {
    match (group, kind) {
        ("", "Namespace") => namespace(object),
        ("", "Node") => node(object),
        ("", "LimitRange") => {
            if let Some(spec) = at(object, &["spec"]) {
                each(spec, "limits").for_each(limit_range_item);
            }
        }
        ("", "ResourceQuota") => {
            default_object(object, "spec");
            default_object(object, "status");
        }
        ("scheduling.k8s.io", "PriorityClass") => {
            default_to(object, "preemptionPolicy", "PreemptLowerPriority")
        }
        _ => {}
    }
}

fn namespace(object: &mut Value) {
    let name = text(&object["metadata"]["name"]).to_owned();
    if !name.is_empty()
        && let Some(metadata) = at(object, &["metadata"])
        && let Some(labels) = default_object(metadata, "labels")
    {
        labels[NAMESPACE_NAME_LABEL] = name.into();
    }
    if let Some(status) = default_object(object, "status") {
        default_zero(status, "phase", "Active");
    }
    default_object(object, "spec");
}

fn node(object: &mut Value) {
    default_object(object, "spec");
    if let Some(status) = default_object(object, "status")
        && status["capacity"].is_object()
    {
        let capacity = status["capacity"].clone();
        default_to(status, "allocatable", capacity);
    }
}

/// Limits of containers: default = max, default request = default limit, then min.
fn limit_range_item(item: &mut Value) {
    if item["type"] != "Container" {
        return;
    }
    for (to, from) in [("default", "max"), ("defaultRequest", "default"), ("defaultRequest", "min")] {
        let from: Map<String, Value> = item[from].as_object().cloned().unwrap_or_default();
        if let Some(Value::Object(to)) = default_object(item, to) {
            for (name, value) in from {
                to.entry(name).or_insert(value);
            }
        }
    }
}
