//! Owns one step of a Deployment: from the Deployment, its ReplicaSets and the time to everything that is to be
//! written. The step works on copies and what differs at its end is the plan.

use super::math::{self, by_creation};
use super::revision::{self, DESIRED, MAX_REPLICAS, REVISION};
use super::{progress, status};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// The label that tells the pods of one ReplicaSet from those of its siblings.
pub(crate) const TEMPLATE_HASH: &str = "pod-template-hash";

/// A change to one ReplicaSet.
#[derive(Debug, PartialEq, Clone)]
pub(crate) struct RsPatch {
    pub(crate) name: String,
    /// Optimistic lock.
    pub(crate) resource_version: Option<String>,
    pub(crate) replicas: Option<i32>,
    pub(crate) min_ready_seconds: Option<i32>,
    /// Annotations to set.
    pub(crate) annotations: BTreeMap<String, String>,
}

/// Everything that one step writes, in this order.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// The ReplicaSet for a new template.
    pub(crate) create: Option<ReplicaSet>,
    pub(crate) patches: Vec<RsPatch>,
    /// Old ReplicaSets beyond the history limit.
    pub(crate) delete: Vec<Arc<ReplicaSet>>,
    /// The new status, if it differs, with the annotations that go with it.
    pub(crate) status: Option<Deployment>,
    /// Messages of `ScalingReplicaSet` Events.
    pub(crate) events: Vec<String>,
    /// When the progress deadline may pass.
    pub(crate) look_again: Option<Duration>,
}

/// What a step looks at.
pub(crate) struct Input<'a> {
    pub(crate) deployment: &'a Deployment,
    /// All ReplicaSets that the Deployment controls.
    pub(crate) replica_sets: &'a [Arc<ReplicaSet>],
    /// Whether any pod of an old ReplicaSet may still run (asked for by Recreate only).
    pub(crate) old_pods_run: &'a dyn Fn(Option<&ReplicaSet>) -> bool,
    pub(crate) now: Timestamp,
}

/// A ReplicaSet as it will be after the step.
#[derive(Clone)]
pub(super) struct Set {
    pub(super) rs: ReplicaSet,
    /// As it is in the API; `None` for one that the step creates.
    before: Option<Arc<ReplicaSet>>,
}

impl Set {
    pub(super) fn replicas(&self) -> i32 {
        math::replicas(&self.rs)
    }
}

pub(super) struct Step<'a> {
    pub(super) input: &'a Input<'a>,
    /// The Deployment with the status as it will be.
    pub(super) d: Deployment,
    /// By age, the oldest first.
    pub(super) sets: Vec<Set>,
    /// Which of `sets` has the Deployment's template.
    pub(super) new: Option<usize>,
    plan: Plan,
}

/// Plans one step.
pub(crate) fn plan(input: &Input<'_>) -> Plan {
    let known = input.replica_sets.iter();
    let mut sets: Vec<Set> = known.map(|rs| Set { rs: (**rs).clone(), before: Some(rs.clone()) }).collect();
    sets.sort_by_key(|set| by_creation(&set.rs));
    let new = sets.iter().position(|set| revision::has_template(&set.rs, input.deployment));
    let mut d = input.deployment.clone();
    d.status.get_or_insert_default();
    let mut step = Step { input, d, sets, new, plan: Plan::default() };
    step.run();
    step.finish()
}

impl Step<'_> {
    fn run(&mut self) {
        if self.d.metadata.deletion_timestamp.is_some() {
            return self.sync_status();
        }
        progress::note_pause(&mut self.d, self.input.now);
        if math::paused(&self.d) {
            self.adopt_new();
            self.scale();
            self.clean_up();
            return self.sync_status();
        }
        if self.is_scaling_event() {
            self.adopt_new();
            self.scale();
            return self.sync_status();
        }
        if math::is_rolling(&self.d) { self.roll() } else { self.recreate() }
    }

    fn sync_status(&mut self) {
        let status = status::calculate(&self.d, &self.all(), self.new_rs(), self.input.now);
        self.d.status = Some(status);
    }

    fn sync_rollout_status(&mut self) {
        let sets = std::mem::take(&mut self.sets);
        let all: Vec<&ReplicaSet> = sets.iter().map(|set| &set.rs).collect();
        let new = self.new.map(|at| all[at]);
        self.plan.look_again =
            progress::sync_rollout(&mut self.d, self.input.deployment, &all, new, self.input.now);
        self.sets = sets;
    }

    fn all(&self) -> Vec<&ReplicaSet> {
        self.sets.iter().map(|set| &set.rs).collect()
    }

    pub(super) fn new_rs(&self) -> Option<&ReplicaSet> {
        self.new.map(|at| &self.sets[at].rs)
    }

    /// The ReplicaSets with other templates.
    fn old(&self) -> Vec<usize> {
        (0..self.sets.len()).filter(|at| Some(*at) != self.new).collect()
    }

    pub(super) fn total(&self) -> i32 {
        self.sets.iter().map(Set::replicas).sum()
    }

    /// A ReplicaSet that doesn't know the wanted number yet: the Deployment was scaled.
    fn is_scaling_event(&self) -> bool {
        let wanted = math::wanted(&self.d);
        self.sets.iter().filter(|set| set.replicas() > 0).any(|set| {
            revision::annotation_number(&set.rs, DESIRED).is_some_and(|desired| desired != i64::from(wanted))
        })
    }

    /// Gives the ReplicaSet of the current template the newest revision.
    fn adopt_new(&mut self) {
        let Some(at) = self.new else { return };
        let revision = self.next_revision();
        revision::annotate(&mut self.sets[at].rs, &self.d, revision, true);
        let min_ready = self.d.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0);
        if let Some(spec) = &mut self.sets[at].rs.spec
            && spec.min_ready_seconds.unwrap_or(0) != min_ready
        {
            spec.min_ready_seconds = Some(min_ready);
        }
        let name = self.sets[at].rs.metadata.name.clone().unwrap_or_default();
        self.set_revision(
            self.sets[at].rs.metadata.annotations.as_ref().and_then(|a| a.get(REVISION)).cloned(),
        );
        progress::note_found(&mut self.d, &name, self.input.now);
    }

    fn set_revision(&mut self, revision: Option<String>) {
        let Some(revision) = revision else { return };
        self.d.metadata.annotations.get_or_insert_default().insert(REVISION.into(), revision);
    }

    fn next_revision(&self) -> i64 {
        let old = self.old().into_iter().map(|at| &self.sets[at].rs);
        old.filter_map(|rs| revision::annotation_number(rs, REVISION)).max().unwrap_or(0) + 1
    }

    fn adopt_or_create_new(&mut self) {
        if self.new.is_some() {
            return self.adopt_new();
        }
        let revision = self.next_revision();
        let mut rs = new_replica_set(&self.d);
        self.sets.push(Set { rs: rs.clone(), before: None });
        let at = self.sets.len() - 1;
        self.new = Some(at);
        let replicas = math::new_set_replicas(&self.d, self.total(), 0);
        if let Some(spec) = &mut rs.spec {
            spec.replicas = Some(replicas);
        }
        revision::annotate(&mut rs, &self.d, revision, false);
        let name = rs.metadata.name.clone().unwrap_or_default();
        if replicas > 0 {
            self.plan.events.push(format!("Scaled up replica set {name} from 0 to {replicas}"));
        }
        self.set_revision(Some(revision.to_string()));
        progress::note_created(&mut self.d, &name, self.input.now);
        self.sets[at].rs = rs;
    }

    fn roll(&mut self) {
        self.adopt_or_create_new();
        if !self.reconcile_new() && !self.reconcile_old() && status::complete(&self.d, self.d.status.as_ref())
        {
            self.clean_up();
        }
        self.sync_rollout_status();
    }

    fn recreate(&mut self) {
        self.adopt_new();
        let active: Vec<_> = self.old().into_iter().filter(|at| self.sets[*at].replicas() > 0).collect();
        if !active.is_empty() {
            active.into_iter().for_each(|at| self.set_replicas(at, 0));
            return self.sync_rollout_status();
        }
        let old_status = self.old().into_iter().any(|at| status::actual(&self.sets[at].rs) > 0);
        if old_status || (self.input.old_pods_run)(self.new_rs()) {
            return self.sync_rollout_status();
        }
        self.adopt_or_create_new();
        if let Some(at) = self.new {
            self.set_replicas(at, math::wanted(&self.d));
        }
        if status::complete(&self.d, self.d.status.as_ref()) {
            self.clean_up();
        }
        self.sync_rollout_status();
    }

    fn reconcile_new(&mut self) -> bool {
        let Some(at) = self.new else { return false };
        let (have, wanted) = (self.sets[at].replicas(), math::wanted(&self.d));
        let target = match have.cmp(&wanted) {
            std::cmp::Ordering::Equal => return false,
            std::cmp::Ordering::Greater => wanted,
            std::cmp::Ordering::Less => math::new_set_replicas(&self.d, self.total(), have),
        };
        self.set_replicas(at, target);
        target != have
    }

    fn reconcile_old(&mut self) -> bool {
        let old: Vec<_> = self.old().into_iter().filter(|at| self.sets[*at].replicas() > 0).collect();
        let Some(new) = self.new.filter(|_| !old.is_empty()) else { return false };
        let min_available = math::wanted(&self.d) - math::max_unavailable(&self.d);
        let new_unavailable = self.sets[new].replicas() - status::available(&self.sets[new].rs);
        let room = self.total() - min_available - new_unavailable;
        if room <= 0 {
            return false;
        }
        let cleaned = self.drop_unhealthy(&old, room);
        let thinned = self.drop_available(&old, min_available);
        cleaned + thinned > 0
    }

    /// Pods that don't serve anyway go first: they would only hold the rollout up.
    fn drop_unhealthy(&mut self, old: &[usize], room: i32) -> i32 {
        let mut dropped = 0;
        for &at in old {
            let (have, available) = (self.sets[at].replicas(), status::available(&self.sets[at].rs));
            let drop = (have - available).min(room - dropped);
            if drop > 0 {
                self.set_replicas(at, have - drop);
                dropped += drop;
            }
        }
        dropped
    }

    fn drop_available(&mut self, old: &[usize], min_available: i32) -> i32 {
        let available: i32 = self.sets.iter().map(|set| status::available(&set.rs)).sum();
        let spare = available - min_available;
        let mut dropped = 0;
        for &at in old {
            let have = self.sets[at].replicas();
            let drop = have.min(spare - dropped);
            if drop > 0 {
                self.set_replicas(at, have - drop);
                dropped += drop;
            }
        }
        dropped
    }

    /// Brings the sizes in line after the wanted number changed, outside of a rollout's own steps.
    fn scale(&mut self) {
        let wanted = math::wanted(&self.d);
        if let Some(at) = self.active_or_latest() {
            return self.set_replicas(at, wanted);
        }
        let saturated = self.new.is_some_and(|at| math::is_saturated(&self.d, &self.sets[at].rs));
        if saturated {
            return self.old().into_iter().for_each(|at| self.set_replicas(at, 0));
        }
        if math::is_rolling(&self.d) {
            self.scale_in_proportion();
        }
    }

    fn active_or_latest(&self) -> Option<usize> {
        let active: Vec<_> = (0..self.sets.len()).filter(|at| self.sets[*at].replicas() > 0).collect();
        match active.as_slice() {
            [] => self.new.or_else(|| self.old().last().copied()),
            [one] => Some(*one),
            _ => None,
        }
    }

    fn scale_in_proportion(&mut self) {
        let wanted = math::wanted(&self.d);
        let mut active: Vec<_> = (0..self.sets.len()).filter(|at| self.sets[*at].replicas() > 0).collect();
        let size: i32 = active.iter().map(|at| self.sets[*at].replicas()).sum();
        let allowed = if wanted > 0 { wanted + math::max_surge(&self.d) } else { 0 };
        let to_add = allowed - size;
        // Larger sets first; of equals the newest when growing, the oldest when shrinking.
        active.sort_by_key(|&at| {
            let age = i64::try_from(at).unwrap_or(i64::MAX);
            (Reverse(self.sets[at].replicas()), if to_add > 0 { -age } else { age })
        });
        let mut added = 0;
        let mut targets = Vec::new();
        for &at in &active {
            let share = math::proportion(&self.d, &self.sets[at].rs, to_add, added);
            added += share;
            targets.push(self.sets[at].replicas() + share);
        }
        if let Some(first) = targets.first_mut() {
            *first = (*first + to_add - added).max(0);
        }
        for (at, target) in active.into_iter().zip(targets) {
            self.set_replicas(at, target);
        }
    }

    /// Old, empty ReplicaSets beyond the history limit go, the oldest revision first.
    fn clean_up(&mut self) {
        let limit = self.d.spec.as_ref().and_then(|s| s.revision_history_limit);
        let Some(limit) = limit.filter(|l| *l != i32::MAX).and_then(|l| usize::try_from(l).ok()) else {
            return;
        };
        let mut old: Vec<_> = self
            .old()
            .into_iter()
            .filter_map(|at| self.sets[at].before.clone())
            .filter(|rs| rs.metadata.deletion_timestamp.is_none())
            .collect();
        let surplus = old.len().saturating_sub(limit);
        old.sort_by_key(|rs| revision::annotation_number(rs, REVISION).unwrap_or(0));
        let idle = |rs: &ReplicaSet| {
            let observed = rs.status.as_ref().and_then(|s| s.observed_generation).unwrap_or(0);
            status::actual(rs) == 0
                && math::replicas(rs) == 0
                && rs.metadata.generation.unwrap_or(0) <= observed
        };
        self.plan.delete = old.into_iter().take(surplus).filter(|rs| idle(rs)).collect();
    }

    pub(super) fn set_replicas(&mut self, at: usize, target: i32) {
        let d_wanted = math::wanted(&self.d);
        let max = d_wanted + math::max_surge(&self.d);
        let rs = &mut self.sets[at].rs;
        let have = math::replicas(rs);
        let annotations = rs.metadata.annotations.get_or_insert_default();
        annotations.insert(DESIRED.into(), d_wanted.to_string());
        annotations.insert(MAX_REPLICAS.into(), max.to_string());
        if have == target {
            return;
        }
        if let Some(spec) = &mut rs.spec {
            spec.replicas = Some(target);
        }
        let direction = if target > have { "up" } else { "down" };
        let name = rs.metadata.name.as_deref().unwrap_or_default();
        self.plan.events.push(format!("Scaled {direction} replica set {name} from {have} to {target}"));
    }

    fn finish(mut self) -> Plan {
        for set in &self.sets {
            match &set.before {
                None => self.plan.create = Some(set.rs.clone()),
                Some(before) => self.plan.patches.extend(difference(before, &set.rs)),
            }
        }
        let old_status = self.input.deployment.status.clone().unwrap_or_default();
        let new_status = self.d.status.clone().unwrap_or_default();
        let annotated =
            self.d.metadata.annotations.as_ref() != self.input.deployment.metadata.annotations.as_ref();
        if annotated || !same_status(&old_status, &new_status) {
            self.plan.status = Some(self.d);
        }
        self.plan
    }
}

fn same_status(a: &DeploymentStatus, b: &DeploymentStatus) -> bool {
    let counts = |s: &DeploymentStatus| {
        [
            s.available_replicas,
            s.collision_count,
            s.ready_replicas,
            s.replicas,
            s.terminating_replicas,
            s.unavailable_replicas,
            s.updated_replicas,
        ]
        .map(|n| n.unwrap_or(0))
    };
    counts(a) == counts(b)
        && a.observed_generation == b.observed_generation
        && a.conditions.as_deref().unwrap_or_default() == b.conditions.as_deref().unwrap_or_default()
}

fn difference(before: &ReplicaSet, after: &ReplicaSet) -> Option<RsPatch> {
    let old = before.metadata.annotations.clone().unwrap_or_default();
    let annotations: BTreeMap<_, _> = after
        .metadata
        .annotations
        .clone()
        .unwrap_or_default()
        .into_iter()
        .filter(|(key, value)| old.get(key) != Some(value))
        .collect();
    let changed = |pick: fn(&ReplicaSetSpec) -> Option<i32>| {
        let of = |rs: &ReplicaSet| rs.spec.as_ref().and_then(pick);
        of(after).filter(|new| Some(*new) != of(before))
    };
    let patch = RsPatch {
        name: before.metadata.name.clone().unwrap_or_default(),
        resource_version: before.metadata.resource_version.clone(),
        replicas: changed(|s| s.replicas),
        min_ready_seconds: changed(|s| s.min_ready_seconds),
        annotations,
    };
    let any = patch.replicas.is_some() || patch.min_ready_seconds.is_some() || !patch.annotations.is_empty();
    any.then_some(patch)
}

/// The reference that makes a Deployment the controller of a ReplicaSet.
pub(crate) fn owner_reference(d: &Deployment) -> OwnerReference {
    OwnerReference {
        api_version: "apps/v1".into(),
        kind: "Deployment".into(),
        name: d.metadata.name.clone().unwrap_or_default(),
        uid: d.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// An empty ReplicaSet for the Deployment's template.
fn new_replica_set(d: &Deployment) -> ReplicaSet {
    let spec = d.spec.clone().unwrap_or_default();
    let hash = revision::template_hash(&spec.template, d.status.as_ref().and_then(|s| s.collision_count));
    let mut template = spec.template;
    let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
    labels.insert(TEMPLATE_HASH.into(), hash.clone());
    let labels = labels.clone();
    let mut selector = spec.selector;
    selector.match_labels.get_or_insert_default().insert(TEMPLATE_HASH.into(), hash.clone());
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", d.metadata.name.as_deref().unwrap_or_default())),
            namespace: d.metadata.namespace.clone(),
            labels: Some(labels),
            owner_references: Some(vec![owner_reference(d)]),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(0),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    }
}

#[cfg(test)]
pub(super) mod tests;
