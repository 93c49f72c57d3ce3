//! What an update of a pod may change.

use serde_json::Value;

use super::super::Change;
use super::super::checks::{Errors, optional_name};
use super::super::value::{at, copy, each, entries, is_empty, items, same, text};
use super::{containers, spec, volumes};
use crate::field::{FieldError, FieldPath};
use crate::names;

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it \
was previously negative)";
const MAX_SECONDS: i64 = i32::MAX as i64;

pub(super) fn validate(errors: &mut Errors, change: &Change<'_>) {
    match change.subresource {
        None => main(errors, change.new, change.old),
        Some("status") => status(errors, change.new, change.old),
        Some("ephemeralcontainers") => ephemeral(errors, change.new, change.old),
        Some("resize") => spec::validate(errors, &FieldPath::new("spec"), &change.new["spec"]),
        Some(_) => {}
    }
}

fn main(errors: &mut Errors, new: &Value, old: &Value) {
    let path = FieldPath::new("spec");
    let (new, old) = (&new["spec"], &old["spec"]);
    for list in ["containers", "initContainers"] {
        let before = errors.len();
        if items(&new[list]).len() != items(&old[list]).len() {
            errors.push(FieldError::forbidden(
                &path.child(list),
                "pod updates may not add or remove containers",
            ));
        }
        if errors.len() > before {
            return;
        }
    }
    for list in ["containers", "initContainers"] {
        for (index, container) in items(&new[list]).iter().enumerate() {
            containers::image(errors, &path.child(list).index(index).child("image"), &container["image"]);
        }
    }
    active_deadline(errors, &path.child("activeDeadlineSeconds"), new, old);
    added_tolerations(errors, &path.child("tolerations"), new, old);
    let munged = without_updatable(new, old);
    if !same(&munged, old) {
        let detail =
            format!("pod updates may not change fields other than {UPDATABLE}\n{}", difference(&munged, old));
        errors.push(FieldError::forbidden(&path, detail));
    }
}

fn active_deadline(errors: &mut Errors, path: &FieldPath, new: &Value, old: &Value) {
    let (new, old) = (new["activeDeadlineSeconds"].as_i64(), old["activeDeadlineSeconds"].as_i64());
    match (new, old) {
        (Some(new), _) if !(0..=MAX_SECONDS).contains(&new) => {
            errors.push(FieldError::invalid(path, new, names::range_error(0, MAX_SECONDS)));
        }
        (Some(new), Some(old)) if old < new => {
            errors.push(FieldError::invalid(path, new, "must be less than or equal to previous value"));
        }
        (None, Some(_)) => {
            errors.push(FieldError::invalid(
                path,
                Value::Null,
                "must not update from a positive integer to nil value",
            ));
        }
        (Some(_) | None, Some(_) | None) => {}
    }
}

/// Tolerations may be added; of one that is there only the seconds may change.
fn added_tolerations(errors: &mut Errors, path: &FieldPath, new: &Value, old: &Value) {
    let bare = |toleration: &Value| {
        let mut bare = toleration.clone();
        super::super::value::remove(&mut bare, "tolerationSeconds");
        bare
    };
    let known: Vec<_> = items(&new["tolerations"]).iter().map(bare).collect();
    let kept = |toleration: &Value| known.iter().any(|one| same(one, &bare(toleration)));
    if !items(&old["tolerations"]).iter().all(kept) {
        let detail = "existing toleration can not be modified except its tolerationSeconds";
        errors.push(FieldError::forbidden(path, detail));
    }
    super::placement::tolerations(errors, path, &new["tolerations"]);
}

/// The new spec with everything that may change put back.
fn without_updatable(new: &Value, old: &Value) -> Value {
    let mut munged = new.clone();
    for list in ["containers", "initContainers"] {
        for (container, before) in each(&mut munged, list).zip(items(&old[list])) {
            copy(container, before, "image");
        }
    }
    for field in ["activeDeadlineSeconds", "tolerations"] {
        copy(&mut munged, old, field);
    }
    let grace = "terminationGracePeriodSeconds";
    if new[grace].as_i64() == Some(1) && old[grace].as_i64().is_some_and(|old| old < 0) {
        copy(&mut munged, old, grace);
    }
    let gates = |spec: &Value| items(&spec["schedulingGates"]).to_vec();
    let (new_gates, old_gates) = (gates(new), gates(old));
    if !old_gates.is_empty() {
        if new_gates.iter().all(|gate| old_gates.contains(gate)) {
            copy(&mut munged, old, "schedulingGates");
        }
        // A pod that no one schedules yet may be steered more narrowly.
        let narrowed = entries(&old["nodeSelector"]).all(|(key, value)| new["nodeSelector"][key] == *value);
        if narrowed {
            copy(&mut munged, old, "nodeSelector");
        }
        if old["affinity"]["nodeAffinity"].is_null()
            && let Some(affinity) = at(&mut munged, &["affinity"])
        {
            super::super::value::remove(affinity, "nodeAffinity");
            if is_empty(affinity) && old["affinity"].is_null() {
                super::super::value::remove(&mut munged, "affinity");
            }
        }
    }
    munged
}

/// The fields that differ, one a line: `- ` as asked for, `+ ` as it stays.
fn difference(new: &Value, old: &Value) -> String {
    let mut fields: Vec<&str> = entries(new).chain(entries(old)).map(|(field, _)| field).collect();
    fields.sort_unstable();
    fields.dedup();
    let changed = fields.into_iter().filter(|field| !same(&new[*field], &old[*field]));
    changed.map(|field| format!("- {field}: {}\n+ {field}: {}\n", new[field], old[field])).collect()
}

fn status(errors: &mut Errors, new: &Value, old: &Value) {
    let path = FieldPath::new("status");
    let (restart, status, before) = (text(&new["spec"]["restartPolicy"]), &new["status"], &old["status"]);
    optional_name(
        errors,
        &path.child("nominatedNodeName"),
        &status["nominatedNodeName"],
        names::dns1123_subdomain,
    );
    for (index, ip) in items(&status["podIPs"]).iter().enumerate() {
        optional_name(errors, &path.child("podIPs").index(index), &ip["ip"], names::ip);
    }
    if !is_empty(&before["qosClass"]) && status["qosClass"] != before["qosClass"] {
        errors.push(FieldError::invalid(
            &path.child("qosClass"),
            status["qosClass"].clone(),
            "field is immutable",
        ));
    }
    if restart == "Always" {
        return;
    }
    let inits = ("initContainerStatuses", "initContainers");
    for (list, specs) in [("containerStatuses", "containers"), inits] {
        let specs = items(&new["spec"][specs]);
        for (index, before) in items(&before[list]).iter().enumerate() {
            let restarts = |spec: &&Value| spec["name"] == before["name"] && !spec["restartPolicy"].is_null();
            let ended = &before["state"]["terminated"];
            let failed = ended["exitCode"].as_i64().unwrap_or_default() != 0;
            if !ended.is_object()
                || (restart == "OnFailure" && failed)
                || specs.iter().any(|spec| restarts(&spec))
            {
                continue;
            }
            let now = items(&status[list]).iter().find(|one| one["name"] == before["name"]);
            if now.is_some_and(|one| !one["state"]["terminated"].is_object()) {
                let path = path.child(list).index(index).child("state");
                errors.push(FieldError::forbidden(&path, "may not be transitioned to non-terminated state"));
            }
        }
    }
}

fn ephemeral(errors: &mut Errors, new: &Value, old: &Value) {
    let path = FieldPath::new("spec").child("ephemeralContainers");
    let known =
        volumes::validate(&mut Vec::new(), &FieldPath::new("spec").child("volumes"), &new["spec"]["volumes"]);
    containers::ephemeral(errors, &path, &new["spec"], &known);
    let list = |pod: &Value| items(&pod["spec"]["ephemeralContainers"]).to_vec();
    let (new, old) = (list(new), list(old));
    for before in &old {
        let name = text(&before["name"]);
        match new.iter().find(|one| one["name"] == before["name"]) {
            None => {
                let detail = format!("existing ephemeral containers {name:?} may not be removed\n");
                errors.push(FieldError::forbidden(&path, detail));
            }
            Some(now) if !same(now, before) => {
                let detail = format!(
                    "existing ephemeral containers {name:?} may not be changed\n{}",
                    difference(now, before)
                );
                errors.push(FieldError::forbidden(&path, detail));
            }
            Some(_) => {}
        }
    }
}
