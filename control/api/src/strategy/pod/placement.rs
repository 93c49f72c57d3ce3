//! Validation of what steers a pod to its node: tolerations, affinity, spreading.

use std::collections::BTreeSet;

use serde_json::Value;

use super::super::checks::{Errors, label_selector, one_of, optional_one_of, problems};
use super::super::value::{is_empty, items, number, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "PreferNoSchedule"];

/// A pod's tolerations.
pub(super) fn tolerations(errors: &mut Errors, path: &FieldPath, tolerations: &Value) {
    for (index, toleration) in items(tolerations).iter().enumerate() {
        toleration_rules(errors, &path.index(index), toleration);
    }
}

fn toleration_rules(errors: &mut Errors, path: &FieldPath, toleration: &Value) {
    let [key, operator, value, effect] =
        ["key", "operator", "value", "effect"].map(|field| text(&toleration[field]));
    if !key.is_empty() {
        problems(errors, &path.child("key"), key, names::qualified_name(key));
    } else if operator != "Exists" {
        let detail =
            "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
        errors.push(FieldError::invalid(&path.child("operator"), operator, detail));
    }
    if !toleration["tolerationSeconds"].is_null() && effect != "NoExecute" {
        let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
        errors.push(FieldError::invalid(&path.child("effect"), effect, detail));
    }
    match operator {
        "Equal" | "" => problems(errors, &path.child("operator"), value, names::label_value(value)),
        "Exists" if !value.is_empty() => {
            let detail = "value must be empty when `operator` is 'Exists'";
            errors.push(FieldError::invalid(&path.child("operator"), toleration.clone(), detail));
        }
        "Exists" => {}
        _ => errors.push(FieldError::not_supported(&path.child("operator"), operator, &["Equal", "Exists"])),
    }
    optional_one_of(errors, &path.child("effect"), &toleration["effect"], &EFFECTS);
}

/// A pod's affinity.
pub(super) fn affinity(errors: &mut Errors, path: &FieldPath, affinity: &Value) {
    let node = &affinity["nodeAffinity"];
    let node_path = path.child("nodeAffinity");
    let required = &node["requiredDuringSchedulingIgnoredDuringExecution"];
    if !required.is_null() {
        node_selector(errors, &node_path.child("requiredDuringSchedulingIgnoredDuringExecution"), required);
    }
    for (index, term) in items(&node["preferredDuringSchedulingIgnoredDuringExecution"]).iter().enumerate() {
        let path = node_path.child("preferredDuringSchedulingIgnoredDuringExecution").index(index);
        weight(errors, &path, term);
        node_selector_term(errors, &path.child("preference"), &term["preference"]);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let (path, terms) = (path.child(kind), &affinity[kind]);
        for (index, term) in
            items(&terms["requiredDuringSchedulingIgnoredDuringExecution"]).iter().enumerate()
        {
            let path = path.child("requiredDuringSchedulingIgnoredDuringExecution").index(index);
            pod_term(errors, &path, term);
        }
        for (index, term) in
            items(&terms["preferredDuringSchedulingIgnoredDuringExecution"]).iter().enumerate()
        {
            let path = path.child("preferredDuringSchedulingIgnoredDuringExecution").index(index);
            weight(errors, &path, term);
            pod_term(errors, &path.child("podAffinityTerm"), &term["podAffinityTerm"]);
        }
    }
}

fn weight(errors: &mut Errors, path: &FieldPath, term: &Value) {
    let weight = number(&term["weight"]);
    if !(1..=100).contains(&weight) {
        errors.push(FieldError::invalid(&path.child("weight"), weight, "must be in the range 1-100"));
    }
}

/// A node selector: one of its terms must match.
pub(in super::super) fn node_selector(errors: &mut Errors, path: &FieldPath, selector: &Value) {
    let path = path.child("nodeSelectorTerms");
    let terms = items(&selector["nodeSelectorTerms"]);
    if terms.is_empty() {
        errors.push(FieldError::required(&path, "must have at least one node selector term"));
    }
    for (index, term) in terms.iter().enumerate() {
        node_selector_term(errors, &path.index(index), term);
    }
}

fn node_selector_term(errors: &mut Errors, path: &FieldPath, term: &Value) {
    for (index, expression) in items(&term["matchExpressions"]).iter().enumerate() {
        node_requirement(errors, &path.child("matchExpressions").index(index), expression);
    }
    for (index, expression) in items(&term["matchFields"]).iter().enumerate() {
        let path = path.child("matchFields").index(index);
        if !matches!(text(&expression["operator"]), "In" | "NotIn") {
            let operator = expression["operator"].clone();
            errors.push(FieldError::invalid(
                &path.child("operator"),
                operator,
                "not a valid selector operator",
            ));
        } else if items(&expression["values"]).len() != 1 {
            let detail = "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
            errors.push(FieldError::required(&path.child("values"), detail));
        }
        if expression["key"] != "metadata.name" {
            let key = expression["key"].clone();
            errors.push(FieldError::invalid(&path.child("key"), key, "not a valid field selector key"));
        }
    }
}

fn node_requirement(errors: &mut Errors, path: &FieldPath, expression: &Value) {
    let values = items(&expression["values"]);
    match text(&expression["operator"]) {
        "In" | "NotIn" if values.is_empty() => {
            let detail = "must be specified when `operator` is 'In' or 'NotIn'";
            errors.push(FieldError::required(&path.child("values"), detail));
        }
        "Exists" | "DoesNotExist" if !values.is_empty() => {
            let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
            errors.push(FieldError::forbidden(&path.child("values"), detail));
        }
        "Gt" | "Lt" if values.len() != 1 => {
            let detail = "must be specified single value when `operator` is 'Lt' or 'Gt'";
            errors.push(FieldError::required(&path.child("values"), detail));
        }
        "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
        operator => errors.push(FieldError::invalid(
            &path.child("operator"),
            operator,
            "not a valid selector operator",
        )),
    }
    let key = text(&expression["key"]);
    problems(errors, &path.child("key"), key, names::qualified_name(key));
}

fn topology_key(errors: &mut Errors, path: &FieldPath, key: &Value) {
    if is_empty(key) {
        errors.push(FieldError::required(path, "can not be empty"));
    }
    problems(errors, path, text(key), names::qualified_name(text(key)));
}

fn pod_term(errors: &mut Errors, path: &FieldPath, term: &Value) {
    label_selector(errors, &path.child("labelSelector"), &term["labelSelector"]);
    label_selector(errors, &path.child("namespaceSelector"), &term["namespaceSelector"]);
    for namespace in items(&term["namespaces"]) {
        let name = text(namespace);
        problems(errors, &path.child("namespace"), name, names::dns1123_label(name));
    }
    topology_key(errors, &path.child("topologyKey"), &term["topologyKey"]);
}

/// A pod's topology spread constraints.
pub(super) fn spread(errors: &mut Errors, path: &FieldPath, constraints: &Value) {
    let mut seen = BTreeSet::new();
    for (index, constraint) in items(constraints).iter().enumerate() {
        let path = path.index(index);
        for field in ["maxSkew", "minDomains"] {
            let value = &constraint[field];
            if (field == "maxSkew" || !value.is_null()) && number(value) <= 0 {
                errors.push(FieldError::invalid(
                    &path.child(field),
                    number(value),
                    "must be greater than zero",
                ));
            }
        }
        if is_empty(&constraint["topologyKey"]) {
            errors.push(FieldError::required(&path.child("topologyKey"), "can not be empty"));
        }
        let action = &constraint["whenUnsatisfiable"];
        one_of(errors, &path.child("whenUnsatisfiable"), action, &["DoNotSchedule", "ScheduleAnyway"]);
        if !constraint["minDomains"].is_null() && action != "DoNotSchedule" {
            let domains = constraint["minDomains"].clone();
            let detail = "can only use minDomains if whenUnsatisfiable=DoNotSchedule, not ScheduleAnyway";
            errors.push(FieldError::invalid(&path.child("minDomains"), domains, detail));
        }
        let key = format!("{{{}, {}}}", text(&constraint["topologyKey"]), text(action));
        if !seen.insert(key.clone()) {
            errors.push(FieldError::duplicate(&path.child("{topologyKey, whenUnsatisfiable}"), key));
        }
        label_selector(errors, &path.child("labelSelector"), &constraint["labelSelector"]);
    }
}
