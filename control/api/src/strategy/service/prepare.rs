//! What a Service keeps and loses when it is written.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::super::value::{at, copy, each, is_empty, items, number, remove, text};

/// Clients of before dual stack say `clusterIP` only.
pub(in super::super) fn create(service: &mut Value) {
    let Some(spec) = at(service, &["spec"]) else { return };
    if text(&spec["type"]) == "ExternalName" {
        return;
    }
    let address = spec["clusterIP"].clone();
    if !text(&address).is_empty() && is_empty(&spec["clusterIPs"]) {
        spec["clusterIPs"] = json!([address]);
    }
}

/// A Service keeps its addresses and ports where an update, from a manifest that never knew them, leaves them out.
pub(in super::super) fn update(new: &mut Value, old: &Value) {
    drop_what_the_type_lost(new, old);
    if new["spec"]["type"] != "LoadBalancer" && !is_empty(&new["status"]["loadBalancer"]) {
        new["status"]["loadBalancer"] = json!({});
    }
    let old = &old["spec"];
    let Some(spec) = at(new, &["spec"]) else { return };
    if has_cluster_ip(spec) && has_cluster_ip(old) {
        keep_addresses(spec, old);
    }
    if has_cluster_ip(spec) {
        follow_the_singular(spec, old);
    }
    keep_node_ports(spec, old);
}

fn keep_addresses(spec: &mut Value, old: &Value) {
    if is_empty(&spec["clusterIP"]) {
        copy(spec, old, "clusterIP");
    }
    if is_empty(&spec["clusterIPs"]) && spec["clusterIP"] == old["clusterIP"] {
        copy(spec, old, "clusterIPs");
    }
    for field in ["ipFamilies", "ipFamilyPolicy"] {
        if is_empty(&spec[field]) {
            copy(spec, old, field);
        }
    }
}

/// Who knows `clusterIP` alone changes that alone.
fn follow_the_singular(spec: &mut Value, old: &Value) {
    let same_plural = items(&spec["clusterIPs"]) == items(&old["clusterIPs"]);
    if text(&spec["clusterIP"]) == text(&old["clusterIP"]) || !same_plural {
        return;
    }
    if is_empty(&spec["clusterIP"]) {
        remove(spec, "clusterIPs");
    } else {
        spec["clusterIPs"] = json!([spec["clusterIP"]]);
    }
}

fn has_cluster_ip(spec: &Value) -> bool {
    text(&spec["type"]) != "ExternalName"
}

fn has_node_ports(spec: &Value) -> bool {
    matches!(text(&spec["type"]), "NodePort" | "LoadBalancer")
}

fn is_balancer(spec: &Value) -> bool {
    text(&spec["type"]) == "LoadBalancer"
}

fn is_external(spec: &Value) -> bool {
    matches!(text(&spec["type"]), "NodePort" | "LoadBalancer")
        || (text(&spec["type"]) == "ClusterIP" && !items(&spec["externalIPs"]).is_empty())
}

fn has_health_check(spec: &Value) -> bool {
    is_balancer(spec) && spec["externalTrafficPolicy"] == "Local"
}

/// Which Services have these fields.
type Needs = fn(&Value) -> bool;

const TYPE_DEPENDENT: [(Needs, &[&str]); 8] = [
    (has_cluster_ip, &["clusterIP", "clusterIPs"]),
    (has_cluster_ip, &["ipFamilies"]),
    (has_cluster_ip, &["ipFamilyPolicy"]),
    (has_cluster_ip, &["internalTrafficPolicy"]),
    (has_health_check, &["healthCheckNodePort"]),
    (is_balancer, &["allocateLoadBalancerNodePorts"]),
    (is_balancer, &["loadBalancerClass"]),
    (is_external, &["externalTrafficPolicy"]),
];

/// A new type may have no use for what the old one was given: it goes, unless the update changed it itself.
fn drop_what_the_type_lost(new: &mut Value, old: &Value) {
    let old = &old["spec"];
    let Some(spec) = at(new, &["spec"]) else { return };
    for (needs, fields) in TYPE_DEPENDENT {
        let unchanged = |field: &&str| spec[*field] == old[*field];
        if needs(old) && !needs(spec) && fields.iter().all(unchanged) {
            for field in fields {
                remove(spec, field);
            }
        }
    }
    if has_node_ports(old) && !has_node_ports(spec) && node_ports(spec).is_subset(&node_ports(old)) {
        for port in each(spec, "ports") {
            remove(port, "nodePort");
        }
    }
}

fn node_ports(spec: &Value) -> BTreeSet<i64> {
    items(&spec["ports"]).iter().map(|port| number(&port["nodePort"])).filter(|port| *port != 0).collect()
}

/// A port without a node port gets that of the old port of its name, unless another has it now.
fn keep_node_ports(spec: &mut Value, old: &Value) {
    if has_health_check(spec) && has_health_check(old) && number(&spec["healthCheckNodePort"]) == 0 {
        copy(spec, old, "healthCheckNodePort");
    }
    if !has_node_ports(spec) || !has_node_ports(old) {
        return;
    }
    // Somebody who switches node ports off means those that are left out to go.
    if spec["allocateLoadBalancerNodePorts"] == false && is_balancer(spec) {
        return;
    }
    let used: BTreeSet<i64> = node_ports(spec).intersection(&node_ports(old)).copied().collect();
    for port in each(spec, "ports").filter(|port| number(&port["nodePort"]) == 0) {
        let same_name = |one: &&Value| text(&one["name"]) == text(&port["name"]);
        let found = items(&old["ports"]).iter().find(same_name).map(|one| number(&one["nodePort"]));
        if let Some(found) = found.filter(|found| *found != 0 && !used.contains(found)) {
            port["nodePort"] = found.into();
        }
    }
}
