//! Owns the pods that wait: active (to be tried now), backing off, and unschedulable (until something changes that
//! may help). Pure: the caller brings the time.

use crate::filter::Plugin;
use crate::pod::PodInfo;
use jiff::Timestamp;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Upstream's `podInitialBackoffSeconds` and `podMaxBackoffSeconds`.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// After so long an unschedulable pod is tried again even if nothing told it to (upstream: 5 minutes).
pub(crate) const UNSCHEDULABLE_FOR: Duration = Duration::from_secs(300);

/// Something happened that may make a pod schedulable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// A node came, or changed in what it has or forbids.
    Node,
    /// A pod left a node: room and ports.
    PodGone,
}

impl Wake {
    fn helps(self, plugin: Plugin) -> bool {
        match self {
            Self::Node => true,
            Self::PodGone => matches!(plugin, Plugin::NodeResourcesFit | Plugin::NodePorts),
        }
    }
}

/// Priority first, then age, then a stable order.
type Rank = (Reverse<i32>, Option<Timestamp>, String);

#[derive(Debug)]
struct Waiting {
    pod: Arc<PodInfo>,
    attempts: u32,
    tried: Option<Instant>,
    place: Place,
}

#[derive(Debug, Clone, PartialEq)]
enum Place {
    Active,
    /// `urgent`: an error, not a full cluster, so the back-off is waited out.
    Backoff {
        until: Instant,
        error: bool,
    },
    Unschedulable {
        plugins: BTreeSet<Plugin>,
    },
    /// Being bound.
    InFlight,
}

/// The pods that wait, by uid.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    pods: HashMap<String, Waiting>,
    active: BTreeMap<Rank, String>,
}

fn rank(pod: &PodInfo) -> Rank {
    (Reverse(pod.priority), pod.created, pod.uid.clone())
}

impl Queue {
    /// A pod came, or changed. A change of an unschedulable pod is a reason to try it again.
    pub(crate) fn update(&mut self, pod: Arc<PodInfo>, now: Instant) {
        let uid = pod.uid.clone();
        let Some(waiting) = self.pods.get_mut(&uid) else {
            self.active.insert(rank(&pod), uid.clone());
            let waiting = Waiting { pod, attempts: 0, tried: None, place: Place::Active };
            self.pods.insert(uid, waiting);
            return;
        };
        let before = std::mem::replace(&mut waiting.pod, pod.clone());
        if before.priority != pod.priority && self.active.remove(&rank(&before)).is_some() {
            self.active.insert(rank(&pod), uid.clone());
        }
        if differs(&before, &pod) {
            self.awaken(&uid, now);
        }
    }

    /// A pod is gone, bound, or not ours (any more).
    pub(crate) fn remove(&mut self, uid: &str) {
        if let Some(waiting) = self.pods.remove(uid) {
            self.active.remove(&rank(&waiting.pod));
        }
    }

    /// The next pod to try. With nothing else to do, one that merely backs off because the cluster was full is tried.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Arc<PodInfo>> {
        self.ripen(now);
        let uid = match self.active.pop_first() {
            Some((_, uid)) => uid,
            None => self.idle_candidate()?,
        };
        let waiting = self.pods.get_mut(&uid)?;
        waiting.place = Place::InFlight;
        waiting.attempts += 1;
        waiting.tried = Some(now);
        Some(waiting.pod.clone())
    }

    /// When a pod ripens by itself.
    pub(crate) fn next_ripe(&self) -> Option<Instant> {
        let at = |w: &Waiting| match &w.place {
            Place::Backoff { until, .. } => Some(*until),
            Place::Unschedulable { .. } => w.tried.map(|tried| tried + UNSCHEDULABLE_FOR),
            Place::Active | Place::InFlight => None,
        };
        self.pods.values().filter_map(at).min()
    }

    /// No node would have the pod.
    pub(crate) fn unschedulable(&mut self, uid: &str, plugins: BTreeSet<Plugin>) {
        if let Some(waiting) = self.pods.get_mut(uid) {
            waiting.place = Place::Unschedulable { plugins };
        }
    }

    /// Binding failed.
    pub(crate) fn failed(&mut self, uid: &str, now: Instant) {
        if let Some(waiting) = self.pods.get_mut(uid) {
            waiting.place = Place::Backoff { until: now + backoff(waiting.attempts), error: true };
        }
    }

    /// Tries those pods again that an event may help.
    pub(crate) fn wake(&mut self, wake: Wake, now: Instant) {
        let helped = |waiting: &Waiting| match &waiting.place {
            Place::Unschedulable { plugins } => plugins.is_empty() || plugins.iter().any(|p| wake.helps(*p)),
            Place::Active | Place::Backoff { .. } | Place::InFlight => false,
        };
        let uids: Vec<_> = self.pods.iter().filter(|(_, w)| helped(w)).map(|(uid, _)| uid.clone()).collect();
        uids.iter().for_each(|uid| self.awaken(uid, now));
    }

    /// How many pods are active, backing off, unschedulable.
    pub(crate) fn counts(&self) -> [i64; 3] {
        let mut counts = [0; 3];
        for waiting in self.pods.values() {
            match waiting.place {
                Place::Active => counts[0] += 1,
                Place::Backoff { .. } => counts[1] += 1,
                Place::Unschedulable { .. } => counts[2] += 1,
                Place::InFlight => {}
            }
        }
        counts
    }

    /// The uids of all waiting pods.
    pub(crate) fn uids(&self) -> impl Iterator<Item = &String> {
        self.pods.keys()
    }

    fn awaken(&mut self, uid: &str, now: Instant) {
        let Some(waiting) = self.pods.get_mut(uid) else { return };
        if !matches!(waiting.place, Place::Unschedulable { .. }) {
            return;
        }
        let until = waiting.tried.map(|tried| tried + backoff(waiting.attempts)).filter(|until| *until > now);
        match until {
            Some(until) => waiting.place = Place::Backoff { until, error: false },
            None => {
                waiting.place = Place::Active;
                self.active.insert(rank(&waiting.pod), uid.to_owned());
            }
        }
    }

    fn ripen(&mut self, now: Instant) {
        for (uid, waiting) in &mut self.pods {
            let ripe = match &waiting.place {
                Place::Backoff { until, .. } => *until <= now,
                Place::Unschedulable { .. } => {
                    waiting.tried.is_some_and(|tried| tried + UNSCHEDULABLE_FOR <= now)
                }
                Place::Active | Place::InFlight => false,
            };
            if ripe {
                waiting.place = Place::Active;
                self.active.insert(rank(&waiting.pod), uid.clone());
            }
        }
    }

    fn idle_candidate(&self) -> Option<String> {
        let idle = self.pods.iter().filter(|(_, w)| matches!(w.place, Place::Backoff { error: false, .. }));
        idle.min_by_key(|(_, w)| rank(&w.pod)).map(|(uid, _)| uid.clone())
    }
}

fn backoff(attempts: u32) -> Duration {
    BACKOFF_FIRST.saturating_mul(1 << attempts.saturating_sub(1).min(10)).min(BACKOFF_MAX)
}

/// Whether a pod changed in what decides where it may run (its status, which we write ourselves, doesn't count).
fn differs(a: &PodInfo, b: &PodInfo) -> bool {
    a.requests != b.requests
        || a.tolerations != b.tolerations
        || a.node_selector != b.node_selector
        || a.node_affinity != b.node_affinity
        || a.priority != b.priority
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, priority: i32, created: i64) -> Arc<PodInfo> {
        let created = Timestamp::from_second(created).ok();
        Arc::new(PodInfo { uid: uid.into(), priority, created, ..PodInfo::default() })
    }

    fn pop(queue: &mut Queue, now: Instant) -> Option<String> {
        queue.pop(now).map(|p| p.uid.clone())
    }

    fn fit() -> BTreeSet<Plugin> {
        [Plugin::NodeResourcesFit].into()
    }

    #[test]
    fn the_more_important_and_older_pod_is_first() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for pod in [pod("young", 0, 2), pod("old", 0, 1), pod("vip", 9, 3)] {
            queue.update(pod, now);
        }
        let order: Vec<_> = std::iter::from_fn(|| pop(&mut queue, now)).collect();
        assert_eq!(order, ["vip", "old", "young"]);
    }

    #[test]
    fn only_what_may_help_wakes_an_unschedulable_pod() {
        let (mut queue, start) = (Queue::default(), Instant::now());
        queue.update(pod("a", 0, 1), start);
        pop(&mut queue, start);
        queue.unschedulable("a", [Plugin::NodeAffinity].into());
        let later = start + Duration::from_secs(2);
        queue.wake(Wake::PodGone, later);
        assert_eq!(pop(&mut queue, later), None);
        queue.wake(Wake::Node, later);
        assert_eq!(pop(&mut queue, later).as_deref(), Some("a"));
    }

    #[test]
    fn a_woken_pod_that_backs_off_is_tried_early_only_if_nothing_else_waits() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.update(pod("a", 9, 1), now);
        pop(&mut queue, now);
        queue.unschedulable("a", fit());
        queue.wake(Wake::PodGone, now);
        queue.update(pod("b", 0, 2), now);
        assert_eq!(queue.counts(), [1, 1, 0]);
        assert_eq!(pop(&mut queue, now).as_deref(), Some("b"));
        assert_eq!(pop(&mut queue, now).as_deref(), Some("a"));
    }

    #[test]
    fn a_failed_binding_waits_its_back_off_out() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.update(pod("a", 0, 1), now);
        for seconds in [1, 2, 4, 8, 10, 10] {
            let tried = queue.next_ripe().unwrap_or(now);
            assert_eq!(pop(&mut queue, tried).as_deref(), Some("a"));
            queue.failed("a", tried);
            assert_eq!(pop(&mut queue, tried), None);
            assert_eq!(queue.next_ripe(), Some(tried + Duration::from_secs(seconds)));
        }
    }

    #[test]
    fn an_unschedulable_pod_is_tried_again_in_the_end() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.update(pod("a", 0, 1), now);
        pop(&mut queue, now);
        queue.unschedulable("a", fit());
        assert_eq!(queue.next_ripe(), Some(now + UNSCHEDULABLE_FOR));
        assert_eq!(pop(&mut queue, now + UNSCHEDULABLE_FOR).as_deref(), Some("a"));
    }

    #[test]
    fn a_removed_pod_is_not_tried() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.update(pod("a", 0, 1), now);
        queue.remove("a");
        assert_eq!(pop(&mut queue, now), None);
        assert_eq!(queue.uids().count(), 0);
    }
}
