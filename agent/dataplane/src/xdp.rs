//! XDP at the uplinks: where its program is attached, and which pods it may hand packets to.
//!
//! The tc program carries whatever XDP does not: nothing here has to succeed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;

use aya::maps::{HashMap as BpfMap, Map, MapData};
use weft_cni_netlink::{Class, Features, Link, Mac, Neighbour, Netlink};
use weft_ebpf_abi::{Address, XdpPod, names};
use zerocopy::IntoBytes as _;

use crate::hooks::Place;
use crate::node::Devices;
use crate::programs::{self, ProgramError, Programs};

/// The program.
pub(crate) const PROGRAM: &str = "weft_xdp";
/// `XDP_FLAGS_DRV_MODE` of `linux/if_link.h`: by the driver itself, or not at all.
const BY_THE_DRIVER: u32 = 1 << 2;
/// Pins of links are named after it and the device's index.
const PIN: &str = "xdp_";

const ADDRESS_BYTES: usize = size_of::<Address>();
const POD_BYTES: usize = size_of::<XdpPod>();

/// At which devices XDP is used, if their driver has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Xdp {
    /// All uplinks but veth pairs: what other processes of the same machine send by these has unfinished checksums, which XDP has to
    /// pass, and the kernel copies each such packet for it.
    #[default]
    Auto,
    /// All uplinks.
    Always,
    /// None.
    Never,
}

impl std::str::FromStr for Xdp {
    type Err = UnknownXdp;

    fn from_str(text: &str) -> Result<Self, UnknownXdp> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err(UnknownXdp),
        }
    }
}

impl std::fmt::Display for Xdp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        })
    }
}

/// It is none of `auto`, `always` and `never`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("neither auto nor always nor never")]
pub struct UnknownXdp;

/// Why XDP is behind the node's devices.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// The node's devices could not be looked at.
    #[error("cannot look at the devices of uplinks and pods")]
    Devices(#[from] weft_cni_netlink::Error),
    /// The program or its map can't be used.
    #[error(transparent)]
    Programs(#[from] ProgramError),
}

/// A port of the pods' bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Port {
    index: u32,
    mtu_bytes: u32,
    /// Hardware address of the pod's end.
    pod: Mac,
}

/// The uplinks with the program, and the pods in its map.
pub struct Carrier {
    mode: Xdp,
    map: BpfMap<MapData, [u8; ADDRESS_BYTES], [u8; POD_BYTES]>,
    applied: BTreeMap<Address, XdpPod>,
    /// Hardware address of each port's other end: it has it from its making.
    ports: HashMap<u32, Mac>,
    attached: BTreeMap<u32, String>,
    /// Devices that were refused: they are not tried at every change.
    refused: BTreeMap<u32, String>,
}

impl std::fmt::Debug for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Carrier").field("mode", &self.mode).field("attached", &self.attached).finish()
    }
}

impl Carrier {
    /// With the program as loaded, and what an earlier agent left in its map.
    ///
    /// # Errors
    /// If the object has no such map, or it can't be read.
    pub fn adopt(programs: &Programs, mode: Xdp) -> Result<Self, ProgramError> {
        let name = names::XDP_PODS;
        let Some(Map::HashMap(data)) = programs.ebpf.map(name) else { return Err(programs::mismatch(name)) };
        programs::check_layout(data, name, ADDRESS_BYTES, POD_BYTES)?;
        let wrap = |source| ProgramError::Map { name, source };
        let data = MapData::from_fd(programs::duplicate(data, name)?).map_err(wrap)?;
        let map = BpfMap::try_from(Map::HashMap(data)).map_err(wrap)?;
        let mut carrier = Self {
            mode,
            map,
            applied: BTreeMap::new(),
            ports: HashMap::new(),
            attached: BTreeMap::new(),
            refused: BTreeMap::new(),
        };
        for entry in carrier.map.iter() {
            let (address, value): ([u8; ADDRESS_BYTES], [u8; POD_BYTES]) = entry.map_err(wrap)?;
            let pod: XdpPod = zerocopy::transmute!(value);
            carrier.applied.insert(Address(address), pod);
        }
        Ok(carrier)
    }

    /// Devices with the program.
    #[must_use]
    pub fn attached(&self) -> &BTreeMap<u32, String> {
        &self.attached
    }

    /// Pods that it hands packets to.
    #[must_use]
    pub fn pods(&self) -> Vec<Address> {
        self.applied.keys().copied().collect()
    }

    /// Follows the node's devices: attaches to uplinks, lets go of others, and brings the map up to date.
    ///
    /// # Errors
    /// If the kernel can't be asked, or refuses an entry. What a driver refuses is no error.
    pub fn refresh(&mut self, programs: &Programs, devices: &Devices) -> Result<(), XdpError> {
        let mut netlink = Netlink::open()?;
        let links = netlink.links()?;
        let mut uplinks = uplinks(self.mode, devices, &links);
        let mut wanted = BTreeMap::new();
        let bridge = links.iter().find(|link| link.index == devices.bridge).and_then(|link| link.mac);
        if let (Some(bridge), false) = (bridge, uplinks.is_empty()) {
            let ports = self.look_at_ports(&mut netlink, devices.bridge, &links)?;
            wanted = pods(bridge, &netlink.neighbours(devices.bridge)?, &ports);
        }
        // Some drivers lose packets while a program is put in: not before there is a use, and not again whenever the last pod goes.
        if wanted.is_empty() && self.attached.is_empty() {
            uplinks.clear();
        }
        self.attach(programs, uplinks)?;
        if self.attached.is_empty() {
            wanted.clear();
        }
        self.apply(wanted)
    }

    fn attach(&mut self, programs: &Programs, uplinks: BTreeMap<u32, String>) -> Result<(), XdpError> {
        self.refused.retain(|index, name| uplinks.get(index) == Some(name));
        let mut attached = BTreeMap::new();
        for (index, name) in uplinks {
            if self.refused.contains_key(&index) {
                continue;
            }
            let place = Place::Frames { index, flags: BY_THE_DRIVER };
            match programs.hooks.attach(programs.program_fd(PROGRAM)?, &format!("{PIN}{index}"), place) {
                Ok(()) => {
                    if !self.attached.contains_key(&index) {
                        tracing::info!(device = name, "XDP is attached");
                    }
                    attached.insert(index, name);
                }
                Err(error) => {
                    let reason = why_not(&error);
                    tracing::info!(device = name, reason, %error, "no XDP here, the tc program carries all");
                    self.refused.insert(index, name);
                }
            }
        }
        self.attached = attached;
        let gone = |name: &str| {
            let index = name.strip_prefix(PIN).and_then(|index| index.parse().ok());
            index.is_some_and(|index: u32| !self.attached.contains_key(&index))
        };
        Ok(programs.hooks.detach_where(gone).map_err(ProgramError::from)?)
    }

    /// The bridge's ports that lead to a pod, have no queue, and whose other end takes frames.
    fn look_at_ports(
        &mut self,
        netlink: &mut Netlink,
        bridge: u32,
        links: &[Link],
    ) -> Result<Vec<Port>, XdpError> {
        let pods = links.iter().filter(|link| link.master == Some(bridge) && link.peer_namespace.is_some());
        self.ports.retain(|index, _| links.iter().any(|link| link.index == *index));
        let mut ports = Vec::new();
        // Asked each time: a pod may switch it off again.
        let taking = match Features::open() {
            Ok(mut features) => features.that_take_frames()?,
            // Linux before 6.3 doesn't say.
            Err(error) if error.class() == Class::NotFound => HashSet::new(),
            Err(error) => return Err(error.into()),
        };
        for link in pods.filter(|link| !link.is_queued() && link.running && taking.contains(&link.index)) {
            if !self.ports.contains_key(&link.index)
                && let Some(mac) = other_end(netlink, link)
            {
                self.ports.insert(link.index, mac);
            }
            if let Some(mac) = self.ports.get(&link.index) {
                ports.push(Port { index: link.index, mtu_bytes: link.mtu_bytes, pod: *mac });
            }
        }
        Ok(ports)
    }

    /// Removes first: an address may have moved to another device.
    fn apply(&mut self, wanted: BTreeMap<Address, XdpPod>) -> Result<(), XdpError> {
        let wrap = |source| ProgramError::Map { name: names::XDP_PODS, source };
        let (stale, new) = difference(&self.applied, &wanted);
        for address in stale {
            match self.map.remove(&address.0) {
                Ok(()) | Err(aya::maps::MapError::KeyNotFound) => {}
                Err(source) => return Err(wrap(source).into()),
            }
            self.applied.remove(&address);
        }
        for (address, pod) in new {
            let mut value = [0; POD_BYTES];
            value.copy_from_slice(pod.as_bytes());
            self.map.insert(address.0, value, 0).map_err(wrap)?;
            self.applied.insert(address, pod);
        }
        Ok(())
    }
}

/// The hardware address of a pair's other end; `None` if it is gone meanwhile.
fn other_end(netlink: &mut Netlink, link: &Link) -> Option<Mac> {
    match netlink.link_of(link.peer_namespace?, link.peer_index?) {
        Ok(end) => end.mac,
        Err(error) => {
            tracing::debug!(device = link.name, %error, "the pod's end can't be looked at");
            None
        }
    }
}

/// For a person: why a driver, or the kernel, refused.
fn why_not(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "the driver has no XDP",
        Some(libc::EBUSY) => "another program is attached",
        Some(libc::ERANGE) => "the MTU is too large for the driver's XDP",
        _ => "refused",
    }
}

/// The node's devices to the outside, as far as they are to have XDP.
fn uplinks(mode: Xdp, devices: &Devices, links: &[Link]) -> BTreeMap<u32, String> {
    let wanted = |link: &&Link| {
        let outside = devices.edge.contains_key(&link.index)
            && ![devices.bridge, devices.overlay].contains(&link.index)
            && link.up;
        outside
            && match mode {
                Xdp::Always => true,
                Xdp::Auto => link.kind != "veth",
                Xdp::Never => false,
            }
    };
    links.iter().filter(wanted).map(|link| (link.index, link.name.clone())).collect()
}

/// Which pod is behind which port: the bridge's neighbours say which hardware address an address has, the ports whose it is.
fn pods(bridge: Mac, neighbours: &[Neighbour], ports: &[Port]) -> BTreeMap<Address, XdpPod> {
    let by_mac: HashMap<Mac, &Port> = ports.iter().map(|port| (port.pod, port)).collect();
    let entry = |neighbour: &Neighbour| {
        let port = by_mac.get(&neighbour.mac)?;
        let pod =
            XdpPod { ifindex: port.index, mtu_bytes: port.mtu_bytes, pod: port.pod.0, bridge: bridge.0 };
        Some((Address::from(neighbour.address), pod))
    };
    neighbours.iter().filter_map(entry).collect()
}

type Difference = (Vec<Address>, Vec<(Address, XdpPod)>);

/// What to remove and what to enter.
fn difference(old: &BTreeMap<Address, XdpPod>, new: &BTreeMap<Address, XdpPod>) -> Difference {
    let stale = old.keys().filter(|address| !new.contains_key(*address)).copied().collect();
    let entered = new.iter().filter(|(address, pod)| old.get(*address) != Some(*pod));
    (stale, entered.map(|(address, pod)| (*address, *pod)).collect())
}

#[cfg(test)]
mod tests;
