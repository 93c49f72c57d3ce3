//! All tests, and everything else that a change must pass.

use std::fs;

use anyhow::Context as _;

use crate::steps::{cargo, loud, quiet, step, target};
use crate::{artifacts, images, layers, machine};

/// Builds what the tests need, runs them all, and tells what was skipped and why.
pub(crate) fn test(args: &[String]) -> anyhow::Result<()> {
    let is_root = machine::check().is_ok();
    if is_root {
        machine::install_for_tests()?;
        artifacts::build_all(false)?;
        images::build_all()?;
        images::build_for_tests()?;
    } else {
        eprintln!("     not root, or no cgroup2: tests that need them are skipped");
    }
    let skip_log = target("")?.join("skipped-tests.txt");
    let _ = fs::remove_file(&skip_log);
    let mut command = cargo(&["test", "--workspace", "--no-fail-fast"]);
    command.env("WEFT_SKIP_LOG", &skip_log).env("WEFT_ARTIFACTS", target("artifacts")?);
    command.env("WEFT_IMAGES", target("images")?);
    // Cargo runs each test program by this one, which ends it when it hangs.
    let runner = std::env::current_exe().context("find this program")?;
    command
        .arg("--config")
        .arg(format!("target.'cfg(all())'.runner = ['{}', 'run-test']", runner.display()))
        .args(args);
    let outcome = loud(&mut command);
    report_skips(&skip_log)?;
    outcome
}

fn report_skips(log: &std::path::Path) -> anyhow::Result<()> {
    let skipped = fs::read_to_string(log).unwrap_or_default();
    if skipped.is_empty() {
        eprintln!("no test was skipped");
        return Ok(());
    }
    let mut lines: Vec<&str> = skipped.lines().collect();
    lines.sort_unstable();
    eprintln!("{} skipped:", lines.len());
    for line in lines {
        eprintln!("  {line}");
    }
    Ok(())
}

/// Format, clippy, layers, docs; then all tests, where every skip is a failure.
pub(crate) fn ci() -> anyhow::Result<()> {
    machine::check()?;
    machine::install_for_tests()?;
    step("format", || quiet(&mut cargo(&["fmt", "--all", "--check"])).map(|_| ()))?;
    step("layers", layers::check)?;
    step("clippy", || {
        let args = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
        quiet(&mut cargo(&args)).map(|_| ())
    })?;
    step("docs", || {
        let mut command = cargo(&["doc", "--workspace", "--no-deps", "--quiet"]);
        quiet(command.env("RUSTDOCFLAGS", "-D warnings")).map(|_| ())
    })?;
    let program = std::env::current_exe().context("find this program")?;
    // The same command as the README's, in an environment that turns skips into failures.
    loud(std::process::Command::new(program).arg("test").env("WEFT_REQUIRE", "all"))
}

/// Builds everything in release mode and measures.
pub(crate) fn bench(args: &[String]) -> anyhow::Result<()> {
    machine::check()?;
    machine::install_for_tests()?;
    artifacts::build_all(true)?;
    images::build_all()?;
    artifacts::run_bench(args)
}
