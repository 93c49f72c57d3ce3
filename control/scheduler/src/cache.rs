//! Owns the state that decisions are made on: nodes with what their pods take, kept up to date by the size of each
//! change; pods that were just placed count at once (they are *assumed*) until the API confirms or refuses.

use crate::pod::{HostPort, PodInfo};
use crate::resources::Resources;
use k8s_openapi::api::core::v1::{Node, Taint};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use weft_control_api::quantity::Quantity;

/// The parts of a node that decisions read.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct NodeFacts {
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) taints: Vec<Taint>,
    pub(crate) unschedulable: bool,
    pub(crate) allocatable: Resources,
    pub(crate) max_pods: usize,
}

impl NodeFacts {
    pub(crate) fn new(node: &Node) -> Self {
        let spec = node.spec.clone().unwrap_or_default();
        let allocatable = node.status.as_ref().and_then(|s| s.allocatable.as_ref());
        let pods = allocatable.and_then(|a| a.get("pods")).and_then(|q| q.0.parse::<Quantity>().ok());
        Self {
            labels: node.metadata.labels.clone().unwrap_or_default(),
            taints: spec.taints.unwrap_or_default(),
            unschedulable: spec.unschedulable.unwrap_or(false),
            allocatable: Resources::read(allocatable),
            max_pods: pods.and_then(|q| usize::try_from(q.units()).ok()).unwrap_or(0),
        }
    }
}

/// A node and what is on it.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeInfo {
    pub(crate) name: String,
    /// `None` for a node that pods name but the API doesn't know (yet).
    pub(crate) facts: Option<NodeFacts>,
    pub(crate) requested: Resources,
    pub(crate) scored: Resources,
    pub(crate) pods: HashMap<String, Arc<PodInfo>>,
    pub(crate) ports: Vec<HostPort>,
    /// How many pods of each controller are here.
    pub(crate) owners: HashMap<String, u32>,
}

impl NodeInfo {
    pub(crate) fn add(&mut self, pod: Arc<PodInfo>) {
        self.requested.add(&pod.requests);
        self.scored.add(&pod.scored);
        self.ports.extend(pod.ports.iter().cloned());
        if let Some(owner) = &pod.owner {
            *self.owners.entry(owner.clone()).or_default() += 1;
        }
        self.pods.insert(pod.uid.clone(), pod);
    }

    fn remove(&mut self, uid: &str) {
        let Some(pod) = self.pods.remove(uid) else { return };
        self.requested.subtract(&pod.requests);
        self.scored.subtract(&pod.scored);
        for port in &pod.ports {
            if let Some(at) = self.ports.iter().position(|p| p == port) {
                self.ports.swap_remove(at);
            }
        }
        if let Some(owner) = &pod.owner
            && let Some(count) = self.owners.get_mut(owner)
        {
            *count -= 1;
            if *count == 0 {
                self.owners.remove(owner);
            }
        }
    }
}

/// Nodes and the pods on them.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    nodes: BTreeMap<String, NodeInfo>,
    /// The node of each pod, by uid.
    placed: HashMap<String, String>,
}

impl Cache {
    /// The nodes that the API knows.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = (&NodeInfo, &NodeFacts)> {
        self.nodes.values().filter_map(|node| Some((node, node.facts.as_ref()?)))
    }

    /// Takes a node over. True if something changed that may make room for a pod.
    pub(crate) fn set_node(&mut self, name: &str, facts: NodeFacts) -> bool {
        let node = self.node(name);
        let changed = node.facts.as_ref() != Some(&facts);
        node.facts = Some(facts);
        changed
    }

    /// Forgets a node; its pods stay counted until they are gone too.
    pub(crate) fn remove_node(&mut self, name: &str) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.facts = None;
            if node.pods.is_empty() {
                self.nodes.remove(name);
            }
        }
    }

    /// Counts a pod on its node (`pod.node`), in place of what was known of it.
    pub(crate) fn place(&mut self, pod: Arc<PodInfo>) {
        self.remove_pod(&pod.uid);
        self.placed.insert(pod.uid.clone(), pod.node.clone());
        let name = pod.node.clone();
        self.node(&name).add(pod);
    }

    /// Forgets a pod. True if it was on a node.
    pub(crate) fn remove_pod(&mut self, uid: &str) -> bool {
        let Some(name) = self.placed.remove(uid) else { return false };
        if let Some(node) = self.nodes.get_mut(&name) {
            node.remove(uid);
            if node.pods.is_empty() && node.facts.is_none() {
                self.nodes.remove(&name);
            }
        }
        true
    }

    /// The uids of all placed pods.
    pub(crate) fn placed(&self) -> impl Iterator<Item = &String> {
        self.placed.keys()
    }

    fn node(&mut self, name: &str) -> &mut NodeInfo {
        self.nodes
            .entry(name.to_owned())
            .or_insert_with(|| NodeInfo { name: name.to_owned(), ..NodeInfo::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, node: &str, cpu_millis: i64) -> Arc<PodInfo> {
        let port = HostPort { protocol: "TCP".into(), ip: String::new(), port: 80 };
        Arc::new(PodInfo {
            uid: uid.into(),
            node: node.into(),
            owner: Some("rs".into()),
            ports: vec![port],
            requests: Resources { cpu_millis, ..Resources::default() },
            ..PodInfo::default()
        })
    }

    #[test]
    fn what_is_placed_is_counted_once_and_leaves_nothing_behind() {
        let mut cache = Cache::default();
        cache.set_node("n1", NodeFacts::default());
        cache.place(pod("a", "n1", 100));
        cache.place(pod("a", "n1", 100));
        cache.place(pod("b", "n1", 50));
        let (node, _) = cache.nodes().next().unwrap();
        assert_eq!((node.requested.cpu_millis, node.ports.len(), node.owners["rs"]), (150, 2, 2));
        assert!(cache.remove_pod("a"));
        assert!(!cache.remove_pod("a"));
        assert!(cache.remove_pod("b"));
        let (node, _) = cache.nodes().next().unwrap();
        assert_eq!((node.requested.cpu_millis, node.ports.len(), node.owners.len()), (0, 0, 0));
    }

    #[test]
    fn a_node_unknown_to_the_api_takes_no_part_but_keeps_its_pods() {
        let mut cache = Cache::default();
        cache.place(pod("a", "late", 100));
        assert_eq!(cache.nodes().count(), 0);
        cache.set_node("late", NodeFacts::default());
        assert_eq!(cache.nodes().next().unwrap().0.requested.cpu_millis, 100);
        cache.remove_node("late");
        assert_eq!(cache.nodes().count(), 0);
        cache.remove_pod("a");
        assert!(cache.nodes.is_empty());
    }
}
