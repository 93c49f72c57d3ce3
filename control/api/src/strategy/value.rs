//! Lenient reading and writing of JSON objects: what is absent, null or of another type reads as empty.

use serde_json::{Map, Value};

/// The string in `value`, or nothing.
pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The string in `value`, or `otherwise` when it is absent or empty.
pub(crate) fn text_or<'a>(value: &'a Value, otherwise: &'a str) -> &'a str {
    match text(value) {
        "" => otherwise,
        found => found,
    }
}

/// The integer in `value`, or 0.
pub(crate) fn number(value: &Value) -> i64 {
    value.as_i64().unwrap_or_default()
}

/// The items of an array, or none.
pub(crate) fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The entries of an object, or none.
pub(crate) fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> + Clone {
    value.as_object().into_iter().flat_map(|map| map.iter().map(|(key, value)| (key.as_str(), value)))
}

/// Whether nothing is said: absent, null, or an empty string, list or object.
pub(crate) fn is_empty(value: &Value) -> bool {
    value.is_null()
        || value.as_str().is_some_and(str::is_empty)
        || value.as_array().is_some_and(Vec::is_empty)
        || value.as_object().is_some_and(Map::is_empty)
}

/// The items of the list `key` of an object, to change; none if there is no such list.
pub(super) fn each<'a>(object: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
    object.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten()
}

/// The object at a path of fields, to change; none unless it is there.
pub(super) fn at<'a>(object: &'a mut Value, path: &[&str]) -> Option<&'a mut Value> {
    let found = path.iter().try_fold(object, |value, field| value.get_mut(*field))?;
    found.is_object().then_some(found)
}

/// Sets a field that upstream holds by pointer: only when it is absent or null.
pub(super) fn default_to(object: &mut Value, key: &str, value: impl Into<Value>) {
    let value = value.into();
    if let Some(map) = object.as_object_mut()
        && !value.is_null()
        && map.get(key).is_none_or(Value::is_null)
    {
        map.insert(key.to_owned(), value);
    }
}

/// Sets a field that upstream holds by value: also when it is its type's zero.
pub(super) fn default_zero(object: &mut Value, key: &str, value: impl Into<Value>) {
    let value = value.into();
    if let Some(map) = object.as_object_mut()
        && !value.is_null()
        && map.get(key).is_none_or(is_zero)
    {
        map.insert(key.to_owned(), value);
    }
}

/// Makes sure that a field is an object.
pub(super) fn default_object<'a>(object: &'a mut Value, key: &str) -> Option<&'a mut Value> {
    default_to(object, key, Map::new());
    object.get_mut(key).filter(|value| value.is_object())
}

/// Takes a field away.
pub(super) fn remove(object: &mut Value, key: &str) -> Option<Value> {
    object.as_object_mut()?.remove(key)
}

/// Gives a field the value that it has in another object; takes it away if it has none there.
pub(super) fn copy(to: &mut Value, from: &Value, key: &str) {
    let Some(map) = to.as_object_mut() else { return };
    match from.get(key) {
        Some(value) => map.insert(key.to_owned(), value.clone()),
        None => map.remove(key),
    };
}

fn is_zero(value: &Value) -> bool {
    value.is_null() || value == false || value == "" || value.as_i64() == Some(0)
}

/// Fields that upstream holds by pointer, so that their zero differs from their absence.
const POINTERS: &[&str] = &[
    "activeDeadlineSeconds",
    "allowPrivilegeEscalation",
    "automountServiceAccountToken",
    "backoffLimit",
    "completions",
    "defaultMode",
    "enableServiceLinks",
    "fsGroup",
    "hostUsers",
    "immutable",
    "maxSurge",
    "maxUnavailable",
    "minAvailable",
    "minReplicas",
    "mode",
    "optional",
    "parallelism",
    "priority",
    "privileged",
    "readOnlyRootFilesystem",
    "replicas",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "storageClassName",
    "suspend",
    "terminationGracePeriodSeconds",
    "tolerationSeconds",
    "ttlSecondsAfterFinished",
    "value",
];

/// Whether two values mean the same: as upstream's semantic comparison, an absent field equals its type's zero and an
/// empty list. An empty object is not absent: an empty selector selects everything.
pub(crate) fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => same_maps(one, other),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other))
        }
        _ => one == other || (is_absent(one) && is_absent(other)),
    }
}

fn is_absent(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}

fn same_maps(one: &Map<String, Value>, other: &Map<String, Value>) -> bool {
    let holds = |key: &String, value: &Value, there: &Map<String, Value>| match there.get(key) {
        Some(found) => same(value, found) || (missing(key, value) && missing(key, found)),
        None => missing(key, value),
    };
    one.iter().all(|(key, value)| holds(key, value, other))
        && other.iter().all(|(key, value)| holds(key, value, one))
}

/// Whether a field with this value may as well not be there.
fn missing(key: &str, value: &Value) -> bool {
    is_absent(value) || (is_zero(value) && !POINTERS.contains(&key))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn absent_equals_zero_but_not_for_pointers() {
        let cases = [
            (json!({}), json!({"hostNetwork": false}), true),
            (json!({"a": null}), json!({"a": []}), true),
            (json!({}), json!({"runAsUser": 0}), false),
            (json!({}), json!({"selector": {}}), false),
            (json!({"a": [1, 2]}), json!({"a": [2, 1]}), false),
            (json!({"a": {"b": ""}}), json!({"a": {}}), true),
        ];
        for (one, other, expected) in cases {
            assert_eq!(same(&one, &other), expected, "{one} {other}");
            assert_eq!(same(&other, &one), expected, "{other} {one}");
        }
    }
}
