//! The machine's and a node's own addresses, devices and CNI configuration.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1 as core;
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::json;
use tokio::sync::watch;
use weft_agent_dataplane::overlay::{self, Routing, overhead_bytes};
use weft_cni_netlink::{Address, Class, Netlink, Route, sysctl};

use crate::agent::Node;
use crate::cluster::Cluster;
use crate::paths::NodePaths;
use crate::pki;
use crate::ranges::{self, Family as _, PerFamily};

/// Bridge of a node's pods.
pub(crate) const POD_BRIDGE: &str = "weft0";
/// Bridge that joins the nodes of this machine.
pub(crate) const UNDERLAY_BRIDGE: &str = "weftu0";
const UNDERLAY_MTU_BYTES: u32 = 1500;
/// Whether the machine does without IPv6.
const IPV6_OFF: &str = "/proc/sys/net/ipv6/conf/all/disable_ipv6";

/// The machine's host name.
pub(crate) fn hostname() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Refuses an IPv6 cluster on a machine without IPv6.
pub(crate) fn check_families(cluster: &Cluster) -> anyhow::Result<()> {
    let Some(range) = cluster.cluster_cidr.family(true) else { return Ok(()) };
    let off = std::fs::read_to_string(IPV6_OFF);
    anyhow::ensure!(
        off.is_ok_and(|off| off.trim() == "0"),
        "pods shall have addresses of {range}, and IPv6 is turned off on this machine ({IPV6_OFF})"
    );
    Ok(())
}

/// The addresses of a node that is this machine: its own, or where it has none of a family the underlay's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MachineAddresses {
    pub(crate) addresses: PerFamily<IpAddr>,
    /// The underlay's bridge must be there to hold some of them.
    pub(crate) on_underlay: bool,
}

/// Looks at the machine's devices.
pub(crate) fn machine_addresses(cluster: &Cluster) -> anyhow::Result<MachineAddresses> {
    let gateway = cluster.underlay_gateway();
    let mut on_underlay = false;
    let mut found = Vec::new();
    for gateway in gateway.iter() {
        let own = machine_address(gateway.is_v6())?;
        on_underlay |= own.is_none();
        found.push(own.unwrap_or(gateway));
    }
    Ok(MachineAddresses { addresses: PerFamily::of(found).unwrap_or(gateway), on_underlay })
}

/// The machine's own address of a family: that of the default route's device, else the first global one.
fn machine_address(v6: bool) -> anyhow::Result<Option<IpAddr>> {
    let mut netlink = Netlink::open()?;
    let is_default = |route: &Route| {
        route.destination.prefix() == 0 && route.index != 0 && route.destination.is_ipv6() == v6
    };
    let default = netlink.routes()?.into_iter().find(is_default);
    let links = netlink.links()?;
    let usable = |index: u32| {
        links
            .iter()
            .any(|link| link.index == index && link.up && !link.loopback && !link.name.starts_with("weft"))
    };
    let addresses = netlink.addresses()?;
    let of_family = |address: &&Address| address.network.is_ipv6() == v6 && address.lasting;
    let mut candidates: Vec<_> = addresses
        .iter()
        .filter(of_family)
        .filter(|address| address.global && usable(address.index))
        .collect();
    candidates.sort_by_key(|address| default.is_none_or(|route| route.index != address.index));
    Ok(candidates.first().map(|address| address.network.ip()))
}

/// Largest packet in bytes of the device that carries an address.
fn mtu_of(address: IpAddr) -> anyhow::Result<u32> {
    let mut netlink = Netlink::open()?;
    let index = netlink.addresses()?.into_iter().find(|a| a.network.ip() == address).map(|a| a.index);
    let link = netlink.links()?.into_iter().find(|link| Some(link.index) == index);
    Ok(link.map_or(UNDERLAY_MTU_BYTES, |link| link.mtu_bytes))
}

/// The bridge that joins this machine's nodes, with the machine's addresses on it. Also what a machine without any
/// address but loopback is reached at.
pub(crate) fn ensure_underlay(cluster: &Cluster) -> anyhow::Result<()> {
    let mut netlink = Netlink::open()?;
    let bridge = netlink.ensure_bridge(UNDERLAY_BRIDGE, UNDERLAY_MTU_BYTES)?;
    for range in cluster.underlay_cidr.iter() {
        netlink.add_address(bridge.index, IpNetwork::new(ranges::nth(range, 1), range.prefix())?)?;
    }
    Ok(())
}

/// Takes the underlay away; answers what could not be.
pub(crate) fn remove_underlay(_cluster: &Cluster) -> Vec<String> {
    let removed = Netlink::open().and_then(|mut netlink| netlink.delete_link_named(UNDERLAY_BRIDGE));
    removed.err().map(|error| weft_agent_runtime::chain(&error)).into_iter().collect()
}

/// What a node needs before any of its parts starts: folders, forwarding, and the cluster DNS' address.
pub(crate) fn prepare_node(node: &Node, paths: &NodePaths) -> anyhow::Result<()> {
    for folder in [paths.images(), paths.logs(), paths.cni_conf(), paths.bpffs()] {
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    turn_on_forwarding(&node.cluster)?;
    let mut netlink = Netlink::open()?;
    let loopback = netlink.link("lo")?;
    netlink.change_link(
        loopback.index,
        &weft_cni_netlink::LinkChange { up: Some(true), ..Default::default() },
    )?;
    for address in node.cluster.dns_ips().iter() {
        netlink.add_address(loopback.index, address.into())?;
    }
    Ok(())
}

fn turn_on_forwarding(cluster: &Cluster) -> anyhow::Result<()> {
    if cluster.cluster_cidr.family(false).is_some() {
        sysctl::forward_ipv4().context("cannot turn on IPv4 forwarding")?;
    }
    if cluster.cluster_cidr.family(true).is_some() {
        sysctl::forward_ipv6().context("cannot turn on IPv6 forwarding")?;
    }
    Ok(())
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
    note(weft_cni_netlink::guard::remove().map_err(Into::into));
    note(weft_cni_netlink::hostport::remove_all().map_err(Into::into));
    note(unmount(&paths.bpffs()));
    failed
}

fn remove_devices(node: &Node) -> anyhow::Result<()> {
    overlay::cleanup()?;
    let mut netlink = Netlink::open()?;
    netlink.delete_link_named(POD_BRIDGE)?;
    match netlink.link("lo") {
        Ok(loopback) => {
            for address in node.cluster.dns_ips().iter() {
                netlink.delete_address(loopback.index, address.into())?;
            }
        }
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

/// Waits for the node's ranges of pod addresses and brings them to life: bridge, masquerade, CNI configuration.
pub(crate) struct Task {
    node: String,
    /// The node's end of the tunnels.
    tunnel: IpAddr,
    routing: Routing,
    cluster_cidr: PerFamily<IpNetwork>,
    /// Where pods are not masqueraded, besides the cluster.
    non_masquerade: Vec<IpNetwork>,
    conf: PathBuf,
    state: PathBuf,
    client: kube::Client,
}

impl Task {
    pub(crate) fn new(node: &Node, paths: &NodePaths, client: kube::Client) -> Self {
        Self {
            node: node.name.clone(),
            tunnel: node.tunnel(),
            routing: node.ways.routing,
            non_masquerade: node.ways.non_masquerade_cidrs.clone(),
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
        let ranges = self.pod_ranges().await?;
        let applied = tokio::task::spawn_blocking(move || self.apply(ranges)).await?;
        applied.context("cannot set up the pods' network")?;
        programmed.wait_for(|is| *is).await.context("the data plane is gone")?;
        ready.send_replace(true);
        std::future::pending().await
    }

    async fn pod_ranges(&self) -> anyhow::Result<PerFamily<IpNetwork>> {
        let api = kube::Api::<core::Node>::all(self.client.clone());
        let own = watcher::Config::default().fields(&format!("metadata.name={}", self.node));
        let mut nodes = watcher::watcher(api, own).default_backoff().applied_objects().boxed();
        loop {
            match nodes.try_next().await {
                Ok(Some(node)) => {
                    if let Some(ranges) = ranges_of(&node) {
                        return Ok(ranges);
                    }
                }
                Ok(None) => anyhow::bail!("the watch of the node ended"),
                Err(error) => tracing::warn!(%error, "cannot watch the own node; trying again"),
            }
        }
    }

    fn apply(&self, ranges: PerFamily<IpNetwork>) -> anyhow::Result<()> {
        let mut netlink = Netlink::open()?;
        let mtu_bytes = match pods_mtu(&mut netlink)? {
            Some(mtu_bytes) => mtu_bytes,
            None => new_pods_mtu(self.routing, mtu_of(self.tunnel)?, self.tunnel),
        };
        let bridge = netlink.ensure_bridge(POD_BRIDGE, mtu_bytes)?;
        for range in ranges.iter() {
            netlink.add_address(bridge.index, IpNetwork::new(ranges::nth(range, 1), range.prefix())?)?;
        }
        let pods: Vec<_> = self.cluster_cidr.iter().collect();
        weft_cni_netlink::masquerade::ensure(&pods, &self.non_masquerade)?;
        weft_cni_netlink::guard::ensure(POD_BRIDGE, &pods, overlay::PORT)?;
        let conf = json!({
            "cniVersion": "1.1.0",
            "name": "weft",
            "plugins": [{
                "type": "weft-cni",
                "bridge": POD_BRIDGE,
                "mtu": mtu_bytes,
                "ipam": ipam(ranges),
                "capabilities": {"portMappings": true, "bandwidth": true},
                "stateDir": self.state,
            }],
        });
        Ok(pki::write(&self.conf, &serde_json::to_string_pretty(&conf)?, 0o644)?)
    }
}

/// The largest packet of the pods that the node has: as long as there are some, others get no larger one, since between ports
/// of one bridge nobody would tell a sender what a receiver takes.
fn pods_mtu(netlink: &mut Netlink) -> anyhow::Result<Option<u32>> {
    let links = netlink.links()?;
    let Some(bridge) = links.iter().find(|link| link.name == POD_BRIDGE) else { return Ok(None) };
    let has_pods = links.iter().any(|link| link.master == Some(bridge.index));
    Ok(has_pods.then_some(bridge.mtu_bytes))
}

/// The largest packet of new pods, on a link of this MTU. What may go by the tunnel at any time fits into it; what goes by it to
/// few nodes only is told so by the routes.
fn new_pods_mtu(routing: Routing, link_mtu_bytes: u32, tunnel: IpAddr) -> u32 {
    match routing {
        Routing::Native => link_mtu_bytes,
        Routing::Auto | Routing::Tunnel => link_mtu_bytes.saturating_sub(overhead_bytes(tunnel)),
    }
}

/// The ranges that a Node has got.
fn ranges_of(node: &core::Node) -> Option<PerFamily<IpNetwork>> {
    let spec = node.spec.as_ref()?;
    let listed = spec.pod_cidrs.iter().flatten();
    PerFamily::of(listed.chain(&spec.pod_cidr).filter_map(|range| range.parse().ok()))
}

/// Where the plugin takes addresses from: a node with one range says it as it always did.
fn ipam(ranges: PerFamily<IpNetwork>) -> serde_json::Value {
    let one =
        |range: IpNetwork| json!({"subnet": range.to_string(), "gateway": ranges::nth(range, 1).to_string()});
    match ranges {
        PerFamily { primary, secondary: None } => one(primary),
        both => json!({"ranges": both.iter().map(one).collect::<Vec<_>>()}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugin_is_told_of_each_range() {
        let ranges = |text: &str| text.parse::<PerFamily<IpNetwork>>().unwrap();
        assert_eq!(ipam(ranges("10.42.1.0/24")), json!({"subnet": "10.42.1.0/24", "gateway": "10.42.1.1"}));
        assert_eq!(
            ipam(ranges("fd42:0:0:1::/64,10.42.1.0/24")),
            json!({"ranges": [
                {"subnet": "fd42:0:0:1::/64", "gateway": "fd42:0:0:1::1"},
                {"subnet": "10.42.1.0/24", "gateway": "10.42.1.1"},
            ]})
        );
    }

    #[test]
    fn a_node_has_ranges_once_it_has_any() {
        let node =
            |spec| serde_json::from_value::<core::Node>(json!({"metadata": {}, "spec": spec})).unwrap();
        assert_eq!(ranges_of(&node(json!({}))), None);
        let both = json!({"podCIDR": "10.42.1.0/24", "podCIDRs": ["10.42.1.0/24", "fd42:0:0:1::/64"]});
        assert_eq!(ranges_of(&node(both)).unwrap().to_string(), "10.42.1.0/24,fd42:0:0:1::/64");
        let first_only = ranges_of(&node(json!({"podCIDR": "10.42.1.0/24"}))).unwrap();
        assert_eq!(first_only.to_string(), "10.42.1.0/24");
    }
}
