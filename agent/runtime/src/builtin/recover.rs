//! After a start of the agent: adopt what runs, undo what is half made, remove what has no record. And the end of all.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;
use weft_agent_runtime_init::wire;

use super::container::from_wire;
use super::records::{self, ContainerRecord, Phase, SandboxRecord};
use super::sandbox::unmount;
use super::{ContainerEntry, Inner, SandboxEntry, blocking, chain, image_error};
use crate::{ContainerState, Error};

/// Digits of an id.
const ID_BYTES: usize = 64;

struct Found {
    sandboxes: Vec<SandboxRecord>,
    containers: Vec<(ContainerRecord, ContainerState)>,
}

impl Inner {
    pub(super) async fn recover(self: &Arc<Self>) -> Result<(), Error> {
        let inner = self.clone();
        let found = blocking(move || inner.read_all()).await?;
        let unfinished = self.enter(found);
        for record in unfinished {
            tracing::info!(sandbox = record.id, "undoing a sandbox that was being made");
            if let Err(error) = self.undo_sandbox(&record).await {
                // Its record stays, so the next start tries again.
                tracing::warn!(sandbox = record.id, error = chain(&error), "cannot undo a sandbox");
            }
        }
        let ids: Vec<String> = self.state.lock().sandboxes.keys().cloned().collect();
        for id in &ids {
            match self.listen(id).await {
                Ok(true) => {}
                Ok(false) => self.bury_containers(id).await?,
                // It lives but doesn't answer: its pod is not ready, and the kubelet replaces it.
                Err(error) => tracing::warn!(sandbox = id, error = chain(&error), "cannot adopt a sandbox"),
            }
        }
        self.sweep().await?;
        if let Err(error) = self.network.collect_garbage(&ids).await {
            tracing::debug!(error = chain(&error), "no garbage collection of addresses");
        }
        Ok(())
    }

    /// Reads all records; removes folders that hold none.
    fn read_all(&self) -> Result<Found, Error> {
        let (sandboxes, debris) = self.paths.load_sandboxes()?;
        debris.iter().try_for_each(|id| records::remove(&self.paths.sandbox(id)))?;
        let (records, debris) = self.paths.load_containers()?;
        debris.iter().try_for_each(|id| records::remove(&self.paths.container(id)))?;
        let known: BTreeSet<&str> = sandboxes.iter().map(|record| record.id.as_str()).collect();
        let mut containers = Vec::new();
        for record in records {
            if !known.contains(record.sandbox_id.as_str()) {
                records::remove(&self.paths.container(&record.id))?;
                continue;
            }
            let exit: Option<wire::Exit> =
                records::load(&self.paths.container(&record.id).join(wire::EXIT_FILE))?;
            let state = exit.map_or(ContainerState::Created, |exit| ContainerState::Exited(from_wire(exit)));
            containers.push((record, state));
        }
        let ids: BTreeSet<&str> = containers.iter().map(|(record, _)| record.id.as_str()).collect();
        let uses = self.images.uses().map_err(image_error)?;
        uses.iter()
            .filter(|id| !ids.contains(id.as_str()))
            .try_for_each(|id| self.images.release(id))
            .map_err(image_error)?;
        Ok(Found { sandboxes, containers })
    }

    /// Puts records into memory; returns sandboxes that were never finished.
    fn enter(&self, found: Found) -> Vec<SandboxRecord> {
        let mut state = self.state.lock();
        let mut unfinished = Vec::new();
        for record in found.sandboxes {
            if record.phase == Phase::Creating {
                unfinished.push(record);
            } else {
                state.sandboxes.insert(record.id.clone(), SandboxEntry { record, alive: false, pid: 0 });
            }
        }
        for (record, container) in found.containers {
            let entry = ContainerEntry { record: Arc::new(record), state: watch::Sender::new(container) };
            state.containers.insert(entry.record.id.clone(), entry);
        }
        unfinished
    }

    /// Removes run folders, namespaces and groups that nobody owns.
    async fn sweep(self: &Arc<Self>) -> Result<(), Error> {
        let (sandboxes, mut known) = {
            let state = self.state.lock();
            let sandboxes: BTreeSet<String> = state.sandboxes.keys().cloned().collect();
            (sandboxes, state.containers.keys().cloned().collect::<BTreeSet<String>>())
        };
        known.extend(sandboxes.iter().cloned());
        let inner = self.clone();
        let orphans = blocking(move || {
            for id in names(&inner.paths.run.join("netns")).difference(&sandboxes) {
                unmount(&inner.paths.netns(id))?;
                records::remove(&inner.paths.netns(id))?;
            }
            for id in names(&inner.paths.run.join("sandboxes")).difference(&sandboxes) {
                unmount(&inner.paths.shm(id))?;
                records::remove(&inner.paths.sandbox_run(id))?;
            }
            let groups = inner.hierarchies.groups_below(&inner.paths.cgroup);
            Ok(groups.into_iter().filter(|group| is_orphan(group, &known)).collect::<Vec<PathBuf>>())
        });
        for group in orphans.await? {
            tracing::info!(cgroup = %group.display(), "removing a cgroup that has no owner");
            self.remove_group(group).await?;
        }
        Ok(())
    }

    pub(super) async fn purge(self: &Arc<Self>) -> Result<(), Error> {
        let ids: Vec<String> = self.state.lock().sandboxes.keys().cloned().collect();
        let mut first_error = None;
        for id in ids {
            let mut removed = self.remove_sandbox(&id).await;
            if let Err(Error::Network(_)) = removed {
                // A plugin that fails must not keep the rest alive; the pod's end of its link goes with the namespace.
                first_error = first_error.or(removed.err());
                records::remove(&self.paths.network(&id))?;
                removed = self.remove_sandbox(&id).await;
            }
            if let Err(error) = removed {
                tracing::warn!(sandbox = id, error = chain(&error), "cannot remove a sandbox");
                first_error.get_or_insert(error);
            }
        }
        self.remove_group(self.paths.cgroup.clone()).await?;
        let inner = self.clone();
        blocking(move || {
            let parent = inner.paths.cgroup.parent().filter(|parent| !parent.as_os_str().is_empty());
            parent.iter().for_each(|parent| inner.hierarchies.remove_if_empty(parent));
            let run = ["sandboxes", "netns", "seccomp"].map(|part| inner.paths.run.join(part));
            run.iter()
                .chain([&inner.paths.sandboxes(), &inner.paths.containers()])
                .try_for_each(|path| records::remove(path))?;
            // The folder may hold what others keep in it.
            let _ = fs::remove_dir(&inner.paths.run);
            Ok(())
        })
        .await?;
        first_error.map_or(Ok(()), Err)
    }
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn is_orphan(group: &Path, known: &BTreeSet<String>) -> bool {
    let name = group.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.len() == ID_BYTES && name.bytes().all(|byte| byte.is_ascii_hexdigit()) && !known.contains(&name)
}
