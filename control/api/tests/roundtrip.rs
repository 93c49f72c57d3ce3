//! Upstream's round-trip objects, with every field set, are read without a complaint and come out as they went in.
#![expect(clippy::unwrap_used, reason = "a test outside of a test module; a failure is a panic")]

use std::path::{Path, PathBuf};

use serde_json::Value;
use weft_control_api::{
    codec::{self, FieldValidation},
    kinds::{self, Gvk, Typed},
};

fn objects(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "json" || ext == "yaml"))
        .collect();
    files.sort();
    files
}

/// Reads one file as its own kind; false if the kind isn't known to 1.36's API.
fn round_trip(path: &Path) -> bool {
    let body = std::fs::read(path).unwrap();
    let json = std::fs::read(path.with_extension("json")).unwrap();
    let expected: Value = serde_json::from_slice(&json).unwrap();
    let text = |key: &str| expected[key].as_str().unwrap_or_default();
    let gvk = Gvk::parse(text("apiVersion"), text("kind"));
    if gvk.definition().is_none() {
        return false;
    }
    let media_type = if path.extension().is_some_and(|ext| ext == "yaml") {
        "application/yaml"
    } else {
        "application/json"
    };
    let decoded = codec::decode(&gvk, media_type, &body, FieldValidation::Strict)
        .unwrap_or_else(|status| panic!("{}: {status}", path.display()));
    let differences = differences(&expected, &decoded.object, "");
    assert!(differences.is_empty(), "{}: {differences:#?}", path.display());
    true
}

/// Where two values differ; nothing else shows it in objects of 2,000 lines.
fn differences(expected: &Value, found: &Value, path: &str) -> Vec<String> {
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => {
            let keys = expected.keys().chain(found.keys().filter(|key| !expected.contains_key(*key)));
            let null = Value::Null;
            keys.flat_map(|key| {
                let value = |object: &serde_json::Map<String, Value>| {
                    object.get(key).cloned().unwrap_or(null.clone())
                };
                differences(&value(expected), &value(found), &format!("{path}.{key}"))
            })
            .collect()
        }
        (Value::Array(expected), Value::Array(found)) if expected.len() == found.len() => {
            let pairs = expected.iter().zip(found).enumerate();
            pairs.flat_map(|(at, (e, f))| differences(e, f, &format!("{path}[{at}]"))).collect()
        }
        (expected, found) if expected == found => Vec::new(),
        (expected, found) => vec![format!("{path}: {expected} became {found}")],
    }
}

#[test]
fn fixtures() {
    let files = objects(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/roundtrip"));
    assert!(files.len() >= 4);
    for file in files {
        assert!(round_trip(&file), "{}", file.display());
    }
}

#[test]
fn every_object_of_upstream() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found =
        manifest.ancestors().map(|dir| dir.join("shared/k8s-1.36/roundtrip")).find(|dir| dir.is_dir());
    let Some(dir) = found else {
        let required = std::env::var("WEFT_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|name| name == "k8s-data"), "upstream's API data is required");
        eprintln!("SKIP: needs upstream's API data in ../shared");
        return;
    };
    let read = objects(&dir).iter().filter(|path| round_trip(path)).count();
    assert!(read > 180, "only {read} objects");
    let missing: Vec<_> = kinds::all()
        .iter()
        .filter(|kind| {
            let group = if kind.group.is_empty() { "core" } else { kind.group };
            !dir.join(format!("{group}.{}.{}.json", kind.version, kind.kind)).is_file()
        })
        .map(|kind| kind.kind)
        .collect();
    // Aggregation's and custom resources' own kinds live outside of that set.
    assert!(missing.len() <= 3, "no object for {missing:?}");
}
