//! Owns one scheduling decision: filter all nodes, score those that are left, pick one, or say why there is none.

use crate::cache::{Cache, NodeInfo};
use crate::filter::{self, Plugin, Refusal};
use crate::pod::PodInfo;
use crate::score::{self, Candidate};
use std::collections::{BTreeMap, BTreeSet};

/// Why a pod can't be placed now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unschedulable {
    /// Upstream's message, for the Event and the condition.
    pub(crate) message: String,
    /// The filters that refused: what must change before it is worth another try.
    pub(crate) plugins: BTreeSet<Plugin>,
}

/// The node for a pod. `random` picks among equally good ones: it is given how many there are.
pub(crate) fn decide(
    pod: &PodInfo,
    cache: &Cache,
    random: impl FnOnce(usize) -> usize,
) -> Result<String, Unschedulable> {
    let (mut candidates, mut refusals): (Vec<Candidate<'_>>, Vec<(&NodeInfo, Refusal)>) = Default::default();
    for (node, facts) in cache.nodes() {
        match filter::check(pod, node, facts) {
            Ok(()) => candidates.push((node, facts)),
            Err(refusal) => refusals.push((node, refusal)),
        }
    }
    if candidates.is_empty() {
        let plugins = refusals.iter().map(|(_, r)| r.plugin).collect();
        return Err(Unschedulable { message: message(pod, &refusals), plugins });
    }
    let totals = score::total(pod, &candidates);
    let best = totals.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let equals: Vec<_> = (0..totals.len()).filter(|at| totals[*at] >= best - 1e-9).collect();
    let pick = equals[random(equals.len()) % equals.len()];
    Ok(candidates[pick].0.name.clone())
}

fn message(pod: &PodInfo, refusals: &[(&NodeInfo, Refusal)]) -> String {
    let all = refusals.len();
    if all == 0 {
        return "no nodes available to schedule pods".into();
    }
    let reasons = refusals.iter().flat_map(|(_, r)| r.reasons.iter().map(String::as_str));
    let mut text = format!("0/{all} nodes are available: {}.", histogram(reasons));
    if pod.never_preempts {
        text.push_str(" preemption: not eligible due to preemptionPolicy=Never.");
        return text;
    }
    // Nodes with pods of lower priority would have to be searched for victims, which isn't done yet: then nothing is
    // said about preemption rather than something that may be false.
    let could_preempt = |(node, r): &(&NodeInfo, Refusal)| {
        r.resolvable && node.pods.values().any(|other| other.priority < pod.priority)
    };
    if !refusals.iter().any(could_preempt) {
        let outcomes = refusals.iter().map(|(_, r)| match r.resolvable {
            true => "No preemption victims found for incoming pod",
            false => "Preemption is not helpful for scheduling",
        });
        text.push_str(&format!(" preemption: 0/{all} nodes are available: {}.", histogram(outcomes)));
    }
    text
}

/// `2 Insufficient cpu, 1 Too many pods`, sorted as text like upstream's.
fn histogram<'a>(reasons: impl Iterator<Item = &'a str>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    reasons.for_each(|reason| *counts.entry(reason).or_default() += 1);
    let mut parts: Vec<_> = counts.into_iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    parts.sort();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::NodeFacts;
    use crate::resources::Resources;
    use k8s_openapi::api::core::v1::Taint;
    use std::sync::Arc;

    fn facts(cpu_millis: i64) -> NodeFacts {
        NodeFacts {
            allocatable: Resources { cpu_millis, memory_bytes: 1 << 30, ..Resources::default() },
            max_pods: 110,
            ..NodeFacts::default()
        }
    }

    fn cluster() -> Cache {
        let mut cache = Cache::default();
        for name in ["n1", "n2", "n3"] {
            cache.set_node(name, facts(1000));
        }
        cache
    }

    fn pod(uid: &str, cpu_millis: i64) -> PodInfo {
        let amounts = Resources { cpu_millis, ..Resources::default() };
        PodInfo {
            uid: uid.into(),
            owner: Some("rs".into()),
            requests: amounts.clone(),
            scored: amounts,
            ..PodInfo::default()
        }
    }

    #[test]
    fn assumed_pods_count_for_the_next_decision() {
        let mut cache = cluster();
        for n in 0..9 {
            let mut placed = pod(&n.to_string(), 100);
            placed.node = decide(&placed, &cache, |_| 0).unwrap();
            cache.place(Arc::new(placed));
        }
        assert!(cache.nodes().all(|(node, _)| node.pods.len() == 3));
    }

    #[test]
    fn says_why_in_upstreams_words() {
        let mut cache = cluster();
        let no_room = decide(&pod("p", 1001), &cache, |_| 0).unwrap_err();
        assert_eq!(
            no_room.message,
            "0/3 nodes are available: 3 Insufficient cpu. preemption: 0/3 nodes are available: \
             3 Preemption is not helpful for scheduling."
        );
        assert_eq!(no_room.plugins, [Plugin::NodeResourcesFit].into());
        let mut full = pod("full", 900);
        full.node = "n1".into();
        cache.place(Arc::new(full));
        let taint = Taint { key: "k".into(), effect: "NoSchedule".into(), ..Taint::default() };
        cache.set_node("n2", NodeFacts { taints: vec![taint], ..facts(1000) });
        cache.set_node("n3", NodeFacts { unschedulable: true, ..facts(1000) });
        assert_eq!(
            decide(&pod("p", 200), &cache, |_| 0).unwrap_err().message,
            "0/3 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint(s), \
             1 node(s) were unschedulable. preemption: 0/3 nodes are available: \
             1 No preemption victims found for incoming pod, 2 Preemption is not helpful for scheduling."
        );
    }

    #[test]
    fn an_empty_cluster_says_so() {
        let error = decide(&pod("p", 1), &Cache::default(), |_| 0).unwrap_err();
        assert_eq!(error.message, "no nodes available to schedule pods");
    }

    #[test]
    fn equals_are_picked_at_random() {
        let picked: BTreeSet<_> =
            (0..3).map(|n| decide(&pod("p", 100), &cluster(), |_| n).unwrap()).collect();
        assert_eq!(picked.len(), 3);
    }
}
