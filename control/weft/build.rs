//! Carries the node's static programs and the eBPF object into the binary, compressed, where `cargo xtask` has built them; and asks the
//! linker for a small one.
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
    small_link();
    fs::write(out.join("embedded.rs"), source)
}

/// LLD, which stable Rust links with on this target, folds functions of equal code and packs relocations; other linkers don't know
/// these options. Symbols go here, too: cargo leaves them in a package that a profile has an override for.
fn small_link() {
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|v| v == value);
    let lld = is("CARGO_CFG_TARGET_ARCH", "x86_64") && is("CARGO_CFG_TARGET_OS", "linux");
    if lld && is("PROFILE", "release") {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all,--strip-all,-z,pack-relative-relocs");
    }
}

/// zstd's level: a second at build time, and unpacking is as fast as from any other.
const LEVEL: i32 = 19;

/// One constant: the compressed bytes of the artifact, or nothing.
fn constant(name: &str, found: Option<&Path>) -> std::io::Result<String> {
    let Some(path) = found else {
        return Ok(format!("const {name}: Option<Packed> = None;\n"));
    };
    let path = fs::canonicalize(path)?;
    println!("cargo::rerun-if-changed={}", path.display());
    let packed = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join(format!("{name}.zst"));
    fs::write(&packed, zstd::bulk::compress(&fs::read(&path)?, LEVEL)?)?;
    let size = fs::metadata(&path)?.len();
    Ok(format!(
        "const {name}: Option<Packed> = Some(Packed {{ bytes: include_bytes!({packed:?}), unpacked_bytes: {size} }});\n"
    ))
}
