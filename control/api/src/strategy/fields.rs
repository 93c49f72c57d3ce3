//! The fields that field selectors may name, kind by kind.

use serde_json::Value;

use super::value::{text, text_or};
use crate::kinds::Kind;

/// How the value of a selectable field is read from the object.
type Read = fn(&Value) -> String;

const COMMON: &[(&str, Read)] = &[
    ("metadata.name", |object| text(&object["metadata"]["name"]).to_owned()),
    ("metadata.namespace", |object| text(&object["metadata"]["namespace"]).to_owned()),
];

const POD: &[(&str, Read)] = &[
    ("spec.nodeName", |pod| text(&pod["spec"]["nodeName"]).to_owned()),
    ("spec.restartPolicy", |pod| text(&pod["spec"]["restartPolicy"]).to_owned()),
    ("spec.schedulerName", |pod| text(&pod["spec"]["schedulerName"]).to_owned()),
    ("spec.serviceAccountName", |pod| text(&pod["spec"]["serviceAccountName"]).to_owned()),
    ("spec.hostNetwork", |pod| (pod["spec"]["hostNetwork"] == true).to_string()),
    ("status.phase", |pod| text(&pod["status"]["phase"]).to_owned()),
    ("status.podIP", |pod| {
        text_or(&pod["status"]["podIPs"][0]["ip"], text(&pod["status"]["podIP"])).to_owned()
    }),
    ("status.nominatedNodeName", |pod| text(&pod["status"]["nominatedNodeName"]).to_owned()),
];

const EVENT: &[(&str, Read)] = &[
    ("involvedObject.kind", |event| involved(event, "kind")),
    ("involvedObject.namespace", |event| involved(event, "namespace")),
    ("involvedObject.name", |event| involved(event, "name")),
    ("involvedObject.uid", |event| involved(event, "uid")),
    ("involvedObject.apiVersion", |event| involved(event, "apiVersion")),
    ("involvedObject.resourceVersion", |event| involved(event, "resourceVersion")),
    ("involvedObject.fieldPath", |event| involved(event, "fieldPath")),
    ("reason", |event| text(&event["reason"]).to_owned()),
    ("reportingComponent", reporting),
    ("source", |event| text_or(&source(event)["component"], &reporting(event)).to_owned()),
    ("type", |event| text(&event["type"]).to_owned()),
];

/// events.k8s.io/v1 has other names for the same fields, and selects by its own.
const NEW_EVENT: &[(&str, Read)] = &[
    ("regarding.kind", |event| involved(event, "kind")),
    ("regarding.namespace", |event| involved(event, "namespace")),
    ("regarding.name", |event| involved(event, "name")),
    ("regarding.uid", |event| involved(event, "uid")),
    ("regarding.apiVersion", |event| involved(event, "apiVersion")),
    ("regarding.resourceVersion", |event| involved(event, "resourceVersion")),
    ("regarding.fieldPath", |event| involved(event, "fieldPath")),
    ("reason", |event| text(&event["reason"]).to_owned()),
    ("reportingController", reporting),
    ("source", |event| text_or(&source(event)["component"], &reporting(event)).to_owned()),
    ("type", |event| text(&event["type"]).to_owned()),
];

const NODE: &[(&str, Read)] =
    &[("spec.unschedulable", |node| (node["spec"]["unschedulable"] == true).to_string())];
const NAMESPACE: &[(&str, Read)] =
    &[("status.phase", |namespace| text(&namespace["status"]["phase"]).to_owned())];
const SECRET: &[(&str, Read)] = &[("type", |secret| text(&secret["type"]).to_owned())];
const REPLICAS: &[(&str, Read)] =
    &[("status.replicas", |object| object["status"]["replicas"].as_i64().unwrap_or_default().to_string())];
const JOB: &[(&str, Read)] =
    &[("status.successful", |job| job["status"]["succeeded"].as_i64().unwrap_or_default().to_string())];
const SIGNED: &[(&str, Read)] =
    &[("spec.signerName", |object| text(&object["spec"]["signerName"]).to_owned())];
const POD_CERTIFICATE: &[(&str, Read)] = &[
    ("spec.signerName", |object| text(&object["spec"]["signerName"]).to_owned()),
    ("spec.podName", |object| text(&object["spec"]["podName"]).to_owned()),
    ("spec.nodeName", |object| text(&object["spec"]["nodeName"]).to_owned()),
];
const RESOURCE_SLICE: &[(&str, Read)] = &[
    ("spec.nodeName", |slice| text(&slice["spec"]["nodeName"]).to_owned()),
    ("spec.driver", |slice| text(&slice["spec"]["driver"]).to_owned()),
];
const SERVICE: &[(&str, Read)] = &[
    ("spec.clusterIP", |service| text(&service["spec"]["clusterIP"]).to_owned()),
    ("spec.type", |service| text(&service["spec"]["type"]).to_owned()),
];

fn either<'a>(event: &'a Value, old: &str, new: &str) -> &'a Value {
    if event[old].is_null() { &event[new] } else { &event[old] }
}

fn involved(event: &Value, field: &str) -> String {
    text(&either(event, "involvedObject", "regarding")[field]).to_owned()
}

fn source(event: &Value) -> &Value {
    either(event, "source", "deprecatedSource")
}

fn reporting(event: &Value) -> String {
    text(either(event, "reportingComponent", "reportingController")).to_owned()
}

fn own(kind: &Kind) -> &'static [(&'static str, Read)] {
    match (kind.group, kind.kind) {
        ("", "Pod") => POD,
        ("", "Event") => EVENT,
        ("events.k8s.io", "Event") => NEW_EVENT,
        ("", "Node") => NODE,
        ("", "Namespace") => NAMESPACE,
        ("", "Secret") => SECRET,
        ("", "Service") => SERVICE,
        ("", "ReplicationController") | ("apps", "ReplicaSet") => REPLICAS,
        ("batch", "Job") => JOB,
        ("certificates.k8s.io", "CertificateSigningRequest" | "ClusterTrustBundle") => SIGNED,
        ("certificates.k8s.io", "PodCertificateRequest") => POD_CERTIFICATE,
        ("resource.k8s.io", "ResourceSlice") => RESOURCE_SLICE,
        _ => &[],
    }
}

/// The values of an object's selectable fields.
pub fn selectable_fields(kind: &Kind, object: &Value) -> Vec<(&'static str, String)> {
    let common = if kind.namespaced { COMMON } else { &COMMON[..1] };
    common.iter().chain(own(kind)).map(|(label, read)| (*label, read(object))).collect()
}

/// Whether a field selector on this kind may name the field.
pub fn field_label_supported(kind: &Kind, label: &str) -> bool {
    COMMON.iter().chain(own(kind)).any(|(known, _)| *known == label)
}
