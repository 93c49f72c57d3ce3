//! Nodes in namespaces of their own: several on one machine, joined by a veth underlay.
//!
//! A node's namespaces are kept by files in its run-time folder, so that they, its devices and its pods outlive the agent.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use ipnetwork::IpNetwork;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use nix::sys::statfs::statfs;
use nix::unistd::Pid;
use tokio_util::sync::CancellationToken;
use weft_cni_netlink::{LinkChange, Netlink, Route, VethEnd, namespace};

use crate::cluster::Cluster;
use crate::lock::{self, Process};
use crate::network;
use crate::paths::Paths;
use crate::ranges::{self, Family as _, PerFamily};
use crate::ways::Ways;

/// The files of a node's namespaces, with what each is entered as.
const KINDS: [(&str, CloneFlags); 3] =
    [("net", CloneFlags::CLONE_NEWNET), ("uts", CloneFlags::CLONE_NEWUTS), ("mnt", CloneFlags::CLONE_NEWNS)];
/// The node's device on the underlay.
const UPLINK: &str = "eth0";
const UPLINK_MTU_BYTES: u32 = 1500;
/// Type of the file system that a namespace's file is on.
const NSFS_MAGIC: i64 = 0x6e73_6673;
/// An agent that dies is started again after this, doubled each time.
const RESTART_FIRST: Duration = Duration::from_millis(500);
const RESTART_LONGEST: Duration = Duration::from_secs(30);
/// How long an agent may take to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(8);

/// Whether a node's namespaces are there.
pub(crate) fn exist(folder: &Path) -> bool {
    KINDS
        .iter()
        .all(|(name, _)| statfs(&folder.join(name)).is_ok_and(|stat| stat.filesystem_type().0 == NSFS_MAGIC))
}

/// Enters a node's namespaces. The process must have one thread only.
pub(crate) fn enter(folder: &Path) -> anyhow::Result<()> {
    let open = |(name, kind): &(&str, CloneFlags)| -> anyhow::Result<(File, CloneFlags)> {
        let path = folder.join(name);
        Ok((File::open(&path).with_context(|| format!("cannot open {}", path.display()))?, *kind))
    };
    // All are opened first: the paths may not be there in the node's own mount namespace.
    let files = KINDS.iter().map(open).collect::<anyhow::Result<Vec<_>>>()?;
    for (file, kind) in files {
        setns(file.as_fd(), kind).with_context(|| format!("cannot enter {}", folder.display()))?;
    }
    Ok(())
}

/// Makes a node's namespaces and its link to the underlay, unless they are there.
pub(crate) fn make(paths: &Paths, cluster: &Cluster, index: usize) -> anyhow::Result<()> {
    let name = &cluster.nodes[index];
    let folder = paths.node(name).namespaces();
    if exist(&folder) {
        return Ok(());
    }
    remove(paths, name)?;
    // The pins must outlive the node's mount namespace, so their file system is mounted outside it, and first.
    let pins = paths.node(name).bpffs();
    fs::create_dir_all(&pins)?;
    weft_agent_dataplane::node::ensure_bpffs(&pins)
        .context("cannot mount the file system of the eBPF pins")?;
    keep_namespaces(&folder, name).with_context(|| format!("cannot make the namespaces of {name}"))?;
    let linked = link(cluster, index, &folder.join("net"));
    if linked.is_err() {
        remove(paths, name)?;
    }
    linked.with_context(|| format!("cannot join {name} to the underlay"))
}

/// A thread makes new namespaces and waits until this one has tied them to files.
fn keep_namespaces(folder: &Path, name: &str) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    // A mount namespace can be tied only to a file on a mount that isn't shared with others.
    let none = None::<&str>;
    mount(Some(folder), folder, none, MsFlags::MS_BIND, none)?;
    mount(none, folder, none, MsFlags::MS_PRIVATE, none)?;
    let (made, is_made) = std::sync::mpsc::channel::<anyhow::Result<Pid>>();
    let (tied, is_tied) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The receiver waits for this message; it can't be gone.
            let _ = made.send(new_namespaces(name));
            let _ = is_tied.recv();
        });
        let thread = is_made.recv().context("the thread is gone")??;
        for (kind, _) in KINDS {
            let file = folder.join(kind);
            File::create(&file)?;
            let source = format!("/proc/self/task/{thread}/ns/{kind}");
            mount(Some(source.as_str()), &file, none, MsFlags::MS_BIND, none)?;
        }
        drop(tied);
        Ok(())
    })
}

fn new_namespaces(name: &str) -> anyhow::Result<Pid> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
    let none = None::<&str>;
    // The node sees the machine's later mounts; the machine doesn't see the node's.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    nix::unistd::sethostname(name)?;
    Ok(nix::unistd::gettid())
}

fn link(cluster: &Cluster, index: usize, netns: &Path) -> anyhow::Result<()> {
    let name = &cluster.nodes[index];
    let host = host_device(name).with_context(|| format!("{name} has no place on the underlay"))?;
    let mut netlink = Netlink::open()?;
    let bridge = netlink.link(network::UNDERLAY_BRIDGE)?;
    let namespace = namespace::open(netns)?;
    let end = |name| VethEnd { name, mac: None, mtu_bytes: UPLINK_MTU_BYTES };
    netlink.create_veth(&end(&host), &end(UPLINK), Some(namespace.as_fd()))?;
    let port = netlink.link(&host)?;
    netlink.change_link(port.index, &LinkChange { master: Some(bridge.index), ..LinkChange::default() })?;
    let number = 2 + u32::try_from(index)?;
    let own = |range: IpNetwork| IpNetwork::new(ranges::nth(range, number), range.prefix());
    let addresses = cluster.underlay_cidr.iter().map(own).collect::<Result<Vec<_>, _>>()?;
    let gateways = cluster.underlay_gateway();
    namespace::within(netns, || address_uplink(&addresses, gateways))?
}

fn address_uplink(addresses: &[IpNetwork], gateways: PerFamily<IpAddr>) -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
    let loopback = netlink.link("lo")?;
    netlink.change_link(loopback.index, &LinkChange { up: Some(true), ..LinkChange::default() })?;
    let uplink = netlink.link(UPLINK)?;
    netlink.change_link(uplink.index, &LinkChange { up: Some(true), ..LinkChange::default() })?;
    for address in addresses {
        netlink.add_address(uplink.index, *address)?;
    }
    for gateway in gateways.iter() {
        let any: IpAddr =
            if gateway.is_v6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let mut route = Route::new(IpNetwork::new(any, 0)?, uplink.index);
        route.gateway = Some(gateway);
        netlink.put_route(&route)?;
    }
    Ok(())
}

/// The machine's end of a node's link: unique, and within the 15 bytes of a device's name. A node that is the machine
/// itself has none.
fn host_device(node: &str) -> Option<String> {
    let number: u8 = node.strip_prefix("node-")?.parse().ok()?;
    Some(format!("weftu-{number}"))
}

/// Removes a node's namespaces and link. What is gone is no error.
pub(crate) fn remove(paths: &Paths, name: &str) -> anyhow::Result<()> {
    let folder = paths.node(name).namespaces();
    if let Some(device) = host_device(name) {
        Netlink::open()?.delete_link_named(&device)?;
    }
    for (kind, _) in KINDS {
        namespace::remove(&folder.join(kind))?;
    }
    network::unmount(&folder)?;
    network::unmount(&paths.node(name).bpffs())
}

/// Keeps one node's agent running in a process of its own.
pub(crate) struct Supervisor {
    paths: Paths,
    name: String,
    addresses: PerFamily<IpAddr>,
    namespaces: PathBuf,
    ways: Ways,
}

impl Supervisor {
    pub(crate) fn new(paths: &Paths, name: &str, addresses: PerFamily<IpAddr>, ways: Ways) -> Self {
        Self {
            paths: paths.clone(),
            name: name.to_owned(),
            addresses,
            namespaces: paths.node(name).namespaces(),
            ways,
        }
    }

    /// Starts the agent, and again when it breaks down, until `shutdown` or until it is stopped on purpose.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut pause = RESTART_FIRST;
        loop {
            let begin = std::time::Instant::now();
            if self.once(&shutdown).await? {
                // An agent that was stopped on purpose stays away, and the cluster goes on without its node.
                shutdown.cancelled().await;
                return Ok(());
            }
            if begin.elapsed() > RESTART_LONGEST {
                pause = RESTART_FIRST;
            }
            tracing::warn!(node = self.name, "the agent broke down and is started again");
            if shutdown.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return Ok(());
            }
            pause = (pause * 2).min(RESTART_LONGEST);
        }
    }

    /// Runs the agent to its end; answers whether it ended on purpose.
    async fn once(&self, shutdown: &CancellationToken) -> anyhow::Result<bool> {
        if let Some(pid) = lock::holder(&self.paths.node(&self.name).lock()) {
            return self.adopt(pid, shutdown).await;
        }
        let log = self.paths.node(&self.name).data.join("agent.log");
        let log = fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = tokio::process::Command::new(std::env::current_exe()?);
        command.arg("--data-dir").arg(&self.paths.data).args(["agent", "--node", &self.name]);
        command.arg("--node-ip").arg(self.addresses.to_string()).arg("--enter").arg(&self.namespaces);
        command.args(self.ways.arguments());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child =
            command.spawn().with_context(|| format!("cannot start the agent of {}", self.name))?;
        let status = tokio::select! {
            status = child.wait() => status?,
            () = shutdown.cancelled() => {
                if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                    Process::open(Pid::from_raw(pid))?.signal(Signal::SIGTERM)?;
                }
                match tokio::time::timeout(STOP_PATIENCE, child.wait()).await {
                    Ok(status) => status?,
                    Err(_) => {
                        child.kill().await?;
                        child.wait().await?
                    }
                }
            }
        };
        Ok(status.success())
    }

    /// The agent outlived an earlier `weft up`: wait for its end.
    async fn adopt(&self, pid: Pid, shutdown: &CancellationToken) -> anyhow::Result<bool> {
        let Ok(process) = Process::open(pid) else { return Ok(false) };
        let process = std::sync::Arc::new(process);
        tracing::info!(node = self.name, pid = pid.as_raw(), "the agent runs already");
        loop {
            let waiting = process.clone();
            let ended = tokio::task::spawn_blocking(move || waiting.wait(Duration::from_secs(1))).await??;
            if ended {
                return Ok(shutdown.is_cancelled());
            }
            if shutdown.is_cancelled() {
                process.signal(Signal::SIGTERM)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbered_nodes_have_a_link() {
        assert_eq!(host_device("node-64").as_deref(), Some("weftu-64"));
        assert_eq!(host_device("a-machine-with-a-long-name"), None);
    }
}
