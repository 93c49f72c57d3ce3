//! All tests, and everything else that a change must pass.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};

use crate::steps::{cargo, loud, quiet, step, target};
use crate::{artifacts, images, layers, machine, vm};

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
    let mut command = cargo_test()?;
    command.arg("--no-fail-fast").env("WEFT_SKIP_LOG", &skip_log).env("WEFT_IMAGES", target("images")?);
    // Cargo runs each test program by this one, which ends it when it hangs.
    let runner = std::env::current_exe().context("find this program")?;
    command
        .arg("--config")
        .arg(format!("target.'cfg(all())'.runner = ['{}', 'run-test']", runner.display()))
        .args(args);
    let outcome = loud(&mut command);
    // Who names tests wants those alone.
    let machines = if args.is_empty() { in_machines(is_root, &skip_log) } else { Ok(()) };
    report_skips(&skip_log)?;
    outcome.and(machines)
}

/// The tests in emulated machines, or a line in the log of skips.
fn in_machines(is_root: bool, skip_log: &Path) -> anyhow::Result<()> {
    let missing = if is_root { vm::missing() } else { Some("not root".to_owned()) };
    let Some(reason) = missing else { return vm::run_all() };
    let required = std::env::var("WEFT_REQUIRE").unwrap_or_default();
    ensure!(required != "all", "tests in emulated machines can't be skipped here: {reason}");
    let mut log = fs::OpenOptions::new().create(true).append(true).open(skip_log)?;
    writeln!(log, "SKIP tests in emulated machines: {reason}").context("cannot write the log of skips")
}

/// `cargo test` of the whole workspace, with the environment that some of it is built by.
pub(crate) fn cargo_test() -> anyhow::Result<Command> {
    let mut command = cargo(&["test", "--workspace"]);
    command.env("WEFT_ARTIFACTS", target("artifacts")?);
    Ok(command)
}

fn report_skips(log: &Path) -> anyhow::Result<()> {
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
    machine::install_for_vm()?;
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
    loud(Command::new(program).arg("test").env("WEFT_REQUIRE", "all"))
}

/// Builds everything in release mode and measures.
pub(crate) fn bench(args: &[String]) -> anyhow::Result<()> {
    machine::check()?;
    machine::install_for_tests()?;
    artifacts::build_all(true)?;
    images::build_all()?;
    images::build_for_tests()?;
    artifacts::run_bench(args)
}
