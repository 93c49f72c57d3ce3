//! Collects what upstream says of each type and field, for `kubectl explain`, from the crate that carries it: `k8s-openapi` has each
//! description as the comment of its field. Nothing of it lies in this repository, and it takes a quarter of a megabyte of the binary.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

const CRATE: &str = "k8s-openapi";
/// The folder of the API's version, as the facts table has it.
const VERSION: &str = "v1_36";
/// Before the name of a type, in its file.
const DEFINITION: &str = "// Generated from definition ";
/// Fewer types than the version has would mean that the crate writes its comments another way.
const LEAST_TYPES: usize = 600;
/// zstd's level: a second at build time, and unpacking is as fast as from any other.
const LEVEL: i32 = 19;

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    let source =
        source().context("descriptions of the API's types: they come from the source of k8s-openapi")?;
    let mut found = BTreeMap::new();
    read_folder(&source, &mut found)?;
    ensure!(
        found.len() >= LEAST_TYPES,
        "{} describes {} types only; does build.rs of weft-control-api still read what the crate writes?",
        source.display(),
        found.len()
    );
    let table: String = found.into_iter().map(|(name, fields)| format!("={name}\n{fields}")).collect();
    let out = PathBuf::from(env::var_os("OUT_DIR").context("cargo names no OUT_DIR")?);
    fs::write(out.join("descriptions.zst"), zstd::bulk::compress(table.as_bytes(), LEVEL)?)?;
    let size = table.len();
    fs::write(out.join("descriptions.rs"), format!("const UNPACKED_BYTES: usize = {size};\n"))?;
    Ok(())
}

/// Where cargo has the crate's source: the registry's folder, or a vendored one.
fn source() -> anyhow::Result<PathBuf> {
    let metadata = metadata(&["--offline"]).or_else(|_| metadata(&[]))?;
    let root = metadata["workspace_root"].as_str().unwrap_or_default();
    println!("cargo::rerun-if-changed={root}/Cargo.lock");
    let mut packages = metadata["packages"].as_array().into_iter().flatten();
    let package = packages.find(|package| package["name"] == CRATE);
    let manifest = package.and_then(|package| package["manifest_path"].as_str());
    let manifest = manifest.context("the workspace does not use k8s-openapi")?;
    let folder = Path::new(manifest).parent().unwrap_or(Path::new("/")).join("src").join(VERSION);
    ensure!(folder.is_dir(), "{} is missing: cargo fetch brings the crate", folder.display());
    Ok(folder)
}

fn metadata(how: &[&str]) -> anyhow::Result<Value> {
    let cargo = env::var_os("CARGO").context("cargo does not name itself")?;
    let (manifest, target) = (env::var("CARGO_MANIFEST_DIR")?, env::var("TARGET")?);
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version", "1", "--filter-platform", &target]);
    command.args(how).arg("--manifest-path").arg(Path::new(&manifest).join("Cargo.toml"));
    let output = command.output().context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("cannot read what cargo metadata says")
}

/// The descriptions of every file: by the type's name, one line for the type and each of its fields.
fn read_folder(folder: &Path, found: &mut BTreeMap<String, String>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            read_folder(&path, found)?;
        } else {
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            found.extend(read_type(&text));
        }
    }
    Ok(())
}

/// What a file says of its type: the name, then ` description` of the type itself and `field description` of each field.
fn read_type(text: &str) -> Option<(String, String)> {
    let (_, rest) = text.split_once(DEFINITION)?;
    let (name, rest) = rest.split_once('\n')?;
    let names: BTreeMap<&str, &str> = rest.lines().filter_map(json_name).collect();
    let (mut lines, mut table) = (String::new(), String::new());
    let mut comment = Vec::new();
    for line in rest.lines() {
        let line = line.trim();
        if let Some(said) = line.strip_prefix("///") {
            comment.push(said.strip_prefix(' ').unwrap_or(said));
            continue;
        }
        let is_type = ["pub struct ", "pub enum "].iter().any(|start| line.starts_with(start));
        if is_type {
            table = entry("", &comment);
        } else if let Some((field, _)) = line.strip_prefix("pub ").and_then(|field| field.split_once(':')) {
            let json = names.get(field.trim_start_matches("r#"));
            lines.extend(json.map(|json| entry(json, &comment)));
        }
        // An attribute stands between a comment and what it is about.
        if !line.starts_with("#[") {
            comment.clear();
        }
        // Fields have commas; what ends the type ends what is of interest.
        if line == "}" || (is_type && !line.ends_with('{')) {
            break;
        }
    }
    Some((name.trim().to_owned(), table + &lines))
}

/// `"valueFrom" => Field::Key_value_from,`: the JSON name behind the name in Rust.
fn json_name(line: &str) -> Option<(&str, &str)> {
    let (json, rust) = line.trim().split_once(" => Field::Key_")?;
    Some((rust.trim_end_matches(','), json.trim_matches('"')))
}

fn entry(name: &str, comment: &[&str]) -> String {
    let text = comment.join("\n");
    if text.is_empty() {
        return String::new();
    }
    // The crate escapes what rustdoc would take for markup; here a line is an entry.
    let mut plain = String::new();
    let mut characters = text.chars().peekable();
    while let Some(one) = characters.next() {
        let escapes = one == '\\' && characters.peek().is_some_and(|next| "[]<>\\".contains(*next));
        match if escapes { characters.next().unwrap_or(one) } else { one } {
            '\n' => plain.push_str("\\n"),
            '\\' => plain.push_str("\\\\"),
            other => plain.push(other),
        }
    }
    format!("{name} {plain}\n")
}
