//! Defaults of the kinds that own pods.

use serde_json::{Value, json};

use super::super::pod;
use super::super::storage;
use super::super::value::{at, default_object, default_to, default_zero, each, is_empty, text};

const TEMPLATE: [&str; 2] = ["spec", "template"];

/// Applies the defaults of `kind`; does nothing for a kind of another family.
pub(in super::super) fn apply(group: &str, kind: &str, object: &mut Value) {
    match (group, kind) {
        ("", "PodTemplate") => pod::default_template(object, &["template"]),
        ("", "ReplicationController") => replication_controller(object),
        ("apps", "ReplicaSet") => replica_set(object),
        ("apps", "Deployment") => deployment(object),
        ("apps", "StatefulSet") => stateful_set(object),
        ("apps", "DaemonSet") => daemon_set(object),
        ("batch", "Job") => job(object),
        ("batch", "CronJob") => cron_job(object),
        ("autoscaling", "HorizontalPodAutoscaler") => autoscaler(object),
        ("policy", "PodDisruptionBudget") => {
            default_object(object, "status");
        }
        _ => {}
    }
}

fn replication_controller(object: &mut Value) {
    if at(object, &TEMPLATE).is_some() {
        pod::default_template(object, &TEMPLATE);
    }
    labels_from_template(object);
    let labels = object["spec"]["template"]["metadata"]["labels"].clone();
    if let Some(spec) = at(object, &["spec"]) {
        default_to(spec, "replicas", 1);
        if is_empty(&spec["selector"]) && labels.is_object() {
            spec["selector"] = labels;
        }
    }
    default_object(object, "status");
}

/// Objects without labels of their own get those of their template.
fn labels_from_template(object: &mut Value) {
    let labels = object["spec"]["template"]["metadata"]["labels"].clone();
    if labels.is_object()
        && is_empty(&object["metadata"]["labels"])
        && let Some(metadata) = default_object(object, "metadata")
    {
        metadata["labels"] = labels;
    }
}

fn replica_set(object: &mut Value) {
    pod::default_template(object, &TEMPLATE);
    if let Some(spec) = at(object, &["spec"]) {
        default_to(spec, "replicas", 1);
    }
    default_object(object, "status");
}

fn deployment(object: &mut Value) {
    pod::default_template(object, &TEMPLATE);
    let Some(spec) = at(object, &["spec"]) else { return };
    default_to(spec, "replicas", 1);
    default_to(spec, "revisionHistoryLimit", 10);
    default_to(spec, "progressDeadlineSeconds", 600);
    if let Some(strategy) = default_object(spec, "strategy") {
        default_zero(strategy, "type", "RollingUpdate");
        if strategy["type"] == "RollingUpdate"
            && let Some(rolling) = default_object(strategy, "rollingUpdate")
        {
            default_to(rolling, "maxUnavailable", "25%");
            default_to(rolling, "maxSurge", "25%");
        }
    }
    default_object(object, "status");
}

fn stateful_set(object: &mut Value) {
    pod::default_template(object, &TEMPLATE);
    let Some(spec) = at(object, &["spec"]) else { return };
    default_to(spec, "replicas", 1);
    default_to(spec, "revisionHistoryLimit", 10);
    default_zero(spec, "podManagementPolicy", "OrderedReady");
    if let Some(strategy) = default_object(spec, "updateStrategy") {
        // Who names the strategy, but no partition, gets none.
        if text(&strategy["type"]).is_empty() {
            default_object(strategy, "rollingUpdate");
        }
        default_zero(strategy, "type", "RollingUpdate");
        if let Some(rolling) = at(strategy, &["rollingUpdate"]) {
            default_to(rolling, "partition", 0);
            default_to(rolling, "maxUnavailable", 1);
        }
    }
    if let Some(retention) = default_object(spec, "persistentVolumeClaimRetentionPolicy") {
        default_zero(retention, "whenDeleted", "Retain");
        default_zero(retention, "whenScaled", "Retain");
    }
    for claim in each(spec, "volumeClaimTemplates") {
        default_zero(claim, "apiVersion", "v1");
        default_zero(claim, "kind", "PersistentVolumeClaim");
        storage::default_claim(claim);
    }
    if let Some(status) = default_object(object, "status") {
        default_to(status, "replicas", 0);
    }
}

fn daemon_set(object: &mut Value) {
    pod::default_template(object, &TEMPLATE);
    let Some(spec) = at(object, &["spec"]) else { return };
    default_to(spec, "revisionHistoryLimit", 10);
    if let Some(strategy) = default_object(spec, "updateStrategy") {
        default_zero(strategy, "type", "RollingUpdate");
        if strategy["type"] == "RollingUpdate"
            && let Some(rolling) = default_object(strategy, "rollingUpdate")
        {
            default_to(rolling, "maxUnavailable", 1);
            default_to(rolling, "maxSurge", 0);
        }
    }
    if let Some(status) = default_object(object, "status") {
        for field in ["currentNumberScheduled", "numberMisscheduled", "desiredNumberScheduled", "numberReady"]
        {
            default_to(status, field, 0);
        }
    }
}

fn job(object: &mut Value) {
    pod::default_template(object, &TEMPLATE);
    labels_from_template(object);
    let Some(spec) = at(object, &["spec"]) else { return };
    if spec["completions"].is_null() && spec["parallelism"].is_null() {
        default_to(spec, "completions", 1);
    }
    default_to(spec, "parallelism", 1);
    let limit = if spec["backoffLimitPerIndex"].is_null() { 6 } else { i32::MAX };
    default_to(spec, "backoffLimit", limit);
    default_to(spec, "completionMode", "NonIndexed");
    default_to(spec, "suspend", false);
    default_to(spec, "manualSelector", false);
    let replacement = if spec["podFailurePolicy"].is_null() { "TerminatingOrFailed" } else { "Failed" };
    default_to(spec, "podReplacementPolicy", replacement);
    pod_failure_policy(spec);
    default_object(object, "status");
}

fn pod_failure_policy(job_spec: &mut Value) {
    let Some(policy) = at(job_spec, &["podFailurePolicy"]) else { return };
    for rule in each(policy, "rules") {
        for condition in each(rule, "onPodConditions") {
            default_zero(condition, "status", "True");
        }
    }
}

fn cron_job(object: &mut Value) {
    pod::default_template(object, &["spec", "jobTemplate", "spec", "template"]);
    let Some(spec) = at(object, &["spec"]) else { return };
    default_zero(spec, "concurrencyPolicy", "Allow");
    default_to(spec, "suspend", false);
    default_to(spec, "successfulJobsHistoryLimit", 3);
    default_to(spec, "failedJobsHistoryLimit", 1);
    if let Some(job) = at(spec, &["jobTemplate", "spec"]) {
        pod_failure_policy(job);
    }
    default_object(object, "status");
}

fn autoscaler(object: &mut Value) {
    let v1 = text(&object["apiVersion"]) == "autoscaling/v1";
    let Some(spec) = default_object(object, "spec") else { return };
    default_to(spec, "minReplicas", 1);
    if !v1 && is_empty(&spec["metrics"]) {
        let target = json!({"type": "Utilization", "averageUtilization": 80});
        spec["metrics"] = json!([{"type": "Resource", "resource": {"name": "cpu", "target": target}}]);
    }
    if let Some(behavior) = at(spec, &["behavior"]) {
        let up = json!([
            {"type": "Pods", "value": 4, "periodSeconds": 15},
            {"type": "Percent", "value": 100, "periodSeconds": 15},
        ]);
        let down = json!([{"type": "Percent", "value": 100, "periodSeconds": 15}]);
        for (direction, policies) in [("scaleUp", up), ("scaleDown", down)] {
            let Some(rules) = default_object(behavior, direction) else { continue };
            default_to(rules, "selectPolicy", "Max");
            if direction == "scaleUp" {
                default_to(rules, "stabilizationWindowSeconds", 0);
            }
            if is_empty(&rules["policies"]) {
                rules["policies"] = policies;
            }
        }
    }
    default_object(object, "status");
}
