//! OpenAPI v3: an index, and a document per group and version, made from the facts when asked for and not kept.
//!
//! The documents carry what clients act on: types, list and merge keys, the type and parameters of each operation; and what
//! upstream says of each type and field.
mod descriptions;
pub mod gnostic;
pub mod v2;

use std::{collections::BTreeSet, sync::LazyLock};

use descriptions::Descriptions;
use serde_json::{Map, Value, json};

use crate::{
    facts,
    kinds::{Gvk, Kind, Subresource},
    schema::{Definition, DefinitionId, Field, ListType, Schema, Shape, Type},
};

/// Raise it when the documents change while the facts don't.
const RENDERING: &str = "2";

const BODY_TYPES: [&str; 2] = ["application/json", "application/yaml"];
const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";

/// Names the content of every document; serves as `ETag` and as the index's `hash` parameter.
pub fn hash() -> &'static str {
    static HASH: LazyLock<String> = LazyLock::new(|| {
        // FNV-1a: the name must change with the content, and needn't resist anybody.
        let bytes =
            facts::table().bytes().chain(RENDERING.bytes()).chain(descriptions::packed().iter().copied());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        format!("{hash:016X}")
    });
    &HASH
}

/// `/openapi/v3`: the documents of the served kinds.
pub fn index<'k>(kinds: impl IntoIterator<Item = &'k Kind>) -> Value {
    let mut paths = Map::new();
    for kind in kinds {
        let path = group_version_path(kind.group, kind.version);
        let url = format!("/openapi/v3/{path}?hash={}", hash());
        paths.entry(path).or_insert_with(|| json!({"serverRelativeURL": url}));
    }
    json!({"paths": paths})
}

/// `/openapi/v3/api/v1` and `/openapi/v3/apis/<group>/<version>`; none if no served kind is in it.
pub fn document<'k>(kinds: impl IntoIterator<Item = &'k Kind>, group: &str, version: &str) -> Option<Value> {
    described(kinds, group, version, &Descriptions::unpack())
}

fn described<'k>(
    kinds: impl IntoIterator<Item = &'k Kind>,
    group: &str,
    version: &str,
    descriptions: &Descriptions,
) -> Option<Value> {
    let schema = Schema::builtin();
    let mut rendering = Rendering { schema, used: BTreeSet::new(), descriptions, group, version };
    let mut paths = Map::new();
    for kind in kinds.into_iter().filter(|kind| kind.group == group && kind.version == version) {
        rendering.kind_paths(&mut paths, kind);
    }
    if paths.is_empty() {
        return None;
    }
    let own = schema.iter().filter(|(_, definition)| {
        definition.gvk.as_ref().is_some_and(|(g, v, _)| g == group && v == version)
    });
    rendering.used.extend(own.map(|(id, _)| id));
    let schemas = rendering.schemas();
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.36.0"},
        "paths": paths,
        "components": {"schemas": schemas},
    }))
}

fn group_version_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

struct Rendering<'a> {
    schema: &'static Schema,
    /// Definitions that the document must have.
    used: BTreeSet<DefinitionId>,
    descriptions: &'a Descriptions,
    group: &'a str,
    version: &'a str,
}

/// What an operation does and on which kind.
#[derive(Clone, Copy)]
struct Operation<'a> {
    /// HTTP method.
    method: &'static str,
    /// `x-kubernetes-action`.
    action: &'static str,
    /// Kind of the resource or subresource.
    gvk: Gvk<'a>,
    /// Definition of the answer.
    answer: Option<DefinitionId>,
    /// Definition of the body of POST and PUT.
    body: Option<DefinitionId>,
}

/// The HTTP methods of verbs on collections, then of those on objects.
const COLLECTION_VERBS: [(&str, &str, &str); 3] =
    [("list", "get", "list"), ("create", "post", "post"), ("deletecollection", "delete", "deletecollection")];
const OBJECT_VERBS: [(&str, &str, &str); 4] = [
    ("get", "get", "get"),
    ("update", "put", "put"),
    ("patch", "patch", "patch"),
    ("delete", "delete", "delete"),
];

impl Rendering<'_> {
    fn definition(&self, gvk: Gvk<'_>) -> Option<DefinitionId> {
        self.schema.by_gvk(gvk.group, gvk.version, gvk.kind)
    }

    fn meta(&self, name: &str) -> Option<DefinitionId> {
        self.schema.by_name(&format!("{META}{name}"))
    }

    fn kind_paths(&mut self, paths: &mut Map<String, Value>, kind: &Kind) {
        let base = format!("/{}", group_version_path(kind.group, kind.version));
        let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
        let collection = format!("{base}{scope}/{}", kind.plural);
        let list = format!("{}List", kind.kind);
        let (object, list) =
            (self.definition(kind.gvk()), self.definition(Gvk { kind: &list, ..kind.gvk() }));
        let status = self.meta("Status");
        let operation = |(_, method, action): &(&str, &'static str, &'static str)| {
            let answer = match *action {
                "list" => list,
                "delete" | "deletecollection" => status,
                _ => object,
            };
            Operation { method, action, gvk: kind.gvk(), answer, body: object }
        };
        let wanted = |verbs: &[(&str, &'static str, &'static str)]| -> Vec<Operation<'static>> {
            verbs.iter().filter(|(verb, ..)| kind.has_verb(verb)).map(operation).collect()
        };
        let everywhere = wanted(&COLLECTION_VERBS[..1]);
        let many = wanted(&COLLECTION_VERBS);
        let one = wanted(&OBJECT_VERBS);
        if kind.namespaced && !everywhere.is_empty() {
            let path = format!("{base}/{}", kind.plural);
            self.path(paths, path, &everywhere);
        }
        self.path(paths, collection.clone(), &many);
        self.path(paths, format!("{collection}/{{name}}"), &one);
        for sub in &kind.subresources {
            let operations = self.subresource(kind, sub);
            self.path(paths, format!("{collection}/{{name}}/{}", sub.name), &operations);
        }
    }

    fn subresource(&self, kind: &Kind, sub: &Subresource) -> Vec<Operation<'static>> {
        let object = self.definition(sub.gvk()).or(kind.definition);
        let create = ("create", "post", "post");
        let verbs = OBJECT_VERBS.iter().chain(std::iter::once(&create));
        verbs
            .filter(|(verb, ..)| sub.verbs.contains(verb))
            .map(|&(_, method, action)| Operation {
                method,
                action,
                gvk: sub.gvk(),
                answer: object,
                body: object,
            })
            .collect()
    }

    fn path(&mut self, paths: &mut Map<String, Value>, path: String, operations: &[Operation<'_>]) {
        if operations.is_empty() {
            return;
        }
        let mut item = Map::new();
        for operation in operations {
            let rendered = self.operation(operation);
            item.insert(operation.method.to_owned(), rendered);
        }
        let parameters: Vec<Value> = ["namespace", "name"]
            .iter()
            .filter(|name| path.contains(&format!("{{{name}}}")))
            .map(|name| json!({"name": name, "in": "path", "required": true, "schema": string(true)}))
            .collect();
        if !parameters.is_empty() {
            item.insert("parameters".to_owned(), parameters.into());
        }
        paths.insert(path, Value::Object(item));
    }

    fn operation(&mut self, operation: &Operation<'_>) -> Value {
        let gvk = operation.gvk;
        let mut rendered = json!({
            "responses": {"200": {"description": "OK", "content": self.content(&BODY_TYPES, operation.answer)}},
            "x-kubernetes-action": operation.action,
            "x-kubernetes-group-version-kind": {"group": gvk.group, "version": gvk.version, "kind": gvk.kind},
        });
        let parameters: Vec<Value> =
            query_parameters(operation.action).iter().map(|name| query_parameter(name)).collect();
        if !parameters.is_empty() {
            rendered["parameters"] = parameters.into();
        }
        let body = match operation.action {
            "post" | "put" => Some(self.content(&BODY_TYPES, operation.body)),
            "patch" => Some(self.content(&crate::patch::MEDIA_TYPES, self.meta("Patch"))),
            "delete" | "deletecollection" => Some(self.content(&BODY_TYPES, self.meta("DeleteOptions"))),
            _ => None,
        };
        if let Some(content) = body {
            let required = !operation.action.starts_with("delete");
            rendered["requestBody"] = json!({"content": content, "required": required});
        }
        rendered
    }

    fn content(&mut self, media_types: &[&str], id: Option<DefinitionId>) -> Value {
        let schema = match id {
            Some(id) => {
                self.used.insert(id);
                reference(self.schema.get(id))
            }
            None => string(false),
        };
        media_types.iter().map(|media_type| ((*media_type).to_owned(), json!({"schema": schema}))).collect()
    }

    /// Renders the definitions in use and those that they need.
    fn schemas(&mut self) -> Value {
        let mut schemas = Map::new();
        while let Some(id) = self.used.pop_first() {
            let definition = self.schema.get(id);
            if !schemas.contains_key(definition.name.as_ref()) {
                let rendered = self.render(definition);
                schemas.insert(definition.name.to_string(), rendered);
                for field in &definition.fields {
                    self.need(&field.ty, &schemas);
                }
            }
        }
        Value::Object(schemas)
    }

    fn need(&mut self, ty: &Type, done: &Map<String, Value>) {
        if let Type::List(item) | Type::Map(item) = ty {
            self.need(item, done);
        }
        if let Type::Ref(id) = ty
            && !done.contains_key(self.schema.get(*id).name.as_ref())
        {
            self.used.insert(*id);
        }
    }

    fn render(&self, definition: &Definition) -> Value {
        let mut schema = shape(definition.shape);
        if let Some(said) = self.descriptions.of(&definition.name, "") {
            schema["description"] = said.into();
        }
        if !definition.fields.is_empty() {
            let properties: Map<String, Value> = definition
                .fields
                .iter()
                .map(|field| (field.name.to_string(), self.property(definition, field)))
                .collect();
            schema["properties"] = properties.into();
        }
        let required: Vec<&str> = definition
            .fields
            .iter()
            .filter(|field| field.required)
            .map(|field| field.name.as_ref())
            .collect();
        if !required.is_empty() {
            schema["required"] = json!(required);
        }
        if definition.atomic {
            schema["x-kubernetes-map-type"] = "atomic".into();
        }
        if let Some((group, version, kind)) = &definition.gvk {
            // A type of every group is, here, one of this group.
            let (group, version) =
                if group == "*" { (self.group, self.version) } else { (group.as_ref(), version.as_ref()) };
            schema["x-kubernetes-group-version-kind"] =
                json!([{"group": group, "version": version, "kind": kind}]);
        }
        schema
    }

    fn property(&self, definition: &Definition, field: &Field) -> Value {
        let mut property = self.value(&field.ty);
        if let Some(said) = self.descriptions.of(&definition.name, &field.name) {
            property["description"] = said.into();
        }
        let list_type = match field.list_type {
            ListType::None => None,
            ListType::Atomic => Some("atomic"),
            ListType::Set => Some("set"),
            ListType::Map => Some("map"),
        };
        if let Some(list_type) = list_type {
            property["x-kubernetes-list-type"] = list_type.into();
        }
        if !field.list_keys.is_empty() {
            property["x-kubernetes-list-map-keys"] = json!(field.list_keys);
        }
        if let Some(key) = &field.merge_key {
            property["x-kubernetes-patch-merge-key"] = json!(key);
        }
        let strategy = match (field.patch_merge, field.retain_keys) {
            (true, true) => Some("merge,retainKeys"),
            (true, false) => Some("merge"),
            (false, true) => Some("retainKeys"),
            (false, false) => None,
        };
        if let Some(strategy) = strategy {
            property["x-kubernetes-patch-strategy"] = strategy.into();
        }
        if field.atomic_map {
            property["x-kubernetes-map-type"] = "atomic".into();
        }
        property
    }

    fn value(&self, ty: &Type) -> Value {
        match ty {
            Type::String => json!({"type": "string"}),
            Type::Int32 => json!({"type": "integer", "format": "int32"}),
            Type::Int64 => json!({"type": "integer", "format": "int64"}),
            Type::Double => json!({"type": "number", "format": "double"}),
            Type::Bool => json!({"type": "boolean"}),
            Type::Bytes => json!({"type": "string", "format": "byte"}),
            Type::Object => json!({"type": "object"}),
            // Within `allOf`, so that a reference can have attributes beside it.
            Type::Ref(id) => json!({"allOf": [reference(self.schema.get(*id))]}),
            Type::List(item) => json!({"type": "array", "items": self.value(item)}),
            Type::Map(value) => json!({"type": "object", "additionalProperties": self.value(value)}),
        }
    }
}

fn shape(shape: Shape) -> Value {
    match shape {
        Shape::Object | Shape::Raw => json!({"type": "object"}),
        Shape::Time | Shape::MicroTime => json!({"type": "string", "format": "date-time"}),
        Shape::Quantity => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
        Shape::IntOrString => {
            json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
        }
        Shape::Json | Shape::JsonSchema => json!({}),
    }
}

fn reference(definition: &Definition) -> Value {
    json!({"$ref": format!("#/components/schemas/{}", definition.name)})
}

fn string(unique: bool) -> Value {
    if unique { json!({"type": "string", "uniqueItems": true}) } else { json!({"type": "string"}) }
}

fn query_parameters(action: &str) -> &'static [&'static str] {
    match action {
        "post" | "put" => &["dryRun", "fieldManager", "fieldValidation"],
        "patch" => &["dryRun", "fieldManager", "fieldValidation", "force"],
        "delete" => &["dryRun", "gracePeriodSeconds", "orphanDependents", "propagationPolicy"],
        "list" | "deletecollection" => &[
            "allowWatchBookmarks",
            "continue",
            "fieldSelector",
            "labelSelector",
            "limit",
            "resourceVersion",
            "resourceVersionMatch",
            "sendInitialEvents",
            "timeoutSeconds",
            "watch",
        ],
        _ => &[],
    }
}

fn query_parameter(name: &str) -> Value {
    let parameter_type = match name {
        "allowWatchBookmarks" | "force" | "orphanDependents" | "sendInitialEvents" | "watch" => "boolean",
        "gracePeriodSeconds" | "limit" | "timeoutSeconds" => "integer",
        _ => "string",
    };
    json!({"name": name, "in": "query", "schema": {"type": parameter_type, "uniqueItems": true}})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;

    #[test]
    fn index_lists_served_versions() {
        let index = index(kinds::served());
        let paths = index["paths"].as_object().unwrap();
        let url = paths["apis/apps/v1"]["serverRelativeURL"].as_str().unwrap();
        assert_eq!(url, format!("/openapi/v3/apis/apps/v1?hash={}", hash()));
        assert!(paths.contains_key("api/v1") && !paths.contains_key("apis/resource.k8s.io/v1beta1"));
        assert_eq!(hash().len(), 16);
    }

    #[test]
    fn documents_say_what_clients_act_on() {
        let document = document(kinds::served(), "apps", "v1").unwrap();
        let patch = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
        assert_eq!(
            patch["x-kubernetes-group-version-kind"],
            json!({"group": "apps", "version": "v1", "kind": "Deployment"})
        );
        let parameters = patch["parameters"].as_array().unwrap();
        assert!(parameters.iter().any(|p| p["name"] == "fieldValidation" && p["in"] == "query"));
        let schemas = &document["components"]["schemas"];
        let containers = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
        assert_eq!(
            schemas["io.k8s.api.apps.v1.Deployment"]["properties"]["spec"],
            json!({
                "allOf": [{"$ref": "#/components/schemas/io.k8s.api.apps.v1.DeploymentSpec"}],
                "description": "Specification of the desired behavior of the Deployment.",
            })
        );
        assert!(super::document(kinds::served(), "apps", "v9").is_none());
    }

    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(reference) = fields.get("$ref").and_then(Value::as_str) {
                    found.insert(reference.trim_start_matches("#/components/schemas/").to_owned());
                }
                fields.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn every_reference_is_there() {
        let index = index(kinds::all());
        for path in index["paths"].as_object().unwrap().keys() {
            let mut parts = path.rsplitn(3, '/');
            let (version, group) = (parts.next().unwrap(), parts.next().unwrap());
            let group = if group == "api" { "" } else { group };
            let document = document(kinds::all(), group, version).unwrap();
            let mut found = BTreeSet::new();
            references(&document, &mut found);
            let schemas = document["components"]["schemas"].as_object().unwrap();
            for name in &found {
                assert!(schemas.contains_key(name), "{path}: {name}");
            }
            assert!(found.len() > 5);
        }
    }
}
