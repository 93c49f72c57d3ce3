//! Defaults of Services and what surrounds them.

use serde_json::{Value, json};

use super::super::value::{
    at, default_object, default_to, default_zero, each, is_empty, items, remove, text,
};

/// Three hours: how long a client stays with its endpoint under ClientIP affinity.
const AFFINITY_SECONDS: i64 = 10_800;

/// Applies the defaults of `kind`; does nothing for a kind of another family.
pub(in super::super) fn apply(group: &str, kind: &str, object: &mut Value) {
    match (group, kind) {
        ("", "Service") => service(object),
        ("", "Endpoints") => {
            for subset in each(object, "subsets") {
                each(subset, "ports").for_each(|port| default_zero(port, "protocol", "TCP"));
            }
        }
        ("discovery.k8s.io", "EndpointSlice") => {
            for port in each(object, "ports") {
                default_to(port, "name", "");
                default_to(port, "protocol", "TCP");
            }
        }
        ("networking.k8s.io", "NetworkPolicy") => network_policy(object),
        ("networking.k8s.io", "Ingress") => {
            if let Some(status) = default_object(object, "status") {
                default_object(status, "loadBalancer");
            }
        }
        ("networking.k8s.io", "IngressClass") => {
            if let Some(parameters) = at(object, &["spec", "parameters"]) {
                default_to(parameters, "scope", "Cluster");
            }
        }
        _ => {}
    }
}

fn service(object: &mut Value) {
    let Some(spec) = default_object(object, "spec") else { return };
    default_zero(spec, "type", "ClusterIP");
    default_zero(spec, "sessionAffinity", "None");
    match text(&spec["sessionAffinity"]) {
        "None" => {
            remove(spec, "sessionAffinityConfig");
        }
        "ClientIP" if spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].is_null() => {
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": AFFINITY_SECONDS}});
        }
        _ => {}
    }
    for port in each(spec, "ports") {
        default_zero(port, "protocol", "TCP");
        let number = port["port"].clone();
        default_zero(port, "targetPort", number);
    }
    let type_ = text(&spec["type"]).to_owned();
    let external = matches!(type_.as_str(), "NodePort" | "LoadBalancer");
    if external || (type_ == "ClusterIP" && !items(&spec["externalIPs"]).is_empty()) {
        default_zero(spec, "externalTrafficPolicy", "Cluster");
    }
    if external || type_ == "ClusterIP" {
        default_to(spec, "internalTrafficPolicy", "Cluster");
    }
    if type_ == "LoadBalancer" {
        default_to(spec, "allocateLoadBalancerNodePorts", true);
        if let Some(balancer) = at(object, &["status", "loadBalancer"]) {
            for ingress in each(balancer, "ingress").filter(|one| !text(&one["ip"]).is_empty()) {
                default_to(ingress, "ipMode", "VIP");
            }
        }
    }
    if let Some(status) = default_object(object, "status") {
        default_object(status, "loadBalancer");
    }
}

fn network_policy(object: &mut Value) {
    let Some(spec) = default_object(object, "spec") else { return };
    default_object(spec, "podSelector");
    for direction in ["ingress", "egress"] {
        for rule in each(spec, direction) {
            each(rule, "ports").for_each(|port| default_to(port, "protocol", "TCP"));
        }
    }
    if is_empty(&spec["policyTypes"]) {
        let egress = !is_empty(&spec["egress"]);
        spec["policyTypes"] = if egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
    }
}
