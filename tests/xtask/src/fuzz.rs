//! Fuzzing by libFuzzer, with the stable compiler: coverage comes from LLVM's own pass, not from a sanitizer.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};

use crate::artifacts::host_triple;
use crate::steps::{cargo, loud, quiet, root, step, target};

/// What libFuzzer reads: counters of edges, where they are, and what is compared with what.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks --cfg fuzzing";
/// An input that takes so long has found something.
const TIMEOUT_SECONDS: &str = "-timeout=20";
/// A megabyte of input must not become gigabytes.
const MEMORY_MB: &str = "-rss_limit_mb=2048";
const LONGEST_INPUT: &str = "-max_len=8192";

/// Fuzzes one target, or each in turn, for some seconds. Inputs that reach new code are kept in `target/fuzz/corpus` for the next
/// run; one that finds a mistake is kept in `target/fuzz/found`, and is the error.
pub(crate) fn run(name: Option<&str>, seconds: u64) -> anyhow::Result<()> {
    let corpus = root().join("tests/fuzz/corpus");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&corpus).with_context(|| format!("cannot read {}", corpus.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    if let Some(name) = name {
        ensure!(names.iter().any(|known| known == name), "no target {name}; there are {}", names.join(" "));
        names.retain(|known| known == name);
    }
    let program = build()?;
    let mut failed = Vec::new();
    for name in &names {
        if let Err(error) = fuzz(&program, name, &corpus.join(name), seconds) {
            eprintln!("{name}: {error:#}");
            failed.push(name.as_str());
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("mistakes in {}; see target/fuzz/found", failed.join(" ")) }
}

fn build() -> anyhow::Result<std::path::PathBuf> {
    let (host, folder) = (host_triple()?, target("fuzz")?);
    step("build the fuzzer", || {
        // The host's triple is named so that build scripts and macros are not instrumented.
        let mut command =
            cargo(&["build", "-p", "weft-tests-fuzz", "--features", "engine", "--bin", "weft-fuzz"]);
        command.args(["--target", &host, "--target-dir"]).arg(&folder).env("RUSTFLAGS", COVERAGE);
        quiet(&mut command).map(|_| ())
    })?;
    Ok(folder.join(&host).join("debug").join("weft-fuzz"))
}

fn fuzz(program: &Path, name: &str, seeds: &Path, seconds: u64) -> anyhow::Result<()> {
    let (kept, found) = (target(&format!("fuzz/corpus/{name}"))?, target("fuzz/found")?);
    let seed =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs() % 1_000_000 + 1);
    let mut command = std::process::Command::new(program);
    command.env("WEFT_FUZZ_TARGET", name).args([
        TIMEOUT_SECONDS,
        MEMORY_MB,
        LONGEST_INPUT,
        "-print_final_stats=1",
    ]);
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-seed={seed}"));
    command.arg(format!("-artifact_prefix={}/{name}-", found.display())).arg(&kept).arg(seeds);
    step(&format!("fuzz {name} for {seconds} s"), || loud(&mut command))
}
