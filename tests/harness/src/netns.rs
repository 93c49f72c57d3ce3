//! A network namespace that a test makes, runs programs in, and removes.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, ensure};
use nix::sched::{CloneFlags, setns};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A namespace with its loopback up; removed on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace with a name of its own.
    ///
    /// # Errors
    /// If `ip netns add` fails (not root, no iproute2).
    pub fn new(label: &str) -> anyhow::Result<Self> {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("wt-{label}-{}-{number}", std::process::id());
        let netns = Self { name };
        ip(&["netns", "add", &netns.name])?;
        ip(&["-n", &netns.name, "link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// The namespace's name, for `ip -n`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that keeps the namespace.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// A command that will run within the namespace.
    ///
    /// # Errors
    /// If the namespace's file can't be opened.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> anyhow::Result<Command> {
        command_in(&self.path(), program)
    }

    /// A thread that runs within the namespace.
    ///
    /// # Errors
    /// If the namespace's file can't be opened. A thread that can't enter it answers so as its own error.
    pub fn thread<T: Send + 'static>(
        &self,
        body: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<JoinHandle<anyhow::Result<T>>> {
        let namespace = std::fs::File::open(self.path()).context("open the namespace")?;
        Ok(std::thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).context("enter the namespace")?;
            body()
        }))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.name]);
    }
}

/// A command that will run within the network namespace that a file stands for.
///
/// # Errors
/// If the file can't be opened.
pub fn command_in(namespace: &Path, program: impl AsRef<std::ffi::OsStr>) -> anyhow::Result<Command> {
    let namespace = std::fs::File::open(namespace).context("open the namespace")?;
    let mut command = Command::new(program);
    // SAFETY: setns is async-signal-safe and the file outlives the closure, which owns it.
    unsafe {
        command.pre_exec(move || setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(Into::into));
    }
    Ok(command)
}

/// Runs `ip` with some arguments.
///
/// # Errors
/// If it doesn't succeed, with what it said.
pub fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output().context("run ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", args.join(" "), said.trim());
    Ok(())
}
