//! Validation of ConfigMaps, Secrets and ServiceAccounts.

use base64::Engine as _;
use serde_json::Value;

use super::super::Change;
use super::super::checks::{Errors, immutable, problems};
use super::super::value::{entries, is_empty, same, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

/// All values together.
const DATA_MAX_BYTES: usize = 1024 * 1024;

pub(in super::super) fn create(group: &str, kind: &str, object: &Value, errors: &mut Errors) {
    match (group, kind) {
        ("", "ConfigMap") => config_map(object, errors),
        ("", "Secret") => secret(object, errors),
        _ => {}
    }
}

pub(in super::super) fn update(group: &str, kind: &str, change: &Change<'_>, errors: &mut Errors) {
    if group.is_empty() && matches!(kind, "ConfigMap" | "Secret") {
        if kind == "Secret" {
            immutable(errors, &FieldPath::new("type"), &change.new["type"], &change.old["type"]);
        }
        sealed(errors, change.new, change.old);
        create(group, kind, change.new, errors);
    }
}

/// What was once declared immutable stays so, and its data too.
fn sealed(errors: &mut Errors, new: &Value, old: &Value) {
    if old["immutable"] != true {
        return;
    }
    let detail = "field is immutable when `immutable` is set";
    if new["immutable"] != true {
        errors.push(FieldError::forbidden(&FieldPath::new("immutable"), detail));
    }
    for field in ["data", "binaryData"] {
        let empty = is_empty(&new[field]) && is_empty(&old[field]);
        if !empty && !same(&new[field], &old[field]) {
            errors.push(FieldError::forbidden(&FieldPath::new(field), detail));
        }
    }
}

fn decoded_bytes(value: &Value) -> usize {
    let text = text(value);
    base64::decoded_len_estimate(text.len())
        .saturating_sub(text.bytes().rev().take_while(|byte| *byte == b'=').count())
}

fn config_map(object: &Value, errors: &mut Errors) {
    let mut size = 0;
    for (key, value) in entries(&object["data"]) {
        let path = FieldPath::new("data").key(key);
        problems(errors, &path, key, names::config_map_key(key));
        if !object["binaryData"][key].is_null() {
            let detail = "duplicate of key present in binaryData";
            errors.push(FieldError::invalid(&path, key, detail));
        }
        size += text(value).len();
    }
    for (key, value) in entries(&object["binaryData"]) {
        problems(errors, &FieldPath::new("binaryData").key(key), key, names::config_map_key(key));
        size += decoded_bytes(value);
    }
    if size > DATA_MAX_BYTES {
        // Upstream reports this one with an empty path, which it prints as [].
        errors.push(FieldError::too_long(&FieldPath::new("[]"), DATA_MAX_BYTES));
    }
}

fn secret(object: &Value, errors: &mut Errors) {
    let data = &object["data"];
    let mut size = 0;
    for (key, value) in entries(data) {
        problems(errors, &FieldPath::new("data").key(key), key, names::config_map_key(key));
        size += decoded_bytes(value);
    }
    if size > DATA_MAX_BYTES {
        errors.push(FieldError::too_long(&FieldPath::new("data"), DATA_MAX_BYTES));
    }
    let mut needs = |keys: &[&str]| {
        for key in keys.iter().filter(|key| data[**key].is_null()) {
            errors.push(FieldError::required(&FieldPath::new("data").key(key), ""));
        }
    };
    match text(&object["type"]) {
        "kubernetes.io/tls" => needs(&["tls.crt", "tls.key"]),
        "kubernetes.io/ssh-auth" => needs(&["ssh-privatekey"]),
        "kubernetes.io/dockerconfigjson" => docker_config(errors, data, ".dockerconfigjson"),
        "kubernetes.io/dockercfg" => docker_config(errors, data, ".dockercfg"),
        "kubernetes.io/basic-auth" if data["username"].is_null() && data["password"].is_null() => {
            needs(&["username", "password"]);
        }
        "kubernetes.io/service-account-token" => {
            let annotation = "kubernetes.io/service-account.name";
            if text(&object["metadata"]["annotations"][annotation]).is_empty() {
                let path = FieldPath::new("metadata").child("annotations").key(annotation);
                errors.push(FieldError::required(&path, ""));
            }
        }
        _ => {}
    }
}

fn docker_config(errors: &mut Errors, data: &Value, key: &str) {
    let path = FieldPath::new("data").key(key);
    let Some(config) = data[key].as_str() else {
        errors.push(FieldError::required(&path, ""));
        return;
    };
    let bytes = base64::engine::general_purpose::STANDARD.decode(config).unwrap_or_default();
    if let Err(error) = serde_json::from_slice::<serde_json::Map<String, Value>>(&bytes) {
        errors.push(FieldError::invalid(&path, "<secret contents redacted>", error.to_string()));
    }
}
