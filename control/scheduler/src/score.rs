//! Owns the scores: every node that a pod may run on is scored by every plugin, with upstream's weights.

use crate::cache::{NodeFacts, NodeInfo};
use crate::filter::{term_matches, tolerated};
use crate::pod::PodInfo;
use std::collections::HashMap;

const MAX: f64 = 100.0;
const WEIGHT_TAINT_TOLERATION: f64 = 3.0;
const WEIGHT_NODE_AFFINITY: f64 = 2.0;
const WEIGHT_SPREAD: f64 = 2.0;
const WEIGHT_LEAST_ALLOCATED: f64 = 1.0;
const WEIGHT_BALANCED: f64 = 1.0;
const ZONE: &str = "topology.kubernetes.io/zone";
/// The skews of upstream's default constraints (KEP-1258): 3 over nodes, 5 over zones.
const NODE_SKEW: f64 = 3.0;
const ZONE_SKEW: f64 = 5.0;

pub(crate) type Candidate<'a> = (&'a NodeInfo, &'a NodeFacts);

/// The total score of each candidate, in order. A higher one is better.
pub(crate) fn total(pod: &PodInfo, candidates: &[Candidate<'_>]) -> Vec<f64> {
    let mut totals = vec![0.0; candidates.len()];
    let mut add = |weight: f64, scores: Vec<f64>| {
        totals.iter_mut().zip(scores).for_each(|(total, score)| *total += weight * score);
    };
    add(WEIGHT_LEAST_ALLOCATED, each(candidates, |c| least_allocated(pod, c)));
    add(WEIGHT_BALANCED, each(candidates, |c| balanced(pod, c)));
    add(WEIGHT_SPREAD, spread(pod, candidates));
    add(WEIGHT_TAINT_TOLERATION, taints(pod, candidates));
    add(WEIGHT_NODE_AFFINITY, affinity(pod, candidates));
    totals
}

fn each(candidates: &[Candidate<'_>], score: impl Fn(&Candidate<'_>) -> f64) -> Vec<f64> {
    candidates.iter().map(score).collect()
}

#[expect(clippy::cast_precision_loss, reason = "a share of a node needs no 53 bits")]
fn fraction(part: i64, whole: i64) -> f64 {
    if whole <= 0 { 1.0 } else { (part as f64 / whole as f64).min(1.0) }
}

/// Free share after the pod is there, over cpu and memory.
fn least_allocated(pod: &PodInfo, (node, facts): &Candidate<'_>) -> f64 {
    let free = |wanted, taken, has| MAX * (1.0 - fraction(wanted + taken, has));
    let cpu = free(pod.scored.cpu_millis, node.scored.cpu_millis, facts.allocatable.cpu_millis);
    let memory = free(pod.scored.memory_bytes, node.scored.memory_bytes, facts.allocatable.memory_bytes);
    (cpu + memory) / 2.0
}

/// How alike the shares of cpu and memory in use are after the pod is there.
fn balanced(pod: &PodInfo, (node, facts): &Candidate<'_>) -> f64 {
    let (wanted, taken, has) = (&pod.requests, &node.requested, &facts.allocatable);
    let cpu = fraction(wanted.cpu_millis + taken.cpu_millis, has.cpu_millis);
    let memory = fraction(wanted.memory_bytes + taken.memory_bytes, has.memory_bytes);
    MAX * (1.0 - (cpu - memory).abs() / 2.0)
}

/// Fewer pods of the same owner on the node and in its zone is better. Each count weighs by the logarithm of the
/// number of domains, as in upstream's PodTopologySpread, so that few zones don't outweigh many nodes.
fn spread(pod: &PodInfo, candidates: &[Candidate<'_>]) -> Vec<f64> {
    let Some(owner) = &pod.owner else { return vec![MAX; candidates.len()] };
    let here = |node: &NodeInfo| f64::from(node.owners.get(owner).copied().unwrap_or(0));
    let mut zones: HashMap<&str, f64> = HashMap::new();
    for (node, facts) in candidates {
        if let Some(zone) = facts.labels.get(ZONE) {
            *zones.entry(zone).or_default() += here(node);
        }
    }
    let weigh = |count: f64, domains: usize, skew: f64| {
        let domains = f64::from(u32::try_from(domains).unwrap_or(u32::MAX));
        count * (domains + 2.0).ln() + skew - 1.0
    };
    let crowding = each(candidates, |(node, facts)| {
        let zone = facts.labels.get(ZONE).and_then(|zone| zones.get(zone.as_str()));
        weigh(here(node), candidates.len(), NODE_SKEW)
            + zone.map_or(0.0, |count| weigh(*count, zones.len(), ZONE_SKEW))
    });
    let most = crowding.iter().copied().fold(0.0, f64::max);
    let least = crowding.iter().copied().fold(f64::INFINITY, f64::min);
    crowding.into_iter().map(|c| if most == 0.0 { MAX } else { MAX * (most + least - c) / most }).collect()
}

/// Fewer taints that would rather not have the pod is better.
fn taints(pod: &PodInfo, candidates: &[Candidate<'_>]) -> Vec<f64> {
    let counts = each(candidates, |(_, facts)| {
        let unwanted = facts.taints.iter().filter(|t| t.effect == "PreferNoSchedule");
        let count = unwanted.filter(|t| !tolerated(&pod.tolerations, t)).count();
        f64::from(u32::try_from(count).unwrap_or(u32::MAX))
    });
    relative(counts).into_iter().map(|score| MAX - score).collect()
}

/// The weights of the preferred terms that a node satisfies.
fn affinity(pod: &PodInfo, candidates: &[Candidate<'_>]) -> Vec<f64> {
    let preferred = pod.node_affinity.as_ref();
    let preferred = preferred.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_deref());
    relative(each(candidates, |(node, facts)| {
        let hits = preferred
            .into_iter()
            .flatten()
            .filter(|t| term_matches(&t.preference, &node.name, &facts.labels));
        hits.map(|t| f64::from(t.weight)).sum()
    }))
}

fn relative(counts: Vec<f64>) -> Vec<f64> {
    let most = counts.iter().copied().fold(0.0, f64::max);
    counts.into_iter().map(|c| if most == 0.0 { 0.0 } else { MAX * c / most }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::Resources;
    use k8s_openapi::api::core::v1::{
        NodeAffinity, NodeSelectorRequirement, NodeSelectorTerm, PreferredSchedulingTerm, Taint,
    };
    use std::sync::Arc;

    fn node(name: &str, pods: u32, zone: &str) -> (NodeInfo, NodeFacts) {
        let mut node = NodeInfo { name: name.into(), ..NodeInfo::default() };
        for n in 0..pods {
            node.add(Arc::new(PodInfo {
                uid: n.to_string(),
                owner: Some("rs".into()),
                requests: Resources { cpu_millis: 100, ..Resources::default() },
                scored: Resources { cpu_millis: 100, ..Resources::default() },
                ..PodInfo::default()
            }));
        }
        let facts = NodeFacts {
            labels: [(ZONE, zone), ("name", name)].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            allocatable: Resources { cpu_millis: 4000, memory_bytes: 4000, ..Resources::default() },
            ..NodeFacts::default()
        };
        (node, facts)
    }

    fn best(pod: &PodInfo, nodes: &[(NodeInfo, NodeFacts)]) -> String {
        let candidates: Vec<_> = nodes.iter().map(|(n, f)| (n, f)).collect();
        let totals = total(pod, &candidates);
        let at = (0..totals.len()).max_by(|a, b| totals[*a].total_cmp(&totals[*b])).unwrap();
        candidates[at].0.name.clone()
    }

    fn owned() -> PodInfo {
        PodInfo { owner: Some("rs".into()), ..PodInfo::default() }
    }

    #[test]
    fn pods_of_an_owner_are_spread_over_nodes_and_zones() {
        assert_eq!(best(&owned(), &[node("a", 2, "z"), node("b", 1, "z"), node("c", 2, "z")]), "b");
        assert_eq!(best(&owned(), &[node("a", 3, "z1"), node("b", 1, "z1"), node("c", 1, "z2")]), "c");
    }

    #[test]
    fn the_emptier_node_wins() {
        assert_eq!(best(&PodInfo::default(), &[node("a", 3, "z"), node("b", 1, "z")]), "b");
    }

    #[test]
    fn balance_prefers_what_evens_cpu_and_memory_out() {
        let (mut lopsided, facts) = node("a", 0, "z");
        lopsided.requested.cpu_millis = 3000;
        let pod = PodInfo {
            requests: Resources { memory_bytes: 3000, ..Resources::default() },
            ..PodInfo::default()
        };
        assert!(balanced(&pod, &(&lopsided, &facts)) > balanced(&pod, &(&node("b", 0, "z").0, &facts)));
    }

    #[test]
    fn soft_taints_repel_and_preferences_attract() {
        let mut nodes = [node("a", 0, "z"), node("b", 0, "z")];
        nodes[0].1.taints =
            vec![Taint { key: "k".into(), effect: "PreferNoSchedule".into(), ..Taint::default() }];
        assert_eq!(best(&PodInfo::default(), &nodes), "b");
        let requirement = NodeSelectorRequirement {
            key: "name".into(),
            operator: "In".into(),
            values: Some(vec!["a".into()]),
        };
        let term = PreferredSchedulingTerm {
            weight: 5,
            preference: NodeSelectorTerm { match_expressions: Some(vec![requirement]), match_fields: None },
        };
        let affinity = NodeAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(vec![term]),
            ..NodeAffinity::default()
        };
        let pod = PodInfo { node_affinity: Some(affinity), ..PodInfo::default() };
        assert_eq!(best(&pod, &[node("a", 1, "z"), node("b", 0, "z")]), "a");
    }
}
