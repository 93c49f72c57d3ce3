//! How a worker tells of its pod: to the status writer, to the server, to the metrics.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};

use super::Worker;
use crate::observed::Ending;
use crate::shared::PodView;
use crate::status;

impl Worker {
    /// Hands the status to the writer if it changed, and shows the pod to the server.
    pub(super) fn publish(&mut self, now: Timestamp) {
        let status = status::generate(&self.pod, &self.observed, &self.shared.config.node_ips(), now);
        self.measure_start(&status);
        if self.status.as_ref() != Some(&status) {
            self.status = Some(status.clone());
            self.pod = Arc::new(with_own_status(&self.pod, self.status.as_ref()));
            let status = Arc::new(status);
            self.writer.send_modify(|wanted| wanted.status = Some(status));
        } else if self.writer.borrow().status.is_none() {
            // Equal to what the API has: nothing is sent, but a deletion needs to know it.
            let status = Arc::new(status);
            self.writer.send_if_modified(|wanted| {
                wanted.status = Some(status);
                false
            });
        }
        if self.observed.ending == Some(Ending::Deleted)
            && self.nothing_left()
            && !self.writer.borrow().delete
        {
            self.release_volumes();
            self.writer.send_modify(|wanted| wanted.delete = true);
        }
        let containers = self
            .observed
            .containers
            .iter()
            .map(|(name, list)| (name.clone(), list.iter().map(|c| (c.attempt, c.id.clone())).collect()));
        let view = PodView { pod: self.pod.clone(), containers: containers.collect() };
        self.shared.pods.write().insert((self.id.namespace.clone(), self.id.name.clone()), view);
    }

    fn measure_start(&mut self, status: &PodStatus) {
        if !self.start_measured && status.phase.as_deref() == Some("Running") {
            self.start_measured = true;
            self.shared.metrics.pod_start_seconds.observe(self.seen_at.elapsed().as_secs_f64());
        }
    }
}

/// The pod of the source with this worker's newer status, and the conditions of others as the source has them.
pub(super) fn with_own_status(pod: &Pod, own: Option<&PodStatus>) -> Pod {
    let mut pod = pod.clone();
    let Some(own) = own else { return pod };
    let mut status = own.clone();
    let source = pod.status.take().unwrap_or_default();
    let is_own = |type_: &str| status::OWN_CONDITIONS.contains(&type_);
    let mut conditions = status.conditions.take().unwrap_or_default();
    conditions.retain(|c| is_own(&c.type_));
    conditions.extend(source.conditions.into_iter().flatten().filter(|c| !is_own(&c.type_)));
    status.conditions = Some(conditions);
    status.nominated_node_name = source.nominated_node_name;
    // Somebody else may have ended the pod (pod GC, eviction): that stands.
    if matches!(source.phase.as_deref(), Some("Failed" | "Succeeded")) {
        (status.phase, status.reason, status.message) = (source.phase, source.reason, source.message);
    }
    pod.status = Some(status);
    pod
}
