//! What this node is to the kernel: its namespace, its cgroup, its devices and addresses, its bpffs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};
use weft_cni_netlink::Netlink;

use crate::OVERLAY;
use crate::announce::DEVICE;

/// `BPF_FS_MAGIC` of linux/magic.h.
pub(crate) const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

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

/// Removes the node's cgroup and the folders above it, as far as they are empty. What is gone already is no error.
pub fn remove_cgroup(cgroup2: &Path, node_cgroup: &Path) -> Result<(), NodeError> {
    for (depth, relative) in node_cgroup.ancestors().take_while(|p| !p.as_os_str().is_empty()).enumerate() {
        let path = cgroup2.join(relative);
        match fs::remove_dir(&path) {
            Ok(()) => {}
            Err(source) if source.kind() == io::ErrorKind::NotFound => {}
            Err(source) if depth == 0 => return Err(failed("remove cgroup", &path)(source)),
            // Another node of the machine is below it.
            Err(_) => break,
        }
    }
    Ok(())
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
    /// Number and name of the Ethernet devices that have an address, bridge and overlay included.
    pub edge: BTreeMap<u32, String>,
    /// Addresses of the node that others can use: neither loopback's nor link-local ones of IPv6.
    pub addresses: BTreeSet<IpAddr>,
    /// Number of the pods' bridge; 0 while there is none.
    pub bridge: u32,
    /// Number of the overlay's device; 0 while there is none.
    pub overlay: u32,
    /// The overlay's device is set up.
    pub overlay_up: bool,
}

/// Looks at the devices of the current network namespace, with the pods' bridge of this name. Bridge and overlay are edges even without an address.
pub fn devices(bridge: Option<&str>) -> Result<Devices, weft_cni_netlink::Error> {
    let mut netlink = Netlink::open()?;
    let mut links = netlink.links()?;
    // Load-balancer addresses are Services', not the node's.
    links.retain(|link| link.name != DEVICE);
    let named = |name| links.iter().find(|link| link.name == name).map_or(0, |link| link.index);
    let bridge = bridge.map_or(0, named);
    let mut found = Devices { bridge, overlay: named(OVERLAY), ..Devices::default() };
    found.overlay_up = links.iter().any(|link| link.index == found.overlay && link.up);
    let mut edges = BTreeSet::from([found.bridge, found.overlay]);
    // The overlay's own address is its peers' router, and nobody's to ask.
    for address in netlink.addresses()?.into_iter().filter(|address| address.index != found.overlay) {
        let ip = address.network.ip();
        let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        if !link_local && links.iter().any(|link| link.index == address.index && !link.loopback) {
            found.addresses.insert(ip);
            edges.insert(address.index);
        }
    }
    let ethernet = links.into_iter().filter(|link| link.mac.is_some() && !link.loopback);
    found.edge = ethernet.filter(|l| edges.contains(&l.index)).map(|l| (l.index, l.name)).collect();
    Ok(found)
}

/// The cookie of the calling thread's network namespace, by which the programs know the node's own sockets.
pub fn netns_cookie() -> io::Result<u64> {
    crate::sys::netns_cookie()
}
