//! Rows of the kinds that describe the cluster itself.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::duration::{age, since};
use super::format::{NONE, UNKNOWN, condition, is_true, items, name, number, scalar, text, text_or};

pub(super) fn row(group: &str, kind: &str, object: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let spec = &object["spec"];
    let spec_text = |field: &str| Value::from(text(&spec[field]));
    Some(match (group, kind) {
        ("", "Node") => node(object, now),
        ("" | "events.k8s.io", "Event") => event(object, now),
        ("", "Namespace") => vec![name(object), text(&object["status"]["phase"]).into(), age(object, now)],
        ("", "ComponentStatus") => component_status(object),
        ("", "ResourceQuota") => resource_quota(object, now),
        ("scheduling.k8s.io", "PriorityClass") => vec![
            name(object),
            number(&object["value"]).into(),
            (object["globalDefault"] == true).into(),
            age(object, now),
            text(&object["preemptionPolicy"]).into(),
        ],
        ("node.k8s.io", "RuntimeClass") => {
            vec![name(object), text(&object["handler"]).into(), age(object, now)]
        }
        ("coordination.k8s.io", "Lease") => vec![name(object), spec_text("holderIdentity"), age(object, now)],
        ("coordination.k8s.io", "LeaseCandidate") => vec![
            name(object),
            spec_text("leaseName"),
            spec_text("binaryVersion"),
            spec_text("emulationVersion"),
            age(object, now),
        ],
        ("apiregistration.k8s.io", "APIService") => api_service(object, now),
        _ => return None,
    })
}

fn node(object: &Value, now: Timestamp) -> Vec<Value> {
    let info = &object["status"]["nodeInfo"];
    let ready = match condition(object, "Ready") {
        Some(_) if is_true(object, "Ready") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    };
    let status = if object["spec"]["unschedulable"] == true {
        format!("{ready},SchedulingDisabled")
    } else {
        ready.to_owned()
    };
    let address = |type_: &str| -> Value {
        let found = items(&object["status"]["addresses"]).iter().find(|one| one["type"] == type_);
        found.map_or(NONE, |one| text(&one["address"])).into()
    };
    vec![
        name(object),
        status.into(),
        roles(object).into(),
        age(object, now),
        text(&info["kubeletVersion"]).into(),
        address("InternalIP"),
        address("ExternalIP"),
        text_or(&info["osImage"], UNKNOWN).into(),
        text_or(&info["kernelVersion"], UNKNOWN).into(),
        text_or(&info["containerRuntimeVersion"], UNKNOWN).into(),
    ]
}

/// Roles stand in labels: `node-role.kubernetes.io/<role>` or `kubernetes.io/role: <role>`.
fn roles(node: &Value) -> String {
    let labels = node["metadata"]["labels"].as_object().into_iter().flatten();
    let role = |(key, value): (&'_ String, &'_ Value)| {
        let role = key.strip_prefix("node-role.kubernetes.io/").unwrap_or(match key.as_str() {
            "kubernetes.io/role" => text(value),
            _ => "",
        });
        (!role.is_empty()).then(|| role.to_owned())
    };
    let roles: BTreeSet<String> = labels.filter_map(role).collect();
    if roles.is_empty() { NONE.to_owned() } else { roles.into_iter().collect::<Vec<_>>().join(",") }
}

/// Both Event kinds are one object: events.k8s.io/v1 names the older fields `deprecated…`.
fn event(object: &Value, now: Timestamp) -> Vec<Value> {
    let either = |old: &str, new: &str| if object[old].is_null() { &object[new] } else { &object[old] };
    let first = match either("firstTimestamp", "deprecatedFirstTimestamp") {
        Value::String(first) => since(&first.as_str().into(), now),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            since(&object["eventTime"], now)
        }
    };
    let last = either("lastTimestamp", "deprecatedLastTimestamp");
    let mut last = if last.is_string() { since(last, now) } else { first.clone() };
    let mut count = number(either("count", "deprecatedCount"));
    let series = &object["series"];
    if series.is_object() {
        last = since(&series["lastObservedTime"], now);
        count = number(&series["count"]);
    } else if count == 0 {
        count = 1;
    }
    let involved = either("involvedObject", "regarding");
    let kind = text(&involved["kind"]).to_lowercase();
    let target = match text(&involved["name"]) {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    let source = either("source", "deprecatedSource");
    let source = match text(&source["component"]) {
        "" => source_text(
            text(either("reportingComponent", "reportingController")),
            text(&object["reportingInstance"]),
        ),
        component => source_text(component, text(&source["host"])),
    };
    vec![
        last.into(),
        text(&object["type"]).into(),
        text(&object["reason"]).into(),
        target.into(),
        text(&involved["fieldPath"]).into(),
        source.into(),
        text(either("message", "note")).trim().into(),
        first.into(),
        count.into(),
        name(object),
    ]
}

fn source_text(component: &str, instance: &str) -> String {
    if instance.is_empty() { component.to_owned() } else { format!("{component}, {instance}") }
}

fn component_status(object: &Value) -> Vec<Value> {
    let healthy = items(&object["conditions"]).iter().find(|one| one["type"] == "Healthy");
    let (status, message, error) = match healthy {
        Some(one) => {
            let status = if one["status"] == "True" { "Healthy" } else { "Unhealthy" };
            (status, text(&one["message"]), text(&one["error"]))
        }
        None => ("Unknown", "", ""),
    };
    vec![name(object), status.into(), message.into(), error.into()]
}

fn resource_quota(object: &Value, now: Timestamp) -> Vec<Value> {
    let status = &object["status"];
    let mut hard: Vec<_> = status["hard"].as_object().into_iter().flatten().collect();
    hard.sort_by_key(|(resource, _)| *resource);
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    for (resource, hard) in hard {
        let used = &status["used"][resource];
        let used = if used.is_null() { "0".to_owned() } else { scalar(used) };
        let entry = format!("{resource}: {used}/{}", scalar(hard));
        if resource.starts_with("limits.") { limits.push(entry) } else { requests.push(entry) }
    }
    vec![name(object), requests.join(", ").into(), limits.join(", ").into(), age(object, now)]
}

fn api_service(object: &Value, now: Timestamp) -> Vec<Value> {
    let service = &object["spec"]["service"];
    let service = if service.is_object() {
        format!("{}/{}", text(&service["namespace"]), text(&service["name"]))
    } else {
        "Local".to_owned()
    };
    let available = match condition(object, "Available") {
        Some(one) if one["status"] != "True" && !text(&one["reason"]).is_empty() => {
            format!("{} ({})", text(&one["status"]), text(&one["reason"]))
        }
        Some(one) => text(&one["status"]).to_owned(),
        None => "Unknown".to_owned(),
    };
    vec![name(object), service.into(), available.into(), age(object, now)]
}
