//! The machine's and a node's own addresses, devices and CNI configuration.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use ipnetwork::{IpNetwork, Ipv4Network};
use k8s_openapi::api::core::v1 as core;
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::json;
use tokio::sync::watch;
use weft_cni_netlink::{Class, Netlink};

use crate::agent::Node;
use crate::cluster::Cluster;
use crate::paths::NodePaths;
use crate::pki;

/// Bridge of a node's pods.
pub(crate) const POD_BRIDGE: &str = "weft0";
/// VXLAN device to the other nodes.
pub(crate) const OVERLAY: &str = "weft.vx";
/// Bridge that joins the nodes of this machine.
pub(crate) const UNDERLAY_BRIDGE: &str = "weftu0";
const UNDERLAY_MTU_BYTES: u32 = 1500;
/// What VXLAN adds to a packet over IPv4 (RFC 7348 §5).
const VXLAN_OVERHEAD_BYTES: u32 = 50;
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// The machine's host name.
pub(crate) fn hostname() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The machine's own IPv4 address: that of the default route's device, else the first global one.
pub(crate) fn machine_address() -> anyhow::Result<Option<Ipv4Addr>> {
    let mut netlink = Netlink::open()?;
    let default =
        netlink.routes()?.into_iter().find(|route| route.destination.prefix() == 0 && route.index != 0);
    let links = netlink.links()?;
    let usable = |index: u32| {
        links
            .iter()
            .any(|link| link.index == index && link.up && !link.loopback && !link.name.starts_with("weft"))
    };
    let addresses = netlink.addresses()?;
    let mut candidates: Vec<_> =
        addresses.iter().filter(|address| address.global && usable(address.index)).collect();
    candidates.sort_by_key(|address| default.is_none_or(|route| route.index != address.index));
    Ok(candidates.iter().find_map(|address| match address.network.ip() {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    }))
}

/// Largest packet in bytes of the device that carries an address.
fn mtu_of(address: Ipv4Addr) -> anyhow::Result<u32> {
    let mut netlink = Netlink::open()?;
    let index =
        netlink.addresses()?.into_iter().find(|a| a.network.ip() == IpAddr::V4(address)).map(|a| a.index);
    let link = netlink.links()?.into_iter().find(|link| Some(link.index) == index);
    Ok(link.map_or(UNDERLAY_MTU_BYTES, |link| link.mtu_bytes))
}

/// The bridge that joins this machine's nodes, with the machine's address on it. Also what a machine without any
/// address but loopback is reached at.
pub(crate) fn ensure_underlay(cluster: &Cluster) -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
    let bridge = netlink.ensure_bridge(UNDERLAY_BRIDGE, UNDERLAY_MTU_BYTES)?;
    let address = Ipv4Network::new(cluster.underlay_gateway(), cluster.underlay_cidr.prefix())?;
    netlink.add_address(bridge.index, address.into())?;
    Ok(())
}

/// Takes the underlay away; answers what could not be.
pub(crate) fn remove_underlay(_cluster: &Cluster) -> Vec<String> {
    let removed = Netlink::open().and_then(|mut netlink| netlink.delete_link_named(UNDERLAY_BRIDGE));
    removed.err().map(|error| crate::logging::chain(&error)).into_iter().collect()
}

/// What a node needs before any of its parts starts: folders, forwarding, and the cluster DNS' address.
pub(crate) fn prepare_node(node: &Node, paths: &NodePaths) -> anyhow::Result<()> {
    for folder in [paths.images(), paths.logs(), paths.cni_conf(), paths.bpffs()] {
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    std::fs::write(FORWARDING, "1").context("cannot turn on IPv4 forwarding")?;
    let mut netlink = Netlink::open()?;
    let loopback = netlink.link("lo")?;
    netlink.change_link(
        loopback.index,
        &weft_cni_netlink::LinkChange { up: Some(true), ..Default::default() },
    )?;
    netlink.add_address(loopback.index, dns_address(node)?)?;
    Ok(())
}

fn dns_address(node: &Node) -> anyhow::Result<IpNetwork> {
    Ok(Ipv4Network::new(node.cluster.dns_ip(), 32)?.into())
}

/// Removes what [`prepare_node`] and [`Task`] made; answers what could not be removed.
pub(crate) fn remove_node(node: &Node, paths: &NodePaths) -> Vec<String> {
    let mut failed = Vec::new();
    let mut note = |outcome: anyhow::Result<()>| {
        if let Err(error) = outcome {
            failed.push(format!("{error:#}"));
        }
    };
    note(remove_devices(node));
    note(weft_cni_netlink::masquerade::remove().map_err(Into::into));
    note(weft_cni_netlink::hostport::remove_all().map_err(Into::into));
    note(unmount(&paths.bpffs()));
    failed
}

fn remove_devices(node: &Node) -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.delete_link_named(OVERLAY)?;
    netlink.delete_link_named(POD_BRIDGE)?;
    match netlink.link("lo") {
        Ok(loopback) => netlink.delete_address(loopback.index, dns_address(node)?)?,
        Err(error) if error.class() == Class::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Unmounts a folder as often as it is mounted.
pub(crate) fn unmount(folder: &std::path::Path) -> anyhow::Result<()> {
    use nix::errno::Errno;
    use nix::mount::{MntFlags, umount2};
    loop {
        match umount2(folder, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno).with_context(|| format!("cannot unmount {}", folder.display())),
        }
    }
}

/// Waits for the node's range of pod addresses and brings it to life: bridge, masquerade, CNI configuration.
pub(crate) struct Task {
    node: String,
    address: Ipv4Addr,
    cluster_cidr: Ipv4Network,
    conf: PathBuf,
    state: PathBuf,
    client: kube::Client,
}

impl Task {
    pub(crate) fn new(node: &Node, paths: &NodePaths, client: kube::Client) -> Self {
        Self {
            node: node.name.clone(),
            address: node.address,
            cluster_cidr: node.cluster.cluster_cidr,
            conf: paths.cni_conf().join("10-weft.conflist"),
            state: paths.data.join("cni"),
            client,
        }
    }

    /// Says `ready` once pods can have addresses and the Services are `programmed`; then has nothing more to do.
    pub(crate) async fn run(
        self,
        mut programmed: watch::Receiver<bool>,
        ready: watch::Sender<bool>,
    ) -> anyhow::Result<()> {
        let range = self.pod_range().await?;
        let applied = tokio::task::spawn_blocking(move || self.apply(range)).await?;
        applied.context("cannot set up the pods' network")?;
        programmed.wait_for(|is| *is).await.context("the data plane is gone")?;
        ready.send_replace(true);
        std::future::pending().await
    }

    async fn pod_range(&self) -> anyhow::Result<Ipv4Network> {
        let api = kube::Api::<core::Node>::all(self.client.clone());
        let own = watcher::Config::default().fields(&format!("metadata.name={}", self.node));
        let mut nodes = watcher::watcher(api, own).default_backoff().applied_objects().boxed();
        loop {
            match nodes.try_next().await {
                Ok(Some(node)) => {
                    let range = node.spec.and_then(|spec| spec.pod_cidr).and_then(|range| range.parse().ok());
                    if let Some(range) = range {
                        return Ok(range);
                    }
                }
                Ok(None) => anyhow::bail!("the watch of the node ended"),
                Err(error) => tracing::warn!(%error, "cannot watch the own node; trying again"),
            }
        }
    }

    fn apply(&self, range: Ipv4Network) -> anyhow::Result<()> {
        let gateway = Ipv4Addr::from(u32::from(range.network()) + 1);
        let mtu_bytes = mtu_of(self.address)?.saturating_sub(VXLAN_OVERHEAD_BYTES);
        let mut netlink = Netlink::open()?;
        let bridge = netlink.ensure_bridge(POD_BRIDGE, mtu_bytes)?;
        netlink.add_address(bridge.index, Ipv4Network::new(gateway, range.prefix())?.into())?;
        weft_cni_netlink::masquerade::ensure(&[self.cluster_cidr.into()], &[])?;
        let conf = json!({
            "cniVersion": "1.1.0",
            "name": "weft",
            "plugins": [{
                "type": "weft-cni",
                "bridge": POD_BRIDGE,
                "mtu": mtu_bytes,
                "ipam": {"subnet": range.to_string(), "gateway": gateway.to_string()},
                "stateDir": self.state,
            }],
        });
        Ok(pki::write(&self.conf, &serde_json::to_string_pretty(&conf)?, 0o644)?)
    }
}
