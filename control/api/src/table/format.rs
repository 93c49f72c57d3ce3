//! Small pieces that several kinds' cells share.

use serde_json::Value;

pub(super) use crate::strategy::value::{items, number, text, text_or};

pub(super) const NONE: &str = "<none>";
pub(super) const UNSET: &str = "<unset>";
pub(super) const UNKNOWN: &str = "<unknown>";

/// How many entries an array or object has.
pub(super) fn count(value: &Value) -> i64 {
    let entries = value.as_array().map(Vec::len).or_else(|| value.as_object().map(serde_json::Map::len));
    i64::try_from(entries.unwrap_or_default()).unwrap_or(i64::MAX)
}

/// An int-or-string, quantity or boolean as text.
pub(super) fn scalar(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// The name of the object.
pub(super) fn name(object: &Value) -> Value {
    object["metadata"]["name"].clone()
}

/// The strings of an array, joined.
pub(super) fn joined(value: &Value, separator: &str) -> String {
    items(value).iter().map(text).collect::<Vec<_>>().join(separator)
}

/// A label map as `k=v,…` in key order; `<none>` when empty.
pub(super) fn labels(value: &Value) -> String {
    let Some(map) = value.as_object().filter(|map| !map.is_empty()) else {
        return NONE.to_owned();
    };
    let mut pairs: Vec<_> = map.iter().map(|(key, value)| format!("{key}={}", text(value))).collect();
    pairs.sort();
    pairs.join(",")
}

/// A label selector in the syntax of `-l`, sorted by key; `<none>` when it selects everything or nothing.
pub(super) fn selector(value: &Value) -> String {
    match selector_text(value) {
        text if text.is_empty() => NONE.to_owned(),
        text => text,
    }
}

/// A label selector in the syntax of `-l`, sorted by key.
pub(crate) fn selector_text(value: &Value) -> String {
    let equalities = value["matchLabels"].as_object().into_iter().flatten();
    let mut terms: Vec<(&str, String)> =
        equalities.map(|(key, value)| (key.as_str(), format!("{key}={}", text(value)))).collect();
    for expression in items(&value["matchExpressions"]) {
        let key = text(&expression["key"]);
        let mut values: Vec<_> = items(&expression["values"]).iter().map(text).collect();
        values.sort_unstable();
        let values = values.join(",");
        terms.push((
            key,
            match text(&expression["operator"]) {
                "In" => format!("{key} in ({values})"),
                "NotIn" => format!("{key} notin ({values})"),
                "DoesNotExist" => format!("!{key}"),
                _ => key.to_owned(),
            },
        ));
    }
    terms.sort_by_key(|(key, _)| *key);
    terms.into_iter().map(|(_, term)| term).collect::<Vec<_>>().join(",")
}

/// The names and the images of a pod template's containers.
pub(super) fn containers(template: &Value) -> [Value; 2] {
    let list = items(&template["spec"]["containers"]);
    let join = |field: &str| list.iter().map(|one| text(&one[field])).collect::<Vec<_>>().join(",").into();
    [join("name"), join("image")]
}

/// The status of a condition (`True`, `False`, `Unknown`), if the object has it.
pub(super) fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a Value> {
    items(&object["status"]["conditions"]).iter().find(|one| one["type"] == type_)
}

/// Whether the object has the condition with status True.
pub(super) fn is_true(object: &Value, type_: &str) -> bool {
    condition(object, type_).is_some_and(|one| one["status"] == "True")
}

/// The first three entries, joined, and how many more there are.
pub(super) fn first_three(list: &[String]) -> String {
    let shown = list.len().min(3);
    let text = list[..shown].join(",");
    if list.len() > shown { format!("{text} + {} more...", list.len() - shown) } else { text }
}
