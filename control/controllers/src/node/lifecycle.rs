//! Owns the health of nodes: silent nodes become Unknown, and taints follow from conditions.

use crate::error::{Doing, SyncError};
use crate::pod;
use crate::shared::{BY_NODE, Shared};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, ResourceExt};
use parking_lot::Mutex;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::recorder::{Kind, Recorder, reference};
use weft_control_client::{Class, ObjectKey, classify, found};

const WORKERS: usize = 4;
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Condition, the status that is bad, and the taint that goes with it.
const PRESSURE: [(&str, &str, &str); 4] = [
    ("MemoryPressure", "True", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "True", "node.kubernetes.io/network-unavailable"),
];
/// Conditions that become Unknown with a silent node.
const HEARD: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// The last sign of life of a node, and when it was seen by this clock (nodes' clocks are not compared with ours).
struct Sign {
    lease: Option<MicroTime>,
    heartbeat: Option<Time>,
    seen: Instant,
}

/// The controller.
pub(crate) struct Controller {
    client: Client,
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Queue<ObjectKey>,
    grace: Duration,
    signs: Mutex<HashMap<ObjectKey, Sign>>,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>, recorder: Recorder, grace: Duration) -> Arc<Self> {
        let queue = Queue::default();
        let controller = Arc::new(Self { client, shared, recorder, queue, grace, signs: Mutex::default() });
        controller.shared.nodes.on_change_for(&controller, Self::on_node);
        controller.shared.node_leases.on_change_for(&controller, Self::on_lease);
        controller
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.nodes.synced().await;
        self.shared.node_leases.synced().await;
        self.shared.pods.synced().await;
        work(&self.queue, WORKERS, shutdown, |key| self.sync(key)).await;
    }

    fn on_node(&self, change: &Change<Node>) {
        let key = ObjectKey::of(&change.object().metadata);
        if let Change::Deleted(_) = change {
            self.signs.lock().remove(&key);
        }
        self.queue.add(key);
        // Whether all nodes are down decides about each.
        if let Change::Applied { old: Some(old), new } = change
            && ready(old) != ready(new)
        {
            self.shared.nodes.list().iter().for_each(|n| self.queue.add(ObjectKey::of(&n.metadata)));
        }
    }

    /// A renewed lease of a healthy node needs no sync: the sign is read when its grace period ends.
    fn on_lease(&self, change: &Change<Lease>) {
        let key = ObjectKey::new("", &change.object().name_any());
        let healthy = self.shared.nodes.by_key(&key).is_some_and(|n| ready(&n) == "True");
        self.heard(&key);
        if !healthy {
            self.queue.add(key);
        }
    }

    /// Takes the newest sign of life over, and says how long ago it was seen.
    fn heard(&self, key: &ObjectKey) -> Duration {
        let lease = self.shared.node_leases.get("kube-node-lease", &key.name);
        let lease = lease.and_then(|l| l.spec.as_ref()?.renew_time.clone());
        let node = self.shared.nodes.by_key(key);
        let heartbeat = node.and_then(|n| condition(&n, "Ready")?.last_heartbeat_time.clone());
        let mut signs = self.signs.lock();
        let new = || Sign { lease: lease.clone(), heartbeat: heartbeat.clone(), seen: Instant::now() };
        let sign = signs.entry(key.clone()).or_insert_with(new);
        if sign.lease < lease || sign.heartbeat < heartbeat {
            *sign = new();
        }
        sign.seen.elapsed()
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let Some(node) = self.shared.nodes.by_key(&key) else { return Ok(Outcome::Done) };
        let silent_for = self.heard(&key);
        let api: Api<Node> = Api::all(self.client.clone());
        if silent_for >= self.grace {
            let conditions = unknown(&node, Timestamp::now());
            if !conditions.is_empty() {
                let patch = Patch::Strategic(json!({"status": {"conditions": conditions}}));
                let patched = api.patch_status(&key.name, &PatchParams::default(), &patch).await;
                found(patched).doing("mark as unknown node", &key)?;
                tracing::warn!(node = %key, silent_secs = silent_for.as_secs(), "the node stopped answering");
                // The change that this makes brings the node back here.
                return Ok(Outcome::Done);
            }
        }
        self.taint(&api, &key, &node).await?;
        if ready(&node) != "True" {
            self.mark_pods(&key, &node).await?;
        }
        Ok(Outcome::After(self.grace.saturating_sub(silent_for).max(Duration::from_millis(100))))
    }

    async fn taint(&self, api: &Api<Node>, key: &ObjectKey, node: &Node) -> Result<(), SyncError> {
        // If no node is well, it is more likely that we are cut off than that all have failed: nothing is evicted.
        let any_ready = self.shared.nodes.list().iter().any(|n| ready(n) == "True");
        let Some(taints) = taints(node, any_ready, Timestamp::now()) else { return Ok(()) };
        let body = json!({
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "spec": {"taints": taints},
        });
        match api.patch(&key.name, &PatchParams::default(), &Patch::Merge(body)).await {
            Ok(_) => Ok(()),
            Err(e) if matches!(classify(&e), Class::Conflict | Class::NotFound) => {
                self.queue.add_rate_limited(key.clone());
                Ok(())
            }
            Err(error) => Err(error).doing("taint node", key),
        }
    }

    /// Pods on a node that can't speak for itself are taken out of their Services.
    async fn mark_pods(&self, key: &ObjectKey, node: &Node) -> Result<(), SyncError> {
        let mut any = false;
        for pod in self.shared.pods.by_index(BY_NODE, &key.name) {
            let Some(mut condition) = pod::condition(&pod, "Ready").filter(|c| c.status == "True").cloned()
            else {
                continue;
            };
            condition.status = "False".into();
            condition.last_transition_time = Some(Time(Timestamp::now()));
            let body = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [condition]}});
            let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
            let patch = Patch::Strategic(body);
            found(api.patch_status(&pod.name_any(), &PatchParams::default(), &patch).await)
                .doing("mark as not ready pod", pod.name_any())?;
            self.recorder.event(reference(&*pod), Kind::Warning, "NodeNotReady", "Node is not ready".into());
            any = true;
        }
        if any {
            let text = format!("Node {key} status is now: NodeNotReady");
            self.recorder.event(reference(node), Kind::Normal, "NodeNotReady", text);
        }
        Ok(())
    }
}

fn condition<'a>(node: &'a Node, name: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == name)
}

/// Status of the condition Ready; empty if the node never said.
fn ready(node: &Node) -> &str {
    condition(node, "Ready").map(|c| c.status.as_str()).unwrap_or_default()
}

/// The conditions of a silent node that aren't Unknown yet, made so.
fn unknown(node: &Node, now: Timestamp) -> Vec<NodeCondition> {
    let not_yet = HEARD.iter().filter_map(|name| {
        let old = condition(node, name);
        if old.is_some_and(|c| c.status == "Unknown") {
            return None;
        }
        let (reason, message) = match old {
            Some(_) => ("NodeStatusUnknown", "Kubelet stopped posting node status."),
            None => ("NodeStatusNeverUpdated", "Kubelet never posted node status."),
        };
        Some(NodeCondition {
            type_: (*name).into(),
            status: "Unknown".into(),
            reason: Some(reason.into()),
            message: Some(message.into()),
            last_heartbeat_time: old.and_then(|c| c.last_heartbeat_time.clone()),
            last_transition_time: Some(Time(now)),
        })
    });
    not_yet.collect()
}

/// The taints that a node should have, if they differ from those it has. Foreign taints stay.
fn taints(node: &Node, may_evict: bool, now: Timestamp) -> Option<Vec<Taint>> {
    let has = node.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    let down = match ready(node) {
        "True" => None,
        "Unknown" => Some(UNREACHABLE),
        _ => Some(NOT_READY),
    };
    if let Some(key) = down {
        wanted.push((key, "NoSchedule"));
        let evicting = has.iter().any(|t| t.key == key && t.effect == "NoExecute");
        if may_evict || evicting {
            wanted.push((key, "NoExecute"));
        }
    }
    for (name, bad, key) in PRESSURE {
        if condition(node, name).is_some_and(|c| c.status == bad) {
            wanted.push((key, "NoSchedule"));
        }
    }
    if node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    let ours = |t: &Taint| {
        [NOT_READY, UNREACHABLE, UNSCHEDULABLE].contains(&t.key.as_str())
            || PRESSURE.iter().any(|(_, _, key)| *key == t.key)
    };
    let is = |t: &Taint, (key, effect): (&str, &str)| t.key == key && t.effect == effect;
    let mut taints: Vec<_> =
        has.iter().filter(|t| !ours(t) || wanted.iter().any(|w| is(t, *w))).cloned().collect();
    for (key, effect) in wanted {
        if !taints.iter().any(|t| is(t, (key, effect))) {
            let time_added = Some(Time(now));
            taints.push(Taint { key: key.into(), effect: effect.into(), value: None, time_added });
        }
    }
    (taints != has).then_some(taints)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{NodeSpec, NodeStatus};

    fn node(conditions: &[(&str, &str)], taints: &[(&str, &str)]) -> Node {
        let condition = |(name, status): &(&str, &str)| NodeCondition {
            type_: (*name).into(),
            status: (*status).into(),
            ..NodeCondition::default()
        };
        let taint = |(key, effect): &(&str, &str)| Taint {
            key: (*key).into(),
            effect: (*effect).into(),
            ..Taint::default()
        };
        Node {
            spec: Some(NodeSpec { taints: Some(taints.iter().map(taint).collect()), ..NodeSpec::default() }),
            status: Some(NodeStatus {
                conditions: Some(conditions.iter().map(condition).collect()),
                ..NodeStatus::default()
            }),
            ..Node::default()
        }
    }

    fn after(node: &Node, may_evict: bool) -> Option<Vec<(String, String)>> {
        let taints = taints(node, may_evict, Timestamp::UNIX_EPOCH)?;
        Some(taints.into_iter().map(|t| (t.key, t.effect)).collect())
    }

    fn list(taints: &[(&str, &str)]) -> Option<Vec<(String, String)>> {
        Some(taints.iter().map(|(k, e)| ((*k).to_owned(), (*e).to_owned())).collect())
    }

    #[test]
    fn taints_follow_the_conditions() {
        let both = |key| [(key, "NoSchedule"), (key, "NoExecute")];
        assert_eq!(after(&node(&[("Ready", "True")], &both(UNREACHABLE)), true), list(&[]));
        assert_eq!(after(&node(&[("Ready", "True")], &[("mine", "NoSchedule")]), true), None);
        assert_eq!(after(&node(&[("Ready", "Unknown")], &[]), true), list(&both(UNREACHABLE)));
        assert_eq!(after(&node(&[("Ready", "False")], &both(UNREACHABLE)), true), list(&both(NOT_READY)));
        assert_eq!(after(&node(&[("Ready", "Unknown")], &both(UNREACHABLE)), true), None);
        assert_eq!(
            after(&node(&[("Ready", "True"), ("DiskPressure", "True")], &[]), true),
            list(&[("node.kubernetes.io/disk-pressure", "NoSchedule")])
        );
    }

    #[test]
    fn nothing_is_evicted_when_no_node_is_well() {
        let down = node(&[("Ready", "Unknown")], &[]);
        assert_eq!(after(&down, false), list(&[(UNREACHABLE, "NoSchedule")]));
    }

    #[test]
    fn a_silent_node_becomes_unknown_once() {
        let silent = node(&[("Ready", "True"), ("DiskPressure", "False")], &[]);
        let conditions = unknown(&silent, Timestamp::UNIX_EPOCH);
        let reasons: Vec<_> = conditions.iter().map(|c| (c.type_.as_str(), c.reason.as_deref())).collect();
        assert_eq!(reasons[0], ("Ready", Some("NodeStatusUnknown")));
        assert_eq!(reasons[1], ("MemoryPressure", Some("NodeStatusNeverUpdated")));
        let statuses: Vec<_> = HEARD.iter().map(|name| (*name, "Unknown")).collect();
        assert!(unknown(&node(&statuses, &[]), Timestamp::UNIX_EPOCH).is_empty());
    }
}
