//! What a node's dataplane stands on, as it is: hooks, maps, devices, settings of the kernel. Judging it is the reader's.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::maps::MapType;
use k8s_openapi::jiff::Timestamp;
use nix::sys::statfs::statfs;
use serde::{Deserialize, Serialize};
use weft_cni_netlink::{Netlink, Offloads};
use weft_ebpf_abi::names;

use super::pinned::{self, Pinned};
use super::{ObserveError, Observer};
use crate::hooks::{Hooks, Packets};
use crate::node::{BPF_FS_MAGIC, cgroup2_mount, devices};
use crate::programs::{EDGE_HOOKS, SOCKET_HOOKS};
use crate::sys;

/// Settings of the node's network namespace that matter.
const SYSCTLS: [&str; 5] = [
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv6/conf/all/forwarding",
    "net/core/bpf_jit_enable",
];

/// A program's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hook {
    /// The program.
    pub program: String,
    /// The device, or the cgroup.
    pub place: String,
    /// What is wrong with it; `None` if it runs there.
    pub missing: Option<String>,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fill {
    /// Its name.
    pub map: String,
    /// Entries.
    pub entries: usize,
    /// Entries that it takes.
    pub most: u32,
    /// It forgets the least recently used when it is full, instead of refusing.
    pub forgets: bool,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Its name.
    pub name: String,
    /// What the kernel calls it; empty for a physical one.
    pub kind: String,
    /// Largest packet in bytes.
    pub mtu_bytes: u32,
    /// It is set up, and so is what it depends on.
    pub running: bool,
    /// Of the overlay: checksums within tunnels are left to the card.
    #[serde(default)]
    pub leaves_checksums: Option<bool>,
}

/// A node, as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// The node's clock.
    pub time: Timestamp,
    /// Version of the kernel.
    pub kernel: String,
    /// Where cgroup2 is mounted.
    pub cgroup2: Option<PathBuf>,
    /// The node's cgroup is there.
    pub node_cgroup: bool,
    /// The pins are on a bpffs.
    pub bpffs: bool,
    /// The programs know their node.
    pub configured: bool,
    /// Every place where a program should be.
    pub hooks: Vec<Hook>,
    /// The maps that can be full.
    pub maps: Vec<Fill>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Settings by their path below `/proc/sys`; those that this kernel has.
    pub sysctls: BTreeMap<String, String>,
}

impl Observer {
    /// Looks at everything. What is missing is an answer, not an error.
    pub(crate) fn health(&self) -> Result<Health, ObserveError> {
        let cgroup2 = cgroup2_mount().ok();
        let configured = Pinned::open(&self.pins).is_ok_and(|maps| matches!(maps.node_config(), Ok(Some(_))));
        let hooks = Hooks::pinned(self.pins.join("links"));
        let root = cgroup2.as_deref();
        let (hooks, devices, sysctls) = self.within(|| in_namespace(&hooks, root))??;
        Ok(Health {
            time: Timestamp::now(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            node_cgroup: cgroup2.as_ref().is_some_and(|root| root.join(&self.cgroup).is_dir()),
            bpffs: statfs(&self.pins).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC),
            configured,
            hooks,
            maps: fills(&self.pins),
            devices,
            sysctls,
            cgroup2,
        })
    }
}

type InNamespace = (Vec<Hook>, Vec<Device>, BTreeMap<String, String>);

fn in_namespace(pinned: &Hooks, cgroup2: Option<&Path>) -> Result<InNamespace, ObserveError> {
    let mut all = Vec::new();
    let mut netlink = Netlink::open()?;
    for link in netlink.links()? {
        // It may go at any time; then nobody knows.
        let asked = (link.name == crate::OVERLAY).then(Offloads::open).transpose()?;
        all.push(Device {
            leaves_checksums: asked.and_then(|asked| asked.finishes_checksums(&link.name).ok()),
            running: link.running || link.loopback,
            name: link.name,
            kind: link.kind,
            mtu_bytes: link.mtu_bytes,
        });
    }
    let sysctls = SYSCTLS.iter().filter_map(|name| {
        let value = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
        Some(((*name).to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
    });
    let edges = devices(Some(crate::BRIDGE))?.edge;
    Ok((hooks(pinned, cgroup2, &edges), all, sysctls.collect()))
}

fn hooks(pinned: &Hooks, cgroup2: Option<&Path>, edges: &BTreeMap<u32, String>) -> Vec<Hook> {
    let root = cgroup2.map_or_else(|| "cgroup2".to_owned(), |path| path.display().to_string());
    let sockets = SOCKET_HOOKS.iter().map(|(program, _)| Hook {
        program: (*program).to_owned(),
        place: root.clone(),
        missing: pinned.missing(program, None),
    });
    let edges = edges.iter().flat_map(|(index, device)| {
        EDGE_HOOKS.iter().map(move |(program, direction, suffix)| Hook {
            program: (*program).to_owned(),
            place: device.clone(),
            missing: pinned.missing(
                &format!("edge_{index}_{suffix}"),
                Some(Packets { index: *index, direction: *direction, turn: 0 }),
            ),
        })
    });
    sockets.chain(edges).collect()
}

/// Maps that can't be read are left out: the hooks' state says that the dataplane is not there.
fn fills(pins: &Path) -> Vec<Fill> {
    let mut found = Vec::new();
    for name in names::ALL {
        let Ok((map, info)) = pinned::open_any(pins, name) else { continue };
        let forgets = match info.map_type() {
            Ok(MapType::Hash) => false,
            Ok(MapType::LruHash) => true,
            _ => continue,
        };
        let (key, value) = (info.key_size() as usize, info.value_size() as usize);
        if let Ok((keys, _)) = sys::read_all(map.fd().as_fd(), key, value) {
            let entries = keys.len() / key.max(1);
            found.push(Fill { map: name.to_owned(), entries, most: info.max_entries(), forgets });
        }
    }
    found
}
