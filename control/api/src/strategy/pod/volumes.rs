//! Validation of volumes, and of the mounts that name them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::super::checks::{Errors, one_of, optional_one_of, required, required_name};
use super::super::value::{entries, items, text};
use super::environment::{field_reference, resource_reference};
use super::resources::quantity;
use crate::field::{FieldError, FieldPath};
use crate::names;

/// The volumes of a pod by name.
pub(super) type Volumes<'a> = BTreeMap<&'a str, &'a Value>;

const MODE: &str = "must be a number between 0 and 0777 (octal), both inclusive";
const MAX_MODE: i64 = 0o777;
const HOST_PATH_TYPES: [&str; 7] =
    ["BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
const PROPAGATIONS: [&str; 3] = ["Bidirectional", "HostToContainer", "None"];

/// A pod's volumes; returns those that mounts may name.
pub(super) fn validate<'a>(errors: &mut Errors, path: &FieldPath, volumes: &'a Value) -> Volumes<'a> {
    let mut known = Volumes::new();
    for (index, volume) in items(volumes).iter().enumerate() {
        let path = path.index(index);
        let before = errors.len();
        source(errors, &path, volume);
        let name = text(&volume["name"]);
        required_name(errors, &path.child("name"), &volume["name"], names::dns1123_label);
        if known.contains_key(name) {
            errors.push(FieldError::duplicate(&path.child("name"), name));
        }
        if errors.len() == before {
            known.insert(name, volume);
        } else if !name.is_empty() {
            // A mount of a volume with a mistake isn't a second mistake.
            known.entry(name).or_insert(volume);
        }
    }
    known
}

fn source(errors: &mut Errors, path: &FieldPath, volume: &Value) {
    let mut given = entries(volume).filter(|(field, value)| *field != "name" && !value.is_null());
    let Some((kind, value)) = given.next() else {
        errors.push(FieldError::required(path, "must specify a volume type"));
        return;
    };
    for (more, _) in given {
        errors.push(FieldError::forbidden(&path.child(more), "may not specify more than 1 volume type"));
    }
    let path = path.child(kind);
    match kind {
        "emptyDir" if quantity(&value["sizeLimit"]).is_some_and(|size| size.signum() < 0) => {
            let detail = "SizeLimit field must be a valid resource quantity";
            errors.push(FieldError::forbidden(&path.child("sizeLimit"), detail));
        }
        "hostPath" => host_path(errors, &path, value),
        "secret" => {
            required(errors, &path.child("secretName"), &value["secretName"]);
            files(errors, &path, value);
        }
        "configMap" => {
            required(errors, &path.child("name"), &value["name"]);
            files(errors, &path, value);
        }
        "downwardAPI" => {
            mode(errors, &path.child("defaultMode"), &value["defaultMode"]);
            downward(errors, &path.child("items"), &value["items"]);
        }
        "projected" => {
            mode(errors, &path.child("defaultMode"), &value["defaultMode"]);
            projected(errors, &path.child("sources"), &value["sources"]);
        }
        "persistentVolumeClaim" => {
            required(errors, &path.child("claimName"), &value["claimName"]);
        }
        "nfs" => nfs(errors, &path, value),
        "csi" => {
            required(errors, &path.child("driver"), &value["driver"]);
        }
        "image" => {
            required(errors, &path.child("reference"), &value["reference"]);
            optional_one_of(
                errors,
                &path.child("pullPolicy"),
                &value["pullPolicy"],
                &["Always", "IfNotPresent", "Never"],
            );
        }
        "ephemeral" if value["volumeClaimTemplate"].is_null() => {
            errors.push(FieldError::required(&path.child("volumeClaimTemplate"), ""));
        }
        _ => {}
    }
}

/// A path on the node.
pub(in super::super) fn host_path(errors: &mut Errors, path: &FieldPath, source: &Value) {
    if required(errors, &path.child("path"), &source["path"]) {
        no_backsteps(errors, &path.child("path"), text(&source["path"]));
    }
    optional_one_of(errors, &path.child("type"), &source["type"], &HOST_PATH_TYPES);
}

/// A share of an NFS server.
pub(in super::super) fn nfs(errors: &mut Errors, path: &FieldPath, source: &Value) {
    required(errors, &path.child("server"), &source["server"]);
    if required(errors, &path.child("path"), &source["path"]) && !text(&source["path"]).starts_with('/') {
        errors.push(FieldError::invalid(
            &path.child("path"),
            source["path"].clone(),
            "must be an absolute path",
        ));
    }
}

fn no_backsteps(errors: &mut Errors, path: &FieldPath, value: &str) {
    if value.split('/').any(|part| part == "..") {
        errors.push(FieldError::invalid(path, value, "must not contain '..'"));
    }
}

/// A path below a volume's root.
fn local_path(errors: &mut Errors, path: &FieldPath, value: &str) {
    if value.starts_with('/') {
        errors.push(FieldError::invalid(path, value, "must be a relative path"));
    }
    no_backsteps(errors, path, value);
}

/// A path below a volume's root whose first part doesn't look like the kubelet's own `..data`.
fn file_path(errors: &mut Errors, path: &FieldPath, value: &str) {
    local_path(errors, path, value);
    if value.starts_with("..") && !value.starts_with("../") && value != ".." {
        errors.push(FieldError::invalid(path, value, "must not start with '..'"));
    }
}

fn mode(errors: &mut Errors, path: &FieldPath, mode: &Value) {
    if let Some(mode) = mode.as_i64().filter(|mode| !(0..=MAX_MODE).contains(mode)) {
        errors.push(FieldError::invalid(path, mode, MODE));
    }
}

fn files(errors: &mut Errors, path: &FieldPath, source: &Value) {
    mode(errors, &path.child("defaultMode"), &source["defaultMode"]);
    for (index, item) in items(&source["items"]).iter().enumerate() {
        let path = path.child("items").index(index);
        required(errors, &path.child("key"), &item["key"]);
        if required(errors, &path.child("path"), &item["path"]) {
            file_path(errors, &path.child("path"), text(&item["path"]));
        }
        mode(errors, &path.child("mode"), &item["mode"]);
    }
}

fn downward(errors: &mut Errors, path: &FieldPath, files: &Value) {
    for (index, file) in items(files).iter().enumerate() {
        let path = path.index(index);
        if required(errors, &path.child("path"), &file["path"]) {
            file_path(errors, &path.child("path"), text(&file["path"]));
        }
        match (file["fieldRef"].is_null(), file["resourceFieldRef"].is_null()) {
            (false, true) => field_reference(errors, &path.child("fieldRef"), &file["fieldRef"], false),
            (true, false) => {
                resource_reference(errors, &path.child("resourceFieldRef"), &file["resourceFieldRef"], true);
            }
            (true, true) => {
                errors.push(FieldError::required(&path, "one of fieldRef and resourceFieldRef is required"))
            }
            (false, false) => {
                let detail = "fieldRef and resourceFieldRef can not be specified simultaneously";
                errors.push(FieldError::invalid(&path, "resource", detail));
            }
        }
        mode(errors, &path.child("mode"), &file["mode"]);
    }
}

/// Shortest life of a service account token.
const TOKEN_MIN_SECONDS: i64 = 600;
const TOKEN_MAX_SECONDS: i64 = 1 << 32;

fn projected(errors: &mut Errors, path: &FieldPath, sources: &Value) {
    for (index, source) in items(sources).iter().enumerate() {
        let path = path.index(index);
        let mut given = entries(source).filter(|(_, value)| !value.is_null());
        let Some((kind, value)) = given.next() else { continue };
        for (more, _) in given {
            errors.push(FieldError::forbidden(
                &path.child(more),
                "may not specify more than 1 volume type per source",
            ));
        }
        let path = path.child(kind);
        match kind {
            "secret" | "configMap" => {
                required(errors, &path.child("name"), &value["name"]);
                files(errors, &path, value);
            }
            "downwardAPI" => downward(errors, &path.child("items"), &value["items"]),
            "serviceAccountToken" => {
                let seconds = value["expirationSeconds"].as_i64().unwrap_or(TOKEN_MIN_SECONDS);
                let at = path.child("expirationSeconds");
                if seconds < TOKEN_MIN_SECONDS {
                    errors.push(FieldError::invalid(
                        &at,
                        seconds,
                        "may not specify a duration less than 10 minutes",
                    ));
                } else if seconds > TOKEN_MAX_SECONDS {
                    errors.push(FieldError::invalid(
                        &at,
                        seconds,
                        "may not specify a duration larger than 2^32 seconds",
                    ));
                }
                if required(errors, &path.child("path"), &value["path"]) {
                    file_path(errors, &path.child("path"), text(&value["path"]));
                }
            }
            _ => {}
        }
    }
}

/// A container's mounts and devices; `path` is the container.
pub(super) fn mounts(errors: &mut Errors, path: &FieldPath, container: &Value, known: &Volumes<'_>) {
    let devices: BTreeSet<_> =
        items(&container["volumeDevices"]).iter().map(|one| text(&one["devicePath"])).collect();
    let mut seen = BTreeSet::new();
    for (index, mount) in items(&container["volumeMounts"]).iter().enumerate() {
        let path = path.child("volumeMounts").index(index);
        reference(errors, &path.child("name"), &mount["name"], known);
        let target = text(&mount["mountPath"]);
        if required(errors, &path.child("mountPath"), &mount["mountPath"]) {
            if !seen.insert(target) {
                errors.push(FieldError::invalid(&path.child("mountPath"), target, "must be unique"));
            }
            if devices.contains(target) {
                let detail = "must not already exist as a path in volumeDevices";
                errors.push(FieldError::invalid(&path.child("mountPath"), target, detail));
            }
        }
        for field in ["subPath", "subPathExpr"] {
            local_path(errors, &path.child(field), text(&mount[field]));
        }
        if !text(&mount["subPath"]).is_empty() && !text(&mount["subPathExpr"]).is_empty() {
            let expression = mount["subPathExpr"].clone();
            let detail = "subPathExpr and subPath are mutually exclusive";
            errors.push(FieldError::invalid(&path.child("subPathExpr"), expression, detail));
        }
        propagation(errors, &path.child("mountPropagation"), mount, container);
    }
    for (index, device) in items(&container["volumeDevices"]).iter().enumerate() {
        let path = path.child("volumeDevices").index(index);
        reference(errors, &path.child("name"), &device["name"], known);
        if required(errors, &path.child("devicePath"), &device["devicePath"]) {
            no_backsteps(errors, &path.child("devicePath"), text(&device["devicePath"]));
        }
    }
}

fn reference(errors: &mut Errors, path: &FieldPath, name: &Value, known: &Volumes<'_>) {
    if required(errors, path, name) && !known.contains_key(text(name)) {
        errors.push(FieldError::not_found(path, name.clone()));
    }
}

fn propagation(errors: &mut Errors, path: &FieldPath, mount: &Value, container: &Value) {
    let propagation = &mount["mountPropagation"];
    if propagation.is_null() {
        return;
    }
    one_of(errors, path, propagation, &PROPAGATIONS);
    if propagation == "Bidirectional" && container["securityContext"]["privileged"] != true {
        let detail = "Bidirectional mount propagation is available only to privileged containers";
        errors.push(FieldError::forbidden(path, detail));
    }
}
