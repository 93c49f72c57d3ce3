//! The life of a sandbox: namespaces, cgroup and init, then the network; and all of it backwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use weft_agent_runtime_init::wire::{self, Reply, Request};

use super::init::{self, Connection};
use super::records::{self, Phase, SandboxRecord};
use super::{Inner, SandboxEntry, blocking, network_error, new_id, not_found, now_ns, spec};
use crate::cni::{self, Attachment};
use crate::{Error, RuntimeEvent, Sandbox, SandboxSpec};

/// An init that is told to end kills its containers and ends; the kernel does it at once unless it is stuck.
const SHUTDOWN: Duration = Duration::from_secs(10);
/// Waiting for the kernel to let go of a cgroup whose processes have been killed.
const CGROUP_GONE: Duration = Duration::from_secs(10);
const CGROUP_POLL: Duration = Duration::from_millis(5);

/// What every other runtime sets in a pod's own network namespace: no privilege guards what the pod has for itself.
const SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

impl Inner {
    pub(super) async fn run_sandbox(self: &Arc<Self>, spec: SandboxSpec) -> Result<Sandbox, Error> {
        spec::check_cgroup(&spec.cgroup)?;
        let record = SandboxRecord {
            id: new_id(),
            spec,
            phase: Phase::Creating,
            ips: Vec::new(),
            created_at_ns: now_ns(),
        };
        let made = self.make_sandbox(record.clone()).await;
        if made.is_err()
            && let Err(error) = self.undo_sandbox(&record).await
        {
            // It keeps its record, and the next start of the agent tries again.
            tracing::warn!(sandbox = record.id, error = super::chain(&error), "cannot undo a sandbox");
        }
        made
    }

    async fn make_sandbox(self: &Arc<Self>, mut record: SandboxRecord) -> Result<Sandbox, Error> {
        let (inner, copy) = (self.clone(), record.clone());
        let pid = blocking(move || inner.start_init(&copy)).await?;
        if !record.spec.host_network {
            record.ips = self.attach(&record).await?;
        }
        record.phase = Phase::Ready;
        let (inner, copy) = (self.clone(), record.clone());
        blocking(move || inner.paths.save_sandbox(&copy)).await?;
        let id = record.id.clone();
        let entry = SandboxEntry { record, alive: true, pid };
        let found = entry.as_found();
        self.state.lock().sandboxes.insert(id.clone(), entry);
        if !self.listen(&id).await? {
            self.state.lock().sandboxes.remove(&id);
            return Err(Error::Invalid { what: "run a sandbox", reason: "its init died".to_owned() });
        }
        Ok(found)
    }

    fn start_init(&self, record: &SandboxRecord) -> Result<i32, Error> {
        let (id, spec) = (&record.id, &record.spec);
        records::make_folder(&self.paths.sandbox(id))?;
        self.paths.save_sandbox(record)?;
        let run = self.paths.sandbox_run(id);
        records::make_folder(&run)?;
        let resolv_conf = run.join("resolv.conf");
        fs::write(&resolv_conf, &spec.resolv_conf).map_err(records::io_error("write", &resolv_conf))?;
        let (pod, group) = (self.paths.pod_cgroup(spec), self.paths.leaf_cgroup(spec, id));
        let refused =
            self.hierarchies.create(&group).map_err(records::io_error("make the cgroup", &group))?;
        self.warn_refused(refused);
        self.warn_refused(self.hierarchies.limit(&pod, &spec::limits(&spec.resources)));
        let own_network = !spec.host_network;
        let mut sysctls: BTreeMap<String, String> = BTreeMap::new();
        if own_network {
            sysctls.extend(SYSCTLS.map(|(name, value)| (name.to_owned(), value.to_owned())));
        }
        sysctls.extend(spec.sysctls.clone());
        let config = wire::Sandbox {
            id: id.clone(),
            hostname: own_network.then(|| spec.hostname.clone()),
            netns: own_network.then(|| self.paths.netns(id)),
            shm: (!spec.host_ipc).then(|| self.paths.shm(id)),
            sysctls,
            join: self.hierarchies.v1(&group),
            unified: self.hierarchies.unified(&group),
        };
        init::spawn(&self.init_path, &run, &config)
    }

    async fn attach(&self, record: &SandboxRecord) -> Result<Vec<std::net::IpAddr>, Error> {
        let spec = &record.spec;
        let args = [
            ("IgnoreUnknown", "1"),
            ("K8S_POD_INFRA_CONTAINER_ID", &record.id),
            ("K8S_POD_NAME", &spec.name),
            ("K8S_POD_NAMESPACE", &spec.namespace),
            ("K8S_POD_UID", &spec.uid),
        ];
        let args = args.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let netns = self.paths.netns(&record.id);
        let capabilities = cni::capabilities(spec);
        let mut attachment =
            self.network.prepare(&record.id, &netns, args, capabilities).map_err(network_error)?;
        let path = self.paths.network(&record.id);
        // Before ADD: whatever it leaves when we die, DEL finds with the same configuration.
        records::save(&path, &attachment)?;
        let ips = self.network.add(&mut attachment).await.map_err(network_error)?;
        records::save(&path, &attachment)?;
        Ok(ips)
    }

    pub(super) async fn check_network(&self, id: &str) -> Result<(), Error> {
        let attachment: Option<Attachment> = records::load(&self.paths.network(id))?;
        let attachment = attachment.ok_or_else(|| not_found("network of sandbox", id))?;
        self.network.check(&attachment).await.map_err(network_error)
    }

    /// Listens to an init: adopts its containers' states at once, and all changes from now on. False if it is dead.
    pub(super) async fn listen(self: &Arc<Self>, id: &str) -> Result<bool, Error> {
        let folder = self.paths.sandbox_run(id);
        let Ok(mut connection) = Connection::open(&folder).await else { return Ok(false) };
        let pid = connection.peer().unwrap_or_default();
        let Reply::Containers(statuses) = connection.ask(&Request::Subscribe).await? else {
            return Err(Error::Invalid { what: "subscribe", reason: "unexpected answer".to_owned() });
        };
        if let Some(entry) = self.state.lock().sandboxes.get_mut(id) {
            (entry.alive, entry.pid) = (true, pid);
        }
        statuses.into_iter().for_each(|status| self.observe(status));
        let (inner, id) = (self.clone(), id.to_owned());
        tokio::spawn(async move {
            let cancel = inner.cancel.clone();
            cancel.run_until_cancelled(inner.follow(&id, connection)).await;
        });
        Ok(true)
    }

    async fn follow(self: &Arc<Self>, id: &str, mut connection: Connection) {
        loop {
            match connection.receive().await {
                Ok(Some(Reply::Event(status))) => self.observe(status),
                Ok(Some(other)) => {
                    tracing::warn!(sandbox = id, message = ?other, "unexpected message of an init")
                }
                Ok(None) | Err(_) => break,
            }
        }
        let (expected, pod_uid) = {
            let mut state = self.state.lock();
            let Some(entry) = state.sandboxes.get_mut(id) else { return };
            entry.alive = false;
            (entry.record.phase != Phase::Ready, entry.record.spec.uid.clone())
        };
        if let Err(error) = self.kill_containers(id).await {
            tracing::warn!(sandbox = id, error = super::chain(&error), "cannot record the end of containers");
        }
        if !expected {
            tracing::warn!(sandbox = id, "a sandbox's init died");
            self.emit(RuntimeEvent::SandboxDied { pod_uid, sandbox_id: id.to_owned() });
        }
    }

    /// The kernel has killed the containers of a dead init, but for one that has become another user since.
    async fn kill_containers(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let record = self.state.lock().sandboxes.get(id).map(|entry| entry.record.clone());
        if let Some(record) = record {
            let (inner, groups) = (self.clone(), self.groups_of(&record));
            blocking(move || {
                groups.iter().for_each(|group| inner.hierarchies.kill(group));
                Ok(())
            })
            .await?;
        }
        self.bury_containers(id).await
    }

    pub(super) async fn stop_sandbox(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let Some(record) = self.mark_stopped(id) else { return Ok(()) };
        let (inner, copy) = (self.clone(), record.clone());
        blocking(move || inner.paths.save_sandbox(&copy)).await?;
        self.tear_down(&record).await
    }

    fn mark_stopped(&self, id: &str) -> Option<SandboxRecord> {
        let mut state = self.state.lock();
        let entry = state.sandboxes.get_mut(id)?;
        entry.record.phase = Phase::Stopped;
        Some(entry.record.clone())
    }

    /// Everything of a sandbox but its record. May be repeated.
    pub(super) async fn tear_down(self: &Arc<Self>, record: &SandboxRecord) -> Result<(), Error> {
        let id = record.id.as_str();
        self.end_init(id).await;
        // Named after the init's end: it can start nothing more.
        let groups = self.groups_of(record);
        let (inner, copy) = (self.clone(), groups.clone());
        blocking(move || {
            copy.iter().for_each(|group| inner.hierarchies.kill(group));
            Ok(())
        })
        .await?;
        self.bury_containers(id).await?;
        self.detach(record).await?;
        let (inner, owned) = (self.clone(), id.to_owned());
        blocking(move || {
            unmount(&inner.paths.shm(&owned))?;
            unmount(&inner.paths.netns(&owned))?;
            records::remove(&inner.paths.netns(&owned))?;
            records::remove(&inner.paths.sandbox_run(&owned))
        })
        .await?;
        for group in groups {
            self.remove_group(group).await?;
        }
        Ok(())
    }

    /// The groups of a sandbox's init and containers.
    fn groups_of(&self, record: &SandboxRecord) -> Vec<std::path::PathBuf> {
        let state = self.state.lock();
        let containers = state.containers.values().filter(|entry| entry.record.sandbox_id == record.id);
        let ids = containers.map(|entry| entry.record.id.as_str()).chain([record.id.as_str()]);
        ids.map(|id| self.paths.leaf_cgroup(&record.spec, id)).collect()
    }

    /// Asks an init to end; the caller kills what is left.
    async fn end_init(&self, id: &str) {
        let ask = async {
            let mut connection = Connection::open(&self.paths.sandbox_run(id)).await.ok()?;
            connection.send(&Request::Shutdown).await.ok()?;
            // `Done`, or the end of the connection: both mean that it is over.
            while let Ok(Some(reply)) = connection.receive::<Reply>().await {
                if reply == Reply::Done {
                    break;
                }
            }
            Some(())
        };
        if tokio::time::timeout(SHUTDOWN, ask).await.is_err() {
            tracing::warn!(sandbox = id, "an init does not end; killing it");
        }
    }

    async fn detach(&self, record: &SandboxRecord) -> Result<(), Error> {
        let path = self.paths.network(&record.id);
        let Some(mut attachment) = records::load::<Attachment>(&path)? else { return Ok(()) };
        if !is_netns(&attachment.netns) {
            // After a restart of the machine; plugins then free what they keep on disk (CNI 1.1.0 §4 DEL).
            attachment.netns = std::path::PathBuf::new();
        }
        self.network.delete(&attachment).await.map_err(network_error)?;
        records::remove(&path)
    }

    /// Removes a group as soon as its dead are gone.
    pub(super) async fn remove_group(self: &Arc<Self>, group: std::path::PathBuf) -> Result<(), Error> {
        let attempt = async {
            loop {
                let (inner, copy) = (self.clone(), group.clone());
                let gone = blocking(move || {
                    let gone = inner.hierarchies.remove(&copy);
                    if !gone {
                        inner.hierarchies.kill(&copy);
                    }
                    Ok(gone)
                });
                if gone.await? {
                    return Ok(());
                }
                tokio::time::sleep(CGROUP_POLL).await;
            }
        };
        let timeout = Error::Timeout { what: "removing a cgroup", seconds: CGROUP_GONE.as_secs() };
        tokio::time::timeout(CGROUP_GONE, attempt).await.unwrap_or(Err(timeout))
    }

    /// Undoes a sandbox that was never handed out.
    pub(super) async fn undo_sandbox(self: &Arc<Self>, record: &SandboxRecord) -> Result<(), Error> {
        self.tear_down(record).await?;
        self.forget_sandbox(record).await
    }

    async fn forget_sandbox(self: &Arc<Self>, record: &SandboxRecord) -> Result<(), Error> {
        let (inner, copy) = (self.clone(), record.clone());
        blocking(move || {
            if !copy.spec.cgroup.is_empty() {
                inner.hierarchies.remove_if_empty(&inner.paths.pod_cgroup(&copy.spec));
            }
            records::remove(&inner.paths.sandbox(&copy.id))
        })
        .await
    }

    pub(super) async fn remove_sandbox(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        self.stop_sandbox(id).await?;
        let (record, containers) = {
            let state = self.state.lock();
            let Some(entry) = state.sandboxes.get(id) else { return Ok(()) };
            let containers = state.containers.values().filter(|entry| entry.record.sandbox_id == id);
            (entry.record.clone(), containers.map(|entry| entry.record.id.clone()).collect::<Vec<_>>())
        };
        for container in containers {
            self.remove_container(&container).await?;
        }
        self.forget_sandbox(&record).await?;
        self.state.lock().sandboxes.remove(id);
        Ok(())
    }
}

/// Whether a path is a pinned network namespace, not the empty file that a restart of the machine leaves.
fn is_netns(path: &Path) -> bool {
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    nix::sys::statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type().0 == NSFS_MAGIC)
}

/// Unmounts everything from a path; nothing mounted is fine.
pub(super) fn unmount(path: &Path) -> Result<(), Error> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(records::io_error("unmount", path)(error.into())),
        }
    }
}
