//! Loads the programs, attaches them, and keeps both pinned, so that Services outlive the agent.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData, PerCpuArray};
use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use ipnetwork::IpNetwork;
use weft_ebpf_abi::{Address, DropReason, LAYOUT, NodeConfig, PodRange, names};
use zerocopy::IntoBytes;

use crate::maps::kernel::KernelMaps;
use crate::maps::{Kind as _, Table};
use crate::node::{NodeError, failed};
use crate::peers::memory::Memory;
use crate::sys;

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
/// Packet hooks: program, attach type, suffix of the pin.
pub(crate) const EDGE_HOOKS: [(&str, u32, &str); 2] =
    [("weft_ingress", 46, "in"), ("weft_egress", 47, "out")];

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
    pub(crate) links: PathBuf,
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
        let mut ebpf = EbpfLoader::new().btf(None).default_map_pin_directory(&maps).load(object)?;
        let names = SOCKET_HOOKS.map(|(name, _)| name).into_iter().chain(EDGE_HOOKS.map(|(name, ..)| name));
        for name in names
            .chain(crate::policy::edges::HOOKS.map(|(name, ..)| name))
            .chain([crate::xdp::PROGRAM, SOCKET_STATES.0])
        {
            let result = match ebpf.program_mut(name) {
                Some(Program::CgroupSockAddr(program)) => program.load(),
                Some(Program::SchedClassifier(program)) => program.load(),
                Some(Program::Xdp(program)) => program.load(),
                Some(Program::SockOps(program)) => program.load(),
                _ => return Err(mismatch(name)),
            };
            result.map_err(|source| ProgramError::Program { name, source: Box::new(source) })?;
        }
        Ok(Self { ebpf, links })
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
            let target = u32::try_from(folder.as_raw_fd()).unwrap_or(u32::MAX);
            let wrap = |source| ProgramError::Attach { name, target: cgroup.display().to_string(), source };
            attach(self.program_fd(name)?, &self.links.join(name), target, attach_type).map_err(wrap)?;
        }
        Ok(())
    }

    /// Has a program see how sockets' connections come about, or no longer: where nobody wants it, they pay nothing.
    pub fn watch_sockets(&self, cgroup: &Path, wanted: bool) -> Result<(), ProgramError> {
        let (name, attach_type) = SOCKET_STATES;
        let pin = self.links.join(name);
        if !wanted {
            return if pin.exists() { Ok(remove_link(&pin)?) } else { Ok(()) };
        }
        let folder = fs::File::open(cgroup).map_err(failed("open cgroup", cgroup))?;
        let target = u32::try_from(folder.as_raw_fd()).unwrap_or(u32::MAX);
        let wrap = |source| ProgramError::Attach { name, target: cgroup.display().to_string(), source };
        attach(self.program_fd(name)?, &pin, target, attach_type).map_err(wrap)
    }

    /// Attaches the edge programs to these devices, and lets go of all others.
    pub fn attach_edges(&self, devices: &BTreeMap<u32, String>) -> Result<(), ProgramError> {
        let mut wanted = Vec::new();
        for (index, device) in devices {
            for (name, attach_type, suffix) in EDGE_HOOKS {
                let pin = format!("edge_{index}_{suffix}");
                let wrap = |source| ProgramError::Attach { name, target: device.clone(), source };
                match attach(self.program_fd(name)?, &self.links.join(&pin), *index, attach_type) {
                    // The device went away meanwhile; the kernel reports that as well.
                    Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                    other => other.map_err(wrap)?,
                }
                wanted.push(pin);
            }
        }
        let entries = fs::read_dir(&self.links).map_err(failed("list", &self.links))?;
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("edge_") && !wanted.contains(&name) {
                remove_link(&entry.path())?;
            }
        }
        Ok(())
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

/// Replaces the program of a pinned link, or makes the link and pins it.
pub(crate) fn attach(program: BorrowedFd<'_>, pin: &Path, target: u32, attach_type: u32) -> io::Result<()> {
    attach_with(program, pin, target, attach_type, 0)
}

/// The same, with flags for a link that is made.
pub(crate) fn attach_with(
    program: BorrowedFd<'_>,
    pin: &Path,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<()> {
    match sys::open_pin(pin) {
        Ok(link) => match sys::link_update(link.as_fd(), program) {
            Ok(()) => return Ok(()),
            // Its cgroup or device is gone, or its index belongs to another one now.
            Err(error) => {
                tracing::debug!(pin = %pin.display(), %error, "link is dead, making another");
                fs::remove_file(pin)?;
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let link = sys::link_create(program, target, attach_type, flags)?;
    sys::pin(link.as_fd(), pin)
}

/// Detaches a pinned link and removes the pin. One whose cgroup or device is gone has nothing to detach from.
pub(crate) fn remove_link(path: &Path) -> Result<(), NodeError> {
    if let Ok(link) = sys::open_pin(path)
        && let Err(error) = sys::link_detach(link.as_fd())
    {
        tracing::debug!(pin = %path.display(), %error, "link was dead already");
    }
    remove_pin(path)
}

fn remove_pin(path: &Path) -> Result<(), NodeError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed("remove pin", path)(source)),
        _ => Ok(()),
    }
}

/// Removes all links and maps of a node; what is gone already is no error.
pub fn remove(pins: &Path) -> Result<(), NodeError> {
    type Remove = fn(&Path) -> Result<(), NodeError>;
    for (folder, remove) in [(pins.join("links"), remove_link as Remove), (pins.join("maps"), remove_pin)] {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(source) if source.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(failed("list", &folder)(source)),
        };
        for entry in entries.flatten() {
            remove(&entry.path())?;
        }
        fs::remove_dir(&folder).map_err(failed("remove folder", &folder))?;
    }
    Memory::of(pins).remove()
}
