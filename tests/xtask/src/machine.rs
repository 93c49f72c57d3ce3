//! What must be installed on the machine, and how it gets there.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{bail, ensure};

use crate::steps::{cargo, quiet, root, step};

/// To build: a C compiler for the crates that need one, protoc for the etcd client, the eBPF toolchain, a C library for `weft-cni`.
const BUILD_PACKAGES: &[&str] = &[
    "gcc",
    "libc6-dev",
    "protobuf-compiler",
    "libprotobuf-dev",
    "rustc-web",
    "cargo-web",
    "rust-web-src",
    "musl-tools",
];
/// To run the sample and the tests.
const RUN_PACKAGES: &[&str] = &["iproute2", "apt-utils"];
/// Only the tests use these: the reference store, peers to compare with, a second image builder, what looks on.
const TEST_PACKAGES: &[&str] = &[
    "etcd-server",
    "busybox-static",
    "skopeo",
    "iptables",
    "nftables",
    "containernetworking-plugins",
    "containerd",
    "python3",
    "python3-venv",
    "bpftool",
    "conntrack",
    "curl",
    "strace",
];
/// An emulated machine for the tests, what reads its kernel's modules, what makes its disk.
const VM_PACKAGES: &[&str] = &["qemu-system-x86", "kmod", "e2fsprogs"];
const BPF_LINKER: &str = "0.10.3";

/// Fails with one sentence if the machine can't run weft at all.
pub(crate) fn check() -> anyhow::Result<()> {
    ensure!(nix_is_root(), "weft needs root to make network namespaces and load eBPF; run this as root");
    let cgroup2 = ["/sys/fs/cgroup/unified/cgroup.procs", "/sys/fs/cgroup/cgroup.procs"];
    ensure!(
        cgroup2.iter().any(|path| PathBuf::from(path).exists()),
        "no cgroup2 file system is mounted, and eBPF attaches to one; mount it at /sys/fs/cgroup/unified"
    );
    Ok(())
}

fn nix_is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// What building and running take.
pub(crate) fn install_for_up() -> anyhow::Result<()> {
    let mut packages = [BUILD_PACKAGES, RUN_PACKAGES].concat();
    if weft_tests_harness::which("kubectl").is_none() {
        packages.push("kubernetes-client");
    }
    install(&packages)?;
    bpf_linker().map(|_| ())
}

/// What the tests take on top.
pub(crate) fn install_for_tests() -> anyhow::Result<()> {
    install_for_up()?;
    install(TEST_PACKAGES)
}

/// What `cargo xtask vm` takes on top.
pub(crate) fn install_for_vm() -> anyhow::Result<()> {
    install(VM_PACKAGES)
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    ensure!(
        nix_is_root(),
        "these Debian packages are missing and only root can install them: {}",
        missing.join(" ")
    );
    step(&format!("install {}", missing.join(" ")), || {
        quiet(Command::new("apt-get").args(["update", "-qq"]))?;
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        // A package that starts a daemon at installation is of no use here.
        command.env("RUNLEVEL", "1");
        command.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing);
        quiet(&mut command).map(|_| ())
    })
}

fn installed(package: &str) -> bool {
    let query = Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}", package]).output();
    query.is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}

/// The linker for eBPF programs, installed below `target/tools` unless it is on PATH.
pub(crate) fn bpf_linker() -> anyhow::Result<PathBuf> {
    if let Some(path) = weft_tests_harness::which("bpf-linker") {
        return Ok(path);
    }
    let tools = root().join("target").join("tools");
    let path = tools.join("bin").join("bpf-linker");
    if !path.is_file() {
        step("install bpf-linker", || {
            let mut command =
                cargo(&["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--root"]);
            quiet(command.arg(&tools)).map(|_| ())
        })?;
    }
    if !path.is_file() {
        bail!("cargo install bpf-linker left no {}", path.display());
    }
    Ok(path)
}
