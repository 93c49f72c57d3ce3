//! Owns pods whose node is gone: nobody is left to confirm their end, so they are failed and removed here.

use crate::error::{Doing, SyncError};
use crate::pod;
use crate::shared::{BY_NODE, Shared};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::{ObjectKey, found};

/// A node that registers again within this time keeps its pods (upstream's quarantine).
const QUARANTINE: Duration = Duration::from_secs(40);

/// The controller.
pub(crate) struct Controller {
    client: Client,
    shared: Arc<Shared>,
    queue: Queue<ObjectKey>,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>) -> Arc<Self> {
        let controller = Arc::new(Self { client, shared, queue: Queue::default() });
        controller.shared.nodes.on_change_for(&controller, |controller, change| {
            let Change::Deleted(node) = change else { return };
            for pod in controller.shared.pods.by_index(BY_NODE, &node.name_any()) {
                controller.queue.add_after(ObjectKey::of(&pod.metadata), QUARANTINE);
            }
        });
        controller.shared.pods.on_change_for(&controller, |controller, change| {
            let Change::Applied { new, .. } = change else { return };
            if controller.is_orphan(new) {
                controller.queue.add_after(ObjectKey::of(&new.metadata), QUARANTINE);
            } else if pod::node_name(new).is_empty() && pod::is_terminating(new) {
                controller.queue.add(ObjectKey::of(&new.metadata));
            }
        });
        controller
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.nodes.synced().await;
        self.shared.pods.synced().await;
        work(&self.queue, 1, shutdown, |key| self.sync(key)).await;
    }

    fn is_orphan(&self, pod: &Pod) -> bool {
        let node = pod::node_name(pod);
        !node.is_empty() && self.shared.nodes.get("", node).is_none()
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let Some(pod) = self.shared.pods.by_key(&key) else { return Ok(Outcome::Done) };
        if pod::node_name(&pod).is_empty() && pod::is_terminating(&pod) {
            // Never started: there is nothing to wait for.
            return self.remove(&key, &pod, None).await;
        }
        if !self.is_orphan(&pod) {
            return Ok(Outcome::Done);
        }
        // The cache may be behind; only the API's word counts for a forced deletion.
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node = pod::node_name(&pod);
        if found(nodes.get_metadata(node).await).doing("get node", node)?.is_some() {
            return Ok(Outcome::Done);
        }
        tracing::info!(pod = %key, node, "removing a pod of a node that is gone");
        self.remove(&key, &pod, Some("PodGC: node no longer exists")).await
    }

    async fn remove(&self, key: &ObjectKey, pod: &Pod, why: Option<&str>) -> Result<Outcome, SyncError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        if let (Some(why), false) = (why, pod::is_terminal(pod)) {
            let patch = Patch::Strategic(failed(pod, why));
            found(api.patch_status(&key.name, &PatchParams::default(), &patch).await)
                .doing("fail pod", key)?;
        }
        let guard = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        let params = DeleteParams::default().grace_period(0).preconditions(guard);
        found(api.delete(&key.name, &params).await.map(|_| ())).doing("remove pod", key)?;
        Ok(Outcome::Done)
    }
}

fn failed(pod: &Pod, why: &str) -> Value {
    json!({"metadata": {"uid": pod.metadata.uid}, "status": {"phase": "Failed", "conditions": [{
        "type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC", "message": why,
        "lastTransitionTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
    }]}})
}
