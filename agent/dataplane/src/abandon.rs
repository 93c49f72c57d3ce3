//! Connected UDP sockets whose backend is gone: they are ended, so that their processes connect again and find another.
//!
//! A socket that a hook connected to a pod sends its datagrams there without asking anybody; no program sees them on the way. When the
//! backend goes, the agent looks through the sockets of the node and its pods and ends those that *asked for a Service* and were
//! given that backend. A socket that a process connected to a pod's own address is left alone. A process that waits
//! gets `ECONNABORTED`, one that sends `EDESTADDRREQ`. TCP connections are left to TCP, as kube-proxy leaves them.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::maps::{HashMap, Map, MapData};
use tokio::task::JoinHandle;
use weft_cni_netlink::diag::{SocketDiag, UdpSocket};
use weft_cni_netlink::namespace;
use weft_ebpf_abi::{Address, BackendKey, Port, SocketKey, SocketValue, UDP, names};
use zerocopy::IntoBytes as _;

/// Cgroups below one node that are read; a larger tree is cut off with a warning rather than walked for ever.
const MAX_CGROUPS: usize = 65_536;

/// Where to look.
#[derive(Clone, Debug)]
pub struct Search {
    /// The node's cgroup in cgroup2, its whole path: its processes' namespaces are looked through, beside the agent's own.
    pub node_cgroup: PathBuf,
    /// Where the programs' maps are pinned.
    pub pin_dir: PathBuf,
}

/// Why no socket was looked at.
#[derive(Debug, thiserror::Error)]
#[error("cannot read what sockets were given")]
pub struct AbandonError(#[from] aya::maps::MapError);

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Namespaces looked through.
    pub namespaces: usize,
    /// Sockets ended.
    pub ended: usize,
}

/// What the hooks gave to sockets.
struct Given(HashMap<MapData, [u8; size_of::<SocketKey>()], [u8; size_of::<SocketValue>()]>);

impl Given {
    fn open(pin_dir: &Path) -> Result<Self, AbandonError> {
        let data = MapData::from_pin(pin_dir.join("maps").join(names::SOCKETS))?;
        Ok(Self(HashMap::try_from(Map::LruHashMap(data))?))
    }

    /// Whether a hook gave this backend to a socket.
    fn holds(&self, cookie: u64, peer: BackendKey) -> bool {
        let key = SocketKey { cookie, peer, pad: [0; 4] };
        let mut bytes = [0; size_of::<SocketKey>()];
        bytes.copy_from_slice(key.as_bytes());
        self.0.get(&bytes, 0).is_ok()
    }
}

/// Ends the connected UDP sockets of Services to backends that are gone. A namespace that can't be looked at is logged and
/// passed over: it may just have ended. Blocks; works on a thread of its own, which enters other namespaces.
///
/// # Errors
/// If the map of sockets can't be read.
pub fn end_sockets(gone: &BTreeSet<BackendKey>, search: &Search) -> Result<Report, AbandonError> {
    std::thread::scope(|scope| match scope.spawn(|| end_all(gone, search)).join() {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn end_all(gone: &BTreeSet<BackendKey>, search: &Search) -> Result<Report, AbandonError> {
    let given = Given::open(&search.pin_dir)?;
    let mut report = Report::default();
    for path in namespaces(&search.node_cgroup) {
        match end_within(&path, gone, &given) {
            Ok(ended) => {
                report.namespaces += 1;
                report.ended += ended;
            }
            Err(error) => tracing::warn!(path = %path.display(), %error,
                source = ?std::error::Error::source(&error), "cannot look through UDP sockets"),
        }
    }
    Ok(report)
}

fn end_within(
    path: &Path,
    gone: &BTreeSet<BackendKey>,
    given: &Given,
) -> Result<usize, weft_cni_netlink::Error> {
    let namespace = match namespace::open(path) {
        Ok(namespace) => namespace,
        // The process has ended.
        Err(error) if error.class() == weft_cni_netlink::Class::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut diag = SocketDiag::open_within(namespace.as_fd())?;
    let mut ended = 0;
    for socket in diag.connected_udp()? {
        let peer = backend(&socket);
        if gone.contains(&peer) && given.holds(socket.cookie, peer) {
            diag.destroy(&socket)?;
            ended += 1;
        }
    }
    Ok(ended)
}

fn backend(socket: &UdpSocket) -> BackendKey {
    // A mapped peer of an IPv6 socket is the IPv4 one: the tables have both as mapped.
    let address = Address::from(socket.peer.ip());
    BackendKey { address, port: Port::new(socket.peer.port()), protocol: UDP, pad: 0 }
}

/// Searches in the background, one at a time; what is gone meanwhile waits for the next.
#[derive(Debug)]
pub(crate) struct Searches {
    search: Arc<Search>,
    waiting: BTreeSet<BackendKey>,
    running: Option<JoinHandle<Result<Report, AbandonError>>>,
}

impl Searches {
    pub(crate) fn new(search: Search) -> Self {
        Self { search: Arc::new(search), waiting: BTreeSet::new(), running: None }
    }

    /// Takes in UDP backends that are gone.
    pub(crate) fn add(&mut self, gone: BTreeSet<BackendKey>) {
        self.waiting.extend(gone);
        self.start();
    }

    fn start(&mut self) {
        if self.running.is_none() && !self.waiting.is_empty() {
            let (gone, search) = (std::mem::take(&mut self.waiting), Arc::clone(&self.search));
            self.running = Some(tokio::task::spawn_blocking(move || end_sockets(&gone, &search)));
        }
    }

    /// Waits for the search that runs, if one does, and starts the next. May be dropped at any time.
    pub(crate) async fn progress(&mut self) {
        let Some(running) = self.running.as_mut() else { return std::future::pending().await };
        let outcome = running.await;
        self.running = None;
        match outcome {
            Ok(Ok(report)) if report.ended > 0 => {
                tracing::info!(sockets = report.ended, "ended UDP sockets whose backend is gone");
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, source = ?std::error::Error::source(&error),
                "UDP sockets stay with backends that are gone"),
            Err(error) => tracing::error!(%error, "the search for UDP sockets ended early"),
        }
        self.start();
    }
}

/// One file for each network namespace of the agent and of the node's processes.
fn namespaces(node_cgroup: &Path) -> Vec<PathBuf> {
    let own = PathBuf::from("/proc/thread-self/ns/net");
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let processes =
        processes(node_cgroup).into_iter().map(|pid| PathBuf::from(format!("/proc/{pid}/ns/net")));
    for path in std::iter::once(own).chain(processes) {
        // The number of the file behind the link is the namespace's.
        if let Ok(metadata) = fs::metadata(&path)
            && seen.insert((metadata.dev(), metadata.ino()))
        {
            found.push(path);
        }
    }
    found
}

/// Processes of a cgroup and those below it. One of each group would do if groups did not mix namespaces.
fn processes(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut waiting = vec![root.to_owned()];
    let mut visited = 0;
    while let Some(folder) = waiting.pop() {
        visited += 1;
        if visited > MAX_CGROUPS {
            tracing::warn!(cgroup = %root.display(), "too many cgroups, sockets of some pods are not looked at");
            break;
        }
        match read_group(&folder) {
            Ok((pids, below)) => {
                found.extend(pids);
                waiting.extend(below);
            }
            // It ended meanwhile.
            Err(error) => tracing::debug!(cgroup = %folder.display(), %error, "cannot read a cgroup"),
        }
    }
    found
}

fn read_group(folder: &Path) -> io::Result<(Vec<String>, Vec<PathBuf>)> {
    let pids = io::read_to_string(File::open(folder.join("cgroup.procs"))?)?;
    let mut below = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            below.push(entry.path());
        }
    }
    Ok((pids.lines().map(str::to_owned).collect(), below))
}
