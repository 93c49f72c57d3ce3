//! Owns what controllers ask of a pod: active, ready since when, available.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodCondition};

/// A condition of the pod.
pub(crate) fn condition<'a>(pod: &'a Pod, name: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == name)
}

/// The phase, empty if not set.
pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

/// Succeeded or Failed.
pub(crate) fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Being deleted.
pub(crate) fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Neither finished nor being deleted.
pub(crate) fn is_active(pod: &Pod) -> bool {
    !is_terminal(pod) && !is_terminating(pod)
}

/// The condition Ready is True.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|c| c.status == "True")
}

/// When a ready pod became ready.
pub(crate) fn ready_since(pod: &Pod) -> Option<Timestamp> {
    condition(pod, "Ready").filter(|c| c.status == "True")?.last_transition_time.as_ref().map(|t| t.0)
}

/// How long until a ready pod is available: zero if it is now, `None` if it isn't ready.
pub(crate) fn available_in(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Option<SignedDuration> {
    if !is_ready(pod) {
        return None;
    }
    if min_ready_seconds == 0 {
        return Some(SignedDuration::ZERO);
    }
    let since = ready_since(pod)?;
    let left = SignedDuration::from_secs(i64::from(min_ready_seconds)) - now.duration_since(since);
    Some(left.max(SignedDuration::ZERO))
}

/// Node that the pod is bound to, empty if none.
pub(crate) fn node_name(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|s| s.node_name.as_deref()).unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{PodSpec, PodStatus};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

    /// A pod in a phase, ready since a second or not ready, on a node or not.
    pub(crate) fn pod(name: &str, phase: &str, ready_since: Option<i64>, node: &str) -> Pod {
        let at = |s| Some(Time(Timestamp::from_second(s).unwrap()));
        let ready = PodCondition {
            type_: "Ready".into(),
            status: if ready_since.is_some() { "True" } else { "False" }.into(),
            last_transition_time: at(ready_since.unwrap_or(0)),
            ..PodCondition::default()
        };
        Pod {
            metadata: ObjectMeta {
                name: Some(name.into()),
                namespace: Some("default".into()),
                uid: Some(format!("uid-{name}")),
                creation_timestamp: at(0),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec {
                node_name: (!node.is_empty()).then(|| node.to_owned()),
                ..PodSpec::default()
            }),
            status: Some(PodStatus {
                phase: Some(phase.into()),
                conditions: Some(vec![ready]),
                ..PodStatus::default()
            }),
        }
    }

    #[test]
    fn availability_waits_for_min_ready_seconds() {
        let now = Timestamp::from_second(100).unwrap();
        let left = |since, min| available_in(&pod("p", "Running", since, "n"), min, now).map(|d| d.as_secs());
        assert_eq!(left(None, 0), None);
        assert_eq!(left(Some(100), 0), Some(0));
        assert_eq!(left(Some(95), 10), Some(5));
        assert_eq!(left(Some(90), 10), Some(0));
    }
}
