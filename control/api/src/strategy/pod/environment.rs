//! Validation of environment variables and of references to a pod's own fields.

use serde_json::Value;

use super::super::checks::{Errors, optional_name, problems, required, required_name};
use super::super::value::{is_empty, items, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

/// Fields that an environment variable may come from.
const ENV_FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// Fields that a file of a downwardAPI volume may come from.
const VOLUME_FIELDS: [&str; 5] =
    ["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
/// Fields that the API knows by name, whether they are of use here or not.
const KNOWN_FIELDS: [&str; 14] = [
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.phase",
    "status.podIP",
    "status.podIPs",
];
const RESOURCES: [&str; 6] = [
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];
const SOURCES: [&str; 5] = ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"];

/// A container's `env`.
pub(super) fn variables(errors: &mut Errors, path: &FieldPath, variables: &Value) {
    for (index, variable) in items(variables).iter().enumerate() {
        let path = path.index(index);
        required_name(errors, &path.child("name"), &variable["name"], names::env_var_name);
        if !variable["valueFrom"].is_null() {
            source(errors, &path.child("valueFrom"), variable);
        }
    }
}

fn source(errors: &mut Errors, path: &FieldPath, variable: &Value) {
    let from = &variable["valueFrom"];
    let given: Vec<_> = SOURCES.into_iter().filter(|source| !from[*source].is_null()).collect();
    for source in &given {
        let (path, reference) = (path.child(source), &from[*source]);
        match *source {
            "fieldRef" => field_reference(errors, &path, reference, true),
            "resourceFieldRef" => resource_reference(errors, &path, reference, false),
            "fileKeyRef" => {
                for field in ["key", "path", "volumeName"] {
                    required(errors, &path.child(field), &reference[field]);
                }
            }
            _ => key_reference(errors, &path, reference),
        }
    }
    if given.is_empty() {
        let detail = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`";
        errors.push(FieldError::invalid(path, "", detail));
    } else if !is_empty(&variable["value"]) {
        errors.push(FieldError::invalid(path, "", "may not be specified when `value` is not empty"));
    } else if given.len() > 1 {
        errors.push(FieldError::invalid(path, "", "may not have more than one field specified at a time"));
    }
}

fn key_reference(errors: &mut Errors, path: &FieldPath, reference: &Value) {
    required(errors, &path.child("name"), &reference["name"]);
    required_name(errors, &path.child("key"), &reference["key"], names::config_map_key);
}

/// A `fieldRef`, of an environment variable or of a file in a volume.
pub(super) fn field_reference(errors: &mut Errors, path: &FieldPath, reference: &Value, env: bool) {
    if !required(errors, &path.child("apiVersion"), &reference["apiVersion"]) {
        return;
    }
    let path = path.child("fieldPath");
    if !required(errors, &path, &reference["fieldPath"]) {
        return;
    }
    let field = text(&reference["fieldPath"]);
    if let Some((map, key)) = field.strip_suffix("']").and_then(|rest| rest.split_once("['")) {
        match map {
            "metadata.annotations" => {
                problems(errors, &path, key, names::qualified_name(&key.to_lowercase()))
            }
            "metadata.labels" => problems(errors, &path, key, names::qualified_name(key)),
            _ => errors.push(FieldError::invalid(&path, field, "does not support subscript")),
        }
        return;
    }
    if !KNOWN_FIELDS.contains(&field) {
        let detail = format!("error converting fieldPath: field label not supported: {field}");
        errors.push(FieldError::invalid(&path, field, detail));
        return;
    }
    let allowed: &[&str] = if env { &ENV_FIELDS } else { &VOLUME_FIELDS };
    if !allowed.contains(&field) {
        errors.push(FieldError::not_supported(&path, field, allowed));
    }
}

/// A `resourceFieldRef`; in a volume it must name the container.
pub(super) fn resource_reference(errors: &mut Errors, path: &FieldPath, reference: &Value, volume: bool) {
    if volume && !required(errors, &path.child("containerName"), &reference["containerName"]) {
        return;
    }
    if !required(errors, &path.child("resource"), &reference["resource"]) {
        return;
    }
    let resource = text(&reference["resource"]);
    let huge = resource.starts_with("limits.hugepages-") || resource.starts_with("requests.hugepages-");
    if !RESOURCES.contains(&resource) && !huge {
        errors.push(FieldError::not_supported(&path.child("resource"), resource, &RESOURCES));
        return;
    }
    let divisor = &reference["divisor"];
    let known: &[&str] = match resource.split_once('.') {
        Some((_, "cpu")) => &["1m", "1"],
        _ => &["1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"],
    };
    let given = divisor.as_str().map_or_else(|| divisor.to_string(), str::to_owned);
    if !is_empty(divisor) && given != "0" && !known.contains(&given.as_str()) {
        let name = resource.split_once('.').map_or(resource, |(_, name)| name);
        let units = if name == "cpu" {
            "1m and 1"
        } else {
            "1, 1k, 1M, 1G, 1T, 1P, 1E, 1Ki, 1Mi, 1Gi, 1Ti, 1Pi, 1Ei"
        };
        let detail = format!("only divisor's values {units} are supported with the {name} resource");
        errors.push(FieldError::invalid(&path.child("divisor"), given, detail));
    }
}

/// A container's `envFrom`.
pub(super) fn sources(errors: &mut Errors, path: &FieldPath, sources: &Value) {
    for (index, source) in items(sources).iter().enumerate() {
        let path = path.index(index);
        optional_name(errors, &path.child("prefix"), &source["prefix"], names::env_var_name);
        let given: Vec<_> = ["configMapRef", "secretRef"]
            .into_iter()
            .filter(|reference| !source[*reference].is_null())
            .collect();
        for reference in &given {
            required(errors, &path.child(reference).child("name"), &source[*reference]["name"]);
        }
        match given.len() {
            0 => errors.push(FieldError::invalid(
                &path,
                "",
                "must specify one of: `configMapRef` or `secretRef`",
            )),
            1 => {}
            _ => errors.push(FieldError::invalid(
                &path,
                "",
                "may not have more than one field specified at a time",
            )),
        }
    }
}
