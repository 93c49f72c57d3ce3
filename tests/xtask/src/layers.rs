//! The dependency table of the workspace, deny by default.

use std::collections::BTreeMap;

use anyhow::bail;

use crate::steps::{cargo, quiet};

/// Which of our crates a crate may use; a trailing `*` stands for all below.
const TABLE: &[(&str, &[&str])] = &[
    ("weft-ebpf-abi", &[]),
    ("weft-ebpf-logic", &["weft-ebpf-abi"]),
    ("weft-cni-spec", &[]),
    ("weft-cni-netlink", &[]),
    ("weft-cni-ipam", &["weft-cni-spec"]),
    ("weft-cni-plugin", &["weft-cni-*"]),
    ("weft-agent-dataplane", &["weft-ebpf-*", "weft-cni-netlink"]),
    ("weft-agent-runtime", &["weft-agent-runtime-init", "weft-cni-spec", "weft-cni-netlink"]),
    ("weft-agent-runtime-init", &[]),
    ("weft-agent-kubelet", &["weft-agent-runtime", "weft-control-api"]),
    ("weft-agent-dns", &[]),
    ("weft-control-api", &[]),
    ("weft-control-store", &[]),
    ("weft-control-apiserver", &["weft-control-api", "weft-control-store"]),
    ("weft-control-client", &[]),
    ("weft-control-scheduler", &["weft-control-api", "weft-control-client"]),
    ("weft-control-controllers", &["weft-control-api", "weft-control-client"]),
    ("weft-control-weft", &["weft-*"]),
    ("weft-tests-*", &["weft-*"]),
];

/// Compares the table with what cargo says.
pub(crate) fn check() -> anyhow::Result<()> {
    let metadata = quiet(&mut cargo(&["metadata", "--format-version", "1", "--no-deps"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let wrong = violations(&uses(&metadata));
    if wrong.is_empty() {
        return Ok(());
    }
    bail!("the dependency table forbids:\n  {}", wrong.join("\n  "))
}

/// Each of our crates with the crates of ours that it uses, tests aside.
fn uses(metadata: &serde_json::Value) -> BTreeMap<String, Vec<String>> {
    let mut uses = BTreeMap::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default().to_owned();
        let dependencies = package["dependencies"].as_array().into_iter().flatten();
        let ours = dependencies
            .filter(|dependency| dependency["kind"].as_str() != Some("dev"))
            .filter_map(|dependency| dependency["name"].as_str())
            .filter(|name| name.starts_with("weft-"))
            .map(str::to_owned)
            .collect();
        uses.insert(name, ours);
    }
    uses
}

fn violations(uses: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, used) in uses {
        let rule = TABLE.iter().find(|(pattern, _)| covers(pattern, name));
        let Some((_, allowed)) = rule else {
            wrong.push(format!("{name} isn't in the table"));
            continue;
        };
        for dependency in used {
            if !allowed.iter().any(|pattern| covers(pattern, dependency)) {
                wrong.push(format!("{name} must not use {dependency}"));
            }
        }
    }
    wrong
}

fn covers(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &str, used: &str) -> Vec<String> {
        violations(&BTreeMap::from([(name.to_owned(), vec![used.to_owned()])]))
    }

    #[test]
    fn the_table_denies_by_default() {
        assert!(one("weft-ebpf-logic", "weft-ebpf-abi").is_empty());
        assert_eq!(
            one("weft-agent-dns", "weft-control-store"),
            ["weft-agent-dns must not use weft-control-store"]
        );
        assert_eq!(one("weft-new", "weft-ebpf-abi"), ["weft-new isn't in the table"]);
    }
}
