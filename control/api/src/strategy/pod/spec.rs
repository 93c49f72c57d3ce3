//! Validation of a pod's spec, in a pod or in a template.

use serde_json::Value;

use super::super::checks::{
    Errors, in_range, labels, one_of, optional_name, optional_one_of, problems, required,
};
use super::super::value::{entries, is_empty, items, text};
use super::{containers, placement, resources, security, volumes};
use crate::field::{FieldError, FieldPath};
use crate::names;

const RESTART_POLICIES: [&str; 3] = ["Always", "Never", "OnFailure"];
const DNS_POLICIES: [&str; 4] = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
const MAX_NAME_SERVERS: usize = 3;
const MAX_SEARCH_PATHS: usize = 32;
const MAX_SEARCH_BYTES: usize = 2048;

pub(super) fn validate(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let known = volumes::validate(errors, &path.child("volumes"), &spec["volumes"]);
    containers::validate(errors, path, spec, &known);
    containers::ephemeral(errors, &path.child("ephemeralContainers"), spec, &known);
    one_of(errors, &path.child("restartPolicy"), &spec["restartPolicy"], &RESTART_POLICIES);
    one_of(errors, &path.child("dnsPolicy"), &spec["dnsPolicy"], &DNS_POLICIES);
    labels(errors, &path.child("nodeSelector"), &spec["nodeSelector"]);
    security::pod(errors, &path.child("securityContext"), spec);
    placement::affinity(errors, &path.child("affinity"), &spec["affinity"]);
    placement::tolerations(errors, &path.child("tolerations"), &spec["tolerations"]);
    placement::spread(errors, &path.child("topologySpreadConstraints"), &spec["topologySpreadConstraints"]);
    dns(errors, path, spec);
    identity(errors, path, spec);
    in_range(
        errors,
        &path.child("activeDeadlineSeconds"),
        &spec["activeDeadlineSeconds"],
        1,
        i64::from(i32::MAX),
    );
    for (name, amount) in entries(&spec["overhead"]) {
        resources::resource_amount(errors, &path.child("overhead").key(name), name, amount);
    }
    if !spec["resources"].is_null() {
        resources::validate(errors, &path.child("resources"), &spec["resources"]);
    }
    for (index, gate) in items(&spec["readinessGates"]).iter().enumerate() {
        let path = path.child("readinessGates").index(index).child("conditionType");
        let condition = text(&gate["conditionType"]);
        problems(errors, &path, condition, names::qualified_name(condition));
    }
    scheduling_gates(errors, &path.child("schedulingGates"), &spec["schedulingGates"]);
}

fn scheduling_gates(errors: &mut Errors, path: &FieldPath, gates: &Value) {
    let mut seen = std::collections::BTreeSet::new();
    for (index, gate) in items(gates).iter().enumerate() {
        let name = text(&gate["name"]);
        problems(errors, &path.index(index), name, names::qualified_name(name));
        if !seen.insert(name) {
            errors.push(FieldError::duplicate(&path.index(index), name));
        }
    }
}

/// What is wrong with a name.
type Rule = fn(&str) -> Vec<String>;

/// Names of the pod itself and of what it refers to.
fn identity(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let rules: [(&str, Rule); 6] = [
        ("serviceAccountName", names::dns1123_subdomain),
        ("nodeName", names::dns1123_subdomain),
        ("hostname", names::dns1123_label),
        ("subdomain", names::dns1123_label),
        ("priorityClassName", names::dns1123_subdomain),
        ("runtimeClassName", names::dns1123_subdomain),
    ];
    for (field, rule) in rules {
        optional_name(errors, &path.child(field), &spec[field], rule);
    }
    for (index, secret) in items(&spec["imagePullSecrets"]).iter().enumerate() {
        let path = path.child("imagePullSecrets").index(index).child("name");
        required(errors, &path, &secret["name"]);
    }
    let policies = ["Never", "PreemptLowerPriority"];
    optional_one_of(errors, &path.child("preemptionPolicy"), &spec["preemptionPolicy"], &policies);
    if !spec["os"].is_null() {
        one_of(errors, &path.child("os").child("name"), &spec["os"]["name"], &["linux", "windows"]);
    }
    for (index, alias) in items(&spec["hostAliases"]).iter().enumerate() {
        let path = path.child("hostAliases").index(index);
        problems(errors, &path.child("ip"), text(&alias["ip"]), names::ip(text(&alias["ip"])));
        for host in items(&alias["hostnames"]) {
            problems(errors, &path.child("hostnames"), text(host), names::dns1123_subdomain(text(host)));
        }
    }
}

fn dns(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let (config, path) = (&spec["dnsConfig"], path.child("dnsConfig"));
    let servers = items(&config["nameservers"]);
    let at = path.child("nameservers");
    if spec["dnsPolicy"] == "None" && servers.is_empty() {
        let missing = if config.is_null() { &path } else { &at };
        let detail = "must provide `dnsConfig` when `dnsPolicy` is None";
        let detail = if config.is_null() {
            detail
        } else {
            "must provide at least one DNS nameserver when `dnsPolicy` is None"
        };
        errors.push(FieldError::required(missing, detail));
    }
    if servers.len() > MAX_NAME_SERVERS {
        let detail = format!("must not have more than {MAX_NAME_SERVERS} nameservers");
        errors.push(FieldError::invalid(&at, config["nameservers"].clone(), detail));
    }
    for (index, server) in servers.iter().enumerate() {
        problems(errors, &at.index(index), text(server), names::ip(text(server)));
    }
    let searches = items(&config["searches"]);
    let at = path.child("searches");
    if searches.len() > MAX_SEARCH_PATHS {
        let detail = format!("must not have more than {MAX_SEARCH_PATHS} search paths");
        errors.push(FieldError::invalid(&at, config["searches"].clone(), detail));
    }
    let bytes: usize =
        searches.iter().map(|search| text(search).len()).sum::<usize>() + searches.len().saturating_sub(1);
    if bytes > MAX_SEARCH_BYTES {
        let detail = format!(
            "must not have more than {MAX_SEARCH_BYTES} characters (including spaces) in the search list"
        );
        errors.push(FieldError::invalid(&at, config["searches"].clone(), detail));
    }
    for (index, search) in searches.iter().enumerate().filter(|(_, search)| text(search) != ".") {
        let name = text(search).strip_suffix('.').unwrap_or(text(search));
        problems(errors, &at.index(index), name, names::dns1123_subdomain_with_underscore(name));
    }
    for (index, option) in items(&config["options"]).iter().enumerate() {
        if is_empty(&option["name"]) {
            errors.push(FieldError::required(&path.child("options").index(index), "must not be empty"));
        }
    }
}
