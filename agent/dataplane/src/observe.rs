//! What a node's dataplane says about itself: questions and answers, read from the pinned maps and the kernel's tables.
//!
//! ```text
//! weft why, service, doctor ──► socket (0600, one JSON line each way) ──► agent ─┐
//!                          └──► if no agent answers: the same code here ─────────┴─► Observer ──► pins, netlink, /proc
//! ```
//!
//! An [`Observer`] needs no agent: what it reads belongs to the kernel. The agent serves one all the same, because only
//! one process may take events from the ring buffer.

mod error;
pub mod expected;
pub mod flows;
pub mod health;
pub mod listeners;
pub mod path;
pub mod pinned;
pub mod probe;
pub mod socket;
pub mod tracked;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use weft_cni_netlink::Netlink;
use weft_ebpf_abi::{Address, BACKEND_ACTIVE, BackendKey, BackendValue, Port, ServiceKey, ServiceValue};

pub use error::ObserveError;
use pinned::Pinned;
use wire::{Answer, Backend, BackendKeyed, Ejected, Entries, Frontend, FrontendKey, Protocol, Request};

use crate::peers::memory::Memory;
use crate::{ejection, node, why};

/// Where a node's dataplane is found.
#[derive(Clone, Debug)]
pub struct Observer {
    /// The folder of the pins: the node's bpffs.
    pub pins: PathBuf,
    /// The file of the node's network namespace; `None` for that of this process.
    pub netns: Option<PathBuf>,
    /// The node's cgroup below the root of cgroup2.
    pub cgroup: PathBuf,
}

impl Observer {
    /// Answers a question.
    ///
    /// # Errors
    /// If a map or the kernel can't be read.
    pub fn answer(&self, request: &Request) -> Result<Answer, ObserveError> {
        match request {
            Request::Frontends => Ok(Answer::Frontends(frontends(&Pinned::open(&self.pins)?)?)),
            Request::Entries { frontends, backends } => {
                Ok(Answer::Entries(entries(&Pinned::open(&self.pins)?, frontends, backends)?))
            }
            Request::Why(query) => Ok(Answer::Why(self.why(query)?)),
            Request::Policy(query) => Ok(Answer::Policy(self.policy(query)?)),
            Request::Path { to } => Ok(Answer::Path(self.within(|| path::find(*to))??)),
            Request::Listening(about) => Ok(Answer::Listening(self.listening(about)?)),
            Request::Probe { to } => Ok(Answer::Probed(self.within(|| probe::ask(*to))?)),
            Request::Silent => Ok(Answer::Silent(Memory::of(&self.pins).load()?)),
            Request::Ejected => Ok(Answer::Ejected(ejected(&self.pins)?)),
            Request::Health => Ok(Answer::Health(self.health()?)),
            Request::Tracked { within_seconds } => {
                Ok(Answer::Tracked(tracked::read(&self.pins, *within_seconds)?))
            }
            Request::NotOnTrial { pods } => Ok(Answer::NotOnTrial(self.not_on_trial(pods)?)),
            Request::Flows { .. } => Err(ObserveError::Agent("flows are watched, not asked for".to_owned())),
        }
    }

    fn why(&self, query: &why::Query) -> Result<why::Trace, ObserveError> {
        let process = match &query.pod_uid {
            Some(uid) => listeners::process_of(&self.cgroup, uid)?,
            None => None,
        };
        let netns = process.map(cookie_of).transpose()?;
        why::ask(&Pinned::open(&self.pins)?, query, netns)
    }

    fn policy(&self, query: &why::policy::PolicyQuery) -> Result<why::policy::PolicyVerdict, ObserveError> {
        let devices = match listeners::process_of(&self.cgroup, &query.pod_uid)? {
            Some(process) => host_devices(process)?,
            None => Vec::new(),
        };
        why::policy::ask(&self.pins, &devices, query)
    }

    /// A pod that has no process or device has nothing to be watched, and is not among them.
    fn not_on_trial(&self, pods: &BTreeSet<String>) -> Result<BTreeSet<String>, ObserveError> {
        let on_trial = tracked::on_trial(&self.pins)?;
        let mut missing = BTreeSet::new();
        for uid in pods {
            let Some(process) = listeners::process_of(&self.cgroup, uid)? else { continue };
            if host_devices(process)?.iter().any(|device| !on_trial.contains(device)) {
                missing.insert(uid.clone());
            }
        }
        Ok(missing)
    }

    /// Runs `work` in the node's network namespace.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, ObserveError> {
        match &self.netns {
            Some(path) => Ok(weft_cni_netlink::namespace::within(path, work)?),
            None => Ok(work()),
        }
    }

    fn listening(&self, about: &wire::Listener) -> Result<wire::Listening, ObserveError> {
        match &about.pod_uid {
            Some(uid) => listeners::of_pod(&self.cgroup, uid, about),
            None => self.within(|| listeners::of_namespace(about))?,
        }
    }
}

/// The cookie of a process' network namespace.
fn cookie_of(process: u32) -> Result<u64, ObserveError> {
    let path = PathBuf::from(format!("/proc/{process}/ns/net"));
    let cookie = weft_cni_netlink::namespace::within(&path, node::netns_cookie)?;
    Ok(cookie.map_err(node::failed("get the cookie of", &path))?)
}

/// Indexes of the devices on the node that lead to a process' network namespace.
fn host_devices(process: u32) -> Result<Vec<u32>, ObserveError> {
    let path = PathBuf::from(format!("/proc/{process}/ns/net"));
    let links = weft_cni_netlink::namespace::within(&path, || Netlink::open()?.links())??;
    Ok(links.into_iter().filter(|link| !link.loopback).filter_map(|link| link.peer_index).collect())
}

fn ejected(pins: &std::path::Path) -> Result<Vec<Ejected>, ObserveError> {
    let keyed = |(key, seconds_left): (BackendKey, u32)| {
        let protocol = Protocol::from_number(key.protocol)?;
        let key = BackendKeyed { address: key.address.into(), port: key.port.get(), protocol };
        Some(Ejected { key, seconds_left })
    };
    Ok(ejection::pinned(pins)?.into_iter().filter_map(keyed).collect())
}

/// All addresses and ports that are Services, without their backends: what this costs follows the number of Services.
fn frontends(maps: &Pinned) -> Result<Vec<Frontend>, ObserveError> {
    let mut all: Vec<Frontend> = maps.services()?.iter().filter_map(|(k, v)| frontend(k, v)).collect();
    all.sort_by_key(|frontend| frontend.key);
    Ok(all)
}

fn entries(
    maps: &Pinned,
    wanted: &[FrontendKey],
    backends: &[BackendKeyed],
) -> Result<Entries, ObserveError> {
    let mut out = Entries::default();
    for key in wanted {
        let key = ServiceKey::from(*key);
        let Some(value) = maps.service_value(&key)? else { continue };
        let Some(mut found) = frontend(&key, &value) else { continue };
        found.backends = members(maps, &value)?;
        out.frontends.push(found);
    }
    for backend in backends {
        let key = BackendKey::from(*backend);
        if let Some(value) = maps.backend_value(&key)? {
            out.backends.extend(backend_entry(&key, &value, 0));
        }
    }
    Ok(out)
}

/// The backends of a list, each once, with the number of its places.
pub(crate) fn members(maps: &Pinned, service: &ServiceValue) -> Result<Vec<Backend>, ObserveError> {
    let mut places: BTreeMap<BackendKey, u32> = BTreeMap::new();
    for index in 0..service.count {
        if let Some(backend) = maps.slot_value(service.list, index)? {
            *places.entry(backend).or_default() += 1;
        }
    }
    let mut out = Vec::new();
    for (key, slots) in places {
        // A place without a backend is what no reader may meet; it is shown as one that takes nothing.
        let gone = BackendValue { generation: 0, flags: 0, owner: 0 };
        out.extend(backend_entry(&key, &maps.backend_value(&key)?.unwrap_or(gone), slots));
    }
    Ok(out)
}

fn backend_entry(key: &BackendKey, value: &BackendValue, slots: u32) -> Option<Backend> {
    let protocol = Protocol::from_number(key.protocol)?;
    Some(Backend {
        key: BackendKeyed { address: key.address.into(), port: key.port.get(), protocol },
        active: value.flags & BACKEND_ACTIVE != 0,
        generation: value.generation,
        slots,
    })
}

/// `None` for the entry that only marks an address as a Service's.
pub(crate) fn frontend(key: &ServiceKey, value: &ServiceValue) -> Option<Frontend> {
    Some(Frontend {
        key: FrontendKey::try_from(*key).ok()?,
        list: value.list,
        count: value.count,
        affinity_seconds: value.affinity_seconds,
        flags: wire::flag_names(value.flags),
        backends: Vec::new(),
    })
}

impl From<BackendKeyed> for BackendKey {
    fn from(keyed: BackendKeyed) -> Self {
        Self {
            address: Address::from(keyed.address),
            port: Port::new(keyed.port),
            protocol: keyed.protocol.number(),
            pad: 0,
        }
    }
}
