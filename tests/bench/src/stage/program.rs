//! A service proxy as a process: `weft proxy`, or the one that the environment names.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use weft_tests_harness::{wait_until, weft_binary};

use super::{Node, api::Api};
use crate::machine::ticks_per_second;
use crate::stats::as_f64;

/// Names the program of kube-proxy, which is no part of this project; without it weft is measured alone.
const PEER: &str = "WEFT_BENCH_KUBE_PROXY";
/// `nftables` (the default here) or `iptables`.
const PEER_MODE: &str = "WEFT_BENCH_KUBE_PROXY_MODE";

/// Whose proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Weft,
    KubeProxy,
}

impl Whose {
    /// Those that are to be measured.
    pub(crate) fn all() -> Vec<Self> {
        if std::env::var_os(PEER).is_some() { vec![Self::Weft, Self::KubeProxy] } else { vec![Self::Weft] }
    }
}

/// A proxy's node, API server and files; the process may be started again and again.
pub(crate) struct Proxy {
    pub(crate) node: Node,
    pub(crate) api: Api,
    whose: Whose,
    folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Proxy {
    /// A node with an API server that has these many Services; nothing runs yet.
    pub(crate) fn new(whose: Whose, services: usize) -> anyhow::Result<Self> {
        let node = Node::new("bp")?;
        let (listener, address) = node.listen()?;
        let api = Api::default();
        api.serve(listener);
        let (services, slices) = super::lists(services);
        api.list("services", &services);
        api.list("endpointslices", &slices);
        api.list("nodes", &[super::api::node("node-a")]);
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("kubeconfig"), kubeconfig(address))?;
        Ok(Self { node, api, whose, folder, child: None })
    }

    fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// The end of what the program has said.
    pub(crate) fn said(&self) -> String {
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Starts the process; when.
    pub(crate) fn start(&mut self) -> anyhow::Result<Instant> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log"))?;
        let mut command = match self.whose {
            Whose::Weft => self.weft(&[])?,
            Whose::KubeProxy => {
                let mode = std::env::var(PEER_MODE).unwrap_or_else(|_| "nftables".to_owned());
                let program = std::env::var_os(PEER).with_context(|| format!("{PEER} is not set"))?;
                let mut command = self.node.netns.command(program)?;
                command.arg("--kubeconfig").arg(self.kubeconfig()).args(["--hostname-override", "node-a"]);
                command.args(["--proxy-mode", &mode, "--cluster-cidr", "10.42.0.0/16"]);
                command.args([
                    "--kube-api-content-type",
                    "application/json",
                    "--conntrack-max-per-core",
                    "0",
                ]);
                command.args([
                    "--conntrack-tcp-timeout-established",
                    "0s",
                    "--conntrack-tcp-timeout-close-wait",
                    "0s",
                ]);
                command
            }
        };
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let begin = Instant::now();
        self.child = Some(command.spawn().context("start the proxy")?);
        Ok(begin)
    }

    /// Waits until both lists have been handed over to the process that was started then.
    pub(crate) fn wait_until_listed(&mut self, begin: Instant) -> anyhow::Result<Instant> {
        wait_until("the proxy has listed", PATIENCE, || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().transpose()).transpose()?;
            Ok(if ended.is_some() { Some(None) } else { self.api.listed_since(begin).map(Some) })
        })?
        .with_context(|| format!("the proxy ended: {}", self.said()))
    }

    fn weft(&self, more: &[&str]) -> anyhow::Result<std::process::Command> {
        let mut command = self.node.netns.command(weft_binary().map_err(anyhow::Error::msg)?)?;
        let cgroup = format!("/weft-bench-{}-{}", std::process::id(), self.node.netns.name());
        command.args(["proxy", "--hostname-override", "node-a", "--cgroup", &cgroup, "--kubeconfig"]);
        command.arg(self.kubeconfig()).arg("--pin-dir").arg(self.folder.path().join("bpf")).args(more);
        Ok(command)
    }

    /// Ends the process at once; what it put into the kernel stays.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        self.api.forget_watches();
        Ok(())
    }

    /// Ends the process and removes what it put into the kernel.
    pub(crate) fn clean(&mut self) -> anyhow::Result<()> {
        self.kill()?;
        if self.whose == Whose::Weft {
            let cleaned = self.weft(&["--cleanup"])?.output()?;
            ensure!(cleaned.status.success(), "cleanup: {}", String::from_utf8_lossy(&cleaned.stderr));
        } else {
            for table in ["ip kube-proxy", "ip6 kube-proxy", "ip nat", "ip filter", "ip mangle"] {
                // Which of them are there depends on its mode.
                self.node.netns.command("nft")?.args(["delete", "table"]).args(table.split(' ')).output()?;
            }
        }
        Ok(())
    }

    fn pid(&self) -> anyhow::Result<u32> {
        Ok(self.child.as_ref().context("the proxy runs")?.id())
    }

    /// Seconds of processor time of the process and the programs that it has run.
    pub(crate) fn seconds(&self) -> anyhow::Result<f64> {
        let stat =
            fs::read_to_string(format!("/proc/{}/stat", self.pid()?)).context("read the proxy's stat")?;
        let ticks = parse_ticks(&stat).context("the proxy's stat has times")?;
        Ok(ticks / ticks_per_second())
    }

    /// Resident bytes.
    pub(crate) fn resident_bytes(&self) -> anyhow::Result<f64> {
        Ok(crate::machine::resident_mb(self.pid()?)? * 1e6)
    }

    /// Bytes of the eBPF maps that the process has open, each once.
    pub(crate) fn map_bytes(&self) -> anyhow::Result<f64> {
        let mut maps = std::collections::BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{}/fdinfo", self.pid()?))? {
            // A descriptor may be closed between two looks.
            let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
            let number = |name: &str| {
                let value = info.lines().find_map(|line| line.strip_prefix(name));
                value.and_then(|value| value.trim().parse::<usize>().ok())
            };
            if let (Some(id), Some(bytes)) = (number("map_id:"), number("memlock:")) {
                maps.insert(id, bytes);
            }
        }
        ensure!(self.whose != Whose::Weft || !maps.is_empty(), "weft has no map open");
        Ok(maps.values().map(|bytes| as_f64(*bytes)).sum())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Err(error) = self.clean() {
            eprintln!("{:?} is not removed: {error:#}", self.whose);
        }
    }
}

/// User and system time, the process' own and that of children that have ended: fields 14 to 17. The name in brackets may hold spaces.
fn parse_ticks(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<f64> = rest.split(' ').skip(11).take(4).map_while(|field| field.parse().ok()).collect();
    (fields.len() == 4).then(|| fields.iter().sum())
}

fn kubeconfig(api: SocketAddr) -> String {
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: c
  cluster: {{server: \"http://{api}\"}}
users:
- name: u
  user: {{}}
contexts:
- name: c
  context: {{cluster: c, user: u}}
current-context: c
"
    )
}

/// How long a proxy may take to get there.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_a_process_stand_behind_its_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 100 0 0 0 11 22 33 44 20 0 1 0 5 6 7";
        assert_eq!(parse_ticks(stat), Some(110.0));
        assert_eq!(parse_ticks("7 (a) S 1"), None);
    }
}
