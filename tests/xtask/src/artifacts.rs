//! `target/artifacts`: the two static programs, the eBPF object, and `weft` itself, which carries them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::steps::{cargo, loud, quiet, step, target};
use crate::{ebpf, machine, musl};

const STATIC_PROGRAMS: [(&str, &str); 2] =
    [("weft-agent-runtime-init", "weft-init"), ("weft-cni-plugin", "weft-cni")];
/// What the network tests run in pods; it becomes an image.
const PROBE: (&str, &str) = ("weft-tests-probe", "weft-probe");

/// Builds everything; answers the path of `weft`.
pub(crate) fn build_all(release: bool) -> anyhow::Result<PathBuf> {
    step("build weft-init and weft-cni", || build_static(&STATIC_PROGRAMS, release))?;
    build_ebpf()?;
    let artifacts = target("artifacts")?;
    let (profile, folder) = if release { ("release", "release") } else { ("dev", "debug") };
    step(&format!("build weft ({profile})"), || {
        let mut command = cargo(&["build", "-p", "weft-control-weft", "--profile", profile]);
        quiet(command.env("WEFT_ARTIFACTS", &artifacts)).map(|_| ())
    })?;
    let weft = artifacts.join("weft");
    let built = target("")?.join(folder).join("weft");
    place(&built, &weft)?;
    Ok(weft)
}

/// Builds the eBPF object; answers its path.
pub(crate) fn build_ebpf() -> anyhow::Result<PathBuf> {
    let object = target("artifacts")?.join("weft.bpf.o");
    machine::bpf_linker()?;
    step("build the eBPF programs", || ebpf::build(&crate::steps::root(), &object))?;
    Ok(object)
}

/// Builds the program that the network tests run in pods.
pub(crate) fn build_probe() -> anyhow::Result<()> {
    step("build weft-probe", || build_static(&[PROBE], false))
}

/// A release's `weft-cni` is on musl, where that can be had: it takes minutes the first time.
fn build_static(programs: &[(&str, &str)], release: bool) -> anyhow::Result<()> {
    let host = host_triple()?;
    let folder = target("static")?;
    let artifacts = target("artifacts")?;
    for (package, program) in programs {
        if release && *program == "weft-cni" {
            if let Some(built) = musl::build(package, program)? {
                place(&built, &artifacts.join(program))?;
                continue;
            }
            eprintln!(
                "weft-cni starts slower: it is on glibc, as neither rustup's musl target nor musl-tools is here"
            );
        }
        // The host's triple is named so that build scripts and macros keep their own flags.
        let mut command =
            cargo(&["build", "-p", package, "--profile", "tiny", "--target", &host, "--target-dir"]);
        command.arg(&folder).env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static");
        quiet(&mut command)?;
        place(&folder.join(&host).join("tiny").join(program), &artifacts.join(program))?;
    }
    Ok(())
}

pub(crate) fn host_triple() -> anyhow::Result<String> {
    let version = quiet(std::process::Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}

/// Copies unless the content is the same: a new time stamp would build `weft` again.
pub(crate) fn place(from: &Path, to: &Path) -> anyhow::Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|present| present == content) {
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let fresh = to.with_extension("new");
    fs::copy(from, &fresh).with_context(|| format!("cannot write {}", fresh.display()))?;
    fs::rename(&fresh, to).with_context(|| format!("cannot write {}", to.display()))
}

/// Runs the benchmark's binary, built in release mode.
pub(crate) fn run_bench(args: &[String]) -> anyhow::Result<()> {
    let mut command = cargo(&["run", "--release", "-p", "weft-tests-bench", "--"]);
    loud(command.args(args).env("WEFT_ARTIFACTS", target("artifacts")?))
}
