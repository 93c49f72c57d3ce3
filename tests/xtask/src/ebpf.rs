//! Builds the eBPF programs: `ebpf/programs` for `bpfel-unknown-none`, with `core` from source.

mod slim;
mod stack;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::artifacts::place;
use crate::steps::quiet;

const TARGET: &str = "bpfel-unknown-none";
/// The LLVM that bpf-linker 0.10 is built for: compiler and linker exchange its bitcode.
const LLVM_MAJOR: &str = "22";

/// A compiler that can build `core`: its programs, and what it needs in the environment.
struct Toolchain {
    cargo: PathBuf,
    rustc: Option<PathBuf>,
    toolchain: Option<&'static str>,
}

/// Builds the programs into one object at `out`, and those of the benchmarks into `bench.bpf.o` beside it.
///
/// # Errors
/// If a tool is missing, with how to get it, or if the compiler refuses the programs.
pub(crate) fn build(root: &Path, out: &Path) -> anyhow::Result<()> {
    let linker = linker(root)?;
    let toolchain = toolchain()?;
    let llvm = llvm_folder().context(
        "no libLLVM 22 was found; bpf-linker needs one, and rustup's stable toolchain (1.95 or newer) has it: rustup toolchain install stable",
    )?;
    let target_folder = root.join("target").join("ebpf");
    let mut command = Command::new(&toolchain.cargo);
    command
        .args(["build", "--release", "--locked", "-Z", "build-std=core", "--target", TARGET])
        .current_dir(root.join("ebpf/programs"))
        .env("CARGO_TARGET_DIR", &target_folder)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags())
        .env("LD_LIBRARY_PATH", &llvm)
        .env("PATH", path_with(&linker)?)
        // Set by the cargo that runs this; they would lead another cargo back to it.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .env_remove("RUSTFLAGS");
    if let Some(rustc) = &toolchain.rustc {
        command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
    }
    if let Some(name) = toolchain.toolchain {
        command.env("RUSTUP_TOOLCHAIN", name).env_remove("RUSTC");
    }
    quiet(&mut command)?;
    let built = target_folder.join(TARGET).join("release");
    place(&built.join("weft-bench"), &out.with_file_name("bench.bpf.o"))?;
    let programs = built.join("weft");
    let object = fs::read(&programs).with_context(|| format!("cannot read {}", programs.display()))?;
    stack::check(&object)?;
    let slim = target_folder.join("weft.bpf.o");
    fs::write(&slim, slim::without_debug(&object)?)
        .with_context(|| format!("cannot write {}", slim.display()))?;
    place(&slim, out)
}

fn rustflags() -> String {
    let architecture = format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH);
    [
        architecture.as_str(),
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        // Otherwise a copy or a fill of 3 bytes is a call of a loop over bytes, and a frame of stack.
        "-Clink-arg=--disable-expand-memcpy-in-order",
        // Linux 6.1 refuses a loop whose end falls through to its beginning, as LLVM lays them out.
        "-Clink-arg=--llvm-args=--disable-block-placement",
    ]
    .join("\x1f")
}

/// PATH, with the linker's folder in front.
fn path_with(linker: &Path) -> anyhow::Result<std::ffi::OsString> {
    let mut folders = vec![linker.parent().context("bpf-linker has no folder")?.to_owned()];
    folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    std::env::join_paths(folders).context("PATH can't be extended")
}

fn linker(root: &Path) -> anyhow::Result<PathBuf> {
    let own = root.join("target/tools/bin/bpf-linker");
    if own.is_file() {
        return Ok(own);
    }
    weft_tests_harness::which("bpf-linker").with_context(|| {
        format!(
            "bpf-linker is missing: cargo install bpf-linker --version 0.10.3 --locked --root {}",
            root.join("target/tools").display()
        )
    })
}

/// Debian's rustc-web with the sources of `core`, or rustup's nightly with rust-src.
fn toolchain() -> anyhow::Result<Toolchain> {
    let (rustc, cargo) = (PathBuf::from("/usr/bin/rustc"), PathBuf::from("/usr/bin/cargo"));
    if rustc.is_file()
        && cargo.is_file()
        && has_core(&rustc, &[])
        && llvm_version(&rustc, &[]).as_deref() == Some(LLVM_MAJOR)
    {
        return Ok(Toolchain { cargo, rustc: Some(rustc), toolchain: None });
    }
    if let Some(rustup) = weft_tests_harness::which("rustup") {
        let run = ["run", "nightly", "rustc"];
        if has_core(&rustup, &run) && llvm_version(&rustup, &run).as_deref() == Some(LLVM_MAJOR) {
            let cargo = weft_tests_harness::which("cargo").context("rustup is here, but no cargo")?;
            return Ok(Toolchain { cargo, rustc: None, toolchain: Some("nightly") });
        }
    }
    bail!(
        "no compiler with LLVM {LLVM_MAJOR} and the sources of core was found: apt-get install rustc-web cargo-web rust-web-src, \
         or rustup toolchain install nightly --component rust-src"
    )
}

fn ask(program: &Path, before: &[&str], question: &[&str]) -> Option<String> {
    let output =
        Command::new(program).args(before).args(question).env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn has_core(program: &Path, before: &[&str]) -> bool {
    let Some(sysroot) = ask(program, before, &["--print", "sysroot"]) else { return false };
    let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
    library.join("Cargo.toml").is_file()
}

fn llvm_version(program: &Path, before: &[&str]) -> Option<String> {
    let said = ask(program, before, &["-vV"])?;
    let version = said.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next().map(str::to_owned)
}

/// A folder with the libLLVM that bpf-linker loads: that of rustup's toolchains, or the system's.
fn llvm_folder() -> Option<PathBuf> {
    let mut folders = Vec::new();
    if let Some(rustup) = weft_tests_harness::which("rustup") {
        for toolchain in ["stable", "nightly"] {
            let sysroot = ask(&rustup, &["run", toolchain, "rustc"], &["--print", "sysroot"]);
            folders.extend(sysroot.map(|s| PathBuf::from(s.trim()).join("lib")));
        }
    }
    folders.extend(
        [format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH), "/usr/lib64".to_owned()]
            .map(PathBuf::from),
    );
    folders.into_iter().find(|folder| has_llvm(folder))
}

fn has_llvm(folder: &Path) -> bool {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    names.map(|entry| entry.file_name().to_string_lossy().into_owned()).any(|name| {
        name.starts_with(&format!("libLLVM.so.{LLVM_MAJOR}"))
            || name.starts_with(&format!("libLLVM-{LLVM_MAJOR}"))
    })
}
