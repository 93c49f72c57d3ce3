//! Validation of Services.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

use super::super::Change;
use super::super::checks::{
    Errors, IMMUTABLE, labels, one_of, optional_one_of, port_number, port_reference, problems, required,
};
use super::super::value::{is_empty, items, number, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];
const FAMILY_POLICIES: [&str; 3] = ["PreferDualStack", "RequireDualStack", "SingleStack"];
const TRAFFIC_POLICIES: [&str; 2] = ["Cluster", "Local"];
const DISTRIBUTIONS: [&str; 3] = ["PreferClose", "PreferSameNode", "PreferSameZone"];
/// One day.
const AFFINITY_MAX_SECONDS: i64 = 86_400;

pub(super) fn service(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    let type_ = text(&spec["type"]);
    let headless = spec["clusterIP"] == "None";
    if items(&spec["ports"]).is_empty() && !headless && type_ != "ExternalName" {
        errors.push(FieldError::required(&path.child("ports"), ""));
    }
    by_type(errors, &path, spec, headless);
    ports(errors, &path.child("ports"), spec);
    labels(errors, &path.child("selector"), &spec["selector"]);
    affinity(errors, &path, spec);
    one_of(errors, &path.child("type"), &spec["type"], &TYPES);
    addresses(errors, &path, spec);
    policies(errors, &path, spec);
}

fn by_type(errors: &mut Errors, path: &FieldPath, spec: &Value, headless: bool) {
    match text(&spec["type"]) {
        "LoadBalancer" | "NodePort" if headless => {
            let detail = format!("may not be set to 'None' for {} services", text(&spec["type"]));
            errors.push(FieldError::invalid(&path.child("clusterIPs").index(0), "None", detail));
        }
        "ExternalName" => {
            for field in ["clusterIPs", "clusterIP"] {
                if !is_empty(&spec[field]) {
                    let detail = "may not be set for ExternalName services";
                    errors.push(FieldError::forbidden(&path.child(field), detail));
                }
            }
            if required(errors, &path.child("externalName"), &spec["externalName"]) {
                let name = text(&spec["externalName"]);
                let name = name.strip_suffix('.').unwrap_or(name);
                problems(errors, &path.child("externalName"), name, names::dns1123_subdomain(name));
            }
        }
        _ => {}
    }
    let balancer = spec["type"] == "LoadBalancer";
    for field in ["loadBalancerClass", "allocateLoadBalancerNodePorts"] {
        if !balancer && !spec[field].is_null() {
            errors.push(FieldError::forbidden(
                &path.child(field),
                "may only be used when `type` is 'LoadBalancer'",
            ));
        }
    }
    if !balancer && !items(&spec["loadBalancerSourceRanges"]).is_empty() {
        let detail = "may only be used when `type` is 'LoadBalancer'";
        errors.push(FieldError::forbidden(&path.child("LoadBalancerSourceRanges"), detail));
    }
    for (index, range) in items(&spec["loadBalancerSourceRanges"]).iter().enumerate() {
        let range = text(range).trim();
        problems(errors, &path.child("loadBalancerSourceRanges").index(index), range, names::cidr(range));
    }
}

fn ports(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let all = items(&spec["ports"]);
    let (mut port_names, mut numbers, mut node_ports) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
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
        let (number, node_port, protocol) =
            (number(&port["port"]), number(&port["nodePort"]), text(&port["protocol"]));
        if node_port != 0 && matches!(text(&spec["type"]), "ClusterIP" | "ExternalName") {
            let detail = format!("may not be used when `type` is '{}'", text(&spec["type"]));
            errors.push(FieldError::forbidden(&path.child("nodePort"), detail));
        } else if node_port != 0 && !node_ports.insert((protocol, node_port)) {
            errors.push(FieldError::duplicate(&path.child("nodePort"), node_port));
        }
        if !numbers.insert((protocol, number)) {
            let key = serde_json::json!({"port": number, "protocol": protocol});
            errors.push(FieldError::duplicate(&path, key));
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

fn family(address: &str) -> Option<&'static str> {
    address.parse().ok().map(|address: IpAddr| if address.is_ipv4() { "IPv4" } else { "IPv6" })
}

fn addresses(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let at = path.child("clusterIPs");
    let list: Vec<&str> = items(&spec["clusterIPs"]).iter().map(text).collect();
    let first = text(&spec["clusterIP"]);
    if list.is_empty() && !first.is_empty() {
        errors.push(FieldError::required(&at, ""));
    } else if list.first().is_some_and(|one| *one != first) {
        let detail = "first value must match `clusterIP`";
        errors.push(FieldError::invalid(&at, spec["clusterIPs"].clone(), detail));
    }
    for (index, address) in list.iter().enumerate() {
        match *address {
            "None" if index == 0 && list.len() == 1 => {}
            "None" => {
                let detail = "'None' must be the first and only value";
                errors.push(FieldError::invalid(&at, spec["clusterIPs"].clone(), detail));
            }
            address => problems(errors, &at.index(index), address, names::ip(address)),
        }
    }
    if list.len() > 2 {
        let detail = "may only hold up to 2 values";
        errors.push(FieldError::invalid(&at, spec["clusterIPs"].clone(), detail));
    }
    let families: Vec<_> = list.iter().filter_map(|address| family(address)).collect();
    if let [one, other] = families[..]
        && one == other
    {
        let detail = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid(&at, spec["clusterIPs"].clone(), detail));
    }
    let mut seen = BTreeSet::new();
    for (index, family) in items(&spec["ipFamilies"]).iter().enumerate() {
        let at = path.child("ipFamilies").index(index);
        if !FAMILIES.contains(&text(family)) {
            errors.push(FieldError::not_supported(&at, family.clone(), &FAMILIES));
        } else if !seen.insert(text(family)) {
            errors.push(FieldError::duplicate(&at, family.clone()));
        }
    }
    optional_one_of(errors, &path.child("ipFamilyPolicy"), &spec["ipFamilyPolicy"], &FAMILY_POLICIES);
    for (index, external) in items(&spec["externalIPs"]).iter().enumerate() {
        external_ip(errors, &path.child("externalIPs").index(index), text(external));
    }
}

/// An address outside the cluster can't be one that means "here" or "anywhere".
fn external_ip(errors: &mut Errors, path: &FieldPath, value: &str) {
    let bad = names::ip(value);
    if !bad.is_empty() {
        return problems(errors, path, value, bad);
    }
    let Ok(address) = value.parse::<IpAddr>() else { return };
    if address.is_unspecified() {
        errors.push(FieldError::invalid(path, value, format!("may not be unspecified ({value})")));
    }
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_loopback() {
        errors.push(FieldError::invalid(
            path,
            value,
            "may not be in the loopback range (127.0.0.0/8, ::1/128)",
        ));
    }
    if link_local {
        let detail = "may not be in the link-local range (169.254.0.0/16, fe80::/10)";
        errors.push(FieldError::invalid(path, value, detail));
    }
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
    let needs_check = spec["type"] == "LoadBalancer" && policy == "Local";
    if number(check) != 0 && !needs_check {
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
    if old["type"] == "ExternalName" || new["type"] == "ExternalName" {
        return;
    }
    let address = |spec: &Value, index: usize| text(&spec["clusterIPs"][index]).to_owned();
    let before = address(old, 0);
    if !before.is_empty() && before != address(new, 0) {
        let value = new["clusterIPs"].clone();
        let at = path.child("clusterIPs").index(0);
        errors.push(FieldError::invalid(&at, value, "may not change once set"));
    }
    if !is_empty(&old["ipFamilies"])
        && !is_empty(&new["ipFamilies"])
        && old["ipFamilies"][0] != new["ipFamilies"][0]
    {
        let value = new["ipFamilies"].clone();
        errors.push(FieldError::invalid(
            &path.child("ipFamilies").index(0),
            value,
            "may not change once set",
        ));
    }
    if old["type"] == "LoadBalancer"
        && new["type"] == "LoadBalancer"
        && old["loadBalancerClass"] != new["loadBalancerClass"]
    {
        let value = new["loadBalancerClass"].clone();
        let detail = "may not change once set";
        errors.push(FieldError::invalid(&path.child("loadBalancerClass"), value, detail));
    }
    if !is_empty(&old["healthCheckNodePort"])
        && !is_empty(&new["healthCheckNodePort"])
        && old["healthCheckNodePort"] != new["healthCheckNodePort"]
    {
        let value = new["healthCheckNodePort"].clone();
        errors.push(FieldError::invalid(&path.child("healthCheckNodePort"), value, IMMUTABLE));
    }
}
