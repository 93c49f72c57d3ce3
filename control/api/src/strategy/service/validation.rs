//! Validation of Services, in upstream's order.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

use super::super::Change;
use super::super::checks::{
    Errors, IMMUTABLE, labels, one_of, optional_name, optional_one_of, port_number, port_reference, problems,
    required,
};
use super::super::value::{is_empty, items, number, text};
use super::addresses;
use crate::field::{FieldError, FieldPath};
use crate::names;

const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
const TRAFFIC_POLICIES: [&str; 2] = ["Cluster", "Local"];
const DISTRIBUTIONS: [&str; 3] = ["PreferClose", "PreferSameNode", "PreferSameZone"];
/// One day.
const AFFINITY_MAX_SECONDS: i64 = 86_400;
const TOPOLOGY_MODE: &str = "service.kubernetes.io/topology-mode";
const TOPOLOGY_HINTS: &str = "service.kubernetes.io/topology-aware-hints";
const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
const FOR_BALANCERS: &str = "may only be used when `type` is 'LoadBalancer'";
/// A load balancer for it would open every kubelet to the world.
const KUBELET_PORT: i64 = 10_250;

pub(super) fn service(object: &Value, errors: &mut Errors) {
    topology_annotations(errors, object);
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    if items(&spec["ports"]).is_empty() && !addresses::is_headless(spec) && spec["type"] != "ExternalName" {
        errors.push(FieldError::required(&path.child("ports"), ""));
    }
    by_type(errors, &path, spec);
    ports(errors, &path.child("ports"), spec);
    labels(errors, &path.child("selector"), &spec["selector"]);
    affinity(errors, &path, spec);
    addresses::related(errors, spec);
    for (index, external) in items(&spec["externalIPs"]).iter().enumerate() {
        external_ip(errors, &path.child("externalIPs").index(index), text(external));
    }
    one_of(errors, &path.child("type"), &spec["type"], &TYPES);
    port_pairs(errors, &path.child("ports"), spec);
    source_ranges(errors, &path, object);
    balancer(errors, &path, spec);
    policies(errors, &path, spec);
}

fn topology_annotations(errors: &mut Errors, object: &Value) {
    let annotations = &object["metadata"]["annotations"];
    let (mode, hints) = (&annotations[TOPOLOGY_MODE], &annotations[TOPOLOGY_HINTS]);
    if mode.is_string() && hints.is_string() && mode != hints {
        let path = FieldPath::new("metadata").child("annotations").key(TOPOLOGY_MODE);
        let detail = format!("must match annotations[{TOPOLOGY_HINTS}] when both are specified");
        errors.push(FieldError::invalid(&path, mode.clone(), detail));
    }
}

fn by_type(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let type_ = text(&spec["type"]);
    if type_ == "LoadBalancer" {
        for (index, port) in items(&spec["ports"]).iter().enumerate() {
            if port["port"] == KUBELET_PORT {
                let detail =
                    format!("may not expose port {KUBELET_PORT} externally since it is used by kubelet");
                let path = path.child("ports").index(index);
                errors.push(FieldError::invalid(&path, KUBELET_PORT, detail));
            }
        }
    }
    if matches!(type_, "LoadBalancer" | "NodePort") && addresses::is_headless(spec) {
        let detail = format!("may not be set to 'None' for {type_} services");
        errors.push(FieldError::invalid(&path.child("clusterIPs").index(0), "None", detail));
    }
    if type_ == "ExternalName" {
        addresses::none_for_external_name(errors, spec);
        if required(errors, &path.child("externalName"), &spec["externalName"]) {
            let name = text(&spec["externalName"]);
            let name = name.strip_suffix('.').unwrap_or(name);
            problems(errors, &path.child("externalName"), name, names::dns1123_subdomain(name));
        }
    }
}

fn ports(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let all = items(&spec["ports"]);
    let mut port_names = BTreeSet::new();
    for (index, port) in all.iter().enumerate() {
        let path = path.index(index);
        let name = text(&port["name"]);
        if name.is_empty() && all.len() > 1 {
            errors.push(FieldError::required(&path.child("name"), ""));
        } else if !name.is_empty() {
            problems(errors, &path.child("name"), name, names::dns1123_label(name));
            if !port_names.insert(name) {
                errors.push(FieldError::duplicate(&path.child("name"), name));
            }
        }
        port_number(errors, &path.child("port"), &port["port"]);
        one_of(errors, &path.child("protocol"), &port["protocol"], &PROTOCOLS);
        port_reference(errors, &path.child("targetPort"), &port["targetPort"]);
        optional_name(errors, &path.child("appProtocol"), &port["appProtocol"], names::qualified_name);
    }
}

/// Pairs of protocol and port, and of protocol and node port, are each there once.
fn port_pairs(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let all = items(&spec["ports"]);
    let (mut numbers, mut node_ports) = (BTreeSet::new(), BTreeSet::new());
    if spec["type"] == "ClusterIP" {
        for (index, _) in all.iter().enumerate().filter(|(_, port)| number(&port["nodePort"]) != 0) {
            let detail = "may not be used when `type` is 'ClusterIP'";
            errors.push(FieldError::forbidden(&path.index(index).child("nodePort"), detail));
        }
    }
    for (index, port) in all.iter().enumerate() {
        let pair = (text(&port["protocol"]), number(&port["nodePort"]));
        if pair.1 != 0 && !node_ports.insert(pair) {
            errors.push(FieldError::duplicate(&path.index(index).child("nodePort"), pair.1));
        }
    }
    for (index, port) in all.iter().enumerate() {
        let (protocol, number) = (text(&port["protocol"]), number(&port["port"]));
        if !numbers.insert((protocol, number)) {
            let key = serde_json::json!({"port": number, "protocol": protocol});
            errors.push(FieldError::duplicate(&path.index(index), key));
        }
    }
}

fn affinity(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    one_of(errors, &path.child("sessionAffinity"), &spec["sessionAffinity"], &["ClientIP", "None"]);
    let (config, at) = (&spec["sessionAffinityConfig"], path.child("sessionAffinityConfig"));
    if spec["sessionAffinity"] == "None" && !config.is_null() {
        let detail = "must not be set when session affinity is None";
        errors.push(FieldError::forbidden(&at, detail));
    }
    if spec["sessionAffinity"] != "ClientIP" {
        return;
    }
    let at = at.child("clientIP").child("timeoutSeconds");
    match config["clientIP"]["timeoutSeconds"].as_i64() {
        None => errors.push(FieldError::required(&at, "when session affinity type is ClientIP")),
        Some(seconds) if !(1..=AFFINITY_MAX_SECONDS).contains(&seconds) => {
            let detail = format!("must be greater than 0 and less than {AFFINITY_MAX_SECONDS}");
            errors.push(FieldError::invalid(&at, seconds, detail));
        }
        Some(_) => {}
    }
}

/// An address outside the cluster can't be one that means "here", "anywhere" or "everyone".
fn external_ip(errors: &mut Errors, path: &FieldPath, value: &str) {
    let bad = names::ip(value);
    if !bad.is_empty() {
        return problems(errors, path, value, bad);
    }
    let Ok(address) = value.parse::<IpAddr>() else { return };
    let (link_local, multicast) = match address {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.octets()[..3] == [224, 0, 0]),
        IpAddr::V6(v6) => (v6.is_unicast_link_local(), v6.segments()[0] & 0xff0f == 0xff02),
    };
    let rows = [
        (address.is_unspecified(), format!("may not be unspecified ({value})")),
        (address.is_loopback(), "may not be in the loopback range (127.0.0.0/8, ::1/128)".to_owned()),
        (link_local, "may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_owned()),
        (multicast, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)".to_owned()),
    ];
    for (_, detail) in rows.into_iter().filter(|(broken, _)| *broken) {
        errors.push(FieldError::invalid(path, value, detail));
    }
}

/// The field, or the annotation of before the field.
fn source_ranges(errors: &mut Errors, path: &FieldPath, object: &Value) {
    let balancer = object["spec"]["type"] == "LoadBalancer";
    let ranges = items(&object["spec"]["loadBalancerSourceRanges"]);
    if !ranges.is_empty() {
        // Upstream writes the name of its Go field.
        let path = path.child("LoadBalancerSourceRanges");
        if !balancer {
            errors.push(FieldError::forbidden(&path, FOR_BALANCERS));
        }
        for (index, range) in ranges.iter().enumerate() {
            let range = text(range).trim();
            problems(errors, &path.index(index), range, names::cidr(range));
        }
        return;
    }
    let Some(text) = object["metadata"]["annotations"][SOURCE_RANGES].as_str() else { return };
    let path = FieldPath::new("metadata").child("annotations").key(SOURCE_RANGES);
    if !balancer {
        errors.push(FieldError::forbidden(&path, FOR_BALANCERS));
    } else if !text.trim().is_empty() {
        for range in text.split(',').map(str::trim) {
            problems(errors, &path, range, names::cidr(range));
        }
    }
}

fn balancer(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let balancer = spec["type"] == "LoadBalancer";
    let allocate = &spec["allocateLoadBalancerNodePorts"];
    if !balancer && !allocate.is_null() {
        errors.push(FieldError::forbidden(&path.child("allocateLoadBalancerNodePorts"), FOR_BALANCERS));
    }
    if balancer && allocate.is_null() {
        errors.push(FieldError::required(&FieldPath::new("allocateLoadBalancerNodePorts"), ""));
    }
    let (class, path) = (&spec["loadBalancerClass"], path.child("loadBalancerClass"));
    if class.is_null() {
        return;
    }
    if balancer {
        problems(errors, &path, text(class), names::qualified_name(text(class)));
    } else {
        errors.push(FieldError::forbidden(&path, FOR_BALANCERS));
    }
}

fn needs_health_check(spec: &Value) -> bool {
    spec["type"] == "LoadBalancer" && spec["externalTrafficPolicy"] == "Local"
}

fn policies(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let external = matches!(text(&spec["type"]), "NodePort" | "LoadBalancer")
        || (spec["type"] == "ClusterIP" && !items(&spec["externalIPs"]).is_empty());
    let (policy, at) = (&spec["externalTrafficPolicy"], path.child("externalTrafficPolicy"));
    if external {
        one_of(errors, &at, policy, &TRAFFIC_POLICIES);
    } else if !is_empty(policy) {
        let detail = "may only be set for externally-accessible services";
        errors.push(FieldError::invalid(&at, policy.clone(), detail));
    }
    let check = &spec["healthCheckNodePort"];
    if number(check) != 0 && !needs_health_check(spec) {
        let detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        errors.push(FieldError::invalid(&path.child("healthCheckNodePort"), check.clone(), detail));
    }
    let internal = &spec["internalTrafficPolicy"];
    if internal.is_null() && matches!(text(&spec["type"]), "ClusterIP" | "NodePort" | "LoadBalancer") {
        errors.push(FieldError::required(&path.child("internalTrafficPolicy"), ""));
    }
    optional_one_of(errors, &path.child("internalTrafficPolicy"), internal, &TRAFFIC_POLICIES);
    optional_one_of(errors, &path.child("trafficDistribution"), &spec["trafficDistribution"], &DISTRIBUTIONS);
}

/// A Service that keeps its type keeps its addresses; the second may come and go.
pub(super) fn service_update(change: &Change<'_>, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let (new, old) = (&change.new["spec"], &change.old["spec"]);
    addresses::change(errors, new, old);
    if old["type"] == "LoadBalancer"
        && new["type"] == "LoadBalancer"
        && old["loadBalancerClass"] != new["loadBalancerClass"]
    {
        let value = new["loadBalancerClass"].clone();
        let detail = "may not change once set";
        errors.push(FieldError::invalid(&path.child("loadBalancerClass"), value, detail));
    }
    if needs_health_check(old)
        && needs_health_check(new)
        && number(&old["healthCheckNodePort"]) != number(&new["healthCheckNodePort"])
    {
        let value = new["healthCheckNodePort"].clone();
        errors.push(FieldError::invalid(&path.child("healthCheckNodePort"), value, IMMUTABLE));
    }
}

/// The status says where the load balancer answers.
pub(super) fn service_status(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("status").child("loadBalancer").child("ingress");
    let ingress = items(&object["status"]["loadBalancer"]["ingress"]);
    if !ingress.is_empty() && object["spec"]["type"] != "LoadBalancer" {
        let detail = "may only be used when `spec.type` is \"LoadBalancer\"";
        errors.push(FieldError::forbidden(&path, detail));
        return;
    }
    balancer_ingress(errors, &path, ingress, true);
}

/// Addresses and names of a load balancer; those of a Service say how the address is to be taken.
pub(super) fn balancer_ingress(errors: &mut Errors, path: &FieldPath, ingress: &[Value], with_mode: bool) {
    for (index, one) in ingress.iter().enumerate() {
        let path = path.index(index);
        let (ip, mode, host) = (text(&one["ip"]), &one["ipMode"], text(&one["hostname"]));
        if !ip.is_empty() {
            problems(errors, &path.child("ip"), ip, names::ip(ip));
        }
        if with_mode && !ip.is_empty() && mode.is_null() {
            errors.push(FieldError::required(&path.child("ipMode"), "must be specified when `ip` is set"));
        } else if ip.is_empty() && !mode.is_null() {
            let detail = "may not be specified when `ip` is not set";
            errors.push(FieldError::forbidden(&path.child("ipMode"), detail));
        } else if !mode.is_null() {
            optional_one_of(errors, &path.child("ipMode"), mode, &["Proxy", "VIP"]);
        }
        if !host.is_empty() {
            problems(errors, &path.child("hostname"), host, names::dns1123_subdomain(host));
            if host.parse::<IpAddr>().is_ok() {
                let detail = "must be a DNS name, not an IP address";
                errors.push(FieldError::invalid(&path.child("hostname"), host, detail));
            }
        }
    }
}

#[cfg(test)]
mod tests;
