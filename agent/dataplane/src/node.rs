//! What this node is to the kernel: its namespace, its cgroup, its devices and addresses, its bpffs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::ifaddrs::getifaddrs;
use nix::mount::{MsFlags, mount};
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::sys::statfs::{FsType, statfs};
use weft_ebpf_abi::Address;

/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// Why the node could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// There is no cgroup2.
    #[error("no cgroup2 file system is mounted, and socket programs attach to nothing else")]
    NoCgroup2,
    /// The kernel refused something.
    #[error("cannot {op} {path:?}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn failed<'a>(op: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> NodeError + use<'a> {
    move |source| NodeError::Io { op, path: path.to_owned(), source }
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside version 1.
pub fn cgroup2_mount() -> Result<PathBuf, NodeError> {
    let path = Path::new("/proc/self/mounts");
    let mounts = fs::read_to_string(path).map_err(failed("read", path))?;
    let found = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (target, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(target))
    });
    found.ok_or(NodeError::NoCgroup2)
}

/// Makes the node's cgroup in cgroup2, if it is not there, and returns its id.
pub fn cgroup_id(path: &Path) -> Result<u64, NodeError> {
    fs::create_dir_all(path).map_err(failed("make cgroup", path))?;
    // kernfs gives a cgroup's id as the inode number on 64-bit machines.
    fs::metadata(path).map(|m| m.ino()).map_err(failed("look at cgroup", path))
}

/// Makes sure that `path` is in a bpffs; mounts one there if it is not. Pins live as long as that mount: in a mount
/// namespace that may go away, mount it before entering.
pub fn ensure_bpffs(path: &Path) -> Result<(), NodeError> {
    fs::create_dir_all(path).map_err(failed("make folder", path))?;
    let kind = statfs(path).map_err(|errno| failed("look at", path)(errno.into()))?.filesystem_type();
    if kind == BPF_FS_MAGIC {
        return Ok(());
    }
    let none: Option<&str> = None;
    mount(Some("bpf"), path, Some("bpf"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, none)
        .map_err(|errno| failed("mount bpffs at", path)(errno.into()))
}

/// The node's devices and addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// Index and name of the Ethernet devices that have an IPv4 address, bridge and overlay included.
    pub edge: BTreeMap<u32, String>,
    /// Their addresses.
    pub addresses: BTreeSet<Address>,
}

/// Looks at the devices of the current network namespace. `bridge` and `overlay` are edges even without an address.
pub fn devices(bridge: &str, overlay: &str) -> io::Result<Devices> {
    let mut ethernet = BTreeSet::new();
    let mut with_address = BTreeSet::from([bridge.to_owned(), overlay.to_owned()]);
    let mut found = Devices::default();
    for interface in getifaddrs()? {
        if interface.flags.contains(InterfaceFlags::IFF_LOOPBACK) {
            continue;
        }
        let Some(address) = interface.address else { continue };
        if let Some(v4) = address.as_sockaddr_in() {
            found.addresses.insert(Address::from(v4.ip()));
            with_address.insert(interface.interface_name);
        } else if address.as_link_addr().is_some_and(|link| link.hatype() == libc::ARPHRD_ETHER) {
            ethernet.insert(interface.interface_name);
        }
    }
    for name in with_address.intersection(&ethernet) {
        // A device that went away meanwhile is none.
        if let Ok(index) = if_nametoindex(name.as_str()) {
            found.edge.insert(index, name.clone());
        }
    }
    Ok(found)
}

/// Index of a device; 0 if there is none.
#[must_use]
pub fn ifindex(name: &str) -> u32 {
    if_nametoindex(name).unwrap_or(0)
}
