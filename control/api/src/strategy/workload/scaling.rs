//! Validation of HorizontalPodAutoscalers and PodDisruptionBudgets.

use serde_json::Value;

use super::super::checks::{Errors, label_selector, one_of, problems, required};
use super::super::value::{items, number, text};
use super::apps::count_or_percent;
use crate::field::{FieldError, FieldPath};
use crate::names;

const SOURCES: [(&str, &str); 5] = [
    ("ContainerResource", "containerResource"),
    ("External", "external"),
    ("Object", "object"),
    ("Pods", "pods"),
    ("Resource", "resource"),
];

pub(super) fn autoscaler(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    if let Some(least) = spec["minReplicas"].as_i64().filter(|least| *least < 1) {
        let detail = "must be greater than or equal to 1";
        errors.push(FieldError::invalid(&path.child("minReplicas"), least, detail));
    }
    let most = number(&spec["maxReplicas"]);
    if most < 1 {
        errors.push(FieldError::invalid(&path.child("maxReplicas"), most, "must be greater than 0"));
    }
    if spec["minReplicas"].as_i64().is_some_and(|least| most < least) {
        let detail = "must be greater than or equal to `minReplicas`";
        errors.push(FieldError::invalid(&path.child("maxReplicas"), most, detail));
    }
    let (target, at) = (&spec["scaleTargetRef"], path.child("scaleTargetRef"));
    for field in ["kind", "name"] {
        if required(errors, &at.child(field), &target[field]) {
            problems(
                errors,
                &at.child(field),
                text(&target[field]),
                names::path_segment(text(&target[field])),
            );
        }
    }
    for (index, metric) in items(&spec["metrics"]).iter().enumerate() {
        let path = path.child("metrics").index(index);
        one_of(errors, &path.child("type"), &metric["type"], &SOURCES.map(|(type_, _)| type_));
        let source = SOURCES.iter().find(|(type_, _)| metric["type"] == *type_);
        if let Some((type_, field)) = source
            && metric[*field].is_null()
        {
            let detail = format!(
                "must populate information for the given metric source; metric source type {type_:?} populates only {field:?}"
            );
            errors.push(FieldError::required(&path.child(field), detail));
        }
    }
}

pub(super) fn disruption_budget(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    if !spec["minAvailable"].is_null() && !spec["maxUnavailable"].is_null() {
        let detail = "minAvailable and maxUnavailable cannot be both set";
        errors.push(FieldError::invalid(&path, spec.clone(), detail));
    }
    for field in ["minAvailable", "maxUnavailable"] {
        count_or_percent(errors, &path.child(field), &spec[field]);
    }
    label_selector(errors, &path.child("selector"), &spec["selector"]);
    if !spec["unhealthyPodEvictionPolicy"].is_null() {
        let policies = ["AlwaysAllow", "IfHealthyBudget"];
        one_of(
            errors,
            &path.child("unhealthyPodEvictionPolicy"),
            &spec["unhealthyPodEvictionPolicy"],
            &policies,
        );
    }
}
