//! The node's own check before it takes a pod: resources, ports, node selector. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Pod;

use crate::pod;
use crate::resources;

/// Why a pod is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rejection {
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// What the node has to give: `cpu` in thousandths, the others in units; and its labels.
#[derive(Clone, Debug, Default)]
pub(crate) struct Allocatable {
    pub(crate) resources: BTreeMap<String, i64>,
    pub(crate) labels: BTreeMap<String, String>,
}

/// Whether `pod` fits beside the pods `others`, which have been taken before it.
pub(crate) fn admit<'a>(
    pod: &Pod,
    others: impl Iterator<Item = &'a Pod> + Clone,
    node: &Allocatable,
) -> Result<(), Rejection> {
    selector(pod, node)?;
    ports(pod, others.clone())?;
    fits(pod, others, node)
}

fn selector(pod: &Pod, node: &Allocatable) -> Result<(), Rejection> {
    let wanted = pod::spec(pod).node_selector.iter().flatten();
    if wanted.into_iter().all(|(key, value)| node.labels.get(key) == Some(value)) {
        return Ok(());
    }
    Err(Rejection {
        reason: "NodeAffinity".into(),
        message: "Pod was rejected: Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"
            .into(),
    })
}

fn host_ports(pod: &Pod) -> BTreeSet<(String, i32, String)> {
    let host_network = pod::host_network(pod);
    let ports = pod::all_containers(pod).flat_map(|(c, _)| c.ports.iter().flatten());
    ports
        .filter_map(|p| {
            let port = p.host_port.or(host_network.then_some(p.container_port)).filter(|port| *port > 0)?;
            let ip = p.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".into());
            Some((p.protocol.clone().unwrap_or_else(|| "TCP".into()), port, ip))
        })
        .collect()
}

fn ports<'a>(pod: &Pod, others: impl Iterator<Item = &'a Pod>) -> Result<(), Rejection> {
    let wanted = host_ports(pod);
    if wanted.is_empty() {
        return Ok(());
    }
    let clash = |a: &(String, i32, String), b: &(String, i32, String)| {
        a.0 == b.0 && a.1 == b.1 && (a.2 == b.2 || a.2 == "0.0.0.0" || b.2 == "0.0.0.0")
    };
    let taken: BTreeSet<_> = others.flat_map(host_ports).collect();
    if wanted.iter().any(|w| taken.iter().any(|t| clash(w, t))) {
        return Err(Rejection {
            reason: "NodePorts".into(),
            message: "Pod was rejected: Predicate NodePorts failed: \
                      node(s) didn't have free ports for the requested pod ports"
                .into(),
        });
    }
    Ok(())
}

fn fits<'a>(pod: &Pod, others: impl Iterator<Item = &'a Pod>, node: &Allocatable) -> Result<(), Rejection> {
    let mut used: BTreeMap<String, i64> = BTreeMap::new();
    for other in others {
        for (name, value) in resources::requests(other) {
            *used.entry(name).or_default() += value;
        }
        *used.entry("pods".into()).or_default() += 1;
    }
    let mut wanted = resources::requests(pod);
    wanted.insert("pods".into(), 1);
    for (name, requested) in wanted.into_iter().filter(|(_, value)| *value > 0) {
        let capacity = node.resources.get(&name).copied().unwrap_or(0);
        let used = used.get(&name).copied().unwrap_or(0);
        if used + requested > capacity {
            return Err(Rejection {
                reason: format!("OutOf{name}"),
                message: format!(
                    "Pod was rejected: Node didn't have enough resource: {name}, requested: {requested}, \
                     used: {used}, capacity: {capacity}"
                ),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(cpu: &str, host_port: i32) -> Pod {
        serde_json::from_value(json!({"spec": {"containers": [{"name": "a",
            "resources": {"requests": {"cpu": cpu}},
            "ports": [{"containerPort": 80, "hostPort": host_port}]}]}}))
        .unwrap()
    }

    fn node() -> Allocatable {
        Allocatable {
            resources: BTreeMap::from([("cpu".into(), 1000), ("pods".into(), 2)]),
            labels: BTreeMap::from([("disk".into(), "ssd".into())]),
        }
    }

    #[test]
    fn refuses_what_does_not_fit_with_upstreams_words() {
        let other = [pod("600m", 81)];
        let refused = admit(&pod("500m", 80), other.iter(), &node()).unwrap_err();
        assert_eq!(refused.reason, "OutOfcpu");
        assert_eq!(
            refused.message,
            "Pod was rejected: Node didn't have enough resource: cpu, requested: 500, used: 600, capacity: 1000"
        );
        assert_eq!(admit(&pod("400m", 80), other.iter(), &node()), Ok(()));
        let two = [pod("1m", 81), pod("1m", 82)];
        assert_eq!(admit(&pod("1m", 80), two.iter(), &node()).unwrap_err().reason, "OutOfpods");
    }

    #[test]
    fn refuses_taken_ports_and_foreign_selectors() {
        let other = [pod("1m", 80)];
        assert_eq!(admit(&pod("1m", 80), other.iter(), &node()).unwrap_err().reason, "NodePorts");
        let mut choosy = pod("1m", 83);
        choosy.spec.as_mut().unwrap().node_selector = Some(BTreeMap::from([("disk".into(), "hdd".into())]));
        assert_eq!(admit(&choosy, other.iter(), &node()).unwrap_err().reason, "NodeAffinity");
    }
}
