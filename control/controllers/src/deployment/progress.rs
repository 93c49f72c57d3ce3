//! Owns the Progressing and ReplicaFailure conditions, and the progress deadline.

use super::status::{self, calculate, complete, condition, new_condition};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use std::time::Duration;

const PROGRESSING: &str = "Progressing";
const REPLICA_FAILURE: &str = "ReplicaFailure";
const CREATED: &str = "NewReplicaSetCreated";
const FOUND: &str = "FoundNewReplicaSet";
const UPDATED: &str = "ReplicaSetUpdated";
const AVAILABLE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";
const PAUSED: &str = "DeploymentPaused";
const RESUMED: &str = "DeploymentResumed";
pub(super) const FAILED_CREATE: &str = "ReplicaSetCreateError";

fn deadline(d: &Deployment) -> Option<SignedDuration> {
    let seconds = d.spec.as_ref().and_then(|s| s.progress_deadline_seconds)?;
    (seconds != i32::MAX).then(|| SignedDuration::from_secs(i64::from(seconds)))
}

fn set(d: &mut Deployment, condition: DeploymentCondition) {
    status::set(d.status.get_or_insert_default(), condition);
}

fn reason(d: &Deployment) -> Option<&str> {
    condition(d.status.as_ref()?, PROGRESSING)?.reason.as_deref()
}

/// Starts and ends the pause of the deadline.
pub(super) fn note_pause(d: &mut Deployment, now: Timestamp) {
    if deadline(d).is_none() || reason(d) == Some(TIMED_OUT) {
        return;
    }
    let was_paused = reason(d) == Some(PAUSED);
    let (why, message) = match (super::math::paused(d), was_paused) {
        (true, false) => (PAUSED, "Deployment is paused"),
        (false, true) => (RESUMED, "Deployment is resumed"),
        _ => return,
    };
    set(d, new_condition(PROGRESSING, "Unknown", why, message.into(), now));
}

/// The current template's ReplicaSet was there already.
pub(super) fn note_found(d: &mut Deployment, name: &str, now: Timestamp) {
    if deadline(d).is_some() && reason(d).is_none() {
        let message = format!("Found new replica set \"{name}\"");
        set(d, new_condition(PROGRESSING, "True", FOUND, message, now));
    }
}

/// The current template's ReplicaSet is being created.
pub(super) fn note_created(d: &mut Deployment, name: &str, now: Timestamp) {
    if deadline(d).is_some() {
        let message = format!("Created new replica set \"{name}\"");
        set(d, new_condition(PROGRESSING, "True", CREATED, message, now));
    }
}

/// The current template's ReplicaSet was refused.
pub(super) fn note_create_failed(d: &mut Deployment, message: String, now: Timestamp) {
    if deadline(d).is_some() {
        set(d, new_condition(PROGRESSING, "False", FAILED_CREATE, message, now));
    }
}

/// Recomputes the status during a rollout. `stored` is the Deployment as it is in the API. Returns when the deadline
/// has to be looked at.
pub(super) fn sync_rollout(
    d: &mut Deployment,
    stored: &Deployment,
    all: &[&ReplicaSet],
    new: Option<&ReplicaSet>,
    now: Timestamp,
) -> Option<Duration> {
    let mut next = calculate(d, all, new, now);
    let old = stored.status.clone().unwrap_or_default();
    let subject = match new {
        Some(rs) => format!("ReplicaSet \"{}\"", rs.metadata.name.as_deref().unwrap_or_default()),
        None => format!("Deployment \"{}\"", d.metadata.name.as_deref().unwrap_or_default()),
    };
    if deadline(d).is_none() {
        status::remove(&mut next, PROGRESSING);
    }
    let current = condition(&next, PROGRESSING).cloned();
    let was_complete = next.replicas == next.updated_replicas
        && current.as_ref().is_some_and(|c| c.reason.as_deref() == Some(AVAILABLE));
    if deadline(d).is_some() && !was_complete {
        if complete(d, Some(&next)) {
            let message = format!("{subject} has successfully progressed.");
            status::set(&mut next, new_condition(PROGRESSING, "True", AVAILABLE, message, now));
        } else if progressed(&old, &next) {
            let message = format!("{subject} is progressing.");
            let mut condition = new_condition(PROGRESSING, "True", UPDATED, message, now);
            if let Some(current) = current.filter(|c| c.status == "True") {
                condition.last_transition_time = current.last_transition_time;
            }
            // Removed first: each bit of progress moves the update time, from which the deadline runs.
            status::remove(&mut next, PROGRESSING);
            status::set(&mut next, condition);
        } else if timed_out(d, &next, now) {
            let message = format!("{subject} has timed out progressing.");
            status::set(&mut next, new_condition(PROGRESSING, "False", TIMED_OUT, message, now));
        }
    }
    match replica_failure(all, new) {
        Some(failure) => status::set(&mut next, failure),
        None => status::remove(&mut next, REPLICA_FAILURE),
    }
    let look_again = time_left(d, &next, now);
    d.status = Some(next);
    look_again
}

fn progressed(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let n = |count: Option<i32>| count.unwrap_or(0);
    let outdated = |s: &DeploymentStatus| n(s.replicas) - n(s.updated_replicas);
    n(new.updated_replicas) > n(old.updated_replicas)
        || outdated(new) < outdated(old)
        || n(new.ready_replicas) > n(old.ready_replicas)
        || n(new.available_replicas) > n(old.available_replicas)
}

fn timed_out(d: &Deployment, status: &DeploymentStatus, now: Timestamp) -> bool {
    let (Some(deadline), Some(current)) = (deadline(d), condition(status, PROGRESSING)) else { return false };
    match current.reason.as_deref() {
        Some(AVAILABLE) => false,
        Some(TIMED_OUT) => true,
        _ => current.last_update_time.as_ref().is_some_and(|from| now.duration_since(from.0) > deadline),
    }
}

/// How long until the deadline, if the rollout is under way.
fn time_left(d: &Deployment, status: &DeploymentStatus, now: Timestamp) -> Option<Duration> {
    let current = condition(status, PROGRESSING)?;
    let deadline = deadline(d)?;
    if complete(d, Some(status)) || matches!(current.reason.as_deref(), Some(TIMED_OUT | AVAILABLE)) {
        return None;
    }
    let left = deadline - now.duration_since(current.last_update_time.as_ref()?.0);
    // A second more, since the times in conditions are whole seconds.
    Some(Duration::try_from(left).unwrap_or_default() + Duration::from_secs(1))
}

fn replica_failure(all: &[&ReplicaSet], new: Option<&ReplicaSet>) -> Option<DeploymentCondition> {
    let failure = |rs: &ReplicaSet| {
        let conditions = rs.status.as_ref()?.conditions.as_ref()?;
        conditions.iter().find(|c| c.type_ == REPLICA_FAILURE).cloned()
    };
    let found = new.and_then(failure).or_else(|| all.iter().find_map(|rs| failure(rs)))?;
    Some(DeploymentCondition {
        type_: REPLICA_FAILURE.into(),
        status: found.status,
        reason: found.reason,
        message: found.message,
        last_transition_time: found.last_transition_time.clone(),
        last_update_time: found.last_transition_time,
    })
}
