//! Object metadata: rules for names kind by kind, labels, annotations, owners, finalizers, and what may not change.

use serde_json::Value;

use super::checks::{self, Errors, IMMUTABLE, NOT_NEGATIVE, problems};
use super::value::{entries, is_empty, items, text};
use crate::field::{FieldError, FieldPath};
use crate::kinds::Kind;
use crate::names;

/// All annotations of an object together, keys and values.
const ANNOTATIONS_MAX_BYTES: usize = 256 * 1024;
/// A CronJob adds up to 11 characters for its Jobs, which have at most 63.
const CRON_JOB_NAME_MAX_BYTES: usize = 52;

/// What is wrong with the name of an object of this kind, in upstream's words. With `prefix` it is a `generateName`.
pub fn name_problems(kind: &Kind, name: &str, prefix: bool) -> Vec<String> {
    let rule: fn(&str) -> Vec<String> = match (kind.group, kind.kind) {
        // Service names may begin with a digit since 1.36 (KEP-5311).
        ("", "Namespace" | "Service") | ("apps", "StatefulSet") => names::dns1123_label,
        ("rbac.authorization.k8s.io", _) | ("certificates.k8s.io" | "apiregistration.k8s.io", _) => {
            names::path_segment
        }
        ("networking.k8s.io", "IPAddress") => names::canonical_ip,
        _ => names::dns1123_subdomain,
    };
    // A generated suffix makes up for a dash at the end.
    match name.strip_suffix('-') {
        Some(rest) if prefix && !rest.is_empty() => rule(&format!("{rest}a")),
        Some(_) | None => rule(name),
    }
}

pub(super) fn create(kind: &Kind, object: &Value) -> Errors {
    let path = FieldPath::new("metadata");
    let metadata = &object["metadata"];
    let mut errors = Vec::new();
    let generate_name = text(&metadata["generateName"]);
    if !generate_name.is_empty() {
        problems(
            &mut errors,
            &path.child("generateName"),
            generate_name,
            name_problems(kind, generate_name, true),
        );
    }
    let name = text(&metadata["name"]);
    if name.is_empty() {
        errors.push(FieldError::required(&path.child("name"), "name or generateName is required"));
    } else {
        problems(&mut errors, &path.child("name"), name, name_problems(kind, name, false));
    }
    if (kind.group, kind.kind) == ("batch", "CronJob") && name.len() > CRON_JOB_NAME_MAX_BYTES {
        let detail = format!("must be no more than {CRON_JOB_NAME_MAX_BYTES} characters");
        errors.push(FieldError::invalid(&path.child("name"), name, detail));
    }
    let namespace = text(&metadata["namespace"]);
    if !kind.namespaced {
        if !namespace.is_empty() {
            errors.push(FieldError::forbidden(&path.child("namespace"), "not allowed on this type"));
        }
    } else if namespace.is_empty() {
        errors.push(FieldError::required(&path.child("namespace"), ""));
    } else {
        problems(&mut errors, &path.child("namespace"), namespace, names::dns1123_label(namespace));
    }
    shared(&mut errors, &path, metadata);
    finalizers(&mut errors, &path.child("finalizers"), &metadata["finalizers"]);
    errors
}

/// Labels, annotations and owners of any object, also of one inside another such as a pod template.
pub fn validate_metadata(path: &FieldPath, metadata: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    checks::labels(&mut errors, &path.child("labels"), &metadata["labels"]);
    annotations(&mut errors, &path.child("annotations"), &metadata["annotations"]);
    errors
}

fn shared(errors: &mut Errors, path: &FieldPath, metadata: &Value) {
    if let Some(generation) = metadata["generation"].as_i64().filter(|generation| *generation < 0) {
        errors.push(FieldError::invalid(&path.child("generation"), generation, NOT_NEGATIVE));
    }
    errors.extend(validate_metadata(path, metadata));
    owners(errors, &path.child("ownerReferences"), &metadata["ownerReferences"]);
}

fn annotations(errors: &mut Errors, path: &FieldPath, annotations: &Value) {
    let mut size = 0;
    for (key, value) in entries(annotations) {
        problems(errors, path, key, names::qualified_name(&key.to_lowercase()));
        size += key.len() + text(value).len();
    }
    if size > ANNOTATIONS_MAX_BYTES {
        errors.push(FieldError::too_long(path, ANNOTATIONS_MAX_BYTES));
    }
}

fn owners(errors: &mut Errors, path: &FieldPath, owners: &Value) {
    let mut controller = None;
    for owner in items(owners) {
        let version = text(&owner["apiVersion"]);
        if version.rsplit('/').next().unwrap_or_default().is_empty() {
            errors.push(FieldError::invalid(&path.child("apiVersion"), version, "version must not be empty"));
        }
        for field in ["kind", "name", "uid"] {
            if is_empty(&owner[field]) {
                errors.push(FieldError::invalid(&path.child(field), "", "must not be empty"));
            }
        }
        if version == "v1" && owner["kind"] == "Event" {
            errors.push(FieldError::invalid(
                path,
                owner.clone(),
                "/v1, Kind=Event is disallowed from being an owner",
            ));
        }
        if owner["controller"] == true {
            let name = text(&owner["name"]);
            match controller {
                None => controller = Some(name),
                Some(first) => errors.push(FieldError::invalid(
                    path,
                    owners.clone(),
                    format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {name}"
                    ),
                )),
            }
        }
    }
}

fn finalizers(errors: &mut Errors, path: &FieldPath, finalizers: &Value) {
    let has = |name: &str| items(finalizers).iter().any(|one| one == name);
    for finalizer in items(finalizers) {
        problems(errors, path, text(finalizer), names::qualified_name(text(finalizer)));
    }
    if has("orphan") && has("foregroundDeletion") {
        let detail = "finalizer orphan and foregroundDeletion cannot be both set";
        errors.push(FieldError::invalid(path, finalizers.clone(), detail));
    }
}

pub(super) fn update(new: &Value, old: &Value) -> Errors {
    let path = FieldPath::new("metadata");
    let (new, old) = (&new["metadata"], &old["metadata"]);
    let mut errors = Vec::new();
    finalizers(&mut errors, &path.child("finalizers"), &new["finalizers"]);
    if !old["deletionTimestamp"].is_null() {
        no_new_finalizers(&mut errors, &path.child("finalizers"), new, old);
    }
    let generation = |metadata: &Value| metadata["generation"].as_i64().unwrap_or_default();
    if generation(new) < generation(old) {
        let detail = "must not be decremented";
        errors.push(FieldError::invalid(&path.child("generation"), generation(new), detail));
    }
    for field in
        ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"]
    {
        let differs = new[field] != old[field] && !(is_empty(&new[field]) && is_empty(&old[field]));
        if differs {
            errors.push(FieldError::invalid(&path.child(field), new[field].clone(), IMMUTABLE));
        }
    }
    shared(&mut errors, &path, new);
    errors
}

fn no_new_finalizers(errors: &mut Errors, path: &FieldPath, new: &Value, old: &Value) {
    let known = items(&old["finalizers"]);
    let mut extra: Vec<_> =
        items(&new["finalizers"]).iter().filter(|one| !known.contains(one)).map(text).collect();
    if extra.is_empty() {
        return;
    }
    extra.sort_unstable();
    let list: Vec<_> = extra.iter().map(|one| format!("{one:?}")).collect();
    let detail = format!(
        "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
        list.join(", ")
    );
    errors.push(FieldError::forbidden(path, detail));
}
