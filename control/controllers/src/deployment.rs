//! Owns the Deployment controller: rolls templates out through ReplicaSets.

mod math;
pub(crate) mod plan;
mod progress;
mod revision;
mod status;

use crate::claim;
use crate::error::{Doing, SyncError, message};
use crate::pod;
use crate::shared::{BY_OWNER, Shared};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, ResourceExt};
use plan::{Input, Plan, RsPatch};
use serde_json::json;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::recorder::{Kind, Recorder, reference};
use weft_control_client::{Class, ObjectKey, classify, controller_of, found};

/// Upstream's `--concurrent-deployment-syncs`.
const WORKERS: usize = 5;

/// The controller.
pub(crate) struct Controller {
    client: Client,
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Queue<ObjectKey>,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>, recorder: Recorder) -> Arc<Self> {
        let controller = Arc::new(Self { client, shared, recorder, queue: Queue::default() });
        controller.shared.deployments.on_change_for(&controller, |controller, change| {
            controller.queue.add(ObjectKey::of(&change.object().metadata));
        });
        controller.shared.replica_sets.on_change_for(&controller, Self::on_replica_set);
        controller.shared.pods.on_change_for(&controller, |controller, change| {
            if let Change::Deleted(pod) = change {
                controller.on_pod_gone(pod);
            }
        });
        controller
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.deployments.synced().await;
        self.shared.replica_sets.synced().await;
        self.shared.pods.synced().await;
        work(&self.queue, WORKERS, shutdown, |key| self.sync(key)).await;
    }

    fn on_replica_set(&self, change: &Change<ReplicaSet>) {
        let rs = change.object();
        if let Change::Applied { old: Some(old), new } = change
            && controller_of(&old.metadata) != controller_of(&new.metadata)
        {
            self.owner(old).into_iter().for_each(|key| self.queue.add(key));
        }
        if controller_of(&rs.metadata).is_some() {
            return self.owner(rs).into_iter().for_each(|key| self.queue.add(key));
        }
        for d in self.shared.deployments.in_namespace(rs.metadata.namespace.as_deref().unwrap_or_default()) {
            let selector = d.spec.as_ref().and_then(|s| claim::compile(&s.selector));
            if selector.is_some_and(|s| claim::matches(&s, &rs.metadata)) {
                self.queue.add(ObjectKey::of(&d.metadata));
            }
        }
    }

    /// Recreate waits for the last old pod.
    fn on_pod_gone(&self, pod: &Pod) {
        let Some(controller) = controller_of(&pod.metadata).filter(|c| c.kind == "ReplicaSet") else {
            return;
        };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let Some(rs) = self.shared.replica_sets.get(namespace, &controller.name) else { return };
        let Some(key) = self.owner(&rs) else { return };
        if self.shared.deployments.by_key(&key).is_some_and(|d| !math::is_rolling(&d)) {
            self.queue.add(key);
        }
    }

    fn owner(&self, rs: &ReplicaSet) -> Option<ObjectKey> {
        let controller = controller_of(&rs.metadata).filter(|r| r.kind == "Deployment")?;
        let d = self.shared.deployments.get(rs.metadata.namespace.as_deref()?, &controller.name)?;
        (d.metadata.uid.as_deref() == Some(&controller.uid)).then(|| ObjectKey::of(&d.metadata))
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let Some(d) = self.shared.deployments.by_key(&key) else { return Ok(Outcome::Done) };
        let Some(selector) = d.spec.as_ref().and_then(|s| claim::compile(&s.selector)) else {
            tracing::warn!(deployment = %key, "the selector can't be parsed");
            return Ok(Outcome::Done);
        };
        if selector.selects_all() {
            let message = "This deployment is selecting all pods. A non-empty selector is required.";
            self.recorder.event(reference(&*d), Kind::Warning, "SelectingAll", message.into());
            return Ok(Outcome::Done);
        }
        let replica_sets = self.claim(&d, &key, &selector).await?;
        let plan = self.plan(&d, &replica_sets);
        // Boxed: it holds whole objects, and most syncs never get here.
        Box::pin(self.apply(&d, &key, plan)).await
    }

    fn plan(&self, deployment: &Deployment, replica_sets: &[Arc<ReplicaSet>]) -> Plan {
        let old_pods_run = |new: Option<&ReplicaSet>| self.old_pods_run(replica_sets, new);
        plan::plan(&Input { deployment, replica_sets, old_pods_run: &old_pods_run, now: Timestamp::now() })
    }

    fn old_pods_run(&self, all: &[Arc<ReplicaSet>], new: Option<&ReplicaSet>) -> bool {
        all.iter()
            .filter(|rs| new.is_none_or(|new| new.metadata.uid != rs.metadata.uid))
            .flat_map(|rs| {
                self.shared.pods.by_index(BY_OWNER, rs.metadata.uid.as_deref().unwrap_or_default())
            })
            .any(|pod| !pod::is_terminal(&pod))
    }

    async fn claim(
        &self,
        d: &Deployment,
        key: &ObjectKey,
        selector: &kube::core::Selector,
    ) -> Result<Vec<Arc<ReplicaSet>>, SyncError> {
        let uid = d.metadata.uid.as_deref().unwrap_or_default();
        let candidates = self.shared.replica_sets.by_index(BY_OWNER, uid).into_iter();
        let orphans = self.shared.replica_sets.by_index(BY_OWNER, &claim::orphans(&key.namespace));
        let claims = claim::sort(&d.metadata, selector, candidates.chain(orphans));
        claims.carry_out(&self.client, d, &plan::owner_reference(d)).await
    }

    async fn apply(&self, d: &Deployment, key: &ObjectKey, mut plan: Plan) -> Result<Outcome, SyncError> {
        if let Some(rs) = plan.create.take() {
            match self.create(d, key, &rs).await? {
                Created::Yes => {}
                Created::Stale => return Ok(Outcome::Again),
            }
        }
        let api: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &key.namespace);
        for patch in &plan.patches {
            match api.patch(&patch.name, &PatchParams::default(), &Patch::Merge(body(patch))).await {
                Ok(_) => {}
                Err(e) if matches!(classify(&e), Class::Conflict | Class::NotFound) => {
                    return Ok(Outcome::Again);
                }
                Err(error) => return Err(error).doing("scale replica set", &patch.name),
            }
        }
        for text in plan.events {
            self.recorder.event(reference(d), Kind::Normal, "ScalingReplicaSet", text);
        }
        for rs in &plan.delete {
            let guard = Preconditions { uid: rs.metadata.uid.clone(), resource_version: None };
            let params = DeleteParams::background().preconditions(guard);
            found(api.delete(&rs.name_any(), &params).await.map(|_| ()))
                .doing("delete replica set", rs.name_any())?;
        }
        if let Some(updated) = plan.status
            && !self.write_status(key, &updated).await?
        {
            return Ok(Outcome::Again);
        }
        Ok(plan.look_again.map_or(Outcome::Done, Outcome::After))
    }

    /// False: the cached Deployment is not the newest.
    async fn write_status(&self, key: &ObjectKey, updated: &Deployment) -> Result<bool, SyncError> {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), &key.namespace);
        match api.replace_status(&key.name, &PostParams::default(), updated).await {
            Ok(_) => Ok(true),
            Err(error) if matches!(classify(&error), Class::Conflict | Class::NotFound) => Ok(false),
            Err(error) => Err(error).doing("update the status of deployment", key),
        }
    }

    async fn create(&self, d: &Deployment, key: &ObjectKey, rs: &ReplicaSet) -> Result<Created, SyncError> {
        let api: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &key.namespace);
        let error = match api.create(&PostParams::default(), rs).await {
            Ok(_) => return Ok(Created::Yes),
            Err(error) => error,
        };
        match classify(&error) {
            Class::NamespaceTerminating => return Ok(Created::Stale),
            Class::AlreadyExists => return self.collided(d, key, rs).await,
            Class::NotFound | Class::Conflict | Class::Rejected | Class::Expired | Class::Retry => {}
        }
        let text = format!("Failed to create new replica set \"{}\": {}", rs.name_any(), message(&error));
        self.recorder.event(reference(d), Kind::Warning, progress::FAILED_CREATE, text.clone());
        let mut failed = d.clone();
        progress::note_create_failed(&mut failed, text, Timestamp::now());
        if failed.status != d.status {
            self.write_status(key, &failed).await?;
        }
        Err(error).doing("create replica set", rs.name_any())
    }

    /// The name is taken: by the same ReplicaSet, which the cache doesn't show yet, or by another's, whose hash
    /// collides.
    async fn collided(&self, d: &Deployment, key: &ObjectKey, rs: &ReplicaSet) -> Result<Created, SyncError> {
        let api: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &key.namespace);
        let Some(taken) = found(api.get(&rs.name_any()).await).doing("get replica set", rs.name_any())?
        else {
            return Ok(Created::Stale);
        };
        let template = |rs: &ReplicaSet| rs.spec.clone().and_then(|s| s.template).unwrap_or_default();
        let ours = controller_of(&taken.metadata).map(|c| c.uid.as_str()) == d.metadata.uid.as_deref();
        if ours && revision::same_template(&template(&taken), &template(rs)) {
            return Ok(Created::Stale);
        }
        let mut bumped = d.clone();
        let status = bumped.status.get_or_insert_default();
        status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
        tracing::info!(deployment = %key, replica_set = %rs.name_any(), "the hash of the template collides");
        self.write_status(key, &bumped).await?;
        Ok(Created::Stale)
    }
}

enum Created {
    Yes,
    /// Nothing was created; the next sync sees more.
    Stale,
}

fn body(patch: &RsPatch) -> serde_json::Value {
    let mut body = json!({"metadata": {"resourceVersion": patch.resource_version}});
    if !patch.annotations.is_empty() {
        body["metadata"]["annotations"] = json!(patch.annotations);
    }
    if let Some(replicas) = patch.replicas {
        body["spec"]["replicas"] = json!(replicas);
    }
    if let Some(seconds) = patch.min_ready_seconds {
        body["spec"]["minReadySeconds"] = json!(seconds);
    }
    body
}
