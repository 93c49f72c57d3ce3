//! The test programs that cargo builds, and where they lie.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::Value;

use crate::checks::cargo_test;
use crate::steps::{quiet, root};

/// Test programs by package folder and name.
pub(super) struct Built(HashMap<(PathBuf, String), PathBuf>);

/// Builds the test programs of these names, with the features that they have in `cargo xtask test`: of all of the workspace.
pub(super) fn build(names: &[&str]) -> anyhow::Result<Built> {
    let mut command = cargo_test()?;
    command.args(["--no-run", "--message-format", "json"]);
    command.args(names.iter().flat_map(|name| ["--test", name]));
    let messages = quiet(&mut command)?;
    Ok(Built(messages.lines().filter_map(|line| artifact(line, &root())).collect()))
}

impl Built {
    pub(super) fn program(&self, package: &str, test: &str) -> anyhow::Result<PathBuf> {
        let found = self.0.get(&(PathBuf::from(package), test.to_owned()));
        found.cloned().with_context(|| format!("cargo built no test program {test} in {package}"))
    }
}

/// A test program by one of cargo's messages, if it is about one.
fn artifact(message: &str, root: &Path) -> Option<((PathBuf, String), PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    let executable = PathBuf::from(message["executable"].as_str()?);
    let is_test = message["target"]["kind"].as_array()?.iter().any(|kind| kind == "test");
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?.strip_prefix(root).ok()?;
    let name = message["target"]["name"].as_str()?.to_owned();
    is_test.then(|| ((folder.to_owned(), name), executable))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_known_by_their_package() {
        let message = r#"{"reason":"compiler-artifact","manifest_path":"/w/agent/runtime/Cargo.toml",
            "target":{"kind":["test"],"name":"builtin"},"executable":"/w/target/debug/deps/builtin-1"}"#;
        let (key, path) = artifact(message, Path::new("/w")).unwrap();
        assert_eq!(key, (PathBuf::from("agent/runtime"), "builtin".to_owned()));
        assert_eq!(path, Path::new("/w/target/debug/deps/builtin-1"));
        assert!(artifact(&message.replace(r#"["test"]"#, r#"["bin"]"#), Path::new("/w")).is_none());
        assert!(artifact(r#"{"reason":"build-finished","success":true}"#, Path::new("/w")).is_none());
    }
}
