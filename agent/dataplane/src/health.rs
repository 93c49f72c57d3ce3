//! Whether the proxy keeps up, as it says to load balancers and monitors. Pure: time is given.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;

/// How long changes may wait for the maps before the proxy calls itself unhealthy: twice kube-proxy's longest time between
/// synchronisations.
const LATE: Duration = Duration::from_secs(60);
/// Taint by which the cluster autoscaler says that a node will go.
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// What the proxy says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ProxyHealth {
    /// The oldest change that is not in the maps yet.
    pending_since: Option<Instant>,
    /// The node is about to go.
    leaving: bool,
}

impl ProxyHealth {
    /// A change came.
    pub(crate) fn queued(&mut self, now: Instant) {
        self.pending_since.get_or_insert(now);
    }

    /// All changes are in the maps, but for Services that fail for reasons of their own.
    pub(crate) fn updated(&mut self) {
        self.pending_since = None;
    }

    /// Takes in the node's own Node.
    pub(crate) fn set_node(&mut self, node: &Node) {
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        self.leaving = node.metadata.deletion_timestamp.is_some()
            || taints.into_iter().any(|taint| taint.key == TO_BE_DELETED_TAINT);
    }

    /// Whether it keeps up; what is wrong with the node is another matter.
    pub(crate) fn is_healthy(&self, now: Instant) -> bool {
        self.pending_since.is_none_or(|since| now.saturating_duration_since(since) < LATE)
    }

    /// Whether the node should get new traffic, as far as its Node says.
    pub(crate) fn is_eligible(&self) -> bool {
        !self.leaving
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn changes_that_wait_too_long_are_unhealthy() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut health = ProxyHealth::default();
        assert!(health.is_healthy(at(1_000)), "nothing has come yet");
        health.queued(at(0));
        health.queued(at(50));
        assert!(health.is_healthy(at(59)));
        assert!(!health.is_healthy(at(60)), "the first counts, not the last");
        health.updated();
        assert!(health.is_healthy(at(1_000)));
    }

    #[test]
    fn a_node_that_goes_gets_no_new_traffic() {
        let node = |value| serde_json::from_value::<Node>(value).unwrap();
        let mut health = ProxyHealth::default();
        assert!(health.is_eligible());
        let taint = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
        health.set_node(&node(json!({"metadata": {}, "spec": {"taints": taint}})));
        assert!(!health.is_eligible() && health.is_healthy(Instant::now()));
        health.set_node(&node(
            json!({"metadata": {}, "spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}}),
        ));
        assert!(health.is_eligible());
        health.set_node(&node(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})));
        assert!(!health.is_eligible());
    }
}
