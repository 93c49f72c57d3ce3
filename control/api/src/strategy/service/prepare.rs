//! What a Service keeps and loses when it is written.

use serde_json::{Value, json};

use super::super::value::{at, copy, each, is_empty, items, remove, text};

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
    let needs_address = |service: &Value| text(&service["spec"]["type"]) != "ExternalName";
    if !needs_address(new) || !needs_address(old) {
        return create(new);
    }
    let old = &old["spec"];
    let Some(spec) = at(new, &["spec"]) else { return };
    let unset = |spec: &Value, field: &str| is_empty(&spec[field]);
    if unset(spec, "clusterIP") && unset(spec, "clusterIPs") {
        copy(spec, old, "clusterIP");
        copy(spec, old, "clusterIPs");
    } else if spec["clusterIP"] == old["clusterIP"] && unset(spec, "clusterIPs") {
        copy(spec, old, "clusterIPs");
    } else if unset(spec, "clusterIPs") {
        let address = spec["clusterIP"].clone();
        spec["clusterIPs"] = json!([address]);
    } else if unset(spec, "clusterIP") {
        spec["clusterIP"] = spec["clusterIPs"][0].clone();
    }
    for field in ["ipFamilies", "ipFamilyPolicy"] {
        if unset(spec, field) {
            copy(spec, old, field);
        }
    }
    keep_node_ports(spec, old);
}

fn has_cluster_ip(spec: &Value) -> bool {
    text(&spec["type"]) != "ExternalName"
}

fn has_node_ports(spec: &Value) -> bool {
    let balancer = text(&spec["type"]) == "LoadBalancer" && spec["allocateLoadBalancerNodePorts"] != false;
    text(&spec["type"]) == "NodePort" || balancer
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

const TYPE_DEPENDENT: [(Needs, &[&str]); 5] = [
    (has_cluster_ip, &["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"]),
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
    let node_ports = |spec: &Value| -> Vec<Value> {
        let ports = items(&spec["ports"]).iter().map(|port| port["nodePort"].clone());
        ports.filter(|port| !port.is_null()).collect()
    };
    if has_node_ports(old) && !has_node_ports(spec) && node_ports(spec) == node_ports(old) {
        for port in each(spec, "ports") {
            remove(port, "nodePort");
        }
    }
}

fn keep_node_ports(spec: &mut Value, old: &Value) {
    if !has_node_ports(spec) || !has_node_ports(old) {
        return;
    }
    if spec["healthCheckNodePort"].is_null() && spec["externalTrafficPolicy"] == "Local" {
        copy(spec, old, "healthCheckNodePort");
    }
    let taken: Vec<Value> = items(&spec["ports"]).iter().map(|port| port["nodePort"].clone()).collect();
    for port in each(spec, "ports").filter(|port| port["nodePort"].as_i64().unwrap_or_default() == 0) {
        let same_port = |one: &&Value| {
            one["port"] == port["port"]
                && one["protocol"] == port["protocol"]
                && !taken.contains(&one["nodePort"])
        };
        if let Some(found) = items(&old["ports"]).iter().find(same_port) {
            copy(port, found, "nodePort");
        }
    }
}
