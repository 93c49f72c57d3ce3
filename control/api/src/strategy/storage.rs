//! Volumes, claims, classes and CSI: defaults and validation.

mod validation;

use serde_json::{Value, json};

use super::value::{at, default_object, default_to, default_zero, is_empty};

pub(super) use validation::{create, update};

/// Applies the defaults of `kind`; does nothing for a kind of another family.
pub(super) fn default(group: &str, kind: &str, object: &mut Value) {
    match (group, kind) {
        ("", "PersistentVolume") => {
            if let Some(spec) = at(object, &["spec"]) {
                default_zero(spec, "persistentVolumeReclaimPolicy", "Retain");
                default_to(spec, "volumeMode", "Filesystem");
                if let Some(path) = at(spec, &["hostPath"]) {
                    default_to(path, "type", "");
                }
            }
            default_phase(object);
        }
        ("", "PersistentVolumeClaim") => default_claim(object),
        ("storage.k8s.io", "StorageClass") => {
            default_to(object, "reclaimPolicy", "Delete");
            default_to(object, "volumeBindingMode", "Immediate");
        }
        ("storage.k8s.io", "CSIDriver") => csi_driver(object),
        _ => {}
    }
}

/// Defaults of a claim, also of those in a StatefulSet.
pub(super) fn default_claim(claim: &mut Value) {
    if let Some(spec) = default_object(claim, "spec") {
        default_to(spec, "volumeMode", "Filesystem");
        default_object(spec, "resources");
    }
    default_phase(claim);
}

fn default_phase(object: &mut Value) {
    if let Some(status) = default_object(object, "status") {
        default_zero(status, "phase", "Pending");
    }
}

fn csi_driver(object: &mut Value) {
    let Some(spec) = at(object, &["spec"]) else { return };
    default_to(spec, "attachRequired", true);
    for field in ["podInfoOnMount", "storageCapacity", "requiresRepublish", "seLinuxMount"] {
        default_to(spec, field, false);
    }
    default_to(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
    if is_empty(&spec["volumeLifecycleModes"]) {
        spec["volumeLifecycleModes"] = json!(["Persistent"]);
    }
}
