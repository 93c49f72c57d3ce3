//! Upstream's own cluster of one node, to compare with: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, containerd with
//! runc, kubelet and kube-proxy, each with the settings that it has where kubeadm starts it. Nothing of it is part of this project: the
//! programs of Kubernetes lie in the folder that the environment names, the others come from Debian's packages.

mod cgroups;
mod credentials;
mod place;
mod programs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use weft_tests_harness::netns::Netns;
use weft_tests_harness::{wait_until, which};

use self::cgroups::Cgroups;
use self::credentials::Credentials;
use self::place::Place;
use crate::cni::REFERENCE;
use crate::machine::resident_below_mb;
use crate::pods::image;
use crate::subject::Subject;

/// Names the folder of the programs; without it weft is measured alone.
pub(crate) const PEER: &str = "WEFT_BENCH_UPSTREAM";
/// What must lie in that folder.
const OF_KUBERNETES: [&str; 5] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"];
/// What is taken from there too if it is there, and otherwise from PATH.
const OTHERS: [&str; 4] = ["etcd", "containerd", "ctr", "runc"];
/// The image of a pod's sandbox.
const SANDBOX: &str = "docker.io/library/weft-pause:1";
const PATIENCE: Duration = Duration::from_secs(90);
/// Lines of each program's log that an error carries.
const TAIL: usize = 12;

/// A program that was started.
struct Part {
    name: &'static str,
    process: Child,
}

/// A running cluster; everything that it made is gone after [`Upstream::end`] or drop.
pub(crate) struct Upstream {
    // In the order in which they are to be dropped.
    parts: Vec<Part>,
    place: Place,
    cgroups: Cgroups,
    data: tempfile::TempDir,
    credentials: Credentials,
    programs: PathBuf,
    ready_after: Duration,
    /// Programs that have ended by themselves.
    ended: Vec<&'static str>,
}

impl Upstream {
    /// Starts it and waits until its node is Ready and the sandbox's image is there.
    pub(crate) fn start(label: &str) -> anyhow::Result<Self> {
        let mut cluster = Self::unstarted(label)?;
        let begin = Instant::now();
        cluster.up().with_context(|| cluster.said())?;
        cluster.ready_after = begin.elapsed();
        eprintln!("upstream's node is Ready after {:.1} s", cluster.ready_after.as_secs_f64());
        cluster.import(&image("pause")?)?;
        Ok(cluster)
    }

    /// The place that it will run in.
    fn unstarted(label: &str) -> anyhow::Result<Self> {
        let programs = programs()?;
        let data = tempfile::Builder::new().prefix("upstream-").tempdir().context("make a data directory")?;
        let netns = Netns::new(label)?;
        let name = format!("u{}", netns.name());
        let cgroups = Cgroups::new(&name)?;
        let place = Place::new(netns, data.path())?;
        let credentials = Credentials::new(data.path(), &name)?;
        Ok(Self {
            parts: Vec::new(),
            place,
            cgroups,
            data,
            credentials,
            programs,
            ready_after: Duration::ZERO,
            ended: Vec::new(),
        })
    }

    /// From the start of the first program until the node was Ready.
    pub(crate) fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// Starts the programs, each once those are there that it can't do without.
    fn up(&mut self) -> anyhow::Result<()> {
        self.spawn("etcd", programs::etcd)?;
        self.spawn("containerd", programs::containerd)?;
        self.spawn("kube-apiserver", programs::apiserver)?;
        self.wait("the API server is ready", |cluster| {
            Ok(cluster.kubectl(&["get", "--raw", "/readyz"]).is_ok_and(|answer| answer == "ok"))
        })?;
        self.spawn("kube-controller-manager", programs::controller_manager)?;
        self.spawn("kube-scheduler", programs::scheduler)?;
        self.wait("containerd answers", |cluster| Ok(cluster.ctr(&["version"])?.output()?.status.success()))?;
        self.spawn("kubelet", programs::kubelet)?;
        self.spawn("kube-proxy", programs::proxy)?;
        self.wait("the node is Ready", |cluster| {
            let ready = r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#;
            Ok(cluster.kubectl(&["get", "nodes", "-o", ready])? == "True")
        })?;
        // Without it no pod may be made; the controller manager makes it in its own time.
        self.wait("there is a service account", |cluster| {
            Ok(cluster.kubectl(&["get", "serviceaccount", "default"]).is_ok())
        })
    }

    /// Starts a program in the cluster's place, with a log of its own.
    fn spawn(
        &mut self,
        name: &'static str,
        arguments: fn(&Self) -> anyhow::Result<Vec<String>>,
    ) -> anyhow::Result<()> {
        let log = fs::File::create(self.log(name))?;
        let mut command = self.place.command(&self.program(name))?;
        command.args(arguments(self)?).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().with_context(|| format!("start {name}"))?;
        self.parts.push(Part { name, process });
        Ok(())
    }

    /// Waits until `condition` holds; a program that has ended can't make it hold any more.
    fn wait(&mut self, what: &str, condition: impl Fn(&Self) -> anyhow::Result<bool>) -> anyhow::Result<()> {
        wait_until(what, PATIENCE, || {
            self.look_for_ended();
            if !self.ended.is_empty() {
                let ended = self.ended.join(" and ");
                return Ok(Some(Err(anyhow::anyhow!("{ended} ended before {what}"))));
            }
            Ok(condition(self)?.then_some(Ok(())))
        })?
    }

    fn look_for_ended(&mut self) {
        let gone = |part: &mut Part| !matches!(part.process.try_wait(), Ok(None));
        self.ended = self.parts.iter_mut().filter_map(|part| gone(part).then_some(part.name)).collect();
    }

    fn program(&self, name: &str) -> PathBuf {
        let own = self.programs.join(name);
        // One that is missing is noticed at the start.
        if own.is_file() { own } else { which(name).unwrap_or(own) }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.data.path().join(format!("{name}.log"))
    }

    fn ctr(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.place.command(&self.program("ctr"))?;
        command.args(["--address", programs::CONTAINERD, "--namespace", "k8s.io"]).args(arguments);
        command.stdin(Stdio::null());
        Ok(command)
    }

    /// Resident megabytes of all its programs, the pods' and their shims among them.
    pub(crate) fn resident_mb(&self) -> anyhow::Result<f64> {
        // Each is below the program that brought it into its place.
        let mut above: Vec<u32> = self.parts.iter().map(|part| part.process.id()).collect();
        above.push(self.place.holder()?);
        resident_below_mb(&above)
    }
}

impl Subject for Upstream {
    fn netns(&self) -> &Netns {
        &self.place.netns
    }

    fn folder(&self) -> &Path {
        self.data.path()
    }

    fn kubectl_command(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.place.netns.command("kubectl")?;
        command
            .env("KUBECONFIG", self.credentials.kubeconfig("admin"))
            .env("HOME", self.data.path())
            .args(args);
        Ok(command)
    }

    fn import(&self, archive: &Path) -> anyhow::Result<()> {
        let archive = fs::canonicalize(archive).with_context(|| format!("find {}", archive.display()))?;
        let output = self.ctr(&["images", "import"])?.arg(archive).output().context("run ctr")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ctr images import: {}", said.trim());
        Ok(())
    }

    fn said(&self) -> String {
        let tail = |part: &Part| {
            let log = fs::read_to_string(self.log(part.name)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            format!("{}:\n{}\n", part.name, lines[lines.len().saturating_sub(TAIL)..].join("\n"))
        };
        // Those that have ended say why; if none has, it may be any.
        let asked = |part: &&Part| self.ended.is_empty() || self.ended.contains(&part.name);
        self.parts.iter().filter(asked).map(tail).collect()
    }

    fn end(&mut self) -> anyhow::Result<()> {
        // Nothing of its processes, mounts and pods' namespaces is left after this: they live in its place alone.
        self.place.end()?;
        for part in &mut self.parts {
            part.process.wait().with_context(|| format!("wait for {}", part.name))?;
        }
        self.parts.clear();
        self.cgroups.remove()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("upstream's cluster is not removed: {error:#}");
        }
    }
}

/// The folder of the programs. All that is missing is said at once.
pub(crate) fn programs() -> anyhow::Result<PathBuf> {
    let folder = PathBuf::from(std::env::var_os(PEER).with_context(|| format!("{PEER} is not set"))?);
    let folder = fs::canonicalize(&folder).with_context(|| format!("find {}", folder.display()))?;
    let own = OF_KUBERNETES.iter().filter(|name| !folder.join(name).is_file());
    let others = OTHERS.iter().filter(|name| !folder.join(name).is_file() && which(name).is_none());
    let mut missing: Vec<String> = own.chain(others).map(|name| (*name).to_owned()).collect();
    let plugins = ["bridge", "host-local", "portmap", "loopback"].map(|name| Path::new(REFERENCE).join(name));
    missing.extend(plugins.iter().filter(|path| !path.is_file()).map(|path| path.display().to_string()));
    if !missing.is_empty() {
        bail!("{PEER} is {}; missing there and elsewhere: {}", folder.display(), missing.join(" "));
    }
    Ok(folder)
}
