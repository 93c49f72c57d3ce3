//! Static programs on musl: one that lives for a millisecond spends a third of it in what glibc asks the processor when it starts,
//! which a virtual machine answers slowly.
//!
//! With rustup's target (`rustup target add x86_64-unknown-linux-musl`), or with Debian's rustc-web, rust-web-src and musl-tools, for which
//! the standard library is built from source. Without either, glibc does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::steps::{cargo, quiet, target};

const LINKER: &str = "musl-gcc";

/// What makes programs for musl here.
enum Means {
    /// The toolchain that builds the rest.
    Rustup,
    /// Debian's, with the standard library from source.
    Debian,
}

/// Builds a program in the profile `tiny`; `None` if nothing here can.
pub(crate) fn build(package: &str, program: &str) -> anyhow::Result<Option<PathBuf>> {
    let triple = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    let Some(means) = means(&triple) else { return Ok(None) };
    let folder = target("static-musl")?;
    let flags = "-C target-feature=+crt-static -C relocation-model=static";
    let mut command = match means {
        Means::Rustup => {
            let mut command = cargo(&["build"]);
            command.env("RUSTFLAGS", flags);
            command
        }
        Means::Debian => from_source(&triple, flags, &folder)?,
    };
    command.args(["-p", package, "--profile", "tiny", "--target", &triple, "--target-dir"]).arg(&folder);
    quiet(&mut command)?;
    Ok(Some(folder.join(&triple).join("tiny").join(program)))
}

fn means(triple: &str) -> Option<Means> {
    let library = said("rustc", &["--print", "target-libdir", "--target", triple]);
    if library.is_some_and(|library| Path::new(&library).join("self-contained/crt1.o").is_file()) {
        return Some(Means::Rustup);
    }
    let sysroot = said("/usr/bin/rustc", &["--print", "sysroot"])?;
    let source = Path::new(&sysroot).join("lib/rustlib/src/rust/library/std/Cargo.toml");
    (source.is_file() && weft_tests_harness::which(LINKER).is_some()).then_some(Means::Debian)
}

fn said(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn from_source(triple: &str, flags: &str, folder: &Path) -> anyhow::Result<Command> {
    let unwinder = unwinder(folder)?;
    let mut command = Command::new("/usr/bin/cargo");
    command
        .args(["build", "--locked", "-Z", "build-std=std,panic_abort"])
        .current_dir(crate::steps::root())
        .env("RUSTC", "/usr/bin/rustc")
        .env("RUSTC_BOOTSTRAP", "1")
        .env(format!("CARGO_TARGET_{}_LINKER", triple.to_uppercase().replace('-', "_")), LINKER)
        .env("RUSTFLAGS", format!("{flags} -C link-self-contained=no -L native={}", unwinder.display()))
        // Set by the cargo that runs this; they would lead another cargo back to it.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO");
    Ok(command)
}

/// The library that the standard library unwinds with. Debian has none for musl; gcc's does, but asks for a function that only glibc
/// has, to find a faster way.
fn unwinder(folder: &Path) -> anyhow::Result<PathBuf> {
    let unwinder = folder.join("unwinder");
    let archive = unwinder.join("libunwind.a");
    if archive.is_file() {
        return Ok(unwinder);
    }
    fs::create_dir_all(&unwinder).with_context(|| format!("cannot make {}", unwinder.display()))?;
    let (source, object) = (unwinder.join("find.c"), unwinder.join("find.o"));
    let code = "int _dl_find_object(void *address, void *found) { (void)address; (void)found; return -1; }\n";
    fs::write(&source, code).with_context(|| format!("cannot write {}", source.display()))?;
    quiet(Command::new(LINKER).args(["-O2", "-c"]).arg(&source).arg("-o").arg(&object))?;
    quiet(Command::new("ar").arg("rcs").arg(unwinder.join("libfind.a")).arg(&object))?;
    fs::write(&archive, "INPUT(-lgcc_eh -lfind -lc)\n")
        .with_context(|| format!("cannot write {}", archive.display()))?;
    Ok(unwinder)
}
