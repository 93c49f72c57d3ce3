//! Owns what a kubelet may do: its own node, lease and pods, and what those pods refer to.

use super::rbac::Rule;
use super::{Attributes, Decision, rules_of};
use crate::bootstrap::policy;
use crate::cache::{Cache, in_namespace};
use serde_json::Value;
use std::sync::Arc;

/// The node authorizer.
pub(crate) struct NodeAuthorizer {
    cache: Arc<Cache>,
    rules: Vec<Rule>,
}

fn allow() -> Decision {
    Decision::Allow(String::new())
}

fn deny(reason: impl Into<String>) -> Decision {
    Decision::Deny(reason.into())
}

impl NodeAuthorizer {
    /// An authorizer over the cache's pods.
    pub(crate) fn new(cache: Arc<Cache>) -> Self {
        let rules = policy::node_rules();
        Self { cache, rules: rules_of(&serde_json::json!({ "rules": rules })) }
    }

    /// What the node may do.
    pub(crate) fn authorize(&self, node: &str, what: &Attributes) -> Decision {
        if !what.is_resource {
            return deny("");
        }
        match (what.group.as_str(), what.resource.as_str()) {
            ("", "secrets" | "configmaps" | "persistentvolumeclaims" | "persistentvolumes")
                if what.subresource.is_empty() =>
            {
                self.read_referenced(node, what)
            }
            ("", "serviceaccounts") => self.token(node, what),
            ("", "nodes") => self.own_node(node, what),
            ("", "pods") => self.own_pods(node, what),
            ("coordination.k8s.io", "leases") => self.own_lease(node, what),
            ("storage.k8s.io", "csinodes") => {
                if what.verb == "create" || what.name == node {
                    self.by_rules(what)
                } else {
                    deny("can only access CSINode with the same name as the requesting node")
                }
            }
            _ => self.by_rules(what),
        }
    }

    fn by_rules(&self, what: &Attributes) -> Decision {
        if self.rules.iter().any(|rule| rule.allows(what)) { allow() } else { deny("") }
    }

    fn read_referenced(&self, node: &str, what: &Attributes) -> Decision {
        if !matches!(what.verb.as_str(), "get" | "list" | "watch") {
            return deny("can only read resources of this type");
        }
        if what.name.is_empty() {
            return deny("No Object name found");
        }
        if self.pods_refer(node, what) {
            allow()
        } else {
            deny(format!("no relationship found between node '{node}' and this object"))
        }
    }

    fn pods_refer(&self, node: &str, what: &Attributes) -> bool {
        let Some(pods) = self.cache.resources().by_plural("", "pods") else { return false };
        let snapshot = self.cache.snapshot(pods.id);
        in_namespace(&snapshot.objects, &what.namespace, None)
            .filter(|item| item.field("spec.nodeName") == Some(node))
            .any(|item| refers(&item.parse()["spec"], &what.resource, &what.name))
    }

    fn token(&self, node: &str, what: &Attributes) -> Decision {
        if what.subresource.is_empty() && matches!(what.verb.as_str(), "get" | "list" | "watch") {
            return self.read_referenced(node, what);
        }
        if what.verb != "create" || what.subresource != "token" {
            return deny("can only get, list or watch service accounts, and create tokens for them");
        }
        if self.pods_refer(node, what) {
            allow()
        } else {
            deny(format!("no relationship found between node '{node}' and this object"))
        }
    }

    fn own_node(&self, node: &str, what: &Attributes) -> Decision {
        match what.verb.as_str() {
            "create" => self.by_rules(what),
            _ if what.name == node => self.by_rules(what),
            "get" | "list" | "watch" => {
                deny(format!("node '{node}' cannot read all nodes, only its own Node object"))
            }
            _ => deny(format!("node '{node}' can only change its own Node object")),
        }
    }

    fn own_pods(&self, node: &str, what: &Attributes) -> Decision {
        let Some(pods) = self.cache.resources().by_plural("", "pods") else { return deny("") };
        match what.verb.as_str() {
            "list" | "watch" => {
                let wanted = [format!("spec.nodeName={node}"), format!("spec.nodeName=={node}")];
                if what.field_selector.split(',').any(|term| wanted.iter().any(|w| w == term)) {
                    allow()
                } else {
                    deny("can only list/watch pods with spec.nodeName field selector")
                }
            }
            "get" => {
                let item = self.cache.get(pods.id, &format!("{}/{}", what.namespace, what.name));
                if item.is_some_and(|item| item.field("spec.nodeName") == Some(node)) {
                    allow()
                } else {
                    deny(format!("no relationship found between node '{node}' and this object"))
                }
            }
            // NodeRestriction looks at the object itself.
            _ => self.by_rules(what),
        }
    }

    fn own_lease(&self, node: &str, what: &Attributes) -> Decision {
        if what.namespace != "kube-node-lease" {
            return deny("can only access leases in the \"kube-node-lease\" system namespace");
        }
        if what.verb != "create" && what.name != node {
            return deny("can only access node lease with the same name as the requesting node");
        }
        self.by_rules(what)
    }
}

/// Whether a pod refers to an object of its namespace (or to a volume).
fn refers(spec: &Value, resource: &str, name: &str) -> bool {
    match resource {
        "serviceaccounts" => spec["serviceAccountName"] == name,
        "secrets" => names_secret(spec, name),
        "configmaps" => names_config_map(spec, name),
        "persistentvolumeclaims" => {
            volumes(spec).any(|volume| volume["persistentVolumeClaim"]["claimName"] == name)
        }
        _ => false,
    }
}

fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn volumes(spec: &Value) -> impl Iterator<Item = &Value> {
    each(&spec["volumes"])
}

fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    ["containers", "initContainers", "ephemeralContainers"].into_iter().flat_map(|key| each(&spec[key]))
}

fn names_secret(spec: &Value, name: &str) -> bool {
    let in_volumes = volumes(spec).any(|volume| {
        volume["secret"]["secretName"] == name
            || each(&volume["projected"]["sources"]).any(|source| source["secret"]["name"] == name)
    });
    let in_env = containers(spec).any(|container| {
        each(&container["env"]).any(|env| env["valueFrom"]["secretKeyRef"]["name"] == name)
            || each(&container["envFrom"]).any(|env| env["secretRef"]["name"] == name)
    });
    in_volumes || in_env || each(&spec["imagePullSecrets"]).any(|secret| secret["name"] == name)
}

fn names_config_map(spec: &Value, name: &str) -> bool {
    let in_volumes = volumes(spec).any(|volume| {
        volume["configMap"]["name"] == name
            || each(&volume["projected"]["sources"]).any(|source| source["configMap"]["name"] == name)
    });
    let in_env = containers(spec).any(|container| {
        each(&container["env"]).any(|env| env["valueFrom"]["configMapKeyRef"]["name"] == name)
            || each(&container["envFrom"]).any(|env| env["configMapRef"]["name"] == name)
    });
    in_volumes || in_env
}
