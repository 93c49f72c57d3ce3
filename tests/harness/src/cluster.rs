//! A cluster of the real binary in a network namespace of the test's own.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::sethostname;

use crate::netns::Netns;
use crate::{wait_until, weft_binary};

/// A running cluster; everything it made is gone after [`Cluster::purge`] or drop.
#[derive(Debug)]
pub struct Cluster {
    /// The namespace that stands for the machine.
    pub netns: Netns,
    data: tempfile::TempDir,
    process: Option<Child>,
    extra: Vec<String>,
    /// Another binary than the one under test.
    binary: Option<PathBuf>,
}

impl Cluster {
    /// Starts `weft up` with further flags and waits until every node is Ready.
    ///
    /// # Errors
    /// If it doesn't get there; the error carries the end of its log.
    pub fn start(label: &str, flags: &[&str]) -> anyhow::Result<Self> {
        let mut cluster = Self::unstarted(label, flags)?;
        cluster.up()?;
        Ok(cluster)
    }

    /// A namespace and an empty data directory, for a caller that starts the process itself.
    ///
    /// # Errors
    /// If they can't be made.
    pub fn unstarted(label: &str, flags: &[&str]) -> anyhow::Result<Self> {
        let data = tempfile::Builder::new().prefix("weft-").tempdir().context("make a data directory")?;
        let netns = Netns::new(label)?;
        let extra = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Ok(Self { netns, data, process: None, extra, binary: None })
    }

    /// Starts the process (again, after a kill) and waits until the API and the nodes are ready.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn up(&mut self) -> anyhow::Result<()> {
        self.spawn()?;
        self.wait_ready()
    }

    /// Starts the process without waiting.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn spawn(&mut self) -> anyhow::Result<()> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log())?;
        let mut command = self.weft()?;
        let hostname = self.hostname();
        // A node is named after its host, and its cgroup after the node: clusters of one name would take each other's pods for
        // left-overs.
        // SAFETY: both are bare system calls, and the name was allocated before the fork.
        unsafe {
            command.pre_exec(move || {
                unshare(CloneFlags::CLONE_NEWUTS)?;
                sethostname(&hostname)?;
                Ok(())
            });
        }
        command.arg("up").args(&self.extra).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.process = Some(command.spawn().context("start weft up")?);
        Ok(())
    }

    /// The machine's name, and so that of a single node. Short: names of devices are made from it.
    pub fn hostname(&self) -> String {
        let number = self.netns.name().rsplit('-').next().unwrap_or_default();
        format!("w{:x}-{number}", std::process::id())
    }

    /// Waits until `kubectl wait` sees every node Ready.
    ///
    /// # Errors
    /// If the process ends, or 60 seconds pass.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        let waited = wait_until("every node is Ready", Duration::from_secs(60), || {
            if let Some(status) = self.process.as_mut().and_then(|process| process.try_wait().transpose()) {
                bail!("weft up ended: {}", status?);
            }
            if !self.kubeconfig().exists() {
                return Ok(None);
            }
            let nodes = self.kubectl(&[
                "get",
                "nodes",
                "-o",
                "jsonpath={.items[*].status.conditions[?(@.type==\"Ready\")].status}",
            ])?;
            let ready: Vec<&str> = nodes.split_whitespace().collect();
            let wanted = self.node_count();
            Ok((ready.len() == wanted && ready.iter().all(|status| *status == "True")).then_some(()))
        });
        waited.map_err(|error| error.context(self.log_tail()))
    }

    fn node_count(&self) -> usize {
        let position = self.extra.iter().position(|flag| flag == "--nodes");
        position.and_then(|at| self.extra.get(at + 1)).and_then(|count| count.parse().ok()).unwrap_or(1)
    }

    /// The process of `weft up`, to be killed by a test.
    pub fn process(&mut self) -> Option<&mut Child> {
        self.process.as_mut()
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        self.data.path()
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.data.path().join("admin.kubeconfig")
    }

    fn log(&self) -> PathBuf {
        self.data.path().join("up.log")
    }

    /// Whether weft has said something, anywhere in its log.
    pub fn says(&self, text: &str) -> bool {
        std::fs::read_to_string(self.log()).is_ok_and(|log| log.contains(text))
    }

    /// The last lines of what weft said.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Has all that is run from now on be of this binary.
    pub fn use_binary(&mut self, binary: PathBuf) {
        self.binary = Some(binary);
    }

    /// `weft` in the cluster's namespace, with its data directory.
    ///
    /// # Errors
    /// If there is no binary or namespace.
    pub fn weft(&self) -> anyhow::Result<Command> {
        let binary = match &self.binary {
            Some(binary) => binary.clone(),
            None => weft_binary().map_err(anyhow::Error::msg)?,
        };
        let mut command = self.netns.command(binary)?;
        command.arg("--data-dir").arg(self.data.path());
        Ok(command)
    }

    /// A `kubectl` command in the cluster's namespace.
    ///
    /// # Errors
    /// If the namespace is gone.
    pub fn kubectl_command(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.netns.command("kubectl")?;
        command.env("KUBECONFIG", self.kubeconfig()).env("HOME", self.data.path()).args(args);
        Ok(command)
    }

    /// Runs kubectl and answers its standard output.
    ///
    /// # Errors
    /// If it fails, with what it said on standard error.
    pub fn kubectl(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.kubectl_command(args)?.stdin(Stdio::null()).output().context("run kubectl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {}", args.join(" "), said.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs kubectl, which must fail, and answers its standard error.
    ///
    /// # Errors
    /// If it succeeds.
    pub fn kubectl_fails(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.kubectl_command(args)?.stdin(Stdio::null()).output().context("run kubectl")?;
        ensure!(!output.status.success(), "kubectl {} succeeded", args.join(" "));
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Applies a manifest given as text.
    ///
    /// # Errors
    /// If kubectl fails.
    pub fn apply(&self, manifest: &str) -> anyhow::Result<String> {
        let path = self.data.path().join(format!("apply-{}.yaml", fingerprint(manifest)));
        std::fs::write(&path, manifest)?;
        self.kubectl(&["apply", "-f", &path.to_string_lossy()])
    }

    /// Imports an image archive into every node.
    ///
    /// # Errors
    /// If `weft image import` fails.
    pub fn import(&self, archive: &Path) -> anyhow::Result<()> {
        let output = self.weft()?.args(["image", "import"]).arg(archive).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "weft image import: {}", said.trim());
        Ok(())
    }

    /// Ends the cluster and removes all that it made.
    ///
    /// # Errors
    /// If `weft down --purge` fails.
    pub fn purge(&mut self) -> anyhow::Result<()> {
        let output = self.weft()?.args(["down", "--purge"]).output().context("run weft down")?;
        if let Some(mut process) = self.process.take() {
            process.wait()?;
        }
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "weft down --purge: {}", said.trim());
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.purge() {
            eprintln!("purge: {error:#}\n{}", self.log_tail());
        }
    }
}

fn fingerprint(text: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
