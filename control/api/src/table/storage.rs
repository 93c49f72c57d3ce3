//! Rows of volumes, claims, classes, CSI, and versions of stored objects.

use jiff::Timestamp;
use serde_json::Value;

use super::duration::age;
use super::format::{NONE, UNSET, count, items, joined, name, scalar, text, text_or};

pub(super) fn row(group: &str, kind: &str, object: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let spec = &object["spec"];
    Some(match (group, kind) {
        ("", "PersistentVolume") => volume(object, now),
        ("", "PersistentVolumeClaim") => claim(object, now),
        ("storage.k8s.io", "StorageClass") => class(object, now),
        ("storage.k8s.io", "VolumeAttributesClass") => {
            vec![name(object), text(&object["driverName"]).into(), age(object, now)]
        }
        ("storage.k8s.io", "VolumeAttachment") => vec![
            name(object),
            text(&spec["attacher"]).into(),
            text(&spec["source"]["persistentVolumeName"]).into(),
            text(&spec["nodeName"]).into(),
            (object["status"]["attached"] == true).into(),
            age(object, now),
        ],
        ("storage.k8s.io", "CSINode") => vec![name(object), count(&spec["drivers"]).into(), age(object, now)],
        ("storage.k8s.io", "CSIDriver") => csi_driver(object, now),
        ("storage.k8s.io", "CSIStorageCapacity") => {
            let capacity = &object["capacity"];
            let capacity = if capacity.is_null() { UNSET.to_owned() } else { scalar(capacity) };
            vec![name(object), text(&object["storageClassName"]).into(), capacity.into()]
        }
        ("internal.apiserver.k8s.io", "StorageVersion") => storage_version(object, now),
        ("storagemigration.k8s.io", "StorageVersionMigration") => {
            let resource = &spec["resource"];
            let parts = [text(&resource["resource"]), text(&resource["group"])];
            let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
            vec![name(object), parts.join(".").into()]
        }
        _ => return None,
    })
}

fn access_modes(modes: &Value) -> String {
    let has = |mode: &str| items(modes).iter().any(|one| one == mode);
    let known = [
        ("ReadWriteOnce", "RWO"),
        ("ReadOnlyMany", "ROX"),
        ("ReadWriteMany", "RWX"),
        ("ReadWriteOncePod", "RWOP"),
    ];
    known.iter().filter(|(mode, _)| has(mode)).map(|(_, short)| *short).collect::<Vec<_>>().join(",")
}

fn phase(object: &Value) -> &str {
    if object["metadata"]["deletionTimestamp"].is_string() {
        "Terminating"
    } else {
        text(&object["status"]["phase"])
    }
}

/// The class, which objects of old name in an annotation.
fn storage_class(object: &Value) -> &str {
    let annotation = &object["metadata"]["annotations"]["volume.beta.kubernetes.io/storage-class"];
    annotation.as_str().unwrap_or(text(&object["spec"]["storageClassName"]))
}

fn quantity(value: &Value) -> String {
    if value.is_null() { "0".to_owned() } else { scalar(value) }
}

fn volume(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let claim = &spec["claimRef"];
    let claim = if claim.is_object() {
        format!("{}/{}", text(&claim["namespace"]), text(&claim["name"]))
    } else {
        String::new()
    };
    vec![
        name(object),
        quantity(&spec["capacity"]["storage"]).into(),
        access_modes(&spec["accessModes"]).into(),
        text(&spec["persistentVolumeReclaimPolicy"]).into(),
        phase(object).into(),
        claim.into(),
        storage_class(object).into(),
        spec["volumeAttributesClassName"].as_str().unwrap_or(UNSET).into(),
        text(&object["status"]["reason"]).into(),
        age(object, now),
        spec["volumeMode"].as_str().unwrap_or(UNSET).into(),
    ]
}

fn claim(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let volume = text(&spec["volumeName"]);
    let (capacity, modes) = if volume.is_empty() {
        (String::new(), String::new())
    } else {
        (quantity(&status["capacity"]["storage"]), access_modes(&status["accessModes"]))
    };
    vec![
        name(object),
        phase(object).into(),
        volume.into(),
        capacity.into(),
        modes.into(),
        storage_class(object).into(),
        spec["volumeAttributesClassName"].as_str().unwrap_or(UNSET).into(),
        age(object, now),
        spec["volumeMode"].as_str().unwrap_or(UNSET).into(),
    ]
}

fn class(object: &Value, now: Timestamp) -> Vec<Value> {
    let annotations = &object["metadata"]["annotations"];
    let default =
        ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"]
            .iter()
            .any(|key| annotations[*key] == "true");
    let suffix = if default { " (default)" } else { "" };
    vec![
        format!("{}{suffix}", text(&object["metadata"]["name"])).into(),
        text(&object["provisioner"]).into(),
        text_or(&object["reclaimPolicy"], "Delete").into(),
        text_or(&object["volumeBindingMode"], "Immediate").into(),
        (object["allowVolumeExpansion"] == true).into(),
        age(object, now),
    ]
}

fn csi_driver(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let requests = &spec["tokenRequests"];
    let requests = if requests.is_null() {
        UNSET.to_owned()
    } else {
        items(requests).iter().map(|one| text(&one["audience"])).collect::<Vec<_>>().join(",")
    };
    let modes = joined(&spec["volumeLifecycleModes"], ",");
    vec![
        name(object),
        (spec["attachRequired"] != false).into(),
        (spec["podInfoOnMount"] == true).into(),
        (spec["storageCapacity"] == true).into(),
        requests.into(),
        (spec["requiresRepublish"] == true).into(),
        if modes.is_empty() { NONE.into() } else { modes.into() },
        age(object, now),
    ]
}

fn storage_version(object: &Value, now: Timestamp) -> Vec<Value> {
    let status = &object["status"];
    let common = status["commonEncodingVersion"].as_str().unwrap_or(UNSET);
    let versions = items(&status["storageVersions"]).iter();
    let versions: Vec<_> = versions
        .map(|one| format!("{}={}", text(&one["apiServerID"]), text(&one["encodingVersion"])))
        .collect();
    vec![name(object), common.into(), versions.join(",").into(), age(object, now)]
}
