//! Owns the ReplicaSet decisions: how many pods to create or delete, and what its status says.

use crate::pod;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use std::sync::Arc;
use std::time::Duration;

/// Upstream creates or deletes at most so many pods per sync, so that one huge ReplicaSet doesn't starve the others.
const BURST: usize = 500;

/// What to do about the number of pods.
#[derive(Debug, PartialEq)]
pub(crate) enum Scaling {
    /// As wanted.
    Keep,
    /// So many more.
    Create(usize),
    /// These go.
    Delete(Vec<Arc<Pod>>),
}

/// Wanted pods.
pub(crate) fn wanted(rs: &ReplicaSet) -> i32 {
    rs.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

/// Compares the active pods with the wanted number. `related` as in [`super::rank::surplus`].
pub(crate) fn scaling(
    rs: &ReplicaSet,
    active: &[Arc<Pod>],
    related: impl FnOnce() -> Vec<Arc<Pod>>,
    now: Timestamp,
) -> Scaling {
    let wanted = usize::try_from(wanted(rs)).unwrap_or(0);
    match active.len() {
        have if have < wanted => Scaling::Create((wanted - have).min(BURST)),
        have if have > wanted => {
            let count = (have - wanted).min(BURST);
            Scaling::Delete(super::rank::surplus(active.to_vec(), &related(), count, now))
        }
        _ => Scaling::Keep,
    }
}

/// The reference that makes a ReplicaSet the controller of a pod.
pub(crate) fn owner_reference(rs: &ReplicaSet) -> OwnerReference {
    OwnerReference {
        api_version: "apps/v1".into(),
        kind: "ReplicaSet".into(),
        name: rs.metadata.name.clone().unwrap_or_default(),
        uid: rs.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The pod that the template asks for.
pub(crate) fn new_pod(rs: &ReplicaSet) -> Pod {
    let template = rs.spec.as_ref().and_then(|s| s.template.clone()).unwrap_or_default();
    let template_meta = template.metadata.unwrap_or_default();
    let name = rs.metadata.name.as_deref().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{name}-")),
            namespace: rs.metadata.namespace.clone(),
            labels: template_meta.labels,
            annotations: template_meta.annotations,
            finalizers: template_meta.finalizers,
            owner_references: Some(vec![owner_reference(rs)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// The outcome of creating or deleting pods in this sync, as it shows in the status.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Failure {
    /// `FailedCreate` or `FailedDelete`.
    pub(crate) reason: &'static str,
    /// What the API server said.
    pub(crate) message: String,
}

/// The status for these claimed pods (`active` and `terminating` apart), and when a pod becomes available next.
pub(crate) fn status(
    rs: &ReplicaSet,
    active: &[Arc<Pod>],
    terminating: usize,
    failure: Option<&Failure>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let spec = rs.spec.clone().unwrap_or_default();
    let template_labels = spec.template.as_ref().and_then(|t| t.metadata.as_ref()?.labels.clone());
    let template_labels = template_labels.unwrap_or_default();
    let fully_labeled = active.iter().filter(|p| {
        let labels = p.metadata.labels.as_ref();
        template_labels.iter().all(|(k, v)| labels.and_then(|l| l.get(k)) == Some(v))
    });
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let left: Vec<_> = active.iter().filter_map(|p| pod::available_in(p, min_ready, now)).collect();
    let next = left.iter().filter(|d| !d.is_zero()).min().map(|d| d.unsigned_abs());
    let old = rs.status.clone().unwrap_or_default();
    let status = ReplicaSetStatus {
        replicas: count(active.len()),
        fully_labeled_replicas: Some(count(fully_labeled.count())),
        ready_replicas: Some(count(active.iter().filter(|p| pod::is_ready(p)).count())),
        available_replicas: Some(count(left.iter().filter(|d| d.is_zero()).count())),
        terminating_replicas: Some(count(terminating)),
        observed_generation: rs.metadata.generation,
        conditions: conditions(old.conditions, failure, now),
    };
    (status, next)
}

fn conditions(
    old: Option<Vec<ReplicaSetCondition>>,
    failure: Option<&Failure>,
    now: Timestamp,
) -> Option<Vec<ReplicaSetCondition>> {
    let mut conditions = old.unwrap_or_default();
    let before = conditions.iter().position(|c| c.type_ == "ReplicaFailure").map(|at| conditions.remove(at));
    if let Some(failure) = failure {
        // As upstream: the first failure stays until it is over, so that a changing text doesn't write for ever.
        conditions.push(before.unwrap_or_else(|| ReplicaSetCondition {
            type_: "ReplicaFailure".into(),
            status: "True".into(),
            reason: Some(failure.reason.into()),
            message: Some(failure.message.clone()),
            last_transition_time: Some(Time(now)),
        }));
    }
    (!conditions.is_empty()).then_some(conditions)
}

/// Whether a status says the same as the one stored (absent counts are zero).
pub(crate) fn same_status(a: &ReplicaSetStatus, b: &ReplicaSetStatus) -> bool {
    let counts = |s: &ReplicaSetStatus| {
        [s.fully_labeled_replicas, s.ready_replicas, s.available_replicas, s.terminating_replicas]
            .map(|n| n.unwrap_or(0))
    };
    a.replicas == b.replicas
        && counts(a) == counts(b)
        && a.observed_generation == b.observed_generation
        && a.conditions.as_deref().unwrap_or_default() == b.conditions.as_deref().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use k8s_openapi::api::apps::v1::ReplicaSetSpec;

    fn rs(replicas: i32, min_ready: i32) -> ReplicaSet {
        ReplicaSet {
            metadata: ObjectMeta {
                name: Some("web-1".into()),
                namespace: Some("default".into()),
                uid: Some("rs".into()),
                generation: Some(3),
                ..ObjectMeta::default()
            },
            spec: Some(ReplicaSetSpec {
                replicas: Some(replicas),
                min_ready_seconds: Some(min_ready),
                ..ReplicaSetSpec::default()
            }),
            status: None,
        }
    }

    fn pods(count: usize) -> Vec<Arc<Pod>> {
        (0..count).map(|n| Arc::new(pod(&n.to_string(), "Running", Some(95), "n"))).collect()
    }

    fn now() -> Timestamp {
        Timestamp::from_second(100).unwrap()
    }

    #[test]
    fn creates_what_is_missing_and_deletes_what_is_too_much() {
        let decide = |want, have| scaling(&rs(want, 0), &pods(have), Vec::new, now());
        assert_eq!(decide(2, 2), Scaling::Keep);
        assert_eq!(decide(5, 2), Scaling::Create(3));
        assert_eq!(decide(2000, 0), Scaling::Create(500));
        assert!(matches!(decide(0, 3), Scaling::Delete(gone) if gone.len() == 3));
        assert!(matches!(decide(2, 3), Scaling::Delete(gone) if gone.len() == 1));
    }

    #[test]
    fn status_counts_ready_and_available_apart() {
        let (status, next) = status(&rs(3, 10), &pods(2), 1, None, now());
        assert_eq!(status.replicas, 2);
        assert_eq!(status.ready_replicas, Some(2));
        assert_eq!(status.available_replicas, Some(0));
        assert_eq!(status.terminating_replicas, Some(1));
        assert_eq!(status.observed_generation, Some(3));
        assert_eq!(next, Some(Duration::from_secs(5)));
    }

    #[test]
    fn a_failure_shows_until_it_is_over() {
        let mut set = rs(1, 0);
        let failure = Failure { reason: "FailedCreate", message: "quota".into() };
        let (first, _) = status(&set, &[], 0, Some(&failure), now());
        assert_eq!(first.conditions.as_ref().unwrap()[0].reason.as_deref(), Some("FailedCreate"));
        set.status = Some(first.clone());
        let later = Failure { reason: "FailedCreate", message: "other".into() };
        let (second, _) = status(&set, &[], 0, Some(&later), now());
        assert!(same_status(&first, &second));
        let (third, _) = status(&set, &pods(1), 0, None, now());
        assert_eq!(third.conditions, None);
    }

    #[test]
    fn a_new_pod_is_named_and_owned_by_its_set() {
        let pod = new_pod(&rs(1, 0));
        assert_eq!(pod.metadata.generate_name.as_deref(), Some("web-1-"));
        let owner = &pod.metadata.owner_references.unwrap()[0];
        assert_eq!((owner.kind.as_str(), owner.controller), ("ReplicaSet", Some(true)));
    }
}
