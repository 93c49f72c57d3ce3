//! Carries the node's static programs and the eBPF object into the binary, where `cargo xtask` has built them.
//!
//! `WEFT_ARTIFACTS` names the folder they lie in. Without it the binary builds all the same and says at run time what it lacks.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-env-changed=WEFT_ARTIFACTS");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let folder = env::var_os("WEFT_ARTIFACTS").map(PathBuf::from);
    let mut source = String::new();
    for (name, file) in [("WEFT_INIT", "weft-init"), ("WEFT_CNI", "weft-cni"), ("EBPF", "weft.bpf.o")] {
        let found = folder.as_deref().map(|folder| folder.join(file)).filter(|path| path.is_file());
        source.push_str(&constant(name, found.as_deref())?);
    }
    fs::write(out.join("embedded.rs"), source)
}

/// One constant: the bytes of the artifact, or nothing.
fn constant(name: &str, found: Option<&Path>) -> std::io::Result<String> {
    let Some(path) = found else {
        return Ok(format!("const {name}: Option<&[u8]> = None;\n"));
    };
    let path = fs::canonicalize(path)?;
    println!("cargo::rerun-if-changed={}", path.display());
    Ok(format!("const {name}: Option<&[u8]> = Some(include_bytes!({:?}));\n", path))
}
