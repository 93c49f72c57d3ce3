//! Owns the order in which surplus pods are deleted.

use crate::pod;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

/// Annotation by which a user says which pods are cheap to lose (KEP-2255).
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

struct Ranked {
    pod: Arc<Pod>,
    /// How many pods of the same application share its node.
    doubled: usize,
}

/// The `count` pods to delete, chosen from `pods`. `related` are all pods of the same owner (a Deployment's other
/// ReplicaSets included): crowded nodes are thinned first.
pub(crate) fn surplus(
    pods: Vec<Arc<Pod>>,
    related: &[Arc<Pod>],
    count: usize,
    now: Timestamp,
) -> Vec<Arc<Pod>> {
    if count >= pods.len() {
        return pods;
    }
    let mut on_node: HashMap<&str, usize> = HashMap::new();
    for pod in related.iter().filter(|p| pod::is_active(p)) {
        *on_node.entry(pod::node_name(pod)).or_default() += 1;
    }
    let mut ranked: Vec<Ranked> = pods
        .into_iter()
        .map(|pod| {
            let doubled = on_node.get(pod::node_name(&pod)).copied().unwrap_or(0);
            Ranked { pod, doubled }
        })
        .collect();
    ranked.sort_by(|a, b| compare(a, b, now));
    ranked.truncate(count);
    ranked.into_iter().map(|r| r.pod).collect()
}

/// Less means deleted sooner; the steps are upstream's `ActivePodsWithRanks`.
fn compare(a: &Ranked, b: &Ranked, now: Timestamp) -> Ordering {
    let (p, q) = (&*a.pod, &*b.pod);
    let assigned = |pod| !pod::node_name(pod).is_empty();
    let restarts = |pod: &Pod| {
        let statuses = pod.status.as_ref().and_then(|s| s.container_statuses.as_ref());
        statuses.into_iter().flatten().map(|s| s.restart_count).max().unwrap_or(0)
    };
    assigned(p)
        .cmp(&assigned(q))
        .then_with(|| phase_order(p).cmp(&phase_order(q)))
        .then_with(|| pod::is_ready(p).cmp(&pod::is_ready(q)))
        .then_with(|| deletion_cost(p).cmp(&deletion_cost(q)))
        .then_with(|| b.doubled.cmp(&a.doubled))
        .then_with(|| match (pod::is_ready(p), pod::is_ready(q)) {
            (true, true) => younger_first(pod::ready_since(p), pod::ready_since(q), now),
            _ => Ordering::Equal,
        })
        .then_with(|| restarts(q).cmp(&restarts(p)))
        .then_with(|| younger_first(created(p), created(q), now))
        // Upstream breaks the last tie by uid too.
        .then_with(|| p.metadata.uid.cmp(&q.metadata.uid))
}

fn phase_order(pod: &Pod) -> u8 {
    match pod::phase(pod) {
        "Running" => 2,
        "Unknown" => 1,
        _ => 0,
    }
}

fn deletion_cost(pod: &Pod) -> i32 {
    let annotations = pod.metadata.annotations.as_ref();
    annotations.and_then(|a| a.get(DELETION_COST)).and_then(|v| v.parse().ok()).unwrap_or(0)
}

fn created(pod: &Pod) -> Option<Timestamp> {
    pod.metadata.creation_timestamp.as_ref().map(|t| t.0)
}

/// Ages are compared by order of magnitude (KEP-2185), so that among pods about as old the choice is even. An unset
/// time counts as youngest.
fn younger_first(a: Option<Timestamp>, b: Option<Timestamp>, now: Timestamp) -> Ordering {
    let magnitude = |t: Option<Timestamp>| t.map(|t| now.duration_since(t).as_nanos().max(0).checked_ilog2());
    magnitude(a).cmp(&magnitude(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use k8s_openapi::api::core::v1::ContainerStatus;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn first(a: Pod, b: Pod) -> String {
        let all = vec![Arc::new(b), Arc::new(a)];
        let now = Timestamp::from_second(10_000).unwrap();
        surplus(all.clone(), &all, 1, now)[0].metadata.name.clone().unwrap()
    }

    fn with_cost(mut pod: Pod, cost: &str) -> Pod {
        pod.metadata.annotations = Some([(DELETION_COST.to_owned(), cost.to_owned())].into());
        pod
    }

    fn with_restarts(mut pod: Pod, count: i32) -> Pod {
        let status = ContainerStatus { restart_count: count, ..ContainerStatus::default() };
        pod.status.as_mut().unwrap().container_statuses = Some(vec![status]);
        pod
    }

    fn created_at(mut pod: Pod, second: i64) -> Pod {
        pod.metadata.creation_timestamp = Some(Time(Timestamp::from_second(second).unwrap()));
        pod
    }

    #[test]
    fn the_less_useful_pod_goes_first() {
        let up = |name| pod(name, "Running", Some(5000), "n1");
        let rows = [
            ("unassigned", pod("a", "Pending", None, ""), pod("b", "Pending", None, "n1")),
            ("pending", pod("a", "Pending", None, "n1"), pod("b", "Running", None, "n1")),
            ("unknown", pod("a", "Unknown", None, "n1"), pod("b", "Running", None, "n1")),
            ("not ready", pod("a", "Running", None, "n1"), up("b")),
            ("cheaper", with_cost(up("a"), "-1"), up("b")),
            ("ready more recently", pod("a", "Running", Some(9990), "n1"), up("b")),
            ("more restarts", with_restarts(up("a"), 2), up("b")),
            ("younger", created_at(up("a"), 9999), up("b")),
        ];
        for (why, sooner, later) in rows {
            assert_eq!(first(sooner, later), "a", "{why}");
        }
    }

    #[test]
    fn crowded_nodes_are_thinned_first() {
        let all: Vec<_> = [("a", "n1"), ("b", "n2"), ("c", "n2")]
            .map(|(p, n)| Arc::new(pod(p, "Running", Some(1), n)))
            .into();
        let gone = surplus(all.clone(), &all, 1, Timestamp::from_second(10).unwrap());
        assert_eq!(pod::node_name(&gone[0]), "n2");
    }
}
