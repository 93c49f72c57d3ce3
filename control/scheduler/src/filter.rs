//! Owns the filters: whether a pod may run on a node, and if not, why, in upstream's words.

use crate::cache::{NodeFacts, NodeInfo};
use crate::pod::PodInfo;
use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, Taint, Toleration};
use std::collections::BTreeMap;

const UNSCHEDULABLE_TAINT: &str = "node.kubernetes.io/unschedulable";

/// The filter that refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Plugin {
    NodeUnschedulable,
    NodeName,
    TaintToleration,
    NodeAffinity,
    NodePorts,
    NodeResourcesFit,
}

/// Why a node is out of the question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) plugin: Plugin,
    pub(crate) reasons: Vec<String>,
    /// Whether other pods' leaving could help.
    pub(crate) resolvable: bool,
}

fn refuse(plugin: Plugin, reason: &str, resolvable: bool) -> Result<(), Refusal> {
    Err(Refusal { plugin, reasons: vec![reason.to_owned()], resolvable })
}

/// Runs the filters in upstream's order; the first that refuses decides.
pub(crate) fn check(pod: &PodInfo, node: &NodeInfo, facts: &NodeFacts) -> Result<(), Refusal> {
    let cordon = Taint { key: UNSCHEDULABLE_TAINT.into(), effect: "NoSchedule".into(), ..Taint::default() };
    if facts.unschedulable && !tolerated(&pod.tolerations, &cordon) {
        return refuse(Plugin::NodeUnschedulable, "node(s) were unschedulable", false);
    }
    if !pod.node.is_empty() && pod.node != node.name {
        return refuse(Plugin::NodeName, "node(s) didn't match the requested node name", false);
    }
    let forbids = |t: &&Taint| matches!(t.effect.as_str(), "NoSchedule" | "NoExecute");
    if facts.taints.iter().filter(forbids).any(|t| !tolerated(&pod.tolerations, t)) {
        return refuse(Plugin::TaintToleration, "node(s) had untolerated taint(s)", false);
    }
    if !affine(pod, &node.name, &facts.labels) {
        return refuse(Plugin::NodeAffinity, "node(s) didn't match Pod's node affinity/selector", false);
    }
    if pod.ports.iter().any(|wanted| node.ports.iter().any(|taken| taken.conflicts(wanted))) {
        let reason = "node(s) didn't have free ports for the requested pod ports";
        return refuse(Plugin::NodePorts, reason, true);
    }
    fits(pod, node, facts)
}

fn fits(pod: &PodInfo, node: &NodeInfo, facts: &NodeFacts) -> Result<(), Refusal> {
    let (mut reasons, mut resolvable) = (Vec::new(), true);
    if node.pods.len() + 1 > facts.max_pods {
        reasons.push("Too many pods".to_owned());
    }
    let mut check = |name: &str, wanted: i64, has: i64, taken: i64| {
        if wanted > 0 && wanted > has - taken {
            reasons.push(format!("Insufficient {name}"));
            resolvable &= wanted <= has;
        }
    };
    let (wanted, has, taken) = (&pod.requests, &facts.allocatable, &node.requested);
    check("cpu", wanted.cpu_millis, has.cpu_millis, taken.cpu_millis);
    check("memory", wanted.memory_bytes, has.memory_bytes, taken.memory_bytes);
    check("ephemeral-storage", wanted.ephemeral_bytes, has.ephemeral_bytes, taken.ephemeral_bytes);
    for (name, amount) in &wanted.others {
        let of = |all: &BTreeMap<String, i64>| all.get(name).copied().unwrap_or(0);
        check(name, *amount, of(&has.others), of(&taken.others));
    }
    if reasons.is_empty() {
        return Ok(());
    }
    Err(Refusal { plugin: Plugin::NodeResourcesFit, reasons, resolvable })
}

/// Whether some toleration covers a taint.
pub(crate) fn tolerated(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|t| {
        let effect = t.effect.as_deref().unwrap_or_default();
        let key = t.key.as_deref().unwrap_or_default();
        let value = t.value.as_deref().unwrap_or_default();
        let taint_value = taint.value.as_deref().unwrap_or_default();
        let number = |s: &str| s.parse::<i64>().ok();
        (effect.is_empty() || effect == taint.effect)
            && (key.is_empty() || key == taint.key)
            && match t.operator.as_deref().unwrap_or_default() {
                "" | "Equal" => value == taint_value && (!key.is_empty() || taint.key.is_empty()),
                "Exists" => true,
                "Lt" => matches!((number(taint_value), number(value)), (Some(a), Some(b)) if a < b),
                "Gt" => matches!((number(taint_value), number(value)), (Some(a), Some(b)) if a > b),
                _ => false,
            }
    })
}

fn affine(pod: &PodInfo, name: &str, labels: &BTreeMap<String, String>) -> bool {
    if !pod.node_selector.iter().all(|(key, value)| labels.get(key) == Some(value)) {
        return false;
    }
    let required = pod
        .node_affinity
        .as_ref()
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    required.is_none_or(|r| r.node_selector_terms.iter().any(|term| term_matches(term, name, labels)))
}

/// Whether a node satisfies a term; an empty term matches nothing.
pub(crate) fn term_matches(term: &NodeSelectorTerm, name: &str, labels: &BTreeMap<String, String>) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let field = |r: &NodeSelectorRequirement| holds(r, (r.key == "metadata.name").then_some(name));
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|r| holds(r, labels.get(&r.key).map(String::as_str)))
        && fields.iter().all(field)
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let contains = |value: &str| values.iter().any(|v| v == value);
    let numbers = || {
        let bound = values.first()?.parse::<i64>().ok()?;
        Some((value?.parse::<i64>().ok()?, bound))
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(contains),
        "NotIn" => !value.is_some_and(contains),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => numbers().is_some_and(|(value, bound)| value > bound),
        "Lt" => numbers().is_some_and(|(value, bound)| value < bound),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::HostPort;
    use crate::resources::Resources;
    use k8s_openapi::api::core::v1::{NodeAffinity, NodeSelector};
    use std::sync::Arc;

    fn facts() -> NodeFacts {
        NodeFacts {
            labels: [("disk", "ssd"), ("cores", "8")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            allocatable: Resources { cpu_millis: 1000, memory_bytes: 1000, ..Resources::default() },
            max_pods: 2,
            ..NodeFacts::default()
        }
    }

    fn node() -> NodeInfo {
        let mut node = NodeInfo { name: "n1".into(), ..NodeInfo::default() };
        let port = HostPort { protocol: "TCP".into(), ip: "10.0.0.1".into(), port: 80 };
        node.add(Arc::new(PodInfo {
            uid: "there".into(),
            ports: vec![port],
            requests: Resources { cpu_millis: 600, ..Resources::default() },
            ..PodInfo::default()
        }));
        node
    }

    fn refused(pod: PodInfo, facts: &NodeFacts) -> Option<(Vec<String>, bool)> {
        check(&pod, &node(), facts).err().map(|r| (r.reasons, r.resolvable))
    }

    fn asking(cpu_millis: i64) -> PodInfo {
        PodInfo { requests: Resources { cpu_millis, ..Resources::default() }, ..PodInfo::default() }
    }

    fn reason(text: &str, resolvable: bool) -> Option<(Vec<String>, bool)> {
        Some((vec![text.to_owned()], resolvable))
    }

    #[test]
    fn resources_must_fit() {
        assert_eq!(refused(asking(400), &facts()), None);
        assert_eq!(refused(asking(401), &facts()), reason("Insufficient cpu", true));
        assert_eq!(refused(asking(1001), &facts()), reason("Insufficient cpu", false));
        let full = NodeFacts { max_pods: 1, ..facts() };
        assert_eq!(refused(asking(0), &full), reason("Too many pods", true));
        let mut gpu = asking(0);
        gpu.requests.others.insert("example.com/gpu".into(), 1);
        assert_eq!(refused(gpu, &facts()), reason("Insufficient example.com/gpu", false));
    }

    #[test]
    fn a_cordoned_node_takes_only_what_tolerates_it() {
        let cordoned = NodeFacts { unschedulable: true, ..facts() };
        assert_eq!(refused(asking(0), &cordoned), reason("node(s) were unschedulable", false));
        let toleration = Toleration {
            key: Some(UNSCHEDULABLE_TAINT.into()),
            operator: Some("Exists".into()),
            ..Toleration::default()
        };
        assert_eq!(refused(PodInfo { tolerations: vec![toleration], ..asking(0) }, &cordoned), None);
    }

    #[test]
    fn ports_conflict_by_protocol_number_and_address() {
        let with = |protocol: &str, ip: &str, port| {
            let port = HostPort { protocol: protocol.into(), ip: ip.into(), port };
            refused(PodInfo { ports: vec![port], ..PodInfo::default() }, &facts()).is_some()
        };
        assert!(with("TCP", "10.0.0.1", 80));
        assert!(with("TCP", "", 80));
        assert!(!with("TCP", "10.0.0.2", 80));
        assert!(!with("UDP", "10.0.0.1", 80));
        assert!(!with("TCP", "10.0.0.1", 81));
    }

    #[test]
    fn tolerations_cover_taints() {
        let taint =
            Taint { key: "k".into(), value: Some("5".into()), effect: "NoSchedule".into(), time_added: None };
        let rows = [
            (Some("k"), Some("Equal"), Some("5"), None, true),
            (Some("k"), None, Some("5"), Some("NoSchedule"), true),
            (Some("k"), Some("Equal"), Some("6"), None, false),
            (Some("k"), Some("Exists"), None, Some("NoExecute"), false),
            (None, Some("Exists"), None, None, true),
            (Some("other"), Some("Exists"), None, None, false),
            (Some("k"), Some("Gt"), Some("4"), None, true),
            (Some("k"), Some("Lt"), Some("4"), None, false),
        ];
        for (key, operator, value, effect, expected) in rows {
            let own = |s: Option<&str>| s.map(str::to_owned);
            let t = Toleration {
                key: own(key),
                operator: own(operator),
                value: own(value),
                effect: own(effect),
                toleration_seconds: None,
            };
            assert_eq!(tolerated(&[t], &taint), expected, "{key:?} {operator:?} {value:?} {effect:?}");
        }
    }

    #[test]
    fn node_affinity_ors_terms_and_ands_requirements() {
        let requirement = |key: &str, operator: &str, values: &[&str]| NodeSelectorRequirement {
            key: key.into(),
            operator: operator.into(),
            values: Some(values.iter().map(|v| (*v).to_owned()).collect()),
        };
        let rows = [
            (requirement("disk", "In", &["ssd"]), true),
            (requirement("disk", "NotIn", &["ssd"]), false),
            (requirement("gpu", "NotIn", &["x"]), true),
            (requirement("disk", "Exists", &[]), true),
            (requirement("disk", "DoesNotExist", &[]), false),
            (requirement("cores", "Gt", &["4"]), true),
            (requirement("cores", "Lt", &["8"]), false),
        ];
        for (requirement, expected) in rows {
            let term = |r| NodeSelectorTerm { match_expressions: Some(vec![r]), match_fields: None };
            let never = NodeSelectorTerm::default();
            let affinity = NodeAffinity {
                required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                    node_selector_terms: vec![never, term(requirement.clone())],
                }),
                ..NodeAffinity::default()
            };
            let pod = PodInfo { node_affinity: Some(affinity), ..asking(0) };
            assert_eq!(refused(pod, &facts()).is_none(), expected, "{requirement:?}");
        }
    }
}
