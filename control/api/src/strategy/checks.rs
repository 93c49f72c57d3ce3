//! Checks that many kinds share. Each adds what it finds to a list and goes on.

use serde_json::Value;

use super::value::{entries, is_empty, items, same, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

/// The mistakes found so far.
pub(super) type Errors = Vec<FieldError>;

/// Upstream's words for a field that may not change.
pub(super) const IMMUTABLE: &str = "field is immutable";
/// Upstream's words for a number below zero.
pub(super) const NOT_NEGATIVE: &str = "must be greater than or equal to 0";

/// One Invalid error for each problem of a value.
pub(super) fn problems(errors: &mut Errors, path: &FieldPath, value: &str, problems: Vec<String>) {
    errors.extend(problems.into_iter().map(|problem| FieldError::invalid(path, value, problem)));
}

/// A string that must be there.
pub(super) fn required(errors: &mut Errors, path: &FieldPath, value: &Value) -> bool {
    let there = !is_empty(value);
    if !there {
        errors.push(FieldError::required(path, ""));
    }
    there
}

/// A string that must be there and obey a rule for names.
pub(super) fn required_name(
    errors: &mut Errors,
    path: &FieldPath,
    value: &Value,
    rule: fn(&str) -> Vec<String>,
) {
    if required(errors, path, value) {
        problems(errors, path, text(value), rule(text(value)));
    }
}

/// A string that, if it is there, must obey a rule for names.
pub(super) fn optional_name(
    errors: &mut Errors,
    path: &FieldPath,
    value: &Value,
    rule: fn(&str) -> Vec<String>,
) {
    if !is_empty(value) {
        problems(errors, path, text(value), rule(text(value)));
    }
}

/// A string that must be one of a list, which is sorted.
pub(super) fn one_of(errors: &mut Errors, path: &FieldPath, value: &Value, known: &[&str]) {
    if required(errors, path, value) {
        optional_one_of(errors, path, value, known);
    }
}

/// A string that, if it is there, must be one of a list, which is sorted.
pub(super) fn optional_one_of(errors: &mut Errors, path: &FieldPath, value: &Value, known: &[&str]) {
    if !is_empty(value) && !known.contains(&text(value)) {
        errors.push(FieldError::not_supported(path, value.clone(), known));
    }
}

/// A number that, if it is there, may not be negative.
pub(super) fn not_negative(errors: &mut Errors, path: &FieldPath, value: &Value) {
    if let Some(number) = value.as_i64().filter(|number| *number < 0) {
        errors.push(FieldError::invalid(path, number, NOT_NEGATIVE));
    }
}

/// A number that, if it is there, lies between two others.
pub(super) fn in_range(errors: &mut Errors, path: &FieldPath, value: &Value, low: i64, high: i64) {
    if let Some(number) = value.as_i64().filter(|number| !(low..=high).contains(number)) {
        errors.push(FieldError::invalid(path, number, names::range_error(low, high)));
    }
}

/// A field that no update may change.
pub(super) fn immutable(errors: &mut Errors, path: &FieldPath, new: &Value, old: &Value) {
    if !same(new, old) {
        errors.push(FieldError::invalid(path, new.clone(), IMMUTABLE));
    }
}

/// A map of labels.
pub(super) fn labels(errors: &mut Errors, path: &FieldPath, labels: &Value) {
    for (key, value) in entries(labels) {
        problems(errors, path, key, names::qualified_name(key));
        problems(errors, path, text(value), names::label_value(text(value)));
    }
}

/// A `metav1.LabelSelector`.
pub(super) fn label_selector(errors: &mut Errors, path: &FieldPath, selector: &Value) {
    labels(errors, &path.child("matchLabels"), &selector["matchLabels"]);
    for (index, expression) in items(&selector["matchExpressions"]).iter().enumerate() {
        let path = path.child("matchExpressions").index(index);
        match text(&expression["operator"]) {
            "In" | "NotIn" if items(&expression["values"]).is_empty() => errors.push(FieldError::required(
                &path.child("values"),
                "must be specified when `operator` is 'In' or 'NotIn'",
            )),
            "Exists" | "DoesNotExist" if !items(&expression["values"]).is_empty() => {
                errors.push(FieldError::forbidden(
                    &path.child("values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                ))
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            operator => errors.push(FieldError::invalid(
                &path.child("operator"),
                operator,
                "not a valid selector operator",
            )),
        }
        let key = text(&expression["key"]);
        problems(errors, &path.child("key"), key, names::qualified_name(key));
        for (index, value) in items(&expression["values"]).iter().enumerate() {
            let path = path.child("values").index(index);
            problems(errors, &path, text(value), names::label_value(text(value)));
        }
    }
}

/// Whether a selector says anything.
pub(super) fn selects_everything(selector: &Value) -> bool {
    is_empty(&selector["matchLabels"]) && is_empty(&selector["matchExpressions"])
}

/// A port number or name, as probes and Services refer to it.
pub(super) fn port_reference(errors: &mut Errors, path: &FieldPath, port: &Value) {
    match port.as_str() {
        Some(name) => problems(errors, path, name, names::port_name(name)),
        None => port_number(errors, path, port),
    }
}

/// A port number.
pub(super) fn port_number(errors: &mut Errors, path: &FieldPath, port: &Value) {
    let number = port.as_i64().unwrap_or_default();
    errors.extend(
        names::port_number(number).into_iter().map(|problem| FieldError::invalid(path, number, problem)),
    );
}
