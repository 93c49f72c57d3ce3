//! Owns the ReplicaSet controller: keeps as many pods as each ReplicaSet wants.

pub(crate) mod plan;
mod rank;

use crate::claim;
use crate::error::{Doing, SyncError};
use crate::pod;
use crate::shared::{BY_OWNER, Shared};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use kube::{Client, ResourceExt};
use plan::{Failure, Scaling};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_client::expectations::Expectations;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::recorder::{Kind, Recorder, reference};
use weft_control_client::{Class, ObjectKey, classify, controller_of, found};

/// Upstream's `--concurrent-replicaset-syncs`.
const WORKERS: usize = 5;
/// Writes in flight per ReplicaSet; more gains nothing once the store commits in groups.
const PARALLEL_WRITES: usize = 64;

/// The controller.
pub(crate) struct Controller {
    client: Client,
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Queue<ObjectKey>,
    expectations: Expectations,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>, recorder: Recorder) -> Arc<Self> {
        let controller = Arc::new(Self {
            client,
            shared,
            recorder,
            queue: Queue::default(),
            expectations: Expectations::default(),
        });
        controller.shared.replica_sets.on_change_for(&controller, Self::on_replica_set);
        controller.shared.pods.on_change_for(&controller, Self::on_pod);
        controller
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.replica_sets.synced().await;
        self.shared.pods.synced().await;
        work(&self.queue, WORKERS, shutdown, |key| self.sync(key)).await;
    }

    fn on_replica_set(&self, change: &Change<ReplicaSet>) {
        let key = ObjectKey::of(&change.object().metadata);
        if let Change::Deleted(_) = change {
            self.expectations.forget(&key);
        }
        self.queue.add(key);
    }

    fn on_pod(&self, change: &Change<Pod>) {
        let pod = change.object();
        let owner = self.owner_key(pod);
        match change {
            Change::Applied { old: None, new } if !pod::is_terminating(new) => {
                if let Some(owner) = &owner {
                    self.expectations.created(owner, 1);
                }
            }
            Change::Applied { old, new } => {
                if let (Some(owner), true) = (&owner, pod::is_terminating(new)) {
                    self.expectations.deleted(owner, new.metadata.uid.as_deref().unwrap_or_default());
                }
                let before = old.as_ref().and_then(|old| self.owner_key(old));
                if before != owner {
                    before.into_iter().for_each(|key| self.queue.add(key));
                }
            }
            Change::Deleted(old) => {
                if let Some(owner) = &owner {
                    self.expectations.deleted(owner, old.metadata.uid.as_deref().unwrap_or_default());
                }
            }
        }
        match owner {
            Some(owner) => self.queue.add(owner),
            None if controller_of(&pod.metadata).is_none() => self.offer_orphan(pod),
            None => {}
        }
    }

    /// The ReplicaSet that controls a pod, if it is (still) the one that the reference means.
    fn owner_key(&self, pod: &Pod) -> Option<ObjectKey> {
        let controller = controller_of(&pod.metadata).filter(|r| r.kind == "ReplicaSet")?;
        let rs = self.shared.replica_sets.get(pod.metadata.namespace.as_deref()?, &controller.name)?;
        (rs.metadata.uid.as_deref() == Some(&controller.uid)).then(|| ObjectKey::of(&rs.metadata))
    }

    fn offer_orphan(&self, pod: &Pod) {
        for rs in self.shared.replica_sets.in_namespace(pod.metadata.namespace.as_deref().unwrap_or_default())
        {
            let selector = rs.spec.as_ref().and_then(|s| claim::compile(&s.selector));
            if selector.is_some_and(|s| claim::matches(&s, &pod.metadata)) {
                self.queue.add(ObjectKey::of(&rs.metadata));
            }
        }
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let Some(rs) = self.shared.replica_sets.by_key(&key) else {
            self.expectations.forget(&key);
            return Ok(Outcome::Done);
        };
        let Some(selector) = rs.spec.as_ref().and_then(|s| claim::compile(&s.selector)) else {
            tracing::warn!(replica_set = %key, "the selector can't be parsed");
            return Ok(Outcome::Done);
        };
        // Decided before the pods are read: what becomes satisfied later is only seen by the next sync.
        let may_scale = self.expectations.satisfied(&key);
        let pods = self.claim(&rs, &key, &selector).await?;
        let (active, rest): (Vec<_>, Vec<_>) = pods.into_iter().partition(|p| pod::is_active(p));
        let terminating = rest.iter().filter(|p| pod::is_terminating(p) && !pod::is_terminal(p)).count();
        let now = Timestamp::now();
        let mut failed = None;
        if may_scale && rs.metadata.deletion_timestamp.is_none() {
            let scaling = plan::scaling(&rs, &active, || self.related(&rs), now);
            failed = self.scale(&rs, &key, scaling).await;
        }
        let failure = failed.as_ref().map(|(failure, _)| failure);
        let (status, next) = plan::status(&rs, &active, terminating, failure, now);
        if rs.status.as_ref().is_none_or(|old| !plan::same_status(old, &status)) {
            let mut updated = (*rs).clone();
            updated.status = Some(status);
            let api: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &key.namespace);
            match found(api.replace_status(&key.name, &PostParams::default(), &updated).await) {
                Ok(_) => {}
                Err(error) if classify(&error) == Class::Conflict => return Ok(Outcome::Again),
                Err(error) => return Err(error).doing("update the status of replica set", &key),
            }
        }
        match (failed, next) {
            (Some((_, error)), _) => Err(error),
            (None, Some(delay)) => Ok(Outcome::After(delay)),
            (None, None) => Ok(Outcome::Done),
        }
    }

    /// The pods of a ReplicaSet, after adopting and releasing.
    async fn claim(
        &self,
        rs: &ReplicaSet,
        key: &ObjectKey,
        selector: &kube::core::Selector,
    ) -> Result<Vec<Arc<Pod>>, SyncError> {
        let uid = rs.metadata.uid.as_deref().unwrap_or_default();
        let candidates = self.shared.pods.by_index(BY_OWNER, uid).into_iter();
        let orphans = self.shared.pods.by_index(BY_OWNER, &claim::orphans(&key.namespace));
        let mut claims = claim::sort(&rs.metadata, selector, candidates.chain(orphans));
        claims.adopt.retain(|pod| pod::is_active(pod));
        claims.carry_out(&self.client, rs, &plan::owner_reference(rs)).await
    }

    /// The pods of all ReplicaSets under the same Deployment.
    fn related(&self, rs: &ReplicaSet) -> Vec<Arc<Pod>> {
        let of = |rs: &ReplicaSet| {
            self.shared.pods.by_index(BY_OWNER, rs.metadata.uid.as_deref().unwrap_or_default())
        };
        match controller_of(&rs.metadata) {
            Some(owner) => {
                let siblings = self.shared.replica_sets.by_index(BY_OWNER, &owner.uid);
                siblings.iter().flat_map(|sibling| of(sibling)).collect()
            }
            None => of(rs),
        }
    }

    async fn scale(
        &self,
        rs: &ReplicaSet,
        key: &ObjectKey,
        scaling: Scaling,
    ) -> Option<(Failure, SyncError)> {
        match scaling {
            Scaling::Keep => None,
            Scaling::Create(count) => {
                let error = self.create(rs, key, count).await.err()?;
                Some((Failure { reason: "FailedCreate", message: error.api_message() }, error))
            }
            Scaling::Delete(pods) => {
                let error = self.delete(rs, key, &pods).await.err()?;
                Some((Failure { reason: "FailedDelete", message: error.api_message() }, error))
            }
        }
    }

    /// Creates pods in batches of 1, 2, 4, … so that a set whose pods are all refused costs few requests.
    async fn create(&self, rs: &ReplicaSet, key: &ObjectKey, count: usize) -> Result<(), SyncError> {
        self.expectations.expect(key, count, []);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let (pod, params) = (plan::new_pod(rs), PostParams::default());
        let (mut left, mut batch) = (count, 1);
        while left > 0 {
            let size = batch.min(left);
            let created: Vec<_> = futures::stream::iter(0..size)
                .map(|_| api.create(&params, &pod))
                .buffer_unordered(PARALLEL_WRITES)
                .collect()
                .await;
            left -= size;
            batch *= 2;
            let mut failed = None;
            for result in created {
                match result {
                    Ok(pod) => self.recorder.event(
                        reference(rs),
                        Kind::Normal,
                        "SuccessfulCreate",
                        format!("Created pod: {}", pod.name_any()),
                    ),
                    Err(error) => {
                        self.expectations.created(key, 1);
                        failed = Some(error);
                    }
                }
            }
            if let Some(error) = failed {
                self.expectations.created(key, left);
                if classify(&error) == Class::NamespaceTerminating {
                    return Ok(());
                }
                let message = format!("Error creating: {}", crate::error::message(&error));
                self.recorder.event(reference(rs), Kind::Warning, "FailedCreate", message);
                return Err(error).doing("create a pod of replica set", key);
            }
        }
        Ok(())
    }

    async fn delete(&self, rs: &ReplicaSet, key: &ObjectKey, pods: &[Arc<Pod>]) -> Result<(), SyncError> {
        self.expectations.expect(key, 0, pods.iter().filter_map(|p| p.metadata.uid.clone()));
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let api = &api;
        let deleted: Vec<_> = futures::stream::iter(pods.to_vec())
            .map(|pod| async move {
                let guard = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
                let params = DeleteParams::default().preconditions(guard);
                let result = api.delete(&pod.name_any(), &params).await.map(|_| ());
                (pod, result)
            })
            .buffer_unordered(PARALLEL_WRITES)
            .collect()
            .await;
        let mut failed = None;
        for (pod, result) in deleted {
            let name = pod.name_any();
            match result {
                Ok(()) => self.recorder.event(
                    reference(rs),
                    Kind::Normal,
                    "SuccessfulDelete",
                    format!("Deleted pod: {name}"),
                ),
                Err(error) => {
                    self.expectations.deleted(key, pod.metadata.uid.as_deref().unwrap_or_default());
                    if classify(&error) != Class::NotFound {
                        let message = format!("Error deleting: {}", crate::error::message(&error));
                        self.recorder.event(reference(rs), Kind::Warning, "FailedDelete", message);
                        failed = Some(Err(error).doing("delete pod", name));
                    }
                }
            }
        }
        failed.unwrap_or(Ok(()))
    }
}
