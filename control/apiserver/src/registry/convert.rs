//! Owns the conversion between served versions of one kind. Most differ in nothing but `apiVersion`; Events of the
//! two groups and the versions of the HorizontalPodAutoscaler name some fields otherwise.

use bytes::Bytes;
use serde_json::{Map, Value, json};
use weft_control_api::kinds::Kind;

/// Converts an object in place.
pub(super) fn object(object: &mut Value, from: &Kind, to: &Kind) {
    if std::ptr::eq(from, to) {
        return;
    }
    match (from.kind, from.group, to.group, to.version) {
        ("Event", "", "events.k8s.io", _) => rename_event(object, false),
        ("Event", "events.k8s.io", "", _) => rename_event(object, true),
        ("HorizontalPodAutoscaler", _, _, "v1") => scaler_to_v1(object),
        ("HorizontalPodAutoscaler", _, _, "v2") => scaler_to_v2(object),
        _ => {}
    }
    object["apiVersion"] = json!(to.api_version());
    object["kind"] = json!(to.kind);
}

/// Converts JSON; without a copy if the versions are one.
pub(super) fn bytes(json: Bytes, from: &Kind, to: &Kind) -> Bytes {
    if std::ptr::eq(from, to) {
        return json;
    }
    let Ok(mut value) = serde_json::from_slice::<Value>(&json) else { return json };
    object(&mut value, from, to);
    Bytes::from(value.to_string())
}

/// Field names of core Events and of `events.k8s.io` ones.
const EVENT_FIELDS: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

fn rename_event(object: &mut Value, to_core: bool) {
    let Some(fields) = object.as_object_mut() else { return };
    for (core, other) in EVENT_FIELDS {
        let (from, to) = if to_core { (other, core) } else { (core, other) };
        if let Some(value) = fields.remove(from) {
            fields.insert(to.to_owned(), value);
        }
    }
}

fn take(map: &mut Value, key: &str) -> Option<Value> {
    map.as_object_mut().and_then(|map| map.remove(key))
}

fn is_cpu_utilization(metric: &Value) -> bool {
    metric["type"] == "Resource" && metric["resource"]["name"] == "cpu"
}

/// What version 1 can't say is kept in the annotations that upstream uses for it.
fn scaler_to_v1(object: &mut Value) {
    const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
    const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
    let metrics = take(&mut object["spec"], "metrics");
    let mut rest = Vec::new();
    for metric in metrics.as_ref().and_then(Value::as_array).into_iter().flatten() {
        let target = &metric["resource"]["target"]["averageUtilization"];
        if is_cpu_utilization(metric) && target.is_i64() {
            object["spec"]["targetCPUUtilizationPercentage"] = target.clone();
        } else {
            rest.push(metric.clone());
        }
    }
    if !rest.is_empty() {
        object["metadata"]["annotations"][METRICS] = json!(Value::Array(rest).to_string());
    }
    let current = take(&mut object["status"], "currentMetrics");
    for metric in current.as_ref().and_then(Value::as_array).into_iter().flatten() {
        let value = &metric["resource"]["current"]["averageUtilization"];
        if is_cpu_utilization(metric) && value.is_i64() {
            object["status"]["currentCPUUtilizationPercentage"] = value.clone();
        }
    }
    if let Some(conditions) = take(&mut object["status"], "conditions") {
        object["metadata"]["annotations"][CONDITIONS] = json!(conditions.to_string());
    }
}

fn scaler_to_v2(object: &mut Value) {
    const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
    let mut metrics: Vec<Value> = Vec::new();
    if let Some(text) = take(&mut object["metadata"]["annotations"], METRICS)
        && let Some(Ok(Value::Array(kept))) = text.as_str().map(serde_json::from_str)
    {
        metrics = kept;
    }
    if let Some(percent) = take(&mut object["spec"], "targetCPUUtilizationPercentage") {
        metrics.push(json!({"type": "Resource", "resource": {"name": "cpu",
            "target": {"type": "Utilization", "averageUtilization": percent}}}));
    }
    if !metrics.is_empty() {
        object["spec"]["metrics"] = Value::Array(metrics);
    }
    if let Some(percent) = take(&mut object["status"], "currentCPUUtilizationPercentage") {
        object["status"]["currentMetrics"] = json!([{"type": "Resource", "resource": {"name": "cpu",
            "current": {"averageUtilization": percent}}}]);
    }
    drop_null(object, "status");
    if object["metadata"]["annotations"].is_null() {
        take(&mut object["metadata"], "annotations");
    }
}

fn drop_null(object: &mut Value, key: &str) {
    if object[key].is_null()
        && let Some(map) = object.as_object_mut().map(|map: &mut Map<String, Value>| map)
    {
        map.remove(key);
    }
}
