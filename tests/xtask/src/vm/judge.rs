//! Reads what a machine said: which tests passed, and whatever must make the step fail.

use std::path::Path;

use anyhow::bail;

use super::boots::Run;
use super::emulator::Said;
use super::job::{Mark, Program};

/// How much of what was said a failure repeats.
const TAIL_LINES: usize = 80;

/// A judgement of a machine.
pub(super) struct Outcome {
    /// For each program a line, and one for each test that was skipped.
    pub(super) summary: Vec<String>,
    /// What is wrong; nothing if all went well.
    pub(super) wrong: Vec<String>,
}

/// What one program said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Section {
    program: String,
    lines: Vec<String>,
    skips: Vec<String>,
    /// Whether it came to its end, and what was wrong then.
    end: Option<Option<String>>,
}

/// The numbers that a test program ends with.
#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
    ignored: usize,
}

/// Fails if anything was wrong, and says where all can be read.
pub(super) fn verdict(wrong: &[String], folder: &Path) -> anyhow::Result<()> {
    if wrong.is_empty() {
        return Ok(());
    }
    bail!("{}\nall that it said is in {}", wrong.join("\n"), folder.display())
}

/// Judges what a machine said that had these runs to do, each as one of the programs.
pub(super) fn judge(runs: &[&Run], programs: &[Program], said: &Said) -> Outcome {
    let (sections, done) = sections(&said.output);
    let mut outcome = Outcome { summary: Vec::new(), wrong: Vec::new() };
    for (run, program) in runs.iter().zip(programs) {
        match sections.iter().find(|section| section.program == run.name) {
            Some(section) => judge_run(run, &program.tests, section, &mut outcome),
            None => outcome.wrong.push(format!("{} was not begun", run.name)),
        }
    }
    if said.late {
        outcome.wrong.push("the machine was not done at its deadline, and was ended".to_owned());
    }
    if !done {
        let console: Vec<&str> = said.console.lines().collect();
        outcome
            .wrong
            .push(format!("the machine went off too early; its kernel said at last:\n{}", tail(&console)));
    }
    outcome
}

fn judge_run(run: &Run, tests: &[String], section: &Section, outcome: &mut Outcome) {
    let Some(count) = count(&section.lines) else {
        let last = tail(&section.lines);
        outcome.wrong.push(format!("{} told no result; it said at last:\n{last}", run.name));
        return;
    };
    let skipped = section.skips.len();
    outcome.summary.push(format!(
        "{}: {} passed, {} failed, {skipped} skipped, {} ignored",
        run.name,
        count.passed.saturating_sub(skipped),
        count.failed,
        count.ignored
    ));
    for skip in &section.skips {
        match run.lacks.iter().find(|(need, _)| needs(skip, need)) {
            Some((_, reason)) => outcome.summary.push(format!("  {skip}; expected: {reason}")),
            None => {
                outcome.wrong.push(format!("{} skipped a test that runs in such a machine: {skip}", run.name))
            }
        }
    }
    for name in tests {
        let ran = section.lines.iter().any(|line| line.starts_with("test ") && line.contains(name.as_str()));
        if !ran {
            outcome.wrong.push(format!("{} has no test {name}", run.name));
        }
    }
    if count.passed <= skipped && count.failed == 0 {
        outcome.wrong.push(format!("{} ran no test", run.name));
    }
    match &section.end {
        None => outcome.wrong.push(format!("{} did not come to its end", run.name)),
        Some(None) if count.failed == 0 => {}
        Some(wrong) => {
            let why = wrong.as_deref().unwrap_or("tests failed");
            outcome.wrong.push(format!("{}: {why}\n{}", run.name, tail(failures(&section.lines))));
        }
    }
}

/// Whether a skipped test's line names this need.
fn needs(skip: &str, need: &str) -> bool {
    skip.split_once(": needs ").is_some_and(|(_, rest)| rest.starts_with(&format!("{need}:")))
}

/// Cuts the output into the programs' parts, and says whether the machine did all.
fn sections(output: &str) -> (Vec<Section>, bool) {
    let mut sections: Vec<Section> = Vec::new();
    let mut done = false;
    for line in output.lines() {
        match (Mark::read(line), sections.last_mut()) {
            (Some(Mark::Begin { program }), _) => sections.push(Section { program, ..Section::default() }),
            (Some(Mark::Done), _) => done = true,
            (Some(Mark::Skip { line }), Some(section)) => section.skips.push(line),
            (Some(Mark::End { wrong, .. }), Some(section)) => section.end = Some(wrong),
            (None, Some(section)) => section.lines.push(line.to_owned()),
            (Some(Mark::Skip { .. } | Mark::End { .. }) | None, None) => {}
        }
    }
    (sections, done)
}

/// The numbers of the line that every test program ends with, if it came to that.
fn count(lines: &[String]) -> Option<Count> {
    let result = lines.iter().rev().find_map(|line| line.strip_prefix("test result: "))?;
    let parts: Vec<&str> = result.split([';', '.']).map(str::trim).collect();
    let number = |what: &str| parts.iter().find_map(|part| part.strip_suffix(what)?.trim().parse().ok());
    Some(Count { passed: number("passed")?, failed: number("failed")?, ignored: number("ignored")? })
}

/// What a test program says of its failures, or all if it doesn't.
fn failures(lines: &[String]) -> &[String] {
    lines.iter().position(|line| line == "failures:").map_or(lines, |first| &lines[first..])
}

fn tail<T: AsRef<str>>(lines: &[T]) -> String {
    let last = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    last.iter().map(|line| format!("  {}", line.as_ref())).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests;
