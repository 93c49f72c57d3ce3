//! A node with an uplink to a client and a pod on its bridge, with weft's programs loaded as the agent loads them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use serde_json::json;
use weft_agent_dataplane::maps::kernel::KernelMaps;
use weft_agent_dataplane::policy::edges::Edges;
use weft_agent_dataplane::programs::{self, Programs};
use weft_agent_dataplane::reconcile::Reconciler;
use weft_agent_dataplane::tables::Tables;
use weft_agent_dataplane::xdp::{Carrier, Xdp};
use weft_agent_dataplane::{BRIDGE, node};
use weft_cni_netlink::namespace::within;
use weft_cni_netlink::{Mac, Neighbour, Netlink, Offloads};
use weft_ebpf_abi::{Address, NodeConfig};
use weft_tests_harness::artifact;
use weft_tests_harness::netns::{Netns, ip};

pub(super) const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
pub(super) const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
pub(super) const POD: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 1);
pub(super) const NODE_PORT: u16 = 30_080;
pub(super) const POD_PORT: u16 = 8_080;
/// With Ethernet's checksum it has 64.
pub(super) const FRAME_BYTES: usize = 60;
/// Above the number of flows: the sender takes the flow's number off it.
const PAYLOAD: u16 = 0x8000;

/// The namespaces and what is loaded.
pub(super) struct Place {
    pub(super) node: Netns,
    pub(super) pod: Netns,
    pub(super) client: Netns,
    pub(super) pins: PathBuf,
    pub(super) programs: Programs,
    /// Kept for its maps.
    _reconciler: Reconciler<KernelMaps>,
    /// The client's device.
    pub(super) client_device: u32,
    /// The node's end of the pod's pair.
    pub(super) pod_port: u32,
    /// The pods' bridge.
    pub(super) bridge: u32,
    uplink: Mac,
    cgroup: PathBuf,
    _folder: tempfile::TempDir,
}

/// Devices, addresses and neighbours, as the CNI plugin and an administrator would have made them.
fn network(node: &Netns, pod: &Netns, client: &Netns) -> anyhow::Result<()> {
    let (n, p, c) = (node.name(), pod.name(), client.name());
    let commands = [
        format!("-n {n} link add {BRIDGE} address 02:00:00:00:00:11 type bridge"),
        format!("-n {n} addr add {GATEWAY}/24 dev {BRIDGE}"),
        format!("-n {n} link set {BRIDGE} up"),
        format!("-n {n} link add pod0 type veth peer name eth0 netns {p}"),
        format!("-n {n} link set pod0 master {BRIDGE} up"),
        format!("-n {p} addr add {POD}/24 dev eth0"),
        format!("-n {p} link set eth0 up"),
        format!("-n {n} link add up0 type veth peer name eth0 netns {c}"),
        format!("-n {n} addr add {NODE}/24 dev up0"),
        format!("-n {n} link set up0 up"),
        format!("-n {c} addr add {CLIENT}/24 dev eth0"),
        format!("-n {c} link set eth0 up"),
    ];
    for command in &commands {
        ip(&command.split(' ').collect::<Vec<_>>())?;
    }
    within(&node.path(), || std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))??;
    // The pod takes frames from XDP; so does the uplink, which then receives as a driver does, without XDP too.
    within(&pod.path(), || Offloads::open()?.receive_in_batches("eth0", true))??;
    Ok(within(&node.path(), || Offloads::open()?.receive_in_batches("up0", true))??)
}

fn mac_of(netns: &Netns, device: &str) -> anyhow::Result<(u32, Mac)> {
    let link = within(&netns.path(), || Netlink::open()?.link(device))??;
    Ok((link.index, link.mac.context("a device without a hardware address")?))
}

impl Place {
    pub(super) fn build() -> anyhow::Result<Self> {
        let (node, pod, client) = (Netns::new("de")?, Netns::new("de")?, Netns::new("de")?);
        network(&node, &pod, &client)?;
        let (client_device, client_mac) = mac_of(&client, "eth0")?;
        let (_, pod_mac) = mac_of(&pod, "eth0")?;
        let (bridge, _) = mac_of(&node, BRIDGE)?;
        let (up, uplink) = mac_of(&node, "up0")?;
        let (pod_port, _) = mac_of(&node, "pod0")?;
        within(&node.path(), || {
            let mut netlink = Netlink::open()?;
            netlink.put_neighbour(&Neighbour { index: bridge, address: POD.into(), mac: pod_mac })?;
            netlink.put_neighbour(&Neighbour { index: up, address: CLIENT.into(), mac: client_mac })
        })??;
        let folder = tempfile::tempdir()?;
        let pins = folder.path().join("bpf");
        node::ensure_bpffs(&pins)?;
        let cgroup = node::cgroup2_mount()?.join("weft").join(node.name());
        let (programs, reconciler) = within(&node.path(), || load(&pins, &cgroup))??;
        Ok(Self {
            node,
            pod,
            client,
            pins,
            programs,
            _reconciler: reconciler,
            client_device,
            pod_port,
            bridge,
            uplink,
            cgroup,
            _folder: folder,
        })
    }

    /// Attaches weft's XDP program to the uplink, or takes it off.
    pub(super) fn xdp(&self, on: bool) -> anyhow::Result<()> {
        within(&self.node.path(), || {
            let mode = if on { Xdp::Always } else { Xdp::Never };
            let mut carrier = Carrier::adopt(&self.programs, mode)?;
            carrier.refresh(&self.programs, &node::devices(Some(BRIDGE))?)?;
            let expected = usize::from(on);
            ensure!(carrier.attached().len() == expected && carrier.pods().len() == expected, "{carrier:?}");
            Ok(())
        })?
    }

    /// Attaches weft's tc programs to the node's devices and the pod's, or takes them off.
    pub(super) fn tc(&self, on: bool) -> anyhow::Result<()> {
        within(&self.node.path(), || {
            let edges = if on { node::devices(Some(BRIDGE))?.edge } else { BTreeMap::new() };
            self.programs.attach_edges(&edges)?;
            if on {
                let mut pods = Edges::new(&self.programs)?;
                pods.refresh(&[Address::from(POD)])?;
                ensure!(pods.attached().len() == 1, "the pod's edge is not found");
                return Ok(pods.publish(&BTreeSet::new())?);
            }
            // Without its pin a link is gone.
            for entry in std::fs::read_dir(self.pins.join("links"))? {
                let entry = entry?;
                if entry.file_name().to_string_lossy().starts_with("pod_") {
                    std::fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        })?
    }

    /// The frame of 64-byte UDP from a port of the client.
    pub(super) fn frame(&self, port: u16, (to, to_port): (Ipv4Addr, u16)) -> Vec<u8> {
        let mut ip = vec![0x45, 0, 0, 46, 0, 1, 0x40, 0, 64, 17, 0, 0];
        ip.extend([CLIENT.octets(), to.octets()].concat());
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum);
        let mut udp = [port, to_port, 26, 0, PAYLOAD].map(u16::to_be_bytes).concat();
        udp.resize(26, 0);
        let pseudo = [&CLIENT.octets()[..], &to.octets(), &[0, 17, 0, 26], &udp].concat();
        udp[6..8].copy_from_slice(&checksum(&pseudo));
        [&self.uplink.0[..], &[2, 0, 0, 0, 0, 2, 8, 0], &ip, &udp].concat()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = programs::remove(&self.pins) {
            eprintln!("cannot remove the programs: {error}");
        }
        let gone = nix::mount::umount2(&self.pins, nix::mount::MntFlags::MNT_DETACH);
        if let Err(error) = gone {
            eprintln!("cannot unmount the pins: {error}");
        }
        // Its parent stays while another node of the machine has its cgroup there.
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

/// Loads the programs, and enters a Service with one endpoint, the pod.
fn load(
    pins: &std::path::Path,
    cgroup: &std::path::Path,
) -> anyhow::Result<(Programs, Reconciler<KernelMaps>)> {
    let object = std::fs::read(artifact("weft.bpf.o").map_err(anyhow::Error::msg)?)?;
    let mut programs = Programs::load(&object, pins)?;
    let devices = node::devices(Some(BRIDGE))?;
    programs.configure(NodeConfig {
        netns_cookie: node::netns_cookie()?,
        cgroup_id: node::cgroup_id(cgroup)?,
        bridge_ifindex: devices.bridge,
        ..NodeConfig::default()
    })?;
    let mut reconciler = Reconciler::adopt(Tables::new("node", Vec::new()), programs.maps()?)?;
    reconciler.set_node_addresses([Address::from(IpAddr::from(NODE))].into());
    let service = json!({"metadata": {"namespace": "default", "name": "backend"}, "spec": {
        "type": "NodePort", "clusterIP": "10.43.0.10",
        "ports": [{"name": "udp", "port": 80, "nodePort": NODE_PORT, "protocol": "UDP"}]}});
    let slice = json!({"metadata": {"namespace": "default", "name": "backend-1",
            "labels": {"kubernetes.io/service-name": "backend"}},
        "addressType": "IPv4", "ports": [{"name": "udp", "port": POD_PORT, "protocol": "UDP"}],
        "endpoints": [{"addresses": [POD], "conditions": {"ready": true}}]});
    let tables = &mut reconciler.tables;
    let mut changed: Vec<_> =
        tables.apply_service(&serde_json::from_str(&service.to_string())?).into_iter().collect();
    changed.extend(tables.apply_slice(&serde_json::from_str(&slice.to_string())?));
    reconciler.mark(changed);
    let report = reconciler.sync();
    ensure!(report.failed == 0 && !reconciler.is_dirty(), "{report:?}");
    Ok((programs, reconciler))
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut total: u32 =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).map_or([0; 2], |sum| (!sum).to_be_bytes())
}
