//! Owns the scheduler's view of a pod: worked out once, when the pod changes, and small.

use crate::resources::{self, Resources};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Affinity, NodeAffinity, Pod, PodCondition, Toleration};
use std::collections::BTreeMap;
use weft_control_client::{ObjectKey, controller_of};

/// A port on the node: protocol, address (`0.0.0.0` is every one), number.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct HostPort {
    pub(crate) protocol: String,
    pub(crate) ip: String,
    pub(crate) port: i32,
}

impl HostPort {
    pub(crate) fn conflicts(&self, other: &Self) -> bool {
        let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0" || ip == "::";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || any(&self.ip) || any(&other.ip))
    }
}

/// What scheduling needs of a pod.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodInfo {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) resource_version: Option<String>,
    pub(crate) scheduler: String,
    /// Empty while not bound.
    pub(crate) node: String,
    pub(crate) priority: i32,
    /// `preemptionPolicy: Never`.
    pub(crate) never_preempts: bool,
    pub(crate) created: Option<Timestamp>,
    pub(crate) finished: bool,
    pub(crate) deleting: bool,
    pub(crate) gated: bool,
    pub(crate) requests: Resources,
    pub(crate) scored: Resources,
    pub(crate) ports: Vec<HostPort>,
    pub(crate) node_selector: BTreeMap<String, String>,
    pub(crate) node_affinity: Option<NodeAffinity>,
    pub(crate) tolerations: Vec<Toleration>,
    /// Uid of the controller: pods of the same one are spread.
    pub(crate) owner: Option<String>,
    /// The PodScheduled condition as stored: status, reason, message.
    pub(crate) condition: Option<PodCondition>,
}

impl PodInfo {
    pub(crate) fn new(pod: Pod) -> Self {
        let (requests, scored) = resources::requests(&pod);
        let owner = controller_of(&pod.metadata).map(|c| c.uid.clone());
        let spec = pod.spec.unwrap_or_default();
        let status = pod.status.unwrap_or_default();
        let ports = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let ports = ports
            .flat_map(|c| c.ports.iter().flatten())
            .filter_map(|p| {
                Some(HostPort {
                    protocol: p.protocol.clone().unwrap_or_else(|| "TCP".into()),
                    ip: p.host_ip.clone().unwrap_or_default(),
                    port: p.host_port.filter(|port| *port > 0)?,
                })
            })
            .collect();
        Self {
            namespace: pod.metadata.namespace.unwrap_or_default(),
            name: pod.metadata.name.unwrap_or_default(),
            uid: pod.metadata.uid.unwrap_or_default(),
            resource_version: pod.metadata.resource_version,
            scheduler: spec.scheduler_name.unwrap_or_default(),
            node: spec.node_name.unwrap_or_default(),
            priority: spec.priority.unwrap_or(0),
            never_preempts: spec.preemption_policy.as_deref() == Some("Never"),
            created: pod.metadata.creation_timestamp.map(|t| t.0),
            finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            deleting: pod.metadata.deletion_timestamp.is_some(),
            gated: spec.scheduling_gates.is_some_and(|g| !g.is_empty()),
            requests,
            scored,
            ports,
            node_selector: spec.node_selector.unwrap_or_default(),
            node_affinity: spec.affinity.and_then(|Affinity { node_affinity, .. }| node_affinity),
            tolerations: spec.tolerations.unwrap_or_default(),
            owner,
            condition: status.conditions.into_iter().flatten().find(|c| c.type_ == "PodScheduled"),
        }
    }

    pub(crate) fn key(&self) -> ObjectKey {
        ObjectKey::new(&self.namespace, &self.name)
    }
}
