//! Validation of Deployments, ReplicaSets, StatefulSets, DaemonSets and ReplicationControllers.

use serde_json::Value;

use super::super::checks::{Errors, label_selector, not_negative, one_of, selects_everything};
use super::super::pod;
use super::super::value::{copy, entries, is_empty, items, number, same, text};
use super::super::{Change, checks};
use crate::field::{FieldError, FieldPath};
use crate::names;
use crate::selector::LabelSelector;

const ALWAYS_ONLY: [&str; 1] = ["Always"];

pub(super) fn create(kind: &str, object: &Value, errors: &mut Errors) {
    match kind {
        "Deployment" => deployment(object, errors),
        "ReplicaSet" => replica_set(object, errors),
        "StatefulSet" => stateful_set(object, errors),
        "DaemonSet" => daemon_set(object, errors),
        "ReplicationController" => replication_controller(object, errors),
        "ControllerRevision" => {
            if object["data"].is_null() {
                errors.push(FieldError::required(&FieldPath::new("data"), "data is mandatory"));
            }
            not_negative(errors, &FieldPath::new("revision"), &object["revision"]);
        }
        _ => {}
    }
}

pub(super) fn update(kind: &str, subresource: Option<&str>, change: &Change<'_>, errors: &mut Errors) {
    match (kind, subresource) {
        ("Deployment" | "ReplicaSet" | "DaemonSet", None) => {
            create(kind, change.new, errors);
            let path = FieldPath::new("spec").child("selector");
            checks::immutable(
                errors,
                &path,
                &change.new["spec"]["selector"],
                &change.old["spec"]["selector"],
            );
        }
        ("StatefulSet", None) => {
            create(kind, change.new, errors);
            stateful_set_update(errors, &change.new["spec"], &change.old["spec"]);
        }
        ("ReplicationController", None) => create(kind, change.new, errors),
        ("ControllerRevision", None) => {
            checks::immutable(errors, &FieldPath::new("data"), &change.new["data"], &change.old["data"]);
        }
        (
            "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "ReplicationController",
            Some("status"),
        ) => {
            status(kind, change.new, errors);
        }
        ("Deployment" | "ReplicaSet" | "StatefulSet" | "ReplicationController", Some("scale")) => {
            not_negative(errors, &FieldPath::new("spec").child("replicas"), &change.new["spec"]["replicas"]);
        }
        _ => {}
    }
}

fn status(kind: &str, object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("status");
    let status = &object["status"];
    for (field, value) in entries(status).filter(|(_, value)| value.is_i64()) {
        not_negative(errors, &path.child(field), value);
    }
    if kind == "DaemonSet" {
        return;
    }
    let count = |field: &str| number(&status[field]);
    let more = [
        ("updatedReplicas", "replicas", kind == "Deployment" || kind == "StatefulSet"),
        ("readyReplicas", "replicas", true),
        ("availableReplicas", "replicas", true),
        ("availableReplicas", "readyReplicas", true),
        ("fullyLabeledReplicas", "replicas", kind == "ReplicaSet" || kind == "ReplicationController"),
    ];
    for (field, limit, applies) in more {
        if applies && count(field) > count(limit) {
            let limit = if limit == "replicas" { "status.replicas" } else { limit };
            let detail = format!("cannot be greater than {limit}");
            errors.push(FieldError::invalid(&path.child(field), count(field), detail));
        }
    }
}

/// The selector must be there, select something, and select the template's own pods; then the template's rules apply.
fn selector_and_template(errors: &mut Errors, object: &Value, what: &str) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    let (selector, at) = (&spec["selector"], path.child("selector"));
    if selector.is_null() {
        errors.push(FieldError::required(&at, ""));
    } else {
        label_selector(errors, &at, selector);
        if selects_everything(selector) {
            let detail = format!("empty selector is invalid for {what}");
            errors.push(FieldError::invalid(&at, selector.clone(), detail));
        }
    }
    not_negative(errors, &path.child("replicas"), &spec["replicas"]);
    not_negative(errors, &path.child("minReadySeconds"), &spec["minReadySeconds"]);
    let template = &spec["template"];
    let at = path.child("template");
    if template.is_null() {
        errors.push(FieldError::required(&at, ""));
        return;
    }
    matches_template(errors, &at, selector, template);
    pod::template(errors, &at, template);
    restart_always(errors, &at.child("spec"), &template["spec"], kind_of(what));
}

/// The kind that upstream's message names: a Deployment shares its rules with ReplicaSets.
fn kind_of(what: &str) -> &'static str {
    match what {
        "daemonset" => "DaemonSet",
        "statefulset" => "StatefulSet",
        _ => "ReplicaSet",
    }
}

fn matches_template(errors: &mut Errors, path: &FieldPath, selector: &Value, template: &Value) {
    if selector.is_null() || selects_everything(selector) {
        return;
    }
    let labels = &template["metadata"]["labels"];
    let empty = serde_json::Map::new();
    let matches = LabelSelector::from_value(Some(selector))
        .is_ok_and(|selector| selector.matches(labels.as_object().unwrap_or(&empty)));
    if !matches {
        let shown = if labels.is_null() { Value::Object(empty) } else { labels.clone() };
        let detail = "`selector` does not match template `labels`";
        errors.push(FieldError::invalid(&path.child("metadata").child("labels"), shown, detail));
    }
}

/// Controllers that keep pods running take no pod that ends.
fn restart_always(errors: &mut Errors, path: &FieldPath, spec: &Value, kind: &str) {
    let policy = &spec["restartPolicy"];
    if matches!(text(policy), "OnFailure" | "Never") {
        errors.push(FieldError::not_supported(&path.child("restartPolicy"), policy.clone(), &ALWAYS_ONLY));
    }
    if !spec["activeDeadlineSeconds"].is_null() {
        let detail = format!("activeDeadlineSeconds in {kind} is not Supported");
        errors.push(FieldError::forbidden(&path.child("activeDeadlineSeconds"), detail));
    }
}

fn replica_set(object: &Value, errors: &mut Errors) {
    selector_and_template(errors, object, "replicaset");
}

fn replication_controller(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    not_negative(errors, &path.child("minReadySeconds"), &spec["minReadySeconds"]);
    if is_empty(&spec["selector"]) {
        errors.push(FieldError::required(&path.child("selector"), ""));
    }
    if spec["replicas"].is_null() {
        errors.push(FieldError::required(&path.child("replicas"), ""));
    }
    not_negative(errors, &path.child("replicas"), &spec["replicas"]);
    let template = &spec["template"];
    if template.is_null() {
        errors.push(FieldError::required(&path.child("template"), ""));
        return;
    }
    let path = path.child("template");
    let labels = &template["metadata"]["labels"];
    if !is_empty(&spec["selector"]) && !entries(&spec["selector"]).all(|(key, value)| labels[key] == *value) {
        let detail = "`selector` does not match template `labels`";
        errors.push(FieldError::invalid(&path.child("metadata").child("labels"), labels.clone(), detail));
    }
    pod::template(errors, &path, template);
    restart_always(errors, &path.child("spec"), &template["spec"], "ReplicationController");
}

fn deployment(object: &Value, errors: &mut Errors) {
    selector_and_template(errors, object, "deployment");
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    let (strategy, at) = (&spec["strategy"], path.child("strategy"));
    one_of(errors, &at.child("type"), &strategy["type"], &["Recreate", "RollingUpdate"]);
    let rolling = &strategy["rollingUpdate"];
    match text(&strategy["type"]) {
        "Recreate" if !rolling.is_null() => {
            let detail = "may not be specified when strategy `type` is 'Recreate'";
            errors.push(FieldError::forbidden(&at.child("rollingUpdate"), detail));
        }
        "RollingUpdate" if rolling.is_null() => {
            let detail = "this should be defaulted and never be nil";
            errors.push(FieldError::required(&at.child("rollingUpdate"), detail));
        }
        "RollingUpdate" => rolling_update(errors, &at.child("rollingUpdate"), rolling),
        _ => {}
    }
    not_negative(errors, &path.child("revisionHistoryLimit"), &spec["revisionHistoryLimit"]);
    let deadline = &spec["progressDeadlineSeconds"];
    not_negative(errors, &path.child("progressDeadlineSeconds"), deadline);
    if deadline.as_i64().is_some_and(|deadline| deadline <= number(&spec["minReadySeconds"])) {
        let detail = "must be greater than minReadySeconds";
        errors.push(FieldError::invalid(&path.child("progressDeadlineSeconds"), deadline.clone(), detail));
    }
}

/// A number or a percentage, not below zero.
pub(super) fn count_or_percent(errors: &mut Errors, path: &FieldPath, value: &Value) {
    match value.as_str() {
        Some(text) => {
            let bad = names::percent(text);
            checks::problems(errors, path, text, bad);
        }
        None => not_negative(errors, path, value),
    }
}

/// At most 100 %.
fn not_above_all(errors: &mut Errors, path: &FieldPath, value: &Value) {
    let above = value
        .as_str()
        .and_then(|text| text.strip_suffix('%')?.parse::<i64>().ok())
        .is_some_and(|percent| percent > 100);
    if above {
        errors.push(FieldError::invalid(path, value.clone(), "must not be greater than 100%"));
    }
}

fn is_nothing(value: &Value) -> bool {
    value.is_null()
        || value.as_i64() == Some(0)
        || value.as_str().is_some_and(|text| text.trim_end_matches('%').parse() == Ok(0))
}

fn rolling_update(errors: &mut Errors, path: &FieldPath, rolling: &Value) {
    let (unavailable, surge) = (&rolling["maxUnavailable"], &rolling["maxSurge"]);
    count_or_percent(errors, &path.child("maxUnavailable"), unavailable);
    count_or_percent(errors, &path.child("maxSurge"), surge);
    if is_nothing(unavailable) && is_nothing(surge) {
        let detail = "may not be 0 when `maxSurge` is 0";
        errors.push(FieldError::invalid(&path.child("maxUnavailable"), unavailable.clone(), detail));
    }
    not_above_all(errors, &path.child("maxUnavailable"), unavailable);
}

fn daemon_set(object: &Value, errors: &mut Errors) {
    selector_and_template(errors, object, "daemonset");
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    not_negative(errors, &path.child("revisionHistoryLimit"), &spec["revisionHistoryLimit"]);
    let (strategy, at) = (&spec["updateStrategy"], path.child("updateStrategy"));
    one_of(errors, &at.child("type"), &strategy["type"], &["OnDelete", "RollingUpdate"]);
    if strategy["type"] != "RollingUpdate" {
        return;
    }
    let (rolling, at) = (&strategy["rollingUpdate"], at.child("rollingUpdate"));
    if rolling.is_null() {
        errors.push(FieldError::required(&at, ""));
        return;
    }
    let (unavailable, surge) = (&rolling["maxUnavailable"], &rolling["maxSurge"]);
    for (field, value) in [("maxUnavailable", unavailable), ("maxSurge", surge)] {
        count_or_percent(errors, &at.child(field), value);
        not_above_all(errors, &at.child(field), value);
    }
    match (is_nothing(unavailable), is_nothing(surge)) {
        (false, false) => {
            let detail = "may not be set when maxUnavailable is non-zero";
            errors.push(FieldError::invalid(&at.child("maxSurge"), surge.clone(), detail));
        }
        (true, true) => {
            let detail = "cannot be 0 when maxSurge is 0";
            errors.push(FieldError::invalid(&at.child("maxUnavailable"), unavailable.clone(), detail));
        }
        (true, false) | (false, true) => {}
    }
}

fn stateful_set(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    one_of(
        errors,
        &path.child("podManagementPolicy"),
        &spec["podManagementPolicy"],
        &["OrderedReady", "Parallel"],
    );
    let (strategy, at) = (&spec["updateStrategy"], path.child("updateStrategy"));
    match text(&strategy["type"]) {
        "" => errors.push(FieldError::required(&at, "")),
        "OnDelete" if !strategy["rollingUpdate"].is_null() => {
            let detail = "only allowed for updateStrategy 'RollingUpdate'";
            errors.push(FieldError::invalid(
                &at.child("rollingUpdate"),
                strategy["rollingUpdate"].clone(),
                detail,
            ));
        }
        "RollingUpdate" => {
            let rolling = &strategy["rollingUpdate"];
            let at = at.child("rollingUpdate");
            not_negative(errors, &at.child("partition"), &rolling["partition"]);
            count_or_percent(errors, &at.child("maxUnavailable"), &rolling["maxUnavailable"]);
            if !rolling["maxUnavailable"].is_null() && is_nothing(&rolling["maxUnavailable"]) {
                let value = rolling["maxUnavailable"].clone();
                errors.push(FieldError::invalid(&at.child("maxUnavailable"), value, "cannot be 0"));
            }
            not_above_all(errors, &at.child("maxUnavailable"), &rolling["maxUnavailable"]);
        }
        "OnDelete" => {}
        _ => {
            let detail = "must be 'RollingUpdate' or 'OnDelete'";
            errors.push(FieldError::invalid(&at, strategy.clone(), detail));
        }
    }
    let retention = path.child("persistentVolumeClaimRetentionPolicy");
    for field in ["whenDeleted", "whenScaled"] {
        let value = &spec["persistentVolumeClaimRetentionPolicy"][field];
        one_of(errors, &retention.child(field), value, &["Delete", "Retain"]);
    }
    not_negative(errors, &path.child("ordinals").child("start"), &spec["ordinals"]["start"]);
    selector_and_template(errors, object, "statefulset");
    for (index, claim) in items(&spec["volumeClaimTemplates"]).iter().enumerate() {
        let at = path.child("volumeClaimTemplates").index(index);
        checks::required(errors, &at.child("metadata").child("name"), &claim["metadata"]["name"]);
    }
}

fn stateful_set_update(errors: &mut Errors, new: &Value, old: &Value) {
    const MUTABLE: [&str; 7] = [
        "replicas",
        "template",
        "updateStrategy",
        "minReadySeconds",
        "persistentVolumeClaimRetentionPolicy",
        "ordinals",
        "revisionHistoryLimit",
    ];
    let mut munged = new.clone();
    MUTABLE.iter().for_each(|field| copy(&mut munged, old, field));
    if !same(&munged, old) {
        let detail = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', \
'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
        errors.push(FieldError::forbidden(&FieldPath::new("spec"), detail));
    }
}
