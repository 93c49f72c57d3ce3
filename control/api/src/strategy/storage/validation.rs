//! Validation of volumes, claims, classes and CSI objects.

use serde_json::Value;

use super::super::Change;
use super::super::checks::{Errors, immutable, label_selector, one_of, optional_one_of, problems, required};
use super::super::pod;
use super::super::value::{copy, entries, is_empty, items, same, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

const MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
const RECLAIM: [&str; 3] = ["Delete", "Recycle", "Retain"];
const VOLUME_MODES: [&str; 2] = ["Block", "Filesystem"];
/// Fields of a volume's spec that are not its source.
const NOT_SOURCES: [&str; 9] = [
    "accessModes",
    "capacity",
    "claimRef",
    "mountOptions",
    "nodeAffinity",
    "persistentVolumeReclaimPolicy",
    "storageClassName",
    "volumeAttributesClassName",
    "volumeMode",
];

pub(in super::super) fn create(group: &str, kind: &str, object: &Value, errors: &mut Errors) {
    match (group, kind) {
        ("", "PersistentVolume") => volume(object, errors),
        ("", "PersistentVolumeClaim") => claim(object, errors),
        ("storage.k8s.io", "StorageClass") => class(object, errors),
        ("storage.k8s.io", "CSINode") => csi_node(object, errors),
        ("storage.k8s.io", "VolumeAttachment") => {
            let path = FieldPath::new("spec");
            for field in ["attacher", "nodeName"] {
                required(errors, &path.child(field), &object["spec"][field]);
            }
        }
        _ => {}
    }
}

pub(in super::super) fn update(group: &str, kind: &str, change: &Change<'_>, errors: &mut Errors) {
    if change.subresource.is_some() {
        return;
    }
    let (new, old) = (change.new, change.old);
    create(group, kind, new, errors);
    match (group, kind) {
        ("", "PersistentVolume") => {
            let source = |object: &Value| {
                object["spec"]
                    .as_object()
                    .and_then(|spec| source_of(spec).next().map(|(key, value)| (key.clone(), value.clone())))
            };
            let differs = match (source(new), source(old)) {
                (Some((a, x)), Some((b, y))) => a != b || !same(&x, &y),
                (one, other) => one.is_some() != other.is_some(),
            };
            if differs {
                let detail = "spec.persistentvolumesource is immutable after creation";
                errors.push(FieldError::forbidden(
                    &FieldPath::new("spec").child("persistentvolumesource"),
                    detail,
                ));
            }
            immutable(
                errors,
                &FieldPath::new("spec").child("volumeMode"),
                &new["spec"]["volumeMode"],
                &old["spec"]["volumeMode"],
            );
        }
        ("", "PersistentVolumeClaim") => claim_update(errors, new, old),
        ("storage.k8s.io", "StorageClass") => {
            for field in ["parameters", "provisioner", "reclaimPolicy", "volumeBindingMode"] {
                if !same(&new[field], &old[field]) {
                    let detail = format!("updates to {field} are forbidden.");
                    errors.push(FieldError::forbidden(&FieldPath::new(field), detail));
                }
            }
        }
        ("storage.k8s.io", "VolumeAttachment") => {
            immutable(errors, &FieldPath::new("spec"), &new["spec"], &old["spec"]);
        }
        _ => {}
    }
}

fn source_of(spec: &serde_json::Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
    spec.iter().filter(|(field, value)| !NOT_SOURCES.contains(&field.as_str()) && !value.is_null())
}

fn access_modes(errors: &mut Errors, path: &FieldPath, modes: &Value) {
    let list = items(modes);
    for mode in list {
        if !MODES.contains(&text(mode)) {
            errors.push(FieldError::not_supported(path, mode.clone(), &MODES));
        }
    }
    if list.len() > 1 && list.iter().any(|mode| mode == "ReadWriteOncePod") {
        let detail = "may not use ReadWriteOncePod with other access modes";
        errors.push(FieldError::forbidden(path, detail));
    }
}

fn storage_amount(errors: &mut Errors, path: &FieldPath, amounts: &Value) {
    let path = path.key("storage");
    if amounts["storage"].is_null() {
        errors.push(FieldError::required(&path, ""));
    } else if let Some(amount) =
        pod::resources::quantity(&amounts["storage"]).filter(|amount| amount.signum() <= 0)
    {
        errors.push(FieldError::invalid(&path, amount.to_string(), "must be greater than zero"));
    }
}

fn volume(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    required(errors, &path.child("accessModes"), &spec["accessModes"]);
    access_modes(errors, &path.child("accessModes"), &spec["accessModes"]);
    if is_empty(&spec["capacity"]) {
        errors.push(FieldError::required(&path.child("capacity"), ""));
    } else if spec["capacity"]["storage"].is_null() || entries(&spec["capacity"]).count() > 1 {
        errors.push(FieldError::not_supported(
            &path.child("capacity"),
            spec["capacity"].clone(),
            &["storage"],
        ));
    } else {
        storage_amount(errors, &path.child("capacity"), &spec["capacity"]);
    }
    optional_one_of(
        errors,
        &path.child("persistentVolumeReclaimPolicy"),
        &spec["persistentVolumeReclaimPolicy"],
        &RECLAIM,
    );
    optional_one_of(errors, &path.child("volumeMode"), &spec["volumeMode"], &VOLUME_MODES);
    let mut sources = spec.as_object().into_iter().flat_map(source_of);
    let Some((kind, source)) = sources.next() else {
        errors.push(FieldError::required(&path, "must specify a volume type"));
        return;
    };
    for (more, _) in sources {
        errors.push(FieldError::forbidden(&path.child(more), "may not specify more than 1 volume type"));
    }
    let at = path.child(kind);
    match kind.as_str() {
        "hostPath" => pod::host_path(errors, &at, source),
        "nfs" => pod::nfs(errors, &at, source),
        "local" => {
            required(errors, &at.child("path"), &source["path"]);
            if spec["nodeAffinity"].is_null() {
                errors.push(FieldError::required(
                    &path.child("nodeAffinity"),
                    "Local volume requires node affinity",
                ));
            }
        }
        "csi" => {
            required(errors, &at.child("driver"), &source["driver"]);
            required(errors, &at.child("volumeHandle"), &source["volumeHandle"]);
        }
        _ => {}
    }
    let affinity = &spec["nodeAffinity"]["required"];
    if !affinity.is_null() {
        pod::node_selector(errors, &path.child("nodeAffinity").child("required"), affinity);
    }
}

fn claim(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    if is_empty(&spec["accessModes"]) {
        errors.push(FieldError::required(&path.child("accessModes"), "at least 1 access mode is required"));
    }
    access_modes(errors, &path.child("accessModes"), &spec["accessModes"]);
    label_selector(errors, &path.child("selector"), &spec["selector"]);
    storage_amount(errors, &path.child("resources"), &spec["resources"]["requests"]);
    optional_one_of(errors, &path.child("volumeMode"), &spec["volumeMode"], &VOLUME_MODES);
    for field in ["storageClassName", "volumeAttributesClassName"] {
        if let Some(name) = spec[field].as_str().filter(|name| !name.is_empty()) {
            problems(errors, &path.child(field), name, names::dns1123_subdomain(name));
        }
    }
}

/// A claim's spec is fixed, but for growing, for being bound, and for a class that is set late.
fn claim_update(errors: &mut Errors, new: &Value, old: &Value) {
    let path = FieldPath::new("spec");
    let (new, old, phase) = (&new["spec"], &old["spec"], text(&old["status"]["phase"]));
    let mut munged = new.clone();
    if is_empty(&old["volumeName"]) {
        copy(&mut munged, old, "volumeName");
    }
    if old["storageClassName"].is_null() {
        copy(&mut munged, old, "storageClassName");
    }
    copy(&mut munged, old, "volumeAttributesClassName");
    if phase == "Bound" {
        copy(&mut munged, old, "resources");
    }
    if !same(&munged, old) {
        let detail = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        errors.push(FieldError::forbidden(&path, detail));
    }
    let amount = |spec: &Value| pod::resources::quantity(&spec["resources"]["requests"]["storage"]);
    if amount(new) < amount(old) && phase == "Bound" {
        let detail = "field can not be less than status.capacity";
        errors
            .push(FieldError::forbidden(&path.child("resources").child("requests").child("storage"), detail));
    }
}

fn class(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("provisioner");
    if required(errors, &path, &object["provisioner"]) {
        let name = text(&object["provisioner"]).to_lowercase();
        problems(errors, &path, &name, names::qualified_name(&name));
    }
    optional_one_of(
        errors,
        &FieldPath::new("reclaimPolicy"),
        &object["reclaimPolicy"],
        &["Delete", "Retain"],
    );
    let modes = ["Immediate", "WaitForFirstConsumer"];
    one_of(errors, &FieldPath::new("volumeBindingMode"), &object["volumeBindingMode"], &modes);
    let size: usize = entries(&object["parameters"]).map(|(key, value)| key.len() + text(value).len()).sum();
    if size > 256 * 1024 {
        errors.push(FieldError::too_long(&FieldPath::new("parameters"), 256 * 1024));
    }
    for (key, _) in entries(&object["parameters"]).filter(|(key, _)| key.is_empty()) {
        errors.push(FieldError::invalid(&FieldPath::new("parameters"), key, "field can not be empty."));
    }
}

fn csi_node(object: &Value, errors: &mut Errors) {
    let mut seen = std::collections::BTreeSet::new();
    for (index, driver) in items(&object["spec"]["drivers"]).iter().enumerate() {
        let path = FieldPath::new("spec").child("drivers").index(index);
        required(errors, &path.child("name"), &driver["name"]);
        required(errors, &path.child("nodeID"), &driver["nodeID"]);
        if !seen.insert(text(&driver["name"])) {
            errors.push(FieldError::duplicate(&path.child("name"), driver["name"].clone()));
        }
    }
}
