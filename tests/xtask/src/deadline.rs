//! Runs a test program, and ends it when it hangs: a test that waits for ever is a failure that says where it waits.

use std::fs;
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Many times what the longest test program takes on two cores.
const DEADLINE: Duration = Duration::from_mins(10);

/// Runs `command` (a program and its arguments) to its end, or to the deadline.
pub(crate) fn run(command: &[String]) -> anyhow::Result<()> {
    let (program, args) = command.split_first().context("no program to run")?;
    end(Command::new(program).args(args))
}

/// As [`run`], of a command with an environment of its own.
pub(crate) fn end(command: &mut Command) -> anyhow::Result<()> {
    let status = within(command, DEADLINE)?;
    let program = command.get_program().display();
    if status.success() { Ok(()) } else { bail!("{program} failed ({status})") }
}

fn within(command: &mut Command, deadline: Duration) -> anyhow::Result<ExitStatus> {
    let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
    let pid = Pid::from_raw(child.id().try_into()?);
    let (ended, end) = channel();
    let waiter = std::thread::spawn(move || {
        let status = child.wait();
        // The receiver is there for as long as this thread is awaited.
        let _ = ended.send(());
        status
    });
    if end.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout) {
        let threads = threads(pid).join("\n  ");
        kill(pid, Signal::SIGKILL).context("end the test program")?;
        bail!("not done after {} s; its threads and what they wait for:\n  {threads}", deadline.as_secs());
    }
    let status = waiter.join().map_err(|panic| anyhow::anyhow!("the wait broke down: {panic:?}"))?;
    Ok(status?)
}

/// Each thread's name, which begins like its test's, and the kernel function it sleeps in.
fn threads(pid: Pid) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let read = |path: std::path::PathBuf| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    tasks
        .map(|task| format!("{}: {}", read(task.path().join("comm")), read(task.path().join("wchan"))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_ends_by_itself_or_at_the_deadline() {
        let long = Duration::from_secs(60);
        assert_eq!(within(Command::new("sh").args(["-c", "exit 3"]), long).unwrap().code(), Some(3));
        let hung = within(Command::new("sleep").arg("60"), Duration::from_millis(300)).unwrap_err();
        assert!(hung.to_string().contains("sleep: "), "{hung}");
    }
}
