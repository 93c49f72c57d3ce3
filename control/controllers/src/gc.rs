//! Owns the garbage collector: what an owner leaves behind is deleted, or let go, as its deletion asked for.

pub(crate) mod graph;

use crate::discovery::{self, Resource};
use crate::error::{Doing, SyncError};
use graph::{FOREGROUND, Graph, Identity, Node, ORPHAN, OwnerState, Task, Verdict, group_of};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::core::{DynamicObject, PartialObjectMeta};
use kube::{Client, ResourceExt};
use parking_lot::{Mutex, RwLock};
use serde_json::json;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::{Metadata, Selection, Sink, follow};
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::{Chain, Class, classify, found};

/// Upstream's `--concurrent-gc-syncs`.
const WORKERS: usize = 20;
/// How often new kinds are looked for, as upstream.
const DISCOVERY_PERIOD: Duration = Duration::from_secs(30);
const DISCOVERY_RETRY: Duration = Duration::from_millis(200);

/// The controller.
pub(crate) struct Controller {
    client: Client,
    graph: Mutex<Graph>,
    queue: Queue<Task>,
    /// By group and kind.
    resources: RwLock<HashMap<(String, String), Resource>>,
    /// Kinds whose first list is not in the graph yet.
    unsynced: watch::Sender<usize>,
}

/// Feeds one kind into the graph.
struct KindSink {
    controller: Arc<Controller>,
    group: String,
    kind: String,
    synced: std::sync::atomic::AtomicBool,
}

impl KindSink {
    fn identity(&self, object: &PartialObjectMeta) -> Identity {
        Identity {
            group: self.group.clone(),
            kind: self.kind.clone(),
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
        }
    }

    fn enqueue(&self, tasks: Vec<Task>) {
        tasks.into_iter().for_each(|task| self.controller.queue.add(task));
    }
}

impl Sink<PartialObjectMeta> for KindSink {
    fn replace(&self, objects: Vec<PartialObjectMeta>) {
        let keep: BTreeSet<_> = objects.iter().filter_map(ResourceExt::uid).collect();
        let known = self.controller.graph.lock().of_kind(&self.group, &self.kind);
        for uid in known.iter().filter(|uid| !keep.contains(*uid)) {
            let tasks = self.controller.graph.lock().remove(uid);
            self.enqueue(tasks);
        }
        objects.into_iter().for_each(|object| self.applied(object));
        if !self.synced.swap(true, std::sync::atomic::Ordering::Relaxed) {
            self.controller.unsynced.send_modify(|n| *n -= 1);
        }
    }

    fn applied(&self, object: PartialObjectMeta) {
        let tasks = self.controller.graph.lock().apply(self.identity(&object), &object.metadata);
        self.enqueue(tasks);
    }

    fn deleted(&self, object: PartialObjectMeta) {
        let tasks = self.controller.graph.lock().remove(&object.uid().unwrap_or_default());
        self.enqueue(tasks);
    }
}

impl Controller {
    pub(crate) fn new(client: Client) -> Arc<Self> {
        Arc::new(Self {
            client,
            graph: Mutex::default(),
            queue: Queue::default(),
            resources: RwLock::default(),
            unsynced: watch::Sender::new(1),
        })
    }

    pub(crate) async fn run(self: Arc<Self>, shutdown: &CancellationToken) {
        tokio::join!(self.clone().watch_all(shutdown), self.collect(shutdown));
    }

    async fn collect(&self, shutdown: &CancellationToken) {
        // Before all kinds are in, an owner may seem to be missing that is merely not listed yet.
        let mut unsynced = self.unsynced.subscribe();
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = unsynced.wait_for(|n| *n == 0) => {}
        }
        work(&self.queue, WORKERS, shutdown, |task| self.sync(task)).await;
    }

    /// Watches every deletable kind, and looks for new ones from time to time.
    async fn watch_all(self: Arc<Self>, shutdown: &CancellationToken) {
        let mut watches = JoinSet::new();
        let mut first = true;
        loop {
            let pause = match discovery::deletable(&self.client).await {
                Ok(all) => {
                    self.watch_new(all, &mut watches, shutdown);
                    if std::mem::take(&mut first) {
                        self.unsynced.send_modify(|n| *n -= 1);
                    }
                    DISCOVERY_PERIOD
                }
                Err(error) => {
                    tracing::debug!(error = %Chain(&error), "cannot discover resources");
                    if first { DISCOVERY_RETRY } else { DISCOVERY_PERIOD }
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        while watches.join_next().await.is_some() {}
    }

    fn watch_new(
        self: &Arc<Self>,
        all: Vec<Resource>,
        watches: &mut JoinSet<()>,
        shutdown: &CancellationToken,
    ) {
        // Events own nothing, are owned by nothing, and are many.
        let wanted = |r: &Resource| r.supports("watch") && r.api.plural != "events";
        for resource in all.into_iter().filter(wanted) {
            let id = (resource.api.group.clone(), resource.api.kind.clone());
            if self.resources.read().contains_key(&id) {
                continue;
            }
            let source = Metadata(Api::all_with(self.client.clone(), &resource.api));
            let sink = KindSink {
                controller: self.clone(),
                group: id.0.clone(),
                kind: id.1.clone(),
                synced: false.into(),
            };
            self.resources.write().insert(id, resource);
            self.unsynced.send_modify(|n| *n += 1);
            let stop = shutdown.clone();
            watches.spawn(async move { follow(&source, &sink, &Selection::default(), &stop).await });
        }
    }

    async fn sync(&self, task: Task) -> Result<Outcome, SyncError> {
        match task {
            Task::Delete(uid) => self.attempt(&uid).await,
            Task::Orphan(uid) => self.orphan(&uid).await,
        }
    }

    fn api(&self, group: &str, kind: &str, namespace: &str) -> Option<Api<DynamicObject>> {
        let resources = self.resources.read();
        let resource = resources.get(&(group.to_owned(), kind.to_owned()))?;
        Some(match resource.namespaced {
            true => Api::namespaced_with(self.client.clone(), namespace, &resource.api),
            false => Api::all_with(self.client.clone(), &resource.api),
        })
    }

    fn api_of(&self, id: &Identity) -> Option<Api<DynamicObject>> {
        self.api(&id.group, &id.kind, &id.namespace)
    }

    /// Deletes an object if none of its owners is left.
    async fn attempt(&self, uid: &str) -> Result<Outcome, SyncError> {
        let Some(node) = self.graph.lock().get(uid).cloned() else { return Ok(Outcome::Done) };
        if node.unseen || (node.deleting && !node.foreground) {
            return Ok(Outcome::Done);
        }
        if node.foreground {
            return self.finish_foreground(&node).await;
        }
        let Some(api) = self.api_of(&node.identity) else { return Ok(Outcome::Done) };
        let name = &node.identity.name;
        let latest = found(api.get_metadata(name).await).doing("get", name)?;
        let Some(latest) = latest.filter(|l| l.uid().as_deref() == Some(uid)) else {
            // Its end is on the way to the graph.
            return Ok(Outcome::Done);
        };
        let mut owners = Vec::new();
        for owner in latest.metadata.owner_references.clone().unwrap_or_default() {
            let Some(state) = self.owner_state(&owner, &node.identity.namespace).await? else {
                // Of a kind that can't be asked for: as upstream, nothing is done before it can.
                return Ok(Outcome::After(DISCOVERY_PERIOD));
            };
            owners.push((owner, state));
        }
        match graph::verdict(&owners, !node.dependents.is_empty()) {
            Verdict::Keep => Ok(Outcome::Done),
            Verdict::Drop(gone) => self.drop_references(&api, &latest, &gone).await,
            Verdict::Delete { foreground } => self.delete(&api, &latest, foreground).await,
        }
    }

    async fn owner_state(
        &self,
        owner: &OwnerReference,
        namespace: &str,
    ) -> Result<Option<OwnerState>, SyncError> {
        let Some(api) = self.api(group_of(&owner.api_version), &owner.kind, namespace) else {
            return Ok(None);
        };
        let live = found(api.get_metadata(&owner.name).await).doing("get owner", &owner.name)?;
        let Some(live) = live.filter(|l| l.uid().as_deref() == Some(&owner.uid)) else {
            return Ok(Some(OwnerState::Dangling));
        };
        let waiting =
            live.metadata.deletion_timestamp.is_some() && live.finalizers().iter().any(|f| f == FOREGROUND);
        Ok(Some(if waiting { OwnerState::Waiting } else { OwnerState::Solid }))
    }

    async fn delete(
        &self,
        api: &Api<DynamicObject>,
        latest: &PartialObjectMeta,
        foreground: bool,
    ) -> Result<Outcome, SyncError> {
        let has = |f: &str| latest.finalizers().iter().any(|x| x == f);
        // What a user asked for earlier still holds.
        let policy = if has(ORPHAN) {
            PropagationPolicy::Orphan
        } else if foreground || has(FOREGROUND) {
            PropagationPolicy::Foreground
        } else {
            PropagationPolicy::Background
        };
        let guard = Preconditions { uid: latest.uid(), resource_version: latest.resource_version() };
        let params = DeleteParams { propagation_policy: Some(policy), ..DeleteParams::default() };
        let name = latest.name_any();
        match found(api.delete(&name, &params.preconditions(guard)).await.map(|_| ())) {
            Ok(_) => Ok(Outcome::Done),
            Err(error) if classify(&error) == Class::Conflict => Ok(Outcome::Again),
            Err(error) => Err(error).doing("collect", name),
        }
    }

    async fn drop_references(
        &self,
        api: &Api<DynamicObject>,
        object: &PartialObjectMeta,
        gone: &[String],
    ) -> Result<Outcome, SyncError> {
        let kept: Vec<_> = object.owner_references().iter().filter(|o| !gone.contains(&o.uid)).collect();
        let patch = json!({"metadata": {
            "uid": object.uid(), "resourceVersion": object.resource_version(), "ownerReferences": kept,
        }});
        self.patch(api, &object.name_any(), patch).await
    }

    async fn patch(
        &self,
        api: &Api<DynamicObject>,
        name: &str,
        patch: serde_json::Value,
    ) -> Result<Outcome, SyncError> {
        match found(api.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch)).await) {
            Ok(_) => Ok(Outcome::Done),
            Err(error) if classify(&error) == Class::Conflict => Ok(Outcome::Again),
            Err(error) => Err(error).doing("patch", name),
        }
    }

    /// An object that waits for its dependents: those that block it are deleted; without any it may go.
    async fn finish_foreground(&self, node: &Node) -> Result<Outcome, SyncError> {
        let uid = &node.identity.uid;
        let dependents = self.graph.lock().dependents(uid);
        let blocks =
            |d: &&Node| d.owners.iter().any(|o| o.uid == *uid && o.block_owner_deletion == Some(true));
        let blocking: Vec<_> = dependents.iter().filter(blocks).collect();
        if blocking.is_empty() {
            return self.remove_finalizer(&node.identity, FOREGROUND).await;
        }
        for dependent in blocking.iter().filter(|d| !d.deleting) {
            self.queue.add(Task::Delete(dependent.identity.uid.clone()));
        }
        Ok(Outcome::Done)
    }

    /// Takes an owner out of all its dependents, then lets it go.
    async fn orphan(&self, uid: &str) -> Result<Outcome, SyncError> {
        let Some(owner) = self.graph.lock().get(uid).cloned() else { return Ok(Outcome::Done) };
        let dependents = self.graph.lock().dependents(uid);
        for dependent in dependents {
            let Some(api) = self.api_of(&dependent.identity) else { continue };
            let name = &dependent.identity.name;
            let Some(latest) = found(api.get_metadata(name).await).doing("get", name)? else { continue };
            let ours = latest.uid().as_deref() == Some(&dependent.identity.uid);
            if !ours || !latest.owner_references().iter().any(|o| o.uid == uid) {
                continue;
            }
            if self.drop_references(&api, &latest, &[uid.to_owned()]).await? == Outcome::Again {
                return Ok(Outcome::Again);
            }
        }
        self.remove_finalizer(&owner.identity, ORPHAN).await
    }

    async fn remove_finalizer(&self, id: &Identity, finalizer: &str) -> Result<Outcome, SyncError> {
        let Some(api) = self.api_of(id) else { return Ok(Outcome::Done) };
        let latest = found(api.get_metadata(&id.name).await).doing("get", &id.name)?;
        let Some(latest) = latest.filter(|l| l.uid().as_deref() == Some(&id.uid)) else {
            return Ok(Outcome::Done);
        };
        if !latest.finalizers().iter().any(|f| f == finalizer) {
            return Ok(Outcome::Done);
        }
        let kept: Vec<_> = latest.finalizers().iter().filter(|f| *f != finalizer).collect();
        let patch = json!({"metadata": {"resourceVersion": latest.resource_version(), "finalizers": kept}});
        self.patch(&api, &id.name, patch).await
    }
}
