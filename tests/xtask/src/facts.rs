//! `cargo xtask facts`: reduces upstream's swagger and discovery documents to the table that `control/api` embeds.
//!
//! Only facts go into the table: names, types, list and merge keys, verbs. No descriptions.
//! The format is one record a line, words apart by one space, `-` for an empty word:
//!
//! ```text
//! G <group> <version>                                            kinds that follow belong to it; discovery order
//! K <plural> <Kind> <singular> <N|C> <verbs|*> <short> <categories> <storage version hash>
//! S <subresource> <group> <version> <Kind> <verbs>               of the kind before it; group and version `-`: the kind's
//! D <definition> <shape> [mt=<map type>] [gvk=<group>/<version>/<Kind>]
//! F <field> <type> [!] [lt=<list type>] [lk=<key,…>] [mk=<merge key>] [ps=<strategy,…>] [mt=<map type>]
//! ```
//!
//! Types: `s i32 i64 f64 b bytes obj`, `@definition`, `[type` (list), `{type` (map).
use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

/// The verbs of an ordinary stored kind, written as `*`.
const ALL_VERBS: [&str; 8] =
    ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// Reads `swagger` and the documents in `discovery`, and writes the table to `out`.
pub(crate) fn generate(swagger: &Path, discovery: &Path, out: &Path) -> Result<()> {
    let mut text = String::from("# Made by `cargo xtask facts`; do not edit.\n");
    let groups = read(&discovery.join("apis.json"))?;
    group_version(&mut text, "", "v1", &discovery.join("api__v1.json"))?;
    for group in array(&groups, "groups")? {
        let name = string(group, "name")?;
        for version in array(group, "versions")? {
            let version = string(version, "version")?;
            group_version(
                &mut text,
                name,
                version,
                &discovery.join(format!("apis__{name}__{version}.json")),
            )?;
        }
    }
    let swagger = read(swagger)?;
    let definitions =
        swagger.get("definitions").and_then(Value::as_object).context("swagger has no definitions")?;
    for (name, definition) in definitions.iter().collect::<BTreeMap<_, _>>() {
        write_definition(&mut text, name, definition).with_context(|| format!("definition {name}"))?;
    }
    if let Some(dir) = out.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    fs::write(out, text).with_context(|| format!("write {}", out.display()))
}

fn read(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("parse {}", path.display()))
}

fn array<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value.get(key).and_then(Value::as_array).with_context(|| format!("no list {key}"))
}

fn string<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value.get(key).and_then(Value::as_str).with_context(|| format!("no string {key}"))
}

fn word(value: Option<&str>) -> &str {
    value.filter(|text| !text.is_empty()).unwrap_or("-")
}

/// A JSON list of strings as one word.
fn list(value: Option<&Value>) -> String {
    let items: Vec<&str> =
        value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    if items == ALL_VERBS {
        return "*".to_owned();
    }
    word(Some(&items.join(","))).to_owned()
}

fn group_version(text: &mut String, group: &str, version: &str, path: &Path) -> Result<()> {
    let document = read(path)?;
    writeln!(text, "G {} {version}", word(Some(group)))?;
    let resources = array(&document, "resources")?;
    for resource in resources {
        let name = string(resource, "name")?;
        if name.contains('/') {
            continue;
        }
        let optional = |key: &str| word(resource.get(key).and_then(Value::as_str));
        writeln!(
            text,
            "K {name} {} {} {} {} {} {} {}",
            string(resource, "kind")?,
            optional("singularName"),
            if resource.get("namespaced") == Some(&Value::Bool(true)) { "N" } else { "C" },
            list(resource.get("verbs")),
            list(resource.get("shortNames")),
            list(resource.get("categories")),
            optional("storageVersionHash"),
        )?;
        for sub in resources {
            let Some((parent, subresource)) = string(sub, "name")?.split_once('/') else { continue };
            if parent == name {
                let optional = |key: &str| word(sub.get(key).and_then(Value::as_str));
                let (group, version) = (optional("group"), optional("version"));
                writeln!(
                    text,
                    "S {subresource} {group} {version} {} {}",
                    string(sub, "kind")?,
                    list(sub.get("verbs"))
                )?;
            }
        }
    }
    Ok(())
}

/// What the Go type behind a definition without properties accepts; the swagger type alone doesn't say it.
fn shape(name: &str, definition: &Value) -> Result<&'static str> {
    if definition.get("properties").is_some() {
        return Ok("object");
    }
    let last = name.rsplit('.').next().unwrap_or(name);
    Ok(match last {
        "Time" => "time",
        "MicroTime" => "microtime",
        "Quantity" => "quantity",
        "IntOrString" => "intorstring",
        "FieldsV1" | "RawExtension" | "Patch" => "raw",
        "JSON" => "json",
        "JSONSchemaPropsOrArray" | "JSONSchemaPropsOrBool" | "JSONSchemaPropsOrStringArray" => "schema",
        _ if definition.get("type").and_then(Value::as_str) == Some("object") => "object",
        _ => bail!("a definition with neither properties nor a known name"),
    })
}

fn write_definition(text: &mut String, name: &str, definition: &Value) -> Result<()> {
    write!(text, "D {name} {}", shape(name, definition)?)?;
    if let Some(map_type) = definition.get("x-kubernetes-map-type").and_then(Value::as_str) {
        write!(text, " mt={map_type}")?;
    }
    // DeleteOptions and WatchEvent are registered in every group version; one name for all of them is `*`.
    let gvks = definition.get("x-kubernetes-group-version-kind").and_then(Value::as_array);
    match gvks.map(Vec::as_slice) {
        None | Some([]) => {}
        Some([gvk]) => {
            let (group, version) = (string(gvk, "group")?, string(gvk, "version")?);
            write!(text, " gvk={group}/{version}/{}", string(gvk, "kind")?)?;
        }
        Some([gvk, ..]) => write!(text, " gvk=*/*/{}", string(gvk, "kind")?)?,
    }
    text.push('\n');
    let empty = Map::new();
    let properties = definition.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    let required: Vec<&str> = definition
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    for (field, property) in properties.iter().collect::<BTreeMap<_, _>>() {
        write!(text, "F {field} {}", type_word(property).with_context(|| format!("field {field}"))?)?;
        if required.contains(&field.as_str()) {
            text.push_str(" !");
        }
        attribute(text, "lt", property.get("x-kubernetes-list-type"))?;
        attribute(text, "lk", property.get("x-kubernetes-list-map-keys"))?;
        attribute(text, "mk", property.get("x-kubernetes-patch-merge-key"))?;
        attribute(text, "ps", property.get("x-kubernetes-patch-strategy"))?;
        attribute(text, "mt", property.get("x-kubernetes-map-type"))?;
        text.push('\n');
    }
    Ok(())
}

fn attribute(text: &mut String, key: &str, value: Option<&Value>) -> Result<()> {
    match value {
        None => {}
        Some(Value::String(word)) => write!(text, " {key}={word}")?,
        Some(list_value) => write!(text, " {key}={}", list(Some(list_value)))?,
    }
    Ok(())
}

fn type_word(schema: &Value) -> Result<String> {
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        let name = reference.strip_prefix("#/definitions/").context("a reference outside the definitions")?;
        return Ok(format!("@{name}"));
    }
    let format = schema.get("format").and_then(Value::as_str);
    Ok(match (schema.get("type").and_then(Value::as_str), format) {
        (Some("string"), Some("byte")) => "bytes".to_owned(),
        (Some("string"), None) => "s".to_owned(),
        (Some("integer"), Some("int32")) => "i32".to_owned(),
        (Some("integer"), Some("int64")) => "i64".to_owned(),
        (Some("number"), Some("double")) => "f64".to_owned(),
        (Some("boolean"), None) => "b".to_owned(),
        (Some("array"), None) => {
            format!("[{}", type_word(schema.get("items").context("a list without items")?)?)
        }
        (Some("object"), None) => match schema.get("additionalProperties") {
            Some(items) => format!("{{{}", type_word(items)?),
            None => "obj".to_owned(),
        },
        other => bail!("a type that is not known: {other:?}"),
    })
}
