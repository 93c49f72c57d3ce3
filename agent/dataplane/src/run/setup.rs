//! What a dataplane stands on before it watches anything: programs, maps, and who the node is.

use ipnetwork::IpNetwork;
use weft_ebpf_abi::{Address, EVERY_CGROUP, NODE_DIRECT, NodeConfig};

use super::{Config, Error, PodNetwork};
use crate::maps::Table;
use crate::maps::kernel::KernelMaps;
use crate::node;
use crate::programs::Programs;
use crate::reconcile::Reconciler;
use crate::tables::Tables;

/// Whether a family is IPv6, for each that pods have; both, where it is not ours to know.
pub(super) fn families(config: &Config) -> Vec<bool> {
    match config.pod_network {
        PodNetwork::Own => config.cluster_cidr.iter().map(IpNetwork::is_ipv6).collect(),
        PodNetwork::Others { .. } => vec![false, true],
    }
}

/// Loads and attaches. Programs see a node's Services as soon as they are in the maps, so attaching comes first.
pub(super) fn set_up(config: &Config) -> Result<(Programs, Reconciler<KernelMaps>, NodeConfig), Error> {
    node::ensure_bpffs(&config.pin_dir)?;
    let cgroup2 = node::cgroup2_mount()?;
    let cgroup_id = if config.node_cgroup.as_os_str().is_empty() {
        EVERY_CGROUP
    } else {
        node::cgroup_id(&cgroup2.join(&config.node_cgroup))?
    };
    let netns = std::path::Path::new("/proc/self/ns/net");
    let netns_cookie = node::netns_cookie().map_err(node::failed("get the cookie of", netns))?;
    let mut programs = Programs::load(config.ebpf_object, &config.pin_dir)?;
    let devices = node::devices(config.pod_network.bridge())?;
    let identity = NodeConfig {
        netns_cookie,
        cgroup_id,
        bridge_ifindex: devices.bridge,
        overlay_ifindex: devices.overlay,
        flags: if config.direct_return { NODE_DIRECT } else { 0 },
        ..NodeConfig::default()
    };
    programs.configure(identity)?;
    programs.set_pod_ranges(&config.cluster_cidr)?;
    programs.attach_sockets(&cgroup2)?;
    let node_local = config.node_local.iter().map(|ip| Address::from(*ip)).collect();
    let reconciler = Reconciler::adopt(Tables::new(&config.node_name, node_local), programs.maps()?)?;
    tracing::info!(node = %config.node_name, services = reconciler.entries(Table::Services), "dataplane attached");
    Ok((programs, reconciler, identity))
}
