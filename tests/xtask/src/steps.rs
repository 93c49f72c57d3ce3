//! Running programs, with the step named while it runs and its output kept for when it fails.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    weft_tests_harness::workspace()
}

/// A folder below `target`, made if it is missing.
pub(crate) fn target(folder: &str) -> anyhow::Result<PathBuf> {
    let path = root().join("target").join(folder);
    std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

/// Runs one long step with a spinner; prints how long it took.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let begin = Instant::now();
    let spinner = ProgressBar::new_spinner();
    if std::io::stderr().is_terminal() {
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            spinner.set_style(style);
        }
        spinner.set_message(name.to_owned());
        spinner.enable_steady_tick(Duration::from_millis(120));
    } else {
        eprintln!("     {name} ...");
    }
    let outcome = work();
    spinner.finish_and_clear();
    let took = begin.elapsed().as_secs_f64();
    let mark = if outcome.is_ok() { "ok  " } else { "FAIL" };
    eprintln!("{mark} {name} ({took:.1} s)");
    outcome
}

/// Runs a program to its end; its output is shown only if it fails.
pub(crate) fn quiet(command: &mut Command) -> anyhow::Result<String> {
    let shown = show(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {shown}"))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().collect();
        let tail = lines[lines.len().saturating_sub(30)..].join("\n");
        bail!("{shown} failed ({}):\n{tail}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program with its output on this terminal.
pub(crate) fn loud(command: &mut Command) -> anyhow::Result<()> {
    let shown = show(command);
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    if status.success() { Ok(()) } else { bail!("{shown} failed ({status})") }
}

/// `cargo` in the workspace, free of what the outer `cargo xtask` set.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(args);
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_") && name != "CARGO_HOME" && name != "CARGO_TERM_COLOR"
            || name == "RUSTUP_TOOLCHAIN"
        {
            command.env_remove(name);
        }
    }
    command
}

fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.truncate(8);
    words.join(" ")
}
