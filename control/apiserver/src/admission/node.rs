//! Owns what a kubelet may write (NodeRestriction), and the taint of a new node.

use super::{Operation, Review};
use serde_json::{Value, json};
use weft_control_api::status::Status;

const NOT_READY: &str = "node.kubernetes.io/not-ready";
/// Labels by which pods are kept off nodes; a node can't give them to itself.
const RESTRICTED: &str = "node-restriction.kubernetes.io";
/// Labels below `kubernetes.io` and `k8s.io` that a node may set about itself.
const OWN_LABELS: [&str; 10] = [
    "kubernetes.io/hostname",
    "kubernetes.io/arch",
    "kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "beta.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/zone",
];
const OWN_PREFIXES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

/// A node takes no pods before its controller has seen it ready.
pub(super) fn taint_new(node: &mut Value) {
    let taint = json!({"key": NOT_READY, "effect": "NoSchedule"});
    match node["spec"]["taints"].as_array_mut() {
        Some(taints) if taints.iter().any(|t| t["key"] == NOT_READY && t["effect"] == "NoSchedule") => {}
        Some(taints) => taints.push(taint),
        None => node["spec"]["taints"] = json!([taint]),
    }
}

/// Refuses what a kubelet may not write.
pub(super) fn restrict(
    review: &Review<'_>,
    object: Option<&Value>,
    old: Option<&Value>,
) -> Result<(), Status> {
    let Some(node) = review.user.as_node() else { return Ok(()) };
    match (review.kind.group, review.kind.kind) {
        ("", "Pod") => pod(review, node, object, old),
        ("", "Node") => own_node(review, node, object, old),
        ("coordination.k8s.io", "Lease") if review.namespace != "kube-node-lease" => {
            Err(review.forbidden("can only access leases in the \"kube-node-lease\" system namespace"))
        }
        ("coordination.k8s.io", "Lease") if review.name != node => {
            Err(review.forbidden("can only access node lease with the same name as the requesting node"))
        }
        _ => Ok(()),
    }
}

fn pod(review: &Review<'_>, node: &str, object: Option<&Value>, old: Option<&Value>) -> Result<(), Status> {
    let on_node = |pod: Option<&Value>| pod.is_some_and(|pod| pod["spec"]["nodeName"] == node);
    match review.operation {
        Operation::Create if review.subresource.is_empty() => {
            let mirror = object
                .is_some_and(|pod| pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_string());
            if !mirror {
                return Err(review.forbidden(&format!(
                    "pod does not have \"kubernetes.io/config.mirror\" annotation, node \"{node}\" can only create mirror pods"
                )));
            }
            if !on_node(object) {
                return Err(review.forbidden(&format!(
                    "node \"{node}\" can only create pods with spec.nodeName set to itself"
                )));
            }
            Ok(())
        }
        Operation::Create => Ok(()),
        Operation::Delete if !on_node(old) => Err(review
            .forbidden(&format!("node \"{node}\" can only delete pods with spec.nodeName set to itself"))),
        Operation::Update if review.subresource != "status" => {
            Err(review.forbidden(&format!("unexpected update of a pod by node \"{node}\"")))
        }
        Operation::Update if !on_node(old) => Err(review.forbidden(&format!(
            "node \"{node}\" can only update pod status for pods with spec.nodeName set to itself"
        ))),
        Operation::Update | Operation::Delete => Ok(()),
    }
}

fn own_node(
    review: &Review<'_>,
    node: &str,
    object: Option<&Value>,
    old: Option<&Value>,
) -> Result<(), Status> {
    if review.name != node {
        return Err(
            review.forbidden(&format!("node \"{node}\" is not allowed to modify node \"{}\"", review.name))
        );
    }
    if review.operation == Operation::Delete {
        return Err(review.forbidden(&format!("node \"{node}\" is not allowed to delete itself")));
    }
    let Some(object) = object else { return Ok(()) };
    if let Some(old) = old
        && review.subresource.is_empty()
        && object["spec"]["taints"] != old["spec"]["taints"]
    {
        return Err(review.forbidden(&format!("node \"{node}\" is not allowed to modify taints")));
    }
    let null = Value::Null;
    let before = old.map_or(&null, |old| &old["metadata"]["labels"]);
    let changed: Vec<&str> = object["metadata"]["labels"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| before[key.as_str()] != **value && !may_label(key))
        .map(|(key, _)| key.as_str())
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    let verb = if old.is_some() { "modify" } else { "set" };
    Err(review.forbidden(&format!("is not allowed to {verb} the following labels: {}", changed.join(", "))))
}

fn may_label(key: &str) -> bool {
    let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
    let within = |domain: &str| namespace == domain || namespace.ends_with(&format!(".{domain}"));
    if within(RESTRICTED) {
        return false;
    }
    !(within("kubernetes.io") || within("k8s.io"))
        || OWN_LABELS.contains(&key)
        || OWN_PREFIXES.iter().any(|prefix| within(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        assert!(may_label("kubernetes.io/hostname") && may_label("example.com/a") && may_label("a"));
        assert!(may_label("node.kubernetes.io/x"));
        assert!(
            !may_label("node-restriction.kubernetes.io/a")
                && !may_label("node-role.kubernetes.io/control-plane")
        );
    }

    #[test]
    fn a_new_node_is_tainted_once() {
        let mut node = json!({"spec": {}});
        taint_new(&mut node);
        taint_new(&mut node);
        assert_eq!(node["spec"]["taints"].as_array().unwrap().len(), 1);
    }
}
