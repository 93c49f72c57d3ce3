//! Owns taint eviction: pods leave a node whose NoExecute taints they don't tolerate (any more).

use crate::error::{Doing, SyncError};
use crate::pod;
use crate::shared::{BY_NODE, Shared};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Client, ResourceExt};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::recorder::{Kind, Recorder, reference};
use weft_control_client::{Class, ObjectKey, classify, found};

const WORKERS: usize = 4;

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
        controller.shared.nodes.on_change_for(&controller, Self::on_node);
        controller.shared.pods.on_change_for(&controller, |controller, change| {
            let Change::Applied { new, .. } = change else { return };
            let node = controller.shared.nodes.get("", pod::node_name(new));
            if node.is_some_and(|n| !no_execute(&n).is_empty()) {
                controller.queue.add(ObjectKey::of(&new.metadata));
            }
        });
        controller
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.nodes.synced().await;
        self.shared.pods.synced().await;
        work(&self.queue, WORKERS, shutdown, |key| self.sync(key)).await;
    }

    fn on_node(&self, change: &Change<Node>) {
        let Change::Applied { old, new } = change else { return };
        let before = old.as_ref().map(|old| no_execute(old)).unwrap_or_default();
        if before != no_execute(new) {
            let pods = self.shared.pods.by_index(BY_NODE, &new.name_any());
            pods.iter().for_each(|p| self.queue.add(ObjectKey::of(&p.metadata)));
        }
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let Some(pod) = self.shared.pods.by_key(&key).filter(|p| !pod::is_terminating(p)) else {
            return Ok(Outcome::Done);
        };
        let Some(node) = self.shared.nodes.get("", pod::node_name(&pod)) else { return Ok(Outcome::Done) };
        let tolerations = pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default();
        match stay(&no_execute(&node), tolerations, Timestamp::now()) {
            Stay::Forever => Ok(Outcome::Done),
            Stay::For(left) if !left.is_zero() => Ok(Outcome::After(left)),
            Stay::For(_) => self.evict(&key, &pod).await,
        }
    }

    async fn evict(&self, key: &ObjectKey, pod: &Pod) -> Result<Outcome, SyncError> {
        let text = format!("Marking for deletion Pod {key}");
        self.recorder.event(reference(pod), Kind::Normal, "TaintManagerEviction", text);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let body = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [{
            "type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
            "message": "Taint manager: deleting due to NoExecute taint",
            "lastTransitionTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        }]}});
        let patched = api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(body)).await;
        match patched {
            Err(error) if matches!(classify(&error), Class::NotFound | Class::Conflict) => {
                return Ok(Outcome::Again);
            }
            patched => patched.doing("mark for eviction pod", key)?,
        };
        let guard = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        let deleted = api.delete(&key.name, &DeleteParams::default().preconditions(guard)).await.map(|_| ());
        found(deleted).doing("evict pod", key)?;
        Ok(Outcome::Done)
    }
}

fn no_execute(node: &Node) -> Vec<Taint> {
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_ref());
    taints.into_iter().flatten().filter(|t| t.effect == "NoExecute").cloned().collect()
}

#[derive(Debug, PartialEq)]
enum Stay {
    Forever,
    For(Duration),
}

/// How long a pod may stay under these taints: not at all if one isn't tolerated, else as long as the shortest
/// toleration says, from when the last taint came.
fn stay(taints: &[Taint], tolerations: &[Toleration], now: Timestamp) -> Stay {
    if taints.is_empty() {
        return Stay::Forever;
    }
    let mut used = Vec::new();
    for taint in taints {
        let before = used.len();
        used.extend(tolerations.iter().filter(|t| tolerates(t, taint)));
        if used.len() == before {
            return Stay::For(Duration::ZERO);
        }
    }
    let Some(shortest) = used.iter().filter_map(|t| t.toleration_seconds).min() else { return Stay::Forever };
    let since = taints.iter().filter_map(|t| t.time_added.as_ref().map(|t| t.0)).max().unwrap_or(now);
    let left = jiff::SignedDuration::from_secs(shortest) - now.duration_since(since);
    Stay::For(Duration::try_from(left).unwrap_or_default())
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let (key, effect) = (text(&toleration.key), text(&toleration.effect));
    let exists = toleration.operator.as_deref() == Some("Exists");
    (effect.is_empty() || effect == taint.effect)
        && (key == taint.key || (key.is_empty() && exists))
        && (exists || text(&toleration.value) == text(&taint.value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn toleration(key: &str, seconds: Option<i64>) -> Toleration {
        Toleration {
            key: Some(key.into()),
            operator: Some("Exists".into()),
            effect: Some("NoExecute".into()),
            toleration_seconds: seconds,
            value: None,
        }
    }

    #[test]
    fn tolerations_decide_how_long_a_pod_stays() {
        let at = |s| Timestamp::from_second(s).unwrap();
        let taint = |key: &str, second| Taint {
            key: key.into(),
            effect: "NoExecute".into(),
            value: None,
            time_added: Some(Time(at(second))),
        };
        let stay = |taints: &[Taint], tolerations: &[Toleration]| stay(taints, tolerations, at(100));
        let secs = |s| Stay::For(Duration::from_secs(s));
        assert_eq!(stay(&[], &[]), Stay::Forever);
        assert_eq!(stay(&[taint("a", 90)], &[]), secs(0));
        assert_eq!(stay(&[taint("a", 90)], &[toleration("a", None)]), Stay::Forever);
        assert_eq!(stay(&[taint("a", 90)], &[toleration("a", Some(30))]), secs(20));
        assert_eq!(stay(&[taint("a", 10)], &[toleration("a", Some(30))]), secs(0));
        assert_eq!(stay(&[taint("a", 90), taint("b", 90)], &[toleration("a", None)]), secs(0));
        let both = [toleration("a", Some(60)), toleration("b", Some(30))];
        assert_eq!(stay(&[taint("a", 90), taint("b", 95)], &both), secs(25));
    }
}
