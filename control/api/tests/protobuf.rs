//! Upstream's round-trip objects in protobuf, with every field set, say what their JSON says.
#![expect(clippy::unwrap_used, reason = "a test outside of a test module; a failure is a panic")]

use std::path::{Path, PathBuf};

use serde_json::Value;
use weft_control_api::kinds::{Gvk, Typed};
use weft_control_api::protobuf;

fn objects(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|ext| ext == "pb")).collect()
}

/// What only one of the two says.
fn differences(json: &Value, read: &Value, path: &str, out: &mut Vec<String>) {
    match (json, read) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))) {
                differences(&json[key], &read[key], &format!("{path}.{key}"), out);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (at, (a, b)) in a.iter().zip(b).enumerate() {
                differences(a, b, &format!("{path}[{at}]"), out);
            }
        }
        (a, b) if a == b => {}
        (a, b) => out.push(format!("{path}: {a} became {b}")),
    }
}

/// Reads one file; false if its kind has no message here.
fn same(path: &Path) -> bool {
    let json: Value = serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
    match protobuf::read(&std::fs::read(path).unwrap()) {
        Ok(read) => {
            let mut out = Vec::new();
            differences(&json, &read, "", &mut out);
            assert!(out.is_empty(), "{}: {out:#?}", path.display());
            true
        }
        Err(status) => {
            assert_eq!(status.code(), 415, "{}: {status}", path.display());
            let text = |key: &str| json[key].as_str().unwrap_or_default();
            let gvk = Gvk::parse(text("apiVersion"), text("kind"));
            let stable = !gvk.version.contains("alpha") && !gvk.version.contains("beta");
            let elsewhere = gvk.group.starts_with("admission.") || gvk.group.starts_with("imagepolicy");
            assert!(!stable || elsewhere || gvk.definition().is_none(), "{}", path.display());
            false
        }
    }
}

#[test]
fn fixtures() {
    let files = objects(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/roundtrip"));
    assert!(files.len() >= 2 && files.iter().all(|file| same(file)));
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
    let read = objects(&dir).iter().filter(|path| same(path)).count();
    assert!(read >= 88, "only {read} objects");
}
