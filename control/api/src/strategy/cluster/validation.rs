//! Validation of namespaces, nodes, events, leases, classes and quotas.

use std::collections::BTreeSet;

use serde_json::Value;

use super::super::Change;
use super::super::checks::{Errors, immutable, one_of, optional_one_of, problems, required};
use super::super::pod::resources::{quantity, resource_amount};
use super::super::value::{entries, is_empty, items, number, same, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "PreferNoSchedule"];
/// Priorities above this are for the system's own classes.
const HIGHEST_USER_PRIORITY: i64 = 1_000_000_000;
const STRATEGIES: [&str; 1] = ["OldestEmulationVersion"];

pub(in super::super) fn create(group: &str, kind: &str, object: &Value, errors: &mut Errors) {
    match (group, kind) {
        ("", "Node") => node(object, errors),
        ("" | "events.k8s.io", "Event") => event(group, object, errors),
        ("coordination.k8s.io", "Lease") => lease(object, errors),
        ("scheduling.k8s.io", "PriorityClass") => priority_class(object, errors),
        ("node.k8s.io", "RuntimeClass") => runtime_class(object, errors),
        ("", "ResourceQuota") => quota(object, errors),
        ("", "LimitRange") => limit_range(object, errors),
        _ => {}
    }
}

pub(in super::super) fn update(group: &str, kind: &str, change: &Change<'_>, errors: &mut Errors) {
    let (new, old) = (change.new, change.old);
    match (group, kind, change.subresource) {
        ("", "Namespace", Some("finalize")) => {
            for (index, finalizer) in items(&new["spec"]["finalizers"]).iter().enumerate() {
                let path = FieldPath::new("spec").child("finalizers").index(index);
                problems(errors, &path, text(finalizer), names::qualified_name(text(finalizer)));
            }
        }
        ("", "Namespace", Some("status")) => {
            let (phase, path) = (&new["status"]["phase"], FieldPath::new("status").child("Phase"));
            let deleting = !new["metadata"]["deletionTimestamp"].is_null();
            let wanted = if deleting { "Terminating" } else { "Active" };
            if phase != wanted {
                let detail = if deleting {
                    "may only be 'Terminating' if `deletionTimestamp` is not empty"
                } else {
                    "may only be 'Active' if `deletionTimestamp` is empty"
                };
                errors.push(FieldError::invalid(&path, phase.clone(), detail));
            }
        }
        ("", "Node", None) => {
            node(new, errors);
            node_update(errors, &new["spec"], &old["spec"]);
        }
        ("", "Node", Some("status")) => node_status(errors, &new["status"]),
        ("scheduling.k8s.io", "PriorityClass", None) => {
            let detail = "may not be changed in an update.";
            for field in ["value", "preemptionPolicy"] {
                if !same(&new[field], &old[field]) {
                    errors.push(FieldError::forbidden(&FieldPath::new(field), detail));
                }
            }
        }
        ("node.k8s.io", "RuntimeClass", None) => {
            immutable(errors, &FieldPath::new("handler"), &new["handler"], &old["handler"]);
        }
        ("events.k8s.io", "Event", None) => {}
        ("", "ResourceQuota", None) => {
            quota(new, errors);
            immutable(
                errors,
                &FieldPath::new("spec").child("scopes"),
                &new["spec"]["scopes"],
                &old["spec"]["scopes"],
            );
        }
        (_, _, None) => create(group, kind, new, errors),
        _ => {}
    }
}

fn node(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    let mut seen = BTreeSet::new();
    for (index, taint) in items(&spec["taints"]).iter().enumerate() {
        let path = path.child("taints").index(index);
        let [key, value, effect] = ["key", "value", "effect"].map(|field| text(&taint[field]));
        problems(errors, &path.child("key"), key, names::qualified_name(key));
        problems(errors, &path.child("value"), value, names::label_value(value));
        one_of(errors, &path.child("effect"), &taint["effect"], &EFFECTS);
        if !seen.insert((key, effect)) {
            let mut error = FieldError::duplicate(&path, taint.clone());
            error.detail = "taints must be unique by key and effect pair".to_owned();
            errors.push(error);
        }
    }
    let ranges = items(&spec["podCIDRs"]);
    for (index, range) in ranges.iter().enumerate() {
        problems(errors, &path.child("podCIDRs").index(index), text(range), names::cidr(text(range)));
    }
    if ranges.len() > 2 {
        let detail = "may specify no more than one CIDR for each IP family";
        errors.push(FieldError::invalid(&path.child("podCIDRs"), spec["podCIDRs"].clone(), detail));
    }
    node_status(errors, &object["status"]);
}

fn node_status(errors: &mut Errors, status: &Value) {
    let path = FieldPath::new("status");
    let mut seen = BTreeSet::new();
    for (index, address) in items(&status["addresses"]).iter().enumerate() {
        if !seen.insert((text(&address["type"]), text(&address["address"]))) {
            errors.push(FieldError::duplicate(&path.child("addresses").index(index), address.clone()));
        }
    }
    for list in ["capacity", "allocatable"] {
        for (name, amount) in entries(&status[list]) {
            resource_amount(errors, &path.child(list).key(name), name, amount);
        }
    }
}

/// A node keeps the addresses and the identity that it was once given.
fn node_update(errors: &mut Errors, new: &Value, old: &Value) {
    let path = FieldPath::new("spec");
    if !is_empty(&old["podCIDRs"]) && !same(&new["podCIDRs"], &old["podCIDRs"]) {
        let detail = "node updates may not change podCIDR except from \"\" to valid";
        errors.push(FieldError::forbidden(&path.child("podCIDRs"), detail));
    }
    if !is_empty(&old["providerID"]) && new["providerID"] != old["providerID"] {
        let detail = "node updates may not change providerID except from \"\" to valid";
        errors.push(FieldError::forbidden(&path.child("providerID"), detail));
    }
}

/// Where an Event about an object without namespace lives.
const CLUSTER_EVENTS: [&str; 2] = ["default", ""];

fn event(group: &str, object: &Value, errors: &mut Errors) {
    let (field, involved) = match object["involvedObject"].is_null() {
        true => ("regarding", &object["regarding"]),
        false => ("involvedObject", &object["involvedObject"]),
    };
    let path = FieldPath::new(field).child("namespace");
    let (about, namespace) = (text(&involved["namespace"]), text(&object["metadata"]["namespace"]));
    let fits = if about.is_empty() {
        CLUSTER_EVENTS.contains(&namespace) || namespace == "kube-system"
    } else {
        about == namespace
    };
    if !fits {
        errors.push(FieldError::invalid(&path, about, "does not match event.namespace"));
    }
    if object["eventTime"].is_null() {
        if group == "events.k8s.io" {
            errors.push(FieldError::required(&FieldPath::new("eventTime"), ""));
        }
        return;
    }
    let controller =
        if object["reportingComponent"].is_null() { "reportingController" } else { "reportingComponent" };
    if required(errors, &FieldPath::new("reportingController"), &object[controller]) {
        let name = text(&object[controller]);
        problems(errors, &FieldPath::new("reportingController"), name, names::qualified_name(name));
    }
    for (field, max) in [("reportingInstance", 128), ("action", 128), ("reason", 128)] {
        let path = FieldPath::new(field);
        if required(errors, &path, &object[field]) && text(&object[field]).len() > max {
            errors.push(FieldError::invalid(&path, "", format!("can have at most {max} characters")));
        }
    }
    if group == "events.k8s.io" && !matches!(text(&object["type"]), "Normal" | "Warning") {
        errors.push(FieldError::invalid(
            &FieldPath::new("type"),
            "",
            "has invalid value: ".to_owned() + text(&object["type"]),
        ));
    }
    let note = if object["note"].is_null() { "message" } else { "note" };
    if text(&object[note]).len() > 1024 {
        errors.push(FieldError::invalid(&FieldPath::new("message"), "", "can have at most 1024 characters"));
    }
}

fn lease(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    if let Some(seconds) = spec["leaseDurationSeconds"].as_i64().filter(|seconds| *seconds <= 0) {
        errors.push(FieldError::invalid(
            &path.child("leaseDurationSeconds"),
            seconds,
            "must be greater than 0",
        ));
    }
    if let Some(transitions) = spec["leaseTransitions"].as_i64().filter(|transitions| *transitions < 0) {
        let detail = "must be greater than or equal to 0";
        errors.push(FieldError::invalid(&path.child("leaseTransitions"), transitions, detail));
    }
    optional_one_of(errors, &path.child("strategy"), &spec["strategy"], &STRATEGIES);
    if !is_empty(&spec["preferredHolder"]) && is_empty(&spec["strategy"]) {
        let detail = "may only be specified when `strategy` is defined";
        errors.push(FieldError::forbidden(&path.child("preferredHolder"), detail));
    }
}

fn priority_class(object: &Value, errors: &mut Errors) {
    let name = text(&object["metadata"]["name"]);
    let system = matches!(
        (name, number(&object["value"])),
        ("system-cluster-critical", 2_000_000_000) | ("system-node-critical", 2_000_001_000)
    );
    if name.starts_with("system-") && !system {
        let detail = "priority class names with 'system-' prefix are reserved for system use only. error: unknown or changed system class";
        errors.push(FieldError::forbidden(&FieldPath::new("metadata").child("name"), detail));
    } else if !system && number(&object["value"]) > HIGHEST_USER_PRIORITY {
        let detail = format!("maximum allowed value of a user defined priority is {HIGHEST_USER_PRIORITY}");
        errors.push(FieldError::forbidden(&FieldPath::new("value"), detail));
    }
    let policies = ["Never", "PreemptLowerPriority"];
    optional_one_of(errors, &FieldPath::new("preemptionPolicy"), &object["preemptionPolicy"], &policies);
}

fn runtime_class(object: &Value, errors: &mut Errors) {
    let handler = text(&object["handler"]);
    problems(errors, &FieldPath::new("handler"), handler, names::dns1123_label(handler));
    let path = FieldPath::new("overhead").child("podFixed");
    for (name, amount) in entries(&object["overhead"]["podFixed"]) {
        resource_amount(errors, &path.key(name), name, amount);
    }
}

fn quota(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec").child("hard");
    for (name, amount) in entries(&object["spec"]["hard"]) {
        let path = path.key(name);
        problems(errors, &path, name, names::qualified_name(name));
        resource_amount(errors, &path, name, amount);
    }
}

fn limit_range(object: &Value, errors: &mut Errors) {
    for (index, item) in items(&object["spec"]["limits"]).iter().enumerate() {
        let path = FieldPath::new("spec").child("limits").index(index);
        required(errors, &path.child("type"), &item["type"]);
        for (low, high) in
            [("min", "max"), ("min", "default"), ("defaultRequest", "default"), ("default", "max")]
        {
            for (name, lower) in entries(&item[low]) {
                let (Some(lower), Some(upper)) = (quantity(lower), quantity(&item[high][name])) else {
                    continue;
                };
                if lower > upper {
                    let detail = format!("{low} value {lower} is greater than {high} value {upper}");
                    errors.push(FieldError::invalid(&path.child(low).key(name), lower.to_string(), detail));
                }
            }
        }
    }
}
