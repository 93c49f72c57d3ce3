//! What NetworkPolicies say of a connection at the edges of its two pods, and which of them select the pod.

use std::net::IpAddr;

use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt as _;
use weft_agent_dataplane::observe::path::{Path, Way};
use weft_agent_dataplane::observe::wire::{BackendKeyed, Request};
use weft_agent_dataplane::why::policy::{PolicyQuery, PolicyVerdict, PolicyWay};

use super::Why;
use super::ends::Source;
use super::legs::{Destination, Sender};
use super::report::Step;
use crate::net::reach::NodeHandle;

/// A pod at whose edge is asked.
struct AtEdge<'a> {
    node: &'a NodeHandle,
    /// Namespace and name.
    pod: String,
    uid: String,
}

impl Why<'_> {
    /// Whether the client's pod may send there. The pod's own node it always may.
    pub(super) async fn may_leave(
        &mut self,
        sender: Sender<'_>,
        there: &Path,
        to: &Destination,
    ) -> anyhow::Result<bool> {
        let Source::Pod(pod) = &self.source else { return Ok(true) };
        let Some(uid) = pod.uid().filter(|_| !pod.host_network() && there.way != Way::Local) else {
            return Ok(true);
        };
        let edge = AtEdge { node: sender.node, pod: pod.name(), uid };
        self.at_edge(edge, PolicyWay::Egress, to.key.address, to.key).await
    }

    /// Whether the destination's pod takes it. What its own node sends it always takes.
    pub(super) async fn may_enter(
        &mut self,
        sender: Sender<'_>,
        receiver: &NodeHandle,
        there: &Path,
        to: &Destination,
    ) -> anyhow::Result<bool> {
        let Some((pod, Some(uid))) = to.pod.clone().filter(|_| !to.host_network) else { return Ok(true) };
        let same = receiver.name == sender.node.name;
        let peer = match &self.source {
            Source::Pod(client) if !client.host_network() => client.address(),
            Source::Pod(_) | Source::Node { .. } if same => None,
            Source::Pod(_) | Source::Node { .. } => there.source,
            // Where the packet is translated on the pod's own node, the flow knows the client.
            Source::Outside(address) if same => Some(*address),
            Source::Outside(_) => sender.address.or(there.source),
        };
        let Some(peer) = peer.filter(|peer| *peer != to.key.address) else { return Ok(true) };
        self.at_edge(AtEdge { node: receiver, pod, uid }, PolicyWay::Ingress, peer, to.key).await
    }

    async fn at_edge(
        &mut self,
        edge: AtEdge<'_>,
        way: PolicyWay,
        peer: IpAddr,
        to: BackendKeyed,
    ) -> anyhow::Result<bool> {
        let query = PolicyQuery { pod_uid: edge.uid, way, peer, port: to.port, protocol: to.protocol };
        let verdict: PolicyVerdict = edge.node.ask(&Request::Policy(query))?;
        let (kind, toward) = match way {
            PolicyWay::Egress => ("egress", format!("to {to}/{}", to.protocol)),
            PolicyWay::Ingress => ("ingress", format!("from {peer} to port {}/{}", to.port, to.protocol)),
        };
        let pod = &edge.pod;
        let step = match verdict {
            PolicyVerdict::Free | PolicyVerdict::Unknown => return Ok(true),
            PolicyVerdict::Allowed => {
                Step::ok("policy", format!("{kind} of pod {pod} is restricted, and allowed {toward}"))
            }
            PolicyVerdict::Denied => {
                Step::fail("policy", format!("no NetworkPolicy allows {kind} of pod {pod} {toward}"))
            }
        };
        let names = self.policies_of(pod, way).await?;
        let object = (!names.is_empty()).then(|| format!("NetworkPolicy {}", names.join(", ")));
        self.report.push(step.on(&edge.node.name).by(object));
        Ok(verdict == PolicyVerdict::Allowed)
    }

    /// The policies that restrict a pod one way.
    async fn policies_of(&self, pod: &str, way: PolicyWay) -> anyhow::Result<Vec<String>> {
        let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
        let mut names = Vec::new();
        for policy in self.reach.policies(namespace).await? {
            if !restricts(&policy, way) {
                continue;
            }
            let spec = policy.spec.clone().unwrap_or_default();
            let selected = self.reach.pods(Some(namespace), &labels(spec.pod_selector.as_ref())).await?;
            if selected.iter().any(|pod| pod.name_any() == name) {
                names.push(format!("{namespace}/{}", policy.name_any()));
            }
        }
        Ok(names)
    }
}

/// Annotation of a policy that only counts what it would drop.
const DRY_RUN: &str = "weft.dev/dry-run";

/// Without policyTypes, ingress always, and egress if there are rules for it (networking/v1 NetworkPolicySpec).
fn restricts(policy: &NetworkPolicy, way: PolicyWay) -> bool {
    let Some(spec) = &policy.spec else { return false };
    if policy.annotations().get(DRY_RUN).is_some_and(|value| value == "true") {
        return false;
    }
    let name = match way {
        PolicyWay::Egress => "Egress",
        PolicyWay::Ingress => "Ingress",
    };
    match &spec.policy_types {
        Some(types) => types.iter().any(|kind| kind == name),
        None => way == PolicyWay::Ingress || spec.egress.is_some(),
    }
}

/// A selector as a list request takes it; an empty one selects all.
fn labels(selector: Option<&LabelSelector>) -> String {
    let Some(selector) = selector else { return String::new() };
    let equal = selector.match_labels.iter().flatten().map(|(key, value)| format!("{key}={value}"));
    let expressions = selector.match_expressions.iter().flatten().map(|expression| {
        let (key, values) =
            (&expression.key, expression.values.iter().flatten().cloned().collect::<Vec<_>>());
        match expression.operator.as_str() {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.clone(),
        }
    });
    equal.chain(expressions).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_and_types_are_read_as_upstream_reads_them() {
        let selector: LabelSelector = serde_json::from_value(json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["a", "b"]},
                {"key": "old", "operator": "DoesNotExist"},
            ],
        }))
        .unwrap();
        assert_eq!(labels(Some(&selector)), "app=web,tier in (a,b),!old");
        assert_eq!(labels(Some(&LabelSelector::default())), "");

        let policy = |spec: serde_json::Value| -> NetworkPolicy {
            serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
        };
        let plain = policy(json!({"podSelector": {}}));
        assert!(restricts(&plain, PolicyWay::Ingress) && !restricts(&plain, PolicyWay::Egress));
        let egress = policy(json!({"podSelector": {}, "policyTypes": ["Egress"]}));
        assert!(!restricts(&egress, PolicyWay::Ingress) && restricts(&egress, PolicyWay::Egress));
    }
}
