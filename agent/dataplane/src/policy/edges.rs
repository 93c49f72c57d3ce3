//! The edges of this node's pods: which device leads to which address, and the programs there.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use aya::maps::{Map, MapData, PerCpuHashMap};
use weft_cni_netlink::{Class, Direction, Link, Mac, Netlink};
use weft_ebpf_abi::policy::{PolicyPod, RangeKey, RuleKey};
use weft_ebpf_abi::{Address, LOCAL_HOST_PORTS, LOCAL_QUEUED, LocalPod, names};

use super::local::{LocalPods, LocalTable};
use super::maps::PolicyTable;
use super::rules::Trial;
use crate::hooks::{Hooks, Packets, Place};
use crate::maps::kernel::KernelMaps;
use crate::maps::{Kind as _, MapError};
use crate::node::failed;
use crate::programs::{self, ProgramError, Programs};

/// Program, which packets of the host's device, its turn among those of one direction, suffix of the pin. What comes in there is what
/// the pod sends. Of two the first is asked first: policy, then the ways.
pub(crate) const HOOKS: [(&str, Direction, u16, &str); 3] = [
    ("weft_from_pod", Direction::In, 0, "out"),
    ("weft_pod_edge", Direction::In, 1, "way"),
    ("weft_to_pod", Direction::Out, 0, "in"),
];
/// Pins of links are named after it and the device's index.
const PIN: &str = "pod_";

/// Why a pod's edge is not in place.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// The node's devices could not be looked at.
    #[error("cannot look for the devices of pods")]
    Devices(#[from] weft_cni_netlink::Error),
    /// Programs could not be attached or let go of.
    #[error(transparent)]
    Programs(#[from] ProgramError),
    /// The map of the node's pods could not be changed.
    #[error(transparent)]
    Local(#[from] MapError),
}

/// What is at the other end of a device.
#[derive(Debug)]
struct Behind {
    addresses: Vec<Address>,
    /// The other end's.
    mac: Option<Mac>,
    /// Packets wait in a queue at the device.
    queued: bool,
}

/// Devices of pods, with programs attached.
#[derive(Debug)]
pub struct Edges {
    programs: [OwnedFd; HOOKS.len()],
    hooks: Hooks,
    /// Behind each device that was looked at.
    behind: BTreeMap<u32, Behind>,
    attached: HashMap<Address, u32>,
    local: LocalPods<KernelMaps<LocalTable>>,
}

impl Edges {
    /// With the programs as loaded.
    ///
    /// # Errors
    /// If the object has no such programs, or the map of the node's pods can't be read.
    pub fn new(programs: &Programs) -> Result<Self, EdgeError> {
        let own = |name: &'static str| {
            let fd = programs.program_fd(name)?;
            let own = fd.try_clone_to_owned().map_err(failed("duplicate program", Path::new(name)));
            own.map_err(ProgramError::from)
        };
        let [(out, ..), (way, ..), (into, ..)] = HOOKS;
        Ok(Self {
            programs: [own(out)?, own(way)?, own(into)?],
            // A pod's start and end are not to hold up the node's other devices.
            hooks: programs.hooks.clone().by_filters(),
            behind: BTreeMap::new(),
            attached: HashMap::new(),
            local: LocalPods::adopt(programs.local_map()?)?,
        })
    }

    /// Devices with programs, by the address that they lead to.
    #[must_use]
    pub fn attached(&self) -> &HashMap<Address, u32> {
        &self.attached
    }

    /// Looks for devices that are gone, and for those that lead to these addresses; attaches there.
    ///
    /// # Errors
    /// If the kernel refuses something; what is done stays done.
    pub fn refresh(&mut self, wanted: &[Address]) -> Result<(), EdgeError> {
        let mut netlink = Netlink::open()?;
        let links: Vec<Link> = netlink.links()?.into_iter().filter(|l| l.peer_namespace.is_some()).collect();
        let there: HashSet<u32> = links.iter().map(|link| link.index).collect();
        self.behind.retain(|index, _| there.contains(index));
        self.attached.retain(|_, index| there.contains(index));
        self.prune(&there)?;
        for link in &links {
            if let Some(behind) = self.behind.get_mut(&link.index) {
                behind.queued = link.is_queued();
            }
        }
        let missing: HashSet<Address> =
            wanted.iter().filter(|address| !self.attached.contains_key(*address)).copied().collect();
        if missing.is_empty() {
            return Ok(());
        }
        // Those that nobody looked at yet come first; a pod may have got another address later.
        let (known, new): (Vec<&Link>, Vec<&Link>) =
            links.iter().partition(|link| self.behind.contains_key(&link.index));
        for link in new.into_iter().chain(known) {
            if missing.iter().all(|address| self.attached.contains_key(address)) {
                break;
            }
            self.look_behind(link, &missing)?;
        }
        Ok(())
    }

    /// Brings the map of the node's pods up to date with what [`Edges::refresh`] found: packets may then be handed to them past the
    /// bridge. The answers of those with ports of the node stay with the stack, which translates them.
    ///
    /// # Errors
    /// If the kernel refuses; the rest is to be done again.
    pub fn publish(&mut self, host_ports: &BTreeSet<Address>) -> Result<(), EdgeError> {
        let entry = |(address, index): (&Address, &u32)| {
            let behind = self.behind.get(index)?;
            let mut flags = if behind.queued { LOCAL_QUEUED } else { 0 };
            if behind.addresses.iter().any(|address| host_ports.contains(address)) {
                flags |= LOCAL_HOST_PORTS;
            }
            Some((*address, LocalPod { ifindex: *index, flags, mac: behind.mac?.0, translated: [0, 0] }))
        };
        let wanted = self.attached.iter().filter_map(entry).collect();
        Ok(self.local.sync(&wanted)?)
    }

    fn look_behind(&mut self, link: &Link, wanted: &HashSet<Address>) -> Result<(), EdgeError> {
        let (Some(namespace), Some(peer)) = (link.peer_namespace, link.peer_index) else { return Ok(()) };
        // A socket that checks strictly is good for nothing else.
        let all = match Netlink::open()?.addresses_of(namespace) {
            Ok(all) => all,
            // The pod ended meanwhile, and its namespace with it.
            Err(error) if error.class() != Class::Retry => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let own = all.into_iter().filter(|one| one.index == peer && one.global);
        let own: Vec<Address> = own.map(|one| Address::from(one.network.ip())).collect();
        // One that is looked at again, for an address that was not found yet, keeps what was found.
        let mac = self.behind.get(&link.index).and_then(|before| before.mac);
        let mut behind = Behind { addresses: own, mac, queued: link.is_queued() };
        if behind.addresses.iter().any(|address| wanted.contains(address)) {
            behind.mac = match Netlink::open()?.link_of(namespace, peer) {
                Ok(end) => end.mac,
                Err(error) if error.class() != Class::Retry => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            self.attach(link)?;
            self.attached.extend(behind.addresses.iter().map(|address| (*address, link.index)));
        }
        self.behind.insert(link.index, behind);
        Ok(())
    }

    fn attach(&self, link: &Link) -> Result<(), ProgramError> {
        for ((name, direction, turn, suffix), program) in HOOKS.into_iter().zip(&self.programs) {
            let packets = Packets { index: link.index, direction, turn };
            let place = format!("{PIN}{}_{suffix}", link.index);
            match self.hooks.attach(program.as_fd(), &place, Place::Packets(packets)) {
                // The device went away meanwhile; the kernel reports that as well.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(source) => {
                    return Err(ProgramError::Attach { name, target: link.name.clone(), source });
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Removes the pins of devices that are gone, also those that an earlier agent left.
    fn prune(&self, there: &HashSet<u32>) -> Result<(), ProgramError> {
        let gone = |name: &str| {
            let index = name.strip_prefix(PIN).and_then(|rest| rest.split('_').next());
            index.and_then(|index| index.parse().ok()).is_some_and(|index| !there.contains(&index))
        };
        Ok(self.hooks.detach_where(gone)?)
    }
}

impl Programs {
    /// The map of the node's pods.
    fn local_map(&self) -> Result<KernelMaps<LocalTable>, ProgramError> {
        let name = names::LOCAL_PODS;
        let Some(Map::HashMap(data)) = self.ebpf.map(name) else { return Err(programs::mismatch(name)) };
        let (key_bytes, value_bytes) = (size_of::<Address>(), size_of::<LocalPod>());
        programs::check_layout(data, name, key_bytes, value_bytes)?;
        let mut maps = KernelMaps::default();
        maps.insert(LocalTable, programs::duplicate(data, name)?, key_bytes, value_bytes);
        Ok(maps)
    }

    /// The maps of policy.
    ///
    /// # Errors
    /// If the object has none, or others.
    pub fn policy_maps(&self) -> Result<KernelMaps<PolicyTable>, ProgramError> {
        let mut maps = KernelMaps::default();
        for table in PolicyTable::ALL {
            let name = table.name();
            let (Some(Map::HashMap(data) | Map::LpmTrie(data)), (key_bytes, value_bytes)) =
                (self.ebpf.map(name), layout(table))
            else {
                return Err(programs::mismatch(name));
            };
            programs::check_layout(data, name, key_bytes, value_bytes)?;
            maps.insert(table, programs::duplicate(data, name)?, key_bytes, value_bytes);
        }
        Ok(maps)
    }
}

/// Counters of what policies on trial would drop.
pub(crate) struct Trials(PerCpuHashMap<MapData, u64, u64>);

impl fmt::Debug for Trials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Trials")
    }
}

impl Trials {
    pub(crate) fn new(programs: &Programs) -> Result<Self, ProgramError> {
        let name = names::WOULD_DROP;
        let Some(Map::PerCpuHashMap(data)) = programs.ebpf.map(name) else {
            return Err(programs::mismatch(name));
        };
        let wrap = |source| ProgramError::Map { name, source };
        let data = MapData::from_fd(programs::duplicate(data, name)?).map_err(wrap)?;
        Ok(Self(PerCpuHashMap::try_from(Map::PerCpuHashMap(data)).map_err(wrap)?))
    }

    /// Packets by set, of the sets that are on trial; the counters of others go.
    pub(crate) fn read(
        &mut self,
        current: &BTreeMap<u64, Trial>,
    ) -> Result<BTreeMap<u64, u64>, ProgramError> {
        let wrap = |source| ProgramError::Map { name: names::WOULD_DROP, source };
        let (mut counts, mut stale) = (BTreeMap::new(), Vec::new());
        for entry in self.0.iter() {
            let (set, values) = entry.map_err(wrap)?;
            if current.contains_key(&set) {
                counts.insert(set, values.iter().sum());
            } else {
                stale.push(set);
            }
        }
        stale.iter().try_for_each(|set| self.0.remove(set)).map_err(wrap)?;
        Ok(counts)
    }
}

fn layout(table: PolicyTable) -> (usize, usize) {
    match table {
        PolicyTable::Pods => (size_of::<u32>(), size_of::<PolicyPod>()),
        PolicyTable::Identities => (size_of::<Address>(), size_of::<u64>()),
        PolicyTable::Ranges => (size_of::<RangeKey>(), size_of::<u64>()),
        PolicyTable::Rules => (size_of::<RuleKey>(), size_of::<u32>()),
    }
}
