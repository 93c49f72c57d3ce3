//! Loads the programs, attaches them, and keeps both pinned, so that Services outlive the agent.

mod sizes;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

use aya::maps::{Array, Map, MapData, PerCpuArray};
use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use ipnetwork::IpNetwork;
use weft_cni_netlink::Direction;
use weft_ebpf_abi::{Address, DropReason, LAYOUT, NodeConfig, PodRange, names};
use zerocopy::IntoBytes;

use crate::hooks::{Hooks, Packets, Place};
use crate::maps::kernel::KernelMaps;
use crate::maps::{Kind as _, Table};
use crate::node::{NodeError, failed};
use crate::peers::memory::Memory;

/// Socket hooks: program and attach type (linux/bpf.h, `enum bpf_attach_type`).
pub(crate) const SOCKET_HOOKS: [(&str, u32); 8] = [
    ("weft_connect4", 10),
    ("weft_connect6", 11),
    ("weft_sendmsg4", 14),
    ("weft_sendmsg6", 15),
    ("weft_recvmsg4", 19),
    ("weft_recvmsg6", 20),
    ("weft_peername4", 29),
    ("weft_peername6", 30),
];
/// Packet hooks: program, which packets, suffix of the pin.
pub(crate) const EDGE_HOOKS: [(&str, Direction, &str); 2] =
    [("weft_ingress", Direction::In, "in"), ("weft_egress", Direction::Out, "out")];

/// Tells of connections that fail, while a Service wants it: program and attach type.
const SOCKET_STATES: (&str, u32) = ("weft_sockops", 3);

/// Why the programs could not be put in place.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The object is damaged, or the kernel refused a map.
    #[error("cannot load the eBPF object")]
    Object(#[from] aya::EbpfError),
    /// The verifier refused a program.
    #[error("cannot load program {name}")]
    Program {
        /// Its name.
        name: &'static str,
        /// What the verifier said.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// The object lacks something, or has it in another layout: it was built from other sources.
    #[error("the eBPF object does not fit this program: {what} is missing or of another layout")]
    Mismatch {
        /// What.
        what: &'static str,
    },
    /// A map could not be used.
    #[error("cannot use map {name}")]
    Map {
        /// Its name.
        name: &'static str,
        /// Why not.
        #[source]
        source: aya::maps::MapError,
    },
    /// A program could not be attached.
    #[error("cannot attach {name} to {target}")]
    Attach {
        /// Program.
        name: &'static str,
        /// Cgroup or device.
        target: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file system operation failed.
    #[error(transparent)]
    Node(#[from] NodeError),
}

/// The loaded programs and their maps.
#[derive(Debug)]
pub struct Programs {
    pub(crate) ebpf: Ebpf,
    pub(crate) hooks: Hooks,
}

/// The programs' counters of drops.
pub struct DropCounters(PerCpuArray<MapData, u64>);

impl fmt::Debug for DropCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DropCounters")
    }
}

impl DropCounters {
    /// Drops since the maps were made, by reason.
    pub fn read(&self) -> Result<BTreeMap<&'static str, u64>, ProgramError> {
        let wrap = |source| ProgramError::Map { name: names::DROPS, source };
        let count = |reason: DropReason| {
            let values = self.0.get(&(reason as u32), 0).map_err(wrap)?;
            Ok((reason.name(), values.iter().sum()))
        };
        DropReason::ALL.into_iter().map(count).collect()
    }
}

pub(crate) fn mismatch(what: &'static str) -> ProgramError {
    ProgramError::Mismatch { what }
}

fn layout(table: Table) -> (usize, usize) {
    use weft_ebpf_abi::{Address, BackendKey, BackendValue, ServiceKey, ServiceValue, SlotKey, SourceKey};
    match table {
        Table::Services => (size_of::<ServiceKey>(), size_of::<ServiceValue>()),
        Table::Slots => (size_of::<SlotKey>(), size_of::<BackendKey>()),
        Table::Backends => (size_of::<BackendKey>(), size_of::<BackendValue>()),
        Table::NodeAddresses => (size_of::<Address>(), size_of::<u32>()),
        Table::Sources => (size_of::<SourceKey>(), size_of::<u32>()),
    }
}

impl Programs {
    /// Loads the object. Maps that are pinned below `pins` are used as they are.
    pub fn load(object: &[u8], pins: &Path) -> Result<Self, ProgramError> {
        let (maps, links) = (pins.join("maps"), pins.join("links"));
        for folder in [&maps, &links] {
            fs::create_dir_all(folder).map_err(failed("make folder", folder))?;
        }
        // Nothing is relocated against the kernel's types: reading them would cost megabytes and a tenth of a second.
        let mut loader = EbpfLoader::new();
        loader.btf(None).default_map_pin_directory(&maps);
        for (name, entries) in sizes::of_machine() {
            loader.map_max_entries(name, entries);
        }
        let mut ebpf = loader.load(object)?;
        load_all(&mut ebpf)?;
        Ok(Self { ebpf, hooks: Hooks::pinned(links) })
    }

    /// Attaches to devices as on Linux before 6.6, for tests.
    #[must_use]
    pub fn by_filters(self) -> Self {
        Self { hooks: self.hooks.by_filters(), ..self }
    }

    /// The maps that the planner keeps.
    pub fn maps(&self) -> Result<KernelMaps, ProgramError> {
        let mut maps = KernelMaps::default();
        for table in Table::ALL {
            let Some(Map::HashMap(data) | Map::LpmTrie(data)) = self.ebpf.map(table.name()) else {
                return Err(mismatch(table.name()));
            };
            let (key_bytes, value_bytes) = layout(table);
            check_layout(data, table.name(), key_bytes, value_bytes)?;
            let fd = duplicate(data, table.name())?;
            maps.insert(table, fd, key_bytes, value_bytes);
        }
        Ok(maps)
    }

    /// Tells the programs what their node is; until then they do nothing.
    pub fn configure(&mut self, mut config: NodeConfig) -> Result<(), ProgramError> {
        config.layout = LAYOUT;
        let map = self.ebpf.map_mut(names::CONFIG).ok_or_else(|| mismatch(names::CONFIG))?;
        let wrap = |source| ProgramError::Map { name: names::CONFIG, source };
        let mut array: Array<_, [u8; size_of::<NodeConfig>()]> = Array::try_from(map).map_err(wrap)?;
        let mut bytes = [0; size_of::<NodeConfig>()];
        bytes.copy_from_slice(config.as_bytes());
        array.set(0, bytes, 0).map_err(wrap)
    }

    /// Tells the programs where the cluster's pods have their addresses: one range of each family, or none, which means anywhere.
    pub fn set_pod_ranges(&mut self, ranges: &[IpNetwork]) -> Result<(), ProgramError> {
        let map = self.ebpf.map_mut(names::POD_RANGES).ok_or_else(|| mismatch(names::POD_RANGES))?;
        let wrap = |source| ProgramError::Map { name: names::POD_RANGES, source };
        let mut array: Array<_, [u8; size_of::<PodRange>()]> = Array::try_from(map).map_err(wrap)?;
        for (index, is_v6) in [(0, false), (1, true)] {
            let range = ranges.iter().find(|range| range.is_ipv6() == is_v6);
            // An IPv4 address stands behind 96 bits that all have.
            let range = range.map_or_else(PodRange::default, |range| {
                PodRange::new(Address::from(range.ip()), range.prefix() + if is_v6 { 0 } else { 96 })
            });
            let mut bytes = [0; size_of::<PodRange>()];
            bytes.copy_from_slice(range.as_bytes());
            array.set(index, bytes, 0).map_err(wrap)?;
        }
        Ok(())
    }

    /// Drops so far, by reason.
    pub fn drops(&self) -> Result<BTreeMap<&'static str, u64>, ProgramError> {
        self.drop_counters()?.read()
    }

    /// The counters of drops, to be read without these programs.
    pub fn drop_counters(&self) -> Result<DropCounters, ProgramError> {
        let Some(Map::PerCpuArray(data)) = self.ebpf.map(names::DROPS) else {
            return Err(mismatch(names::DROPS));
        };
        let wrap = |source| ProgramError::Map { name: names::DROPS, source };
        let data = MapData::from_fd(duplicate(data, names::DROPS)?).map_err(wrap)?;
        Ok(DropCounters(PerCpuArray::try_from(Map::PerCpuArray(data)).map_err(wrap)?))
    }

    /// A loaded program, for tests.
    #[must_use]
    pub fn program(&self, name: &str) -> Option<&Program> {
        self.ebpf.program(name)
    }

    /// Attaches the socket hooks to a cgroup; in links that are there already, the programs are replaced in place.
    pub fn attach_sockets(&self, cgroup: &Path) -> Result<(), ProgramError> {
        let folder = fs::File::open(cgroup).map_err(failed("open cgroup", cgroup))?;
        for (name, attach_type) in SOCKET_HOOKS {
            let place = Place::Cgroup(folder.as_fd(), attach_type);
            let wrap = |source| ProgramError::Attach { name, target: cgroup.display().to_string(), source };
            self.hooks.attach(self.program_fd(name)?, name, place).map_err(wrap)?;
        }
        Ok(())
    }

    /// Has a program see how sockets' connections come about, or no longer: where nobody wants it, they pay nothing.
    pub fn watch_sockets(&self, cgroup: &Path, wanted: bool) -> Result<(), ProgramError> {
        let (name, attach_type) = SOCKET_STATES;
        if !wanted {
            if self.hooks.has_link(name) {
                self.hooks.detach_where(|pinned| pinned == name)?;
            }
            return Ok(());
        }
        let folder = fs::File::open(cgroup).map_err(failed("open cgroup", cgroup))?;
        let place = Place::Cgroup(folder.as_fd(), attach_type);
        let wrap = |source| ProgramError::Attach { name, target: cgroup.display().to_string(), source };
        self.hooks.attach(self.program_fd(name)?, name, place).map_err(wrap)
    }

    /// Attaches the edge programs to these devices, and lets go of all others.
    pub fn attach_edges(&self, devices: &BTreeMap<u32, String>) -> Result<(), ProgramError> {
        let mut wanted = BTreeSet::new();
        for (index, device) in devices {
            for (name, direction, suffix) in EDGE_HOOKS {
                let place = format!("edge_{index}_{suffix}");
                let packets = Packets { index: *index, direction, turn: 0 };
                let wrap = |source| ProgramError::Attach { name, target: device.clone(), source };
                match self.hooks.attach(self.program_fd(name)?, &place, Place::Packets(packets)) {
                    // The device went away meanwhile; the kernel reports that as well.
                    Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                    other => other.map_err(wrap)?,
                }
                wanted.insert(place);
            }
        }
        Ok(self.hooks.detach_where(|name| name.starts_with("edge_") && !wanted.contains(name))?)
    }

    pub(crate) fn program_fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, ProgramError> {
        let fd = match self.ebpf.program(name) {
            Some(Program::CgroupSockAddr(program)) => program.fd(),
            Some(Program::SchedClassifier(program)) => program.fd(),
            Some(Program::Xdp(program)) => program.fd(),
            Some(Program::SockOps(program)) => program.fd(),
            _ => return Err(mismatch(name)),
        };
        fd.map(AsFd::as_fd).map_err(|source| ProgramError::Program { name, source: Box::new(source) })
    }
}

/// Loads the programs by all processors: most of a node's start is the verifier's, which looks at each program by itself.
fn load_all(ebpf: &mut Ebpf) -> Result<(), ProgramError> {
    // Those that take longest come first.
    let names = crate::policy::edges::HOOKS.map(|(name, ..)| name).into_iter().rev();
    let names: Vec<&'static str> = names
        .chain(EDGE_HOOKS.map(|(name, ..)| name))
        .chain(SOCKET_HOOKS.map(|(name, _)| name))
        .chain([crate::xdp::PROGRAM, SOCKET_STATES.0])
        .collect();
    let mut found: BTreeMap<&str, &mut Program> = ebpf.programs_mut().collect();
    let programs: Vec<_> = names.into_iter().map(|name| (name, found.remove(name))).collect();
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let helpers = 1..processors.min(programs.len());
    let queue = Mutex::new(programs.into_iter());
    let work = || {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((name, program)) = next else { return Ok(()) };
            load(name, program)?;
        }
    };
    thread::scope(|scope| {
        let others: Vec<_> = helpers.map(|_| scope.spawn(work)).collect();
        let own = work();
        let joined =
            others.into_iter().map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        joined.fold(own, Result::and)
    })
}

fn load(name: &'static str, program: Option<&mut Program>) -> Result<(), ProgramError> {
    let result = match program {
        Some(Program::CgroupSockAddr(program)) => program.load(),
        Some(Program::SchedClassifier(program)) => program.load(),
        Some(Program::Xdp(program)) => program.load(),
        Some(Program::SockOps(program)) => program.load(),
        _ => return Err(mismatch(name)),
    };
    result.map_err(|source| ProgramError::Program { name, source: Box::new(source) })
}

pub(crate) fn check_layout(
    data: &MapData,
    name: &'static str,
    key: usize,
    value: usize,
) -> Result<(), ProgramError> {
    let info = data.info().map_err(|source| ProgramError::Map { name, source })?;
    let fits = info.key_size() as usize == key && info.value_size() as usize == value;
    if fits { Ok(()) } else { Err(mismatch(name)) }
}

pub(crate) fn duplicate(data: &MapData, name: &'static str) -> Result<OwnedFd, ProgramError> {
    let source = |source| ProgramError::Node(failed("duplicate map", Path::new(name))(source));
    data.fd().as_fd().try_clone_to_owned().map_err(source)
}

/// Takes all programs of a node off, and removes its maps; what is gone already is no error.
pub fn remove(pins: &Path) -> Result<(), NodeError> {
    let (links, maps) = (pins.join("links"), pins.join("maps"));
    if links.exists() {
        Hooks::pinned(links).remove()?;
    }
    match fs::remove_dir_all(&maps) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove folder", &maps)(source));
        }
        _ => {}
    }
    Memory::of(pins).remove()
}
