//! Reads the embedded table of API facts; its format is described where it is made, in `cargo xtask facts`.
//!
//! Strings are slices of the table, which the binary maps from its file: decoded, the whole takes about half a megabyte.
//! The table is made by our own build step, so a broken record is a bug that the tests of this module find: it panics.
use crate::{
    kinds::{Kind, Subresource},
    schema::{Definition, DefinitionId, Field, ListType, Name, Schema, Shape, Type},
};

static TABLE: &str = include_str!("../facts/v1.36.txt");

const ALL_VERBS: [&str; 8] =
    ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// The table as text.
pub(crate) fn table() -> &'static str {
    TABLE
}

fn records(letters: &'static str) -> impl Iterator<Item = (&'static str, &'static str)> {
    TABLE.lines().filter_map(move |line| line.split_once(' ').filter(|(letter, _)| letters.contains(letter)))
}

fn word(text: &'static str) -> &'static str {
    if text == "-" { "" } else { text }
}

fn list(text: &'static str) -> Box<[&'static str]> {
    match text {
        "*" => ALL_VERBS.into(),
        "-" => Box::default(),
        _ => text.split(',').collect(),
    }
}

/// Takes a record's words apart; the table's maker writes exactly `N`.
fn words<const N: usize>(record: &'static str) -> [&'static str; N] {
    let mut parts = record.splitn(N, ' ');
    std::array::from_fn(|_| parts.next().expect("a record of the facts table has all its words"))
}

/// The kinds, in the order of upstream's discovery documents.
pub(crate) fn kinds() -> Box<[Kind]> {
    let schema = Schema::builtin();
    let mut kinds: Vec<Kind> = Vec::new();
    let mut group_version = ("", "");
    for (letter, record) in records("GKS") {
        match letter {
            "G" => {
                let [group, version] = words(record);
                group_version = (word(group), version);
            }
            "K" => {
                let mut kind = kind(record, group_version);
                kind.definition = schema.by_gvk(kind.group, kind.version, kind.kind);
                let stored_elsewhere = kinds.iter().any(|k| k.group == kind.group && k.plural == kind.plural);
                kind.storage_version =
                    !stored_elsewhere && (kind.group, kind.kind) != ("events.k8s.io", "Event");
                kinds.push(kind);
            }
            _ => {
                let parent = kinds.last_mut().expect("a subresource follows its kind");
                let subresource = subresource(record, parent);
                parent.subresources.push(subresource);
            }
        }
    }
    kinds.into()
}

fn kind(record: &'static str, (group, version): (&'static str, &'static str)) -> Kind {
    let [plural, kind, singular, scope, verbs, short, categories, hash] = words(record);
    Kind {
        group,
        version,
        kind,
        plural,
        singular: word(singular),
        short_names: list(short),
        categories: list(categories),
        namespaced: scope == "N",
        verbs: list(verbs),
        subresources: Vec::new(),
        storage_version: false,
        storage_version_hash: word(hash),
        definition: None,
    }
}

fn subresource(record: &'static str, parent: &Kind) -> Subresource {
    let [name, group, version, kind, verbs] = words(record);
    let foreign = version != "-";
    Subresource {
        name,
        group: if foreign { word(group) } else { parent.group },
        version: if foreign { version } else { parent.version },
        kind,
        foreign,
        verbs: list(verbs),
    }
}

/// The definitions.
pub(crate) fn schema() -> Schema {
    let names: Vec<&str> =
        records("D").map(|(_, record)| record.split(' ').next().unwrap_or_default()).collect();
    let mut definitions: Vec<Definition> = Vec::with_capacity(names.len());
    let mut fields: Vec<Field> = Vec::new();
    for (letter, record) in records("DF") {
        if letter == "D" {
            if let Some(last) = definitions.last_mut() {
                last.fields = std::mem::take(&mut fields).into();
            }
            definitions.push(definition(record));
        } else {
            fields.push(field(record, &names));
        }
    }
    if let Some(last) = definitions.last_mut() {
        last.fields = fields.into();
    }
    Schema { definitions: definitions.into() }
}

fn definition(record: &'static str) -> Definition {
    let mut parts = record.split(' ');
    let name = Name::Borrowed(parts.next().unwrap_or_default());
    let shape = match parts.next() {
        Some("object") => Shape::Object,
        Some("time") => Shape::Time,
        Some("microtime") => Shape::MicroTime,
        Some("quantity") => Shape::Quantity,
        Some("intorstring") => Shape::IntOrString,
        Some("raw") => Shape::Raw,
        Some("json") => Shape::Json,
        Some("schema") => Shape::JsonSchema,
        other => panic!("unknown shape in the facts table: {other:?}"),
    };
    let mut definition = Definition { name, shape, atomic: false, gvk: None, fields: Box::default() };
    for attribute in parts {
        match attribute.split_once('=') {
            Some(("mt", map_type)) => definition.atomic = map_type == "atomic",
            Some(("gvk", gvk)) => {
                let mut gvk = gvk.split('/').map(Name::Borrowed);
                definition.gvk = gvk.next().zip(gvk.next()).zip(gvk.next()).map(|((g, v), k)| (g, v, k));
            }
            _ => panic!("unknown attribute in the facts table: {attribute}"),
        }
    }
    definition
}

fn field(record: &'static str, names: &[&str]) -> Field {
    let mut parts = record.split(' ');
    let mut field = Field {
        name: Name::Borrowed(parts.next().unwrap_or_default()),
        ty: parse_type(parts.next().unwrap_or_default(), names),
        required: false,
        list_type: ListType::None,
        list_keys: Box::default(),
        merge_key: None,
        patch_merge: false,
        retain_keys: false,
        atomic_map: false,
    };
    for attribute in parts {
        match attribute.split_once('=').unwrap_or((attribute, "")) {
            ("!", _) => field.required = true,
            ("lt", "atomic") => field.list_type = ListType::Atomic,
            ("lt", "set") => field.list_type = ListType::Set,
            ("lt", "map") => field.list_type = ListType::Map,
            ("lk", keys) => field.list_keys = keys.split(',').map(Name::Borrowed).collect(),
            ("mk", key) => field.merge_key = Some(Name::Borrowed(key)),
            ("ps", strategies) => {
                field.patch_merge = strategies.split(',').any(|strategy| strategy == "merge");
                field.retain_keys = strategies.split(',').any(|strategy| strategy == "retainKeys");
            }
            ("mt", map_type) => field.atomic_map = map_type == "atomic",
            _ => panic!("unknown attribute in the facts table: {attribute}"),
        }
    }
    field
}

fn parse_type(text: &'static str, names: &[&str]) -> Type {
    if let Some(item) = text.strip_prefix('[') {
        return Type::List(Box::new(parse_type(item, names)));
    }
    if let Some(value) = text.strip_prefix('{') {
        return Type::Map(Box::new(parse_type(value, names)));
    }
    if let Some(name) = text.strip_prefix('@') {
        let at = names.binary_search(&name).expect("a reference in the facts table has its definition");
        return Type::Ref(DefinitionId(u16::try_from(at).expect("the facts table has few definitions")));
    }
    match text {
        "s" => Type::String,
        "i32" => Type::Int32,
        "i64" => Type::Int64,
        "f64" => Type::Double,
        "b" => Type::Bool,
        "bytes" => Type::Bytes,
        "obj" => Type::Object,
        _ => panic!("unknown type in the facts table: {text}"),
    }
}
