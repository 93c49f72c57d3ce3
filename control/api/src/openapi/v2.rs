//! OpenAPI v2: one document of everything, made of the v3 documents when asked for and not kept.

use serde_json::{Map, Value, json};

use crate::kinds::Kind;

const V3_REFERENCE: &str = "#/components/schemas/";
const V2_REFERENCE: &str = "#/definitions/";
const GVK: &str = "x-kubernetes-group-version-kind";
const METHODS: [&str; 5] = ["get", "put", "post", "delete", "patch"];

/// `/openapi/v2`: every served kind.
pub fn document<'k>(kinds: impl Iterator<Item = &'k Kind> + Clone) -> Value {
    // What reads descriptions asks for v3, and here they would be five sixths of the document.
    let descriptions = super::Descriptions::default();
    let (mut paths, mut definitions) = (Map::new(), Map::new());
    let mut done: Vec<(&str, &str)> = Vec::new();
    for kind in kinds.clone() {
        let group_version = (kind.group, kind.version);
        if done.contains(&group_version) {
            continue;
        }
        done.push(group_version);
        let Some(mut v3) = super::described(kinds.clone(), kind.group, kind.version, &descriptions) else {
            continue;
        };
        for (path, item) in take(&mut v3["paths"]) {
            paths.insert(path, path_item(item));
        }
        for (name, definition) in take(&mut v3["components"]["schemas"]) {
            add_definition(&mut definitions, name, schema(definition));
        }
    }
    json!({
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": "v1.36.2"},
        "paths": paths,
        "definitions": definitions,
        "securityDefinitions": {"BearerToken": {"type": "apiKey", "name": "authorization", "in": "header"}},
        "security": [{"BearerToken": []}],
    })
}

fn take(value: &mut Value) -> Map<String, Value> {
    match value.take() {
        Value::Object(fields) => fields,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => Map::new(),
    }
}

/// A type that belongs to every group names itself differently in each group's document: here it has all the names.
fn add_definition(all: &mut Map<String, Value>, name: String, definition: Value) {
    let Some(present) = all.get_mut(&name) else {
        all.insert(name, definition);
        return;
    };
    let Some(names) = present.get_mut(GVK).and_then(Value::as_array_mut) else { return };
    for more in definition[GVK].as_array().into_iter().flatten() {
        if !names.contains(more) {
            names.push(more.clone());
        }
    }
}

fn path_item(mut item: Value) -> Value {
    for method in METHODS {
        if let Some(found) = item.get_mut(method) {
            *found = operation(found.take());
        }
    }
    if let Some(parameters) = item.get_mut("parameters").and_then(Value::as_array_mut) {
        parameters.iter_mut().for_each(parameter);
    }
    item
}

/// The schema and the media types of a v3 `content`.
fn content(content: Value) -> (Vec<String>, Value) {
    let Value::Object(types) = content else { return (Vec::new(), Value::Null) };
    let names = types.keys().cloned().collect();
    let first = types.into_values().next().map_or(Value::Null, |mut one| one["schema"].take());
    (names, schema(first))
}

fn operation(mut v3: Value) -> Value {
    let (produces, answer) = content(v3["responses"]["200"]["content"].take());
    let mut parameters = match v3["parameters"].take() {
        Value::Array(parameters) => parameters,
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => Vec::new(),
    };
    parameters.iter_mut().for_each(parameter);
    let mut v2 = json!({
        "produces": produces,
        "schemes": ["https"],
        "responses": {"200": {"description": "OK", "schema": answer}, "401": {"description": "Unauthorized"}},
        "x-kubernetes-action": v3["x-kubernetes-action"].take(),
        GVK: v3[GVK].take(),
    });
    if let Some(body) = v3.get_mut("requestBody") {
        let required = body["required"].take();
        let (consumes, body) = content(body["content"].take());
        v2["consumes"] = json!(consumes);
        let mut described = json!({"name": "body", "in": "body", "schema": body});
        if required == true {
            described["required"] = required;
        }
        parameters.insert(0, described);
    }
    if !parameters.is_empty() {
        v2["parameters"] = parameters.into();
    }
    v2
}

/// In v2 a parameter has its type beside its name.
fn parameter(parameter: &mut Value) {
    for (key, value) in take(&mut parameter["schema"]) {
        parameter[key] = value;
    }
    if let Some(fields) = parameter.as_object_mut() {
        fields.remove("schema");
    }
}

fn schema(value: Value) -> Value {
    let Value::Object(mut fields) = value else { return value };
    // v2 has neither `oneOf` nor attributes beside a reference: the types that may be two things are strings there.
    if fields.remove("oneOf").is_some() {
        fields.insert("type".to_owned(), "string".into());
    }
    if let Some(Value::Array(all)) = fields.remove("allOf") {
        fields.extend(all.into_iter().filter_map(|one| one.as_object().cloned()).flatten());
    }
    if let Some(Value::String(reference)) = fields.get_mut("$ref") {
        *reference = reference.replacen(V3_REFERENCE, V2_REFERENCE, 1);
    }
    for field in ["items", "additionalProperties"] {
        if let Some(inner) = fields.get_mut(field) {
            *inner = schema(inner.take());
        }
    }
    if let Some(properties) = fields.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(|property| *property = schema(property.take()));
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::kinds;

    fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str));
                fields.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn one_document_of_everything() {
        let document = document(kinds::served());
        let definitions = document["definitions"].as_object().unwrap();
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        assert!(found.len() > 500, "{}", found.len());
        for reference in found {
            assert!(definitions.contains_key(reference.trim_start_matches(V2_REFERENCE)), "{reference}");
        }
        let options = &definitions["io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions"][GVK];
        assert!(options.as_array().unwrap().len() > 15, "{options}");
        let patch = &document["paths"]["/api/v1/namespaces/{namespace}/services/{name}"]["patch"];
        assert_eq!(patch[GVK], json!({"group": "", "version": "v1", "kind": "Service"}));
        assert_eq!(patch["parameters"][0]["in"], "body");
        assert_eq!(
            patch["parameters"][1],
            json!({"name": "dryRun", "in": "query", "type": "string", "uniqueItems": true})
        );
        assert_eq!(
            patch["responses"]["200"]["schema"],
            json!({"$ref": "#/definitions/io.k8s.api.core.v1.Service"})
        );
        let target = &definitions["io.k8s.api.core.v1.ServicePort"]["properties"]["targetPort"];
        assert_eq!(target, &json!({"$ref": "#/definitions/io.k8s.apimachinery.pkg.util.intstr.IntOrString"}));
        assert_eq!(
            definitions["io.k8s.apimachinery.pkg.util.intstr.IntOrString"],
            json!({"format": "int-or-string", "type": "string"})
        );
    }
}
