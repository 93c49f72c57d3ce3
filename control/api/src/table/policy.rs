//! Rows of authorization, certificates, admission, flow control and devices.

use jiff::Timestamp;
use serde_json::Value;

use super::duration::age;
use super::format::{NONE, UNSET, condition, count, items, name, number, selector, text, text_or};
use super::workload::seconds;

pub(super) fn row(group: &str, kind: &str, object: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let spec = &object["spec"];
    Some(match (group, kind) {
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => role_binding(object, now),
        ("certificates.k8s.io", "CertificateSigningRequest") => signing_request(object, now),
        ("certificates.k8s.io", "ClusterTrustBundle") => {
            vec![name(object), text_or(&spec["signerName"], NONE).into()]
        }
        (
            "admissionregistration.k8s.io",
            "ValidatingWebhookConfiguration" | "MutatingWebhookConfiguration",
        ) => {
            vec![name(object), count(&object["webhooks"]).into(), age(object, now)]
        }
        ("admissionregistration.k8s.io", "ValidatingAdmissionPolicy") => policy(object, "validations", now),
        ("admissionregistration.k8s.io", "MutatingAdmissionPolicy") => policy(object, "mutations", now),
        (
            "admissionregistration.k8s.io",
            "ValidatingAdmissionPolicyBinding" | "MutatingAdmissionPolicyBinding",
        ) => vec![
            name(object),
            text(&spec["policyName"]).into(),
            parameter(&spec["paramRef"]).into(),
            age(object, now),
        ],
        ("flowcontrol.apiserver.k8s.io", "FlowSchema") => flow_schema(object, now),
        ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration") => priority_level(object, now),
        ("resource.k8s.io", "DeviceClass" | "ResourceClaimTemplate") => vec![name(object), age(object, now)],
        ("resource.k8s.io", "ResourceClaim") => {
            vec![name(object), claim_state(object).into(), age(object, now)]
        }
        ("resource.k8s.io", "ResourceSlice") => vec![
            name(object),
            text(&spec["nodeName"]).into(),
            text(&spec["driver"]).into(),
            text(&spec["pool"]["name"]).into(),
            age(object, now),
        ],
        _ => return None,
    })
}

fn role_binding(object: &Value, now: Timestamp) -> Vec<Value> {
    let role = &object["roleRef"];
    let subjects = |kind: &str| -> Value {
        let of_kind = items(&object["subjects"]).iter().filter(|one| one["kind"] == kind);
        let names = of_kind.map(|one| match kind {
            "ServiceAccount" => format!("{}/{}", text(&one["namespace"]), text(&one["name"])),
            _ => text(&one["name"]).to_owned(),
        });
        names.collect::<Vec<_>>().join(", ").into()
    };
    vec![
        name(object),
        format!("{}/{}", text(&role["kind"]), text(&role["name"])).into(),
        age(object, now),
        subjects("User"),
        subjects("Group"),
        subjects("ServiceAccount"),
    ]
}

fn signing_request(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let duration = spec["expirationSeconds"].as_i64().map_or_else(|| NONE.to_owned(), seconds);
    let mut state = if condition(object, "Denied").is_some() {
        "Denied"
    } else if condition(object, "Approved").is_some() {
        "Approved"
    } else {
        "Pending"
    }
    .to_owned();
    if condition(object, "Failed").is_some() {
        state.push_str(",Failed");
    }
    if !text(&object["status"]["certificate"]).is_empty() {
        state.push_str(",Issued");
    }
    vec![
        name(object),
        age(object, now),
        text_or(&spec["signerName"], NONE).into(),
        text(&spec["username"]).into(),
        duration.into(),
        state.into(),
    ]
}

fn policy(object: &Value, rules: &str, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let kind = &spec["paramKind"];
    let kind = if kind.is_object() {
        format!("{}/{}", text(&kind["apiVersion"]), text(&kind["kind"]))
    } else {
        UNSET.to_owned()
    };
    vec![name(object), count(&spec[rules]).into(), kind.into(), age(object, now)]
}

fn parameter(reference: &Value) -> String {
    match (text(&reference["namespace"]), text(&reference["name"])) {
        _ if reference.is_null() => UNSET.to_owned(),
        (_, "") => selector(&reference["selector"]),
        ("", name) => format!("*/{name}"),
        (namespace, name) => format!("{namespace}/{name}"),
    }
}

fn flow_schema(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    vec![
        name(object),
        text(&spec["priorityLevelConfiguration"]["name"]).into(),
        number(&spec["matchingPrecedence"]).into(),
        text_or(&spec["distinguisherMethod"]["type"], NONE).into(),
        age(object, now),
        condition(object, "Dangling").map_or("?", |one| text(&one["status"])).into(),
    ]
}

fn priority_level(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let limited = &spec["limited"];
    let queuing = &limited["limitResponse"]["queuing"];
    let or_none = |value: &Value| if value.is_null() { NONE.into() } else { value.clone() };
    vec![
        name(object),
        text(&spec["type"]).into(),
        or_none(&limited["nominalConcurrencyShares"]),
        or_none(&queuing["queues"]),
        or_none(&queuing["handSize"]),
        or_none(&queuing["queueLengthLimit"]),
        age(object, now),
    ]
}

fn claim_state(claim: &Value) -> String {
    let mut states = Vec::new();
    if claim["metadata"]["deletionTimestamp"].is_string() {
        states.push("deleted");
    }
    if claim["status"]["allocation"].is_null() {
        if claim["metadata"]["deletionTimestamp"].is_null() {
            states.push("pending");
        }
    } else {
        states.push("allocated");
        if !items(&claim["status"]["reservedFor"]).is_empty() {
            states.push("reserved");
        }
    }
    states.join(",")
}
